"""What a run returns: why it stopped, and everything that is known at that point."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np

from tapekit import _drawing, _exchange


class StopReason(enum.Enum):
    """Why a run ended; the value is the text that a person reads.

    Example:
        >>> import tapekit as tk
        >>> tk.StopReason.LIMIT.value
        'a limit was reached'
    """

    CONVERGED = "a convergence criterion was met"
    LIMIT = "a limit was reached"
    NOT_FINITE = "the loss or a gradient was not finite"
    STOPPED = "a hook or the caller stopped the run"
    INTERRUPTED = "the run was interrupted"
    ERROR = "an exception ended the run"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OptimizationResult:
    """The outcome of a run, whichever way it ended.

    Attributes:
        loss: the loss at `variables`, evaluated once more after the last step; after an exception, the
            last recorded one; after `fit`, that of the last epoch as Keras reports it, or the mean over
            its batches for a model with its own `train_step`.
        variables: the final values, NumPy arrays in the structure in which the variables were given.
        steps: the number of updates.
        evaluations: how often the loss was evaluated, the final evaluation included. The one that finds
            the variables before an eager run with `variables=None` is not counted.
        seconds: wall-clock time of the run, compilation included.
        converged: whether a convergence criterion ended the run.
        reason: a `StopReason`.
        message: one sentence that says which criterion stopped the run, its value and its threshold.
        history: one array a recorded quantity, of shape `(steps, ...)`. `"loss"` holds the loss before
            each update, as everywhere in TensorFlow. After `fit` it is that of the batch, and what Keras's
            metrics give beside it is, as in Keras, about the epoch so far.
        best_loss: the lowest finite loss of the run, if the best variables were kept; NaN if none was finite.
        best_variables: the variables with that loss, in the same structure; `None` if they were not kept.
        epoch_history: after `fit`, what `keras.callbacks.History` holds, as arrays with one row an epoch;
            else empty.
        epoch_steps: for each name of `epoch_history` the steps at which its rows were made, from 1.

    SciPy's names work too: `x`, `fun`, `nit`, `nfev`, `success` and `status`.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(0.0)
        >>> result = tk.OptimizationLoop("sgd", max_iterations=2).minimize(lambda: (x - 4.0) ** 2, [x])
        >>> result.steps, result.reason
        (2, <StopReason.LIMIT: 'a limit was reached'>)
    """

    loss: float
    variables: Any
    steps: int
    evaluations: int
    seconds: float
    reason: StopReason
    message: str
    history: dict[str, np.ndarray]
    epoch_history: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    epoch_steps: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    best_loss: float | None = None
    best_variables: Any = None

    @property
    def converged(self) -> bool:
        """Whether a convergence criterion ended the run."""
        return self.reason is StopReason.CONVERGED

    @property
    def x(self) -> np.ndarray:
        """All variables, flattened and joined into one array of shape `(n,)`."""
        leaves = [np.ravel(leaf) for leaf in _leaves(self.variables)]
        return np.concatenate(leaves) if leaves else np.empty(0)

    @property
    def fun(self) -> float:
        """SciPy's name of `loss`."""
        return self.loss

    @property
    def nit(self) -> int:
        """SciPy's name of `steps`."""
        return self.steps

    @property
    def nfev(self) -> int:
        """SciPy's name of `evaluations`."""
        return self.evaluations

    @property
    def success(self) -> bool:
        """SciPy's name of `converged`."""
        return self.converged

    @property
    def status(self) -> int:
        """An integer for `reason`: 0 if the run converged, else the position in `StopReason`."""
        return list(StopReason).index(self.reason)

    def __repr__(self) -> str:
        return (
            f"OptimizationResult(loss={self.loss:.6g}, steps={self.steps}, reason={self.reason.name},"
            f" message={self.message!r})"
        )

    def __str__(self) -> str:
        lines = (f"  {name:<9}  {text}" for name, text in self._rows().items())
        return "\n".join([self.message, *("\n             ".join(line.splitlines()) for line in lines)])

    def _repr_html_(self) -> str:
        return _exchange.as_html(self.message, self._rows())

    def _rows(self) -> dict[str, str]:
        """Returns what a person wants to know first."""
        count = len(leaves := _leaves(self.variables))
        if self.epoch_history:
            variables = f"{count} arrays, {sum(leaf.size for leaf in leaves):,} numbers"
        else:
            with np.printoptions(precision=6, threshold=8, edgeitems=3):
                variables = str(self.variables)
        best = f", the best {self.best_loss:.6g}" if self.best_loss is not None and self.best_loss < self.loss else ""
        rows = {
            "reason": f"{self.reason.name.lower()}: {self.reason.value}",
            "loss": f"{self.loss:.6g}{best}",
            "variables": variables,
            "steps": f"{self.steps}, with {self.evaluations} evaluations in {self.seconds:.3g} s",
            "history": ", ".join(self.history),
        }
        return rows | ({"epochs": ", ".join(self.epoch_history)} if self.epoch_history else {})

    def summary(self, file: TextIO | None = None) -> None:
        """Prints what a person wants to know first: why the run ended, the loss, the variables, the work.

        Args:
            file: where to; `None` is standard output.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable(0.0)
            >>> loop = tk.OptimizationLoop("sgd", max_iterations=2)
            >>> loop.minimize(lambda: (x - 4.0) ** 2, [x]).summary()
            MaxIterations: step 2 reached the limit of 2
              reason     limit: a limit was reached
              loss       14.7579
              variables  [array(0.1584, dtype=float32)]
              steps      2, with 3 evaluations in ... s
              history    loss
        """
        print(self, file=file)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to a file: an npz archive of its arrays, and JSON. No pickle is used.

        Args:
            path: the file; one that is there is replaced, and never left half written.

        Raises:
            OSError: the file cannot be written.
            TypeError: `variables` has keys or items that JSON does not know.

        Example:
            >>> import tapekit as tk, tempfile, tensorflow as tf
            >>> x = tf.Variable(0.0)
            >>> result = tk.OptimizationLoop("sgd", max_iterations=2).minimize(lambda: (x - 4.0) ** 2, [x])
            >>> path = tempfile.mkdtemp() + "/run.npz"
            >>> result.save(path)
            >>> tk.OptimizationResult.load(path).message
            'MaxIterations: step 2 reached the limit of 2'
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        _exchange.write(path, fields | {"reason": self.reason.name})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OptimizationResult:
        """Returns the result that `save` has written.

        Args:
            path: the file.

        Returns:
            A result whose fields are equal bit for bit.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not one that `save` has written.

        Example:
            >>> import numpy as np, tapekit as tk, tempfile, tensorflow as tf
            >>> x = tf.Variable(0.0)
            >>> result = tk.OptimizationLoop("sgd", max_iterations=2).minimize(lambda: (x - 4.0) ** 2, [x])
            >>> path = tempfile.mkdtemp() + "/run.npz"
            >>> result.save(path)
            >>> np.array_equal(tk.OptimizationResult.load(path).history["loss"], result.history["loss"])
            True
        """
        fields: dict[str, Any] = _exchange.read(path)
        return cls(**{**fields, "reason": StopReason[fields["reason"]]})

    def plot(self, names: Sequence[str] | None = None, ax: Any = None) -> Any:
        """Draws what was recorded over the steps, a panel for each quantity.

        A scale is logarithmic where the numbers ask for it. The mark at the end is a disc if the run converged, a
        square at a limit, a cross if it was not finite, and a diamond else; the title is `message`. Red ticks are
        steps that were not finite, and faint lines the ends of epochs, at which `val_` values are drawn too. A
        million steps are drawn by some thousand points.

        Args:
            names: which of `history`, such as `["loss", "x[0]"]`; `None` draws the loss, and `"gradient_norm"` and
                `"learning_rate"` where they were recorded.
            ax: a matplotlib `Axes`, or as many as there are quantities, to draw in; `None` makes a figure by
                `matplotlib.pyplot`.

        Returns:
            The `Axes`, or a list of them.

        Raises:
            ImportError: matplotlib is not installed; the sentence has the command that installs it.
            TypeError: `names` is not a list.
            ValueError: a name is not in the history, or `ax` has another number of axes.

        Example:
            >>> import matplotlib.figure, tapekit as tk, tensorflow as tf
            >>> x = tf.Variable(0.0)
            >>> result = tk.OptimizationLoop("sgd", max_iterations=500).minimize(lambda: (x - 4.0) ** 2, [x])
            >>> ax = matplotlib.figure.Figure().add_subplot()
            >>> result.plot(["loss"], ax=ax).get_yscale()
            'log'
        """
        return _drawing.draw_history(self, names, ax)

    def plot_trajectory(
        self,
        name: Any = None,
        function: Callable[..., Any] | None = None,
        ax: Any = None,
        label: str | None = None,
    ) -> Any:
        """Draws the way of the variables in a plane, from a circle to a star.

        What has more than two coordinates is projected to the plane of its two principal components. Several runs may
        be drawn in one `ax`, where `function` is given with the last of them.

        Args:
            name: a measure of at least two numbers, or a list of the names of at least two quantities in `history`;
                `None` is the only one that there is. Measures see the variables after an update, so that the path
                begins with step 1.
            function: what to draw the levels of: it takes an array for each coordinate and returns one of the same
                shape, as NumPy expressions do. They are drawn between the limits that `ax` has been given with
                `set_xlim` and `set_ylim`, and without such around all that has been drawn.
            ax: a matplotlib `Axes` to draw in; `None` makes a figure by `matplotlib.pyplot`.
            label: what a legend calls the path; `None` is the number of steps.

        Returns:
            The `Axes`.

        Raises:
            ImportError: matplotlib is not installed; the sentence has the command that installs it.
            ValueError: nothing in the history has two coordinates, or `function` returns another shape.

        Example:
            >>> import matplotlib.figure, tapekit as tk, tensorflow as tf
            >>> x = tf.Variable([-1.0, 2.0])
            >>> loop = tk.OptimizationLoop("adam", max_iterations=100, measures={"x": lambda: x})
            >>> result = loop.minimize(lambda: (1.0 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2, [x])
            >>> ax = matplotlib.figure.Figure().add_subplot()
            >>> ax = result.plot_trajectory("x", lambda a, b: (1.0 - a) ** 2 + 100.0 * (b - a**2) ** 2, ax)
            >>> ax.get_xlabel(), ax.get_ylabel()
            ('x[0]', 'x[1]')
        """
        return _drawing.draw_trajectory(self, name, function, ax, label)

    def to_dataframe(self) -> Any:
        """Returns the history as a `pandas.DataFrame` with one row a step, which its index `step` counts from 1.

        Entries of measures that are arrays have columns of their own, named like `x[0]` or `x[0, 1]`.

        Raises:
            ImportError: pandas is not installed; the sentence has the command that installs it.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable([0.0, 1.0])
            >>> loop = tk.OptimizationLoop("sgd", max_iterations=3, measures={"x": lambda: x})
            >>> list(loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x]).to_dataframe().columns)
            ['loss', 'x[0]', 'x[1]']
        """
        pandas = _exchange.package("pandas", "to_dataframe", "pandas")
        columns = _exchange.columns(self.history)
        rows = len(next(iter(columns.values()), ()))
        return pandas.DataFrame(columns, index=pandas.RangeIndex(1, rows + 1, name="step"))

    def to_scipy(self) -> Any:
        """Returns a `scipy.optimize.OptimizeResult` with `x`, `fun`, `nit`, `nfev`, `success`, `status`, `message`.

        Raises:
            ImportError: SciPy is not installed; the sentence has the command that installs it.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable(0.0)
            >>> result = tk.OptimizationLoop("sgd", max_iterations=2).minimize(lambda: (x - 4.0) ** 2, [x])
            >>> result.to_scipy().nit
            2
        """
        optimize = _exchange.package("scipy.optimize", "to_scipy", "scipy")
        names = ("x", "fun", "nit", "nfev", "success", "status", "message")
        return optimize.OptimizeResult({name: getattr(self, name) for name in names})


class NonFiniteError(ArithmeticError):
    """Raised at a loss or gradient that is not finite by a loop with `on_nonfinite="raise"`.

    Args:
        result: what the run had reached.

    Attributes:
        result: the `OptimizationResult`, with the last finite state.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(0.0)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=200, on_nonfinite="raise")
        >>> try:
        ...     loop.minimize(lambda: 1.0 / x, [x])
        ... except tk.NonFiniteError as error:
        ...     print(error.result.steps, error.result.variables)
        1 [array(0., dtype=float32)]
    """

    def __init__(self, result: OptimizationResult) -> None:
        super().__init__(result.message)
        self.result = result


def _leaves(structure: Any) -> list[np.ndarray]:
    if isinstance(structure, dict):
        return [leaf for key in sorted(structure) for leaf in _leaves(structure[key])]
    if isinstance(structure, (list, tuple)):
        return [leaf for item in structure for leaf in _leaves(item)]
    return [structure]
