"""Drivers: how steps are executed. One step body runs eagerly, as a graph, or in XLA-compiled chunks."""

from __future__ import annotations

import functools
import logging
import textwrap
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import tree

from tapekit._batches import NO_DATA, Portion, Stream
from tapekit._body import State, StepBody
from tapekit._nonfinite import Guard
from tapekit._objective import read_variables, used_variables, watched_variables
from tapekit._packing import Packing, number
from tapekit._tensors import tf_variable, to_array
from tapekit._xla import DRAWING, against_xla, op_types, written
from tapekit.steps import RAISING

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
        return max(1, min(int(self.TARGET / self._seconds_a_step), 16 * self._last))

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

    def __init__(self, body: StepBody, longest: int) -> None:
        self.body = body
        self.traces = 0
        self.kept_alive: Any = None
        self.traced_loss: Any = None
        """The objective, traced, if it needs no batch and is compiled."""
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
        culprits = _culprits(self.body, verdict.counts.numpy())
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


def _culprits(body: StepBody, counts: np.ndarray) -> dict[str, str]:
    """Returns how many entries of which gradients are not finite."""
    pairs = zip(body.suspects, counts.tolist(), strict=True)
    return {name: f"{count} of {size}" for (name, size), count in pairs if count}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no value" if shape is None else f"shape {shape}"


class _Header(NamedTuple):
    """What a compiled chunk says of itself, beside the state and the records."""

    taken: Any
    fired: Any
    """Which criteria want to stop, a bit each, and `_NOT_FINITE`: one number, since each is a kernel to XLA."""
    exhausted: Any


class _Program:
    """A step traced for batches of one shape, and the compiled loops around it."""

    def __init__(self, step: Any, portion: Portion, strict: bool) -> None:
        self.step = step
        self.stacks = portion.batch is None and all(
            strict or _has_one_shape(spec) for spec in tree.flatten(portion.spec)
        )
        """Whether XLA may compile it for a stream, whose batches are stacked for that: not where each had its shape."""
        self.shape: Any = None
        """What the first of them was like."""
        self.chunks: dict[Any, _Chunk] = {}
        self.capacity = 1
        self.jit = False
        self.written = written(step)
        """The variables that it changes."""
        self.draws = bool(op_types(step) & DRAWING)
        """Whether it draws random numbers of which nobody could draw the same again."""
        rows = step.structured_outputs[2]
        self.records = list(rows)
        """The names of what a step records."""
        self.row_bytes = max(1, sum(row.dtype.size * row.shape.num_elements() for row in rows.values()))
        """The memory that this takes."""
        self.refused: dict[Any, Any] = {}
        """The step made without an update, traced for each kind of chunk in which one has not been finite."""
        self.overflows = False
        """Whether finite gradients have had a sum that is not, so that each entry must be looked at."""


class _Outcome(NamedTuple):
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


