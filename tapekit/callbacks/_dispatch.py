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
from tapekit.callbacks._base import Hooks
from tapekit.callbacks._gradient_views import CaptureGradients, GradientStatistics
from tapekit.callbacks._table import IterationTable

# These read their arguments alone, so they can be called after a chunk of steps.
_REPLAYABLE_IN_KERAS = (keras.callbacks.History, keras.callbacks.CSVLogger)
_NEVER_STOP = (*_REPLAYABLE_IN_KERAS, IterationTable, GradientStatistics, CaptureGradients)
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
        """Calls `on_train_begin` or `on_train_end` of everyone, the latter also if one of them raises."""
        calls = [call for owner in self._owners if (call := overridden(owner, hook))]
        if hook == "on_train_begin":
            for call in calls:
                call(logs or {})
            return
        with contextlib.ExitStack() as stack:
            for call in reversed(calls):
                stack.callback(call, logs or {})

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
