"""tapekit's callbacks inside `keras.Model.fit`."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import time
import types
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers, ops

import tapekit as tk
from tapekit import stopping
from tapekit.callbacks import StopWhen

DRIVERS = {
    "eager": {"run_eagerly": True},
    "graph": {},
    "executions": {"steps_per_execution": 4},
    "xla": {"jit_compile": True},
}
EAGER = DRIVERS["eager"]
PER_EPOCH = 5


@pytest.fixture(params=DRIVERS)
def driver(request):
    return DRIVERS[request.param]


def in_drivers(*names):
    return pytest.mark.parametrize("driver", names, indirect=True)


def make_model(**settings):
    """A model whose loss in every batch is (w - 4)**2, so that SGD(0.25) halves the distance at every step."""
    dense = layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="last")
    model = keras.Sequential([keras.Input((1,), name="x"), dense], name="halving")
    model.compile(**{"optimizer": keras.optimizers.SGD(0.25), "loss": "mse", **settings})
    return model


def data(batches=PER_EPOCH):
    """Batches of 2 samples, each the same."""
    return np.ones((2 * batches, 1), "float32"), np.full((2 * batches, 1), 4.0, "float32")


def fit(model, callbacks=(), epochs=3, batches=PER_EPOCH, **more):
    settings = {"batch_size": 2, "epochs": epochs, "shuffle": False, "verbose": 0, "callbacks": callbacks}
    return model.fit(**{**dict(zip("xy", data(batches), strict=True)), **settings, **more}).history


def weight(step):
    return 4.0 - 4.0 * 0.5**step


def loss(step):
    """The loss that the logs of `step` hold: that before the update."""
    return 16.0 * 0.25 ** (step - 1)


def gradient(step):
    return 8.0 * 0.5 ** (step - 1)


def weight_of(model):
    return float(np.ravel(model.trainable_variables[-1])[0])


def taken(model):
    return int(model.optimizer.iterations)


class Watch(tk.Callback):
    """Changes nothing, and keeps what it sees."""

    def __init__(self, every=1, **attributes):
        super().__init__()
        self.every = every
        self.steps, self.losses, self.logs, self.live, self.traced = [], [], [], [], 0
        vars(self).update(attributes)

    def on_gradient(self, gradients, variables):
        self.traced += 1

    def on_step(self, step, logs):
        self.steps.append(step)
        self.losses.append(logs["loss"])
        self.logs.append(dict(logs))
        if self.model is not None and self.model.trainable_variables:
            self.live.append(weight_of(self.model))


class Half(tk.Callback):
    """Halves the gradients."""

    def on_gradient(self, gradients, variables):
        return [0.5 * gradient for gradient in gradients]


def _optimizers(model):
    return [value for value in vars(model).values() if isinstance(value, keras.optimizers.Optimizer)]


def variables_of(model):
    """All that a fit changes."""
    slots = [variable for optimizer in _optimizers(model) for variable in optimizer.variables]
    return [*model.variables, *model.metrics_variables, *slots]


def everything(model):
    return [variable.numpy() for variable in variables_of(model)]


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


# The callbacks of the manual.


def test_hooks_criteria_and_gradient_callbacks_work_in_a_plain_list_of_callbacks(driver):
    class Mine(Watch):
        def on_gradient(self, gradients, variables):
            super().on_gradient(gradients, variables)
            return [0.5 * gradient for gradient in gradients]

    statistics = tk.callbacks.GradientStatistics(every=10)
    stop = StopWhen(stopping.GradientNormBelow(0.1) | stopping.WallTime(600))
    mine, model = Mine(), make_model(**driver)
    fit(model, [tk.callbacks.ClipGradients(global_norm=4.0), statistics, stop, mine], epochs=100)
    # Clipped to 4 and halved, the gradient moves the weight by 1/2 until it is below 4, and then by 1/4 of the rest.
    distances, norms = [4.0], []
    while not norms or norms[-1] > 0.1:
        norms.append(2.0 * distances[-1])
        distances.append(distances[-1] - 0.125 * min(norms[-1], 4.0))
    count = len(norms)
    assert mine.steps == list(range(1, count + 1))
    assert mine.losses == pytest.approx([distance**2 for distance in distances[:-1]], rel=1e-4)
    assert [logs["unclipped_norm"] for logs in mine.logs] == pytest.approx(norms, rel=1e-4)
    assert mine.live == pytest.approx([4.0 - distance for distance in distances[1:]], rel=1e-5)
    assert (taken(model), mine.traced) == (count, count if driver == EAGER else 1)
    assert statistics.steps.tolist() == list(range(10, count + 1, 10))
    looked = np.minimum(norms[9::10], 4.0)
    np.testing.assert_allclose(statistics.statistics["halving/last/kernel"]["norm"], looked, rtol=1e-4)
    assert stop.reason is tk.StopReason.CONVERGED
    assert stop.message == (
        f"GradientNormBelow: the gradient norm {norms[-1]:.3g} (ord=2) at step {count} is at most 0.1"
    )


@in_drivers("eager", "executions")
def test_logs_hold_the_loss_of_the_very_batch_before_its_update(driver):
    random = np.random.default_rng(3)
    x, y = random.normal(size=(10, 3)).astype("float32"), random.normal(size=(10, 1)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.1))])
    model.compile(keras.optimizers.SGD(0.05), "mse", **driver)
    points = [[variable.numpy() for variable in model.trainable_variables]]
    watch = Watch()
    keep = tk.callbacks.FunctionCallback(lambda *_: points.append([v.numpy() for v in model.trainable_variables]))
    history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[watch, keep]).history
    expected = []
    for (kernel, bias), rows in zip(points, 2 * [slice(0, 4), slice(4, 8), slice(8, 10)], strict=False):
        error = x[rows] @ kernel + bias - y[rows]
        expected.append(float(np.mean(error**2) + 0.1 * np.sum(kernel**2)))
    assert watch.losses == pytest.approx(expected, rel=1e-5)
    means = [np.average(expected[first : first + 3], weights=[4, 4, 2]) for first in (0, 3)]
    assert history["loss"] == pytest.approx(means, rel=1e-5)


def _two_layers(**settings):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh", name="first"), layers.Dense(1, name="last")])
    model.compile(**{"optimizer": keras.optimizers.SGD(0.1, momentum=0.9), "loss": "mse", **settings})
    return model


def _samples(count=14, outputs=1):
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 3)).astype("float32")
    return x, np.tanh(x[:, :outputs]) + 1.0


def _fit_samples(model, callbacks=(), **more):
    settings = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
    if "x" not in more:
        more["x"], more["y"] = _samples()
    return model.fit(**{**settings, **more}).history


GRADIENT_CALLBACKS = {
    "clip by value": lambda: tk.callbacks.ClipGradients(value=0.1),
    "clip by norm": lambda: tk.callbacks.ClipGradients(norm=0.1),
    "noise": lambda: tk.callbacks.GradientNoise(0.1),
    "freeze": lambda: tk.callbacks.FreezeVariables("first", until=2),
    "scale": lambda: tk.callbacks.ScaleGradients({"last": 0.1}),
    "centralize": tk.callbacks.CentralizeGradients,
}


@pytest.mark.parametrize("name", GRADIENT_CALLBACKS)
def test_a_gradient_callback_does_what_it_does_in_the_loop(name):
    model, other, plain = (_two_layers(**EAGER) for _ in range(3))
    _fit_samples(model, [GRADIENT_CALLBACKS[name]()], epochs=1)
    x, y = _samples()
    loop = tk.OptimizationLoop(callbacks=[GRADIENT_CALLBACKS[name]()])
    loop.fit(other, x, y, batch_size=4, shuffle=False, verbose=0)
    _fit_samples(plain, epochs=1)
    assert_same(everything(model), everything(other))
    assert any(np.any(one != two) for one, two in zip(everything(model), everything(plain), strict=True))


@in_drivers("eager", "executions")
def test_callbacks_that_look_at_gradients_see_those_of_the_steps_that_are_due(driver):
    model = make_model(**driver)
    capture, statistics = tk.callbacks.CaptureGradients(every=3), tk.callbacks.GradientStatistics(every=4)
    fit(model, [capture, Half(), statistics], epochs=2)
    distances = 4.0 * 0.75 ** np.arange(10)
    assert (capture.steps.tolist(), statistics.steps.tolist()) == ([3, 6, 9], [4, 8])
    np.testing.assert_allclose(np.ravel(capture.gradients["halving/last/kernel"]), -2.0 * distances[2::3], rtol=1e-5)
    np.testing.assert_allclose(statistics.statistics["halving/last/kernel"]["mean"], -distances[3::4], rtol=1e-5)


@in_drivers("graph", "executions")
def test_check_gradients_compares_with_the_loss_of_the_batch_of_the_step(driver):
    class Wrong(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [1.1 * gradient for gradient in gradients]

    check = tk.callbacks.CheckGradients(steps=2, entries=1)
    model, plain = _two_layers(**driver), _two_layers(**driver)
    history = _fit_samples(model, [check, Watch()])
    assert (check.checked, check.failed) == (2 * 4, 0)
    assert history == _fit_samples(plain)
    assert_same(everything(model), everything(plain))
    with pytest.raises(ValueError, match=r"^the gradient must be that of the loss; at step 1 "):
        _fit_samples(model, [Wrong(), tk.callbacks.CheckGradients(entries=1)])


def test_evaluate_is_refused_where_the_batch_is_not_kept():
    class Evaluating(tk.Callback):
        def on_step(self, step, logs):
            self.loop.evaluate()

    with pytest.raises(RuntimeError, match=r"^evaluate needs the batch of the step, which keras.Model.fit drops; use "):
        fit(make_model(**EAGER), [Evaluating()])


@pytest.mark.parametrize("shape", [(), (2,)])
def test_what_a_hook_records_is_in_the_logs_of_the_step_and_not_in_the_history_of_keras(shape):
    class Recording(Watch):
        def on_gradient(self, gradients, variables):
            self.record("size", tf.fill(shape, tf.reduce_sum(tf.abs(gradients[0]))))

    watch, batch_logs = Recording(), []
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: batch_logs.append(sorted(logs)))
    history = fit(make_model(**EAGER), [watch, keep], epochs=1)
    for step, logs in enumerate(watch.logs, 1):
        np.testing.assert_allclose(logs["size"], np.full(shape, gradient(step)), rtol=1e-6)
    assert (list(history), batch_logs) == (["loss"], PER_EPOCH * [["loss"]])


# Hooks that change nothing change nothing.


class Subclassed(keras.Model):
    """A model whose variables are made at the first batch, but for those of a layer that has been built."""

    def __init__(self):
        super().__init__()
        self.body = layers.Dense(4, "tanh", name="body")
        self.body.build((None, 3))
        self.dropout = layers.Dropout(0.3, seed=1)
        self.norm = layers.BatchNormalization()
        self.head = layers.Dense(1, name="head")

    def call(self, inputs, training=False):
        return self.head(self.norm(self.dropout(self.body(inputs), training=training), training=training))


class OwnLoss(Subclassed):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.log(ops.cosh(y - y_pred))) + 0.01 * ops.sum(ops.square(self.body.kernel))


class OwnStep(keras.Model):
    """Customizing fit: compute_loss and apply_gradients."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            value = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(value, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(value)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


