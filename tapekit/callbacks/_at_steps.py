"""A callback of Keras that counts epochs, at steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from tapekit._describe import check_integer, describe
from tapekit.callbacks._base import Callback

_READ_LOGS_ALONE = (keras.callbacks.History, keras.callbacks.CSVLogger)


class AtSteps(Callback):
    """Shows a Keras callback every n-th step as the end of an epoch.

    Most callbacks of Keras do their work at the end of an epoch. In `fit` this one has `CSVLogger` write a row for
    steps, `TensorBoard` draw them, or `ReduceLROnPlateau` judge them. The number of the epoch is the step counted
    from 0, and its logs are the numbers of that very step, so that there are none of a validation. For `CSVLogger` and
    `History` the run goes at full speed; for others, compiled chunks of steps end where they are called.

    Args:
        callback: a `keras.callbacks.Callback`; its hooks of batches are not called.
        every: at every how many steps, at least 1.

    Raises:
        TypeError: `callback` is not a callback of Keras, or is one of tapekit, which sees steps anyway.
        ValueError: `every` is below 1.

    Example:
        >>> import keras, numpy as np, pathlib, tapekit as tk, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "steps.csv"
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
        >>> model.compile(keras.optimizers.SGD(0.25), "mse")
        >>> log = tk.callbacks.AtSteps(keras.callbacks.CSVLogger(path), every=2)
        >>> result = tk.OptimizationLoop().fit(
        ...     model, np.ones((64, 1)), np.ones((64, 1)), batch_size=8, verbose=0, callbacks=[log]
        ... )
        >>> [line.split(",")[0] for line in path.read_text().splitlines()]
        ['epoch', '1', '3', '5', '7']
    """

    def __init__(self, callback: Any, every: int = 1) -> None:
        super().__init__()
        if not isinstance(callback, keras.callbacks.Callback) or isinstance(callback, Callback):
            raise TypeError(f"`callback` must be a callback of Keras, received {describe(callback)}.")
        self.callback = callback
        self.every = check_integer(every, "every", 1)
        self.replayable = type(callback) in _READ_LOGS_ALONE

    def set_model(self, model: Any) -> None:
        """Hands on the model.

        Args:
            model: the model, or what owns the variables.
        """
        super().set_model(model)
        self.callback.set_model(model)

    def set_params(self, params: Any) -> None:
        """Hands on the parameters of the run.

        Args:
            params: `"epochs"`, `"steps"` and `"verbose"`.
        """
        super().set_params(params)
        self.callback.set_params(params)

    def on_train_begin(self, logs=None):
        """Begins the first epoch."""
        self.callback.on_train_begin(logs)
        self.callback.on_epoch_begin(0, {})

    def on_step(self, step, logs):
        """Ends an epoch, and begins the next one."""
        numbers = {name: value for name, value in logs.items() if not isinstance(value, np.ndarray)}
        self.callback.on_epoch_end(step - 1, numbers)
        self.callback.on_epoch_begin(step, {})

    def on_train_end(self, logs=None):
        """Hands on the end."""
        self.callback.on_train_end(logs)


def with_inner(callbacks: Iterable[Any]) -> Iterator[Any]:
    """Returns callbacks, and those that are inside of `AtSteps`."""
    for callback in callbacks:
        yield callback
        if isinstance(callback, AtSteps):
            yield callback.callback
