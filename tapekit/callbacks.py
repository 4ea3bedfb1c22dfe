"""Callbacks: objects with hooks, and how a run calls them.

Every Keras callback is one. `Callback` adds `on_step` and `on_gradient`, and says how often it needs
the host.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
import numbers
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import keras
import numpy as np

from tapekit._config import Configurable, Registry
from tapekit._describe import check_integer, describe
from tapekit._records import row

__all__ = ["Callback", "FunctionCallback", "IterationTable", "get"]


_recording: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(records: dict[str, Any]) -> Iterator[None]:
    """Sends what `record` is given inside the block to `records`."""
    token = _recording.set(records)
    try:
        yield
    finally:
        _recording.reset(token)


class Hooks:
    """The hooks of a run, which `Callback` and `OptimizationLoop` share. Those left alone cost nothing.

    Attributes:
        every: `on_step` is called at every `every`-th step; chunks of compiled steps end there.
        replayable: `True` says that `on_step` reads `step` and `logs` alone. It is then called for
            every step after a chunk and never makes a chunk shorter.
    """

    every: int = 1
    replayable: bool = False

    def on_step(self, step: int, logs: dict[str, Any]) -> None:
        """Called on the host after an update.

        The variables that it can read are those of this very step, unless it is `replayable`.

        Args:
            step: the number of the update, from 1.
            logs: the loss before the update, what the objective returned beside it, the measures, and
                what criteria need; Python numbers for scalars, NumPy arrays for the rest.
        """

    def on_gradient(self, gradients: list[Any], variables: list[Any]) -> Sequence[Any] | None:
        """Called inside the compiled step, between computing the gradients and applying them.

        It is traced once and then runs as part of the graph, so it is written in TensorFlow or Keras ops.

        Args:
            gradients: the gradient of the loss for each variable: tensors of its shape and dtype, or
                `tf.IndexedSlices`; unscaled under mixed precision, before the optimizer's own clipping.
            variables: the variables, in the same order.

        A hook with a third argument, `intermediates`, gets the gradients with respect to the intermediates
        that `TapeStep(intermediates=...)` takes: a dict by name.

        Returns:
            The gradients to apply instead: a list, as many and of the same shapes and dtypes; a dict of
            some of them by the name of their variable; or `None`.
        """

    def record(self, name: str, value: Any) -> None:
        """Adds a scalar of this step to the logs and the history; called in `on_gradient`.

        Args:
            name: its name, which the logs must not have yet.
            value: a scalar tensor.

        Raises:
            RuntimeError: it is called outside of `on_gradient`.
            ValueError: the name is taken.
        """
        records = _recording.get()
        if records is None:
            raise RuntimeError("record must be called in on_gradient, which runs inside the step.")
        if name in records:
            raise ValueError(f"`name` must be new in the logs of a step, received {name!r} for the second time.")
        records[name] = value

    def on_train_begin(self, logs: Any = None) -> None:
        """Called before the first step."""

    def on_train_end(self, logs: Any = None) -> None:
        """Called after the last step, whichever way the run ended."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Called before the first step of an epoch, which has `steps_per_epoch` steps."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Called after an epoch with the scalar logs of its last step."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Called before every step; `batch` counts from 0 in each epoch."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Called after every step with its scalar logs; `batch` counts from 0 in each epoch."""


class Callback(Configurable, keras.callbacks.Callback):
    """A Keras callback with two more hooks, `on_step` and `on_gradient`.

    Attributes:
        every: `on_step` is called at every `every`-th step. Chunks of compiled steps end exactly there,
            so that what it sees is live and a stop asked for there takes effect there.
        replayable: `True` says that the hooks read `step` and `logs` alone. They are then called for
            every step in order, after a chunk, and never make a chunk shorter.
        loop: the `OptimizationLoop` that runs it; `self.loop.stop("reason")` ends the run.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> class Halve(tk.Callback):
        ...     def on_gradient(self, gradients, variables):
        ...         return [0.5 * gradient for gradient in gradients]
        ...     def on_step(self, step, logs):
        ...         if logs["loss"] < 1.0:
        ...             self.loop.stop("small enough")
        >>> x = tf.Variable(0.0)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=1000)
        >>> loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[Halve()]).message
        'stopped at step 139: small enough'
    """

    every: int = 1
    replayable: bool = False
    loop: Any = None

    on_step = Hooks.on_step
    on_gradient = Hooks.on_gradient
    record = Hooks.record


class FunctionCallback(Callback):
    """Calls a function `f(step, logs)` as `on_step`; what a plain function in a list of callbacks becomes.

    Args:
        function: called with the step, from 1, and the logs.
        every: at every how many steps, at least 1.
        replayable: whether the function reads its arguments alone, see `Callback`.

    Raises:
        TypeError: `function` cannot be called as `f(step, logs)`, or `every` is not an integer.
        ValueError: `every` is below 1.

    Example:
        >>> import tapekit as tk
        >>> show = tk.callbacks.FunctionCallback(lambda step, logs: print(step, logs["loss"]), every=100)
    """

    def __init__(self, function: Callable[[int, dict[str, Any]], Any], every: int = 1, replayable: bool = False):
        super().__init__()
        if not _takes_step_and_logs(function):
            raise TypeError(f"`function` must be callable as f(step, logs), received {describe(function)}.")
        self.function = function
        self.every = check_integer(every, "every", 1)
        self.replayable = replayable

    def on_step(self, step, logs):
        """Calls the function."""
        self.function(step, logs)


def _takes_step_and_logs(function: Any) -> bool:
    try:
        inspect.signature(function).bind(0, {})
    except TypeError:
        return False
    except ValueError:  # some functions written in C do not tell what they take
        pass
    return callable(function)


class IterationTable(Callback):
    """Prints the iterations as a table: the step and what was recorded at it.

    It is replayable: the run goes at full speed.

    Args:
        columns: which logs to print, in order; `None` prints all of them.
        every: at every how many steps, at least 1.
        file: where to write; `None` is standard output.

    Raises:
        TypeError: `every` is not an integer, or `columns` not a list of names.
        ValueError: `every` is below 1, or a column is not in the logs.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(0.0)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=200, measures={"x": lambda: x})
        >>> result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[tk.callbacks.IterationTable(every=100)])
          step          loss             x
           100      0.293011       3.46952
           200    0.00515346       3.92965
    """

    replayable = True

    def __init__(self, columns: Iterable[str] | None = None, every: int = 1, file: TextIO | None = None):
        super().__init__()
        if isinstance(columns, str):
            raise TypeError(f"`columns` must be a list of names of logs, received {columns!r}; write [{columns!r}].")
        self.columns = None if columns is None else list(columns)
        self.every = check_integer(every, "every", 1)
        self.file = file
        self._widths: dict[str, int] | None = None

    def on_train_begin(self, logs=None):
        """Forgets the columns of the run before."""
        self._widths = None

    def on_step(self, step, logs):
        """Prints a line, after the heading if it is the first."""
        file = self.file or sys.stdout
        if self._widths is None:
            self._widths = self._choose_widths(logs)
            heading = (f"{name:>{width}}" for name, width in self._widths.items())
            print("  ".join(["  step", *heading]), file=file)
        cells = (f"{_cell(logs[name]):>{width}}" for name, width in self._widths.items())
        print("  ".join([f"{step:6d}", *cells]), file=file)

    def _choose_widths(self, logs: dict[str, Any]) -> dict[str, int]:
        names = list(logs) if self.columns is None else self.columns
        unknown = [name for name in names if name not in logs]
        if unknown:
            raise ValueError(f"`columns` must be among {', '.join(logs)}, received {', '.join(unknown)}.")
        return {name: max(_NUMBER_WIDTH, len(name), len(_cell(logs[name]))) for name in names}


_NUMBER_WIDTH = 12


def _cell(value: Any) -> str:
    if not isinstance(value, np.ndarray):
        return _number(value)
    text = np.array2string(
        value,
        max_line_width=sys.maxsize,
        threshold=6,
        edgeitems=2,
        formatter={"all": lambda entry: f"{_number(entry):>{_NUMBER_WIDTH}}"},
    )
    return text.replace("\n", "")


def _number(value: Any) -> str:
    return str(value) if isinstance(value, (numbers.Integral, np.bool_)) else f"{value:.6g}"


_NOT_BY_NAME = (keras.callbacks.Callback, keras.callbacks.CallbackList)
_registry = Registry("callbacks", keras.callbacks.Callback, "tapekit.callbacks")
_registry.add(
    *(
        member
        for member in vars(keras.callbacks).values()
        if isinstance(member, type) and issubclass(member, keras.callbacks.Callback) and member not in _NOT_BY_NAME
    ),
    IterationTable,
    FunctionCallback,
)


def get(identifier: Any) -> keras.callbacks.Callback:
    """Returns the callback that a name, a configuration, a function or an object stands for.

    Args:
        identifier: a Keras or tapekit callback; a function `f(step, logs)`; a name such as
            `"iteration_table"` or `"terminate_on_nan"`; or a configuration
            `{"class_name": "IterationTable", "config": {"every": 10}}`.

    Returns:
        The callback.

    Raises:
        ValueError: the name is not known; the sentence lists the known ones and the closest.
        TypeError: it is none of these, or the callback needs other arguments.

    Example:
        >>> import tapekit as tk
        >>> tk.callbacks.get({"class_name": "IterationTable", "config": {"every": 10}}).every
        10
    """
    if isinstance(identifier, (type, str, dict, keras.callbacks.Callback)):
        return _registry.get(identifier)
    if not _takes_step_and_logs(identifier):
        raise TypeError(
            "`callbacks` must be callbacks, their names or configurations, or functions f(step, logs),"
            f" received {describe(identifier)}."
        )
    return FunctionCallback(identifier)


# These read their arguments alone, so they can be called after a chunk of steps.
_REPLAYABLE_IN_KERAS = (keras.callbacks.History, keras.callbacks.CSVLogger)
_NEVER_STOP = (*_REPLAYABLE_IN_KERAS, IterationTable)
_PER_STEP = ("on_train_batch_begin", "on_step", "on_train_batch_end")
_PER_EPOCH = ("on_epoch_begin", "on_epoch_end")


def overridden(owner: Any, hook: str) -> Callable[..., Any] | None:
    """Returns the method `hook` of `owner`, or `None` if nobody wrote one."""
    method = getattr(owner, hook, None)
    function = getattr(method, "__func__", method)
    if function not in (None, getattr(Hooks, hook, None), getattr(keras.callbacks.Callback, hook, None)):
        return method
    alias = hook.replace("on_train_batch", "on_batch")
    return overridden(owner, alias) if alias != hook else None


@dataclasses.dataclass(frozen=True)
class _Registration:
    """A hook that somebody wrote, with its schedule."""

    call: Callable[..., Any]
    every: int
    replayable: bool
    can_stop: bool


class Dispatch:
    """Calls the hooks of a run, and says where chunks of steps must end for them.

    Args:
        owners: objects with hooks, in the order in which they are called.
        steps_per_epoch: the number of steps of an epoch.
    """

    def __init__(self, owners: Sequence[Any], steps_per_epoch: int) -> None:
        self._owners = owners
        self._epoch_length = steps_per_epoch
        self._hooks = {hook: list(self._registrations(hook)) for hook in (*_PER_STEP, *_PER_EPOCH)}
        registered = [item for hooks in self._hooks.values() for item in hooks]
        self._edges = {item.every for item in registered if not item.replayable}
        self._replayed = any(item.replayable for item in registered)
        self.can_stop = any(item.can_stop for item in registered)
        self.any_hook = bool(registered) or any(overridden(owner, "on_train_end") for owner in owners)
        self.gradient_hooks = [call for owner in owners if (call := overridden(owner, "on_gradient"))]

    def _registrations(self, hook: str):
        for owner in self._owners:
            if call := overridden(owner, hook):
                replayable = getattr(owner, "replayable", False) or type(owner) in _REPLAYABLE_IN_KERAS
                every = self._epoch_length if hook in _PER_EPOCH else 1
                if hook == "on_step":
                    every = check_integer(getattr(owner, "every", 1), f"{type(owner).__name__}.every", 1)
                yield _Registration(call, every, replayable, type(owner) not in _NEVER_STOP)

    def train(self, hook: str, logs: dict[str, Any] | None = None) -> None:
        """Calls `on_train_begin` or `on_train_end` of everyone."""
        for owner in self._owners:
            if call := overridden(owner, hook):
                call(logs or {})

    def steps_to_edge(self, step: int, at_most: int) -> int:
        """Returns how many steps may follow `step` before somebody needs the host."""
        return min([at_most, *(every - step % every for every in self._edges)])

    def before(self, step: int) -> None:
        """Calls the hooks that come before the chunk that starts with `step`."""
        self._begin(step, replayable=False)

    def after(self, first: int, count: int, columns: Mapping[str, Any]) -> None:
        """Calls the hooks of the steps `first`, ..., `first + count - 1`, the last of which is live."""
        if not self._replayed:
            if self._edges:
                self._end(first + count - 1, row(columns, count - 1), live=True)
            return
        columns = {name: values[:count].tolist() if values.ndim == 1 else values for name, values in columns.items()}
        for index in range(count):
            logs = {name: values[index] for name, values in columns.items()}
            self._begin(first + index, replayable=True)
            self._end(first + index, logs, live=index == count - 1)

    def finish_epoch(self, step: int, logs: dict[str, Any]) -> None:
        """Ends the epoch that a stop after `step` has cut short."""
        if step % self._epoch_length:
            self._call("on_epoch_end", step // self._epoch_length, scalars(logs), lambda item: True)

    def _begin(self, step: int, replayable: bool) -> None:
        epoch, batch = divmod(step - 1, self._epoch_length)
        if batch == 0:
            self._call("on_epoch_begin", epoch, {}, lambda item: item.replayable is replayable)
        self._call("on_train_batch_begin", batch, {}, lambda item: item.replayable is replayable)

    def _end(self, step: int, logs: dict[str, Any], live: bool) -> None:
        epoch, batch = divmod(step - 1, self._epoch_length)
        due = lambda item: (item.replayable or live) and step % item.every == 0  # noqa: E731
        self._call("on_step", step, logs, due)
        self._call("on_train_batch_end", batch, logs, due)
        self._call("on_epoch_end", epoch, logs, due)

    def _call(self, hook: str, position: int, logs: dict[str, Any], due: Callable[[_Registration], bool]):
        items = [item for item in self._hooks[hook] if due(item)]
        if not items:
            return
        if hook != "on_step":
            logs = scalars(logs)
        for item in items:
            item.call(position, logs)


def scalars(logs: dict[str, Any]) -> dict[str, Any]:
    """Returns the logs that are numbers, which is what Keras callbacks expect."""
    return {name: value for name, value in logs.items() if not isinstance(value, np.ndarray)}


@keras.saving.register_keras_serializable(package="tapekit")
class VariablesModel(keras.Model):
    """The model that callbacks find in a run without one: it owns the variables and the optimizer."""

    def __init__(self, variables: list[keras.Variable], optimizer: Any = None) -> None:
        super().__init__(name="tapekit_variables")
        self.owned = variables
        self.optimizer = optimizer
        self.stop_training = False
        self.built = True

    def call(self, inputs: Any = None) -> Any:
        """Returns `inputs`: the objective is not a function of a batch."""
        return inputs

    def get_config(self) -> dict[str, Any]:
        """Returns what makes variables of the same names, shapes and dtypes."""
        return {"variables": [{"shape": list(v.shape), "dtype": v.dtype, "name": v.name} for v in self.owned]}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> VariablesModel:
        """Returns a model of new variables, which are zero until their values are loaded."""
        return cls(
            [keras.Variable(keras.ops.zeros(v["shape"], v["dtype"]), name=v["name"]) for v in config["variables"]]
        )
