"""Pictures of several runs. Those of one run are `OptimizationResult.plot` and `plot_trajectory`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapekit._drawing import draw_comparison

__all__ = ["compare"]


def compare(results: Mapping[str, Any], name: str = "loss", ax: Any = None) -> Any:
    """Draws one quantity of several runs over their steps, on one scale.

    The mark at the end of a line is a disc for a run that converged, a square for one that reached a limit, a cross
    for one that was not finite, and a diamond for the others. A million steps are drawn by some thousand points.

    Args:
        results: a dict of `OptimizationResult`s by the names that the legend has.
        name: what of their histories is drawn; one entry of a measure that is an array is named like `x[0]`.
        ax: a matplotlib `Axes` to draw in; `None` makes a figure by `matplotlib.pyplot`.

    Returns:
        The `Axes`.

    Raises:
        ImportError: matplotlib is not installed; the sentence has the command that installs it.
        TypeError: `results` is not a dict with a result in it.
        ValueError: a history does not have `name`.

    Example:
        >>> import matplotlib.figure, tapekit as tk, tensorflow as tf
        >>> results = {}
        >>> for name in ("sgd", "adam"):
        ...     x = tf.Variable(0.0)
        ...     loop = tk.OptimizationLoop(name, max_iterations=100)
        ...     results[name] = loop.minimize(lambda: (x - 4.0) ** 2, [x])
        >>> ax = matplotlib.figure.Figure().add_subplot()
        >>> [text.get_text() for text in tk.plots.compare(results, ax=ax).get_legend().get_texts()]
        ['sgd: 100 steps', 'adam: 100 steps']
    """
    return draw_comparison(results, name, ax)
