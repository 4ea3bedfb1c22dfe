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

    A run that is killed at any moment and resumed ends with the same bits in variables, slots, history and
    result as one that was not. Saved are the variables, the optimizer, the history, criteria and strategy,
    plain attributes of callbacks and of a loop's subclass, random generators, and the place in the data;
    what cannot be saved is named by the logger `tapekit` when the first checkpoint is made. One more is made
    when the run ends, unless an exception ends it.

    Each checkpoint is whole or not there: it is written aside, read again and renamed; older ones are deleted
    only then.

    Args:
        directory: where the checkpoints are, each a directory `checkpoint-<number>-step-<step>`.
        every: after every how many steps; `None` leaves it to `seconds`, which suits steps of microseconds.
        seconds: after how many seconds; `None` leaves it to `every`. The host looks at the clock between chunks of
            steps, about twenty times a second.
        keep: how many of the newest to keep, at least 1.
        best: whether to keep the one after the step with the lowest loss too.
        on_error: what follows if one cannot be written, as on a full disk: "raise" ends the run with an
            `OSError`, "warn" goes on, with one warning. What was written before stays whole either way.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range, or neither `every` nor `seconds` is given.

    Example:
        >>> import tapekit as tk, tempfile, tensorflow as tf
        >>> directory = tempfile.mkdtemp()
        >>> def run(n):  # a script that may be killed and started again
        ...     x = tf.Variable(0.0)
        ...     loop = tk.OptimizationLoop("adam", max_iterations=n)
        ...     saving = tk.callbacks.Checkpoint(directory, every=10)
        ...     return loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[saving], resume_from=directory)
        >>> run(20).steps
        20
        >>> run(50).history["loss"].shape
        (50,)
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
        self.directory = check_directory(directory, "directory")
        if every is None and seconds is None:
            raise ValueError("`every` or `seconds` must be given, received None for both.")
        self.every = None if every is None else check_integer(every, "every", 1)
        self.seconds = None if seconds is None else check_real(seconds, "seconds", 0)
        self.keep = check_integer(keep, "keep", 1)
        if not isinstance(best, bool):
            raise TypeError(f"`best` must be True or False, received {describe(best)}.")
        self.best = best
        if on_error not in ("raise", "warn"):
            raise ValueError(f'`on_error` must be "raise" or "warn", received {describe(on_error)}.')
        self.on_error = on_error
        self._store = Store(self.directory)
        self._due = self._failed = False
        self._saved_at = 0.0
        self._not_state = frozenset({*vars(self), "_not_state"})

    def on_train_begin(self, logs=None):
        """Begins to count time."""
        if not hasattr(self.loop, "minimize"):
            raise ValueError(
                "`callbacks` of keras.Model.fit must not hold Checkpoint, which saves the state of a loop, received"
                " one; use loop.fit, or keras.callbacks.BackupAndRestore."
            )
        self._due = self._failed = False
        self._saved_at = time.monotonic()

    def on_step(self, step, logs):
        """Notes that a checkpoint is due, which is made when all other hooks of the step have run."""
        self._due = self.every is not None

    @property
    def due(self) -> bool:
        """Whether a checkpoint is to be made now."""
        return self._due or (self.seconds is not None and time.monotonic() - self._saved_at >= self.seconds)

    def save(self, step: int, take: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Makes a checkpoint.

        Args:
            step: how many steps have been taken.
            take: gives what to save, plain data and tensors.
        """
        self._due = False
        state, tensors = take()
        try:
            self._store.write(step, state, tensors)
            self._store.prune(self.keep, self.best)
        except (OSError, tf.errors.OpError, DamagedError) as error:
            first_line = str(error).partition("\n")[0].rstrip(".")
            sentence = f"no checkpoint could be written to {self.directory!r} at step {step}: {first_line}"
            if self.on_error == "raise":
                raise OSError(f"{sentence}.") from error
            if not self._failed:
                logger.warning("%s; the run goes on, and it is tried again when the next is due.", sentence)
            self._failed = True
        self._saved_at = time.monotonic()


def check_directory(value: Any, name: str) -> str:
    """Returns a path as a string, or raises."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` must be a path, received {describe(value)}.")
    return os.fspath(value)
