"""The one step that every driver runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import tree

from tapekit._describe import describe, shape_and_dtype
from tapekit._objective import RESERVED, required_arguments
from tapekit._optimizers import Updater, all_finite
from tapekit._tensors import tf_variable
from tapekit.steps import Problem, Step
from tapekit.stopping import Criterion

_RECORDED = ("gradient_norm", "gradient_norm_inf")


class State(NamedTuple):
    """What one step hands to the next, beside the variables themselves."""

    step: Any
    evaluations: Any
    criteria: Any


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
        start = State(0, 0, [criterion.init() for criterion in criteria])
        self.initial: State = tree.map_structure(np.asarray, start)
        """The state before the first step, of NumPy arrays."""

    def __call__(self, state: State, seconds: Any, batch: Any = ()) -> tuple[State, dict[str, Any], Any]:
        """Makes one step and returns the next state, the row to record and the criteria that fired."""
        self.objective.bind(batch)
        names = {*self._measures, *(name for name in _RECORDED if name in self.needs)}
        problem = Problem(self.objective, self.updater, self.variables, self._hooks, self.allow_unused, names)
        problem.gradients_wanted = self._gradients_wanted
        before = [tf.identity(tf_variable(v)) for v in self.variables] if "variables_change" in self.needs else []
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
        step = state.step + 1
        evaluations = state.evaluations + tf.cast(row.pop("evaluations", problem.evaluations), tf.int64)

        known = {"step": step, "evaluations": evaluations, "seconds": seconds}
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
        logs = {name: _criterion_scalar(value) for name, value in row.items() if value.shape.rank == 0}
        criteria, fired = self._judge(state.criteria, {**logs, **known})
        return State(step, evaluations, criteria), row, fired

    def _judge(self, states: Sequence[Any], logs: Mapping[str, Any]) -> tuple[list[Any], Any]:
        """Updates every criterion; bit i of the second result says that criterion i wants to stop."""
        updated, fired = [], tf.constant(0)
        for position, (criterion, state) in enumerate(zip(self.criteria, states, strict=True)):
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
        if "gradients_finite" in needs:
            check = gradients if gradients and not self.updater.scales else []
            logs["gradients_finite"] = all_finite(check)
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
