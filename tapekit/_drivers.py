"""Drivers: how steps are executed. One step body runs eagerly, as a graph, or in XLA-compiled chunks."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tapekit._describe import shape_and_dtype
from tapekit._objective import Objective, read_variables, tf_variable, used_variables
from tapekit._optimizers import Updater
from tapekit.steps import Problem, Step
from tapekit.stopping import Criterion

logger = logging.getLogger("tapekit")

# Ops that XLA compiles to something else: it drops checks and ignores the seeds of stateful random ops.
_CHANGED_BY_XLA = {
    *("Assert", "CheckNumerics", "CheckNumericsV2"),
    *("RandomUniform", "RandomUniformInt", "RandomStandardNormal", "TruncatedNormal", "RandomShuffle", "Multinomial"),
}
_RECORDED = ("gradient_norm", "gradient_norm_inf")


class State(NamedTuple):
    """What one step hands to the next, beside the variables themselves."""

    step: Any
    evaluations: Any
    criterion: Any


class Advance(NamedTuple):
    """What a chunk of steps gives: the state, how many steps were taken, whether to stop, the records."""

    state: State
    taken: int
    stop: bool
    columns: dict[str, np.ndarray]


class StepBody:
    """The one step that every driver runs: strategy, records, criterion."""

    def __init__(
        self,
        objective: Objective,
        updater: Updater,
        variables: list[Any],
        step: Step,
        criterion: Criterion,
        measures: Mapping[str, Callable[..., Any]],
        hooks: Sequence[Callable[..., Any]],
        allow_unused: bool,
    ) -> None:
        self.objective = objective
        self.updater = updater
        self.variables = variables
        self.step = step
        self.criterion = criterion
        self.allow_unused = allow_unused
        self._measures = {name: (call, bool(inspect.signature(call).parameters)) for name, call in measures.items()}
        self._hooks = hooks

    def initial(self) -> State:
        """Returns the state before the first step, as NumPy scalars."""
        return State(np.int64(0), np.int64(0), tf.nest.map_structure(np.asarray, self.criterion.init()))

    def __call__(self, state: State, seconds: Any) -> tuple[State, dict[str, Any], Any]:
        """Makes one step and returns the next state, the row to record and whether to stop."""
        needs = self.criterion.needs
        problem = Problem(self.objective, self.updater, self.variables, self._hooks, self.allow_unused)
        before = [tf.identity(tf_variable(v)) for v in self.variables] if "variables_change" in needs else []
        row = dict(self.step.take(problem))
        step = state.step + 1
        evaluations = state.evaluations + tf.cast(row.pop("evaluations", problem.evaluations), tf.int64)

        known = {"step": step, "evaluations": evaluations, "seconds": seconds}
        known |= self._gradient_logs(problem.gradients, needs)
        if before:
            known |= _movement(before, self.variables)
        row |= {name: known[name] for name in _RECORDED if name in known}
        row |= self._measured(row, problem.gradients)
        logs = {name: _criterion_scalar(value) for name, value in row.items() if value.shape.rank == 0}
        criterion, stop = self.criterion.update(state.criterion, {**logs, **known})
        criterion = tf.nest.map_structure(lambda old, new: tf.cast(new, old.dtype), state.criterion, criterion)
        return State(step, evaluations, criterion), row, tf.convert_to_tensor(stop)

    def _gradient_logs(self, gradients: list[Any] | None, needs: frozenset[str]) -> dict[str, Any]:
        logs = {}
        if "gradients_finite" in needs:
            check = gradients if gradients and not self.updater.scales else []
            logs["gradients_finite"] = _all_finite(check)
        if "gradient_norm" in needs:
            squares = [tf.reduce_sum(tf.square(tf.cast(_dense(g), tf.float64))) for g in gradients or ()]
            logs["gradient_norm"] = tf.sqrt(tf.add_n(squares))
        if "gradient_norm_inf" in needs:
            logs["gradient_norm_inf"] = _largest(_dense(g) for g in gradients or ())
        return logs

    def _measured(self, row: Mapping[str, Any], gradients: list[Any] | None) -> dict[str, Any]:
        measured = {}
        for name, (call, takes_gradients) in self._measures.items():
            if name in row:
                raise ValueError(f"`measures` must not use the name {name!r}, which the logs have already.")
            value = tf.convert_to_tensor(tf_variable(call(gradients) if takes_gradients else call()))
            if not value.shape.is_fully_defined():
                raise ValueError(
                    f"`measures` must give tensors of a fixed shape, received {name!r} of {shape_and_dtype(value)}."
                )
            measured[name] = value
        return measured


def _all_finite(gradients: Sequence[Any]) -> Any:
    finite = tf.constant(True)
    for gradient in gradients:
        values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        finite &= tf.reduce_all(tf.math.is_finite(values))
    return finite


def _dense(gradient: Any) -> Any:
    return tf.convert_to_tensor(gradient)  # sums the rows that tf.IndexedSlices name more than once


def _largest(tensors: Any) -> Any:
    return tf.reduce_max([tf.cast(tf.reduce_max(tf.abs(tensor)), tf.float64) for tensor in tensors])


def _movement(before: Sequence[Any], variables: Sequence[Any]) -> dict[str, Any]:
    after = [tf.identity(tf_variable(variable)) for variable in variables]
    change = _largest(new - old for new, old in zip(after, before, strict=True))
    return {"variables_change": change, "variables_scale": _largest(after)}


def _criterion_scalar(value: Any) -> Any:
    return tf.cast(value, tf.float64) if value.dtype.is_floating else value


class Pace:
    """Chooses chunk lengths that let the host be seen often enough, from the speed seen so far."""

    TARGET = 0.05
    """Seconds that a chunk should take."""

    def __init__(self) -> None:
        self._seconds_a_step = float("inf")
        self._last = 0

    def limit(self) -> int:
        """Returns how many steps the next chunk should have."""
        return max(1, min(int(self.TARGET / self._seconds_a_step), 16 * self._last))

    def observe(self, taken: int, seconds: float) -> None:
        """Learns from a chunk of `taken` steps that lasted `seconds`."""
        self._seconds_a_step = max(seconds, 1e-9) / taken
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
        self._longest = longest
        self._pace = Pace()

    def prepare(self, period: int) -> None:
        """Gets ready for a run in which somebody needs the host every `period` steps at the latest."""

    def limit(self) -> int:
        """Returns how many steps the next chunk should have if nobody needs the host before."""
        return min(self._pace.limit(), self._longest)

    def advance(self, state: State, limit: int, seconds: float) -> Advance:
        """Takes up to `limit` steps, and stops exactly where the criterion says.

        Args:
            state: the result of the advance before, or the initial state of the body.
            limit: the largest number of steps, at least 1.
            seconds: the time since the run began.
        """
        raise NotImplementedError

    def evaluate(self) -> float:
        """Returns the loss at the present variables."""
        raise NotImplementedError


class EagerDriver(Driver):
    """Runs every op from Python, so that a debugger or a print inside the objective works."""

    def advance(self, state: State, limit: int, seconds: float) -> Advance:
        """Takes the steps one by one."""
        started = time.perf_counter()
        clock = tf.constant(seconds, tf.float64)
        state = tf.nest.map_structure(tf.convert_to_tensor, state)
        rows: list[dict[str, np.ndarray]] = []
        stop = False
        while len(rows) < limit and not stop:
            state, row, stop = self.body(state, clock)
            rows.append({name: value.numpy() for name, value in row.items()})
        self._pace.observe(len(rows), time.perf_counter() - started)
        return Advance(state, len(rows), bool(stop), {name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def evaluate(self) -> float:
        """Evaluates the objective."""
        return float(self.body.objective()[0])


class CompiledDriver(Driver):
    """Runs chunks of steps in one `tf.while_loop`, as a graph or compiled by XLA.

    The user's code is traced once, as one step; loops with room for more or fewer records are made around
    that trace.

    Args:
        body: the step.
        longest: the largest number of steps that a chunk may have.
        loss: the objective, traced.
        jit_compile: True, False or "auto": XLA where it compiles without a change of meaning.
    """

    SHORT, GRAPH, XLA = 256, 1 << 12, 1 << 17
    """Rows that a chunk has room for: when the host is needed often, in a graph, under XLA."""
    BYTES = 1 << 24
    """The memory that the records of a chunk may take."""

    def __init__(self, body: StepBody, longest: int, loss: Any, jit_compile: bool | str) -> None:
        super().__init__(body, longest)
        self._loss = loss
        self._strict = jit_compile is True
        self._jit = bool(jit_compile)
        self._step: Any = None
        self._chunks: dict[tuple[bool, int], Any] = {}

    def prepare(self, period: int) -> None:
        """Traces the step if it is not yet."""
        self._period = min(period, self._longest)
        if self._step is None:
            specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in tf.nest.flatten(self.body.initial())]
            clock = tf.TensorSpec([], tf.float64)
            self._step = tf.function(self._trace, autograph=False).get_concrete_function(clock, *specs)
            changed = sorted(_op_types(self._step) & _CHANGED_BY_XLA)
            if self._jit and not self._strict and changed:
                self._fall_back(f"it would change the meaning of {', '.join(changed)}")

    def _trace(self, seconds: Any, *leaves: Any) -> Any:
        self.traces += 1
        state, row, stop = self.body(tf.nest.pack_sequence_as(self.body.initial(), leaves), seconds)
        return tf.nest.flatten(state), row, stop

    def _fall_back(self, why: str) -> None:
        self._jit = False
        logger.warning("jit_compile='auto' runs this objective as a graph, without XLA: %s.", why)

    def _capacity(self) -> int:
        long = self.XLA if self._jit else self.GRAPH
        rows = self.SHORT if self._period <= self.SHORT else long
        specs = self._step.structured_outputs[1].values()
        row_bytes = sum(spec.dtype.size * spec.shape.num_elements() for spec in specs)
        return max(1, min(rows, self.BYTES // max(1, row_bytes)))

    def _chunk(self, jit: bool, capacity: int) -> Any:
        """Returns the compiled loop of steps with room for `capacity` rows."""
        step = self._step
        rows = step.structured_outputs[1]

        def run(limit, seconds, *leaves):
            def proceed(taken, stop, leaves, records):
                return (taken < limit) & ~stop

            def advance(taken, stop, leaves, records):
                leaves, row, stop = step(seconds, *leaves)
                return taken + 1, stop, leaves, {name: records[name].write(taken, row[name]) for name in row}

            records = {name: tf.TensorArray(row.dtype, capacity, element_shape=row.shape) for name, row in rows.items()}
            start = (tf.constant(0), tf.constant(False), list(leaves), records)
            taken, stop, leaves, records = tf.while_loop(proceed, advance, start, parallel_iterations=1)
            return taken, stop, leaves, {name: record.stack() for name, record in records.items()}

        specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in tf.nest.flatten(self.body.initial())]
        clock, limit = tf.TensorSpec([], tf.float64), tf.TensorSpec([], tf.int32)
        return tf.function(run, autograph=False, jit_compile=jit).get_concrete_function(limit, clock, *specs)

    def advance(self, state: State, limit: int, seconds: float) -> Advance:
        """Takes the steps in one call."""
        key = self._jit, self._capacity()
        limit = min(limit, key[1])
        started = time.perf_counter()
        fresh = key not in self._chunks
        if fresh:
            self._chunks[key] = self._chunk(*key)
        clock = _constant(seconds if "seconds" in self.body.criterion.needs else 0.0, tf.float64)
        leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(state)]
        try:
            taken, stop, leaves, records = self._chunks[key](_constant(limit, tf.int32), clock, *leaves)
        except tf.errors.OpError as error:
            if not (fresh and self._jit):
                raise
            first_line = str(error.message).partition("\n")[0][:200]
            if self._strict:
                raise ValueError(
                    f"`jit_compile` must be False or 'auto' here, received True: XLA cannot compile this step"
                    f" ({first_line})."
                ) from error
            self._fall_back(first_line)
            return self.advance(state, limit, seconds)
        taken = int(taken)
        if not fresh:
            self._pace.observe(taken, time.perf_counter() - started)
        state = tf.nest.pack_sequence_as(state, leaves)
        return Advance(state, taken, bool(stop), {name: _array(record) for name, record in records.items()})

    def evaluate(self) -> float:
        """Runs the traced objective."""
        return float(self._loss())


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: tf.DType) -> tf.Tensor:
    return tf.constant(value, dtype)


def _array(tensor: tf.Tensor) -> np.ndarray:
    if tensor.dtype.is_numpy_compatible and tensor.dtype not in (tf.bfloat16, tf.float16):
        buffer: Any = tensor
        return np.asarray(memoryview(buffer))  # shares the memory, which tensor.numpy() would copy
    return tensor.numpy()


def _op_types(function: Any) -> set[str]:
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for body in graph.library.function for node in body.node_def)]
    return {node.op for node in nodes}


def make_driver(body: StepBody, eager: bool, jit_compile: bool | str, longest: int) -> Driver:
    """Returns the driver of a run, after a look at the objective that changes no variable.

    With no variables given, those that the objective reads are used. The compiled drivers trace the
    objective and its gradient, so that an objective that cannot be minimized is refused here; the eager one
    finds that at its first step, before it applies anything.
    """
    if eager:
        if not body.variables:
            body.variables = read_variables(body.objective)
        body.updater.check(body.variables)
        return EagerDriver(body, longest)

    def loss() -> tf.Tensor:
        if not body.variables:
            body.variables = read_variables(body.objective)
        targets = [tf_variable(variable) for variable in body.variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(targets)
            value, _ = body.objective()
        body.variables = used_variables(body.variables, tape.gradient(value, targets), body.allow_unused)
        return value

    traced = tf.function(loss, autograph=False).get_concrete_function()
    body.updater.check(body.variables)
    body.updater.build(body.updater.native(body.variables))
    return CompiledDriver(body, longest, traced, jit_compile)
