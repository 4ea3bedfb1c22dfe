"""A line that lives while a run goes on."""

from __future__ import annotations

import collections
import dataclasses
import html
import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

import keras
import numpy as np

from tapekit._describe import check_real, describe
from tapekit.callbacks._base import Callback
from tapekit.callbacks._table import check_names

_KNOWN = ("loss", "gradient_norm")
_LARGEST_SHARE = 0.01
"""Of the time of a run that drawing may take."""
_RATE_OVER = 5.0
"""The seconds over which the rate is taken."""
_LINES_APART = 50
"""How many intervals there are between two plain lines."""
_WIDE = 110
"""From how many columns of the terminal there is room for a bar."""
_PREFIXES = {1e9: "G", 1e6: "M", 1e3: "k"}
_PREPARING = "the first steps are being prepared"
_SIGNS = {(False, False): ">", (False, True): "<=", (True, False): "<", (True, True): ">="}
_LIMITS = ("step", "seconds")
"""What the criteria look at whose thresholds say when a run ends at the latest."""


class Progress(Callback):
    """Shows how far a run is: step or epoch, steps a second, time gone and left, loss, and the nearest criterion.

    In a terminal it is one line that changes, drawn by rich (`pip install "tapekit[progress]"`), or by
    `keras.utils.Progbar` where that is not installed; in a notebook it is an output that changes. Elsewhere, in a log
    file say, it is a plain line now and then.
    It looks when the host does, about twenty times a second, and draws so seldom that this takes about a hundredth of
    the time at most. The time left is that to the limit of steps, epochs or seconds, if there is one. There are no
    colours where the environment variable `NO_COLOR` is set.

    Args:
        metrics: names of logs to show beside the loss and, where it is known, the norm of the gradient; those of the
            last validation too.
        interval: the least time between two pictures, in seconds; plain lines are 50 times as far apart.
        verbose: 0 for nothing, 1 for the line, 2 for plain lines, in `fit` one an epoch; `None` is what the run is
            told. `keras.Model.fit` shows a bar of its own unless it is told `verbose=0`, beside which this must be 1.
        file: where to; `None` is standard output.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: `interval` is negative, or `verbose` something else.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(0.0)
        >>> loop = tk.OptimizationLoop("sgd", tolerance=1e-9, max_iterations=300)
        >>> result = loop.minimize(lambda: (x - 4.0) ** 2, [x], [tk.callbacks.Progress()])
        step 300/300, 0:00 gone, loss 9.06...e-05, change_of_the_loss 3.7...e-06>1e-09, ... steps/s
    """

    every: Any = None

    def __init__(
        self,
        metrics: Iterable[str] | None = None,
        interval: float = 0.2,
        verbose: int | None = None,
        file: TextIO | None = None,
    ) -> None:
        super().__init__()
        if verbose not in (None, 0, 1, 2):
            raise ValueError(f"`verbose` must be 0, 1, 2 or None, received {describe(verbose)}.")
        self.metrics = [] if metrics is None else check_names(metrics, "metrics")
        self.interval = check_real(interval, "interval", 0)
        self.verbose = verbose
        self.file = file
        self._display: Any = None
        self._verbose = 0
        self._due = math.inf
        self._step = 0
        self._logs: dict[str, Any] = {}
        self._drawn: int | None = None
        self._samples: collections.deque[tuple[float, int]] = collections.deque()
        self._not_state = frozenset({*vars(self), "_not_state"})

    def on_train_begin(self, logs=None):
        """Opens the display."""
        self._close()
        told = (self.params or {}).get("verbose", 1) if self.verbose is None else self.verbose
        self._verbose = 1 if told == "auto" else int(told)
        self._display = _display(self.file, self._verbose) if self._verbose else None
        self._step, self._drawn = 0, None
        self._logs.clear()
        self._samples.clear()
        self._due = math.inf
        if self._display:
            self._due = time.perf_counter() + (0.0 if self._display.is_live else _LINES_APART * self.interval)

    def on_step(self, step, logs):
        """Draws, if it is time."""
        self._step = step
        self._logs.update(logs)
        if not self._samples:
            self._samples.append((time.perf_counter(), step))
        if time.perf_counter() >= self._due:
            self._draw()

    def on_epoch_end(self, epoch, logs=None):
        """Takes the results of an epoch, and draws them if there is a line for each; called in `fit` alone."""
        self._logs.update(logs or {})
        if self._verbose == 2:
            self._draw(is_epoch_end=True)

    def on_train_end(self, logs=None):
        """Draws how the run has ended, and closes the display."""
        if self._display and self._step and (self._display.is_live or self._drawn != self._step):
            self._draw(is_epoch_end=True, has_ended=True)
        self._close()

    def _close(self) -> None:
        if self._display:
            self._display.close()
        self._display = None

    def _draw(self, is_epoch_end: bool = False, has_ended: bool = False) -> None:
        began = time.perf_counter()
        status = self.loop.status()
        if is_epoch_end or self._verbose == 1 or status["epoch"] is None:
            self._samples.append((began, self._step))
            while began - self._samples[0][0] > _RATE_OVER and len(self._samples) > 2:
                self._samples.popleft()
            self._display.show(self._view(status, has_ended))
            self._drawn = self._step
        took = time.perf_counter() - began
        interval = self.interval if self._display.is_live else _LINES_APART * self.interval
        self._due = began + max(interval, took / _LARGEST_SHARE)

    def _view(self, status: dict[str, Any], has_ended: bool) -> _View:
        seconds, total, where = [], None, f"step {self._step:,}"
        limits = [s for s in status["criteria"] if s.quantity in _LIMITS]
        done = [s.share for s in limits]
        for limit in limits:
            if limit.quantity == "seconds":
                seconds.append(limit.threshold - status["seconds"])
            else:
                total = min(limit.threshold, total or math.inf)
                where = f"step {self._step:,}/{total:,.0f}"
        if status["epoch"] is not None:
            params: dict[str, Any] = self.params or {}
            epochs, batches = params["epochs"], params["steps"]
            where = f"epoch {status['epoch'] + 1}/{epochs}, batch {status['batch']:,}"
            if batches:
                where += f"/{batches:,}"
                done.append((status["epoch"] * batches + status["batch"]) / (epochs * batches))
                total = min(self._step + (epochs - status["epoch"]) * batches - status["batch"], total or math.inf)
        rate = self._rate()
        if rate and total:
            seconds.append((total - self._step) / rate)
        return _View(
            where,
            self._step,
            None if total is None else int(total),
            max(done, default=None),
            status["seconds"],
            min(seconds, default=None),
            rate,
            {name: self._logs[name] for name in (*_KNOWN, *self.metrics) if name in self._logs},
            has_ended,
            max((s for s in status["criteria"] if s.quantity not in _LIMITS), key=lambda s: s.share, default=None),
        )

    def _rate(self) -> float | None:
        """Returns the steps a second of late; `None` before there are two looks."""
        (since, first), (now, last) = self._samples[0], self._samples[-1]
        return (last - first) / (now - since) if last > first and now > since else None


