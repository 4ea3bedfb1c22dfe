"""The table of iterations."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import numpy as np

from tapekit._describe import check_integer
from tapekit.callbacks._base import Callback


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
        self.columns = None if columns is None else check_names(columns, "columns")
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
        cells = (f"{cell(logs[name]):>{width}}" for name, width in self._widths.items())
        print("  ".join([f"{step:6d}", *cells]), file=file)

    def _choose_widths(self, logs: dict[str, Any]) -> dict[str, int]:
        names = list(logs) if self.columns is None else self.columns
        unknown = [name for name in names if name not in logs]
        if unknown:
            raise ValueError(f"`columns` must be among {', '.join(logs)}, received {', '.join(unknown)}.")
        return {name: max(_NUMBER_WIDTH, len(name), len(cell(logs[name]))) for name in names}


_NUMBER_WIDTH = 12


def check_names(names: Any, argument: str) -> list[str]:
    """Returns the names of logs that an argument has."""
    if isinstance(names, str):
        raise TypeError(f"`{argument}` must be a list of names of logs, received {names!r}; write [{names!r}].")
    return list(names)


def cell(value: Any) -> str:
    """Returns a value of the logs in words."""
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
