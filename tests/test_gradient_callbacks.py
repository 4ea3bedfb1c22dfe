"""Callbacks that change, follow and check gradients, against NumPy."""

from __future__ import annotations

import contextlib
import json
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import BY_NAME, DRIVERS

import tapekit as tk
from tapekit import _drivers
from tapekit._objective import keras_variable
from tapekit.callbacks import (
    CaptureGradients,
    CentralizeGradients,
    CheckGradients,
    ClipGradients,
    FreezeVariables,
    GradientNoise,
    GradientStatistics,
    ScaleGradients,
)
from tapekit.callbacks._variables_model import VariablesModel

EAGER = DRIVERS["eager"]
over_drivers = pytest.mark.parametrize("driver", DRIVERS.values(), ids=DRIVERS)
over_steps = pytest.mark.parametrize("step", ["tape", "minimize"])


class Linear:
    """A loss whose gradients are known numbers, whatever the variables: dense ones, an embedding's, four dtypes."""

    ROWS = (0, 2, 2)  # row 2 twice: its gradients add up

    def __init__(self, scale=1.0):
        random = np.random.default_rng(0)
        self.slopes = {"layer/kernel": random.normal(size=(2, 3, 2)), "layer/bias": random.normal(size=3)}
        self.slopes |= {"half": np.float64(0.75), "table": random.normal(size=(3, 2))}
        self.slopes = {name: scale * slope for name, slope in self.slopes.items()}
        self.variables = [
            tf.Variable(np.zeros((2, 3, 2)), name="layer/kernel"),
            tf.Variable(np.zeros(3, np.float32), name="layer/bias"),
            keras.Variable(0.0, dtype="float16", name="half"),
            tf.Variable(np.zeros((4, 2)), name="table"),
        ]
        self.gradients = {
            name: slope.astype(v.dtype) for (name, slope), v in zip(self.slopes.items(), self.arrays(), strict=True)
        }
        self.gradients["table"] = np.zeros((4, 2))
        np.add.at(self.gradients["table"], list(self.ROWS), self.slopes["table"])

    def arrays(self):
        return [np.asarray(v) for v in self.variables]

    def __call__(self):
        kernel, bias, half, table = self.variables
        parts = [kernel, bias, half.value, tf.gather(table, self.ROWS)]
        slopes = self.slopes.values()
        return tf.add_n([tf.reduce_sum(tf.cast(p, tf.float64) * s) for p, s in zip(parts, slopes, strict=True)])


def _run(problem, callbacks, driver=EAGER, step="tape", steps=3, optimizer=None, **more):
    """Runs SGD of rate 1, so that an update is minus the gradient."""
    optimizer = optimizer or keras.optimizers.SGD(1.0)
    loop = tk.OptimizationLoop(optimizer, step=step, max_iterations=steps, **{**driver, **more})
    return loop, loop.minimize(problem, problem.variables, callbacks=callbacks)


def _applied(problem, callbacks, *args, **more):
    """The gradients that three steps apply: for each name an array of shape (steps, ...)."""
    after = CaptureGradients()
    _, result = _run(problem, [*callbacks, after], *args, **more)
    applied = after.gradients
    for name, value in zip(applied, result.variables, strict=True):
        rtol = 1e-2 if value.dtype == np.float16 else 1e-6
        np.testing.assert_allclose(value, -applied[name].astype(np.float64).sum(0), rtol, atol=rtol)
    return applied


def _norm(*gradients):
    return np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in gradients))


