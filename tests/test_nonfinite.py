"""Steps that are not finite, the best variables, and interrupts."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit import _drivers
from tapekit._nonfinite import Guard

DRIVERS = {
    "xla": {},
    "graph": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "short": {"steps_per_execution": 7},
}
BAD = 10


class Problem:
    """A parabola that is NaN in the evaluations `bad`, from 1, as is its gradient at the first entry of x."""

    def __init__(self, *bad):
        self.x = tf.Variable([1.0, 2.0], dtype=tf.float64, name="x")
        self.y = tf.Variable(5.0, dtype=tf.float64, name="y")
        self.count = tf.Variable(0, trainable=False)
        self.bad = bad

    def loss(self):
        count = self.count.assign_add(1)
        is_bad = tf.reduce_any([tf.equal(count, n) for n in [-1, *self.bad]])
        spoiled = self.x[0] ** 2 * tf.where(is_bad, tf.constant(np.nan, tf.float64), 1.0)
        return spoiled + 3.0 * self.x[1] ** 2 + self.y**2

    @property
    def variables(self):
        return [self.x, self.y]


def _slots(loop):
    return [np.array(v.numpy()) for v in loop.optimizer.variables]


def _run(problem, n, driver, optimizer="adam", **settings):
    loop = tk.OptimizationLoop(optimizer, max_iterations=n, **DRIVERS[driver], **settings)
    return loop, loop.minimize(problem.loss, problem.variables)


@pytest.mark.parametrize("step", ["tape", "minimize"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_step_that_is_not_finite_touches_neither_variables_nor_slots(driver, step):
    loop, result = _run(Problem(BAD), 50, driver, step=step)
    whole, expected = _run(Problem(), BAD - 1, driver, step=step)
    assert (result.reason, result.steps) == (tk.StopReason.NOT_FINITE, BAD)
    assert result.message == (
        f"NonFinite: the loss is nan at step {BAD}; not finite in its gradient: x (1 of 2 entries)"
    )
    for ours, theirs in zip([*result.variables, *_slots(loop)], [*expected.variables, *_slots(whole)], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.isnan(result.history["loss"][-1])
    np.testing.assert_array_equal(result.history["loss"][:-1], expected.history["loss"])


@tf.custom_gradient
def _steep(x):
    """The first entry of x, said to have a gradient whose sum overflows, once x is below 0.97."""
    gradient = tf.where(x < 0.97, tf.constant(1e307, tf.float64), 1.0)
    return x[0], lambda upstream: upstream * gradient


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("size", [200, 8000])
def test_finite_gradients_whose_sum_overflows_are_finite(driver, size):
    x = tf.Variable(np.ones(size))
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.01), max_iterations=6, **DRIVERS[driver])
    result = loop.minimize(lambda: _steep(x), [x])
    assert result.steps == 6
    losses = result.history["loss"]
    np.testing.assert_allclose(losses[:5], [1.0, 0.99, 0.98, 0.97, 0.96], rtol=1e-6)
    np.testing.assert_allclose(losses[5], -1e305, rtol=1e-6)
    np.testing.assert_allclose(x, -2e305, rtol=1e-6)


@tf.custom_gradient
def _steep_and_broken(x):
    """As `_steep`, but that an entry of the gradient is NaN once x is below -1e304."""
    gradient = tf.where(x < 0.97, tf.constant(1e307, tf.float64), 1.0)
    broken = tf.tensor_scatter_nd_update(tf.ones_like(x), [[1]], [np.nan])
    return x[0], lambda upstream: upstream * tf.where(x[0] < -1e304, broken, gradient)


@pytest.mark.parametrize("driver", DRIVERS)
def test_after_a_sum_that_overflows_an_entry_that_is_not_finite_is_found(driver):
    x, calls = tf.Variable(np.ones(200), name="x"), []

    def loss():
        calls.append(1)
        return _steep_and_broken(x)

    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.01), max_iterations=9, **DRIVERS[driver])
    for _ in range(2):
        x.assign(np.ones(200))
        result = loop.minimize(loss, [x])
        assert (result.reason, result.steps) == (tk.StopReason.NOT_FINITE, 6)
        assert "x (1 of 200 entries)" in result.message
        np.testing.assert_allclose(x, -1e305, rtol=1e-6)
    if driver != "eager":
        assert (len(calls), loop.traces) == (1, 1)  # though the step was made under other guards


class _AppliesFirst(tk.Step):
    """A step with a gradient of its own, which evaluates the loss after the update."""

    def take(self, problem):
        problem.apply([2.0 * tf.convert_to_tensor(variable) for variable in problem.variables])
        return problem.evaluate()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_loss_that_is_evaluated_after_the_update_is_looked_at_too(driver):
    x = tf.Variable([1.0, 1.0])
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(0.25), step=_AppliesFirst(), max_iterations=9, keep_best=False, **DRIVERS[driver]
    )
    result = loop.minimize(lambda: tf.reduce_sum(tf.where(x < 0.2, np.nan, x**2)), [x])
    assert (result.reason, result.steps) == (tk.StopReason.NOT_FINITE, 3)
    np.testing.assert_array_equal(x, [0.25, 0.25])


@tf.custom_gradient
def _one_infinite_slice(rows):
    """The rows, one entry of whose gradient is infinite once the first is below 0.97."""
    spoiled = tf.tensor_scatter_nd_update(tf.ones_like(rows), [[3, 1]], [np.inf])
    return tf.identity(rows), lambda upstream: upstream * tf.where(rows[0, 0] < 0.97, spoiled, 1.0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_infinity_in_one_of_more_slices_than_rows_is_found(driver):
    table = tf.Variable(tf.ones([2, 3]))
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.01), max_iterations=6, **DRIVERS[driver])
    result = loop.minimize(lambda: tf.reduce_sum(_one_infinite_slice(tf.gather(table, [0, 1, 0, 1, 1]))), [table])
    assert (result.reason, result.steps) == (tk.StopReason.NOT_FINITE, 3)
    assert "(1 of 6" in result.message
    np.testing.assert_allclose(table, [[0.96] * 3, [0.94] * 3], rtol=1e-6)


def test_to_look_at_slices_xla_sums_no_more_numbers_than_the_table_has():
    hidden = [keras.layers.Embedding(50, 3), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((20,), dtype="int32"), *hidden])
    model.compile("adam", "mse")
    x, y = np.zeros((64, 20), "int32"), np.zeros((64, 2), "float32")
    loop = tk.OptimizationLoop()
    loop.fit(model, x, y, batch_size=32, verbose=0)
    (driver,) = loop._programs.values()
    (step,) = driver.steps
    (clock, integers, floats, _, _), _ = step.structured_input_signature
    zeros = [tf.zeros(spec.shape, spec.dtype) for spec in (clock, *integers, floats)]

    @tf.function(jit_compile=True)
    def run(x, y):
        return step(zeros[0], zeros[1:-1], zeros[-1], (x, y), tf.constant(Guard.BY_SUM, tf.int32))[3]

    text = run.experimental_get_compiler_ir(tf.constant(x[:32]), tf.constant(y[:32]))(stage="optimized_hlo")
    sizes = {
        name: math.prod(map(int, shape.split(","))) for name, shape in re.findall(r"(%\S+) = f32\[([\d,]+)\]", text)
    }
    summed = [sizes[name] for name in re.findall(r"f32\[\] reduce\((%[^ ,]+),", text)]
    assert summed
    assert max(summed) <= 50 * 3 < 32 * 20 * 3
    assert len(re.findall(r" scatter\(", text)) == 2, "those of Adam: of the gradient and of its square"


def test_a_look_that_disagrees_with_the_chunk_is_taken_once(monkeypatch):
    """XLA and a graph may round a gradient to an infinity and to a number."""
    looks = []

    def all_is_finite(self, *arguments):
        looks.append(arguments)
        return True, tf.zeros([2], tf.int64)

    monkeypatch.setattr(_drivers.CompiledDriver, "_refuse", all_is_finite)
    _, result = _run(Problem(BAD), 50, "xla")
    assert (result.reason, result.steps) == (tk.StopReason.NOT_FINITE, BAD)
    assert len(looks) == 2


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_hook_that_spoils_a_gradient_is_found_and_one_that_mends_it_is_let(driver):
    class Spoil(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [gradients[0], gradients[1] * np.inf]

    class Mend(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [gradients[0], tf.zeros_like(gradients[1])]

    problem = Problem()
    loop = tk.OptimizationLoop("sgd", max_iterations=4, **DRIVERS[driver])
    result = loop.minimize(problem.loss, problem.variables, callbacks=[Spoil()])
    assert result.message.startswith("NonFinite: a gradient is not finite at step 1, where the loss is 38: y (1 of 1")
    np.testing.assert_array_equal(result.variables[1], 5.0)
    assert loop.minimize(problem.loss, problem.variables, callbacks=[Spoil(), Mend()]).steps == 4


@pytest.mark.parametrize("driver", DRIVERS)
def test_skip_goes_on_as_if_the_step_had_not_been_and_counts_it(driver, caplog):
    with caplog.at_level(logging.WARNING, "tapekit"):
        loop, result = _run(Problem(3, 5, 6), 20, driver, on_nonfinite="skip")
    whole, expected = _run(Problem(), 17, driver)
    assert (result.reason, result.steps) == (tk.StopReason.LIMIT, 20)
    assert result.message.endswith("; 3 steps that were not finite were skipped")
    np.testing.assert_array_equal(result.history["nonfinite"][:7], [0, 0, 1, 1, 2, 3, 3])
    for ours, theirs in zip([*result.variables, *_slots(loop)], [*expected.variables, *_slots(whole)], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(result.history["loss"][[0, 1, 3, *range(6, 20)]], expected.history["loss"])
    assert [record.message for record in caplog.records if "skipped" in record.message] == [
        "step 3 was not finite (the loss is nan at step 3; not finite in its gradient: x (1 of 2 entries)):"
        " skipped, as all like it."
    ]


def test_a_skipped_step_has_not_converged():
    problem = Problem(3)
    loop = tk.OptimizationLoop(
        "sgd", stopping=tk.stopping.VariablesChangeBelow(1e-9), max_iterations=8, on_nonfinite="skip"
    )
    assert loop.minimize(problem.loss, problem.variables).steps == 8


@pytest.mark.parametrize("driver", DRIVERS)
def test_raise_carries_the_result(driver):
    with pytest.raises(tk.NonFiniteError, match="the loss is nan at step 10") as caught:
        _run(Problem(BAD), 50, driver, on_nonfinite="raise")
    assert caught.value.result.steps == BAD
    assert np.isfinite(caught.value.result.x).all()


@pytest.mark.parametrize("driver", DRIVERS)
def test_rollback_goes_back_to_the_best_with_a_smaller_rate_a_few_times(driver, caplog):
    optimizer = keras.optimizers.SGD(0.1)
    policy = tk.Rollback(factor=0.5, times=2)
    with caplog.at_level(logging.WARNING, "tapekit"):
        _, result = _run(Problem(4, 7, 9), 50, driver, optimizer, on_nonfinite=policy)
    assert (result.reason, result.steps) == (tk.StopReason.NOT_FINITE, 9)
    assert result.message.endswith("; rolled back 2 times")
    assert float(optimizer.learning_rate) == pytest.approx(0.025)
    np.testing.assert_array_equal(result.history["nonfinite"], [0, 0, 0, 1, 1, 1, 2, 2, 3])
    np.testing.assert_allclose(result.history["learning_rate"], np.repeat([0.1, 0.05, 0.025], [4, 3, 2]))
    losses = result.history["loss"]
    assert losses[4] == losses[2]  # the lowest before the step that was not finite
    assert sum("rolled back to the best loss" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("driver", DRIVERS)
def test_rollback_to_the_same_best_again_has_a_smaller_rate_each_time(driver):
    x = tf.Variable(3.0)
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(10.0), max_iterations=100, on_nonfinite=tk.Rollback(factor=0.1), **DRIVERS[driver]
    )
    result = loop.minimize(lambda: x**4, [x])
    assert (result.reason, result.history["nonfinite"][-1]) == (tk.StopReason.LIMIT, 3)
    np.testing.assert_allclose(np.unique(result.history["learning_rate"]), [0.01, 0.1, 1.0, 10.0], rtol=1e-6)
    assert result.loss < 1.0


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_best_variables_are_kept_and_restored(driver):
    x = tf.Variable([3.0, -4.0], dtype=tf.float64)

    def run(n, **more):
        x.assign([3.0, -4.0])
        loop = tk.OptimizationLoop(keras.optimizers.SGD(0.05, momentum=0.95), max_iterations=n, **DRIVERS[driver])
        return loop.minimize(lambda: tf.reduce_sum(x**2), [x], **more)

    result = run(60)
    at = int(np.argmin(result.history["loss"]))
    assert 0 < at < 59
    assert result.best_loss == result.history["loss"][at] < result.loss
    np.testing.assert_array_equal(result.best_variables[0], run(at).variables[0])
    restored = run(60, restore_best=True)
    np.testing.assert_array_equal(x.numpy(), result.best_variables[0])
    np.testing.assert_array_equal(restored.variables[0], result.best_variables[0])
    assert restored.loss == restored.best_loss == result.best_loss


def test_the_last_variables_are_the_best_where_the_loss_only_falls_and_none_are_where_none_is_finite():
    x = tf.Variable(3.0)
    result = tk.OptimizationLoop("sgd", max_iterations=5).minimize(lambda: x**2, [x])
    assert (result.best_loss, result.best_variables[0]) == (result.loss, result.variables[0])
    nothing = tk.OptimizationLoop("sgd", max_iterations=5).minimize(lambda: x * np.nan, [x])
    assert np.isnan(nothing.best_loss)
    off = tk.OptimizationLoop("sgd", max_iterations=5, keep_best=False).minimize(lambda: x**2, [x])
    assert (off.best_loss, off.best_variables) == (None, None)


def _model(driver, bad_row, **settings):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = np.random.default_rng(0).normal(size=(40, 3)), np.ones((40, 1))
    if bad_row is not None:
        x[bad_row, 0] = np.nan
    loop = tk.OptimizationLoop(**DRIVERS[driver], **settings)
    return model, loop, loop.fit(model, x, y, batch_size=4, shuffle=False, verbose=0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_batch_that_is_not_finite_leaves_the_whole_model_as_it_was(driver):
    model, _, result = _model(driver, 4 * 6)
    whole, _, expected = _model(driver, None, max_iterations=6)
    assert (result.reason, result.steps) == (tk.StopReason.NOT_FINITE, 7)
    for ours, theirs in zip(
        [*model.variables, *model.optimizer.variables], [*whole.variables, *whole.optimizer.variables], strict=True
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    np.testing.assert_array_equal(result.history["loss"][:6], expected.history["loss"])


@pytest.mark.parametrize("driver", DRIVERS)
def test_skip_in_fit_keeps_weights_statistics_and_epoch_logs_finite(driver):
    model, _, result = _model(driver, 4 * 6, on_nonfinite="skip")
    assert result.steps == 10
    assert all(np.isfinite(variable.numpy()).all() for variable in model.variables)
    np.testing.assert_allclose(result.epoch_history["loss"][0], np.nanmean(result.history["loss"]), rtol=1e-5)


class Perturb(tk.Step):
    """Moves the variables before it evaluates them, as sharpness-aware minimization does."""

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        for variable, gradient in zip(problem.variables, gradients, strict=True):
            variable.assign_add(0.1 * gradient)
        problem.apply(gradients)
        return logs


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_a_strategy_of_ones_own_has_moved_is_put_back(driver):
    _, result = _run(Problem(BAD), 50, driver, step=Perturb())
    _, expected = _run(Problem(), BAD - 1, driver, step=Perturb())
    assert result.reason is tk.StopReason.NOT_FINITE
    for ours, theirs in zip(result.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"on_nonfinite": "ignore"}, ValueError, "`on_nonfinite` must be .*'ignore'"),
        ({"on_nonfinite": 3}, ValueError, "`on_nonfinite` must be"),
        ({"keep_best": "yes"}, TypeError, "`keep_best` must be True, False or None"),
        ({"keep_best": False, "on_nonfinite": "rollback"}, ValueError, "`keep_best` must not be False"),
        ({"interrupt": "ignore"}, ValueError, "`interrupt` must be"),
    ],
)
def test_bad_arguments_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        tk.OptimizationLoop("sgd", **settings)


def test_what_could_not_work_is_refused_before_the_run():
    x = tf.Variable(1.0)
    with pytest.raises(ValueError, match="`factor` must be between 0 and 1"):
        tk.Rollback(factor=1.0)
    with pytest.raises(ValueError, match="`max_iterations` or another limit must be given"):
        tk.OptimizationLoop("sgd", tolerance=0.1, on_nonfinite="skip").minimize(lambda: x**2, [x])
    schedule = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))
    with pytest.raises(ValueError, match="learning_rate that can be set"):
        tk.OptimizationLoop(schedule, max_iterations=3, on_nonfinite="rollback").minimize(lambda: x**2, [x])
    with pytest.raises(TypeError, match="`restore_best` must be True or False"):
        tk.OptimizationLoop("sgd", max_iterations=3).minimize(lambda: x**2, [x], restore_best=1)
    with pytest.raises(ValueError, match="`restore_best` must be False"):
        tk.OptimizationLoop("sgd", max_iterations=3, keep_best=False).minimize(lambda: x**2, [x], restore_best=True)
    assert x.numpy() == 1.0


# Interrupts.


class Closing(tk.Callback):
    """Notes that a run has begun and how often it was closed."""

    def __init__(self):
        super().__init__()
        self.begun = threading.Event()
        self.closed = 0

    def on_train_begin(self, logs=None):
        self.begun.set()

    def on_train_end(self, logs=None):
        self.closed += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("driver", ["xla", "eager"])
def test_a_signal_ends_the_run_between_two_steps(driver, number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    x, closing = tf.Variable(np.arange(5000.0)), Closing()
    loop = tk.OptimizationLoop("adam", max_iterations=10**9, measures={"x": lambda: x[:5]}, **DRIVERS[driver])

    def send():
        assert closing.begun.wait(60)  # before, the signal would end pytest
        time.sleep(1.5)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        loop.minimize(lambda: tf.reduce_sum(x**2), [x], callbacks=[closing])
    thread.join()
    result = loop.result
    assert (result.reason, closing.closed) == (tk.StopReason.INTERRUPTED, 1)
    assert result.message == f"interrupted after step {result.steps}"
    np.testing.assert_array_equal(result.variables[0][:5], result.history["x"][-1])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def _interrupting(step):
    return tk.callbacks.FunctionCallback(
        lambda at, logs: os.kill(os.getpid(), signal.SIGINT) if at == step else None, every=step
    )


def test_an_interrupt_may_return_the_result_instead():
    x = tf.Variable(1.0)
    loop = tk.OptimizationLoop("sgd", max_iterations=1000, interrupt="return", callbacks=[_interrupting(30)])
    result = loop.minimize(lambda: x**2, [x])
    assert (result.reason, result.steps) == (tk.StopReason.INTERRUPTED, 30)
    assert result is loop.result
    _, _, result = _model("xla", None, interrupt="return", callbacks=[_interrupting(3)])
    assert (result.reason, result.steps) == (tk.StopReason.INTERRUPTED, 3)


def test_handlers_of_the_users_own_are_left_alone():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        x = tf.Variable(1.0)
        send = tk.callbacks.FunctionCallback(lambda step, logs: os.kill(os.getpid(), signal.SIGTERM), every=5)
        assert tk.OptimizationLoop("sgd", max_iterations=5, callbacks=[send]).minimize(lambda: x**2, [x]).steps == 5
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_a_run_works_in_another_thread_and_two_may_not_share_a_variable():
    x, results = tf.Variable(1.0, name="shared"), []
    started, go_on = threading.Event(), threading.Event()

    def hold(step, logs):
        started.set()
        go_on.wait(60)

    def run():
        loop = tk.OptimizationLoop("sgd", max_iterations=1, callbacks=[hold])
        results.append(loop.minimize(lambda: x**2, [x]))

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    try:
        with pytest.raises(RuntimeError, match="a run in another thread is changing"):
            tk.OptimizationLoop("sgd", max_iterations=1).minimize(lambda: x**2, [x])
    finally:
        go_on.set()
        thread.join()
    assert results[0].steps == 1
    assert tk.OptimizationLoop("sgd", max_iterations=1).minimize(lambda: x**2, [x]).steps == 1


def test_an_eager_fit_keeps_the_best_of_variables_with_many_entries():
    x = np.linspace(-1.0, 1.0, 64, dtype="float32").reshape(32, 2)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    loop = tk.OptimizationLoop(keep_best=True)
    result = loop.fit(model, x, np.repeat(x[:, :1], 3, 1), batch_size=8, epochs=2, verbose=0)
    assert result.best_loss == result.history["loss"].min()
