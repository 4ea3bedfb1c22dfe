"""Criteria: pure rules that say when a run stops, and why.

A criterion is an immutable object. `init()` gives its state, a structure of numbers, and
`update(state, logs)` the next state and whether to stop, in TensorFlow ops that run inside the
compiled step, so that the run ends at that very step. f is the loss, g the gradient, x the variables
and t the step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tapekit._config import Configurable, Registry
from tapekit._describe import check_integer, check_real, describe
from tapekit._result import StopReason

__all__ = [
    "After",
    "AllOf",
    "AnyOf",
    "Criterion",
    "ForSteps",
    "GradientNormBelow",
    "LossBelow",
    "LossChangeBelow",
    "LossPlateau",
    "MaxEvaluations",
    "MaxIterations",
    "NonFinite",
    "Status",
    "VariablesChangeBelow",
    "WallTime",
    "get",
]

Logs = Mapping[str, Any]


class Status(NamedTuple):
    """How far a criterion is from stopping a run.

    Attributes:
        criterion: the name of its class.
        quantity: what it looks at, in words.
        value: what that is now.
        threshold: the value at which the criterion is met.
        rising: whether the value must rise to the threshold rather than fall to it.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.MaxIterations(1000).status((), {"step": 250})[0].share
        0.25
    """

    criterion: str
    quantity: str
    value: float
    threshold: float
    rising: bool = False

    @property
    def share(self) -> float:
        """How near it is: the ratio of value and threshold, or its inverse, at most 1; 0 if that says nothing."""
        part, whole = (self.value, self.threshold) if self.rising else (self.threshold, self.value)
        return min(part / whole, 1.0) if whole > 0.0 and part >= 0.0 else float(self.is_met)

    @property
    def is_met(self) -> bool:
        """Whether the value has reached the threshold."""
        return self.value >= self.threshold if self.rising else self.value <= self.threshold


class Criterion(Configurable):
    """The base of every criterion; subclass it to write your own.

    Attributes:
        needs: what `update` reads from `logs` beyond `"step"`, `"evaluations"` (int64), `"loss"` (float64)
            and the scalars that the objective and the measures give: any of `"seconds"`,
            `"gradient_norm"`, `"gradient_norm_inf"`, `"variables_change"` and `"variables_scale"`
            (float64), or `"gradients_finite"` (bool). Only what is named is computed.
        reason: the `StopReason` of a run that this criterion ends; a combination has those of its parts.

    Criteria combine: `a | b` stops when either does, `a & b` when both do at the same step,
    `a.for_steps(n)` when `a` has held for n consecutive steps, `a.after(n)` not before step n.

    Example:
        A criterion of your own, on a value that the objective returns beside the loss:

        >>> import tapekit as tk, tensorflow as tf
        >>> class AccuracyAbove(tk.stopping.Criterion):
        ...     def __init__(self, value):
        ...         self.value = value
        ...     def update(self, state, logs):
        ...         return state, logs["accuracy"] >= self.value
        ...     def message(self, state, logs):
        ...         return f"the accuracy {logs['accuracy']:.2f} reached {self.value}"
        >>> rule = AccuracyAbove(0.99) | tk.stopping.MaxIterations(1000)
    """

    needs: frozenset[str] = frozenset()
    reason: StopReason = StopReason.CONVERGED

    def init(self) -> Any:
        """Returns the state before the first step: a structure of Python or NumPy numbers.

        Their dtypes are those that the state has in `update`: float64, int64 and bool.

        Example:
            >>> import tapekit as tk
            >>> tk.stopping.LossPlateau(patience=5).init()
            {'best': inf, 'wait': 0}
        """
        return ()

    def update(self, state: Any, logs: Logs) -> tuple[Any, Any]:
        """Returns the state after a step and a scalar bool tensor: whether to stop at it.

        It is traced once and runs inside the compiled step; it writes no attribute.

        Args:
            state: what `init` or the step before has returned, as scalar tensors.
            logs: what is known of the step, scalar tensors by name; see `needs`.

        Example:
            >>> import tapekit as tk
            >>> rule = tk.stopping.LossBelow(0.1)
            >>> state, stop = rule.update(rule.init(), {"step": 1, "loss": 0.05})
            >>> stop
            True
        """
        raise NotImplementedError

    def message(self, state: Any, logs: Logs) -> str:
        """Returns why the run stopped: a sentence with the value and the threshold.

        Args:
            state: the state after the last step, as Python numbers.
            logs: the step, the evaluations and what is recorded of the last step, as Python numbers. What `update`
                needs beyond these, it keeps in the state.

        Example:
            >>> import tapekit as tk
            >>> tk.stopping.LossBelow(0.1).message((), {"step": 7, "loss": 0.05})
            'the loss 0.05 at step 7 is at most 0.1'
        """
        return f"its rule was met at step {logs['step']}"

    def explain(self, state: Any, logs: Logs) -> tuple[StopReason, str]:
        """Returns the `StopReason` and the sentence of the part that fired; combinations choose among theirs.

        Args:
            state: see `message`.
            logs: see `message`.

        Example:
            >>> import tapekit as tk
            >>> tk.stopping.MaxIterations(7).explain((), {"step": 7})
            (<StopReason.LIMIT: 'a limit was reached'>, 'MaxIterations: step 7 reached the limit of 7')
        """
        return self.reason, f"{type(self).__name__}: {self.message(state, logs)}"

    def status(self, state: Any, logs: Logs) -> list[Status]:
        """Returns how far each of its parts is from being met, a `Status` each; none where that is not known.

        Args:
            state: see `message`.
            logs: see `message`.

        Example:
            >>> import tapekit as tk
            >>> tk.stopping.LossBelow(0.1).status((), {"step": 7, "loss": 0.4})[0].share
            0.25
        """
        return []

    def parts(self) -> tuple[Criterion, ...]:
        """Returns the elementary criteria that this one is made of.

        Example:
            >>> import tapekit as tk
            >>> (tk.stopping.LossBelow(0.1).for_steps(3) | tk.stopping.MaxIterations(9)).parts()
            (LossBelow(value=0.1), MaxIterations(n=9))
        """
        return (self,)

    def _status(self, quantity: str, value: Any, threshold: float, rising: bool = False) -> list[Status]:
        return [Status(type(self).__name__, quantity, float(value), float(threshold), rising)]

    def __or__(self, other: Any) -> AnyOf:
        return AnyOf((*_same(self, AnyOf), *_same(other, AnyOf)))

    def __and__(self, other: Any) -> AllOf:
        return AllOf((*_same(self, AllOf), *_same(other, AllOf)))

    def for_steps(self, n: int) -> ForSteps:
        """Returns a criterion that stops when this one has held for `n` consecutive steps; see `ForSteps`.

        Args:
            n: the number of steps, at least 1.

        Raises:
            TypeError: `n` is not an integer.
            ValueError: `n` is below 1.

        Example:
            >>> import tapekit as tk
            >>> tk.stopping.LossBelow(0.1).for_steps(3)
            ForSteps(criterion=LossBelow(value=0.1), n=3)
        """
        return ForSteps(self, n)

    def after(self, n: int) -> After:
        """Returns this criterion, disregarded before step `n`; see `After`.

        Args:
            n: the first step at which it may stop the run, at least 1.

        Raises:
            TypeError: `n` is not an integer.
            ValueError: `n` is below 1.

        Example:
            >>> import tapekit as tk
            >>> tk.stopping.LossPlateau(10).after(100)
            After(criterion=LossPlateau(patience=10, min_delta=0.0), n=100)
        """
        return After(self, n)


def _same(criterion: Any, kind: type) -> tuple[Criterion, ...]:
    return criterion.criteria if isinstance(criterion, kind) else (criterion,)


@dataclasses.dataclass(frozen=True, eq=False)
class MaxIterations(Criterion):
    """Stops at step `n`: t >= n.

    Args:
        n: the largest number of steps, at least 1.

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `n` is below 1.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.MaxIterations(1000)
        MaxIterations(n=1000)
    """

    n: int
    reason = StopReason.LIMIT

    def __post_init__(self) -> None:
        _set(self, n=check_integer(self.n, "n", 1))

    def update(self, state, logs):
        return state, logs["step"] >= self.n

    def message(self, state, logs):
        return f"step {logs['step']} reached the limit of {self.n}"

    def status(self, state, logs):
        return self._status("step", logs["step"], self.n, rising=True)


@dataclasses.dataclass(frozen=True, eq=False)
class MaxEvaluations(Criterion):
    """Stops when the loss has been evaluated `n` times or more.

    A step that begins below the limit is finished, so that a step strategy with several evaluations a
    step may pass it by some.

    Args:
        n: the largest number of evaluations, at least 1.

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `n` is below 1.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.MaxEvaluations(500)
        MaxEvaluations(n=500)
    """

    n: int
    reason = StopReason.LIMIT

    def __post_init__(self) -> None:
        _set(self, n=check_integer(self.n, "n", 1))

    def update(self, state, logs):
        return state, logs["evaluations"] >= self.n

    def message(self, state, logs):
        return f"{logs['evaluations']} evaluations of the loss at step {logs['step']} reached the limit of {self.n}"

    def status(self, state, logs):
        return self._status("evaluations", logs["evaluations"], self.n, rising=True)


@dataclasses.dataclass(frozen=True, eq=False)
class WallTime(Criterion):
    """Stops when the run has lasted `seconds`.

    The clock starts with the run and is read between chunks of steps, which are kept short enough for
    the run to end at most 0.1 s plus one step late.

    Args:
        seconds: wall-clock seconds, at least 0.

    Raises:
        TypeError: `seconds` is not a number.
        ValueError: `seconds` is negative or NaN.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.WallTime(60)
        WallTime(seconds=60.0)
    """

    seconds: float
    reason = StopReason.LIMIT
    needs = frozenset({"seconds"})

    def __post_init__(self) -> None:
        _set(self, seconds=check_real(self.seconds, "seconds", 0))

    def init(self):
        return 0.0

    def update(self, state, logs):
        return logs["seconds"], logs["seconds"] >= self.seconds

    def message(self, state, logs):
        return f"{state:.6g} s at step {logs['step']} reached the limit of {self.seconds:g} s"

    def status(self, state, logs):
        return self._status("seconds", state, self.seconds, rising=True)


@dataclasses.dataclass(frozen=True, eq=False)
class LossBelow(Criterion):
    """Stops when the loss is small enough: f <= value.

    Args:
        value: the threshold, in units of the loss; any sign.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is NaN.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.LossBelow(1e-6)
        LossBelow(value=1e-06)
    """

    value: float

    def __post_init__(self) -> None:
        _set(self, value=check_real(self.value, "value"))

    def update(self, state, logs):
        return state, logs["loss"] <= self.value

    def message(self, state, logs):
        return f"the loss {logs['loss']:.6g} at step {logs['step']} is at most {self.value:g}"

    def status(self, state, logs):
        return self._status("loss", logs["loss"], self.value)


@dataclasses.dataclass(frozen=True, eq=False)
class LossChangeBelow(Criterion):
    """Stops when the loss hardly changes: abs(f_t - f_(t-1)) <= atol + rtol * abs(f_t).

    Right for negative losses too, since the threshold scales with the absolute loss. Not before step 2. With
    atol = rtol it is the first of the rules of Gill, Murray and Wright, "Practical Optimization", 1981, section 8.2.3;
    `VariablesChangeBelow` and `GradientNormBelow` are like the second and the third.

    Args:
        atol: absolute tolerance, in units of the loss, at least 0.
        rtol: relative tolerance, at least 0.

    Raises:
        TypeError: a tolerance is not a number.
        ValueError: a tolerance is negative or NaN.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.LossChangeBelow(1e-10, rtol=1e-8)
        LossChangeBelow(atol=1e-10, rtol=1e-08)
    """

    atol: float
    rtol: float = 0.0

    def __post_init__(self) -> None:
        _set(self, atol=check_real(self.atol, "atol", 0))
        _set(self, rtol=check_real(self.rtol, "rtol", 0))

    def init(self):
        return {"loss": 0.0, "change": 0.0}

    def update(self, state, logs):
        loss = logs["loss"]
        change = tf.abs(loss - state["loss"])
        small = change <= _threshold(self.atol, self.rtol, loss)
        return {"loss": loss, "change": change}, small & (change < np.inf) & (logs["step"] > 1)

    def message(self, state, logs):
        threshold = self.atol + self.rtol * abs(state["loss"])
        return (
            f"the loss changed by {state['change']:.3g} at step {logs['step']}, at most the tolerance"
            f" {threshold:.3g} (atol={self.atol:g}, rtol={self.rtol:g})"
        )

    def status(self, state, logs):
        change = state["change"] if logs["step"] > 1 else math.inf
        return self._status("change of the loss", change, self.atol + self.rtol * abs(state["loss"]))


@dataclasses.dataclass(frozen=True, eq=False)
class GradientNormBelow(Criterion):
    """Stops when the norm of all gradients together is small: norm(g, ord) <= tol.

    The gradient is that of the loss, before gradient hooks and the optimizer's clipping change it.

    Args:
        tol: the threshold, in units of loss per unit of variable, at least 0.
        ord: 2, the root of the sum of squares, or `math.inf`, the largest absolute entry, as in SciPy's BFGS.

    Raises:
        TypeError: `tol` is not a number.
        ValueError: `tol` is negative or NaN, or `ord` is neither 2 nor infinity.

    Example:
        >>> import math, tapekit as tk
        >>> tk.stopping.GradientNormBelow(1e-6, ord=math.inf)
        GradientNormBelow(tol=1e-06, ord=inf)
    """

    tol: float
    ord: float = 2

    def __post_init__(self) -> None:
        _set(self, tol=check_real(self.tol, "tol", 0))
        if not isinstance(self.ord, (int, float, str)) or self.ord not in (2, math.inf, "inf"):
            raise ValueError(f"`ord` must be 2 or math.inf, received {describe(self.ord)}.")
        _set(self, ord=2 if self.ord == 2 else math.inf)

    def get_config(self):
        return {"tol": self.tol, "ord": 2 if self.ord == 2 else "inf"}

    @property
    def _norm(self) -> str:
        return "gradient_norm" if self.ord == 2 else "gradient_norm_inf"

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The norm that is asked for."""
        return frozenset({self._norm})

    def update(self, state, logs):
        return state, logs[self._norm] <= self.tol

    def message(self, state, logs):
        return (
            f"the gradient norm {logs[self._norm]:.3g} (ord={self.ord}) at step {logs['step']} is at most {self.tol:g}"
        )

    def status(self, state, logs):
        return self._status("gradient norm", logs[self._norm], self.tol)


