"""Step strategies: objects that make one update of the variables."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from keras import tree

from tapekit._config import Configurable, Registry
from tapekit._describe import describe, shape_and_dtype, unique_names, variable_name
from tapekit._nonfinite import Guard, count_nonfinite
from tapekit._objective import Objective, used_variables
from tapekit._optimizers import Updater, all_finite, sum_finite
from tapekit._tape import Intermediates, collecting
from tapekit._tensors import map_values, tf_variable, with_known_shape
from tapekit.callbacks._base import recording

__all__ = ["MinimizeStep", "Problem", "Step", "TapeStep", "get"]


def asks_for_intermediates(function: Callable[..., Any]) -> bool:
    """Returns whether a hook or a measure has an argument `intermediates` that it cannot do without."""
    parameter = inspect.signature(function).parameters.get("intermediates")
    return parameter is not None and parameter.default is parameter.empty


def _takes_intermediates(function: Callable[..., Any]) -> bool:
    return "intermediates" in inspect.signature(function).parameters


class Problem:
    """What a step strategy works on during one step: the objective, the variables and the optimizer.

    A strategy receives one in `Step.take`; it is not made by hand.

    Args:
        objective: what is minimized.
        updater: talks to the optimizer.
        variables: the variables to minimize over.
        hooks: the `on_gradient` hooks, in their order.
        allow_unused: whether to let variables pass on which the loss does not depend.
        taken_names: names in the logs that the objective must not use.
        guard: whether an update is made that is not finite.
        evaluation: the objective and its gradient, if they are traced.

    Attributes:
        variables: the variables of this step, `tf.Variable` or `keras.Variable`.
        gradients: the gradients that this step used, as they were before any `on_gradient` hook;
            `None` until `transform`, `apply` or `minimize` has been called.
        intermediates: the gradients with respect to named intermediates, by name, if they were asked for.
        recorded: what the hooks have added to the logs with `Callback.record`.
        finite: a scalar bool tensor, whether the loss and the gradients after the hooks are finite; `None` until
            `apply` or `minimize` has been called, which update nothing if they are not.

    Example:
        >>> import tapekit as tk
        >>> class Plain(tk.Step):
        ...     def take(self, problem):
        ...         logs, gradients = problem.loss_and_gradients()
        ...         problem.apply(gradients)
        ...         return logs
    """

    def __init__(
        self,
        objective: Objective,
        updater: Updater,
        variables: list[Any],
        hooks: Sequence[Callable[..., Any]] = (),
        allow_unused: bool = False,
        taken_names: Collection[str] = (),
        guard: Any = Guard.FINITE,
        evaluation: Any = None,
    ) -> None:
        self.variables = variables
        self.finite: Any = None
        self.loss: Any = None
        self.seen_loss: Any = None  # by the last update, so that `finite` speaks of it too
        self.applied: list[Any] = []
        self.suspects: list[tuple[str, int]] = []
        self.counts: list[Any] = []
        self.gradients: list[Any] | None = None
        self.intermediates: dict[str, Any] = {}
        self.recorded: dict[str, Any] = {}
        self.evaluations = 0
        self.gradients_wanted = False
        self._updates = 0
        self._objective = objective
        self._updater = updater
        self._hooks = hooks
        self._allow_unused = allow_unused
        self._taken_names = taken_names
        self._guard = guard
        self._evaluation = evaluation

    def evaluate(self) -> dict[str, tf.Tensor]:
        """Evaluates the objective at the present variables; every call counts as an evaluation.

        Returns:
            The logs: `"loss"`, a scalar tensor, and what the objective returns beside it.

        Raises:
            ValueError: the objective gives a value a name that a measure or criterion has.

        Example:
            A step that is taken back if the loss has grown:

            >>> import tapekit as tk, tensorflow as tf
            >>> class Cautious(tk.Step):
            ...     def take(self, problem):
            ...         logs, gradients = problem.loss_and_gradients()
            ...         before = [tf.identity(variable) for variable in problem.variables]
            ...         problem.apply(gradients)
            ...         worse = problem.evaluate()["loss"] > logs["loss"]
            ...         for variable, value in zip(problem.variables, before):
            ...             variable.assign(tf.where(worse, value, variable))
            ...         return logs
            >>> x = tf.Variable(0.0)
            >>> loop = tk.OptimizationLoop("sgd", step=Cautious(), max_iterations=10)
            >>> loop.minimize(lambda: (x - 4.0) ** 2, [x]).evaluations
            21
        """
        return self._logs(*self._objective())

    def _logs(self, loss: tf.Tensor, extras: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Counts an evaluation, and returns its logs."""
        clashing = [name for name in extras if name in self._taken_names]
        if clashing:
            raise ValueError(
                "`measures` and criteria must record under names that differ from those of the values beside the loss,"
                f" received the name {clashing[0]!r} twice."
            )
        self.evaluations += 1
        self.loss = loss if self.loss is None else self.loss
        return {"loss": loss, **extras}

    def loss_and_gradients(self, intermediates: bool | Sequence[str] = False) -> tuple[dict[str, Any], list[Any]]:
        """Evaluates the objective and its gradient, unscaled under mixed precision.

        Args:
            intermediates: the names of the intermediates to take gradients with respect to in the same
                backward pass, or True for all that `tapekit.intermediate` names.

        Returns:
            The logs as in `evaluate`, and one gradient for each of `variables`.

        Raises:
            ValueError: the loss does not depend on one of the variables or intermediates.
        """
        if self._evaluation and not intermediates:
            loss, extras, gradients = self._evaluation()
            return self._logs(loss, extras), gradients
        named = Intermediates(lambda tensors: tape.watch(tensors))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([tf_variable(variable) for variable in self.variables])
            with collecting(named.add) if intermediates else contextlib.nullcontext():
                logs = self.evaluate()
        scale = self._updater.scale(logs["loss"].dtype)
        chosen = _chosen(named.values, intermediates)
        sources = [tf_variable(v) for v in self.variables], chosen
        found: Any = tape.gradient(logs["loss"], sources, output_gradients=scale)
        gradients, inner = found
        self.variables = used_variables(self.variables, gradients, self._allow_unused)
        unconnected = [name for name, gradient in inner.items() if None in (tree.flatten(gradient) or [None])]
        if unconnected:
            raise ValueError(
                "`intermediates` must be floating-point values that `loss` depends on, unlike"
                f" {', '.join(unconnected)}."
            )
        leaves = self._updater.true(tree.flatten(inner)) if inner else []
        self.intermediates = tree.pack_sequence_as(inner, leaves)
        return logs, self._updater.true([gradient for gradient in gradients if gradient is not None])

    @property
    def has_hooks(self) -> bool:
        """Whether anybody looks at the gradients or changes them."""
        return bool(self._hooks)

    def transform(self, gradients: Sequence[Any], variables: Sequence[Any] | None = None) -> list[Any]:
        """Passes the gradients through the `on_gradient` hooks, for a strategy that updates by itself.

        Args:
            gradients: one gradient of the unscaled loss for each of the variables.
            variables: the variables, for a step that updates some of them at a time; `None` means
                `self.variables`.

        Returns:
            The gradients to apply. Make the update by `update`, which leaves it out if they are not finite.

        Raises:
            TypeError: a hook returned something else than a list or a dict of gradients.
            ValueError: a hook returned gradients of another number, name, shape or dtype, or there is not one for each
                of the variables.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> class Descent(tk.Step):
            ...     def take(self, problem):
            ...         logs, gradients = problem.loss_and_gradients()
            ...         gradients = problem.transform(gradients)
            ...         def move():
            ...             for variable, gradient in zip(problem.variables, gradients):
            ...                 variable.assign_sub(0.25 * gradient)
            ...         problem.update(move, gradients, problem.variables)
            ...         return logs
            >>> x = tf.Variable(0.0)
            >>> loop = tk.OptimizationLoop("sgd", step=Descent(), max_iterations=10)
            >>> print(loop.minimize(lambda: (x - 4.0) ** 2, [x]).x.round(2))
            [4.]
        """
        variables = self.variables if variables is None else variables
        if len(gradients) != len(variables):
            raise ValueError(
                f"`gradients` must be one for each of the {len(variables)} variables, received {len(gradients)}."
            )
        pairs = zip(gradients, variables, strict=True)
        true = _after_checks([with_known_shape(gradient, tf_variable(variable)) for gradient, variable in pairs])
        gradients, recorded = list(true), {}
        with recording(recorded, self._updates):
            for hook in self._hooks:
                offered = asks_for_intermediates(hook) or (self.intermediates and _takes_intermediates(hook))
                more = {"intermediates": dict(self.intermediates)} if offered else {}
                replaced = hook(list(gradients), list(variables), **more)
                if replaced is not None:
                    gradients = _check_replaced(replaced, gradients, variables)
        if self._hooks and self._updater.scales:  # a hook that clips must not hide an overflow from the optimizer
            finite = all_finite(true)
            gradients = [map_values(lambda values: tf.where(finite, values, np.nan), g) for g in gradients]
        self.gradients = [*(self.gradients or ()), *true]
        self.applied = [*self.applied, *gradients]
        self._updates += 1
        for name, value in recorded.items():
            self.recorded[name if self._updates == 1 else f"{name}_{self._updates}"] = value
        return gradients

    def apply(self, gradients: Sequence[Any]) -> None:
        """Passes the gradients through the `on_gradient` hooks and gives them to the optimizer.

        Args:
            gradients: one gradient of the unscaled loss for each of `variables`, of its shape and dtype.

        Raises:
            TypeError: see `transform`.
            ValueError: see `transform`.
        """
        native = self._updater.native(self.variables)
        self._updater.build(native)
        gradients = self.transform(gradients)
        self.update(lambda: self._updater.apply(gradients, native), gradients, native)

    def minimize(self) -> dict[str, tf.Tensor]:
        """Makes the step by the optimizer's `minimize`, or by what Keras 2 had under that name.

        Returns:
            The logs as in `evaluate`.

        Raises:
            TypeError: the optimizer's `minimize` does not call its `apply_gradients`.
            ValueError: the loss does not depend on one of the variables.

        Example:
            >>> import tapekit as tk
            >>> class ByMinimize(tk.Step):
            ...     def take(self, problem):
            ...         return problem.minimize()
        """
        logs: dict[str, tf.Tensor] = {}

        def loss() -> tf.Tensor:
            evaluated = self.evaluate()
            logs.update(logs or evaluated)  # those before the update, should the optimizer evaluate more than once
            return evaluated["loss"]

        def transform(gradients: list[Any]) -> list[Any]:
            self.variables = used_variables(self.variables, gradients, self._allow_unused)
            self._updater.build(self._updater.native(self.variables))
            return self.transform([gradient for gradient in gradients if gradient is not None])

        self._updater.minimize(loss, self.variables, transform, self.update)
        return logs

    def update(self, function: Callable[[], Any], gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Calls `function`, which applies the gradients, unless the loss or one of them is not finite.

        Args:
            function: makes the update; called without arguments, inside a branch of the graph.
            gradients: what it applies, as they are after the hooks.
            variables: what it updates, in the order of the gradients.
        """
        self.suspects += [(variable_name(v), int(np.prod(v.shape))) for v in variables]
        if self._guard is Guard.ALWAYS:
            function()
            return
        # A sum is finite only if all entries are, and takes one op where looking at each takes several.
        looks = not self._updater.scales  # or a gradient may overflow, an ordinary event that the optimizer skips
        if self._guard is Guard.BY_SUM:
            function()
            losses = [] if self.loss is None else [self.loss]
            self._add_finite(sum_finite([*losses, *(gradients if looks else ())], undone=True))
            return
        by_sum = sum_finite(gradients, undone=self._guard == Guard.BY_SUM)
        finite = tf.constant(True) if self.loss is None else tf.math.is_finite(self.loss)
        counts = tf.cond(
            by_sum | (self._guard == Guard.BY_SUM),
            lambda: tf.zeros([len(gradients)], tf.int64),
            lambda: tf.stack([count_nonfinite(gradient) for gradient in gradients]),
        )
        if looks:
            finite &= tf.where(self._guard == Guard.BY_SUM, by_sum, tf.reduce_all(tf.equal(counts, 0)))
        self._add_finite(finite)

        def update() -> Any:
            function()
            return tf.constant(True)

        allowed = (finite & (self._guard != Guard.NEVER)) | (self._guard >= Guard.BY_SUM)
        tf.cond(allowed, update, lambda: tf.constant(False))
        self.counts.append(counts)

    def _add_finite(self, finite: Any) -> None:
        self.finite = finite if self.finite is None else self.finite & finite
        self.seen_loss = self.loss


# What may raise inside the objective, and must do so before anything is updated.
RAISING = {"Assert", "CheckNumerics", "CheckNumericsV2", "EagerPyFunc", "PyFunc", "PyFuncStateless"}
_CALLS = {"Case", "If", "PartitionedCall", "StatefulPartitionedCall", "StatelessIf", "StatelessWhile", "While"}


def _after_checks(gradients: Sequence[Any]) -> list[Any]:
    """Returns the gradients, which in a graph wait for the checks of the objective."""
    if tf.executing_eagerly():
        return list(gradients)
    graph: Any = tf.compat.v1.get_default_graph()
    checks = [op for op in graph.get_operations() if op.type in RAISING | _CALLS]
    with tf.control_dependencies(checks):
        return [map_values(tf.identity, gradient) for gradient in gradients] if checks else list(gradients)


def _chosen(named: dict[str, Any], names: bool | Sequence[str]) -> dict[str, Any]:
    """Returns the intermediates that are asked for, or raises if one of them, or every one, is missing."""
    unknown = [] if isinstance(names, bool) else [name for name in names if name not in named]
    if unknown or (names is True and not named):
        received = ", ".join(unknown) or "True"
        hint = "" if named else "; those given inside a tf.function are not seen"
        raise ValueError(
            f"`intermediates` must be names that `loss` gives with tapekit.intermediate ({', '.join(named) or 'none'}),"
            f" received {received}{hint}."
        )
    return named if isinstance(names, bool) else {name: named[name] for name in names}


def _check_replaced(replaced: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    right = f"`on_gradient` must return None or a list of {len(variables)} gradients"
    if isinstance(replaced, dict):
        names = unique_names(variables)
        unknown = [str(name) for name in replaced if name not in names]
        if unknown:
            raise ValueError(
                "`on_gradient` must return gradients under the names of the variables"
                f" ({', '.join(names)}), received {', '.join(unknown)}."
            )
        replaced = [replaced.get(name, gradient) for name, gradient in zip(names, gradients, strict=True)]
    if not isinstance(replaced, (list, tuple)):
        raise TypeError(f"{right}, received {describe(replaced)}.")
    if len(replaced) != len(variables):
        raise ValueError(f"{right}, received {len(replaced)}.")
    checked = []
    for position, (gradient, variable) in enumerate(zip(replaced, variables, strict=True)):
        if not isinstance(gradient, tf.IndexedSlices):
            try:
                gradient = tf.convert_to_tensor(gradient, dtype_hint=variable.dtype)
            except (TypeError, ValueError):
                raise TypeError(f"{right}, received {describe(gradient)} as gradient {position}.") from None
        shape, received = tf.TensorShape(variable.shape), shape_and_dtype(gradient)
        fits = gradient.shape.is_compatible_with(shape)
        if isinstance(gradient, tf.IndexedSlices):  # whose own shape may be unknown
            received = f"tf.IndexedSlices with values of {shape_and_dtype(gradient.values)}"
            fits = fits and gradient.values.shape[1:].is_compatible_with(shape[1:])
        if gradient.dtype != variable.dtype or not fits:
            raise ValueError(
                f"{right} of the shapes and dtypes of the variables; gradient {position} must be of"
                f" {shape_and_dtype(variable)}, received {received}."
            )
        checked.append(gradient)
    return checked


class Step(Configurable):
    """The base of every step strategy; subclass it to write your own.

    Attributes:
        provides: what the strategy makes known of a step. `"gradients"` says that it calls
            `Problem.transform`, `apply` or `minimize`; without it, hooks, criteria and measures that
            need gradients are refused before the run.

    Example:
        Sharpness-aware minimization, which evaluates the gradient a second time at a perturbed point
        (Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021):

        >>> import tapekit as tk, tensorflow as tf
        >>> class SAMStep(tk.Step):
        ...     def __init__(self, rho=0.05):
        ...         self.rho = rho
        ...     def take(self, problem):
        ...         logs, gradients = problem.loss_and_gradients()
        ...         scale = self.rho / (tf.linalg.global_norm(gradients) + 1e-12)
        ...         for variable, gradient in zip(problem.variables, gradients):
        ...             variable.assign_add(scale * gradient)
        ...         _, perturbed = problem.loss_and_gradients()
        ...         for variable, gradient in zip(problem.variables, gradients):
        ...             variable.assign_sub(scale * gradient)
        ...         problem.apply(perturbed)
        ...         return logs
        >>> x = tf.Variable(0.0)
        >>> loop = tk.OptimizationLoop("sgd", step=SAMStep(), max_iterations=100)
        >>> loop.minimize(lambda: (x - 4.0) ** 2, [x]).evaluations
        201
    """

    provides: frozenset[str] = frozenset({"gradients"})

    def build(self, variables: list[Any]) -> None:
        """Makes the strategy's own `tf.Variable`s.

        Called outside of any graph, before the first step, on a copy of the strategy that serves one set
        of variables and one objective.

        Args:
            variables: the variables that are minimized over, `tf.Variable` or `keras.Variable`.

        Example:
            Gradient descent with momentum (Polyak, "Some methods of speeding up the convergence of iteration
            methods", 1964):

            >>> import tapekit as tk, tensorflow as tf
            >>> class HeavyBall(tk.Step):
            ...     def build(self, variables):
            ...         self.velocities = [tf.Variable(tf.zeros(v.shape, v.dtype)) for v in variables]
            ...     def reset(self):
            ...         for velocity in self.velocities:
            ...             velocity.assign(tf.zeros_like(velocity))
            ...     def take(self, problem):
            ...         logs, gradients = problem.loss_and_gradients()
            ...         for velocity, gradient in zip(self.velocities, gradients):
            ...             velocity.assign(0.9 * velocity + gradient)
            ...         problem.apply([tf.identity(velocity) for velocity in self.velocities])
            ...         return logs
            >>> x = tf.Variable(0.0)
            >>> loop = tk.OptimizationLoop("sgd", step=HeavyBall(), max_iterations=200)
            >>> print(loop.minimize(lambda: (x - 4.0) ** 2, [x]).x.round(2))
            [4.]
        """

    def reset(self) -> None:
        """Gives the strategy's own variables their initial values; called when a run begins, after `build`."""

    def take(self, problem: Problem) -> dict[str, Any]:
        """Makes one step, in TensorFlow ops that run eagerly, in a graph or under XLA.

        Args:
            problem: the objective, the variables and the optimizer.

        Returns:
            The logs of the step: `"loss"`, before the update, and other named scalars. A strategy whose
            number of evaluations depends on the data gives it as `"evaluations"`, an integer tensor.
        """
        raise NotImplementedError


class TapeStep(Step):
    """Takes the gradient with an explicit `tf.GradientTape` and gives it to `apply_gradients`.

    Args:
        intermediates: the names of the intermediate values to take gradients with respect to in the same
            backward pass, or True for all that the objective names with `tapekit.intermediate`. Their norms
            are recorded as `"gradient_norm/<name>"`; hooks and measures get them whole, as a dict, if they
            have an argument `intermediates`.

    Raises:
        TypeError: `intermediates` is neither a bool nor a list of names.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(1.0)
        >>> loop = tk.OptimizationLoop(
        ...     "sgd",
        ...     step=tk.TapeStep(intermediates=["z"]),
        ...     max_iterations=1,
        ...     measures={"dz": lambda intermediates: intermediates["z"]},
        ... )
        >>> loop.minimize(lambda: tk.intermediate("z", x - 4.0) ** 2, [x]).history["dz"].tolist()
        [-6.0]
    """

    def __init__(self, intermediates: bool | Sequence[str] = False) -> None:
        names = () if isinstance(intermediates, bool) else intermediates
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"`intermediates` must be a bool or a list of names, received {describe(intermediates)}.")
        self.intermediates = intermediates if isinstance(intermediates, bool) else list(names)
        if intermediates:
            self.provides = frozenset({"gradients", "intermediates"})

    def take(self, problem: Problem) -> dict[str, Any]:
        """Makes one step."""
        logs, gradients = problem.loss_and_gradients(self.intermediates)
        problem.apply(gradients)
        return logs


class MinimizeStep(Step):
    """Leaves the gradient to the optimizer's `minimize`; Keras 3 optimizers get back the one they lost.

    The numbers are those of `TapeStep`, bit for bit.

    Args:
        intermediates: False; gradients with respect to intermediates need the tape of `TapeStep`.

    Raises:
        ValueError: `intermediates` is anything else.

    Example:
        >>> import tapekit as tk
        >>> loop = tk.OptimizationLoop("adam", step=tk.MinimizeStep(), max_iterations=100)
    """

    def __init__(self, intermediates: bool = False) -> None:
        if intermediates is not False:
            raise ValueError(
                "`intermediates` must be False for MinimizeStep, whose tape is the optimizer's own and gone before"
                f" anyone could ask it, received {describe(intermediates)}; use TapeStep."
            )
        self.intermediates = intermediates

    def take(self, problem: Problem) -> dict[str, Any]:
        """Makes one step."""
        return problem.minimize()


_registry = Registry("step", Step, "tapekit.steps", suffix="_step")
_registry.add(TapeStep, MinimizeStep)


def get(identifier: Any) -> Step:
    """Returns the step strategy that a name, a configuration or an object stands for.

    Args:
        identifier: a `Step`; a name such as `"tape"` or `"minimize"`; or a configuration
            `{"class_name": "TapeStep", "config": {}}`.

    Returns:
        The step strategy.

    Raises:
        ValueError: the name is not known; the sentence lists the known ones and the closest.
        TypeError: it is none of these, or the step needs other arguments.

    Example:
        >>> import tapekit as tk
        >>> type(tk.steps.get("tape")).__name__
        'TapeStep'
    """
    return _registry.get(identifier)
