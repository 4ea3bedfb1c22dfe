"""Pictures of runs: what is drawn, how little of it, and that nothing else changes."""

from __future__ import annotations

import sys

import keras
import matplotlib
import matplotlib.figure
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit._drawing import scale_for, thinned


@pytest.fixture
def ax():
    return matplotlib.figure.Figure().add_subplot()


def _result(loss, **fields):
    """A result as if a run had recorded these losses."""
    loss = np.asarray(loss, float)
    reason = fields.pop("reason", tk.StopReason.LIMIT)
    history = {"loss": loss} | fields.pop("history", {})
    return tk.OptimizationResult(1.0, [], len(loss), len(loss), 1.0, reason, "why it ended", history, **fields)


def _lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines if not line.get_label().startswith("_")}


def test_a_short_run_is_drawn_point_by_point_from_step_1(ax):
    _result([3.0, 2.0, 1.0]).plot(ax=ax)
    np.testing.assert_array_equal(_lines(ax)["loss"], [[1, 3], [2, 2], [3, 1]])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("step", "loss", "why it ended")


def test_a_million_steps_are_drawn_by_some_thousand_points_with_every_peak(ax):
    values = np.ones(1_000_000)
    values[[0, 123_457, 777_777, -1]] = 5.0, 1e6, 1e-6, 7.0
    _result(values).plot(ax=ax)
    drawn = _lines(ax)["loss"]
    assert len(drawn) <= 4000
    assert {tuple(point) for point in drawn} >= {(1, 5.0), (123_458, 1e6), (777_778, 1e-6), (1_000_000, 7.0)}


@pytest.mark.parametrize("count", [1, 2, 3999, 4000, 4001, 4003, 12_345])
def test_thinning_keeps_the_order_the_ends_and_the_extremes(count):
    values = np.random.default_rng(count).normal(size=count)
    steps, drawn = thinned(values)
    assert len(steps) <= 4000
    assert np.all(np.diff(steps) > 0)
    np.testing.assert_array_equal(values[steps - 1], drawn)
    assert (steps[0], steps[-1]) == (1, count)
    assert (drawn.min(), drawn.max()) == (values.min(), values.max())


def test_thinning_leaves_a_gap_where_nothing_is_finite():
    values = np.ones(100_000)
    values[40_000:60_000] = np.nan
    steps, drawn = thinned(values)
    lost = np.isnan(drawn)
    assert 40_000 < steps[lost].min() <= steps[lost].max() <= 60_000
    assert lost.sum() < 1000
    assert np.isfinite(drawn[[0, -1]]).all()


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 2.0], "linear"),
        ([1.0, 1e-6], "log"),
        ([1.0, 1e-6, 0.0], "log"),
        ([1.0, np.nan, 1e-6, np.inf], "log"),
        ([1000.0, *[-3.0] * 9], "symlog"),
        ([1.0, -1.0, 0.01], "linear"),
        ([0.0, 0.0], "linear"),
        ([np.nan], "linear"),
        ([], "linear"),
    ],
)
def test_scale_is_the_one_on_which_the_numbers_can_be_read(values, scale, ax):
    assert scale_for([np.asarray(values, float)])["value"] == scale
    _result(values).plot(ax=ax)
    assert ax.get_yscale() == scale
    ax.figure.canvas.draw()


def test_steps_that_were_not_finite_are_marked_and_counted(ax):
    _result([3.0, np.nan, 2.0, np.inf], reason=tk.StopReason.NOT_FINITE).plot(ax=ax)
    np.testing.assert_array_equal(_lines(ax)["2 not finite"][:, 0], [2, 4])
    (end,) = (line for line in ax.lines if line.get_marker() == "X")
    np.testing.assert_array_equal(end.get_xydata(), [[3, 2.0]])


@pytest.mark.parametrize(
    ("reason", "marker"), [("CONVERGED", "o"), ("LIMIT", "s"), ("NOT_FINITE", "X"), ("STOPPED", "D")]
)
def test_the_mark_at_the_end_tells_how_the_run_ended(reason, marker, ax):
    _result(np.arange(100.0), reason=tk.StopReason[reason]).plot(ax=ax)
    assert ax.lines[-1].get_marker() == marker
    np.testing.assert_array_equal(ax.lines[-1].get_xydata(), [[100, 99.0]])


