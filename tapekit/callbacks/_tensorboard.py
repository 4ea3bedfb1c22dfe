"""A run for TensorBoard, step by step."""

from __future__ import annotations

import math
import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapekit._describe import describe
from tapekit._exchange import package
from tapekit.callbacks._gradient_views import PeriodicCallback
from tapekit.callbacks._gradients import norm_of


class TensorBoardLogger(PeriodicCallback):
    """Writes steps for TensorBoard: the logs, the learning rate, gradients and variables.

    `keras.callbacks.TensorBoard` works in a loop too, and has what it calls epochs and validation. This callback adds
    what it does not know:

        loss, ...             the numbers in the logs: the loss, measures, metrics
        learning_rate         that of the step
        gradient_norm         the Euclidean norm of all gradients together, as they reach this callback
        gradient_norm/NAME    that of the gradient of a variable
        gradient/NAME         a histogram of that gradient
        variable/NAME         a histogram of the variable after the step
        MEASURE               a histogram of a measure that is an array

    `tensorboard --logdir DIRECTORY` shows them, those of several runs beside one another.

    Args:
        log_dir: the directory of the run, which is made if it is not there.
        every: at every how many steps, at least 1; compiled chunks of steps end there.
        histograms: whether to write histograms, for which gradients are copied at these steps.

    Raises:
        ImportError: tensorboard is not installed; the sentence has the command that installs it.
        TypeError: an argument is of the wrong kind.
        ValueError: `every` is below 1.

    Example:
        >>> import pathlib, tapekit as tk, tempfile, tensorflow as tf
        >>> x, directory = tf.Variable([0.0, 3.0], name="x"), pathlib.Path(tempfile.mkdtemp())
        >>> board = tk.callbacks.TensorBoardLogger(directory / "sgd", every=10)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=100)
        >>> result = loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x], callbacks=[board])
        >>> len(list(directory.glob("sgd/events*")))
        1
    """

    def __init__(self, log_dir: Any, every: int = 100, histograms: bool = True) -> None:
        super().__init__(every)
        if not isinstance(log_dir, (str, os.PathLike)):
            raise TypeError(f"`log_dir` must be a path, received {describe(log_dir)}.")
        if not isinstance(histograms, bool):
            raise TypeError(f"`histograms` must be True or False, received {describe(histograms)}.")
        package("tensorboard", "TensorBoardLogger", "tensorboard")
        self.log_dir = os.fspath(log_dir)
        self.histograms = histograms
        self._writer: Any = None

    def on_train_begin(self, logs=None):
        """Opens a file of events."""
        super().on_train_begin(logs)
        self._close()
        self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_step(self, step, logs):
        """Writes what is known of the step."""
        names, variables = self.shelf.chosen()
        kept = [self.shelf.of(variable)[0].numpy() for variable in variables]
        norms = [math.sqrt(np.sum(np.square(value, dtype=np.float64))) for value in kept]
        numbers = {name: value for name, value in logs.items() if not isinstance(value, np.ndarray)}
        model: Any = self.model
        if (rate := _learning_rate(model.optimizer)) is not None:
            numbers["learning_rate"] = rate
        numbers["gradient_norm"] = math.hypot(*norms)
        numbers |= {f"gradient_norm/{name}": norm for name, norm in zip(names, norms, strict=True)}
        with self._writer.as_default(step), tf.summary.record_if(True):
            for name, value in numbers.items():
                tf.summary.scalar(name, value)
            if self.histograms:
                for name, value in logs.items():
                    if isinstance(value, np.ndarray):
                        tf.summary.histogram(name, value)
                for name, variable, gradient in zip(names, variables, kept, strict=True):
                    tf.summary.histogram(f"gradient/{name}", gradient)
                    tf.summary.histogram(f"variable/{name}", variable)
        self._writer.flush()

    def on_train_end(self, logs=None):
        """Closes the file."""
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _room(self, variable):
        return [(variable.shape, variable.dtype) if self.histograms else ((), tf.float64)]

    def _look(self, places, gradient, variable, before):
        places[0].assign(gradient if self.histograms else norm_of([gradient]))


def _learning_rate(optimizer: Any) -> float | None:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    rate = getattr(optimizer, "learning_rate", None)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(optimizer.iterations)
    return None if rate is None else float(rate)
