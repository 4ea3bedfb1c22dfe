"""The driver that runs every op from Python."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras import tree

from tapekit._batches import NO_DATA, Portion
from tapekit._body import State, StepBody
from tapekit._drivers._base import Advance, Driver, culprits_of
from tapekit._packing import number


class EagerDriver(Driver):
    """Runs every op from Python, so that a debugger or a print inside the objective works."""

    def __init__(self, body: StepBody, longest: int) -> None:
        super().__init__(body, longest)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def begin(self, state: State | None = None) -> State:
        """Returns the state as tensors."""
        self._shapes = {}
        tensors: Any = tree.map_structure(tf.convert_to_tensor, self.body.initial if state is None else state)
        return tensors

    def read(self, state: State) -> State:
        """Returns the state as Python numbers and NumPy arrays."""
        numbers: Any = tree.map_structure(lambda leaf: number(leaf.numpy()), state)
        return numbers

    def build(self) -> None:
        """Makes the variables of the optimizer and the strategy."""
        self.body.updater.build(self.body.updater.native(self.body.variables))
        self.body.build()

    def limit(self) -> int:
        """Returns 1: an error in a later step then loses nothing of an earlier one."""
        return 1

    def advance(self, state: State, limit: int, seconds: float, portion: Portion = NO_DATA) -> Advance:
        """Takes one step, or none at all if anything in it raises or the data has ended."""
        try:
            batch = portion.take()
        except StopIteration:
            return Advance(state, 0, 0, int(state.evaluations), {}, None, exhausted=True)
        except tf.errors.OpError as error:
            return Advance(state, 0, 0, int(state.evaluations), {}, None, error=error)
        if portion.key:
            self.body.objective.bind(batch)
            self.body.variables[:] = self.body.objective.build()
            self.body.build()
        self.body.updater.save([*self.body.variables, *self.body.objective.variables])
        try:
            state, row, verdict = self.body(state, tf.constant(seconds, tf.float64), batch)
            self._check_shapes({name: tuple(value.shape) for name, value in row.items()})
        except BaseException:
            self.body.updater.roll_back()
            raise
        columns = {name: value.numpy()[None] for name, value in row.items()}
        culprits = culprits_of(self.body, verdict.counts.numpy())
        finite = bool(verdict.finite)
        fired, evaluations = int(verdict.fired), int(state.evaluations)
        return Advance(state, 1, fired, evaluations, columns, None, finite=finite, culprits=culprits)

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises if a recorded value has come, gone or changed its shape since the first step."""
        self._shapes = self._shapes or shapes
        changes = [
            f"{name!r} of {_shape(shapes.get(name))} after {_shape(self._shapes.get(name))}"
            for name in shapes | self._shapes
            if shapes.get(name) != self._shapes.get(name)
        ]
        if changes:
            raise ValueError(
                "`loss` and `measures` must give values of the same names and of a fixed shape at every step, received"
                f" {' and '.join(changes)}."
            )

    def evaluate(self) -> float:
        """Evaluates the objective."""
        return float(self.body.objective()[0])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no value" if shape is None else f"shape {shape}"