@dataclasses.dataclass(frozen=True)
class _View:
    """What there is to show."""

    where: str
    """The step or the epoch, in words."""
    step: int
    total: int | None
    """The last step, if it is known."""
    done: float | None
    """The part that is behind, if the end is known."""
    gone: float
    left: float | None
    """Seconds to the end, if it is known."""
    rate: float | None
    values: dict[str, Any]
    has_ended: bool
    nearest: Any
    """The `Status` of the criterion that is nearest to being met, beside the limits that `done` tells of."""

    @property
    def pieces(self) -> list[str]:
        """The view in words, one for each of its parts."""
        values = {name: _number(value) for name, value in self.values.items()}
        if self.nearest:
            name, sign = self.nearest.quantity.replace(" ", "_"), _SIGNS[self.nearest.rising, self.nearest.is_met]
            values[name] = f"{_number(self.nearest.value)}{sign}{_number(self.nearest.threshold)}"
        rate = [] if self.rate is None else [f"{_short(self.rate)} steps/s"]
        return [*(f"{name} {text}" for name, text in values.items()), *rate]

    @property
    def left_to_come(self) -> str:
        """The time to the end, in words; nothing if it is not known or over."""
        return "" if self.left is None or self.has_ended or self.done == 1.0 else _clock(self.left)

    @property
    def line(self) -> str:
        """The view as the line that lives."""
        share = "" if self.done is None else f"{self.done:.0%} "
        left = f"<{self.left_to_come}" if self.left_to_come else ""
        return "  ".join([share + self.where.removeprefix("step "), f"{_clock(self.gone)}{left}", *self.pieces])


