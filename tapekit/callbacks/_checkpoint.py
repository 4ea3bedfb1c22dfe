"""The callback that saves a run, so that another process can go on with it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tapekit._describe import check_integer, check_real, describe
from tapekit._store import DamagedError, Store
from tapekit.callbacks._base import Callback

logger = logging.getLogger("tapekit")


class Checkpoint(Callback):
    """Saves everything that a run is made of, for `resume_from` of `minimize` and `fit` to go on with.

    A run that was killed and resumed ends with the same bits in variables, slots, history and result as one
    that was not. Each checkpoint is whole or not there: it is written aside, read again and renamed, and
    older ones are deleted only then. What cannot be saved is named by the logger `tapekit` when the first
    one is made. One more is saved when the run ends.

    Args:
        directory: where the checkpoints are, each a directory `checkpoint-<number>-step-<step>`.
        every: after every how many steps; `None` leaves it to `seconds`.
        seconds: after how many seconds of the run; `None` leaves it to `every`. The host looks at the clock
            about twenty times a second.
        keep: how many of the newest to keep, at least 1.
        best: whether to keep the one with the lowest loss too.
        on_error: what follows if one cannot be written, as on a full disk: "raise" ends the run with the
            error, "warn" goes on without, with one warning. What was written before stays whole either way.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range, or neither `every` nor `seconds` is given.

    Example:
        >>> import tapekit as tk, tempfile, tensorflow as tf
        >>> x, directory = tf.Variable(0.0), tempfile.mkdtemp()
        >>> def run(n):
        ...     x.assign(0.0)
        ...     loop = tk.OptimizationLoop("adam", max_iterations=n)
        ...     saving = tk.callbacks.Checkpoint(directory, every=10)
        ...     return loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[saving], resume_from=directory)
        >>> run(20).steps, run(50).history["loss"].shape
        (20, (50,))
    """

    def __init__(
        self,
        directory: Any,
        every: int | None = 1000,
        seconds: float | None = None,
        keep: int = 3,
        best: bool = True,
        on_error: str = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"`directory` must be a path, received {describe(directory)}.")
        if every is None and seconds is None:
            raise ValueError("`every` or `seconds` must be given, received None for both.")
        self.directory = os.fspath(directory)
        self.every: Any = None if every is None else check_integer(every, "every", 1)
        self.seconds = None if seconds is None else check_real(seconds, "seconds", 0)
        self.keep = check_integer(keep, "keep", 1)
        if not isinstance(best, bool):
            raise TypeError(f"`best` must be True or False, received {describe(best)}.")
        self.best = best
        if on_error not in ("raise", "warn"):
            raise ValueError(f'`on_error` must be "raise" or "warn", received {describe(on_error)}.')
        self.on_error = on_error
        self._store = Store(self.directory)
        self._last_step = 0
        self._last_time = 0.0
        self._failed = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins to count time."""
        if not hasattr(self.loop, "minimize"):
            raise ValueError(
                "Checkpoint needs a loop, whose state it saves, received keras.Model.fit; use loop.fit, or"
                " keras.callbacks.BackupAndRestore."
            )
        self._last_step, self._last_time, self._failed = 0, time.monotonic(), False

    def look(self, step: int, take: Callable[[], tuple[dict[str, Any], list[Any]]]) -> None:
        """Saves if it is time to; called between two chunks of steps.

        Args:
            step: how many steps have been taken.
            take: gives what to save.
        """
        by_step = self.every is not None and step // self.every > self._last_step // self.every
        if by_step or (self.seconds is not None and time.monotonic() - self._last_time >= self.seconds):
            self.save(step, take)

    def save(self, step: int, take: Callable[[], tuple[dict[str, Any], list[Any]]]) -> None:
        """Saves, unless this step is saved already."""
        if step == self._last_step:
            return
        self._last_step = step
        try:
            self._store.write(step, *take())
            self._store.prune(self.keep, self.best)
        except (OSError, tf.errors.OpError, DamagedError) as error:
            sentence = f"Checkpoint could not write to {self.directory!r} at step {step}: {_first_line(error)}"
            if self.on_error == "raise":
                raise OSError(f"{sentence}.") from error
            if not self._failed:
                logger.warning("%s. The run goes on, and it is tried again.", sentence)
            self._failed = True
        self._last_time = time.monotonic()

    def resumed(self, step: int) -> None:
        """Notes that the run goes on after a step that is saved."""
        self._last_step = step


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