def _close(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        rtol = {"float16": 2e-3, "float32": 2e-6}.get(found[name].dtype.name, 1e-12)
        assert found[name].shape[1:] == np.shape(value)
        for row in found[name]:
            np.testing.assert_allclose(row, value, rtol, atol=1e-3 * rtol, err_msg=name)


# Each callback that depends on nothing but the gradients, with what NumPy makes of a dict of them.

TRANSFORMS = {
    "clip by value": (
        ClipGradients(value=0.5, log="value"),
        lambda gs: {name: np.clip(g, -0.5, 0.5) for name, g in gs.items()},
    ),
    "clip by norm": (
        ClipGradients(norm=1.0, log="norm"),
        lambda gs: {name: g / max(1.0, _norm(g)) for name, g in gs.items()},
    ),
    "clip by global norm": (
        ClipGradients(global_norm=1.0),
        lambda gs: {name: g / max(1.0, _norm(*gs.values())) for name, g in gs.items()},
    ),
    "scale": (
        ScaleGradients({"^layer": 3.0, "kernel$|table": -0.5}),
        lambda gs: {
            name: g * {"layer/kernel": -1.5, "layer/bias": 3.0, "half": 1.0, "table": -0.5}[name]
            for name, g in gs.items()
        },
    ),
    "freeze": (
        FreezeVariables("bias|table"),
        lambda gs: {name: g * (name not in ("layer/bias", "table")) for name, g in gs.items()},
    ),
    "centralize": (
        CentralizeGradients(),
        lambda gs: {
            name: g - g.mean(tuple(range(g.ndim - 1)), keepdims=True) if g.ndim > 1 else g for name, g in gs.items()
        },
    ),
}


@over_drivers
@over_steps
def test_each_callback_does_to_the_gradients_that_reach_it_what_numpy_does(step, driver):
    for names in (list(TRANSFORMS), list(TRANSFORMS)[::-1])[: 2 if driver is EAGER else 1]:
        problem, captures = Linear(), [CaptureGradients() for _ in range(len(TRANSFORMS) + 1)]
        pairs = zip((TRANSFORMS[name][0] for name in names), captures[1:], strict=True)
        _, result = _run(problem, [captures[0], *(item for pair in pairs for item in pair)], driver, step)
        _close(captures[0].gradients, problem.gradients)
        expected = problem.gradients
        for name, before, capture in zip(names, captures[:-1], captures[1:], strict=True):
            expected = TRANSFORMS[name][1](expected)
            _close(capture.gradients, expected)
            if log := getattr(TRANSFORMS[name][0], "log", None):
                norms = [_norm(*gradients) for gradients in zip(*before.gradients.values(), strict=True)]
                np.testing.assert_allclose(result.history[log], norms, 1e-12)


@over_drivers
def test_callbacks_that_only_transform_make_no_chunk_shorter(driver, advances):
    callbacks = [
        *(callback for callback, _ in TRANSFORMS.values()),
        GradientNoise(0.1),
        CheckGradients(on_failure="warn"),
    ]
    problem = Linear()
    _run(problem, callbacks[::-1], driver, steps=9)
    assert advances == ([1] * 9 if driver is EAGER else [9])


@pytest.fixture
def advances(monkeypatch):
    """The lengths of the chunks that the drivers take, which nothing but callbacks makes shorter."""
    lengths = []
    monkeypatch.setattr(_drivers.Pace, "limit", lambda self: 1 << 30)
    for cls in (_drivers.CompiledDriver, _drivers.EagerDriver):
        original = cls.advance

        def advance(self, state, limit, seconds, original=original):
            chunk = original(self, state, limit, seconds)
            lengths.append(chunk.taken)
            return chunk

        monkeypatch.setattr(cls, "advance", advance)
    return lengths


# ClipGradients.


def test_each_of_two_clips_records_under_its_own_name_or_not_at_all():
    first, second, third = ClipGradients(value=0.5), ClipGradients(norm=0.1, log="second"), ClipGradients(1.0, log=None)
    problem = Linear()
    _, result = _run(problem, [first, second, third])
    assert set(result.history) == {"loss", "unclipped_norm", "second"}
    clipped = [np.clip(g, -0.5, 0.5) for g in problem.gradients.values()]
    np.testing.assert_allclose(result.history["second"], [_norm(*clipped)] * 3, 1e-6)


def test_two_clips_under_one_name_are_told_so():
    with pytest.raises(ValueError, match=r"^`name` must be new in the logs of a step, received 'unclipped_norm'"):
        _run(Linear(), [ClipGradients(1.0), ClipGradients(1.0)])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("limit", ["value", "norm", "global_norm"])
def test_gradients_within_the_limit_keep_every_bit(limit, compiled):
    gradients = [tf.constant(value) for name, value in Linear().gradients.items() if name != "half"]
    callback = ClipGradients(**{limit: _norm(*gradients) * 1.001}, log=None)
    clipped = tf.function(lambda: callback.on_gradient(gradients, None), jit_compile=compiled)()
    for found, expected in zip(clipped, gradients, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected.numpy())


@over_drivers
def test_a_norm_whose_square_overflows_is_clipped_all_the_same(driver):
    x = tf.Variable([0.0, 0.0], dtype=tf.float64)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(1.0), max_iterations=1, **driver)
    slope = tf.constant([3e200, 4e200], tf.float64)
    result = loop.minimize(lambda: tf.reduce_sum(slope * x), [x], callbacks=[ClipGradients(global_norm=5.0)])
    np.testing.assert_allclose(x.numpy(), [-3.0, -4.0], 1e-12)
    np.testing.assert_allclose(result.history["unclipped_norm"], [5e200], 1e-12)


