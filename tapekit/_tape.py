"""A persistent gradient tape that releases itself, and names for intermediate values."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapekit._describe import describe, unique_names, variable_name

_NONE = tf.UnconnectedGradients.NONE
_collector: contextvars.ContextVar[Callable[[str, Any], None] | None] = contextvars.ContextVar(
    "collector", default=None
)


class TapeReleasedError(RuntimeError):
    """A `PersistentTape` was used after its `with` block, where it has released what it recorded.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(3.0)
        >>> with tk.PersistentTape() as tape:
        ...     y = x**2
        >>> tape.gradient(y, x)
        Traceback (most recent call last):
        ...
        tapekit._tape.TapeReleasedError: this PersistentTape released its records at the end of its `with` block: ...
    """


def intermediate(name: str, value: Any) -> Any:
    """Names an intermediate value of an objective, so that gradients with respect to it can be taken.

    Args:
        name: the name, given once in an evaluation.
        value: a tensor of any shape and float or complex dtype, or a nested structure of them.

    Returns:
        `value`, unchanged. With neither a `PersistentTape` nor `TapeStep(intermediates=...)` around it,
        nothing else happens.

    Raises:
        TypeError: `name` is not a string or `value` holds something else than tensors.
        ValueError: the name has been given already.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(1.0)
        >>> loop = tk.OptimizationLoop("sgd", step=tk.TapeStep(intermediates=True), max_iterations=1)
        >>> result = loop.minimize(lambda: tk.intermediate("z", x - 4.0) ** 2, [x])
        >>> result.history["gradient_norm/z"].tolist()
        [6.0]
    """
    collect = _collector.get()
    if collect is not None:
        collect(name, value)
    return value


@contextlib.contextmanager
def collecting(collect: Callable[[str, Any], None]) -> Iterator[None]:
    """Sends what `intermediate` is given inside the block to `collect`."""
    token = _collector.set(collect)
    try:
        yield
    finally:
        _collector.reset(token)


class Intermediates:
    """The named intermediate values of one evaluation.

    Args:
        watch: what makes a tape watch a tensor.
    """

    def __init__(self, watch: Callable[[Any], None]) -> None:
        self.values: dict[str, Any] = {}
        self._watch = watch

    def add(self, name: str, value: Any) -> None:
        """Adds a named value and watches it."""
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string, received {describe(name)}.")
        if name in self.values:
            raise ValueError(f"`name` must be new in an evaluation, received {name!r} for the second time.")
        leaves = [value] if isinstance(value, tf.Tensor) else tf.nest.flatten(value)
        for leaf in leaves:
            if not isinstance(leaf, (tf.Tensor, tf.Variable, keras.Variable)):
                raise TypeError(f"`value` of {name!r} must be a tensor or hold tensors, received {describe(leaf)}.")
        self._watch([native(leaf) for leaf in leaves if _differentiable(leaf)])
        self.values[name] = value


class PersistentTape:
    """A `tf.GradientTape` for any number of gradients, which releases itself at the end of its block.

    Gradients are taken inside the block; taking one is not recorded, so that memory does not grow.
    Everything that `tf.GradientTape` offers is here under the same names, and `keras.Variable` is
    accepted wherever `tf.Variable` is. At the end of the block, however it is left, the records are
    released; gradients that were taken stay valid. Nested tapes give higher derivatives.

    Args:
        watch_accessed_variables: whether trainable variables are watched when they are read.

    Raises:
        TapeReleasedError: the tape is used after its block.
        RuntimeError: the tape is used before its block, or entered twice.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(1.0, name="x")
        >>> with tk.PersistentTape() as tape:
        ...     z = tape.intermediate("z", x - 4.0)
        ...     y = z**2
        ...     dz, dx = tape.gradient(y, z), tape.gradient(y, x)
        ...     everything = tape.gradients(y)
        >>> float(dz), float(dx), sorted(everything)
        (-6.0, -6.0, ['x', 'z'])
    """

    def __init__(self, watch_accessed_variables: bool = True) -> None:
        self._watch_accessed_variables = watch_accessed_variables
        self._tape: Any = None
        self._entered = False

    def __enter__(self) -> PersistentTape:
        if self._entered:
            raise RuntimeError("a PersistentTape is entered once; make a new one for another block.")
        self._entered = True
        self._tape = tf.GradientTape(persistent=True, watch_accessed_variables=self._watch_accessed_variables)
        self._intermediates = Intermediates(self._tape.watch)
        self._watched: list[Any] = []
        self._token = _collector.set(self._intermediates.add)
        self._tape.__enter__()
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        tape, self._tape = self._tape, None
        _collector.reset(self._token)
        if kind is not None:
            tape.reset()  # a traceback may keep the tape, but not what it has recorded
        tape.__exit__(kind, value, traceback)
        del self._intermediates, self._watched

    @property
    def _open(self) -> tf.GradientTape:
        if self._tape is None:
            if self._entered:
                raise TapeReleasedError(
                    "this PersistentTape released its records at the end of its `with` block: take gradients inside"
                    " the block and keep them."
                )
            raise RuntimeError("a PersistentTape records inside its block: write `with PersistentTape() as tape:`.")
        return self._tape

    def watch(self, tensor: Any) -> None:
        """Records what is computed from a tensor or variable from now on.

        Args:
            tensor: a tensor, `tf.Variable` or `keras.Variable` of float or complex dtype, or a nested
                structure of them.
        """
        self._open.watch(_native(tensor))
        self._watched += [native(leaf) for leaf in tf.nest.flatten(tensor)]

    def watched_variables(self) -> tuple[tf.Variable, ...]:
        """Returns the variables that are watched, in the order of their first use."""
        return self._open.watched_variables()

    def intermediate(self, name: str, value: Any) -> Any:
        """Names a value and returns it unchanged; see `tapekit.intermediate`."""
        assert self._open
        self._intermediates.add(name, value)
        return value

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: tf.UnconnectedGradients = _NONE,
        *,
        unconnected: str | None = None,
    ) -> Any:
        """Returns the gradient of `target` with respect to `sources`, without recording how it is computed.

        Args:
            target: a tensor or a nested structure of tensors, whose sum is differentiated.
            sources: a tensor or variable, or a nested structure of them.
            output_gradients: what to multiply the derivative of each target by, of its shape; 1 by default.
            unconnected_gradients: what stands for a gradient that does not exist: `NONE` or `ZERO`.
            unconnected: `"raise"` raises instead, with the sentence that `explain` gives.

        Returns:
            A tensor or `tf.IndexedSlices` of the shape and dtype of each source, in the structure of `sources`.

        Raises:
            TypeError: `target` is None.
            ValueError: `target` or `sources` is empty; or a gradient does not exist and `unconnected="raise"`.
            TapeReleasedError: the block has ended.
        """
        tape = self._open
        if unconnected not in (None, "raise"):
            raise ValueError(f'`unconnected` must be None or "raise", received {describe(unconnected)}.')
        _check_not_empty("target", target)
        _check_not_empty("sources", sources)
        with _paused(tape):
            gradients = tape.gradient(_native(target), _native(sources), output_gradients, unconnected_gradients)
        if unconnected == "raise":
            for source, gradient in zip(tf.nest.flatten(sources), tf.nest.flatten(gradients), strict=True):
                if gradient is None:
                    raise ValueError(self.explain(target, source))
        return gradients

    def gradients(self, target: Any) -> dict[str, Any]:
        """Returns the gradients with respect to every named intermediate and every watched variable.

        Args:
            target: a tensor, or a nested structure of tensors whose sum is differentiated.

        Returns:
            A dict from the names of the intermediates and the paths of the variables to the gradients, in
            the structure of each; None where there is none.

        Raises:
            ValueError: an intermediate has the name of a variable.
        """
        variables = self._open.watched_variables()
        sources = dict(self._intermediates.values)
        for name, variable in zip(unique_names(variables), variables, strict=True):
            if name in sources:
                raise ValueError(
                    f"`name` of an intermediate must differ from those of the variables, received {name!r}."
                )
            sources[name] = variable
        return self.gradient(target, sources)

    def jacobian(
        self,
        target: Any,
        sources: Any,
        unconnected_gradients: tf.UnconnectedGradients = _NONE,
        parallel_iterations: int | None = None,
        experimental_use_pfor: bool = True,
    ) -> Any:
        """Returns the derivative of each entry of `target`, of shape `target.shape + source.shape`.

        Args:
            target: a tensor.
            sources: a tensor or variable, or a nested structure of them.
            unconnected_gradients: see `gradient`.
            parallel_iterations: how many iterations may run in parallel, at a cost in memory.
            experimental_use_pfor: whether to vectorize the computation.
        """
        tape = self._open
        with _paused(tape):
            return tape.jacobian(
                _native(target), _native(sources), unconnected_gradients, parallel_iterations, experimental_use_pfor
            )

    def batch_jacobian(
        self,
        target: Any,
        source: Any,
        unconnected_gradients: tf.UnconnectedGradients = _NONE,
        parallel_iterations: int | None = None,
        experimental_use_pfor: bool = True,
    ) -> Any:
        """Returns the derivatives row by row, of shape `[batch, *target.shape[1:], *source.shape[1:]]`.

        Args:
            target: a tensor of shape `[batch, ...]`, each row of which depends on that row of `source` alone.
            source: a tensor of shape `[batch, ...]`.
            unconnected_gradients: see `gradient`.
            parallel_iterations: see `jacobian`.
            experimental_use_pfor: see `jacobian`.
        """
        tape = self._open
        with _paused(tape):
            return tape.batch_jacobian(
                _native(target), _native(source), unconnected_gradients, parallel_iterations, experimental_use_pfor
            )

    def hessian(self, target: Any, source: Any) -> tf.Tensor:
        """Returns the matrix of second derivatives, H_ij = d^2 target / (d source_i d source_j).

        It is the Jacobian of the recorded gradient, so it takes memory for n backward passes.

        Args:
            target: a scalar tensor.
            source: a tensor or variable of n entries.

        Returns:
            A tensor of shape `source.shape + source.shape`.

        Raises:
            ValueError: `target` is not a scalar or does not depend on `source`.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable([1.0, 2.0])
            >>> with tk.PersistentTape() as tape:
            ...     hessian = tape.hessian(x[0] ** 2 * x[1], x)
            >>> hessian.numpy().tolist()
            [[4.0, 2.0], [2.0, 0.0]]
        """
        gradient = self._recorded_gradient(target, source)
        return self.jacobian(gradient, source, tf.UnconnectedGradients.ZERO)

    def hessian_vector_product(self, target: Any, source: Any, vector: Any) -> Any:
        """Returns the product of the Hessian and a vector without the Hessian: H v = d (g . v) / d source.

        Two backward passes, whatever the number of entries (Pearlmutter, "Fast Exact Multiplication by the
        Hessian", Neural Computation 6, 1994).

        Args:
            target: a scalar tensor.
            source: a tensor or variable, or a nested structure of them.
            vector: tensors of the shapes, dtypes and structure of `source`.

        Returns:
            Tensors of the shapes, dtypes and structure of `source`.

        Raises:
            ValueError: `target` is not a scalar or does not depend on `source`.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable([1.0, 2.0])
            >>> with tk.PersistentTape() as tape:
            ...     product = tape.hessian_vector_product(x[0] ** 2 * x[1], x, tf.constant([1.0, 0.0]))
            >>> product.numpy().tolist()
            [4.0, 2.0]
        """
        gradient = self._recorded_gradient(target, source)
        return self.gradient(gradient, source, vector, tf.UnconnectedGradients.ZERO)

    def _recorded_gradient(self, target: Any, source: Any) -> Any:
        tape = self._open
        if not isinstance(target, tf.Tensor) or target.shape.rank != 0:
            raise ValueError(f"`target` must be a scalar tensor, received {describe(target)}.")
        with _without_the_warning():
            gradient = tape.gradient(target, _native(source))
        for leaf, found in zip(tf.nest.flatten(source), tf.nest.flatten(gradient), strict=True):
            if found is None:
                raise ValueError(self.explain(target, leaf))
        return tf.nest.map_structure(tf.convert_to_tensor, gradient)

    def stop_recording(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which nothing is recorded."""
        return self._open.stop_recording()

    def reset(self) -> None:
        """Forgets everything that has been recorded and named so far."""
        self._open.reset()
        self._intermediates.values.clear()
        self._watched.clear()

    def explain(self, target: Any, source: Any) -> str:
        """Returns why the gradient of `target` with respect to `source` is None, in a sentence.

        Where the tape does not know enough to tell the causes apart, the sentence names them all.

        Args:
            target: what was to be differentiated.
            source: a tensor or variable.

        Raises:
            TypeError: `source` is neither a tensor nor a variable.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> count = tf.Variable(3)
            >>> with tk.PersistentTape() as tape:
            ...     print(tape.explain(tf.cast(count, tf.float32) ** 2, count))
            the source is of integer type int32, and no gradient flows through integers: make it a float
        """
        tape = self._open
        if not isinstance(source, (tf.Tensor, tf.Variable, keras.Variable)):
            raise TypeError(f"`source` must be a tensor or a variable, received {describe(source)}.")
        return _explain_ends(target, source) or self._explain_source(tape, source) or self._explain_path(target, source)

    def _explain_source(self, tape: tf.GradientTape, source: Any) -> str | None:
        """Says why the tape does not know the source, if it does not."""
        known = native(source)
        if any(known is other for other in (*tape.watched_variables(), *self._watched)):
            return None
        if isinstance(known, tf.Variable):
            name = repr(variable_name(source))
            if not known.trainable:
                return f"the variable {name} is not trainable, so it is not watched: call tape.watch on it first"
            if not self._watch_accessed_variables:
                return f"the variable {name} is not watched, as watch_accessed_variables=False: call tape.watch on it"
            return f"the variable {name} was not read inside the block: compute the target from it there"
        if self._depends(source):
            return None
        return (
            "the source is a constant to the tape, which does not watch it: it was made before the block, or inside"
            " from nothing that is watched; call tape.watch on it before its use"
        )

    def _depends(self, target: Any) -> bool:
        """Whether a tensor was computed from anything that the tape watches."""
        watched = [*self._open.watched_variables(), *self._watched]
        watched += [native(leaf) for leaf in tf.nest.flatten(self._intermediates.values)]
        if not watched:
            return False
        with _paused(self._open):
            return any(gradient is not None for gradient in self._open.gradient(target, watched))

    def _explain_path(self, target: Any, source: Any) -> str:
        with _paused(self._open):
            (gradient,) = self._open.gradient(_native(target), [native(source)])
        if gradient is not None:
            return "the gradient is not None: the target depends on the source"
        broken = _break_in_graph(target, source)
        if broken is not None:
            return broken
        causes = (
            "its path passes tf.stop_gradient, NumPy or Python, an integer or an op without a gradient, or the source"
            " is an output of the tf.function that computed the target from a copy inside: the tape cannot tell which"
        )
        what = "does not use the source" if self._depends(target) else "depends on nothing that is watched"
        return f"the target {what}, as far as the tape saw; perhaps {causes}"


def native(variable: Any) -> Any:
    """Returns the `tf.Variable` that a `keras.Variable` holds, or the argument itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _native(structure: Any) -> Any:
    if isinstance(structure, (tf.Tensor, tf.Variable)):
        return structure
    return tf.nest.map_structure(native, structure)


def _differentiable(value: Any) -> bool:
    dtype = tf.as_dtype(value.dtype)
    return dtype.is_floating or dtype.is_complex


def _check_not_empty(name: str, structure: Any) -> None:
    if isinstance(structure, (list, tuple, dict)) and not tf.nest.flatten(structure):
        raise ValueError(f"`{name}` must hold at least one tensor, received {describe(structure)}.")


def _paused(tape: Any) -> contextlib.AbstractContextManager[None]:
    # inside the caller's own stop_recording there is nothing to pause
    return tape.stop_recording() if tape._recording else contextlib.nullcontext()


@contextlib.contextmanager
def _without_the_warning() -> Iterator[None]:
    """Silences TensorFlow's advice against recording a gradient, which a second derivative needs."""

    def keep(record: logging.LogRecord) -> bool:
        return "GradientTape.gradient on a persistent tape" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _explain_ends(target: Any, source: Any) -> str | None:
    for leaf in tf.nest.flatten(target):
        if isinstance(leaf, (np.ndarray, np.generic, int, float)):
            return (
                f"the target is {describe(leaf)}: it passed through NumPy or Python, which a tape does not see; keep it"
                " a tensor"
            )
    for what, leaf in (("source", source), *(("target", leaf) for leaf in tf.nest.flatten(target))):
        dtype = tf.as_dtype(leaf.dtype)
        if not _differentiable(leaf):
            kind = "integer type" if dtype.is_integer else "type"
            through = "integers" if dtype.is_integer else "it"
            return f"the {what} is of {kind} {dtype.name}, and no gradient flows through {through}: make it a float"
    return None


_BREAKS = {
    "StopGradient": "tf.stop_gradient",
    "PreventGradient": "an op that prevents gradients",
    "PyFunc": "tf.numpy_function, that is NumPy,",
    "PyFuncStateless": "tf.numpy_function, that is NumPy,",
}


def _break_in_graph(target: Any, source: Any) -> str | None:
    """Looks for what breaks the path in the graph of a tf.function; eager tensors have no graph to look at."""
    target, source = tf.nest.flatten(target)[0], native(source)
    if tf.executing_eagerly() or not hasattr(target, "op"):
        return None
    origin = _in_graph(target.graph, source)
    if origin is None:
        return "the target does not use the source"
    ancestors = _ancestors(target.op)
    if origin.op not in ancestors:
        return "the target does not use the source"
    if origin.op.type in ("PartitionedCall", "StatefulPartitionedCall") and target.op is origin.op:
        return (
            "the source is an output of the tf.function that computed the target, which used its own copy inside: take"
            " the gradient inside that function"
        )
    for op in sorted(ancestors, key=lambda op: op.name):
        if origin.op in _ancestors(op) and op is not origin.op:
            integer = op.outputs and not any(_differentiable(output) for output in op.outputs)
            through = _BREAKS.get(op.type) or (f"integers, in the op {op.name!r}," if integer else None)
            if through:
                return f"the path from the source to the target passes through {through} which stops the gradient"
    return None


def _in_graph(graph: Any, source: Any) -> Any:
    """The tensor of a graph that stands for a tensor or variable from outside of it."""
    if not isinstance(source, tf.Variable):
        return source if hasattr(source, "op") else None
    return next((inner for outer, inner in graph.captures if outer is source.handle), None)


def _ancestors(op: Any) -> set[Any]:
    found, waiting = {op}, [op]
    while waiting:
        for tensor in waiting.pop().inputs:
            if tensor.op not in found:
                found.add(tensor.op)
                waiting.append(tensor.op)
    return found