class OwnMetrics(keras.Model):
    """Customizing fit: metrics of its own, and no optimizer where Keras would have it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae = keras.metrics.MeanAbsoluteError(name="mae")

    @property
    def metrics(self):
        return [self.loss_tracker, self.mae]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            value = ops.mean(ops.square(y - y_pred))
        self.optimizer.apply(tape.gradient(value, self.trainable_variables), self.trainable_variables)
        self.loss_tracker.update_state(value)
        self.mae.update_state(y, y_pred)
        return {"loss": self.loss_tracker.result(), "mae": self.mae.result()}

    def test_step(self, data):
        x, y = data
        self.loss_tracker.update_state(ops.mean(ops.square(y - self(x))))
        return {"loss": self.loss_tracker.result()}


class Adversaries(keras.Model):
    """Two optimizers for two networks; that of Keras is not used."""

    def __init__(self):
        super().__init__()
        self.critic = keras.Sequential([keras.Input((3,)), layers.Dense(1, name="judge")], name="critic")
        self.maker = keras.Sequential([keras.Input((2,)), layers.Dense(3, name="make")], name="maker")
        self.noise = keras.random.SeedGenerator(7)

    def compile(self, critic_optimizer, maker_optimizer, **settings):
        super().compile(**settings)
        self.critic_optimizer, self.maker_optimizer = critic_optimizer, maker_optimizer

    def train_step(self, data):
        real, _ = data
        fake = self.maker(keras.random.normal((ops.shape(real)[0], 2), seed=self.noise))
        with tf.GradientTape() as tape:
            critic_loss = ops.mean(ops.square(self.critic(real) - 1.0)) + ops.mean(ops.square(self.critic(fake)))
        weights = self.critic.trainable_weights
        self.critic_optimizer.apply_gradients(zip(tape.gradient(critic_loss, weights), weights, strict=True))
        latent = keras.random.normal((ops.shape(real)[0], 2), seed=self.noise)
        with tf.GradientTape() as tape:
            maker_loss = ops.mean(ops.square(self.critic(self.maker(latent)) - 1.0))
        weights = self.maker.trainable_weights
        self.maker_optimizer.apply_gradients(zip(tape.gradient(maker_loss, weights), weights, strict=True))
        return {"critic_loss": critic_loss, "maker_loss": maker_loss}


def _functional(kind=keras.Model, outputs=1):
    inputs = keras.Input((3,))
    return kind(inputs, layers.Dense(outputs)(layers.Dense(4, "tanh")(inputs)))


def _compiled(make, **settings):
    """Returns a function that makes the same model at every call."""

    def compiled(**more):
        keras.utils.set_random_seed(0)
        model = make()
        arguments = {"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), "loss": "mse", "metrics": ["mae"]}
        arguments |= {name: value() if callable(value) else value for name, value in settings.items()}
        model.compile(**{**arguments, **more})
        return model

    return compiled


def _adversaries(**more):
    keras.utils.set_random_seed(0)
    model = Adversaries()
    model.compile(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.02), **more)
    return model


def _embedding():
    hidden = [layers.Embedding(7, 3), layers.GlobalAveragePooling1D(), layers.Dense(1)]
    return keras.Sequential([keras.Input((3,), dtype="int32"), *hidden])


MODELS = {
    "layers built at the first batch": _compiled(Subclassed),
    "compute_loss": _compiled(OwnLoss),
    "train_step": _compiled(lambda: _functional(OwnStep), metrics=None),
    "metrics": _compiled(lambda: _functional(OwnMetrics), loss=None, metrics=None),
    "two optimizers": _adversaries,
    "metrics of several values": _compiled(
        lambda: _functional(outputs=2), metrics=lambda: ["mae", keras.metrics.F1Score(name="f1")]
    ),
    "accumulation": _compiled(_functional, optimizer=lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)),
    "averages and decay": _compiled(
        _functional,
        optimizer=lambda: keras.optimizers.AdamW(0.1, clipnorm=0.5, use_ema=True, ema_overwrite_frequency=3),
    ),
    "indexed slices": _compiled(_embedding),
}


def _data_for(name):
    x, y = _samples(outputs=2 if name == "metrics of several values" else 1)
    return (np.random.default_rng(0).integers(0, 7, x.shape), y) if name == "indexed slices" else (x, y)


def _with_and_without(name, driver, callbacks):
    """Returns what two fits of equal models leave, the first of them with callbacks."""
    results = []
    for given in (callbacks, []):
        model, (x, y) = MODELS[name](**driver), _data_for(name)
        held_out = None if name == "two optimizers" else (x[:6], y[:6])
        history = _fit_samples(model, given, x=x, y=y, epochs=1, validation_data=held_out)
        results.append((model, history))
    return results


def assert_equal_fits(name, driver, callbacks):
    (model, history), (plain, expected) = _with_and_without(name, driver, callbacks)
    assert sorted(history) == sorted(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(history[key], values)
    assert_same(everything(model), everything(plain))
    assert [optimizer.built for optimizer in _optimizers(model)] == [o.built for o in _optimizers(plain)]
    return model


@pytest.mark.parametrize("name", MODELS)
def test_an_eager_fit_with_hooks_that_change_nothing_is_bit_equal_to_a_plain_one(name):
    watch, stop = Watch(), StopWhen(stopping.GradientNormBelow(0.0) | stopping.VariablesChangeBelow(-0.0).for_steps(9))
    looking = [tk.callbacks.GradientStatistics(), tk.callbacks.ClipGradients(global_norm=1e9)]
    model = assert_equal_fits(name, EAGER, [watch, stop, *looking])
    assert watch.steps == [1, 2, 3, 4]
    assert len(looking[0].statistics) <= len(model.trainable_variables)


@pytest.mark.parametrize(
    ("name", "driver"),
    [("layers built at the first batch", "graph"), ("two optimizers", "graph"), ("metrics", "executions")],
    indirect=["driver"],
)
def test_a_compiled_fit_with_hooks_that_change_nothing_is_bit_equal_to_a_plain_one(name, driver):
    watch = Watch()
    assert_equal_fits(name, driver, [watch])
    assert watch.steps == [1, 2, 3, 4]


def test_a_fit_under_xla_with_hooks_that_change_nothing_is_bit_equal_to_a_plain_one():
    model, plain = make_model(**DRIVERS["xla"]), make_model(**DRIVERS["xla"])
    assert fit(model, [Watch()], epochs=1) == fit(plain, epochs=1)
    assert_same(everything(model), everything(plain))


def test_jit_compile_of_the_model_is_honoured():
    class Python(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [tf.ensure_shape(tf.numpy_function(np.abs, [g], g.dtype), g.shape) for g in gradients]

    fit(make_model(), [Python()], epochs=1)
    with pytest.raises(ValueError, match=r"^`jit_compile` must be False .* XLA cannot compile this step"):
        fit(make_model(**DRIVERS["xla"]), [Python()], epochs=1)


# What runs before, between and after.


@in_drivers("eager", "graph")
def test_plain_fits_before_and_after_are_those_of_a_model_that_never_saw_our_callbacks(driver):
    watch, model, plain = Watch(), _two_layers(**driver), _two_layers(**driver)
    _fit_samples(model)
    keras_function, calls = model.train_function, []
    _fit_samples(model, [watch, StopWhen(stopping.MaxIterations(100))])
    traced = watch.traced
    assert model.train_function is keras_function
    calls.append(_fit_samples(model))
    for _ in range(3):
        expected = _fit_samples(plain)
    assert calls == [expected]
    assert_same(everything(model), everything(plain))
    assert (watch.traced, watch.steps[-1]) == (traced, 8)


def test_a_second_fit_traces_nothing_until_the_model_is_compiled_anew_or_others_are_called_back():
    model, watch, stop = make_model(), Watch(), StopWhen(stopping.LossBelow(0.0))
    other, traces = StopWhen(stopping.LossBelow(0.0)), []
    for callbacks in ([watch, stop], [watch, other], [watch, stop, Half()], [watch, stop]):
        for _ in range(2):
            fit(model, callbacks, epochs=1)
            traces.append(watch.traced)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.layers[-1].kernel.assign([[1.0]])
    for _ in range(2):
        fit(model, [watch, stop], epochs=1)
        traces.append(watch.traced)
    assert traces == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert watch.live[-10:] == 10 * [1.0]


def test_a_model_that_is_compiled_anew_in_the_middle_of_a_fit_goes_on_with_its_new_optimizer_and_loss():
    class Anew(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.compile(keras.optimizers.SGD(0.0625), "mae")
                self.model.make_train_function()

    model, plain, watch = make_model(), make_model(), Watch()
    stop = StopWhen(stopping.MaxIterations(8))
    history = fit(model, [Anew(), watch, stop], epochs=2)
    expected = fit(plain, [Anew()], epochs=2)
    assert history["loss"][0] == expected["loss"][0]
    assert watch.losses[5:] == pytest.approx([0.125, 0.0625, 0.0], abs=1e-6)
    assert (taken(model), stop.message) == (3, "MaxIterations: step 8 reached the limit of 8")


# Steps, executions and epochs.


@pytest.mark.parametrize("every", [1, 3, 7])
@in_drivers("eager", "executions")
def test_on_step_is_live_at_every_nth_step_counted_over_epochs(every, driver):
    watch, model = Watch(every), make_model(**driver)
    fit(model, [watch], epochs=3)
    due = list(range(every, 3 * PER_EPOCH + 1, every))
    assert watch.steps == due
    assert watch.losses == pytest.approx([loss(step) for step in due], rel=1e-5)
    assert watch.live == pytest.approx([weight(step) for step in due], rel=1e-6)


def test_a_replayable_callback_sees_every_step_in_order_and_makes_no_chunk_shorter():
    model, replay = make_model(steps_per_execution=4), Watch(replayable=True)
    for _ in range(2):  # the first chunks of a driver are short, so that it learns how fast it is
        start = 4.0 - weight_of(model)
        replay.steps, replay.losses, replay.live = [], [], []
        fit(model, [replay], epochs=1, batches=12)
    assert replay.steps == list(range(1, 13))
    assert replay.losses == pytest.approx([start**2 * loss(step) / 16.0 for step in replay.steps], abs=1e-9)
    assert len(set(replay.live)) == 3  # the model is that of the end of an execution of four


def test_keras_callbacks_hear_of_batches_as_without_ours():
    def heard(callbacks):
        events, model = [], make_model(steps_per_execution=2, metrics=["mae"])
        keep = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: events.append(("begin", batch)),
            on_train_batch_end=lambda batch, logs: events.append(("end", batch, logs)),
            on_epoch_end=lambda epoch, logs: events.append((epoch, logs)),
        )
        fit(model, [*callbacks, keep], epochs=2, batches=4, validation_data=data(2))
        return events

    assert heard([Watch(), StopWhen(stopping.LossBelow(0.0))]) == heard([])


class _Batches:
    """Batches of unknown number, each of which is counted when it is taken."""

    def __init__(self, count=1000):
        self.taken, self._count = 0, count

    def __iter__(self):
        for _ in range(self._count):
            self.taken += 1
            yield np.ones((2, 1), "float32"), np.full((2, 1), 4.0, "float32")

    def dataset(self):
        spec = tf.TensorSpec((2, 1), tf.float32)
        dataset = tf.data.Dataset.from_generator(lambda: iter(self), output_signature=(spec, spec))
        options = tf.data.Options()
        options.autotune.enabled = options.experimental_optimization.apply_default_optimizations = False
        return dataset.with_options(options)  # which takes nothing in advance


@in_drivers("eager", "executions")
def test_a_criterion_stops_at_the_exact_step_inside_an_execution_and_takes_no_more_data(driver):
    batches, model, stop = _Batches(), make_model(**driver), StopWhen(stopping.LossBelow(loss(6) * 1.01))
    ends, held_out = [], data(64)
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(logs))
    more = {"epochs": 4, "shuffle": False, "verbose": 0, "validation_data": held_out}
    model.fit(batches.dataset(), callbacks=[stop, keep], **more)
    assert (taken(model), batches.taken) == (6, 6)
    assert weight_of(model) == pytest.approx(weight(6), rel=1e-6)
    assert stop.message == f"LossBelow: the loss {loss(6):.6g} at step 6 is at most {loss(6) * 1.01:g}"
    (logs,) = ends
    assert logs["loss"] == pytest.approx(np.mean([loss(step) for step in range(1, 7)]), rel=1e-5)
    assert logs["val_loss"] == pytest.approx(loss(7), rel=1e-5)


@in_drivers("eager", "executions")
def test_a_hook_stops_the_fit_at_its_step_and_the_reason_is_logged(driver, caplog):
    class Stopping(tk.Callback):
        def on_step(self, step, logs):
            if step == 7:
                self.loop.stop("seven are enough")

    class Setting(tk.Callback):
        def on_step(self, step, logs):
            self.model.stop_training = step == 7

    for callback in (Stopping(), Setting()):
        model = make_model(**driver)
        with caplog.at_level(logging.INFO, "tapekit"):
            history = fit(model, [callback])
        assert (taken(model), len(history["loss"])) == (7, 2)
    assert [record.getMessage() for record in caplog.records] == ["stopped at step 7: seven are enough"]


def test_a_keras_callback_that_stops_before_a_batch_has_it_taken_as_without_ours():
    def stop(batch, logs):
        model.stop_training = True

    early = keras.callbacks.LambdaCallback(on_train_batch_begin=stop)
    for callbacks in ([early], [early, Watch()]):
        model = make_model(steps_per_execution=4)
        fit(model, callbacks)
        assert taken(model) == 4
    fit(model, [early, Watch(), StopWhen(stopping.MaxIterations(2))])
    assert taken(model) == 4 + 2


def test_the_clock_is_looked_at_inside_long_executions(monkeypatch):
    ticks, model, stop = itertools.count(), make_model(steps_per_execution=50), StopWhen(stopping.WallTime(2.5))
    fit(model, [stop], epochs=1, batches=50)  # traced before the clock is a counter
    model = make_model(steps_per_execution=50)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    fit(model, [stop], epochs=1, batches=50)
    assert 1 <= taken(model) < 50
    assert stop.reason is tk.StopReason.LIMIT
    assert stop.message.startswith("WallTime: ")


@in_drivers("eager", "executions")
def test_criteria_keep_their_states_over_epochs_and_begin_anew_with_a_fit(driver):
    model = make_model(optimizer=keras.optimizers.SGD(0.0), **driver)
    stop = StopWhen(stopping.LossPlateau(7))
    for _ in range(2):
        before = taken(model)
        fit(model, [stop], epochs=9)
        assert taken(model) - before == 8
        assert stop.message == "LossPlateau: no loss better than 16 by more than 0 for 7 steps at step 8"


# StopWhen.


def test_reason_and_message_are_none_unless_the_last_fit_was_ended_by_the_criterion():
    first = StopWhen(stopping.MaxIterations(3))
    second = StopWhen([stopping.LossBelow(1e-30), stopping.MaxIterations(3)])
    third = StopWhen(stopping.LossBelow(0.0) & stopping.MaxIterations(3))
    fit(make_model(**EAGER), [first, second, third])
    sentence = "MaxIterations: step 3 reached the limit of 3"
    for stop in (first, second):
        assert (stop.reason, stop.message) == (tk.StopReason.LIMIT, sentence)
    assert (third.reason, third.message) == (None, None)
    fit(make_model(**EAGER), [first, third], epochs=1, batches=2)
    assert (first.reason, first.message) == (None, None)


def test_one_criterion_serves_several_callbacks():
    criterion = stopping.MaxIterations(2)
    stops = [StopWhen(criterion), StopWhen(criterion)]
    fit(make_model(**EAGER), stops)
    assert [stop.message for stop in stops] == 2 * ["MaxIterations: step 2 reached the limit of 2"]


@pytest.mark.parametrize("where", ["minimize", "fit", "steps"])
def test_in_a_loop_it_is_one_more_criterion(where):
    stops = [StopWhen(stopping.LossBelow(loss(4) * 1.01)), StopWhen(stopping.MaxIterations(50))]
    for target, count, reason in ((4.0, 4, tk.StopReason.CONVERGED), (1e6, 6, None)):
        loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), run_eagerly=True, max_iterations=6)
        x = tf.Variable(0.0)

        def distance():
            return (x - target) ** 2

        if where == "fit":
            inputs = data()[0]
            more = {"batch_size": 2, "epochs": 3, "verbose": 0}
            result = loop.fit(make_model(**EAGER), inputs, target * inputs, callbacks=stops, **more)
        elif where == "minimize":
            result = loop.minimize(distance, [x], callbacks=stops)
        else:
            for _ in loop.steps(distance, [x], callbacks=stops):
                pass
            result = loop.result
        assert (result.steps, stops[0].reason, stops[1].reason) == (count, reason, None)
        assert stops[0].message == (result.message if reason else None)


@in_drivers("eager", "graph")
def test_a_criterion_reads_the_metrics_of_the_model(driver):
    class ErrorBelow(stopping.Criterion):
        def update(self, state, logs):
            return state, logs["mae"] <= 1.9

        def message(self, state, logs):
            return f"the mean error {logs['mae']:.3f}"

    stop, model = StopWhen(ErrorBelow()), make_model(metrics=["mae"], **driver)
    fit(model, [stop])
    assert (taken(model), stop.message) == (4, "ErrorBelow: the mean error 1.875")  # the mean of 4, 2, 1 and 0.5


# Mixed precision, train_step of its own, all kinds of data.


def _mixed(initial_scale, **settings):
    dense = layers.Dense(1, use_bias=False, kernel_initializer="zeros", dtype="mixed_float16", name="last")
    model = keras.Sequential([keras.Input((1,)), dense])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.25), initial_scale)
    model.compile(optimizer, "mse", **settings)
    return model


@in_drivers("eager", "executions")
def test_hooks_see_unscaled_gradients_and_skipped_steps_under_mixed_precision(driver):
    capture, watch, model = tk.callbacks.CaptureGradients(), Watch(), _mixed(2.0**10, **driver)
    fit(model, [capture, watch, tk.callbacks.ClipGradients(global_norm=1e6)], epochs=1)
    np.testing.assert_array_equal(np.ravel(*capture.gradients.values()), [-gradient(step) for step in range(1, 6)])
    assert [logs["skipped"] for logs in watch.logs] == 5 * [False]

    model, plain = _mixed(2.0**15, **driver), _mixed(2.0**15, **driver)  # in which float16 overflows at first
    watch = Watch()
    history = fit(model, [watch, tk.callbacks.ClipGradients(global_norm=1e6)], epochs=2, batches=4)
    expected = fit(plain, epochs=2, batches=4)
    assert [logs["skipped"] for logs in watch.logs] == 3 * [True] + 5 * [False]
    assert watch.live[:3] == 3 * [0.0]
    assert watch.losses == pytest.approx(3 * [16.0] + [loss(step) for step in range(1, 6)])
    assert history == expected
    assert_same(everything(model), everything(plain))


LOSS_OF = {"compute_loss": "loss", "train_step": "loss", "metrics": "loss", "two optimizers": None}


@pytest.mark.parametrize("name", LOSS_OF)
def test_the_loss_in_the_logs_is_that_of_the_batch_for_models_that_compute_it_themselves(name):
    """Epochs of one batch: there Keras reports the loss of the batch too."""
    x, y = _data_for(name)
    watch, losses = Watch(), []
    model, plain = MODELS[name](**EAGER), MODELS[name](**EAGER)
    _fit_samples(model, [watch], x=x, y=y, epochs=1)
    for first in range(0, len(x), 4):
        logs = _fit_samples(plain, x=x[first : first + 4], y=y[first : first + 4], epochs=1)
        losses.append(logs["loss"][0] if "loss" in logs else logs["critic_loss"][0] + logs["maker_loss"][0])
    assert watch.losses == pytest.approx(losses, rel=1e-5)


def test_hooks_see_and_change_the_gradients_of_two_optimizers_and_criteria_count_both():
    class Still(Watch):
        def on_gradient(self, gradients, variables):
            self.seen = [*getattr(self, "seen", []), [variable.path for variable in variables]]
            return [ops.zeros_like(gradient) for gradient in gradients]

    model, watch, clip = _adversaries(**EAGER), Still(), tk.callbacks.ClipGradients(norm=1.0)
    before, norms = [variable.numpy() for variable in model.trainable_variables], []
    stop = StopWhen(stopping.GradientNormBelow(1e9).after(3))
    _fit_samples(model, [clip, watch, stop])
    assert_same([variable.numpy() for variable in model.trainable_variables], before)
    assert watch.seen == 3 * [["critic/judge/kernel", "critic/judge/bias"], ["maker/make/kernel", "maker/make/bias"]]
    norms = [math.hypot(logs["unclipped_norm"], logs["unclipped_norm_2"]) for logs in watch.logs]
    assert [logs["gradient_norm"] for logs in watch.logs] == pytest.approx(norms, rel=1e-6)
    assert stop.reason is tk.StopReason.CONVERGED
    assert (model.critic_optimizer.built, model.optimizer.built) == (True, False)


class _Sequence(keras.utils.PyDataset):
    def __len__(self):
        return PER_EPOCH

    def __getitem__(self, index):
        x, y = data()
        rows = slice(2 * index, 2 * index + 2)
        return x[rows], (1.0 + index) * y[rows]


def _unknown():
    x, y = data()
    dataset = tf.data.Dataset.from_tensor_slices((x, y, np.linspace(0.5, 1.0, len(x)).astype("float32")))
    return dataset.batch(3).filter(lambda *_: True)


def _endless():
    for number in itertools.count():
        yield np.ones((1 + number % 3, 1), "float32"), np.full((1 + number % 3, 1), 4.0 + number % 2, "float32")


SOURCES = {
    "arrays": lambda: dict(zip("xy", data(), strict=True), batch_size=3, class_weight=None),
    "a dataset of unknown length": lambda: {"x": _unknown(), "batch_size": None},
    "a PyDataset": lambda: {"x": _Sequence(), "batch_size": None},
    "a generator": lambda: {"x": _endless(), "steps_per_epoch": 4, "batch_size": None},
}


@pytest.mark.parametrize("source", SOURCES)
@in_drivers("eager", "executions")
def test_data_of_every_kind_is_taken_as_without_ours(source, driver):
    results = []  # compared with an eager one, as compiled ones of Keras count a step more where data ends unforeseen
    for callbacks, settings in (([Watch()], driver), ([], EAGER)):
        model, more = make_model(metrics=["mae"], **settings), SOURCES[source]()
        y = more.pop("y", None)
        history = model.fit(**{"y": y, "epochs": 3, "shuffle": False, "verbose": 0, "callbacks": callbacks, **more})
        results.append((history.history, everything(model), taken(model)))
        if callbacks:
            assert callbacks[0].steps == list(range(1, taken(model) + 1))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


# Where hooks are written as Keras lets them be.


def test_callbacks_need_not_call_the_hooks_that_they_override():
    class Mute(Watch):
        def on_train_begin(self, logs=None):
            self.runner = self.loop

        def on_train_batch_begin(self, batch, logs=None):
            self.batch = batch

        def on_train_batch_end(self, batch, logs=None):
            self.batch = None

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_end(self, logs=None):
            self.runner_at_end = self.loop

    class Unset(Mute):
        def set_model(self, model):
            self.kept = model

    callbacks = [Mute(), Unset()]
    model = make_model(**EAGER)
    fit(model, callbacks, epochs=1)
    for callback in callbacks:
        assert callback.steps == list(range(1, PER_EPOCH + 1))
        assert callback.runner is callback.runner_at_end is callback.loop
        assert callback.loop.optimizer is model.optimizer


def test_a_callback_may_be_wrapped_or_be_inside_of_another():
    class Around(keras.callbacks.Callback):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def set_model(self, model):
            super().set_model(model)
            self.inner.set_model(model)

    class Decorated(Watch):
        def set_model(self, model):
            super().set_model(model)

    def decorate(function):
        return lambda *arguments: function(*arguments)

    Decorated.set_model = decorate(Decorated.set_model)
    for callback in (Around(Watch()), Decorated()):
        fit(make_model(**EAGER), [callback], epochs=1)
        assert getattr(callback, "inner", callback).steps == list(range(1, PER_EPOCH + 1))


def test_a_list_of_callbacks_of_the_users_own_serves_several_fits_and_models():
    watch, stop, models = Watch(), StopWhen(stopping.MaxIterations(4)), [make_model(**EAGER), make_model(**EAGER)]
    everyone = keras.callbacks.CallbackList([watch, stop], add_history=True, model=models[0])
    for model in (models[0], models[0], models[1]):
        if model is not models[0]:
            everyone.set_model(model)
        watch.steps = []
        fit(model, everyone, epochs=2)
        assert (watch.steps, stop.reason) == ([1, 2, 3, 4], tk.StopReason.LIMIT)
    assert [taken(model) for model in models] == [8, 4]


def test_more_criteria_than_a_step_has_bits_for_are_refused():
    model = make_model(**EAGER)
    with pytest.raises(ValueError, match=r"^`stopping` must hold at most 27 criteria, received 32\.$"):
        fit(model, [StopWhen(stopping.LossBelow(0.0)) for _ in range(32)])
    assert taken(model) == 0


@in_drivers("eager", "graph")
def test_a_loop_of_the_users_own_over_batches_has_the_hooks_and_gets_its_function_back(driver):
    watch, model, (x, y) = Watch(), make_model(**driver), data()
    fit(model, epochs=1)
    keras_function = model.train_function
    everyone = keras.callbacks.CallbackList([watch, Half()], model=model)
    everyone.on_train_begin()
    for batch in range(3):
        everyone.on_train_batch_begin(batch)
        logs = model.train_on_batch(x[:2], y[:2], return_dict=True)
        everyone.on_train_batch_end(batch, logs)
        assert model.train_function is keras_function
    everyone.on_train_batch_begin(3)
    everyone.on_train_batch_end(3, {})  # the batch was taken in some other way
    everyone.on_train_end()
    assert model.train_function is keras_function
    assert watch.losses == pytest.approx([loss(6) * 0.75 ** (2 * n) for n in range(3)], rel=1e-4)
    assert taken(model) == PER_EPOCH + 3


def test_evaluate_and_predict_call_none_of_our_hooks():
    watch, stop, model = Watch(), StopWhen(stopping.MaxIterations(1)), make_model(**EAGER)
    before = everything(model)
    value = model.evaluate(*data(), batch_size=2, verbose=0, callbacks=[watch, stop])
    model.predict(data()[0], batch_size=2, verbose=0, callbacks=[watch, stop])
    assert value == 16.0
    assert (watch.steps, watch.traced, stop.reason, model.train_function) == ([], 0, None, None)
    assert_same([variable.numpy() for variable in model.variables], before[: len(model.variables)])


def test_callbacks_go_from_the_loop_to_fit_and_back():
    watch, stop = Watch(), StopWhen(stopping.MaxIterations(4))
    model, x = make_model(**EAGER), tf.Variable(1.0)
    loop, other = tk.OptimizationLoop("sgd", run_eagerly=True), tk.OptimizationLoop(run_eagerly=True)

    def minimize():
        loop.minimize(lambda: x**2, [x], callbacks=[watch, stop])

    def loop_fit():
        other.fit(model, *data(), batch_size=2, verbose=0, callbacks=[watch, stop])

    def keras_fit():
        fit(model, [watch, stop])

    for run in (minimize, keras_fit, loop_fit, keras_fit, minimize):
        watch.steps, stop.reason = [], None
        run()
        assert watch.steps == [1, 2, 3, 4]
        assert stop.reason is tk.StopReason.LIMIT
        assert (watch.loop in (loop, other)) == (run is not keras_fit)


def test_two_models_take_turns_with_the_same_callbacks():
    watch, capture = Watch(), tk.callbacks.CaptureGradients()
    models = [make_model(**EAGER), _two_layers(**EAGER)]
    plain = [make_model(**EAGER), _two_layers(**EAGER)]
    for _ in range(2):
        for run, index in ((fit, 0), (_fit_samples, 1)):
            run(models[index], [watch, capture], epochs=1)
            run(plain[index], epochs=1)
            assert len(capture.gradients) == len(models[index].trainable_variables)
    for model, other in zip(models, plain, strict=True):
        assert_same(everything(model), everything(other))


def test_callbacks_that_look_at_gradients_forget_the_variables_of_the_run_before():
    x, y, capture = tf.Variable(1.0, name="x"), tf.Variable(2.0, name="y"), tk.callbacks.CaptureGradients()
    loop = tk.OptimizationLoop("sgd", run_eagerly=True, callbacks=[capture])
    for steps, run in ((3, lambda: x**2 + y**2), (2, lambda: x**2)):
        loop.minimize(run, [x, y], callbacks=[StopWhen(stopping.MaxIterations(steps))], allow_unused=True)
    assert list(capture.gradients) == ["x"]
    assert capture.steps.tolist() == [1, 2]


@pytest.mark.parametrize("same", [True, False])
def test_a_fit_inside_of_a_fit_has_callbacks_of_its_own(same):
    class Inner(Watch):
        def on_step(self, step, logs):
            super().on_step(step, logs)
            if step == 2:
                self.inner = Watch()
                fit(model if same else other, [self.inner, Half()], epochs=1)

    outer, after, model, other = Inner(), Watch(), make_model(**EAGER), make_model(**EAGER)
    fit(model, [outer, after], epochs=1)
    assert outer.steps == after.steps == list(range(1, PER_EPOCH + 1))
    assert outer.inner.steps == list(range(1, PER_EPOCH + 1))
    start = 4.0 - weight(2) if same else 4.0
    assert outer.inner.losses == pytest.approx([(start * 0.75**n) ** 2 for n in range(PER_EPOCH)], rel=1e-5)
    assert weight_of(model) == pytest.approx(4.0 - 4.0 * 0.5**5 * (0.75**5 if same else 1.0), rel=1e-6)


# Whichever way a fit ends.


def _public(model):
    """What tells a model and its optimizer from others, beside the values of their variables."""
    optimizer = model.optimizer
    return (
        set(vars(model)) - {"_eval_epoch_iterator"},  # which Keras leaves behind itself after an exception
        set(vars(optimizer)),
        [type(model), type(optimizer), vars(model)["train_function"]],
        json.dumps([model.get_config(), model.get_compile_config(), optimizer.get_config()], default=str),
        [variable.path for variable in variables_of(model)],
    )


def _raise(error):
    raise error


class _Failing(tk.Callback):
    """Raises in one of its hooks, not before the second batch or epoch."""

    def __init__(self, hook, error):
        super().__init__()
        self.error = error
        setattr(self, hook, self._fail)

    def _fail(self, position, *_, **__):
        if not isinstance(position, int) or position >= 1:
            raise self.error


ENDS = {
    "on_gradient": ArithmeticError("here"),
    "on_step": KeyboardInterrupt(),
    "on_train_batch_begin": KeyboardInterrupt(),
    "on_train_batch_end": ArithmeticError("here"),
    "on_epoch_end": ArithmeticError("here"),
    "on_test_batch_begin": ArithmeticError("here"),
    "data": ArithmeticError("here"),
}


@pytest.mark.parametrize(
    ("hook", "driver"),
    [*((hook, "eager") for hook in ENDS), ("on_gradient", "graph"), ("on_step", "graph"), ("data", "graph")],
    indirect=["driver"],
)
def test_after_an_exception_model_and_optimizer_are_as_before(hook, driver):
    model, never = make_model(**driver), make_model(**driver)
    for each in (model, never):
        fit(each, epochs=1, validation_data=data(1))
    before, start, watch = _public(model), everything(model), Watch()
    ours = [watch, tk.callbacks.ClipGradients(norm=1.0), StopWhen(stopping.GradientNormBelow(0.0))]
    failing = [] if hook == "data" else [_Failing(hook, ENDS[hook])]
    more = {"epochs": 2, "validation_data": data(2)}
    if hook == "data":
        batches = itertools.chain(_Batches(2), map(_raise, [ENDS[hook]]))
        more = {"x": batches, "y": None, "steps_per_epoch": 4, "batch_size": None}
    with pytest.raises(Exception if hook == "data" else type(ENDS[hook])):
        fit(model, [*failing, *ours], **more)
    assert _public(model) == before
    for variable, value in zip(variables_of(model), start, strict=True):
        variable.assign(value)
    traced = watch.traced
    assert fit(model, epochs=1) == fit(never, epochs=1)
    assert_same(everything(model), everything(never))
    assert watch.traced == traced


@in_drivers("eager", "graph")
def test_an_exception_after_our_function_is_in_place_leaves_keras_its_own(driver):
    model, failing = make_model(**driver), _Failing("on_train_batch_begin", ArithmeticError("here"))
    fit(model, epochs=1)
    keras_function = model.train_function
    for order in ([Watch(), failing], [failing, Watch()]):
        with pytest.raises(ArithmeticError):
            fit(model, order)
        assert model.train_function is keras_function


def test_after_a_fit_model_and_optimizer_are_saved_as_those_that_never_saw_our_callbacks(tmp_path):
    saved = {}
    for name, callbacks in (("ours", [tk.callbacks.ClipGradients(norm=1e6), Watch(), Half()]), ("plain", [])):
        keras.backend.clear_session()
        model = make_model(metrics=["mae"], **EAGER)
        fit(model, callbacks, epochs=1)
        model.save(tmp_path / f"{name}.keras")
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as archive:
            config = re.sub(r'"shared_object_id": \d+', "", archive.read("config.json").decode())
        restored = keras.models.load_model(tmp_path / f"{name}.keras")
        assert_same([v.numpy() for v in restored.variables], [v.numpy() for v in model.variables])
        assert_same([v.numpy() for v in restored.optimizer.variables], [v.numpy() for v in model.optimizer.variables])
        saved[name] = config, [*map(str, vars(model))], [*map(str, vars(model.optimizer))]
    assert saved["ours"] == saved["plain"]


def test_an_optimizer_that_train_step_does_not_use_is_not_built():
    model, plain = _adversaries(**EAGER), _adversaries(**EAGER)
    _fit_samples(model, [Watch(), StopWhen(stopping.GradientNormBelow(0.0))])
    _fit_samples(plain)
    assert [optimizer.built for optimizer in _optimizers(model)] == [False, True, True]
    assert_same(everything(model), everything(plain))


# What is refused, before anything has changed.


class _Inner(tk.Callback):
    def on_gradient(self, gradients, variables, intermediates):
        return None


def _replicated(model):
    model._distribute_strategy = types.SimpleNamespace(num_replicas_in_sync=2)
    keras.callbacks.CallbackList([Watch()], model=model).on_train_begin()


REFUSED = {
    "replicas": (
        _replicated,
        r"^tapekit's callbacks need a model on one device, not one of a tf.distribute strategy\.$",
    ),
    "intermediates": (
        lambda model: fit(model, [_Inner()]),
        r"^on_gradient of _Inner must do without `intermediates` in keras.Model.fit, which does not take them; use",
    ),
    "a list in the list": (
        lambda model: fit(model, [keras.callbacks.CallbackList([Watch()], model=model)]),
        r"^tapekit's callbacks must be in the list that fit is given, received them in one inside of it\.$",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_in_a_sentence_before_anything_has_changed(what):
    model = make_model(**EAGER)
    before, (run, sentence) = [variable.numpy() for variable in model.variables], REFUSED[what]
    with pytest.raises(ValueError, match=sentence):
        run(model)
    assert_same([variable.numpy() for variable in model.variables], before)
    assert taken(model) == 0


def test_fit_of_tf_keras_is_refused_with_what_to_use():
    model = tf_keras.Sequential([tf_keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(
        TypeError, match=r"^tapekit's callbacks need a model of Keras 3 in fit, .* tf_keras; use minimize"
    ):
        model.fit(*data(), verbose=0, callbacks=[Watch()])