@pytest.mark.parametrize("limit", ["norm", "global_norm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_leaves_no_number(bad, limit):
    callback = ClipGradients(**{limit: 1.0}, log=None)
    (clipped,) = callback.on_gradient([tf.constant([1.0, bad])], [tf.Variable([0.0, 0.0])])
    assert np.isnan(clipped.numpy()).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_clipping_by_value_keeps_nan(compiled):
    callback = ClipGradients(value=1.0, log=None)
    clip = tf.function(lambda g: callback.on_gradient([g], [None])[0], jit_compile=compiled)
    np.testing.assert_array_equal(clip(tf.constant([np.nan, -np.inf, 3.0])).numpy(), [np.nan, -1.0, 1.0])


@over_drivers
def test_gradients_of_zero_stay_zero(driver):
    x = tf.Variable([1.0, 2.0])
    loop = tk.OptimizationLoop("sgd", max_iterations=2, **driver)
    result = loop.minimize(lambda: tf.reduce_sum(0.0 * x), [x], callbacks=[ClipGradients(norm=1.0)])
    assert x.numpy().tolist() == [1.0, 2.0]
    assert result.history["unclipped_norm"].tolist() == [0.0, 0.0]


# GradientNoise.


class Flat:
    """A loss without slope, so that the gradient that is applied is the noise."""

    def __init__(self, *shapes, dtype="float64"):
        self.variables = [tf.Variable(np.zeros(shape, dtype), name=f"v{i}") for i, shape in enumerate(shapes)]

    def __call__(self):
        return tf.add_n([tf.reduce_sum(0.0 * variable) for variable in self.variables])


def _noise(callback, *shapes, driver=DRIVERS["graph"], **more):
    return list(_applied(Flat(*shapes), [callback], driver, **more).values())


def test_noise_is_gaussian_of_the_annealed_variance():
    (noise,) = _noise(GradientNoise(eta=0.3, gamma=0.55), (100, 400), steps=4)
    n = noise[0].size
    for t, drawn in enumerate(noise):
        standard = drawn / np.sqrt(0.3 / (1 + t) ** 0.55)
        assert abs(standard.mean()) < 5 / np.sqrt(n)
        assert abs(standard.var() - 1) < 5 * np.sqrt(2 / n)
        assert abs((standard**3).mean()) < 5 * np.sqrt(15 / n)
        assert abs((standard**4).mean() - 3) < 5 * np.sqrt(96 / n)
        assert abs((np.abs(standard) < 0.67449).mean() - 0.5) < 5 * np.sqrt(0.25 / n)


def test_noise_of_different_variables_steps_and_seeds_is_independent():
    one, other = _noise(GradientNoise(1.0, gamma=0.0), (20_000,), (20_000,), steps=2)
    (seeded, _) = _noise(GradientNoise(1.0, gamma=0.0, seed=1), (20_000,), (20_000,), steps=2)
    draws = np.stack([*one, *other, *seeded])
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)


@over_steps
def test_noise_is_that_of_every_other_driver_run_and_chunk(step):
    callback = GradientNoise(0.3, seed=7)
    runs = [_noise(callback, (2, 3), (5,), driver=driver, step=step, steps=6) for driver in DRIVERS.values()]
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            np.testing.assert_allclose(found, expected, 1e-12)
    problem = Flat((2, 3), (5,))
    for length in (1, 4):
        for variable in problem.variables:
            variable.assign(tf.zeros_like(variable))
        loop, result = _run(problem, [callback], DRIVERS["xla"], step, steps=6, steps_per_execution=length)
        values = [value.copy() for value in result.variables]
        for variable in problem.variables:
            variable.assign(tf.zeros_like(variable))
        again = loop.minimize(problem, problem.variables, callbacks=[callback]).variables
        for found, more, expected in zip(values, again, runs[2], strict=True):
            np.testing.assert_array_equal(found, more)
            np.testing.assert_allclose(found, -expected.sum(0), 1e-10)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_noise_comes_in_the_dtype_of_the_gradient(dtype):
    gradients = [tf.zeros(8, dtype), tf.zeros(8, tf.float64)]
    noise = GradientNoise(1.0)
    noise.on_train_begin()
    rounded, _ = noise.on_gradient(gradients, [None, None])
    noise.on_train_begin()
    exact, _ = noise.on_gradient([tf.zeros(8, tf.float64), gradients[1]], [None, None])
    np.testing.assert_array_equal(rounded.numpy(), exact.numpy().astype(rounded.dtype.as_numpy_dtype))


# FreezeVariables.


@over_drivers
@over_steps
def test_a_variable_is_frozen_for_as_many_steps_of_every_run(step, driver):
    problem, freeze, capture = Linear(), FreezeVariables("^table$|half", until=4), CaptureGradients()
    loop = tk.OptimizationLoop(keras.optimizers.SGD(1.0), step=step, max_iterations=6, **driver)
    for _ in range(2):
        loop.minimize(problem, problem.variables, callbacks=[freeze, capture])
        for name, gradient in problem.gradients.items():
            steps = [gradient * (name not in ("half", "table") or t >= 4) for t in range(6)]
            np.testing.assert_allclose(capture.gradients[name], steps, 1e-6)


OPTIMIZERS = [
    cls
    for cls in vars(keras.optimizers).values()
    if isinstance(cls, type) and issubclass(cls, keras.optimizers.Optimizer) and cls is not keras.optimizers.Optimizer
]


def _optimizer(cls):
    sub = {"x": keras.optimizers.Adam(0.1), "y": keras.optimizers.AdamW(0.1, weight_decay=0.1)}
    if cls.__name__ == "MultiOptimizer":
        return cls(lambda variable: sub[variable.name])
    if cls is keras.optimizers.LossScaleOptimizer:
        return cls(keras.optimizers.Adam(0.1), initial_scale=8.0)
    return cls()


class Bowl:
    """Two variables that want to go to 4."""

    def __init__(self):
        self.variables = [tf.Variable([1.0, 2.0], name="x"), tf.Variable([3.0, 5.0], name="y")]

    def __call__(self):
        return tf.add_n([tf.reduce_sum((variable - 4.0) ** 2) for variable in self.variables])


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_a_frozen_variable_keeps_every_bit_with_every_optimizer_but_ftrl(cls):
    optimizer = _optimizer(cls)
    for name in ("weight_decay", "adam_weight_decay"):
        if getattr(optimizer, name, None):
            setattr(optimizer, name, 0.0)
    bowl = Bowl()
    _run(bowl, [FreezeVariables("x")], steps=5, optimizer=optimizer)
    kept = bowl.variables[0].numpy().tolist() == [1.0, 2.0]
    assert kept is (cls is not keras.optimizers.Ftrl)
    assert bowl.variables[1].numpy().tolist() != [3.0, 5.0]


def test_momentum_from_an_earlier_run_goes_on_as_the_docstring_says():
    bowl, optimizer = Bowl(), keras.optimizers.SGD(0.01, momentum=0.9)
    _run(bowl, [], optimizer=optimizer)
    before = bowl.variables[0].numpy()
    _run(bowl, [FreezeVariables("x")], optimizer=optimizer)
    assert not np.array_equal(bowl.variables[0].numpy(), before)


@over_drivers
@pytest.mark.parametrize("scaled", [False, True])
def test_weight_decay_of_a_frozen_variable_is_refused_before_anything_moves(scaled, driver):
    optimizer = keras.optimizers.AdamW(weight_decay=0.1)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
    bowl = Bowl()
    with pytest.raises(ValueError, match=r"^`optimizer` must not decay the weights of frozen variables, .* moves x "):
        _run(bowl, [FreezeVariables("x")], driver, optimizer=optimizer)
    assert bowl.variables[0].numpy().tolist() == [1.0, 2.0]


@over_drivers
def test_a_frozen_variable_that_is_excluded_from_weight_decay_stays(driver):
    bowl, optimizer = Bowl(), keras.optimizers.AdamW(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["x"])
    _run(bowl, [FreezeVariables("x")], driver, optimizer=optimizer)
    assert bowl.variables[0].numpy().tolist() == [1.0, 2.0]


# Names and patterns.


@over_drivers
@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (FreezeVariables("kernal"), "^`pattern` must match a variable, one of layer/kernel, layer/bias, half, table, "),
        (ScaleGradients({"bias": 2.0, "^bias": 3.0}), r"^`factors` must match a variable, .*, received '\^bias'\.$"),
    ],
)
def test_a_pattern_that_matches_no_variable_is_refused_with_the_names_before_anything_moves(callback, sentence, driver):
    problem = Linear()
    with pytest.raises(ValueError, match=sentence):
        _run(problem, [callback], driver)
    assert not any(array.any() for array in problem.arrays())


