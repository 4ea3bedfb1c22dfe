"""The objective, a function of no arguments, and the variables that it is minimized over."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tapekit._describe import describe, shape_and_dtype, variable_name
from tapekit._tensors import KerasVariable, tf_variable

RESERVED = {"loss", "step", "evaluations", "seconds"}


class Objective:
    """A user's function with its result checked: `objective()` returns `(loss, extras)`."""

    needs_batch = False

    def __init__(self, function: Callable[[], Any]) -> None:
        right = "`loss` must be a function of no arguments, as in `lambda: (x - 4.0) ** 2`"
        if not callable(function):
            raise TypeError(f"{right}, received {describe(function)}.")
        if required := required_arguments(function):
            raise TypeError(f"{right}, received {describe(function)} that needs {', '.join(required)}.")
        self.function = function
        self._branches = False

    def __call__(self) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Evaluates the function, through AutoGraph if it branches on tensors inside a graph."""
        value = self._evaluate()
        extras: Any = {}
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
            value, extras = value
        return _check_loss(value), {name: _check_extra(name, extra) for name, extra in extras.items()}

    def bind(self, batch: Any) -> None:
        """Takes the batch of the step that begins, which a function of no arguments does not have."""

    def conclude(self) -> dict[str, Any]:
        """Returns what there is to record beside the logs after the update."""
        return {}

    @property
    def evaluated(self) -> list[Any]:
        """What an evaluation changes, as far as that is known."""
        return []

    @property
    def variables(self) -> list[Any]:
        """What a step changes beside the variables that are minimized over, as far as that is known."""
        return []

    def _evaluate(self) -> Any:
        if not self._branches:
            with contextlib.suppress(tf.errors.OperatorNotAllowedInGraphError):
                return self.function()
            self._branches = True
        return _with_autograph(self.function)


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Returns the names of the arguments without which `function` cannot be called, if they can be known."""
    if type(function) is types.FunctionType and not vars(function):  # which a decorator may have left a word in
        code = function.__code__
        if not code.co_argcount + code.co_kwonlyargcount:
            return []  # as nearly always, in a tenth of the time
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C do not tell
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _with_autograph(function: Callable[[], Any]) -> Any:
    try:
        return tf.function(function)()  # anew for every trace, as XLA wants another graph of a branch
    except Exception as error:
        users = error.__context__
        if users is not None and hasattr(users, "ag_error_metadata"):  # `error` is what AutoGraph made of it
            raise users from error
        raise


def _check_loss(value: Any) -> tf.Tensor:
    right = "`loss` must return a scalar floating-point tensor, or one with a dict of named scalars"
    if isinstance(value, KerasVariable):
        value = value.value
    if not isinstance(value, (tf.Tensor, tf.Variable)):
        hint = ", which no variable reaches" if isinstance(value, (int, float)) else ""
        raise TypeError(f"{right}, received {describe(value)}{hint}.")
    if not value.dtype.is_floating:
        raise TypeError(f"{right}, received {describe(value)}.")
    if value.shape.rank:
        raise ValueError(f"{right}, received a tensor of {shape_and_dtype(value)}; reduce it, say with tf.reduce_sum.")
    return tf.ensure_shape(value, []) if value.shape.rank is None else tf.convert_to_tensor(value)


def _check_extra(name: Any, value: Any) -> tf.Tensor:
    if not isinstance(name, str) or name in RESERVED:
        raise ValueError(
            f"`loss` must name the values beside the loss by strings other than {', '.join(sorted(RESERVED))},"
            f" received the name {name!r}."
        )
    right = "`loss` must return scalar numbers beside the loss"
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError):
        raise TypeError(f"{right}, received {describe(value)} under {name!r}.") from None
    if not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_complex or tensor.dtype.is_bool):
        raise TypeError(f"{right}, received {describe(value)} under {name!r}.")
    if tensor.shape.rank:
        raise ValueError(f"{right}, received {describe(value)} under {name!r}; reduce it, say with tf.reduce_mean.")
    return tf.ensure_shape(tensor, []) if tensor.shape.rank is None else tensor


class _SharedVariable(keras.Variable):
    """A `keras.Variable` that makes no storage but shares that of a `tf.Variable`."""

    def __init__(self, variable: tf.Variable) -> None:
        self._shared = variable
        name = variable_name(variable).replace("/", "_")
        super().__init__("zeros", variable.shape, variable.dtype.name, trainable=variable.trainable, name=name)
        self.constraint = variable.constraint

    def _initialize(self, value: Any) -> None:
        self._value = self._shared

    def _initialize_with_initializer(self, initializer: Any) -> None:
        self._value = self._shared


def keras_variable(variable: Any) -> keras.Variable:
    """Returns a `keras.Variable` that shares the storage of a `tf.Variable`, or the argument itself."""
    return variable if isinstance(variable, KerasVariable) else _SharedVariable(variable)


def check_variables(structure: Any) -> list[Any]:
    """Returns the variables of a nested structure in order, or raises if one of them cannot be minimized over."""
    variables = [structure] if isinstance(structure, (tf.Variable, KerasVariable)) else tf.nest.flatten(structure)
    if not variables:
        raise ValueError(f"`variables` must hold at least one variable, received {describe(structure)}.")
    for position, variable in enumerate(variables):
        is_variable = isinstance(variable, (tf.Variable, KerasVariable))
        if is_variable and tf.as_dtype(variable.dtype).is_floating and variable.trainable:
            continue
        place = f"as item {position} " if tf.nest.is_nested(structure) else ""
        right = f"`variables` must be trainable floating-point variables, received {place}{describe(variable)}"
        if not is_variable:
            hint = "; give its trainable_variables" if hasattr(variable, "trainable_variables") else ""
            raise TypeError(f"{right}{hint}.")
        if not tf.as_dtype(variable.dtype).is_floating:
            raise TypeError(f"{right}.")
        raise ValueError(f"{right}, which is not trainable.")
    seen: set[int] = set()
    for variable in variables:
        if id(tf_variable(variable)) in seen:
            raise ValueError(f"`variables` must name each variable once; {describe(variable)} appears twice.")
        seen.add(id(tf_variable(variable)))
    return variables


def read_variables(objective: Objective) -> list[Any]:
    """Evaluates the objective and returns the trainable variables that it reads, in order of first use."""
    with tf.GradientTape() as tape:
        objective()
    return watched_variables(tape)


def watched_variables(tape: tf.GradientTape) -> list[Any]:
    """Returns the variables that can be minimized over, of those that a tape has seen read by `loss`."""
    variables = [variable for variable in tape.watched_variables() if variable.dtype.is_floating]
    if not variables:
        raise ValueError(
            "`variables` must name what to minimize over, as `loss` reads no trainable floating-point variable,"
            " received None."
        )
    return variables


def used_variables(variables: Sequence[Any], gradients: Sequence[Any], allow_unused: bool) -> list[Any]:
    """Returns the variables that have a gradient, or raises for the others unless they are allowed."""
    unused = [variable_name(v) for v, gradient in zip(variables, gradients, strict=True) if gradient is None]
    if unused and (not allow_unused or len(unused) == len(variables)):
        raise ValueError(
            f"`variables` must be those that `loss` depends on; its gradient does not reach {', '.join(unused)}"
            + ("." if len(unused) == len(variables) else ", which allow_unused=True lets pass.")
        )
    return [variable for variable, gradient in zip(variables, gradients, strict=True) if gradient is not None]
