"""Callbacks that look at gradients: their statistics, and the gradients themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tapekit._describe import check_integer, unique_names
from tapekit._tensors import tf_variable
from tapekit.callbacks._gradients import CountingCallback, dense, largest_of, norm_of, state_variable


class Shelf:
    """Where the compiled steps leave what the host reads, for the variables of one model or objective."""

    def __init__(self, variables: Sequence[Any], places: Sequence[list[Any]]) -> None:
        self._places = {id(variable): row for variable, row in zip(variables, places, strict=True)}
        self._variables = variables
        self._given: dict[int, Any] = {}
        """The variables as the hook gets them, by which they are named."""
        # Steps may leave out different variables, and update some after the others.
        self._looked = state_variable((len(variables),), tf.int64)

    def mark(self, variables: Sequence[Any], before: Any) -> None:
        """Notes inside the graph that the step which so many came before has looked at some variables."""
        given = {id(tf_variable(variable)): variable for variable in variables}
        self._given |= given
        is_looked = [id(variable) in given for variable in self._variables]
        self._looked.assign(tf.where(is_looked, tf.cast(before, tf.int64) + 1, self._looked))

    def chosen(self) -> tuple[list[str], list[Any]]:
        """Returns the names and the variables of the last step that has looked at any."""
        looked = self._looked.numpy()
        last = {id(variable) for variable, step in zip(self._variables, looked, strict=True) if step == looked.max()}
        chosen = [variable for key, variable in self._given.items() if key in last]
        return unique_names(chosen), [tf_variable(variable) for variable in chosen]

    def clear(self) -> None:
        """Forgets the steps of the run before."""
        self._looked.assign(tf.zeros_like(self._looked))

    def holds(self, variables: Sequence[Any]) -> bool:
        """Returns whether there are places for all of these."""
        return all(id(tf_variable(variable)) in self._places for variable in variables)

    def of(self, variable: Any) -> list[Any]:
        """Returns the places of a variable."""
        return self._places[id(tf_variable(variable))]


class ViewingCallback(CountingCallback):
    """Keeps something of the gradients of certain steps inside the graph, for the host to read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._shelves: dict[tuple[int, ...], Shelf] = {}
        self.shelf: Any = None

    def on_train_begin(self, logs=None):
        """Makes room for what the variables of this run need."""
        super().on_train_begin(logs)
        self._make_room()

    def _make_room(self, more: Sequence[Any] = ()) -> None:
        assert self.model is not None
        found = {id(variable): variable for variable in map(tf_variable, (*self.model.trainable_variables, *more))}
        key, variables = tuple(found), list(found.values())
        if key not in self._shelves:
            places = [[state_variable(*spec) for spec in self._room(variable)] for variable in variables]
            self._shelves[key] = Shelf(variables, places)
        self.shelf = self._shelves[key]
        self.shelf.clear()

    def on_gradient(self, gradients, variables):
        """Looks at the gradients, if the step is one of those to look at, and leaves them as they are."""
        if not self.shelf.holds(variables):  # some variables of the model were not made when the run began
            with tf.init_scope():
                self._make_room(variables)
        shelf: Any = self.shelf
        before = self.count()

        def look() -> tf.Tensor:
            shelf.mark(variables, before)
            for variable, gradient in zip(variables, gradients, strict=True):
                self._look(shelf.of(variable), dense(gradient), tf_variable(variable), before)
            return tf.constant(True)

        due = self._due(before)
        if due is True:
            look()
        else:
            tf.cond(due, look, lambda: tf.constant(False))

    def _room(self, variable: Any) -> Sequence[tuple[Any, Any]]:
        """Returns the shape and dtype of each place that a variable needs."""
        raise NotImplementedError

    def _due(self, before: Any) -> Any:
        """Returns whether to look at the step that so many came before."""
        raise NotImplementedError

    def _look(self, places: list[Any], gradient: Any, variable: Any, before: Any) -> None:
        """Leaves in its places what the host needs of a variable."""
        raise NotImplementedError