@dataclasses.dataclass(frozen=True, eq=False)
class VariablesChangeBelow(Criterion):
    """Stops when the variables hardly move: max abs(x_t - x_(t-1)) <= atol + rtol * max abs(x_t).

    A step that the optimizer only accumulates, or skips under loss scaling, moves nothing: with those, ask
    for several steps by `for_steps`.

    Args:
        atol: absolute tolerance, in units of the variables, at least 0.
        rtol: relative tolerance, at least 0.

    Raises:
        TypeError: a tolerance is not a number.
        ValueError: a tolerance is negative or NaN.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.VariablesChangeBelow(1e-8)
        VariablesChangeBelow(atol=1e-08, rtol=0.0)
    """

    atol: float
    rtol: float = 0.0

    needs = frozenset({"variables_change", "variables_scale"})

    def __post_init__(self) -> None:
        _set(self, atol=check_real(self.atol, "atol", 0))
        _set(self, rtol=check_real(self.rtol, "rtol", 0))

    def init(self):
        return {"change": 0.0, "threshold": 0.0}

    def update(self, state, logs):
        change = logs["variables_change"]
        threshold = _threshold(self.atol, self.rtol, logs["variables_scale"])
        return {"change": change, "threshold": threshold}, (change <= threshold) & (change < np.inf)

    def message(self, state, logs):
        return (
            f"the variables changed by at most {state['change']:.3g} at step {logs['step']}, within the tolerance"
            f" {state['threshold']:.3g} (atol={self.atol:g}, rtol={self.rtol:g})"
        )

    def status(self, state, logs):
        return self._status("change of the variables", state["change"], state["threshold"])


