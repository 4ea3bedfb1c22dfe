"""Pictures of runs: few points for many steps, and the scale on which a quantity can be read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tapekit import _exchange
from tapekit._describe import describe

_COLUMNS = 1000
"""Into how many columns the steps of a longer run are gathered; a column is drawn from its lowest to its highest."""
_PATH_POINTS = 20_000
_GRID = 200
_MARKERS = 40
_LABELS = {"loss": "loss", "gradient_norm": "gradient norm", "learning_rate": "learning rate"}
_END = {"CONVERGED": "o", "LIMIT": "s", "NOT_FINITE": "X"}


def thinned(values: np.ndarray, columns: int = _COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps, from 1, and the values that draw the same line as all of them.

    Of each column of steps the first, the lowest, the highest and the last finite value are kept (U. Jugel et al.,
    "M4: A Visualization-Oriented Time Series Data Aggregation", VLDB 2014). A column without any is a gap.

    Args:
        values: numbers of shape `(steps,)`.
        columns: how many columns there may be.
    """
    count = len(values)
    if count <= 4 * columns:
        return np.arange(1, count + 1), np.where(np.isfinite(values), values, np.nan)
    width = -(-count // columns)
    padded = np.full(-(-count // width) * width, np.nan)
    padded[:count] = np.where(np.isfinite(values), values, np.nan)
    cells = padded.reshape(-1, width)
    finite = np.isfinite(cells)
    places = np.stack(
        [
            finite.argmax(axis=1),
            np.where(finite, cells, np.inf).argmin(axis=1),
            np.where(finite, cells, -np.inf).argmax(axis=1),
            width - 1 - finite[:, ::-1].argmax(axis=1),
        ],
        axis=1,
    )
    chosen = np.unique((np.sort(places, axis=1) + width * np.arange(len(cells))[:, None]).ravel())
    chosen = chosen[chosen < count]
    return chosen + 1, padded[chosen]


def scale_for(values: Sequence[np.ndarray]) -> dict[str, Any]:
    """Returns the arguments of `Axes.set_yscale` that let all of some numbers be read.

    Args:
        values: arrays of numbers, of which those that are not finite do not count.
    """
    finite = np.concatenate([np.ravel(each)[np.isfinite(np.ravel(each))] for each in values])
    sizes = np.abs(finite[finite != 0.0])
    if not sizes.size or sizes.max() < 30.0 * sizes.min():
        return {"value": "linear"}
    if finite.min() >= 0.0:
        return {"value": "log", "nonpositive": "mask"}
    middle = float(np.median(sizes))
    return {"value": "symlog", "linthresh": middle} if sizes.max() > 30.0 * middle else {"value": "linear"}


def draw_history(result: Any, names: Sequence[str] | None, ax: Any) -> Any:
    """Draws what a run has recorded, one panel for each quantity; see `OptimizationResult.plot`."""
    chosen = _names_to_draw(result.history, names)
    axes = _panels(len(chosen), ax)
    for place, (name, axis) in enumerate(zip(chosen, axes, strict=True)):
        values = _series(result.history, name)
        validation = _epoch_curve(result, f"val_{name}")
        _line(axis, values, label=name, with_end=result.reason)
        if validation is not None:
            axis.plot(*validation, marker=".", label=f"val_{name}")
        axis.set_yscale(**scale_for([values, *([] if validation is None else [validation[1]])]))
        axis.set_ylabel(_LABELS.get(name, name))
        _mark_epochs(axis, result)
        if validation is not None or not np.isfinite(values).all():
            axis.legend()
        if place == 0:
            axis.set_title(textwrap.fill(result.message, 90), fontsize="medium")
    for axis in axes if ax is not None else axes[-1:]:
        _count_steps(axis)
    return axes[0] if ax is not None and not isinstance(ax, (list, tuple, np.ndarray)) else axes


def draw_comparison(results: Mapping[str, Any], name: str, ax: Any) -> Any:
    """Draws one quantity of several runs in one panel; see `plots.compare`."""
    if not isinstance(results, Mapping) or not results:
        raise TypeError(f"`results` must be a dict of results by their names, received {describe(results)}.")
    series = {label: _series(result.history, name) for label, result in results.items()}
    (axis,) = _panels(1, ax)
    for label, values in series.items():
        _line(axis, values, label=f"{label}: {results[label].steps} steps", with_end=results[label].reason)
    axis.set_yscale(**scale_for(list(series.values())))
    axis.set_ylabel(_LABELS.get(name, name))
    _count_steps(axis)
    axis.legend()
    return axis


def draw_trajectory(result: Any, name: Any, function: Any, ax: Any, label: str | None = None) -> Any:
    """Draws the way of the variables in a plane; see `OptimizationResult.plot_trajectory`."""
    path, labels = _path(result.history, name)
    finite = np.isfinite(path).all(axis=1)
    if not finite.any():
        raise ValueError(f"`name` must be a measure with finite values, received {name!r}, which has none.")
    path = path[finite]
    centre, plane = np.zeros(path.shape[1]), np.eye(path.shape[1])
    if path.shape[1] > 2:
        centre, plane, labels = _principal_plane(path)
    flat = (path - centre) @ plane.T
    (axis,) = _panels(1, ax, size=(6.4, 5.6))
    low, high = _limits(axis, flat)
    if function is not None:
        _contours(axis, function, low, high, centre, plane)
    points = _points_of_path(flat, (high - low) / _COLUMNS)
    marker = "." if len(points) <= _MARKERS else None
    (line,) = axis.plot(*points.T, marker=marker, label=f"{result.steps} steps" if label is None else label)
    ends = {"color": line.get_color(), "linestyle": "none", "zorder": line.get_zorder() + 1}  # over other paths, too
    axis.plot(*flat[0], marker="o", markerfacecolor="none", **ends)
    axis.plot(*flat[-1], marker="*", markersize=15, markeredgecolor="white", **ends)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    return axis


def _names_to_draw(history: Mapping[str, np.ndarray], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [name for name in _LABELS if name in history]
    if isinstance(names, str) or not names:
        raise TypeError(f"`names` must be a list of names of the history, received {describe(names)}.")
    return list(names)


def _series(history: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Returns a recorded quantity as floats, of shape `(steps,)`."""
    columns = _exchange.columns(history)
    if name not in columns:
        raise ValueError(f"`name` must be in the history, which has {', '.join(columns)}; received {name!r}.")
    return np.asarray(columns[name], np.float64)


def _panels(count: int, ax: Any, size: tuple[float, float] | None = None) -> list[Any]:
    """Returns the axes to draw in: those given, or those of a new figure of pyplot."""
    if ax is None:
        plt = _exchange.package("matplotlib.pyplot", "a plot", "plot")
        _, axes = plt.subplots(
            count, 1, sharex=True, squeeze=False, figsize=size or (7.0, 1.2 + 2.6 * count), layout="constrained"
        )
        return list(axes[:, 0])
    axes = list(ax) if isinstance(ax, (list, tuple)) else list(np.ravel(np.asarray(ax, object)))
    if len(axes) != count:
        raise ValueError(f"`ax` must have as many axes as quantities are drawn, {count}, received {len(axes)}.")
    return axes


def _line(axis: Any, values: np.ndarray, label: str, with_end: Any) -> None:
    """Draws a quantity over the steps, with a mark at the end that tells how the run ended."""
    steps, drawn = thinned(values)
    (line,) = axis.plot(steps, drawn, label=label, marker="." if len(values) <= _MARKERS else None)
    finite = np.flatnonzero(np.isfinite(values))
    if finite.size:
        marker = _END.get(with_end.name, "D")
        axis.plot(
            finite[-1] + 1,
            values[finite[-1]],
            marker=marker,
            markersize=7,
            color=line.get_color(),
            linestyle="none",
            clip_on=False,
        )
    lost = np.flatnonzero(~np.isfinite(values))
    if lost.size:
        shown = np.unique(np.linspace(0, lost.size - 1, min(lost.size, _COLUMNS)).astype(int))
        axis.plot(
            lost[shown] + 1,
            np.full(shown.size, 0.02),
            transform=axis.get_xaxis_transform(),
            marker="|",
            markersize=9,
            color="red",
            linestyle="none",
            label=f"{lost.size:,} not finite",
        )


def _count_steps(axis: Any) -> None:
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _epoch_curve(result: Any, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    if name not in result.epoch_history:
        return None
    return result.epoch_steps[name], np.asarray(result.epoch_history[name], np.float64)


def _mark_epochs(axis: Any, result: Any) -> None:
    """Draws a faint line at the end of each epoch, unless they would be all that is seen."""
    ends = result.epoch_steps.get("loss", ())
    if 1 < len(ends) <= _MARKERS:
        for end in ends:
            axis.axvline(end, color="gray", alpha=0.3, linewidth=0.8, zorder=0)


def _path(history: Mapping[str, np.ndarray], name: Any) -> tuple[np.ndarray, list[str]]:
    """Returns the points of a path, of shape `(steps, n)`, and the names of the coordinates."""
    wide = [key for key, values in history.items() if values.ndim > 1 and values[0].size > 1]
    if name is None:
        if len(wide) != 1:
            raise ValueError(
                "`name` must be given: a measure of at least two numbers, or a list of two of one number each; the"
                f" history has {', '.join(history)}."
            )
        name = wide[0]
    if isinstance(name, str):
        if name not in wide:
            raise ValueError(f"`name` must be a measure of at least two numbers, received {name!r}.")
        values = np.asarray(history[name], np.float64).reshape(len(history[name]), -1)
        return values, list(_exchange.columns({name: history[name]}))
    names = list(name)
    if len(names) < 2:
        raise ValueError(f"`name` must be the names of at least two quantities, received {describe(name)}.")
    return np.stack([_series(history, each) for each in names], axis=1), names


def _principal_plane(path: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the mean of a path, and the two directions in which it goes farthest, with their shares."""
    centre = path.mean(axis=0)
    covariance = (path - centre).T @ (path - centre)
    values, vectors = np.linalg.eigh(covariance)
    shares = values[::-1][:2] / max(values.sum(), np.finfo(float).tiny)
    labels = [f"principal component {n} ({share:.0%} of the variance)" for n, share in enumerate(shares, 1)]
    return centre, vectors[:, ::-1][:, :2].T, labels


def _limits(axis: Any, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and highest coordinates: those that the axes have been given, else around what is drawn."""
    drawn = axis.dataLim
    low, high = np.minimum(flat.min(axis=0), drawn.p0), np.maximum(flat.max(axis=0), drawn.p1)
    margin = 0.15 * np.maximum(high - low, 1e-9 + 0.15 * (high - low).max())
    low, high = low - margin, high + margin
    if not axis.get_autoscalex_on():
        low[0], high[0] = sorted(axis.get_xlim())
    if not axis.get_autoscaley_on():
        low[1], high[1] = sorted(axis.get_ylim())
    return low, high


def _contours(axis: Any, function: Any, low: Any, high: Any, centre: np.ndarray, plane: np.ndarray) -> None:
    """Draws the levels of a function in a plane, closer to one another near its lowest."""
    first, second = np.meshgrid(*(np.linspace(a, b, _GRID) for a, b in zip(low, high, strict=True)))
    points = centre + first[..., None] * plane[0] + second[..., None] * plane[1]
    heights = np.asarray(function(*np.moveaxis(points, -1, 0)), np.float64)
    if heights.shape != first.shape:
        raise ValueError(
            "`function` must take an array for each coordinate and return one number for each point, of shape"
            f" {first.shape}, received shape {heights.shape}."
        )
    finite = heights[np.isfinite(heights)]
    if finite.size and finite.max() > finite.min():
        levels = finite.min() + (finite.max() - finite.min()) * np.linspace(0.0, 1.0, 18) ** 4
        shown = np.ma.masked_invalid(heights)
        axis.contour(first, second, shown, levels=levels[1:], linewidths=0.7, alpha=0.6, colors="gray", zorder=0.5)


def _points_of_path(flat: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Returns the points of a path without those that fall on the one before, at most `_PATH_POINTS`."""
    cells = np.floor(flat / pixel).astype(np.int64)
    moved = np.append(True, np.any(np.diff(cells, axis=0) != 0, axis=1))
    moved[-1] = True
    points = flat[moved]
    return points[np.unique(np.linspace(0, len(points) - 1, min(len(points), _PATH_POINTS)).astype(int))]
