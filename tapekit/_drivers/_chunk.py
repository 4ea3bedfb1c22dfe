"""A chunk: many steps and their records in one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import tree

from tapekit._batches import Portion
from tapekit._body import StepBody
from tapekit._nonfinite import Guard
from tapekit._packing import Packing
from tapekit._tensors import tf_variable
from tapekit._xla import DRAWING, op_types, written

NOT_FINITE = 1 << 30
"""The bit that says that the last step was not finite; criteria have lower ones."""
WORTH_HANDING_OVER = 1 << 14
"""The numbers that the variables may have for a chunk to hand their values over, so that nobody need read them."""


class Header(NamedTuple):
    """What a compiled chunk says of itself, beside the state and the records."""

    taken: Any
    fired: Any
    """Which criteria want to stop, a bit each, and `NOT_FINITE`: one number, since each is a kernel to XLA."""
    exhausted: Any


class Program:
    """A step traced for batches of one shape, and the compiled loops around it.

    Args:
        trace: traces the step under a guard, or, without one, as a function of a guard too. It returns what was traced,
            and the same with ops that XLA runs faster.
        guard: under which guard the step is most likely taken; `None` if it may be traced just once.
        portion: what the batches are like.
        strict: whether XLA must compile it.
    """

    def __init__(self, trace: Callable[..., Any], guard: Guard | None, portion: Portion, strict: bool) -> None:
        self._trace = trace
        self._traced = {guard: trace(guard)}
        self.step, self.for_xla = self._traced[guard]
        """What was traced first, and the same with ops that XLA runs faster."""
        self.stacks = portion.batch is None and all(
            strict or _has_one_shape(spec) for spec in tree.flatten(portion.spec)
        )
        """Whether XLA may compile it for a stream, whose batches are stacked for that: not where each had its shape."""
        self.costs: tuple[float, float] | None = None
        """The seconds of the first call under XLA, and of a step, once they are known."""
        self.in_graph: float | None = None
        """The seconds of a step in a graph, if that was tried too."""
        self.shape: Any = None
        """What the first of them was like."""
        self.chunks: dict[Any, Chunk] = {}
        self.capacity = 1
        self.jit = False
        self.written = written(self.step)
        """The variables that it changes."""
        self.draws = bool(op_types(self.step) & DRAWING)
        """Whether it draws random numbers of which nobody could draw the same again."""
        rows = self.step.structured_outputs[2]
        self.records = list(rows)
        """The names of what a step records."""
        self.row_bytes = max(1, sum(row.dtype.size * row.shape.num_elements() for row in rows.values()))
        """The memory that this takes."""
        self.refused: dict[Any, Any] = {}
        """The step made without an update, traced for each kind of chunk in which one has not been finite."""
        self.overflows = False
        """Whether finite gradients have had a sum that is not, so that each entry must be looked at."""

    def step_under(self, guard: Guard, jit: bool) -> Callable[..., Any]:
        """Returns the step under a guard, a function of the clock, integers, floats and a batch, to call in a graph."""
        if None in self._traced:
            step = self._traced[None][jit]
            return lambda *given: step(*given, tf.constant(guard, tf.int32))  # there, so that XLA folds it
        if guard not in self._traced:
            self._traced[guard] = self._trace(guard)
        return self._traced[guard][jit]


class Outcome(NamedTuple):
    """What comes out of a compiled loop of steps."""

    integers: tf.Tensor
    floats: tf.Tensor
    loss: tf.Tensor
    """The loss after the last step, if the run ends there."""
    before: list[tf.Tensor]
    """What the variables were that the steps have changed, if the host may have to undo them; else empty."""
    counts: tf.Tensor | None
    """How many entries of each gradient are not finite, if nothing is to be undone."""
    values: list[tf.Tensor]
    """What the variables are, if they are small; else empty."""
    records: dict[str, tf.Tensor]
    """One tensor for each quantity, unless a queue has them."""


class Chunk:
    """A compiled loop of steps with room for their records.

    Args:
        function: the loop, which returns the parts of an `Outcome` in one list.
        undone: how many of them are `before`; `None` if nothing is undone.
        records: the names of the last of them.
        queue: where the state and the record of each step go if the data may raise: nothing else comes out then.
    """

    def __init__(self, function: Any, undone: int | None, records: Sequence[str], queue: Any) -> None:
        # The public call spends 60 us on matching arguments to the signature and results to their structure.
        self._call, self._captured = function._inference_function.call_flat, function.captured_inputs
        self._undone = undone
        self._records = records
        self.queue = queue

    def __call__(self, limit: int, *given: Any) -> Outcome:
        """Takes up to `limit` steps, given the clock, the state and the feed."""
        integers, floats, loss, *rest = self._call(constant(limit, tf.int64), *given, *self._captured)
        counts = rest.pop(0) if self._undone is None else None
        before, end = rest[: self._undone or 0], len(rest) - len(self._records)
        records = dict(zip(self._records, rest[end:], strict=True))
        return Outcome(integers, floats, loss, before, counts, rest[len(before) : end], records)


def make_chunk(
    program: Program, portion: Portion, body: StepBody, packing: Packing, loss: Any, undoes: bool, jit: bool
) -> Chunk:
    """Returns the compiled loop of steps with room for their records.

    XLA would wait for the check before every update and copy what it updates. Where a chunk is undone, every update is
    made, and if the last step turns out not to be finite, the host undoes the chunk and goes as far as was right.

    Args:
        program: the step.
        portion: what the batches are like.
        body: what was traced.
        packing: of the state that goes round.
        loss: the objective, to call inside a graph, if it needs no batch.
        undoes: whether the host undoes the chunk if it has to.
        jit: whether XLA compiles it.
    """
    integers, floats, rows, _ = program.step.structured_outputs
    guard = (Guard.ALWAYS if program.overflows else Guard.BY_SUM) if undoes else Guard.FINITE
    step, capacity, batch_of = program.step_under(guard, jit), program.capacity, portion.batch
    queue, recorded = None, program.records
    if batch_of is None:
        recorded = []
        parts = [*integers, floats, *rows.values()]
        queue = tf.queue.FIFOQueue(capacity, [part.dtype for part in parts], [part.shape for part in parts])

    def run(limit, seconds, integers, floats, feed):
        def proceed(header, integers, floats, counts, records):
            return (header.taken < limit) & (header.fired == 0) & ~header.exhausted

        def take(header, integers, floats, records, batch):
            integers, floats, row, verdict = step(seconds, integers, floats, batch)
            if queue:
                queue.enqueue([*integers, floats, *row.values()])
            place = tf.cast(header.taken, tf.int32)
            records = {name: records[name].write(place, row[name]) for name in records}
            fired = verdict.fired + tf.where(verdict.finite, 0, NOT_FINITE)
            header = Header(header.taken + 1, fired, tf.constant(False))
            return header, integers, floats, no_counts if undoes else verdict.counts, records

        def advance(header, integers, floats, counts, records):
            if batch_of:
                batch = batch_of(feed, tf.cast(header.taken, tf.int32))
                return take(header, integers, floats, records, batch)
            batch = feed.get_next_as_optional()
            ended = header._replace(exhausted=tf.constant(True))
            return tf.cond(
                batch.has_value(),
                lambda: take(header, integers, floats, records, batch.get_value()),
                lambda: (ended, integers, floats, counts, records),
            )

        no_counts = tf.zeros([0 if undoes else len(body.suspects)], tf.int64)
        records = {
            name: tf.TensorArray(rows[name].dtype, capacity, element_shape=rows[name].shape) for name in recorded
        }
        before = [variable.read_value() for variable in program.written] if undoes else []
        # The steps are counted in the type in which others count too, so that XLA makes these one counter.
        header = Header(tf.constant(0, tf.int64), tf.constant(0), tf.constant(False))
        start = header, packing.unpack(integers), floats, no_counts, records
        header, integers, floats, counts, records = tf.while_loop(proceed, advance, start, parallel_iterations=1)
        at_end, values = _conclude(header.fired, loss, body.variables)
        was = before if undoes else [counts]
        stacked = [records[name].stack() for name in recorded]
        return [packing.pack([*header, *integers]), floats, at_end, *was, *values, *stacked]

    limit, clock = tf.TensorSpec([], tf.int64), tf.TensorSpec([], tf.float64)
    specs = [tf.TensorSpec(part.shape, part.dtype) for part in packing.initial]
    feed: Any = tf.nest.map_structure(_spec, portion.feed) if batch_of else tf.data.IteratorSpec(portion.spec)
    compiled = tf.function(run, autograph=False, jit_compile=jit)
    function = compiled.get_concrete_function(limit, clock, *specs, feed)
    return Chunk(function, len(program.written) if undoes else None, recorded, queue)


def _conclude(fired: Any, loss: Any, variables: Sequence[Any]) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Ends a chunk: returns the loss if the run ends there, and the values of the variables if they are small."""
    unknown = tf.constant(np.nan, tf.float64)
    if not loss:
        return unknown, []
    variables = [tf_variable(variable) for variable in variables]
    if sum(variable.shape.num_elements() for variable in variables) > WORTH_HANDING_OVER:
        variables = []

    def read() -> list[tf.Tensor]:  # in a branch, since outside of one XLA may give values of before the loop
        return [variable.read_value() for variable in variables]

    ends = (fired != 0) & (fired < NOT_FINITE)
    return tf.cond(ends, lambda: (loss(), read()), lambda: (unknown, read()))


def _has_one_shape(spec: Any) -> bool:
    """Returns whether tensors of a spec differ in nothing but the number of samples."""
    return isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None and spec.shape[1:].is_fully_defined()


def _spec(leaf: Any) -> Any:
    if leaf is None:
        return None
    return tf.type_spec_from_value(leaf) if not isinstance(leaf, tf.Tensor) else tf.TensorSpec(leaf.shape, leaf.dtype)


@functools.lru_cache(maxsize=64)
def constant(value: float, dtype: tf.DType) -> tf.Tensor:
    """Returns a scalar tensor, the same one for the same number."""
    return tf.constant(value, dtype)