class _Chunk:
    """A compiled loop of steps with room for their records.

    Args:
        function: the loop, which returns the parts of an `_Outcome` in one list.
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

    def __call__(self, limit: int, *given: Any) -> _Outcome:
        """Takes up to `limit` steps, given the clock, the state and the feed."""
        integers, floats, loss, *rest = self._call(_constant(limit, tf.int64), *given, *self._captured)
        counts = rest.pop(0) if self._undone is None else None
        before, end = rest[: self._undone or 0], len(rest) - len(self._records)
        records = dict(zip(self._records, rest[end:], strict=True))
        return _Outcome(integers, floats, loss, before, counts, rest[len(before) : end], records)


class CompiledDriver(Driver):
    """Runs chunks of steps in one `tf.while_loop`, as a graph or compiled by XLA.

    The user's code is traced once for each shape of batches, as one step; loops with room for more or fewer
    records are made around that trace.

    Args:
        body: the step.
        longest: the largest number of steps that a chunk may have.
        loss: the objective, traced; `None` if it needs a batch.
        jit_compile: True, False or "auto": XLA where it compiles without a change of meaning.
    """

    LEAST, MOST, MOST_IN_GRAPH = 1 << 8, 1 << 17, 1 << 12
    """The rows that a chunk has room for; a multiple of the least, since each number is compiled apart."""
    BYTES = 1 << 24
    """The memory that the records of a chunk may take."""
    WORTH_HANDING_OVER = 1 << 14
    """The numbers that the variables may have for a chunk to hand their values over, so that nobody need read them."""
    WORTH_A_TRIAL = 2e-3
    """Seconds that a step of a model takes under XLA at least for a graph to be tried beside it."""

    def __init__(self, body: StepBody, longest: int, loss: Any, jit_compile: bool | str) -> None:
        super().__init__(body, longest)
        self.traced_loss = loss
        self._strict = jit_compile is True
        self._jit = bool(jit_compile)
        self._tries = not self._strict
        self._packing = Packing(body.initial, header=len(_Header._fields))
        self._programs: dict[Any, _Program] = {}
        self._last_read: tuple[Any, Any] = (None, None)

    def prepare(self, period: int, portion: Portion = NO_DATA) -> None:
        """Traces the step if it is not yet for batches of this shape."""
        key = portion.key
        if key not in self._programs:
            clock, guard = tf.TensorSpec([], tf.float64), tf.TensorSpec([], tf.int32)
            trace = tf.function(self._trace, autograph=False)
            step = trace.get_concrete_function(clock, *self._packing.specs, portion.spec, guard)
            self._programs[key] = _Program(step, portion, self._strict)
            self._choose(op_types(step))
            self._set(self._programs[key], period, portion)
            if self._programs[key].jit and self._tries and portion.key and portion.batch:
                self._try_both(self._programs[key], portion)
        self._set(self._programs[key], period, portion)

    def _set(self, program: _Program, period: int, portion: Portion) -> None:
        self._period = min(period, self._longest)
        is_worth_it = self._strict or portion.length != 1  # a lone batch is not worth a compilation
        program.jit = self._jit and is_worth_it and (program.stacks or portion.batch is not None)
        program.capacity = self._capacity(program)

    @property
    def steps(self) -> list[Any]:
        """The traced steps, one for each shape of batches."""
        return [program.step for program in self._programs.values()]

    @property
    def written(self) -> list[tf.Variable]:
        """What the steps that are traced change."""
        return [variable for program in self._programs.values() for variable in program.written]

    @property
    def jit(self) -> bool:
        """Whether XLA compiles the steps, as far as that is known; setting it decides."""
        return self._jit

    @jit.setter
    def jit(self, value: bool) -> None:
        self._jit, self._tries = value, False

    def _trace(self, seconds: Any, integers: Any, floats: Any, batch: Any, guard: Any) -> Any:
        self.traces += 1
        state, row, verdict = self.body(self._packing.merge(integers, floats), seconds, batch, guard)
        return *self._packing.split(state), row, verdict

    def _choose(self, types: set[str]) -> None:
        """Leaves XLA where it would be wrong or slow, and long chunks where an error would lose their records."""
        if types & RAISING:
            self._longest = 1  # so that an error in a later step loses nothing of an earlier one
        if self._jit and not self._strict and (reason := against_xla(types, self.body.objective.needs_batch)):
            self._fall_back(*reason)

    def _try_both(self, program: _Program, portion: Portion) -> None:
        """Leaves XLA where a step takes longer than in a graph; the variables are put back afterwards."""
        before = [(variable, tf.identity(variable)) for variable in program.step.variables]
        seconds = self._seconds(program, portion)
        if program.jit and seconds > self.WORTH_A_TRIAL:
            program.jit = False
            in_graph = self._seconds(program, portion)
            program.jit = True
            if in_graph < 0.9 * seconds:
                self._fall_back(
                    f"a step took {seconds * 1e3:.1f} ms, and {in_graph * 1e3:.1f} ms in a graph", logging.INFO
                )
        for variable, value in before:
            variable.assign(value)
        self._pace = Pace()

    def _seconds(self, program: _Program, portion: Portion) -> float:
        """Returns how long a step takes once it is compiled, without the call of a chunk, which long ones share."""
        more = min(3, portion.length or 3)
        times: dict[int, list[float]] = {1: [], more: []}
        for _ in range(4):
            for limit, found in times.items():
                started = time.perf_counter()
                self.advance(self.begin(), limit, 0.0, portion)
                found.append(time.perf_counter() - started)
        return max(0.0, min(times[more][1:]) - min(times[1][1:])) / (more - 1)

    def _fall_back(self, why: str, level: int = logging.WARNING) -> None:
        self._jit = False
        logger.log(level, "jit_compile='auto' runs this objective as a graph, without XLA: %s.", why)

    def _capacity(self, program: _Program) -> int:
        """The number of rows that a chunk has room for: as many as it can have steps, within bounds."""
        most = self.MOST_IN_GRAPH if not program.jit else Stream.MOST if program.stacks else self.MOST
        rows = min(self._period, most)
        rows += -rows % self.LEAST
        return max(1, min(rows, self.BYTES // program.row_bytes))

    def _chunk(self, program: _Program, portion: Portion) -> _Chunk:
        """Returns the compiled loop of steps with room for their records."""
        step, capacity, batch_of = program.step, program.capacity, portion.batch
        integers, floats, rows, _ = step.structured_outputs
        packing = self._packing

        # XLA would wait for the check before every update and copy what it updates. There every update is made, and if
        # the last step turns out not to be finite, the host undoes the chunk and goes as far as was right.
        undoes = self._undoes(program, portion)
        chunk_guard = (Guard.ALWAYS if program.overflows else Guard.BY_SUM) if undoes else Guard.FINITE
        queue, recorded = None, program.records
        if batch_of is None:
            recorded = []
            parts = [*integers, floats, *rows.values()]
            queue = tf.queue.FIFOQueue(capacity, [part.dtype for part in parts], [part.shape for part in parts])

        def run(limit, seconds, integers, floats, feed):
            def proceed(header, integers, floats, counts, records):
                return (header.taken < limit) & (header.fired == 0) & ~header.exhausted

            def take(header, integers, floats, records, batch):
                guard = tf.constant(chunk_guard, tf.int32)  # here, so that XLA folds it
                integers, floats, row, verdict = step(seconds, integers, floats, batch, guard)
                if queue:
                    queue.enqueue([*integers, floats, *row.values()])
                place = tf.cast(header.taken, tf.int32)
                records = {name: records[name].write(place, row[name]) for name in records}
                fired = verdict.fired + tf.where(verdict.finite, 0, _NOT_FINITE)
                header = _Header(header.taken + 1, fired, tf.constant(False))
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

            no_counts = tf.zeros([0 if undoes else len(self.body.suspects)], tf.int64)
            records = {
                name: tf.TensorArray(rows[name].dtype, capacity, element_shape=rows[name].shape) for name in recorded
            }
            before = [variable.read_value() for variable in program.written] if undoes else []
            # The steps are counted in the type in which others count too, so that XLA makes these one counter.
            header = _Header(tf.constant(0, tf.int64), tf.constant(0), tf.constant(False))
            start = header, packing.unpack(integers), floats, no_counts, records
            header, integers, floats, counts, records = tf.while_loop(proceed, advance, start, parallel_iterations=1)
            loss, values = self._conclude(header.fired)
            was = before if undoes else [counts]
            stacked = [records[name].stack() for name in recorded]
            return [packing.pack([*header, *integers]), floats, loss, *was, *values, *stacked]

        limit, clock = tf.TensorSpec([], tf.int64), tf.TensorSpec([], tf.float64)
        specs = [tf.TensorSpec(part.shape, part.dtype) for part in self.begin()]
        feed: Any = tf.nest.map_structure(_spec, portion.feed) if batch_of else tf.data.IteratorSpec(portion.spec)
        compiled = tf.function(run, autograph=False, jit_compile=self._compiles(program, portion))
        function = compiled.get_concrete_function(limit, clock, *specs, feed)
        return _Chunk(function, len(program.written) if undoes else None, recorded, queue)

    def _conclude(self, fired: Any) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Ends a chunk: returns the loss if the run ends there, and the values of the variables if they are small."""
        unknown, loss = tf.constant(np.nan, tf.float64), self.traced_loss
        if not loss:
            return unknown, []
        variables = [tf_variable(variable) for variable in self.body.variables]
        if sum(variable.shape.num_elements() for variable in variables) > self.WORTH_HANDING_OVER:
            variables = []

        def read() -> list[tf.Tensor]:  # in a branch, since outside of one XLA may give values of before the loop
            return [variable.read_value() for variable in variables]

        ends = (fired != 0) & (fired < _NOT_FINITE)
        return tf.cond(ends, lambda: (loss(), read()), lambda: (unknown, read()))

    def begin(self, state: State | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the state, packed."""
        return self._packing.initial if state is None else self._packing.pack_numbers(state)

    def read(self, state: tuple[tf.Tensor, tf.Tensor]) -> State:
        """Returns the state as Python numbers and NumPy arrays."""
        if self._last_read[0] is not state:
            self._last_read = state, self._packing.read(to_array(state[0]), to_array(state[1]))
        return self._last_read[1]

    def advance(self, state: tuple[tf.Tensor, tf.Tensor], limit: int, seconds: float, portion=NO_DATA) -> Advance:
        """Takes the steps in one call."""
        program, stream = self._programs[portion.key], portion.stream
        if stream is None or not (program.jit or stream.waiting):
            return self._advance(program, state, limit, seconds, portion)
        began = time.perf_counter()
        try:
            stacked = stream.stacked(limit, self._period)
        except (StopIteration, tf.errors.OpError) as end:
            error = None if isinstance(end, StopIteration) else end
            evaluations = self.read(state).evaluations
            return Advance(state, 0, 0, evaluations, {}, None, exhausted=error is None, error=error)
        if program.shape is None and program.jit:
            program.shape = stacked.size
            if self._tries:
                self._try_both(program, stacked._replace(length=None))
                self._set(program, self._period, portion)
                began = time.perf_counter()
        with stream.reading(portion.ahead if program.jit else 0):
            chunk = self._advance(program, state, min(limit, stacked.length or 1), seconds, stacked, began)
        stream.drop(chunk.taken)
        return chunk

    def _advance(self, program, state, limit, seconds, portion: Portion, began: float | None = None) -> Advance:
        """Takes the steps with batches that are at hand, for which it `began` to wait, or that a graph reads."""
        feed = [leaf for leaf in tf.nest.flatten(portion.feed, expand_composites=True) if leaf is not None]
        undoes = self._undoes(program, portion)
        specs = [(part.shape, part.dtype) for part in feed]
        jit = self._compiles(program, portion)
        key = jit, undoes, program.overflows, program.capacity, portion.size, *specs
        fresh = key not in program.chunks
        if fresh:
            program.chunks[key] = self._chunk(program, portion)
        chunk = program.chunks[key]
        limit = min(limit, program.capacity)
        clock = _constant(seconds if "seconds" in self.body.needs else 0.0, tf.float64)
        started = time.perf_counter()
        try:
            outcome = chunk(limit, clock, *state, *feed)
        except tf.errors.OpError as error:
            if chunk.queue and (chunk.queue.size() or _FROM_DATA in str(error)):
                return self._until(error, state, program, chunk.queue)
            if not (fresh and jit):
                raise
            why = _cause(error)
            if self._strict:
                raise ValueError(
                    f"`jit_compile` must be False or 'auto' here, received True: XLA cannot compile this step ({why})."
                ) from error
            self._fall_back(why)
            self.prepare(self._period, portion)
            return self.advance(state, limit, seconds, portion)
        taken, fired, exhausted, _, evaluations = to_array(outcome.integers)[:5].tolist()
        finite, fired = fired < _NOT_FINITE, fired % _NOT_FINITE
        culprits, records = {}, outcome.records
        if not finite:
            counts = outcome.counts
            if undoes:
                for variable, value in zip(program.written, outcome.before, strict=True):
                    variable.assign(value)
                before_it = chunk(taken - 1, clock, *state, *feed)[:2]
                finite, counts = self._refuse(program, key, portion, before_it, clock, taken - 1)
                if finite and not program.overflows:
                    return self._look_closer(program, state, before_it, records, taken - 1, limit, seconds, portion)
            culprits = _culprits(self.body, to_array(counts))
        elif not fresh and taken:
            self._pace.observe(taken, time.perf_counter() - (began or started))
            if self._pace.call_matters:  # a thousand variables take longer to hand over than to update
                started = time.perf_counter()
                chunk(0, clock, *outcome[:2], *feed)
                self._pace.call = time.perf_counter() - started
        if chunk.queue and taken:
            records = dict(zip(program.records, chunk.queue.dequeue_many(taken)[-len(program.records) :], strict=True))
        columns = {name: to_array(record) for name, record in records.items()}
        loss = to_array(outcome.loss).item() if fired and finite and self.traced_loss else None
        values = outcome.values if finite else ()  # which the host may have changed since
        return Advance(outcome[:2], taken, fired, evaluations, columns, loss, values, bool(exhausted), finite, culprits)

    def _until(self, error: Exception, state: Any, program: _Program, queue: Any) -> Advance:
        """Returns the steps that were taken before the data has raised."""
        taken = int(queue.size())
        columns: dict[str, np.ndarray] = {}
        if taken:
            parts = [to_array(part) for part in queue.dequeue_many(taken)]
            columns = dict(zip(program.records, parts[-len(program.records) :], strict=True))
            *integers, floats = [part[-1] for part in parts[: -len(program.records)]]
            state = self._packing.pack([*_Header(0, 0, False), *integers]), tf.constant(floats)
        return Advance(state, taken, 0, self.read(state).evaluations, columns, None, error=error)

    def _compiles(self, program: _Program, portion: Portion) -> bool:
        """Returns whether XLA compiles a chunk: not for the few batches of a stream that are unlike the first."""
        return program.jit and (self._strict or program.shape in (None, portion.size))

    def _undoes(self, program: _Program, portion: Portion) -> bool:
        """Returns whether a chunk is undone, rather than each step look whether it may update anything."""
        return self.body.guards and self._compiles(program, portion) and not program.draws

    def _look_closer(self, program, state, before_it, records, taken, limit, seconds, portion: Portion) -> Advance:
        """Goes on where finite gradients had a sum that is not, and looks at each entry from there on."""
        program.overflows = True
        if not taken:
            return self.advance(state, limit, seconds, portion)
        columns = {name: to_array(record) for name, record in records.items()}
        return Advance(before_it, taken, 0, self.read(before_it).evaluations, columns, None)

    def _refuse(self, program: _Program, key: Any, portion: Portion, state: Any, clock: Any, n: int) -> Any:
        """Makes the step with the n-th batch without an update, and returns whether it was finite, and what was not."""
        if key not in program.refused:
            batch_of: Any = portion.batch

            def refuse(integers, floats, seconds, feed, n):
                integers, guard = self._packing.unpack(integers), tf.constant(Guard.NEVER, tf.int32)
                verdict = program.step(seconds, integers, floats, batch_of(feed, n), guard)[3]
                return verdict.finite, verdict.counts

            program.refused[key] = tf.function(refuse, autograph=False)
        return program.refused[key](*state, clock, portion.feed, tf.constant(n))

    def evaluate(self) -> float:
        """Runs the traced objective."""
        return float(self.traced_loss())


_FROM_DATA = "IteratorGetNext"
_NOT_FINITE = 1 << 30
"""The bit that says that the last step was not finite; criteria have lower ones."""


def _cause(error: tf.errors.OpError) -> str:
    """Returns the line of an error of TensorFlow that says what is wrong, which others come before."""
    lines = [line.strip().rstrip(".") for line in str(error.message).splitlines()]
    telling = (line for line in lines if line and not line.startswith(("Detected at node", "<")) and line[-1] != ":")
    return textwrap.shorten(next(telling, lines[0]), 300, placeholder=" ...")


def _has_one_shape(spec: Any) -> bool:
    """Returns whether tensors of a spec differ in nothing but the number of samples."""
    return isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None and spec.shape[1:].is_fully_defined()


def _spec(leaf: Any) -> Any:
    if leaf is None:
        return None
    return tf.type_spec_from_value(leaf) if not isinstance(leaf, tf.Tensor) else tf.TensorSpec(leaf.shape, leaf.dtype)


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: tf.DType) -> tf.Tensor:
    return tf.constant(value, dtype)


def make_driver(body: StepBody, eager: bool, jit_compile: bool | str, longest: int) -> Driver:
    """Returns the driver of a run, after a look at the objective that changes no variable.

    With no variables given, those that the objective reads are used. The compiled drivers trace the
    objective and its gradient, so that an objective that cannot be minimized is refused here; the eager one
    finds that at its first step, before it applies anything.
    """
    if body.objective.needs_batch:
        body.updater.check(body.variables)
        if body.variables and not eager:  # whose first batch may make more variables
            body.updater.build(body.updater.native(body.variables))
        body.build()
        return EagerDriver(body, longest) if eager else CompiledDriver(body, longest, None, jit_compile)
    if eager:
        if not body.variables:
            body.variables = read_variables(body.objective)
        body.updater.check(body.variables)
        body.build()
        return EagerDriver(body, longest)

    def evaluate() -> tuple[Any, Any, Any]:
        with tf.GradientTape(watch_accessed_variables=not body.variables) as tape:
            tape.watch([tf_variable(variable) for variable in body.variables])
            loss, extras = body.objective()
        body.variables = body.variables or watched_variables(tape)
        gradients = tape.gradient(loss, [tf_variable(variable) for variable in body.variables])
        if "gradients" in body.step.provides:
            body.variables = used_variables(body.variables, gradients, body.allow_unused)
        return loss, extras, [gradient for gradient in gradients if gradient is not None]

    def loss() -> tf.Tensor:
        return tf.cast(evaluation()[0], tf.float64)

    evaluation: Any = tf.function(evaluate, autograph=False).get_concrete_function()
    traced = tf.function(loss, autograph=False).get_concrete_function()
    body.updater.check(body.variables)
    body.updater.build(body.updater.native(body.variables))
    body.build()
    if body.is_plain and not body.updater.scales:
        body.evaluation = evaluation
    return CompiledDriver(body, longest, traced, jit_compile)
