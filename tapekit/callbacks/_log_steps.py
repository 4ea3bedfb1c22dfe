"""The logs of a run as records of Python's `logging`."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tapekit._describe import check_integer
from tapekit.callbacks._base import Callback
from tapekit.callbacks._table import cell, check_names

_logger = logging.getLogger("tapekit")


class LogSteps(Callback):
    """Writes the logs of steps to the logger `tapekit` of Python's `logging`.

    That logger also tells, at the level INFO, how each run has ended, and what went wrong at WARNING. This callback is
    replayable: the run goes at full speed.

    Args:
        every: at every how many steps, at least 1.
        names: which logs, in order; `None` for all of them.
        level: the level of the records.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: `every` is below 1, or a name is not in the logs.

    Example:
        >>> import logging, sys, tapekit as tk, tensorflow as tf
        >>> logger, handler = logging.getLogger("tapekit"), logging.StreamHandler(sys.stdout)
        >>> logger.setLevel("INFO")
        >>> logger.addHandler(handler)
        >>> x = tf.Variable(0.0)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=200)
        >>> result = loop.minimize(lambda: (x - 4.0) ** 2, [x], [tk.callbacks.LogSteps(every=100)])
        step 100: loss 0.293011
        step 200: loss 0.00515346
        200 steps in ... s: MaxIterations: step 200 reached the limit of 200
        >>> logger.setLevel("NOTSET")
        >>> logger.removeHandler(handler)
    """

    replayable = True

    def __init__(self, every: int = 1, names: Iterable[str] | None = None, level: int = logging.INFO) -> None:
        super().__init__()
        self.every = check_integer(every, "every", 1)
        self.names = None if names is None else check_names(names, "names")
        self.level = check_integer(level, "level", 0)

    def on_step(self, step, logs):
        """Writes a record, if somebody listens."""
        if _logger.isEnabledFor(self.level):
            names = logs if self.names is None else self.names
            if unknown := [name for name in names if name not in logs]:
                raise ValueError(f"`names` must be among {', '.join(logs)}, received {', '.join(unknown)}.")
            shown = ", ".join(f"{name} {' '.join(cell(logs[name]).split()).replace('[ ', '[')}" for name in names)
            _logger.log(self.level, "step %d: %s", step, shown)
