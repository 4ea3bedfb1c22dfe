"""What to do with a step whose loss or gradient is not finite."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import tensorflow as tf

from tapekit._config import Configurable
from tapekit._describe import check_integer, check_real, describe
from tapekit._tensors import gradient_values


class Guard(enum.IntEnum):
    """Whether a step updates anything."""

    FINITE = 0
    """If its loss and its gradients are finite."""
    NEVER = 1
    """In no case: the step is made to learn what is not finite in it."""
    BY_SUM = 2
    """In any case: whoever asks puts everything back where they are not finite. Sums of the gradients tell, which may
    overflow where no entry does."""
    ALWAYS = 3
    """In any case, as before, where each entry has been looked at."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rollback(Configurable):
    """Goes back to the best variables after a step that is not finite, with a smaller learning rate.

    For `OptimizationLoop(on_nonfinite=...)`, where "rollback" is short for one with these defaults. Variables and
    the state of the optimizer become those of the lowest finite loss; the run goes on from there.

    Args:
        factor: what the learning rate is multiplied by, between 0 and 1.
        times: how often at most; the next such step ends the run.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range.

    Example:
        >>> import tapekit as tk
        >>> loop = tk.OptimizationLoop("adam", max_iterations=1000, on_nonfinite=tk.Rollback(factor=0.1, times=5))
    """

    factor: float = 0.5
    times: int = 3

    def __post_init__(self) -> None:
        if not 0.0 < check_real(self.factor, "factor", 0.0) < 1.0:
            raise ValueError(f"`factor` must be between 0 and 1, received {describe(self.factor)}.")
        check_integer(self.times, "times", 1)


def check_on_nonfinite(value: Any) -> str | Rollback:
    """Returns what an argument `on_nonfinite` stands for."""
    if value == "rollback":
        return Rollback()
    if isinstance(value, Rollback) or value in ("stop", "raise", "skip"):
        return value
    raise ValueError(
        f'`on_nonfinite` must be "stop", "raise", "skip", "rollback" or a tapekit.Rollback, received {describe(value)}.'
    )


def count_nonfinite(gradient: Any) -> tf.Tensor:
    """Returns how many entries of a gradient, dense or `tf.IndexedSlices`, are NaN or infinite."""
    return tf.reduce_sum(tf.cast(~tf.math.is_finite(gradient_values(gradient)), tf.int64))
