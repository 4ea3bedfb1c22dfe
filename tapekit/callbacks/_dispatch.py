"""How a run calls the hooks, and where chunks of steps must end for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tapekit._describe import check_integer
from tapekit._records import row
from tapekit.callbacks._base import Callback, Hooks
from tapekit.callbacks._checkpoint import Checkpoint
from tapekit.callbacks._gradient_views import CaptureGradients, GradientStatistics
from tapekit.callbacks._json_lines import JSONLinesLogger
from tapekit.callbacks._log_steps import LogSteps
from tapekit.callbacks._progress import Progress
from tapekit.callbacks._table import IterationTable
from tapekit.callbacks._tensorboard import TensorBoardLogger
from tapekit.callbacks._variables_model import check_monitor

KERAS_LOSS = "keras/loss"
"""The name under which a step of a model records what Keras calls its loss, a running mean."""

# These read their arguments alone, so they can be called after a chunk of steps.
_REPLAYABLE_IN_KERAS = (keras.callbacks.History, keras.callbacks.CSVLogger)
_ONLY_LOOK = (
    *_REPLAYABLE_IN_KERAS,
    keras.callbacks.ProgbarLogger,
    IterationTable,
    GradientStatistics,
    CaptureGradients,
    Checkpoint,
    JSONLinesLogger,
    LogSteps,
    Progress,
    TensorBoardLogger,
)
_PER_STEP = ("on_train_batch_begin", "on_step", "on_train_batch_end")
_PER_EPOCH = ("on_epoch_begin", "on_epoch_end")


def _needs_every_batch(callback: Any) -> bool:
    """Returns whether a callback must be called at every batch, or may be called for whole chunks of them.

    Keras calls these itself less often when steps_per_execution is above 1.
    """
    kind = type(callback)
    if kind in (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore):
        return callback.save_freq != "epoch"
    if kind is keras.callbacks.TensorBoard:
        return callback.update_freq != "epoch" or callback.write_steps_per_second or callback._start_batch > 0
    # A run ends anyway at the first loss that is not finite, which is all that TerminateOnNaN looks for.
    return kind not in (keras.callbacks.ProgbarLogger, keras.callbacks.TerminateOnNaN)


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
    """At every how many steps it is called; 0 means whenever the host looks."""
    from_epoch: bool
    """Whether the steps count from the first of the epoch rather than of the run."""
    replayable: bool
    can_stop: bool


class Dispatch:
    """Calls the hooks of a run, and says where chunks of steps must end for them.

    Args:
        owners: objects with hooks, in the order in which they are called.
        epoch_length: the number of steps of an epoch; `None` if `begin_epoch` and `end_epoch` say where one is.
        batches_per_call: at every how many batches the batch hooks of Keras callbacks are called.
        hooks: the hooks to call, beside `on_gradient` and those of the whole run.
    """

    def __init__(
        self,
        owners: Sequence[Any],
        epoch_length: int | None,
        batches_per_call: int = 1,
        hooks: Sequence[str] = (*_PER_STEP, *_PER_EPOCH),
    ) -> None:
        self._owners = owners
        self._epoch_length = epoch_length
        self._batches_per_call = batches_per_call
        self._monitors_checked = False
        self._first = 1
        """The first step of the epoch, if these are not of one length."""
        self._hooks = {hook: list(self._registrations(hook)) for hook in hooks}
        registered = [item for hooks in self._hooks.values() for item in hooks]
        timed = (
            [item for hook in _PER_STEP for item in self._hooks.get(hook, ())] if epoch_length is None else registered
        )
        self._edges = {(item.every, item.from_epoch) for item in timed if item.every and not item.replayable}
        self._live = any(not item.replayable for item in registered)
        self._replayed = any(item.replayable for item in timed)
        self.can_stop = any(item.can_stop for item in registered)
        active = [owner for owner in owners if type(owner) not in _ONLY_LOOK]
        self.can_change = self.can_stop or any(overridden(owner, "on_train_end") for owner in active)
        self.gradient_hooks = [call for owner in owners if (call := overridden(owner, "on_gradient"))]

    def _registrations(self, hook: str):
        for owner in self._owners:
            if call := overridden(owner, hook):
                replayable = getattr(owner, "replayable", False) or type(owner) in _REPLAYABLE_IN_KERAS
                every, from_epoch = 1, False
                if hook == "on_step":
                    every = getattr(owner, "every", 1)
                    every = 0 if every is None else check_integer(every, f"{type(owner).__name__}.every", 1)
                elif hook in _PER_EPOCH:
                    if type(owner) is Progress and self._epoch_length:
                        continue  # an epoch of a function may be a single step
                    every = self._epoch_length or 1
                elif not isinstance(owner, (Hooks, Callback)):
                    every, from_epoch = self._batches_per_call, self._epoch_length is None
                    every *= _needs_every_batch(owner)
                yield _Registration(call, every, from_epoch, replayable, type(owner) not in _ONLY_LOOK)

    def train(self, hook: str, logs: dict[str, Any] | None = None, broken_off: bool = False) -> None:
        """Calls `on_train_begin` or `on_train_end` of everyone, the latter also if one of them raises.

        A backup must outlive a run that was broken off, so that its `on_train_end`, which removes it, is not called.
        """
        owners = [o for o in self._owners if not (broken_off and isinstance(o, keras.callbacks.BackupAndRestore))]
        calls = [call for owner in owners if (call := overridden(owner, hook))]
        if hook == "on_train_begin":
            for call in calls:
                call(logs or {})
            return
        with contextlib.ExitStack() as stack:
            for call in reversed(calls):
                stack.callback(call, logs or {})

    def steps_to_edge(self, step: int, at_most: int) -> int:
        """Returns how many steps may follow `step` before somebody needs the host."""
        past = step - self._first + 1
        edges = (every - (past if from_epoch else step) % every for every, from_epoch in self._edges)
        return min([at_most, *edges])

    def period(self, at_most: int) -> int:
        """Returns after how many steps somebody needs the host at the latest."""
        return min([at_most, *(every for every, _ in self._edges)])

    def before(self, step: int) -> None:
        """Calls the hooks that come before the chunk that starts with `step`."""
        self._begin(step, replayable=False)

    def after(self, first: int, count: int, columns: Mapping[str, Any]) -> None:
        """Calls the hooks of the steps `first`, ..., `first + count - 1`, the last of which is live."""
        if not self._replayed:
            if self._live:
                self._end(first + count - 1, row(columns, count - 1), live=True)
            return
        columns = {name: values[:count].tolist() if values.ndim == 1 else values for name, values in columns.items()}
        for index in range(count):
            logs = {name: values[index] for name, values in columns.items()}
            self._begin(first + index, replayable=True)
            self._end(first + index, logs, live=index == count - 1)

    def reenter(self, step: int) -> None:
        """Begins an epoch in its middle, if `step` has been in one, for a run that goes on after it."""
        if self._epoch_length and step % self._epoch_length:
            for item in self._hooks["on_epoch_begin"]:
                item.call(step // self._epoch_length, {})

    def finish_epoch(self, step: int, logs: dict[str, Any]) -> None:
        """Ends the epoch that a stop after `step` has cut short."""
        if self._epoch_length and step % self._epoch_length:
            self.end_epoch(step // self._epoch_length, keras_logs(logs))

    def begin_epoch(self, epoch: int, first: int) -> None:
        """Begins an epoch whose length nobody has said, at the step `first`."""
        self._first = first
        for item in self._hooks["on_epoch_begin"]:
            item.call(epoch, {})

    def end_batches(self, step: int, logs: dict[str, Any]) -> None:
        """Calls the batch hooks that wait for more batches than the epoch had, as Keras does, with `step` its last."""
        batches = step - self._first + 1
        for item in self._hooks.get("on_train_batch_end", ()):
            if item.from_epoch and item.every and batches % item.every:
                item.call(batches + -batches % item.every - 1, keras_logs(logs))

    def end_epoch(self, epoch: int, logs: dict[str, Any]) -> None:
        """Ends an epoch, with the logs that Keras callbacks expect."""
        for item in self._hooks["on_epoch_end"]:
            item.call(epoch, logs)

    def _place(self, step: int) -> tuple[int | None, int]:
        if self._epoch_length is None:
            return None, step - self._first
        return divmod(step - 1, self._epoch_length)

    def _begin(self, step: int, replayable: bool) -> None:
        epoch, batch = self._place(step)
        if epoch is not None and batch == 0:
            self._call("on_epoch_begin", epoch, {}, lambda item: item.replayable is replayable)

        def due(item: _Registration) -> bool:
            return item.replayable is replayable and not (item.from_epoch and item.every and batch % item.every)

        self._call("on_train_batch_begin", batch, {}, due)

    def _end(self, step: int, logs: dict[str, Any], live: bool) -> None:
        epoch, batch = self._place(step)

        def due(item: _Registration) -> bool:
            if not item.every:
                return live
            return (item.replayable or live) and (batch + 1 if item.from_epoch else step) % item.every == 0

        self._call("on_step", step, logs, due)
        self._call("on_train_batch_end", batch, logs, due)
        if epoch is not None:
            self._call("on_epoch_end", epoch, logs, due)

    def _call(self, hook: str, position: int, logs: dict[str, Any], due: Callable[[_Registration], bool]):
        items = [item for item in self._hooks.get(hook, ()) if due(item)]
        if not items:
            return
        logs = without_keras_loss(logs) if hook == "on_step" else keras_logs(logs)
        for item in items:
            if hook == "on_epoch_end" and not self._monitors_checked:
                check_monitor(getattr(item.call, "__self__", None), logs)
            item.call(position, logs)
        self._monitors_checked |= hook == "on_epoch_end"


def keras_logs(logs: dict[str, Any]) -> dict[str, Any]:
    """Returns the logs that Keras callbacks expect: numbers, and the loss as the mean over the epoch so far."""
    numbers = {name: value for name, value in logs.items() if not isinstance(value, np.ndarray)}
    if KERAS_LOSS in numbers:
        numbers["loss"] = numbers.pop(KERAS_LOSS)
    return numbers


def without_keras_loss(logs: dict[str, Any]) -> dict[str, Any]:
    """Returns the logs with the loss of the step itself alone."""
    return {name: value for name, value in logs.items() if name != KERAS_LOSS} if KERAS_LOSS in logs else logs
