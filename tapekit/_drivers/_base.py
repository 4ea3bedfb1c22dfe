"""What every driver is: chunks of steps, and how long they should be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tapekit._batches import NO_DATA, Portion
from tapekit._body import State, StepBody

logger = logging.getLogger("tapekit")


class Advance(NamedTuple):
    """What a chunk of steps gives."""

    state: Any
    """Where to go on from, in the driver's own form."""
    taken: int
    """How many steps were taken."""
    fired: int
    """Which criteria want to stop, a bit each."""
    evaluations: int
    """How often the loss has been evaluated since the run began."""
    columns: dict[str, np.ndarray]
    """The records, with at least `taken` rows."""
    loss: float | None
    """The loss after the last step, if it is known already."""
    values: Sequence[tf.Tensor] = ()
    """What the variables are after the last step, if that is known without reading them."""
    exhausted: bool = False
    """Whether the data ended before the chunk did."""
    finite: bool = True
    """Whether the last step was finite; else it has updated nothing, and no other came after it."""
    culprits: dict[str, str] = {}
    """How many entries of which gradients were not finite in that step."""
    error: Exception | None = None
    """What the data has raised after these steps."""


class Pace:
    """Chooses chunk lengths that let the host be seen often enough, from the speed seen so far."""

    TARGET = 0.05
    """Seconds that the steps of a chunk should take."""
    FEW = 4
    """Steps that share a call, which takes its memory from the system anew, if they take twice that and a step more."""

    def __init__(self) -> None:
        self.call: float | None = None
        """Seconds that a chunk takes beside its steps, once that has been measured."""
        self._seconds_a_step = float("inf")
        self._last = 0

    @property
    def call_matters(self) -> bool:
        """Whether steps look so slow that it must be known how much of that is not theirs."""
        return self.call is None and 1 < self._seconds_a_step * 20 / self.TARGET < float("inf")

    def limit(self) -> int:
        """Returns how many steps the next chunk should have."""
        few = min(self.FEW, 1 + int(2 * self.TARGET / self._seconds_a_step))
        return max(1, min(max(few, int(self.TARGET / self._seconds_a_step)), 16 * self._last))

    def observe(self, taken: int, seconds: float) -> None:
        """Learns from a chunk of `taken` steps that lasted `seconds`."""
        self._seconds_a_step = max(seconds - (self.call or 0.0), 1e-9) / taken
        self._last = taken


class Driver:
    """Runs a step body in chunks.

    Args:
        body: the step.
        longest: the largest number of steps that a chunk may have.
    """

    traced_loss: Any = None
    """The objective, traced, if it needs no batch and is compiled."""

    def __init__(self, body: StepBody, longest: int) -> None:
        self.body = body
        self.traces = 0
        self.expected = 0.0
        """How many steps all runs so far have been about to take, at most."""
        self.kept_alive: Any = None
        self._longest = longest
        self._pace = Pace()

    @property
    def steps(self) -> list[Any]:
        """The traced steps, if there are any."""
        return []

    def build(self) -> None:
        """Makes the variables that are otherwise made in the first step."""

    def prepare(self, period: int, portion: Portion = NO_DATA) -> None:
        """Gets ready for batches of a shape, and for somebody who needs the host every `period` steps at the latest."""

    def limit(self) -> int:
        """Returns how many steps the next chunk should have if nobody needs the host before."""
        return min(self._pace.limit(), self._longest)

    def begin(self, state: State | None = None) -> Any:
        """Returns the state to go on from, in the driver's own form: the initial one, or what `read` has returned."""
        raise NotImplementedError

    def read(self, state: Any) -> State:
        """Returns a state as Python numbers and NumPy arrays."""
        raise NotImplementedError

    def advance(self, state: Any, limit: int, seconds: float, portion: Portion = NO_DATA) -> Advance:
        """Takes up to `limit` steps, and stops exactly where a criterion says or the data ends.

        Args:
            state: the result of `begin` or of the advance before.
            limit: the largest number of steps, at least 1.
            seconds: the time since the run began.
            portion: the batches, at least `limit` of them unless it is a stream; `prepare` has seen their shape.
        """
        raise NotImplementedError

    def evaluate(self) -> float:
        """Returns the loss at the present variables."""
        raise NotImplementedError


def culprits_of(body: StepBody, counts: np.ndarray) -> dict[str, str]:
    """Returns how many entries of which gradients are not finite."""
    pairs = zip(body.suspects, counts.tolist(), strict=True)
    return {name: f"{count} of {size}" for (name, size), count in pairs if count}