def test_variables_of_one_name_are_told_apart():
    class Twins(Flat):
        def __init__(self):
            self.variables = [tf.Variable(0.0, name="w"), tf.Variable(0.0, name="w")]

        def __call__(self):
            return 2.0 * self.variables[0] + 3.0 * self.variables[1]

    applied = _applied(Twins(), [ScaleGradients({"^w_1$": 10.0})], steps=1)
    assert {name: values.tolist() for name, values in applied.items()} == {"w": [2.0], "w_1": [30.0]}


def test_variables_of_a_model_have_the_paths_of_keras():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")], name="net")
    capture = CaptureGradients()
    loop = tk.OptimizationLoop("sgd", max_iterations=1, run_eagerly=True)
    inputs = np.ones((3, 2), np.float32)
    loop.minimize(lambda: tf.reduce_mean(model(inputs) ** 2), model.trainable_variables, callbacks=[capture])
    assert list(capture.gradients) == [v.path for v in model.trainable_variables]
    assert [path.split("/")[-2:] for path in capture.gradients] == [["head", "kernel"], ["head", "bias"]]


# GradientStatistics and CaptureGradients.


def _rosenbrock():
    return BY_NAME["rosenbrock_2"].make()


def _captured(callbacks, driver, step="tape", steps=10, **more):
    """Runs Rosenbrock; returns the loop and the true gradients of each step, recorded by a measure."""
    variables, loss = _rosenbrock()
    measures = {"g": lambda gradients: gradients[0]}
    optimizer = keras.optimizers.SGD(2e-4)
    loop = tk.OptimizationLoop(optimizer, step=step, max_iterations=steps, measures=measures, **driver, **more)
    return loop, loop.minimize(loss, variables, callbacks=callbacks).history["g"]


@over_drivers
@over_steps
def test_gradients_and_statistics_are_those_of_the_very_steps(step, driver, advances):
    capture, statistics = CaptureGradients(every=3), GradientStatistics(every=4)
    _, gradients = _captured([capture, statistics], driver, step, steps=13)
    assert capture.steps.tolist() == [3, 6, 9, 12]
    np.testing.assert_array_equal(capture.gradients["x"], gradients[2::3])
    assert statistics.steps.tolist() == [4, 8, 12]
    np.testing.assert_allclose(statistics.statistics["x"]["norm"], np.linalg.norm(gradients[3::4], axis=1), 1e-12)
    assert np.cumsum(advances).tolist() == (list(range(1, 14)) if driver is EAGER else [3, 4, 6, 8, 9, 12, 13])


@over_drivers
@over_steps
def test_statistics_are_those_of_numpy(step, driver):
    problem, look = Linear(), GradientStatistics()
    _run(problem, [look], driver, step)
    assert look.steps.tolist() == [1, 2, 3]
    assert list(look.statistics) == list(problem.gradients)
    for name, gradient in problem.gradients.items():
        g = np.asarray(gradient, np.float64)
        expected = {"norm": _norm(g), "mean": g.mean(), "max_abs": np.abs(g).max()}
        expected |= {"zeros": (g == 0).mean(), "non_finite": 0.0}
        assert set(look.statistics[name]) == set(expected)
        for quantity, value in expected.items():
            found = look.statistics[name][quantity]
            assert found.shape == (3,)
            np.testing.assert_allclose(found, value, 1e-12, err_msg=f"{quantity} of {name}")


@over_drivers
def test_statistics_say_where_a_run_became_not_finite(driver):
    x, y = tf.Variable([0.0, 1.0, 4.0, 9.0], name="x"), tf.Variable(1.0, name="y")
    look = GradientStatistics()
    loop = tk.OptimizationLoop("sgd", max_iterations=10, **driver)
    result = loop.minimize(lambda: tf.reduce_sum(tf.sqrt(x)) + y**2, [x, y], callbacks=[look])
    assert (result.reason.name, result.steps) == ("NOT_FINITE", 1)
    assert look.statistics["x"]["non_finite"].tolist() == [0.25]
    assert look.statistics["x"]["max_abs"].tolist() == [np.inf]
    assert look.statistics["y"]["non_finite"].tolist() == [0.0]