@dataclasses.dataclass(frozen=True, eq=False)
class LossPlateau(Criterion):
    """Stops when the loss has had no new best by more than `min_delta` for `patience` steps.

    That is the rule of `keras.callbacks.EarlyStopping`, for steps rather than epochs.

    Args:
        patience: the number of steps without a new best, at least 1.
        min_delta: by how much a new best must be better, in units of the loss, at least 0.

    Raises:
        TypeError: `patience` is not an integer or `min_delta` not a number.
        ValueError: `patience` is below 1, or `min_delta` negative or NaN.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.LossPlateau(patience=50)
        LossPlateau(patience=50, min_delta=0.0)
    """

    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        _set(self, patience=check_integer(self.patience, "patience", 1))
        _set(self, min_delta=check_real(self.min_delta, "min_delta", 0))

    def init(self):
        return {"best": math.inf, "wait": 0}

    def update(self, state, logs):
        better = logs["loss"] < state["best"] - self.min_delta
        best = tf.where(better, logs["loss"], state["best"])
        wait = tf.where(better, tf.zeros_like(state["wait"]), state["wait"] + 1)
        return {"best": best, "wait": wait}, wait >= self.patience

    def message(self, state, logs):
        return (
            f"no loss better than {state['best']:.6g} by more than {self.min_delta:g} for {state['wait']} steps"
            f" at step {logs['step']}"
        )

    def status(self, state, logs):
        return self._status("steps without a better loss", state["wait"], self.patience, rising=True)


