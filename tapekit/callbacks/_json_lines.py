"""The log of a run as lines of JSON."""

from __future__ import annotations

import errno
import json
import math
import os
from typing import Any

import numpy as np

from tapekit._describe import check_integer, describe
from tapekit.callbacks._base import Callback


class JSONLinesLogger(Callback):
    r"""Writes the logs of steps to a file, one JSON object a line.

    It is replayable: the run goes at full speed, and the lines of a chunk of steps are written together. The file
    holds whole lines only, so that another process can read it at any time. Numbers are exact; NaN and infinities,
    which JSON does not have, are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`.

    Args:
        filename: the file. One that is there is replaced, unless `append` is True.
        every: at every how many steps, at least 1.
        append: whether to add to a file that is there.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: `every` is below 1.
        OSError: the file cannot be written; raised when the run begins, or by the step that fails.

    Example:
        >>> import pathlib, tapekit as tk, tempfile, tensorflow as tf
        >>> x, path = tf.Variable(0.0), pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=100)
        >>> result = loop.minimize(lambda: (x - 4.0) ** 2, [x], [tk.callbacks.JSONLinesLogger(path, every=50)])
        >>> print(path.read_text(), end="")
        {"step": 50, "loss": 2.20940...}
        {"step": 100, "loss": 0.29301...}
    """

    replayable = True

    def __init__(self, filename: Any, every: int = 1, append: bool = False) -> None:
        super().__init__()
        if not isinstance(filename, (str, os.PathLike)):
            raise TypeError(f"`filename` must be a path, received {describe(filename)}.")
        self.filename = os.fspath(filename)
        self.every = check_integer(every, "every", 1)
        if not isinstance(append, bool):
            raise TypeError(f"`append` must be True or False, received {describe(append)}.")
        self.append = append
        self._file: int | None = None

    def on_train_begin(self, logs=None):
        """Opens the file."""
        self.on_train_end()
        how = os.O_APPEND if self.append else os.O_TRUNC
        self._file = os.open(self.filename, os.O_WRONLY | os.O_CREAT | how, 0o666)

    def on_step(self, step, logs):
        """Writes a line in one piece."""
        if self._file is not None:
            text = json.dumps({"step": step, **{name: _plain(value) for name, value in logs.items()}}, allow_nan=False)
            line = f"{text}\n".encode()
            written = os.write(self._file, line)
            if written < len(line):  # the disk is full
                os.ftruncate(self._file, os.lseek(self._file, 0, os.SEEK_END) - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.filename)

    def get_state(self) -> dict[str, Any]:
        """Returns how long the file is, for `Checkpoint`."""
        return {"size": None if self._file is None else os.fstat(self._file).st_size}

    def set_state(self, state: dict[str, Any]) -> None:
        """Cuts the file off where a run that goes on was saved.

        Args:
            state: a result of `get_state`.
        """
        if self._file is not None and state["size"] is not None:
            os.ftruncate(self._file, state["size"])
            os.lseek(self._file, 0, os.SEEK_END)

    def on_train_end(self, logs=None):
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()] if value.ndim else _plain(value.item())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, complex):
        return [_plain(value.real), _plain(value.imag)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