def test_gradient_norm_and_learning_rate_have_panels_where_they_were_recorded():
    x, optimizer = tf.Variable([0.0, 1.0]), keras.optimizers.SGD(0.1)
    loop = tk.OptimizationLoop(
        optimizer,
        stopping=tk.stopping.GradientNormBelow(1e-3),
        max_iterations=20,
        measures={"learning_rate": lambda: tf.identity(optimizer.learning_rate), "x": lambda: x},
    )
    result = loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x])
    axes = list(matplotlib.figure.Figure().subplots(3))
    drawn = result.plot(ax=axes)
    assert drawn == axes
    assert [axis.get_ylabel() for axis in axes] == ["loss", "gradient norm", "learning rate"]
    np.testing.assert_allclose(_lines(axes[1])["gradient_norm"][:, 1], result.history["gradient_norm"])
    np.testing.assert_allclose(_lines(axes[2])["learning_rate"][:, 1], 0.1)

    (axis,) = result.plot(["x[1]"], ax=[matplotlib.figure.Figure().add_subplot()])
    np.testing.assert_allclose(_lines(axis)["x[1]"][:, 1], result.history["x"][:, 1])


def test_epochs_and_validation_are_at_the_steps_at_which_they_were(ax):
    x = np.linspace(-1.0, 1.0, 40, dtype="float32")[:, None]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    result = tk.OptimizationLoop().fit(
        model, x, x, batch_size=8, epochs=4, validation_data=(x, x), validation_freq=2, verbose=0
    )
    np.testing.assert_array_equal(result.epoch_steps["loss"], [5, 10, 15, 20])
    np.testing.assert_array_equal(result.epoch_steps["val_loss"], [10, 20])
    result.plot(ax=ax)
    np.testing.assert_allclose(_lines(ax)["val_loss"], np.stack([[10, 20], result.epoch_history["val_loss"]], axis=1))
    ends = [line.get_xdata()[0] for line in ax.lines if line.get_color() == "gray"]
    assert ends == [5, 10, 15, 20]


def test_nothing_global_changes_where_axes_are_given(ax):
    plt = pytest.importorskip("matplotlib.pyplot")
    before, figures = dict(matplotlib.rcParams), plt.get_fignums()
    result = _result([3.0, 2.0], history={"x": np.array([[1.0, 2.0], [3.0, 4.0]])})
    result.plot(ax=ax)
    result.plot_trajectory(ax=ax)
    tk.plots.compare({"a": result}, ax=ax)
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == figures


def test_without_axes_a_figure_is_made(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"backend": "agg"}):
        axes = _result([3.0, 2.0]).plot()
    assert axes[0].figure.number in plt.get_fignums()
    plt.close(axes[0].figure)


def test_missing_matplotlib_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'^a plot needs matplotlib, which .*: pip install "tapekit\[plot\]"\.$'):
        _result([1.0]).plot()


def test_runs_are_compared_on_one_scale(ax):
    drawn = tk.plots.compare({"first": _result([10.0, 1.0]), "second": _result([5.0, 4.0, 1e-3])}, ax=ax)
    assert drawn is ax
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["first: 2 steps", "second: 3 steps"]


def test_a_path_in_two_coordinates_is_drawn_over_the_levels_of_the_function(ax):
    path = np.array([[0.0, 0.0], [1.0, 0.5], [2.0, 1.0]])
    result = _result([3.0, 2.0, 1.0], history={"x": path})
    result.plot_trajectory("x", lambda a, b: (a - 2.0) ** 2 + (b - 1.0) ** 2, ax)
    np.testing.assert_array_equal(_lines(ax)["3 steps"], path)
    (levels,) = ax.collections
    assert levels.levels.min() > 0.0
    assert levels.levels.max() == pytest.approx(np.sum(np.square([2.3, 1.15])), rel=1e-3)  # the far corner


def test_levels_are_drawn_as_far_as_the_axes_show_and_paths_have_their_own_labels(ax):
    ax.set(xlim=(-5.0, 5.0), ylim=(-3.0, 3.0))
    for label, end in (("near", 1.0), ("far", 4.0)):
        result = _result([2.0, 1.0], history={"x": np.array([[0.0, 0.0], [end, 1.0]])})
        result.plot_trajectory("x", (lambda a, b: a**2 + b**2) if label == "near" else None, ax, label=label)
    assert set(_lines(ax)) == {"near", "far"}
    (levels,) = ax.collections
    assert levels.levels.max() == pytest.approx(34.0)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-5.0, 5.0), (-3.0, 3.0))


def test_the_ends_of_paths_are_drawn_over_all_paths(ax):
    for end in (1.0, 2.0):
        _result([2.0, 1.0], history={"x": np.array([[0.0, 0.0], [end, 1.0]])}).plot_trajectory("x", ax=ax)
    ends, paths = ([line for line in ax.lines if (line.get_marker() in "*o") == is_end] for is_end in (True, False))
    assert len(ends) == 4
    assert min(line.get_zorder() for line in ends) > max(line.get_zorder() for line in paths)


