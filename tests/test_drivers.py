"""What the drivers promise: chunk lengths change no bit, one trace, no work that nobody asked for, safe fallbacks."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import BY_NAME, DRIVERS

import tapekit as tk
from tapekit import _drivers
from tapekit._drivers._chunk import Chunk
from tapekit._drivers._compiled import _cause

COMPILED = {name: driver for name, driver in DRIVERS.items() if name != "eager"}


def _rosenbrock_run(live, criterion=None, **settings):
    """Runs 300 steps of Adam, with or without a live callback, and returns everything that can be seen."""
    (x,), loss = BY_NAME["rosenbrock_100"].make()
    optimizer = keras.optimizers.Adam(0.01)
    seen = []
    callbacks = [lambda step, logs: seen.append((step, logs["loss"], x.numpy().copy()))] if live else []
    loop = tk.OptimizationLoop(
        optimizer,
        stopping=criterion,
        max_iterations=300,
        measures={"x": lambda: x, "gradient": lambda gradients: gradients[0]},
        **settings,
    )
    result = loop.minimize(loss, [x], callbacks=callbacks)
    return result, [np.asarray(variable) for variable in optimizer.variables], seen


def _assert_equal_bits(first, second):
    assert first[0].steps == second[0].steps
    assert first[0].message == second[0].message
    assert first[0].loss == second[0].loss
    for name, values in first[0].history.items():
        np.testing.assert_array_equal(values, second[0].history[name])
    for a, b in zip(first[0].variables + first[1], second[0].variables + second[1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("driver", COMPILED)
def test_the_chunk_length_changes_no_bit(driver):
    settings = COMPILED[driver]
    criterion = tk.stopping.GradientNormBelow(1e-9) | tk.stopping.VariablesChangeBelow(1e-12)
    reference = _rosenbrock_run(False, criterion, steps_per_execution=1, **settings)
    assert len(reference[0].history["loss"]) == 300
    for length in (7, 256, "auto"):
        _assert_equal_bits(reference, _rosenbrock_run(False, criterion, steps_per_execution=length, **settings))


@pytest.mark.parametrize("driver", COMPILED)
def test_a_live_callback_changes_no_bit_and_sees_the_variables_of_its_step(driver):
    settings = COMPILED[driver]
    quiet = _rosenbrock_run(False, **settings)
    live = _rosenbrock_run(True, **settings)
    np.testing.assert_array_equal(quiet[0].history["x"], live[0].history["x"])
    np.testing.assert_array_equal(quiet[0].variables[0], live[0].variables[0])
    assert [step for step, _, _ in live[2]] == list(range(1, 301))
    np.testing.assert_array_equal([x for _, _, x in live[2]], live[0].history["x"])
    np.testing.assert_array_equal([loss for _, loss, _ in live[2]], live[0].history["loss"])


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("length", [1, 7, 256, "auto"])
def test_a_criterion_met_at_step_137_leaves_the_variables_of_step_137(driver, length):
    x = tf.Variable(0.0, dtype=tf.float64)
    iterates = [0.0]
    for _ in range(137):
        iterates.append(iterates[-1] - 0.5 * np.float64(np.float32(0.02)) * 2.0 * (iterates[-1] - 4.0))
    at_137 = (iterates[136] - 4.0) ** 2
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(0.01),
        stopping=tk.stopping.LossBelow(at_137 * (1 + 1e-9)),
        max_iterations=1000,
        steps_per_execution=length,
        **DRIVERS[driver],
    )
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x])
    assert (result.steps, len(result.history["loss"])) == (137, 137)
    assert float(x) == pytest.approx(iterates[137], rel=1e-6)
    assert result.loss == pytest.approx((float(x) - 4.0) ** 2, rel=1e-12)


def test_one_trace_a_run_whatever_its_length_and_none_for_the_same_objective_again():
    x, calls = tf.Variable(0.0), []

    def loss():
        calls.append(1)
        return (x - 4.0) ** 2

    loop = tk.OptimizationLoop("sgd", max_iterations=5000)
    loop.minimize(loss, [x])
    assert loop.traces == 1
    assert len(calls) == 1  # for the check of the objective and the step together
    loop.minimize(loss, [x])
    loop.minimize(loss, [x], callbacks=[lambda step, logs: loop.stop() if step == 3 else None])
    for step, _ in loop.steps(loss, [x]):
        if step == 3:
            break
    assert loop.traces == 1
    assert len(calls) == 1


def test_a_step_under_xla_has_no_branches_and_is_looked_at_once():
    """Each op of some kinds, `IsFinite` among them, takes XLA as long to compile as a kernel."""
    x = tf.Variable([0.0, 1.0])
    loop = tk.OptimizationLoop("adam", stopping=tk.stopping.LossBelow(1e-9), max_iterations=100, keep_best=False)
    loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x])
    (driver,) = loop._programs.values()
    (step,) = driver.steps
    types = [op.type for op in step.graph.get_operations()]
    assert types.count("IsFinite") == 1
    assert not {"If", "StatelessIf"}.intersection(types)


_SPARSE = """
import keras, numpy as np, tensorflow as tf, tapekit as tk