@pytest.mark.parametrize("compiled", [False, True])
def test_statistics_of_nan_are_nan_under_xla_too(compiled):
    look = GradientStatistics()
    x = tf.Variable([0.0, 0.0])
    look.set_model(VariablesModel([keras_variable(x)]))
    look.on_train_begin()
    tf.function(lambda g: look.on_gradient([g], [x]), jit_compile=compiled)(tf.constant([np.nan, 1.0]))
    look.on_step(1, {})
    values = {quantity: rows.item() for quantity, rows in next(iter(look.statistics.values())).items()}
    np.testing.assert_equal(values, {"norm": np.nan, "mean": np.nan, "max_abs": np.nan, "zeros": 0, "non_finite": 0.5})


@over_drivers
def test_nothing_is_computed_at_steps_that_are_not_due(driver, monkeypatch):
    looks = tf.Variable(0)
    for cls in (GradientStatistics, CaptureGradients):
        original = cls._look
        monkeypatch.setattr(cls, "_look", lambda *args, original=original: (looks.assign_add(1), original(*args)))
    _captured([GradientStatistics(every=4), CaptureGradients(every=3)], driver, steps=13)
    assert int(looks) == 3 + 4


@over_drivers
def test_where_a_callback_stands_says_which_gradients_it_sees(driver):
    before, after, first = CaptureGradients(every=5), CaptureGradients(every=5), GradientStatistics(every=5)
    _, gradients = _captured([first, before, ScaleGradients({"x": 0.5}), after], driver)
    np.testing.assert_array_equal(before.gradients["x"], gradients[4::5])
    np.testing.assert_array_equal(after.gradients["x"], 0.5 * gradients[4::5])
    np.testing.assert_allclose(first.statistics["x"]["max_abs"], np.abs(gradients[4::5]).max(1), 1e-14)


@over_drivers
@pytest.mark.parametrize("cls", [CaptureGradients, GradientStatistics, CheckGradients])
def test_a_second_run_begins_anew_and_traces_nothing(cls, driver):
    callback = cls()
    variables, loss = _rosenbrock()
    start = variables[0].numpy()
    loop = tk.OptimizationLoop(keras.optimizers.SGD(2e-4), max_iterations=5, **driver)

    def seen():
        variables[0].assign(start)
        loop.minimize(loss, variables, callbacks=[callback])
        if cls is CheckGradients:
            return callback.worst, callback.checked
        return callback.steps.tolist(), json.dumps(callback._columns and list(_columns(callback)))

    first, traces = seen(), loop.traces
    assert seen() == first
    assert loop.traces == traces <= 1


def _columns(callback):
    return [(name, rows.tolist()) for name, rows in callback._columns()]


def test_one_callback_serves_several_objectives():
    look, capture = GradientStatistics(), CaptureGradients()
    loops = {name: tk.OptimizationLoop("sgd", max_iterations=2, jit_compile=False) for name in ("x", "y")}
    x, y = tf.Variable(1.0, name="x"), tf.Variable([1.0, 2.0], name="y")
    objectives = {"x": (lambda: 3.0 * x, [x]), "y": (lambda: tf.reduce_sum(5.0 * y), [y])}
    for name in ("x", "y", "x"):
        loss, variables = objectives[name]
        loops[name].minimize(loss, variables, callbacks=[look, capture])
        slope = {"x": 3.0, "y": 5.0}[name]
        assert list(look.statistics) == list(capture.gradients) == [name]
        assert look.statistics[name]["max_abs"].tolist() == [slope, slope]
        assert (capture.gradients[name] == slope).all()


def test_losses_that_leave_out_different_variables_are_told_apart():
    x, y = tf.Variable(1.0, name="x"), keras.Variable(1.0, name="y")
    losses = {"xy": lambda: 2.0 * x + 3.0 * y.value, "y": lambda: 5.0 * y.value}
    look, capture = CaptureGradients(), CheckGradients()
    loop = tk.OptimizationLoop("sgd", max_iterations=1, jit_compile=False, callbacks=[look, capture])
    for which, slopes in (("xy", {"x": [2.0], "y": [3.0]}), ("y", {"y": [5.0]}), ("xy", {"x": [2.0], "y": [3.0]})):
        loop.minimize(losses[which], [x, y], allow_unused=True)
        assert {name: rows.tolist() for name, rows in look.gradients.items()} == slopes
        assert (capture.checked, capture.failed) == (len(slopes), 0)
    loop.minimize(losses["xy"])
    assert set(look.gradients) == {"x", "y"}


@over_drivers
def test_a_run_that_fails_before_its_first_step_leaves_the_count_to_the_next(driver):
    class Fail(tk.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if fail:
                raise RuntimeError("not yet")

    problem, freeze, fails = Bowl(), FreezeVariables("x", until=2), Fail()
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.1), max_iterations=2, **driver)
    for fail in (True, True, False, False):
        with pytest.raises(RuntimeError, match="not yet") if fail else contextlib.nullcontext():
            loop.minimize(problem, problem.variables, callbacks=[freeze, fails])
    assert problem.variables[0].numpy().tolist() == [1.0, 2.0]