@dataclasses.dataclass(frozen=True, eq=False)
class NonFinite(Criterion):
    """Stops when the loss or an entry of a gradient is NaN or infinite; part of every run.

    Under loss scaling only the loss counts, since a scaled gradient that overflows is an ordinary event
    which the optimizer skips.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.NonFinite()
        NonFinite()
    """

    reason = StopReason.NOT_FINITE
    needs = frozenset({"gradients_finite"})

    def update(self, state, logs):
        return state, ~(tf.math.is_finite(logs["loss"]) & logs["gradients_finite"])

    def message(self, state, logs):
        step, culprits = logs["step"], logs.get("culprits")
        if math.isfinite(logs["loss"]):
            where = f": {culprits}" if culprits else ""
            return f"a gradient is not finite at step {step}, where the loss is {logs['loss']:.6g}{where}"
        where = f"; not finite in its gradient: {culprits}" if culprits else ""
        return f"the loss is {logs['loss']} at step {step}{where}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Combination(Criterion):
    """Several criteria in one; its state says which of them fired."""

    criteria: tuple[Criterion, ...]

    def __init__(self, criteria: Sequence[Any]) -> None:
        if not isinstance(criteria, (list, tuple)):
            raise TypeError(f"`criteria` must be a list of criteria, received {describe(criteria)}.")
        criteria = tuple(get(criterion) for criterion in criteria)
        if not criteria:
            raise ValueError("`criteria` must hold at least one criterion, received none.")
        _set(self, criteria=criteria)

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What any of the criteria needs."""
        return frozenset().union(*(criterion.needs for criterion in self.criteria))

    def parts(self):
        return tuple(part for criterion in self.criteria for part in criterion.parts())

    def init(self):
        return tuple((criterion.init(), False) for criterion in self.criteria)

    def _update_all(self, state, logs):
        return tuple(criterion.update(inner, logs) for criterion, (inner, _) in zip(self.criteria, state, strict=True))

    def _explanations(self, state, logs):
        pairs = zip(self.criteria, state, strict=True)
        return [criterion.explain(inner, logs) for criterion, (inner, fired) in pairs if fired]

    def status(self, state, logs):
        return statuses(self.criteria, [inner for inner, _ in state], logs)


class AnyOf(_Combination):
    """Stops when any of `criteria` does; `a | b` makes one.

    Args:
        criteria: the criteria, their names or configurations.

    Raises:
        ValueError: there is none.
        TypeError: it is not a list, or one of them is not a criterion.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.LossBelow(1e-6) | tk.stopping.MaxIterations(100)
        AnyOf(criteria=(LossBelow(value=1e-06), MaxIterations(n=100)))
    """

    def update(self, state, logs):
        state = self._update_all(state, logs)
        return state, _reduce(tf.logical_or, state)

    def explain(self, state, logs):
        return either(self._explanations(state, logs))


class AllOf(_Combination):
    """Stops when all of `criteria` do at the same step; `a & b` makes one.

    The run counts as converged if any of them is a convergence criterion and none says that it failed.

    Args:
        criteria: the criteria, their names or configurations.

    Raises:
        ValueError: there is none.
        TypeError: it is not a list, or one of them is not a criterion.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.LossBelow(1e-6) & tk.stopping.GradientNormBelow(1e-3)
        AllOf(criteria=(LossBelow(value=1e-06), GradientNormBelow(tol=0.001, ord=2)))
    """

    def update(self, state, logs):
        state = self._update_all(state, logs)
        return state, _reduce(tf.logical_and, state)

    def explain(self, state, logs):
        return _join(self._explanations(state, logs), " and ")


@dataclasses.dataclass(frozen=True, eq=False)
class ForSteps(Criterion):
    """Stops when `criterion` has held for `n` consecutive steps; `criterion.for_steps(n)` makes one.

    Args:
        criterion: the criterion, its name or configuration.
        n: the number of steps, at least 1.

    Raises:
        TypeError: `criterion` is not one or `n` is not an integer.
        ValueError: `n` is below 1.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.LossBelow(1e-6).for_steps(5)
        ForSteps(criterion=LossBelow(value=1e-06), n=5)
    """

    criterion: Criterion
    n: int

    def __post_init__(self) -> None:
        _set(self, criterion=get(self.criterion))
        _set(self, n=check_integer(self.n, "n", 1))

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the criterion needs."""
        return self.criterion.needs

    def parts(self):
        return self.criterion.parts()

    def init(self):
        return {"inner": self.criterion.init(), "count": 0}

    def update(self, state, logs):
        inner, held = self.criterion.update(state["inner"], logs)
        count = tf.where(held, state["count"] + 1, tf.zeros_like(state["count"]))
        return {"inner": inner, "count": count}, count >= self.n

    def explain(self, state, logs):
        reason, message = self.criterion.explain(state["inner"], logs)
        return reason, f"{message}, for {self.n} consecutive steps"

    def status(self, state, logs):
        return self.criterion.status(state["inner"], logs)