class _PlainLines:
    """Lines for a file that nobody looks at while it is written."""

    is_live = False

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def show(self, view: _View) -> None:
        left = [f"{view.left_to_come} left"] if view.left_to_come else []
        line = ", ".join([view.where, f"{_clock(view.gone)} gone", *left, *view.pieces])
        print(line, file=self._file or sys.stdout, flush=True)

    def close(self) -> None:
        pass


class _RichLine:
    """A line of rich, in a terminal."""

    is_live = True

    def __init__(self, console: Any) -> None:
        progress, table = importlib.import_module("rich.progress"), importlib.import_module("rich.table")
        line = table.Column(no_wrap=True, overflow="ellipsis")
        text = progress.TextColumn("{task.description}", markup=False, table_column=line)
        bar = [progress.BarColumn(bar_width=20)] if console.width >= _WIDE else []
        self._progress = progress.Progress(*bar, text, console=console, auto_refresh=False)
        self._task = self._progress.add_task(_PREPARING, total=None)
        self._progress.start()

    def show(self, view: _View) -> None:
        known = {} if view.done is None else {"total": 1.0, "completed": view.done}
        self._progress.update(self._task, description=view.line, refresh=True, **known)

    def close(self) -> None:
        self._progress.stop()


class _NotebookLine:
    """An output of IPython that changes; that of rich would need ipywidgets."""

    is_live = True

    def __init__(self) -> None:
        display = importlib.import_module("IPython.display").display
        self._handle = display(_as_output(_PREPARING, None), raw=True, display_id=True)

    def show(self, view: _View) -> None:
        self._handle.update(_as_output(view.line, view.done), raw=True)

    def close(self) -> None:
        pass


def _as_output(text: str, done: float | None) -> dict[str, str]:
    bar = "" if done is None else f'<progress value="{done:.4f}"></progress> '
    return {"text/plain": text, "text/html": f"<div>{bar}<code>{html.escape(text)}</code></div>"}


class _KerasBar:
    """The bar of Keras, in a terminal without rich."""

    is_live = True

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, view: _View) -> None:
        values = dict(view.values)
        if view.nearest:
            values[view.nearest.quantity] = view.nearest.value
        if self._bar is None:
            self._bar = keras.utils.Progbar(view.total, stateful_metrics=list(values), interval=0.0)
        self._bar.update(view.step, [(name, float(value)) for name, value in values.items()], finalize=False)

    def close(self) -> None:
        if self._bar is not None:
            print(flush=True)


def _display(file: TextIO | None, verbose: int) -> Any:
    """Returns what shows a run: what suits the place where it is shown."""
    if verbose == 2:
        return _PlainLines(file)
    if importlib.util.find_spec("rich") is None:
        is_for_bar = file in (None, sys.stdout) and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return _KerasBar() if is_for_bar else _PlainLines(file)
    console = importlib.import_module("rich.console").Console(file=file)
    if console.is_jupyter:
        return _NotebookLine()
    return _RichLine(console) if console.is_terminal and not console.is_dumb_terminal else _PlainLines(file)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: Any) -> str:
    return np.array2string(value, precision=4, threshold=4) if isinstance(value, np.ndarray) else f"{value:.4g}"


def _short(rate: float) -> str:
    """Returns a rate with three digits: 0.25, 12.3, 658k, 1.25M."""
    size = next((size for size in _PREFIXES if rate >= size), 1.0)
    return f"{rate / size:.3g}{_PREFIXES.get(size, '')}"