def test_a_run_without_a_step_that_is_due_has_seen_nothing():
    look, capture = GradientStatistics(every=100), CaptureGradients(every=100)
    _captured([look, capture], EAGER)
    assert look.steps.shape == capture.steps.shape == (0,)
    assert look.statistics == capture.gradients == {}


# CheckGradients.


@tf.custom_gradient
def _wrong_square(x):
    """x**2, whose gradient is wrong in the second entry."""
    return x**2, lambda upstream: upstream * x * tf.constant([2.0, 1.0, 2.0], x.dtype)


class Wrong:
    """A right and a wrong gradient."""

    def __init__(self, dtype="float64"):
        self.variables = [
            tf.Variable(np.asarray([[1.0, 2.0]], dtype), name="fine"),
            tf.Variable(np.asarray([1.0, 3.0, -2.0], dtype), name="wrong"),
        ]

    def __call__(self):
        fine, wrong = self.variables
        return tf.reduce_sum(fine**3) + tf.reduce_sum(_wrong_square(wrong))


@over_drivers
@over_steps
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_gradient_is_found_by_variable_and_index(dtype, step, driver):
    check = CheckGradients()
    with pytest.raises(ValueError, match=r"^the gradient must be that of the loss; at step 1 it is") as error:
        _run(Wrong(dtype), [check], driver, step)
    assert "it is 3 for wrong[1], where finite differences give 6" in str(error.value)
    assert "; 1 of 5 checked entries are wrong." in str(error.value)
    assert (check.checked, check.failed) == (5, 1)
    assert (check.worst["step"], check.worst["variable"], check.worst["index"]) == (1, "wrong", (1,))
    assert check.worst["gradient"] == 3.0
    assert check.worst["difference"] == pytest.approx(6.0, rel=1e-3 if dtype == "float32" else 1e-8)
    assert check.worst["error"] > check.worst["allowed"]


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_gradients_of_the_problems_are_found_right(name):
    variables, loss = BY_NAME[name].make()
    check = CheckGradients(steps=2)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(BY_NAME[name].learning_rate), max_iterations=2, jit_compile=False)
    loop.minimize(loss, variables, callbacks=[check])
    assert check.checked == 2 * sum(min(10, int(np.prod(v.shape))) for v in variables)
    assert check.failed == 0
    assert check.worst["error"] <= check.worst["allowed"]


