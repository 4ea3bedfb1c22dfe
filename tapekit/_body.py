"""The one step that every driver runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import tree

from tapekit._describe import describe, shape_and_dtype
from tapekit._model import TrainStep
from tapekit._nonfinite import Guard, Rollback
from tapekit._objective import RESERVED, required_arguments
from tapekit._optimizers import Updater, all_finite
from tapekit._tensors import tf_variable
from tapekit.steps import MinimizeStep, Problem, Step, TapeStep
from tapekit.stopping import Criterion

_RECORDED = ("gradient_norm", "gradient_norm_inf")
# These touch the variables in one guarded update; what others have done before is undone.
_UPDATE_ONCE = (TapeStep.take, MinimizeStep.take, TrainStep.take)


class State(NamedTuple):
    """What one step hands to the next, beside the variables themselves."""

    step: Any
    evaluations: Any
    nonfinite: Any
    """How many steps were not finite, where the run goes on after them."""
    best: Any
    """The lowest finite loss, if that is wanted."""
    criteria: Any


class Verdict(NamedTuple):
    """What a step says of itself, beside what it records."""

    fired: Any
    """Which criteria want to stop, a bit each."""
    finite: Any
    """Whether it was finite; else it has updated nothing."""
    counts: Any
    """How many entries of each gradient are not finite, in the order of `StepBody.suspects`."""


class StepBody:
    """The one step that every driver runs: strategy, records, criteria.

    Args:
        objective: what is minimized, an `Objective` or what has its methods.
        updater: the optimizer.
        variables: what it is minimized over.
        step: the strategy.
        criteria: of which any one stops.
        measures: what is recorded beside the logs.
        hooks: the `on_gradient` hooks in order.
        allow_unused: whether the loss may leave variables out.
        on_nonfinite: what to do with a step that is not finite; `None` lets it pass, as `keras.Model.fit` does.
        keep_best: whether to keep the variables with the lowest finite loss.
    """

    def __init__(
        self,
        objective: Any,
        updater: Updater,
        variables: list[Any],
        step: Step,
        criteria: Sequence[Criterion],
        measures: Mapping[str, Callable[..., Any]],
        hooks: Sequence[Callable[..., Any]],
        allow_unused: bool,
        on_nonfinite: Any = None,
        keep_best: bool = False,
    ) -> None:
        self.objective = objective
        self.updater = updater
        self.variables = variables
        self.step = copy.copy(step)  # with state of its own, apart from other objectives of the same loop
        self.criteria = criteria
        self.needs = frozenset().union(*(criterion.needs for criterion in criteria))
        self.allow_unused = allow_unused
        self._measures = {name: (call, required_arguments(call)) for name, call in measures.items()}
        self._hooks = hooks
        arguments = {argument for _, required in self._measures.values() for argument in required}
        self._gradients_wanted = bool(hooks or arguments - {"intermediates"} or self.needs.intersection(_RECORDED))
        self.guards = on_nonfinite is not None
        self._skips = on_nonfinite == "skip"
        self._rolls_back = isinstance(on_nonfinite, Rollback)
        self.keeps_best = keep_best or self._rolls_back
        self.evaluation: Any = None
        """The loss, what comes beside it and its gradient, once they are traced as one function of no arguments."""
        self.best: list[tuple[Any, tf.Variable]] = []
        """The variables, and where their best values are kept."""
        self.suspects: list[tuple[str, int]] = []
        """The names and sizes of what the gradients belong to, once a step has been made or traced."""
        start = State(0, 0, 0, np.inf, [criterion.init() for criterion in criteria])
        self.initial: State = tree.map_structure(np.asarray, start)
        """The state before the first step, of NumPy arrays."""

    @property
    def is_plain(self) -> bool:
        """Whether no code runs in a step, beside the objective, that might read what this has left in Python."""
        parts = [part for criterion in self.criteria for part in criterion.parts()]
        ours = all(type(part).__module__ == Criterion.__module__ for part in parts)
        plain = type(self.step).take is TapeStep.take and "gradients" in self.step.provides
        return ours and plain and not (self._measures or self._hooks)

    def build(self) -> None:
        """Makes the variables of the strategy, and those that keep the best values; outside of any graph."""
        self.step.build(self.variables)
        if self.keeps_best:
            rest = self.updater.slots() if self._rolls_back else []
            kept = [*self.variables, *self.objective.evaluated, *rest]
            known = {id(tf_variable(variable)): best for variable, best in self.best}
            kept = list({id(tf_variable(variable)): tf_variable(variable) for variable in kept}.values())
            fresh = {id(v): tf.Variable(v, trainable=False, name="best") for v in kept if id(v) not in known}
            self.best = [(v, (known | fresh)[id(v)]) for v in kept]

    def __call__(self, state: State, seconds: Any, batch: Any = (), guard: Any = Guard.FINITE) -> Any:
        """Makes one step and returns the next state, the row to record and the `Verdict`."""
        self.objective.bind(batch)
        guard = guard if self.guards else Guard.ALWAYS
        names = {*self._measures, *(name for name in _RECORDED if name in self.needs)}
        problem = Problem(
            self.objective, self.updater, self.variables, self._hooks, self.allow_unused, names, guard, self.evaluation
        )
        problem.gradients_wanted = self._gradients_wanted
        before = [tf.identity(tf_variable(v)) for v in self.variables] if "variables_change" in self.needs else []
        best_before = [tf.identity(variable) for variable, _ in self.best]
        undone = self._undone()
        values = [tf.identity(variable) for variable in undone]
        taken = self.step.take(problem)
        if not isinstance(taken, Mapping) or "loss" not in taken:
            received = list(taken) if isinstance(taken, Mapping) else describe(taken)
            raise ValueError(f'`take` of {type(self.step).__name__} must return logs with "loss", received {received}.')
        if problem.gradients is None and "gradients" in self.step.provides:
            raise ValueError(
                f"`take` of {type(self.step).__name__} must call transform, apply or minimize of its problem, or the"
                " step declare provides = frozenset(), received neither."
            )
        row = {name: tf.convert_to_tensor(tf_variable(value)) for name, value in taken.items()}
        for name, value in self.objective.conclude().items():
            self._add(row, "metrics", name, value)
        if self.updater.skips:
            self._add(row, "optimizer", "skipped", tf.logical_not(all_finite(problem.gradients or ())))
        finite = self._is_finite(problem, row["loss"])
        if undone:
            allowed = (finite & (guard != Guard.NEVER)) | (guard >= Guard.BY_SUM)
            assign_if(~allowed, undone, values)
        if self.best:
            loss = tf.cast(row["loss"], tf.float64)
            better = (loss > -np.inf) & (loss < state.best)
            assign_if(better, [best for _, best in self.best], best_before)
            state = state._replace(best=tf.where(better, loss, state.best))
        step = state.step + 1
        evaluations = state.evaluations + tf.cast(row.pop("evaluations", problem.evaluations), tf.int64)
        counts_nonfinite = self._skips or self._rolls_back  # else the first one ends the run
        nonfinite = state.nonfinite + tf.cast(~finite, tf.int64) if counts_nonfinite else state.nonfinite

        known = {"step": step, "evaluations": evaluations, "seconds": seconds, "gradients_finite": finite}
        known |= self._gradient_logs(problem.gradients)
        if before:
            known |= _movement(before, self.variables)
        row |= {name: known[name] for name in _RECORDED if name in known}
        for name, gradient in problem.intermediates.items():
            self._add(row, "intermediates", f"gradient_norm/{name}", _norm(tree.flatten(gradient)))
        for name, value in problem.recorded.items():
            self._add(row, "record", name, value)
        for name, (call, arguments) in self._measures.items():
            offered = {"intermediates": problem.intermediates}
            self._add(row, "measures", name, call(*(offered.get(key, problem.gradients) for key in arguments)))
        if counts_nonfinite:
            self._add(row, "on_nonfinite", "nonfinite", nonfinite)
        if self._rolls_back:
            self._add(row, "on_nonfinite", "learning_rate", self.updater.learning_rate)
        logs = {name: _criterion_scalar(value) for name, value in row.items() if value.shape.rank == 0}
        logs |= known
        for name in {"gradient_norm", "gradient_norm_inf", "variables_change"}.intersection(logs):
            logs[name] = tf.where(finite, logs[name], np.nan)  # a step that has not been made has not converged
        criteria, fired = self._judge(state.criteria, logs)
        self.suspects = problem.suspects if self.guards else []
        counts = tf.concat([tf.zeros([0], tf.int64), *problem.counts], 0)
        return State(step, evaluations, nonfinite, state.best, criteria), row, Verdict(fired, finite, counts)

    def _undone(self) -> list[Any]:
        """Returns what a step may change before it is known to be finite."""
        if not self.guards:
            return []
        found = [*self.objective.evaluated]
        if type(self.step).take not in _UPDATE_ONCE:
            own = [value for value in tf.nest.flatten(list(vars(self.step).values())) if _is_variable(value)]
            found += [*self.variables, *self.updater.slots(), *own]
        return list({id(tf_variable(v)): tf_variable(v) for v in found}.values())

    def _is_finite(self, problem: Problem, loss: Any) -> Any:
        """Returns whether the loss and the gradients are finite, but for those that the optimizer looks after."""
        if not (self.guards or "gradients_finite" in self.needs):
            return tf.constant(True)
        if loss is problem.seen_loss:  # as nearly always
            return problem.finite
        finite = tf.math.is_finite(loss)
        if problem.finite is not None:
            return finite & problem.finite
        return finite if self.updater.scales else finite & all_finite(problem.applied)

    def _judge(self, states: Sequence[Any], logs: Mapping[str, Any]) -> tuple[list[Any], Any]:
        """Updates every criterion; bit i of the second result says that criterion i wants to stop."""
        updated, fired = [], tf.constant(0)
        for position, (criterion, state) in enumerate(zip(self.criteria, states, strict=True)):
            if self.guards and position == 0:  # the NonFinite that is part of every run, which need not look again
                new, stop = state, False if self._skips else ~logs["gradients_finite"]
            else:
                new, stop = criterion.update(state, logs)
            if len(tree.flatten(new)) != len(tree.flatten(state)):
                raise ValueError(
                    f"`update` of {type(criterion).__name__} must return a state of the structure of {state!r}, which"
                    f" its `init` gives, received {new!r}."
                )
            updated.append(tree.map_structure(lambda old, value: tf.cast(value, old.dtype), state, new))
            fired += tf.where(stop, 1 << position, 0)
        return updated, fired

    def _gradient_logs(self, gradients: list[Any] | None) -> dict[str, Any]:
        needs, logs = self.needs, {}
        if "gradient_norm" in needs:
            logs["gradient_norm"] = _norm(gradients or ())
        if "gradient_norm_inf" in needs:
            logs["gradient_norm_inf"] = _largest(_dense(g) for g in gradients or ())
        return logs

    def _add(self, row: dict[str, Any], argument: str, name: str, value: Any) -> None:
        if name in row or name in RESERVED:
            raise ValueError(f"`{argument}` must not use the name {name!r}, which the logs have already.")
        if value is None or isinstance(value, str):
            raise TypeError(f"`{argument}` must give numeric tensors, received {describe(value)} under {name!r}.")
        row[name] = tf.convert_to_tensor(tf_variable(value))
        if not (row[name].dtype.is_bool or (row[name].dtype.is_numpy_compatible and row[name].dtype != tf.string)):
            raise TypeError(f"`{argument}` must give numeric tensors, received {describe(row[name])} under {name!r}.")
        if not row[name].shape.is_fully_defined():
            raise ValueError(
                f"`{argument}` must give tensors of a fixed shape, received {name!r} of {shape_and_dtype(row[name])}."
            )


def _is_variable(value: Any) -> bool:
    return isinstance(tf_variable(value), tf.Variable)


def assign_if(condition: Any, variables: Sequence[tf.Variable], values: Sequence[Any]) -> None:
    """Gives variables values if a condition is met."""

    def assign() -> Any:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return tf.constant(True)

    tf.cond(condition, assign, lambda: tf.constant(False))


def _norm(gradients: Iterable[Any]) -> Any:
    squares = [tf.reduce_sum(tf.square(tf.cast(tf.abs(_dense(g)), tf.float64))) for g in gradients]
    return tf.sqrt(tf.add_n(squares or [tf.zeros([], tf.float64)]))


def _dense(gradient: Any) -> Any:
    if isinstance(gradient, tf.RaggedTensor):
        return gradient.flat_values
    return tf.convert_to_tensor(gradient)  # sums the rows that tf.IndexedSlices name more than once


def _largest(tensors: Any) -> Any:
    """Returns the largest absolute entry of all; NaN if there is one, which the maximum of XLA passes over."""
    tensors = list(tensors)
    largest = tf.reduce_max([tf.cast(tf.reduce_max(tf.abs(tensor)), tf.float64) for tensor in tensors])
    has_nan = tf.reduce_any([tf.reduce_any(tf.math.is_nan(tensor)) for tensor in tensors])
    return tf.where(has_nan, tf.constant(np.nan, tf.float64), largest)


def _movement(before: Sequence[Any], variables: Sequence[Any]) -> dict[str, Any]:
    after = [tf.identity(tf_variable(variable)) for variable in variables]
    change = _largest(new - old for new, old in zip(after, before, strict=True))
    return {"variables_change": change, "variables_scale": _largest(after)}


def _criterion_scalar(value: Any) -> Any:
    return tf.cast(value, tf.float64) if value.dtype.is_floating else value