def test_levels_reach_around_all_paths_in_the_axes(ax):
    seen = []
    for name, end in (("first", [1.0, 3.0]), ("second", [-1.0, 1.0])):
        result = _result([2.0, 1.0], history={"x": np.array([[0.0, 0.0], end])})
        levels = (lambda a, b: seen.extend([a, b]) or a + b) if name == "second" else None
        result.plot_trajectory("x", levels, ax, label=name)
    assert list(_lines(ax)) == ["first", "second"]
    np.testing.assert_allclose([(c.min(), c.max()) for c in seen], [(-1.3, 1.3), (-0.45, 3.45)])


@pytest.mark.parametrize("limits", [(-5.0, 7.0), (7.0, -5.0)])
def test_levels_fill_the_limits_that_the_axes_have_been_given(limits, ax):
    ax.set_xlim(*limits)
    seen = []
    result = _result([2.0, 1.0], history={"x": np.array([[0.0, 0.0], [1.0, 1.0]])})
    result.plot_trajectory("x", lambda a, b: seen.extend([a, b]) or a + b, ax)
    np.testing.assert_allclose([(c.min(), c.max()) for c in seen], [(-5.0, 7.0), (-0.15, 1.15)])
    assert ax.get_xlim() == limits


def test_levels_leave_out_where_the_function_is_not_finite(ax):
    def function(a, b):
        return np.where(a > 0.5, np.inf, np.where(a < 0.0, np.nan, a + b))

    result = _result([2.0, 1.0], history={"x": np.array([[0.0, 0.0], [1.0, 1.0]])})
    result.plot_trajectory("x", function, ax)
    drawn = np.concatenate([path.vertices for path in ax.collections[0].get_paths() if len(path.vertices)])
    assert drawn[:, 0].min() == pytest.approx(0.0, abs=0.01)
    assert drawn[:, 0].max() == pytest.approx(0.5, abs=0.01)


def test_a_path_of_two_scalars_may_be_named(ax):
    a, b = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    _result([3.0, 2.0], history={"a": a, "b": b}).plot_trajectory(["a", "b"], ax=ax)
    np.testing.assert_array_equal(_lines(ax)["2 steps"], np.stack([a, b], axis=1))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")


def test_a_path_in_many_coordinates_is_projected_to_where_it_goes(ax):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 2)))
    plane = np.stack([3.0 * np.cos(np.arange(30.0)), np.sin(np.arange(30.0))], axis=1)
    result = _result(np.arange(30.0), history={"z": plane @ basis.T + 1.0})
    heights = []
    result.plot_trajectory(function=lambda *z: heights.append(len(z)) or sum(c**2 for c in z), ax=ax)
    assert heights == [6]
    shown, true = _lines(ax)["30 steps"], plane - plane.mean(axis=0)
    np.testing.assert_allclose(shown @ shown.T, true @ true.T, atol=1e-9)  # the same up to rotation
    shares = [float(text.split("(")[1].split("%")[0]) for text in (ax.get_xlabel(), ax.get_ylabel())]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares[0] > shares[1]


def test_a_path_of_a_million_steps_is_drawn_by_few_points(ax):
    turns = np.linspace(0.0, 20.0, 1_000_000)
    path = np.stack([np.cos(turns), np.sin(turns)], axis=1) * np.exp(-turns / 5.0)[:, None]
    _result(np.ones(len(path)), history={"x": path}).plot_trajectory(ax=ax)
    drawn = _lines(ax)["1000000 steps"]
    assert len(drawn) <= 20_000
    np.testing.assert_array_equal(drawn[[0, -1]], path[[0, -1]])


@pytest.mark.parametrize(
    ("draw", "error", "sentence"),
    [
        (
            lambda r, ax: r.plot(["lss"], ax),
            ValueError,
            r"`name` must be in the history, which has .*'lss'",
        ),
        (lambda r, ax: r.plot("loss", ax), TypeError, "`names` must be a list of names of the history"),
        (lambda r, ax: r.plot(["loss", "x[0]"], ax), ValueError, "as many axes as quantities are drawn, 2, received 1"),
        (lambda r, ax: tk.plots.compare({}, ax=ax), TypeError, "`results` must be a dict of results"),
        (lambda r, ax: tk.plots.compare([r], ax=ax), TypeError, "`results` must be a dict of results"),
        (lambda r, ax: r.plot_trajectory("loss", ax=ax), ValueError, "a measure of at least two numbers"),
        (lambda r, ax: r.plot_trajectory(["loss"], ax=ax), ValueError, "names of at least two quantities"),
        (lambda r, ax: _result([1.0]).plot_trajectory(ax=ax), ValueError, "`name` must be given"),
        (lambda r, ax: r.plot_trajectory("x", lambda a, b: 1.0, ax), ValueError, r"received shape \(\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(draw, error, sentence, ax):
    result = _result([3.0, 2.0], history={"x": np.array([[1.0, 2.0], [3.0, 4.0]])})
    with pytest.raises(error, match=sentence):
        draw(result, ax)
