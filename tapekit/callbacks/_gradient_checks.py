"""A callback that compares gradients with finite differences of the loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tapekit._describe import check_integer, describe
from tapekit.callbacks._gradient_views import ViewingCallback
from tapekit.callbacks._gradients import check_finite

logger = logging.getLogger("tapekit")

_ROUNDOFF = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class CheckGradients(ViewingCallback):
    """Compares the gradients of the first steps with finite differences of the loss.

    For a number of entries of each variable, half of them those with the largest gradients and the others drawn
    at random, the gradient g is compared with the central difference

        d = (f(x + h) - f(x - h)) / 2 h

    at the variables of that step before its update (Dennis and Schnabel, "Numerical Methods for Unconstrained
    Optimization and Nonlinear Equations", 1983, section 5.6). An entry is wrong if

        abs(d - g) > atol + rtol * max(abs(d), abs(g))

    The gradients are those that reach this callback, so put it before callbacks that change them. The loss is
    evaluated about four times an entry, outside of the compiled step; afterwards all variables have their values
    again, bit for bit, even if the loss raises. Chunks of compiled steps become no shorter: a verdict comes at
    the end of the one that holds the step. The first chunk of a new objective is one step long.

    The loss must be a function of the variables alone: dropout and random batches make differences meaningless,
    which is noticed and told. Entries at which the loss is not finite on both sides are left out.

    Args:
        steps: how many steps of a run are checked, from the first.
        epsilon: the h of every entry, in units of the variables; `None` means cbrt(u) * max(1, abs(x)), where u
            is the rounding unit of the coarser of the dtypes of variable and loss (2^-52 for float64).
        rtol: the relative difference that is allowed; `None` means cbrt(u), 6e-6 for float64 and 5e-3 for float32.
        atol: the absolute difference that is allowed, in units of the gradient; `None` means the uncertainty of
            d itself, abs(d(2h) - d(h)) + 8 u abs(f) / h.
        entries: how many entries of each variable are checked; `None` means all.
        on_failure: "raise" for an exception, "warn" for a line of the `tapekit` logger.

    Attributes:
        worst: the entry of the last run that is the furthest off for what is allowed, a dict with `step`,
            `variable` (its path), `index`, `gradient`, `difference`, `error` and `allowed`; `None` if no entry has
            been checked.
        checked: how many entries have been checked in the last run.
        failed: how many of them are wrong.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument has a wrong value; or during the run, a gradient is wrong: the sentence names the
            worst entry by variable and index.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> @tf.custom_gradient
        ... def square(x):
        ...     return x**2, lambda upstream: upstream * x  # should be 2 x
        >>> x = tf.Variable([1.0, 3.0], name="x")
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=10, callbacks=["check_gradients"])
        >>> loop.minimize(lambda: tf.reduce_sum(square(x)), [x])
        Traceback (most recent call last):
        ...
        ValueError: the gradient must be that of the loss; at step 1 it is 3 for x[1], where finite differences give
        6... and ... of difference is allowed; 2 of 2 checked entries are wrong.
    """

    replayable = True  # what it needs of a step the graph has kept, so that no chunk has to end for it

    def __init__(
        self,
        steps: int = 1,
        epsilon: float | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        entries: int | None = 10,
        on_failure: str = "raise",
    ) -> None:
        super().__init__()
        self.steps = check_integer(steps, "steps", 1)
        self.epsilon = None if epsilon is None else check_finite(epsilon, "epsilon", positive=True)
        self.rtol = None if rtol is None else check_finite(rtol, "rtol", minimum=0.0)
        self.atol = None if atol is None else check_finite(atol, "atol", minimum=0.0)
        self.entries = None if entries is None else check_integer(entries, "entries", 1)
        if on_failure not in ("raise", "warn"):
            raise ValueError(f'`on_failure` must be "raise" or "warn", received {describe(on_failure)}.')
        self.on_failure = on_failure
        self._forget()

    def _forget(self) -> None:
        self.worst: dict[str, Any] | None = None
        self.checked = self.failed = 0

    def on_train_begin(self, logs=None):
        """Forgets the run before."""
        super().on_train_begin(logs)
        self._forget()

    def on_step(self, step, logs):
        """Checks the gradients of one of the first steps."""
        if step > self.steps:
            return
        names, variables = self.shelf.chosen()
        kept = [[place[step - 1] for place in self.shelf.of(variable)] for variable in variables]
        originals = [tf.identity(variable) for variable in variables]
        try:
            _assign(variables, [point for point, _ in kept])
            message = self._compare(step, names, variables, [gradient.numpy() for _, gradient in kept])
        finally:
            _assign(variables, originals)
        if message and self.on_failure == "raise":
            raise ValueError(message)
        if message:
            logger.warning("%s", message)

    def _due(self, before):
        return before < self.steps

    def _room(self, variable):
        return 2 * [((self.steps, *variable.shape), variable.dtype)]

    def _look(self, places, gradient, variable, before):
        for place, value in zip(places, (variable.read_value(), gradient), strict=True):
            place.assign(tf.tensor_scatter_nd_update(place, tf.reshape(before, [1, 1]), value[tf.newaxis]))

    def _compare(self, step: int, names: list[str], variables: list[Any], gradients: list[Any]) -> str | None:
        """Compares at the present variables; returns what is wrong, if anything is."""
        loss = _Loss(self.loop.evaluate, variables)
        if not loss.repeatable:
            return (
                "the loss must be a function of the variables alone to be checked by finite differences; at step"
                f" {step} it was {loss.values[0]:.9g} and then {loss.values[1]:.9g} at the same variables."
            )
        verdicts = []
        for name, variable, gradient in zip(names, variables, gradients, strict=True):
            values = gradient.astype(np.float64)
            for index in self._chosen(values, step):
                verdict = {"step": step, "variable": name, "index": index, "gradient": float(values[index])}
                verdicts.append(verdict | self._judge(loss, variable, index, verdict["gradient"]))
        verdicts = [verdict for verdict in verdicts if math.isfinite(verdict["difference"])]
        wrong = [verdict for verdict in verdicts if not verdict["error"] <= verdict["allowed"]]
        self.checked += len(verdicts)
        self.failed += len(wrong)
        if not verdicts:
            return f"the loss must be finite near the variables to be checked, which it is nowhere at step {step}."
        worst = max(verdicts, key=_badness)
        if self.worst is None or _badness(worst) > _badness(self.worst):
            self.worst = worst
        if not wrong:
            return None
        place = worst["variable"] + (str(list(worst["index"])) if worst["index"] else "")
        return (
            f"the gradient must be that of the loss; at step {step} it is {worst['gradient']:.6g} for {place}, where"
            f" finite differences give {worst['difference']:.6g} and {worst['allowed']:.1g} of difference is allowed;"
            f" {len(wrong)} of {len(verdicts)} checked entries are wrong."
        )

    def _judge(self, loss: _Loss, variable: Any, index: tuple[int, ...], gradient: float) -> dict[str, float]:
        unit = max(loss.unit, _ROUNDOFF[variable.dtype.name])
        x = float(variable.numpy()[index])
        h = self.epsilon or unit ** (1 / 3) * max(1.0, abs(x))
        difference, size = loss.difference(variable, index, h)
        atol = self.atol
        if atol is None:
            atol = abs(loss.difference(variable, index, 2.0 * h)[0] - difference) + 8.0 * unit * size / h
            atol = atol if math.isfinite(atol) else 8.0 * unit * size / h
        rtol = unit ** (1 / 3) if self.rtol is None else self.rtol
        allowed = atol + rtol * max(abs(difference), abs(gradient))
        return {"difference": difference, "error": abs(difference - gradient), "allowed": allowed}

    def _chosen(self, gradient: np.ndarray, step: int) -> list[tuple[int, ...]]:
        """Returns the indices of the entries to check, the same for every run."""
        count = gradient.size if self.entries is None else min(self.entries, gradient.size)
        order = np.argsort(-np.abs(gradient), axis=None, kind="stable")
        largest, others = order[: (count + 1) // 2], order[(count + 1) // 2 :]
        drawn = np.random.default_rng(step).choice(others, count - largest.size, replace=False)
        return [tuple(int(i) for i in np.unravel_index(flat, gradient.shape)) for flat in [*largest, *drawn]]


class _Loss:
    """The loss at and around the present variables.

    Args:
        evaluate: evaluates the loss at the present variables.
        variables: the variables, which every method leaves as they are.
    """

    def __init__(self, evaluate: Callable[[], float], variables: Sequence[Any]) -> None:
        self._evaluate = evaluate
        self.values = [evaluate(), evaluate()]
        self.unit = self._rounding_unit(variables)

    @property
    def repeatable(self) -> bool:
        """Whether the loss has the same value twice, but for the order in which numbers are added."""
        first, second = self.values
        return first == second or not abs(first - second) > 1e3 * self.unit * abs(first)

    def difference(self, variable: Any, index: tuple[int, ...], h: float) -> tuple[float, float]:
        """Returns the central difference with respect to an entry, and the size of the loss."""
        original = tf.identity(variable)
        array = np.array(original.numpy())
        losses, places = [], []
        try:
            for sign in (1.0, -1.0):
                moved = array.copy()
                moved[index] = float(array[index]) + sign * h
                places.append(float(moved[index]))
                variable.assign(moved)
                losses.append(self._evaluate())
        finally:
            variable.assign(original)
        difference = (losses[0] - losses[1]) / (places[0] - places[1]) if places[0] != places[1] else math.nan
        return difference, max(map(abs, losses))

    def _rounding_unit(self, variables: Sequence[Any]) -> float:
        """Tells the precision of the loss by its values: those of float32 need no more digits than that has."""
        if all(variable.dtype != tf.float64 for variable in variables):
            return _ROUNDOFF["float32"]
        originals = [tf.identity(variable) for variable in variables]
        random = np.random.default_rng(0)
        values = list(self.values)
        try:
            for _ in range(3):
                for variable, original in zip(variables, originals, strict=True):
                    moved = original.numpy().astype(np.float64) + 1e-4 * random.normal(size=original.shape)
                    variable.assign(moved.astype(original.dtype.as_numpy_dtype))
                values.append(self._evaluate())
        finally:
            _assign(variables, originals)
        single = all(float(np.float32(value)) == value for value in values if math.isfinite(value))
        return _ROUNDOFF["float32" if single else "float64"]


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _badness(verdict: dict[str, Any]) -> tuple[float, float]:
    error, allowed = verdict["error"], verdict["allowed"]
    if error <= allowed:
        return (error / allowed if allowed else 0.0), error
    return (error / allowed if allowed and error == error else math.inf), error
