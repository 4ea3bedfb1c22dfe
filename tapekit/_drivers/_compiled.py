"""The driver that runs chunks of steps as a graph or compiled by XLA."""

from __future__ import annotations

import functools
import logging
import math
import textwrap
import time
from typing import Any

import numpy as np
import tensorflow as tf

from tapekit._batches import NO_DATA, Portion, Stream
from tapekit._body import State, StepBody
from tapekit._convolutions import with_fast_gradients
from tapekit._drivers._base import Advance, Driver, Pace, culprits_of, logger
from tapekit._drivers._chunk import NOT_FINITE, Header, Program, constant, make_chunk
from tapekit._nonfinite import Guard
from tapekit._packing import Packing
from tapekit._tensors import to_array
from tapekit._xla import against_xla, on_cpu, op_types
from tapekit.steps import RAISING


class CompiledDriver(Driver):
    """Runs chunks of steps in one `tf.while_loop`, as a graph or compiled by XLA.

    The user's code is traced once for each shape of batches, as one step; loops with room for more or fewer
    records are made around that trace.

    Args:
        body: the step.
        longest: the largest number of steps that a chunk may have.
        loss: the objective, to call inside a graph; `None` if it needs a batch.
        jit_compile: True, False or "auto": XLA where it compiles without a change of meaning.
    """

    LEAST, MOST, MOST_IN_GRAPH = 1 << 8, 1 << 17, 1 << 12
    """The rows that a chunk has room for; a multiple of the least, since each number is compiled apart."""
    BYTES = 1 << 24
    """The memory that the records of a chunk may take."""
    WORTH_A_TRIAL = 2e-3
    """Seconds that a step of a model takes under XLA at least for a graph to be tried beside it."""
    PAYS = 0.5
    """The share of its first call, which compiles it, that all steps must be expected to take: a graph takes that."""
    LONG = 0.1
    """Seconds of steps that tell how long one takes."""

    def __init__(self, body: StepBody, longest: int, loss: Any, jit_compile: bool | str) -> None:
        super().__init__(body, longest)
        self.traces = int(body.evaluation is not None)  # which has all of the user's code that a step runs
        self._loss = loss
        self._strict = jit_compile is True
        self._jit = bool(jit_compile)
        self._tries = not self._strict
        self._packing = Packing(body.initial, header=len(Header._fields))
        self._programs: dict[Any, Program] = {}
        self._last_read: tuple[Any, Any] = (None, None)

    def prepare(self, period: int, portion: Portion = NO_DATA) -> None:
        """Traces the step if it is not yet for batches of this shape."""
        if portion.key not in self._programs:
            trace = functools.partial(self._trace, portion.spec)
            guard = None
            if self.body.evaluation:  # no code of the user runs in the step, so that it may be traced again
                guard = Guard.BY_SUM if self._jit and self.body.guards else Guard.FINITE
            program = self._programs[portion.key] = Program(trace, guard, portion, self._strict)
            self._choose(op_types(program.for_xla))
        program = self._programs[portion.key]
        self._set(program, period, portion)
        if portion.key and portion.batch and self._try_both(program, portion):
            self._set(program, period, portion)

    def _set(self, program: Program, period: int, portion: Portion) -> None:
        self._period = min(period, self._longest)
        is_worth_it = self._strict or portion.length != 1  # a lone batch is not worth a compilation
        program.jit = self._jit and is_worth_it and (program.stacks or portion.batch is not None)
        program.capacity = self._capacity(program)

    @property
    def steps(self) -> list[Any]:
        """The traced steps, one for each shape of batches."""
        return [program.step for program in self._programs.values()]

    @functools.cached_property
    def traced_loss(self) -> Any:
        """The objective, traced, made when it is asked for alone; `None` if it needs a batch."""
        return self._loss and tf.function(self._loss, autograph=False).get_concrete_function()

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

    def _trace(self, batch: Any, guard: Guard | None) -> tuple[Any, Any]:
        """Traces the step under a guard, or as a function of one; see `Program`."""

        def take(seconds: Any, integers: Any, floats: Any, batch: Any, *guards: Any) -> Any:
            (under,) = guards or (guard,)
            state, row, verdict = self.body(self._packing.merge(integers, floats), seconds, batch, under)
            return *self._packing.split(state), row, verdict

        guards = []
        if guard is None:
            self.traces += 1
            guards = [tf.TensorSpec([], tf.int32)]
        clock, trace = tf.TensorSpec([], tf.float64), tf.function(take, autograph=False)
        step = trace.get_concrete_function(clock, *self._packing.specs, batch, *guards)
        return step, with_fast_gradients(step) if self._jit and on_cpu() else step

    def _choose(self, types: set[str]) -> None:
        """Leaves XLA where it would be wrong or slow, and long chunks where an error would lose their records."""
        if types & RAISING:
            self._longest = 1  # so that an error in a later step loses nothing of an earlier one
        if self._jit and not self._strict and (reason := against_xla(types, self.body.objective.needs_batch)):
            self._fall_back(*reason)

    def _try_both(self, program: Program, portion: Portion) -> bool:
        """Leaves XLA where a step takes longer than in a graph; the variables are put back afterwards.

        Returns:
            Whether any steps were taken to find out.
        """
        if not (self._tries and program.jit) or (program.costs and not self._may_gain(program)):
            return False
        before = [(variable, tf.identity(variable)) for variable in program.step.variables]
        try:
            program.costs = program.costs or self._costs(program, portion)
            if program.jit and self._may_gain(program):
                program.in_graph = self._seconds_in_graph(program, portion)
                here, there = program.costs[1], program.in_graph
                if there < 0.9 * here:  # unless others had the processor while XLA was looked at
                    here = min(here, self._costs(program, portion)[1])
                if there < 0.9 * here:
                    why = f"a step took {here * 1e3:.1f} ms, and {there * 1e3:.1f} ms in a graph"
                    self._fall_back(why, logging.INFO)
        finally:
            for variable, value in before:
                variable.assign(value)
        self._pace = Pace()
        return True

    def _seconds_in_graph(self, program: Program, portion: Portion) -> float:
        """Returns how long a step takes in a graph; infinity if TensorFlow cannot run it there."""
        program.jit = False
        try:
            return self._costs(program, portion)[1]
        except tf.errors.OpError as error:  # such as for dilated gradients on a CPU, which XLA has
            logger.info("XLA runs this objective, since a graph cannot: %s.", _cause(error))
            return math.inf
        finally:
            program.jit = True

    def _may_gain(self, program: Program) -> bool:
        """Returns whether a graph might save as much of what the steps take under XLA as it takes to make."""
        compilation, seconds = program.costs or (0.0, 0.0)
        is_long = self.expected * seconds > self.PAYS * compilation
        return seconds > self.WORTH_A_TRIAL and is_long and program.in_graph is None

    def _costs(self, program: Program, portion: Portion) -> tuple[float, float]:
        """Returns how long the first call takes, and then a step without the call, which those of a chunk share."""

        def call(steps: int) -> float:
            started = time.perf_counter()
            self.advance(self.begin(), steps, 0.0, portion)
            return time.perf_counter() - started

        first, alone, more = call(1), call(1), min(3, portion.length or 3)
        if alone > self.LONG:
            return first, alone
        pairs: list[tuple[float, float]] = []
        while not pairs or (len(pairs) < 3 and sum(map(sum, pairs)) < self.LONG):
            pairs.append((call(1), call(more)))
        alone, together = (min(times) for times in zip(*pairs, strict=True))
        return first, max(0.0, together - alone) / (more - 1)

    def _fall_back(self, why: str, level: int = logging.WARNING) -> None:
        self._jit = False
        logger.log(level, "jit_compile='auto' runs this objective as a graph, without XLA: %s.", why)

    def _capacity(self, program: Program) -> int:
        """The number of rows that a chunk has room for: as many as it can have steps, within bounds."""
        most = self.MOST_IN_GRAPH if not program.jit else Stream.MOST if program.stacks else self.MOST
        rows = min(self._period, most)
        rows += -rows % self.LEAST
        return max(1, min(rows, self.BYTES // program.row_bytes))

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
        if program.jit and program.shape in (None, stacked.size):
            program.shape = stacked.size
            if self._try_both(program, stacked._replace(length=None)):
                self._set(program, self._period, portion)
                began = time.perf_counter()
        with stream.reading(portion.ahead if program.jit else 0):
            chunk = self._advance(program, state, min(limit, stacked.length or 1), seconds, stacked, began)
        stream.drop(chunk.taken)
        return chunk

    def _advance(self, program, state, limit, seconds, portion: Portion, began: float | None = None) -> Advance:
        """Takes the steps with batches that are at hand, for which it `began` to wait, or that a graph reads."""
        given = portion.stream.iterator if portion.stream else portion.feed
        feed = [leaf for leaf in tf.nest.flatten(given, expand_composites=True) if leaf is not None]
        undoes = self._undoes(program, portion)
        specs = [(part.shape, part.dtype) for part in feed]
        jit = self._compiles(program, portion)
        key = jit, undoes, program.overflows, program.capacity, portion.size, *specs
        fresh = key not in program.chunks
        if fresh:
            program.chunks[key] = make_chunk(program, portion, self.body, self._packing, self._loss, undoes, jit)
        chunk = program.chunks[key]
        limit = min(limit, program.capacity)
        clock = constant(seconds if "seconds" in self.body.needs else 0.0, tf.float64)
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
        finite, fired = fired < NOT_FINITE, fired % NOT_FINITE
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
            culprits = culprits_of(self.body, to_array(counts))
        elif not fresh and taken:
            self._pace.observe(taken, time.perf_counter() - (began or started))
            if self._pace.call_matters:  # a thousand variables take longer to hand over than to update
                started = time.perf_counter()
                chunk(0, clock, *outcome[:2], *feed)
                self._pace.call = time.perf_counter() - started
        if chunk.queue and taken:
            records = dict(zip(program.records, chunk.queue.dequeue_many(taken)[-len(program.records) :], strict=True))
        columns = {name: to_array(record) for name, record in records.items()}
        loss = to_array(outcome.loss).item() if fired and finite and self._loss else None
        values = outcome.values if finite else ()  # which the host may have changed since
        return Advance(outcome[:2], taken, fired, evaluations, columns, loss, values, bool(exhausted), finite, culprits)

    def _until(self, error: Exception, state: Any, program: Program, queue: Any) -> Advance:
        """Returns the steps that were taken before the data has raised."""
        taken = int(queue.size())
        columns: dict[str, np.ndarray] = {}
        if taken:
            parts = [to_array(part) for part in queue.dequeue_many(taken)]
            columns = dict(zip(program.records, parts[-len(program.records) :], strict=True))
            *integers, floats = [part[-1] for part in parts[: -len(program.records)]]
            state = self._packing.pack([*Header(0, 0, False), *integers]), tf.constant(floats)
        return Advance(state, taken, 0, self.read(state).evaluations, columns, None, error=error)

    def _compiles(self, program: Program, portion: Portion) -> bool:
        """Returns whether XLA compiles a chunk: not for the few batches of a stream that are unlike the first."""
        return program.jit and (self._strict or program.shape in (None, portion.size))

    def _undoes(self, program: Program, portion: Portion) -> bool:
        """Returns whether a chunk is undone, rather than each step look whether it may update anything."""
        return self.body.guards and self._compiles(program, portion) and not program.draws

    def _look_closer(self, program, state, before_it, records, taken, limit, seconds, portion: Portion) -> Advance:
        """Goes on where finite gradients had a sum that is not, and looks at each entry from there on."""
        program.overflows = True
        if not taken:
            return self.advance(state, limit, seconds, portion)
        columns = {name: to_array(record) for name, record in records.items()}
        return Advance(before_it, taken, 0, self.read(before_it).evaluations, columns, None)

    def _refuse(self, program: Program, key: Any, portion: Portion, state: Any, clock: Any, n: int) -> Any:
        """Makes the step with the n-th batch without an update, and returns whether it was finite, and what was not."""
        if key not in program.refused:
            batch_of: Any = portion.batch
            step = program.step_under(Guard.NEVER, jit=True)

            def refuse(integers, floats, seconds, feed, n):
                verdict = step(seconds, self._packing.unpack(integers), floats, batch_of(feed, n))[3]
                return verdict.finite, verdict.counts

            program.refused[key] = tf.function(refuse, autograph=False)
        return program.refused[key](*state, clock, portion.feed, tf.constant(n))

    def evaluate(self) -> float:
        """Runs the traced objective."""
        return float(self.traced_loss())


_FROM_DATA = "IteratorGetNext"


def _cause(error: tf.errors.OpError) -> str:
    """Returns the line of an error of TensorFlow that says what is wrong, which others come before."""
    lines = [line.strip().rstrip(".") for line in str(error.message).splitlines()]
    others = "Detected at node", "<", 'File "'
    telling = (line for line in lines if line and not line.startswith(others) and line[-1] != ":")
    return textwrap.shorten(next(telling, lines[0]), 300, placeholder=" ...")