@over_drivers
@pytest.mark.parametrize("length", [1, 256])
def test_checking_changes_no_bit_of_the_run(length, driver):
    results = []
    for callbacks in ([CheckGradients(steps=3, on_failure="warn")], []):
        problem = Bowl()
        more = {"steps_per_execution": length, "optimizer": keras.optimizers.Adam(0.1)}
        results.append(_run(problem, callbacks, driver, steps=8, **more)[1])
    for found, expected in zip(*(result.variables for result in results), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(results[0].history["loss"], results[1].history["loss"])
    assert results[0].evaluations == results[1].evaluations


@over_drivers
@pytest.mark.parametrize("length", [1, 256])
def test_each_of_the_first_steps_is_checked_at_its_own_variables(length, driver, advances):
    @tf.custom_gradient
    def square(x):  # with a wrong gradient between 1 and 1.5
        return x**2, lambda upstream: upstream * x * tf.where((x > 1.0) & (x < 1.5), tf.constant(0.9, x.dtype), 2.0)

    for steps, step in ((2, None), (3, 3), (5, 3)):  # x is 2.5, 2, 1.6, 1.28 ...
        x = tf.Variable(2.0, dtype=tf.float64, name="x")
        loop = tk.OptimizationLoop(keras.optimizers.SGD(0.1), max_iterations=6, steps_per_execution=length, **driver)
        check = CheckGradients(steps=steps)
        if step is None:
            loop.minimize(lambda x=x: square(x), [x], callbacks=[check])
            assert check.checked == steps
        else:
            with pytest.raises(ValueError, match=f"at step {step} "):
                loop.minimize(lambda x=x: square(x), [x], callbacks=[check])
            assert check.worst["gradient"] == pytest.approx(0.9 * 1.28)
        assert max(advances) == (1 if driver is EAGER else min(length, 6))


def test_a_failure_is_a_warning_if_wanted(caplog):
    check = CheckGradients(steps=2, on_failure="warn")
    with caplog.at_level(logging.WARNING, "tapekit"):
        _, result = _run(Wrong(), [check], optimizer=keras.optimizers.SGD(0.01))
    assert result.steps == 3
    assert [record.getMessage().partition(" that of")[0] for record in caplog.records] == [
        "the gradient must be",
        "the gradient must be",
    ]
    assert check.failed == 2


@over_drivers
def test_variables_are_put_back_if_the_loss_raises(driver, monkeypatch):
    problem = Linear()
    calls = []

    def evaluate(self):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("no more")
        return float(problem())

    monkeypatch.setattr(tk.OptimizationLoop, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match=r"^no more$"):
        _run(problem, [CheckGradients()], driver)
    for array, gradient in zip(problem.arrays(), problem.gradients.values(), strict=True):
        np.testing.assert_array_equal(array, -gradient)


def test_the_tolerances_and_the_step_of_differences_are_those_that_are_given():
    def verdict(**settings):
        check = CheckGradients(**{"on_failure": "warn", **settings})
        _run(Wrong(), [check], steps=1)
        return check

    assert verdict(rtol=0.51).failed == 0
    assert verdict(rtol=0.49).failed == 1
    assert verdict(atol=3.1, rtol=0.0).failed == 0
    assert verdict(atol=2.9, rtol=0.0).failed == 1
    # (x + h)**3 and (x - h)**3 differ by 6 x**2 h + 2 h**3
    assert verdict(epsilon=0.5, atol=0.0, rtol=0.0).worst["error"] == pytest.approx(3.0)
    assert verdict(epsilon=0.5, atol=0.0, rtol=0.0).failed == 3  # x**2 has none of that error


@pytest.mark.parametrize(("entries", "checked"), [(1, 2), (4, 6), (None, 60)])
def test_as_many_entries_are_checked_as_are_asked_for_the_largest_gradients_among_them(entries, checked):
    slopes = np.ones(58)
    slopes[41] = 3.0

    @tf.custom_gradient
    def linear(x):  # with the largest gradient 1 % too large
        return tf.reduce_sum(slopes * x), lambda upstream: upstream * slopes * (1.0 + 0.01 * (slopes > 2.0))

    a, b = tf.Variable(np.ones(58), name="a"), tf.Variable(np.ones(2), name="b")
    check = CheckGradients(entries=entries, on_failure="warn")
    loop = tk.OptimizationLoop("sgd", max_iterations=1, run_eagerly=True)
    loop.minimize(lambda: linear(a) + tf.reduce_sum(b**2), [a, b], callbacks=[check])
    assert (check.checked, check.failed) == (checked, 1)
    assert (check.worst["variable"], check.worst["index"]) == ("a", (41,))


def test_a_loss_that_is_random_is_told_and_not_taken_for_a_wrong_gradient():
    x = tf.Variable([1.0, 2.0])
    loop = tk.OptimizationLoop("sgd", max_iterations=3, jit_compile=False)
    with pytest.raises(ValueError, match=r"^the loss must be a function of the variables alone"):
        loop.minimize(
            lambda: tf.reduce_sum(tf.nn.dropout(x, 0.5) + tf.random.normal([])), [x], callbacks=[CheckGradients()]
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_loss_of_low_precision_passes_with_variables_of_high_precision(dtype):
    x = tf.Variable(np.linspace(0.5, 2.0, 7), name="x")
    check = CheckGradients(rtol=None if dtype == "float32" else 0.2, epsilon=None if dtype == "float32" else 0.1)
    loop = tk.OptimizationLoop("sgd", max_iterations=1, run_eagerly=True)
    loop.minimize(lambda: tf.reduce_sum(tf.cast(x, dtype) ** 2), [x], callbacks=[check])
    assert (check.checked, check.failed) == (7, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_variables_of_every_precision_are_checked(dtype):
    values = tf.constant([1.0, 3.0, -2.0], dtype)
    x = tf.Variable(values, name="x")
    loop = tk.OptimizationLoop("sgd", max_iterations=1, run_eagerly=True)
    check = CheckGradients()
    loop.minimize(lambda: tf.reduce_sum(tf.exp(0.5 * x)), [x], callbacks=[check])
    assert (check.checked, check.failed) == (3, 0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_wrong_gradient_is_found_in_every_precision(dtype):
    x = tf.Variable(tf.constant([1.0, 3.0, -2.0], dtype), name="x")
    loop = tk.OptimizationLoop("sgd", max_iterations=1, run_eagerly=True)
    with pytest.raises(ValueError, match=r"it is 3 for x\[1\], where finite differences give [56]"):
        loop.minimize(lambda: tf.reduce_sum(_wrong_square(x)), [x], callbacks=[CheckGradients()])


def test_a_stationary_point_where_differences_are_all_rounding_passes():
    x = tf.Variable(np.zeros(3), name="x")
    check = CheckGradients()
    loop = tk.OptimizationLoop("sgd", max_iterations=1, run_eagerly=True)
    loop.minimize(lambda: tf.reduce_sum(100.0 * x**3 + x**4), [x], callbacks=[check])
    assert (check.checked, check.failed) == (3, 0)


def test_a_loss_too_large_for_its_differences_to_tell_anything_passes():
    x = tf.Variable(1.0, name="x")
    check = CheckGradients()
    loop = tk.OptimizationLoop("sgd", max_iterations=1, run_eagerly=True)
    loop.minimize(lambda: 1e6 + x**2, [x], callbacks=[check])  # numbers of float32 are 0.06 apart there
    assert (check.checked, check.failed, check.worst["difference"]) == (1, 0, 0.0)


def test_entries_at_the_edge_of_where_the_loss_is_finite_are_left_out():
    x = tf.Variable([1e-9, 1.0], dtype=tf.float64, name="x")
    check = CheckGradients()
    loop = tk.OptimizationLoop(keras.optimizers.SGD(1e-6), max_iterations=1, run_eagerly=True)
    loop.minimize(lambda: tf.reduce_sum(tf.math.log(x)), [x], callbacks=[check])
    assert (check.checked, check.failed, check.worst["index"]) == (1, 0, (1,))
    x.assign([1e-9, 1e-9])
    with pytest.raises(ValueError, match=r"^the loss must be finite near the variables to be checked"):
        loop.minimize(lambda: tf.reduce_sum(tf.math.log(x)), [x], callbacks=[check])


def test_a_gradient_that_is_nan_where_differences_are_not_is_wrong():
    x = tf.Variable([0.0, 0.0], dtype=tf.float64, name="x")
    loop = tk.OptimizationLoop("sgd", max_iterations=1, run_eagerly=True)
    with pytest.raises(ValueError, match=r"it is nan for x\[0\], where finite differences give 0"):
        loop.minimize(lambda: tf.norm(x), [x], callbacks=[CheckGradients()])


# Configuration and bad arguments.

ALMOST_EQUAL = {
    "clip_gradients": (ClipGradients(norm=2.0, log="n"), ClipGradients(global_norm=2.0, log="n")),
    "gradient_noise": (GradientNoise(0.3, gamma=0.5, seed=3), GradientNoise(0.3, gamma=0.5, seed=4)),
    "freeze_variables": (FreezeVariables("a|b", until=5), FreezeVariables("a|b")),
    "scale_gradients": (ScaleGradients({"a": 2.0, "b": 3}), ScaleGradients({"a": 2.0, "b": 4})),
    "centralize_gradients": (CentralizeGradients(), ClipGradients(1.0)),
    "gradient_statistics": (GradientStatistics(every=3), GradientStatistics(every=4)),
    "capture_gradients": (CaptureGradients(every=3), GradientStatistics(every=3)),
    "check_gradients": (
        CheckGradients(2, 1e-3, rtol=0.1, atol=0.2, entries=None, on_failure="warn"),
        CheckGradients(2, 1e-3, rtol=0.1, atol=0.2, entries=None),
    ),
}


@pytest.mark.parametrize("name", ALMOST_EQUAL)
def test_a_callback_survives_json_and_is_known_by_its_name(name):
    original, different = ALMOST_EQUAL[name]
    again = tk.callbacks.get(json.loads(json.dumps(keras.saving.serialize_keras_object(original))))
    assert type(again) is type(original)
    assert again == original != different
    assert tk.callbacks.get({"class_name": name, "config": original.get_config()}) == original


def test_a_callback_that_has_run_has_the_configuration_of_a_new_one():
    for callback in (
        GradientStatistics(),
        CheckGradients(on_failure="warn"),
        GradientNoise(0.1),
        FreezeVariables("x", 2),
    ):
        fresh = type(callback).from_config(callback.get_config())
        _captured([callback], EAGER, steps=2)
        assert callback == fresh
        assert callback.get_config() == fresh.get_config()


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: ClipGradients(), ValueError, "exactly one of `value`, .* must be given, received none of them."),
        (lambda: ClipGradients(1.0, global_norm=1.0), ValueError, ".*, received `value` and `global_norm`."),
        (lambda: ClipGradients(norm=0.0), ValueError, "`norm` must be a positive finite number, received 0.0."),
        (lambda: ClipGradients(value=-1), ValueError, "`value` must be a positive finite number, received -1."),
        (lambda: ClipGradients(np.inf), ValueError, "`value` must be a positive finite number, received inf."),
        (lambda: ClipGradients("1"), TypeError, "`value` must be a number, received '1'."),
        (lambda: ClipGradients(1.0, log=3), TypeError, "`log` must be a name or None, received the int 3."),
        (lambda: GradientNoise(-0.1), ValueError, "`eta` must be a number of at least 0, received -0.1."),
        (lambda: GradientNoise(np.nan), ValueError, "`eta` must be a number of at least 0, received nan."),
        (lambda: GradientNoise(1.0, gamma=np.inf), ValueError, "`gamma` must be a finite number, received inf."),
        (lambda: GradientNoise(1.0, seed=0.5), TypeError, "`seed` must be an integer of at least 0, received .*0.5."),
        (lambda: FreezeVariables(3), TypeError, "`pattern` must be a regular expression in a string, received .* 3."),
        (lambda: FreezeVariables("(a"), ValueError, r"`pattern` must be a regular expression, received '\(a' \(.*\)."),
        (lambda: FreezeVariables("a", until=0), ValueError, "`until` must be an integer of at least 1, received 0."),
        (lambda: ScaleGradients([2.0]), TypeError, "`factors` must be a dict of numbers by patterns, received a list"),
        (lambda: ScaleGradients({}), ValueError, "`factors` must hold at least one pattern, received an empty dict."),
        (lambda: ScaleGradients({"*": 1.0}), ValueError, r"`factors` must be a regular expression, received '\*' "),
        (lambda: ScaleGradients({"a": "b"}), TypeError, r"`factors\['a'\]` must be a number, received 'b'."),
        (lambda: ScaleGradients({"a": np.nan}), ValueError, r"`factors\['a'\]` must be a number, received nan."),
        (lambda: GradientStatistics(every=0), ValueError, "`every` must be an integer of at least 1, received 0."),
        (lambda: CaptureGradients(every=1.5), TypeError, "`every` must be an integer of at least 1, received .* 1.5."),
        (lambda: CheckGradients(steps=0), ValueError, "`steps` must be an integer of at least 1, received 0."),
        (lambda: CheckGradients(epsilon=0), ValueError, "`epsilon` must be a positive finite number, received 0."),
        (lambda: CheckGradients(rtol=-1), ValueError, "`rtol` must be a number of at least 0, received -1."),
        (lambda: CheckGradients(atol="a"), TypeError, "`atol` must be a number of at least 0, received 'a'."),
        (lambda: CheckGradients(entries=0), ValueError, "`entries` must be an integer of at least 1, received 0."),
        (
            lambda: CheckGradients(on_failure="no"),
            ValueError,
            '`on_failure` must be "raise" or "warn", received \'no\'.',
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(make, error, sentence):
    with pytest.raises(error, match=f"^{sentence}"):
        make()