class PeriodicCallback(ViewingCallback):
    """Keeps something of the gradients at every n-th step.

    Args:
        every: n, at least 1.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = check_integer(every, "every", 1)

    def _due(self, before: Any) -> Any:
        return True if self.every == 1 else (before + 1) % self.every == 0


class _GatheringCallback(PeriodicCallback):
    """Takes something to the host at every n-th step, and has all of it after the run."""

    def __init__(self, every: int = 1) -> None:
        super().__init__(every)
        self._steps: list[int] = []
        self._rows: list[list[np.ndarray]] = []
        self._names: list[str] = []

    def on_train_begin(self, logs=None):
        """Forgets the run before."""
        super().on_train_begin(logs)
        self._steps, self._rows, self._names = [], [], []

    def on_step(self, step, logs):
        """Takes to the host what the graph has kept of this step."""
        self._names, variables = self.shelf.chosen()
        self._steps.append(step)
        self._rows.append([self.shelf.of(variable)[0].numpy() for variable in variables])

    @property
    def steps(self) -> np.ndarray:
        """The k steps of the last run that were looked at, of shape (k,)."""
        return np.asarray(self._steps, np.int64)

    def _columns(self) -> Iterator[tuple[str, np.ndarray]]:
        columns = zip(*self._rows, strict=True)
        return ((name, np.stack(rows)) for name, rows in zip(self._names, columns, strict=True))


class GradientStatistics(_GatheringCallback):
    """Follows the statistics of the gradient of each variable.

    They are computed in the graph, at the steps that are due and no others, in float64 and of the gradients as
    they reach this callback: put it before those that change gradients, or after, or both. Of n entries g_1 ...
    g_n:

        norm        sqrt(g_1^2 + ... + g_n^2)
        mean        (g_1 + ... + g_n) / n
        max_abs     the largest abs(g_i)
        zeros       the share of entries that are zero, from 0 to 1
        non_finite  the share of entries that are NaN or infinite, from 0 to 1

    A loop ends at the first gradient that is not finite; to see where that is, look at every step.

    Args:
        every: at every how many steps; compiled chunks of steps end there.

    Attributes:
        steps: the k steps of the last run that were looked at, an array of shape (k,).
        statistics: for each variable, by its path, a dict of these quantities by name, arrays of shape (k,).

    Raises:
        TypeError: `every` is not an integer.
        ValueError: `every` is below 1.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable([0.0, 3.0], name="x")
        >>> look = tk.callbacks.GradientStatistics(every=10)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=20)
        >>> result = loop.minimize(lambda: tf.reduce_sum(x**2), [x], callbacks=[look])
        >>> print(look.steps, look.statistics["x"]["norm"].round(3), look.statistics["x"]["zeros"])
        [10 20] [5.002 4.087] [0.5 0.5]
    """

    QUANTITIES = ("norm", "mean", "max_abs", "zeros", "non_finite")
    """The names of the quantities."""

    @property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """The quantities by variable and name, arrays of shape (k,)."""
        return {name: dict(zip(self.QUANTITIES, rows.T, strict=True)) for name, rows in self._columns()}

    def _room(self, variable):
        return [((len(self.QUANTITIES),), tf.float64)]

    def _look(self, places, gradient, variable, before):
        values = tf.cast(gradient, tf.float64)
        count = tf.cast(tf.maximum(tf.size(values), 1), tf.float64)
        shares = [values == 0.0, ~tf.math.is_finite(values)]
        means = [tf.reduce_sum(tf.cast(part, tf.float64)) / count for part in (values, *shares)]
        places[0].assign(tf.stack([norm_of([values]), means[0], largest_of(values), *means[1:]]))


class CaptureGradients(_GatheringCallback):
    """Takes the gradients themselves to the host, as NumPy arrays.

    They are those of the very step, as they reach this callback: put it before callbacks that change gradients,
    or after, or both. All are kept until the next run, so mind the memory.

    Args:
        every: at every how many steps; compiled chunks of steps end there.

    Attributes:
        steps: the k steps of the last run that were looked at, an array of shape (k,).
        gradients: for each variable, by its path, an array of the shape (k, ...) and the dtype of the variable.

    Raises:
        TypeError: `every` is not an integer.
        ValueError: `every` is below 1.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable([0.0, 3.0], name="x")
        >>> capture = tk.callbacks.CaptureGradients(every=2)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=5)
        >>> result = loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x], callbacks=[capture])
        >>> print(capture.steps, capture.gradients["x"].shape)
        [2 4] (2, 2)
        >>> print(capture.gradients["x"][0])
        [-7.84 -1.96]
    """

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        """The gradients by variable, arrays of shape (k, ...)."""
        return dict(self._columns())

    def _room(self, variable):
        return [(variable.shape, variable.dtype)]

    def _look(self, places, gradient, variable, before):
        places[0].assign(gradient)