def run(wrap, **settings):
    table = tf.Variable(tf.ones([4, 3]))
    loss = wrap(lambda: tf.reduce_sum(tf.gather(table, [0, 2, 2]) ** 2))
    loop = tk.OptimizationLoop("adam", max_iterations=3, jit_compile=True, **settings)
    for _ in range(3):
        loop.minimize(loss, [table])

run(lambda loss: loss)
run(tf.function)
run(tf.function, step=tk.MinimizeStep())
run(tf.function, stopping=tk.stopping.GradientNormBelow(1e-9))

class Called(keras.Sequential):
    def call(self, inputs, **more):
        return tf.function(super().call, autograph=False)(inputs, **more)

model = Called([keras.Input((2,), dtype="int32"), keras.layers.Embedding(4, 3), keras.layers.Flatten()])
model.compile("adam", "mse", jit_compile=True)
loop = tk.OptimizationLoop()
for _ in range(3):
    loop.fit(model, np.zeros((8, 2)), np.zeros((8, 6)), 4, verbose=0)
"""


def test_sparse_gradients_out_of_a_call_are_compiled_once(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_dump_to={tmp_path}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", _SPARSE], env=environment, check=True, capture_output=True, timeout=120)
    compiled = list(tmp_path.glob("*.cpu_after_optimizations.txt"))
    assert len(compiled) == 5


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_measure_and_a_criterion_read_what_the_objective_has_left_in_python(driver):
    x, left = tf.Variable(0.0), {}

    def loss():
        left["distance"] = x - 4.0
        return left["distance"] ** 2

    class Near(tk.stopping.Criterion):
        def update(self, state, logs):
            return state, tf.abs(left["distance"]) < 1.5

    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), stopping=Near(), **DRIVERS[driver])
    assert loop.minimize(loss, [x]).steps == 3
    x.assign(0.0)
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(0.25), max_iterations=3, measures={"distance": lambda: left["distance"]}, **DRIVERS[driver]
    )
    assert loop.minimize(loss, [x]).history["distance"].tolist() == [-4.0, -2.0, -1.0]


@pytest.mark.parametrize("name", ["rosenbrock_100", "two_dtypes", "embedding"])
@pytest.mark.parametrize("driver", COMPILED)
def test_a_measure_and_a_strategy_of_ones_own_change_no_bit(driver, name):
    class Mine(tk.TapeStep):
        def take(self, problem):
            return super().take(problem)

    def run(**settings):
        variables, loss = BY_NAME[name].make()
        loop = tk.OptimizationLoop(keras.optimizers.Adam(0.01), max_iterations=50, **settings, **COMPILED[driver])
        return loop.minimize(loss, variables)

    expected = run()
    for settings in ({"measures": {"one": lambda: tf.constant(1.0)}}, {"step": Mine()}):
        found = run(**settings)
        np.testing.assert_array_equal(found.history["loss"], expected.history["loss"])
        for a, b in zip(found.variables, expected.variables, strict=True):
            np.testing.assert_array_equal(a, b)


def test_another_objective_or_another_hook_is_traced_again():
    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop("sgd", max_iterations=3)
    loss = lambda: (x - 4.0) ** 2  # noqa: E731
    loop.minimize(loss, [x])
    loop.minimize(lambda: (x - 5.0) ** 2, [x])
    assert loop.traces == 2

    class Halve(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [0.5 * gradient for gradient in gradients]

    hook = Halve()
    loop.minimize(loss, [x], callbacks=[hook])
    loop.minimize(loss, [x], callbacks=[hook])
    assert loop.traces == 3


def test_programs_that_are_remembered_are_few():
    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop("sgd", max_iterations=1, jit_compile=False)
    for target in range(12):
        loop.minimize(lambda target=target: (x - float(target)) ** 2, [x])
    assert len(loop._programs) <= 8


def _ops(**settings):
    """The ops of one traced step of a three-entry parabola."""
    x = tf.Variable([1.0, 2.0, 3.0])
    callbacks = settings.pop("callbacks", None)
    loop = tk.OptimizationLoop("sgd", max_iterations=1, jit_compile=False, **settings)
    loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x], callbacks=callbacks)
    (driver,) = loop._programs.values()
    return sorted(operation.type for operation in driver.steps[0].graph.get_operations())


def test_a_step_computes_no_norm_and_no_copy_that_nobody_needs():
    plain = _ops()
    assert not {"Sqrt", "Max", "Norm", "ReadVariableOp_1"} & set(plain)
    assert "Sqrt" in _ops(stopping=tk.stopping.GradientNormBelow(1e-3))
    moving = _ops(stopping=tk.stopping.VariablesChangeBelow(1e-3))
    assert moving.count("Max") > plain.count("Max")
    assert moving.count("ReadVariableOp") > plain.count("ReadVariableOp")


def test_a_hook_that_nobody_overrides_adds_no_op():
    class Empty(tk.Callback):
        pass

    assert _ops(callbacks=[Empty()]) == _ops()


def _count_advances(monkeypatch):
    lengths = []
    advance = _drivers.CompiledDriver.advance

    def counted(self, *arguments):
        chunk = advance(self, *arguments)
        lengths.append(chunk.taken)
        return chunk

    monkeypatch.setattr(_drivers.CompiledDriver, "advance", counted)
    return lengths


def test_the_host_is_asked_only_when_somebody_needs_it(monkeypatch):
    lengths = _count_advances(monkeypatch)
    x = tf.Variable(0.0, dtype=tf.float64)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(1e-6), max_iterations=100_000, jit_compile=True)
    loss = lambda: (x - 4.0) ** 2  # noqa: E731
    loop.minimize(loss, [x])
    lengths.clear()
    loop.minimize(loss, [x])
    assert sum(lengths) == 100_000
    assert len(lengths) <= 10
    lengths.clear()
    loop.minimize(loss, [x], callbacks=[tk.callbacks.FunctionCallback(lambda step, logs: None, every=30_000)])
    assert {30_000, 60_000, 90_000} <= set(np.cumsum(lengths))
    assert len(lengths) <= 20


def test_steps_per_execution_is_an_upper_bound(monkeypatch):
    lengths = _count_advances(monkeypatch)
    x = tf.Variable(0.0)
    tk.OptimizationLoop("sgd", max_iterations=50, steps_per_execution=7).minimize(lambda: (x - 4.0) ** 2, [x])
    assert sum(lengths) == 50
    assert max(lengths) == 7


def test_auto_lengths_let_the_host_look_ten_times_a_second(monkeypatch):
    started, seconds = [], []
    advance = _drivers.CompiledDriver.advance

    def timed(self, *arguments):
        started.append(time.perf_counter())
        chunk = advance(self, *arguments)
        seconds.append(time.perf_counter() - started[-1])
        return chunk

    monkeypatch.setattr(_drivers.CompiledDriver, "advance", timed)
    matrix = tf.Variable(np.eye(100) * 0.5)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(1e-9), stopping=tk.stopping.WallTime(0.6))

    def loss():
        return tf.reduce_sum(tf.linalg.matmul(matrix, tf.linalg.matmul(matrix, matrix)))

    loop.minimize(loss, [matrix])  # compiles
    seconds.clear()
    result = loop.minimize(loss, [matrix])
    assert result.reason is tk.StopReason.LIMIT
    assert len(seconds) > 6
    assert result.steps > 10 * len(seconds)
    assert np.median(seconds[-5:]) < 0.1


def test_the_pace_follows_the_speed_and_grows_by_bounded_factors():
    pace = _drivers.Pace()
    assert pace.limit() == 1
    pace.observe(1, 1e-6)
    assert pace.limit() == 16
    pace.observe(16, 1e-2)
    assert pace.limit() == 80
    pace.observe(80, 80.0)
    assert pace.limit() == 1


@pytest.mark.parametrize(("seconds", "steps"), [(0.005, 10), (0.02, 4), (0.03, 4), (0.04, 3), (0.06, 2), (0.11, 1)])
def test_slow_steps_share_a_call_as_long_as_the_host_can_wait(seconds, steps):
    pace = _drivers.Pace()
    pace.observe(1, seconds)
    assert pace.limit() == steps
    assert (pace.limit() - 1) * seconds <= 0.1


def test_the_pace_does_not_take_a_slow_call_for_slow_steps():
    pace = _drivers.Pace()
    pace.observe(1, 1e-6)
    assert not pace.call_matters
    pace.observe(1, 0.04)
    assert pace.call_matters
    assert pace.limit() == 3
    pace.call = 0.039
    pace.observe(1, 0.04)
    assert not pace.call_matters
    assert pace.limit() == 16


def test_many_variables_are_not_stepped_one_by_one(monkeypatch):
    """Handing over is made slow here; with a thousand variables it is."""
    x, lengths = tf.Variable(np.zeros(2)), []
    take, advance = Chunk.__call__, _drivers.CompiledDriver.advance

    def slow(*arguments):
        time.sleep(0.03)
        return take(*arguments)

    def seen(self, state, limit, *arguments):
        lengths.append(limit)
        return advance(self, state, limit, *arguments)

    monkeypatch.setattr(Chunk, "__call__", slow)
    monkeypatch.setattr(_drivers.CompiledDriver, "advance", seen)
    loop = tk.OptimizationLoop("sgd", max_iterations=200)
    loss = lambda: tf.reduce_sum((x - 4.0) ** 2)  # noqa: E731
    loop.minimize(loss, [x])
    lengths.clear()
    assert loop.minimize(loss, [x]).steps == 200
    assert len(lengths) < 10


def _fallback_run(loss, variables, caplog, **settings):
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.1), max_iterations=20, **settings)
    with caplog.at_level(logging.WARNING, logger="tapekit"):
        first = loop.minimize(loss, variables)
        loop.minimize(loss, variables)
    return first, [record.getMessage() for record in caplog.records if record.name == "tapekit"]


def test_auto_falls_back_to_the_graph_where_xla_cannot_compile_and_says_so_once(caplog):
    x = tf.Variable(0.0, dtype=tf.float64)

    def loss():
        four = tf.numpy_function(lambda: np.float64(4.0), [], tf.float64)
        four.set_shape([])
        return (x - four) ** 2

    result, messages = _fallback_run(loss, [x], caplog)
    assert len(messages) == 1
    assert messages[0].startswith("jit_compile='auto' runs this objective as a graph, without XLA:")
    x.assign(0.0)
    expected = tk.OptimizationLoop(keras.optimizers.SGD(0.1), max_iterations=20, run_eagerly=True).minimize(loss, [x])
    np.testing.assert_allclose(result.history["loss"], expected.history["loss"], rtol=1e-12)


def test_auto_keeps_checks_and_seeds_which_xla_would_drop(caplog):
    x = tf.Variable(0.0)

    def seeded():
        return (x - tf.random.normal([], seed=7)) ** 2

    def checked():
        tf.debugging.assert_less(x, 2.0, "x has left its domain")
        return (x - 4.0) ** 2

    losses = []
    for settings in ({"run_eagerly": True}, {"jit_compile": "auto"}):
        tf.random.set_seed(3)
        x.assign(0.0)
        losses.append(_fallback_run(seeded, [x], caplog, **settings)[0].history["loss"])
    assert any("RandomStandardNormal" in record.getMessage() for record in caplog.records)
    assert len(set(losses[1].tolist())) > 10
    x.assign(0.0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="x has left its domain"):
        _fallback_run(checked, [x], caplog)
    assert 1.0 < float(x) < 3.0


def test_xla_that_was_asked_for_and_cannot_compile_is_an_error_and_changes_nothing():
    x = tf.Variable(0.0)

    def loss():
        tf.print("not under XLA")
        return (x - 4.0) ** 2

    loop = tk.OptimizationLoop("sgd", max_iterations=5, jit_compile=True)
    with pytest.raises(ValueError, match=r"`jit_compile` must be False or 'auto' here, received True"):
        loop.minimize(loss, [x])
    assert float(x) == 0.0
    assert int(loop.optimizer.iterations) == 0


def _random_history(driver):
    x, seed = tf.Variable(0.0, dtype=tf.float64), keras.random.SeedGenerator(1)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.1), max_iterations=10, **driver)
    return loop.minimize(lambda: (x - keras.random.normal([], dtype="float64", seed=seed)) ** 2, [x]).history["loss"]


def test_seeded_randomness_repeats_under_every_driver_and_agrees_between_eager_and_graph():
    histories = {name: _random_history(driver) for name, driver in DRIVERS.items()}
    assert len(set(histories["eager"].tolist())) == 10
    np.testing.assert_allclose(histories["graph"], histories["eager"], rtol=1e-9)
    np.testing.assert_array_equal(_random_history(DRIVERS["xla"]), histories["xla"])  # a stream of XLA's own


def test_history_is_float_arrays_of_eight_bytes_a_scalar_and_step():
    x = tf.Variable(0.0, dtype=tf.float64)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(1e-7), max_iterations=1_000_000, measures={"x": lambda: x})
    history = loop.minimize(lambda: (x - 4.0) ** 2, [x]).history
    assert {name: (values.nbytes, values.dtype) for name, values in history.items()} == {
        "loss": (8_000_000, np.dtype("float64")),
        "x": (8_000_000, np.dtype("float64")),
    }
    assert np.all(np.diff(history["x"]) > 0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_variables_that_become_nan_do_not_count_as_unmoved(driver):
    class Spoil(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [gradients[0] * tf.constant([np.nan, 1.0], tf.float64)]

    x = tf.Variable([1.0, 1e-9], dtype=tf.float64)
    loop = tk.OptimizationLoop(
        "sgd",
        stopping=tk.stopping.VariablesChangeBelow(1e-6) | tk.stopping.GradientNormBelow(1e-12, ord="inf"),
        max_iterations=10,
        **DRIVERS[driver],
    )
    result = loop.minimize(lambda: tf.reduce_sum(x**2), [x], callbacks=[Spoil()])
    assert result.reason is tk.StopReason.NOT_FINITE
    assert re.fullmatch(r"NonFinite: a gradient is not finite at step 1, .*: \w+ \(1 of 2 entries\)", result.message)


def test_auto_takes_the_graph_for_convolutions_that_xla_is_slow_at_on_a_cpu(caplog):
    expected = [] if tf.config.list_logical_devices("GPU") else ["Conv2DBackpropFilter"]
    kernel = tf.Variable(np.ones((3, 3, 1, 1)) * 0.1)  # of float64
    image = tf.constant(np.arange(25.0).reshape(1, 5, 5, 1) / 25.0)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.01), max_iterations=3)
    with caplog.at_level(logging.INFO, logger="tapekit"):
        loop.minimize(lambda: tf.reduce_sum(tf.nn.conv2d(image, kernel, 1, "SAME") ** 2), [kernel])
    messages = [record.getMessage() for record in caplog.records if record.name == "tapekit"]
    assert [
        name for name in ["Conv2DBackpropFilter"] if any(f"slow at {name}" in text for text in messages)
    ] == expected
    (driver,) = loop._programs.values()
    assert driver._jit is not bool(expected)


def test_a_step_that_hides_its_gradients_is_told_what_to_call():
    class Hiding(tk.Step):
        def take(self, problem):
            logs, gradients = problem.loss_and_gradients()
            problem.variables[0].assign_sub(0.1 * gradients[0])
            return logs

    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop("sgd", step=Hiding(), max_iterations=3)
    with pytest.raises(ValueError, match="`take` of Hiding must call transform, apply or minimize of its problem"):
        loop.minimize(lambda: (x - 4.0) ** 2, [x])
    assert float(x) == 0.0


def test_the_norm_of_a_complex_intermediate_counts_both_parts():
    x = tf.Variable([1.0, 2.0], dtype=tf.float64)

    def loss():
        z = tk.intermediate("z", tf.complex(x, 2.0 * x))
        return tf.reduce_sum(tf.math.real(z * tf.constant(1j - 2.0, tf.complex128)))

    loop = tk.OptimizationLoop("sgd", step=tk.TapeStep(intermediates=True), max_iterations=1)
    history = loop.minimize(loss, [x]).history
    np.testing.assert_allclose(history["gradient_norm/z"], [np.sqrt(10.0)])


def test_of_an_error_of_tensorflow_the_line_that_says_what_is_wrong_is_told():
    message = """Graph execution error:

    Detected at node a/b defined at (most recent call last):
      File "model.py", line 9, in call
    <stack traces unavailable>

    Input 0 must be a compile-time constant.

    XLA compilation requires that
    """

    def told(message):
        return _cause(tf.errors.InvalidArgumentError(None, None, message))

    assert told(message) == "Input 0 must be a compile-time constant"
    assert len(told("word " * 1000)) <= 300
    assert told("word " * 1000).endswith("word ...")
    assert told("Graph execution error:") == "Graph execution error:"
