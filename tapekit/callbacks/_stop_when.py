"""A criterion as a callback, for the runs that somebody else starts."""

from __future__ import annotations

from typing import Any

from tapekit import stopping
from tapekit._result import StopReason
from tapekit.callbacks._base import Callback


class StopWhen(Callback):
    """Stops a run when a criterion says so, at that very step; in `keras.Model.fit` too.

    In a loop it is one more criterion of the run. In `Model.fit` it is judged inside the compiled step as well;
    the epoch is then ended as Keras ends it, with its validation and `on_epoch_end`.

    Args:
        criterion: a criterion, its name or configuration, or a list of which any one stops.

    Attributes:
        reason: the `StopReason` of the last run that the criterion ended; `None` if it did not.
        message: one sentence: which criterion, the value, the threshold; `None` if it did not end the run.

    Raises:
        TypeError: `criterion` is none of these.

    Example:
        >>> import keras, numpy as np, tapekit as tk
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> stop = tk.callbacks.StopWhen(tk.stopping.MaxIterations(7))
        >>> _ = model.fit(np.ones((64, 1)), np.ones((64, 1)), batch_size=8, epochs=9, verbose=0, callbacks=[stop])
        >>> stop.message, model.optimizer.iterations.numpy().item()
        ('MaxIterations: step 7 reached the limit of 7', 7)
    """

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.criterion = stopping.get(criterion)
        self.reason: StopReason | None = None
        self.message: str | None = None

    def on_train_begin(self, logs=None):
        """Forgets the run before."""
        self.reason, self.message = None, None
