"""A persistent gradient tape that releases itself, and names for intermediate values."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tapekit._describe import describe, shape_and_dtype, unique_names
from tapekit._explain import NATIVE, Seen, components, differentiable, explain, natives, single
from tapekit._tensors import tf_variable as native

_NONE, _ZERO = tf.UnconnectedGradients.NONE, tf.UnconnectedGradients.ZERO
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

    __init__ = Exception.__init__  # by this AutoGraph knows that it may add its own lines to the message


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
        ValueError: the name has been given already, or it is given inside a `tf.function`, branch or loop,
            of which the tape outside sees the inputs and outputs alone.

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
        self._graph = _graph()

    def add(self, name: str, value: Any) -> None:
        """Adds a named value and watches it."""
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string, received {describe(name)}.")
        if _graph() is not self._graph:
            raise ValueError(
                f"`value` of {name!r} must not be named inside a tf.function, branch or loop, which the tape sees as"
                " one op from outside: name it outside, or open the tape inside."
            )
        if name in self.values:
            raise ValueError(f"`name` must be new in an evaluation, received {name!r} for the second time.")
        values = natives(f"`value` of {name!r}", value)
        self._watch([part for part in components(values) if differentiable(part)])
        self.values[name] = values


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
        tape.__exit__(kind, value, traceback)
        tape._tape = None  # a traceback may keep the tape, but not what it has recorded
        _collector.reset(self._token)
        del self._intermediates, self._watched, self._token  # the token would keep what was there before the block

    def _open(self) -> Any:
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

        Raises:
            TypeError: `tensor` holds something else.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.constant(3.0)
            >>> with tk.PersistentTape() as tape:
            ...     tape.watch(x)
            ...     print(float(tape.gradient(x**2, x)))
            6.0
        """
        tape = self._open()
        natives("`tensor`", tensor)
        watched = components(tensor)
        tape.watch(watched)
        self._watched += watched

    def watched_variables(self) -> tuple[tf.Variable, ...]:
        """Returns the variables that are watched, in the order in which they were made.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x, y = tf.Variable(1.0, name="x"), tf.Variable(2.0, name="y")
            >>> with tk.PersistentTape() as tape:
            ...     z = x * 2.0
            ...     print([variable.name for variable in tape.watched_variables()])
            ['x:0']
        """
        return self._open().watched_variables()

    def intermediate(self, name: str, value: Any) -> Any:
        """Names a value and returns it unchanged, so that `gradients` takes the gradient with respect to it.

        Args:
            name: the name, given once on a tape.
            value: a tensor of any shape and float or complex dtype, or a nested structure of them.

        Returns:
            `value`.

        Raises:
            TypeError: `name` is not a string or `value` holds something else than tensors.
            ValueError: the name has been given already, or it is given inside a `tf.function`, branch or loop.
        """
        self._open()
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
            TypeError: `target` or `sources` holds something else than tensors and variables.
            ValueError: `target` is empty; or a gradient does not exist and `unconnected="raise"`.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x, y = tf.Variable(3.0, name="x"), tf.Variable(2.0, name="y")
            >>> with tk.PersistentTape() as tape:
            ...     z = x**2
            ...     dx, dy = tape.gradient(z, [x, y])
            ...     twice = tape.gradient(z, x, output_gradients=tf.constant(2.0))
            >>> float(dx), dy, float(twice)
            (6.0, None, 12.0)
        """
        if not isinstance(target, NATIVE):
            if not tf.nest.flatten(target):
                raise ValueError(f"`target` must hold at least one tensor, received {describe(target)}.")
            target = natives("`target`", target)
        if not isinstance(sources, NATIVE):
            sources = natives("`sources`", sources)
        if output_gradients is not None:
            output_gradients = tf.nest.map_structure(_factor, output_gradients)
        if unconnected is not None:
            unconnected_gradients = _NONE
        tape = self._tape or self._open()
        recording = tape._recording  # not inside the caller's own stop_recording
        if recording:
            tape._pop_tape()  # as _paused does, whose generator takes as long as an op
        try:
            gradients = tape.gradient(target, sources, output_gradients, unconnected_gradients)
        finally:
            if recording:
                tape._push_tape()
        if unconnected is not None:
            self._check_connected(target, sources, gradients, unconnected)
        return gradients

    def _check_connected(self, target: Any, sources: Any, gradients: Any, unconnected: str) -> None:
        if unconnected != "raise":
            raise ValueError(f'`unconnected` must be None or "raise", received {describe(unconnected)}.')
        for source, gradient in zip(tf.nest.flatten(sources), tf.nest.flatten(gradients), strict=True):
            if gradient is None:
                raise ValueError(self.explain(target, source))

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
        variables = self._open().watched_variables()
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

        Raises:
            TypeError: `target` is not a tensor, or `sources` holds something else than tensors and variables.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable([1.0, 2.0])
            >>> with tk.PersistentTape() as tape:
            ...     jacobian = tape.jacobian(tf.stack([x[0] * x[1], x[0] ** 2]), x)
            >>> jacobian.numpy().tolist()
            [[2.0, 1.0], [2.0, 0.0]]
        """
        target, sources = single("target", target), natives("`sources`", sources)
        options = unconnected_gradients, parallel_iterations, experimental_use_pfor
        with self._paused() as tape:
            return tape.jacobian(target, sources, *options)

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

        Raises:
            TypeError: `target` or `source` is not a tensor.
            ValueError: `target` or `source` is a scalar.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.constant([[1.0, 2.0], [3.0, 4.0]])
            >>> with tk.PersistentTape() as tape:
            ...     tape.watch(x)
            ...     rows = tape.batch_jacobian(x**2, x)
            >>> rows.numpy().tolist()
            [[[2.0, 0.0], [0.0, 4.0]], [[6.0, 0.0], [0.0, 8.0]]]
        """
        target, source = single("target", target), single("source", source)
        if 0 in (target.shape.rank, source.shape.rank):
            raise ValueError(f"`target` and `source` must be of shape [batch, ...], received {describe(target)}.")
        options = unconnected_gradients, parallel_iterations, experimental_use_pfor
        with self._paused() as tape:
            return tape.batch_jacobian(target, source, *options)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[Any]:
        tape = self._open()
        with tape.stop_recording() if tape._recording else contextlib.nullcontext():
            yield tape

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
        source = single("source", source)
        return self.jacobian(self._recorded_gradient(target, source), source, _ZERO)

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
        return self.gradient(gradient, source, _like(gradient, vector), _ZERO)

    def _recorded_gradient(self, target: Any, source: Any) -> Any:
        tape = self._open()
        if not isinstance(target, tf.Tensor) or target.shape.rank != 0:
            raise ValueError(f"`target` must be a scalar tensor, received {describe(target)}.")
        source = natives("`source`", source)
        with tape._ensure_recording():
            tape._recording = False  # else TensorFlow advises against recording, which a second derivative needs
            try:
                gradient = tape.gradient(target, source)
                self._check_connected(target, source, gradient, "raise")
                return tf.nest.map_structure(tf.convert_to_tensor, gradient)
            finally:
                tape._recording = True

    def stop_recording(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which nothing is recorded.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable(3.0)
            >>> with tk.PersistentTape() as tape:
            ...     with tape.stop_recording():
            ...         size = tf.abs(x)
            ...     print(tape.gradient(size, x), float(tape.gradient(x**2 / size, x)))
            None 2.0
        """
        return self._open().stop_recording()

    def reset(self) -> None:
        """Forgets everything that has been recorded and named so far, and goes on recording.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable(3.0)
            >>> with tk.PersistentTape() as tape:
            ...     before = x**2
            ...     tape.reset()
            ...     print(tape.gradient(before, x), float(tape.gradient(x**3, x)))
            None 27.0
        """
        self._open().reset()
        self._intermediates.values.clear()
        self._watched.clear()

    @tf.autograph.experimental.do_not_convert
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
            >>> count = tf.Variable(3, name="count")
            >>> with tk.PersistentTape() as tape:
            ...     print(tape.explain(tf.cast(count, tf.float32) ** 2, count))
            the variable 'count' is of integer type int32, and no gradient flows through integers: make it a float
        """
        tape = self._open()
        named = self._intermediates.values
        watched = [*tape.watched_variables(), *self._watched, *components(named)]
        return explain(Seen(self.gradient, watched, named, self._watch_accessed_variables), target, source)


def _graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _factor(value: Any) -> Any:
    if value is None:  # on which TensorFlow may end the process
        raise TypeError("`output_gradients` must hold a tensor for each target, received None.")
    return native(value)


def _like(gradient: Any, vector: Any) -> Any:
    """Returns a vector in the structure and of the shapes and dtypes of a gradient, or raises."""
    if tf.nest.is_nested(gradient):
        try:
            tf.nest.assert_same_structure(gradient, vector)
        except (TypeError, ValueError):
            raise ValueError(f"`vector` must have the structure of `source`, received {describe(vector)}.") from None
        return tf.nest.map_structure(_like, gradient, vector)
    try:
        vector = tf.convert_to_tensor(native(vector), gradient.dtype)
    except (TypeError, ValueError):
        raise TypeError(f"`vector` must be of dtype {gradient.dtype.name}, received {describe(vector)}.") from None
    if not vector.shape.is_compatible_with(gradient.shape):
        raise ValueError(f"`vector` must be of {shape_and_dtype(gradient)}, received {describe(vector)}.")
    return vector