@dataclasses.dataclass(frozen=True, eq=False)
class After(Criterion):
    """Disregards `criterion` before step `n`; `criterion.after(n)` makes one.

    The state of the criterion is kept up to date all the while.

    Args:
        criterion: the criterion, its name or configuration.
        n: the first step at which it may stop the run, at least 1.

    Raises:
        TypeError: `criterion` is not one or `n` is not an integer.
        ValueError: `n` is below 1.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.LossPlateau(10).after(100)
        After(criterion=LossPlateau(patience=10, min_delta=0.0), n=100)
    """

    criterion: Criterion
    n: int

    def __post_init__(self) -> None:
        _set(self, criterion=get(self.criterion))
        _set(self, n=check_integer(self.n, "n", 1))

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the criterion needs."""
        return self.criterion.needs

    def parts(self):
        return self.criterion.parts()

    def init(self):
        return self.criterion.init()

    def update(self, state, logs):
        state, stop = self.criterion.update(state, logs)
        return state, stop & (logs["step"] >= self.n)

    def explain(self, state, logs):
        return self.criterion.explain(state, logs)

    def status(self, state, logs):
        return self.criterion.status(state, logs)


def statuses(criteria: Sequence[Criterion], states: Sequence[Any], logs: Logs) -> list[Status]:
    """Returns how far each part of some criteria is from being met."""
    pairs = zip(criteria, states, strict=True)
    return [status for criterion, state in pairs for status in criterion.status(state, logs)]


def either(explanations: Sequence[tuple[StopReason, str]]) -> tuple[StopReason, str]:
    """Joins the explanations of the criteria that have fired, of which any one would have stopped the run."""
    return _join(explanations, "; ")


def _join(explanations: Sequence[tuple[StopReason, str]], separator: str) -> tuple[StopReason, str]:
    """Joins explanations; their order does not matter for the reason, and none is said twice."""
    reasons = [reason for reason, _ in explanations]
    weightiest = [reason for reason in (StopReason.NOT_FINITE, StopReason.CONVERGED) if reason in reasons]
    return [*weightiest, *reasons][0], separator.join(dict.fromkeys(message for _, message in explanations))


def _set(criterion: Criterion, /, **values: Any) -> None:
    for name, value in values.items():  # the dataclasses are frozen
        object.__setattr__(criterion, name, value)


def _threshold(atol: float, rtol: float, value: Any) -> Any:
    return atol + rtol * tf.abs(value) if rtol else np.float64(atol)


def _reduce(combine: Any, state: tuple[tuple[Any, Any], ...]) -> Any:
    return functools.reduce(combine, (fired for _, fired in state))


_registry = Registry("stopping", Criterion, "tapekit.stopping")
_registry.add(
    MaxIterations,
    MaxEvaluations,
    WallTime,
    LossBelow,
    LossChangeBelow,
    GradientNormBelow,
    VariablesChangeBelow,
    LossPlateau,
    NonFinite,
    AnyOf,
    AllOf,
    ForSteps,
    After,
)


def get(identifier: Any) -> Criterion:
    """Returns the criterion that a name, a configuration, a list of them or an object stands for.

    Args:
        identifier: a `Criterion`; a name such as `"non_finite"`; a configuration
            `{"class_name": "MaxIterations", "config": {"n": 100}}`; or a list of which any one stops.

    Returns:
        The criterion.

    Raises:
        ValueError: the name is not known; the sentence lists the known ones and the closest.
        TypeError: it is none of these, or the criterion needs other arguments.

    Example:
        >>> import tapekit as tk
        >>> tk.stopping.get({"class_name": "max_iterations", "config": {"n": 100}})
        MaxIterations(n=100)
    """
    if isinstance(identifier, (list, tuple)):
        criteria = [get(item) for item in identifier]
        if not criteria:
            raise ValueError(f"`stopping` must name at least one criterion, received {describe(identifier)}.")
        return criteria[0] if len(criteria) == 1 else AnyOf(criteria)
    return _registry.get(identifier)
