"""What a model was compiled with, and models that make their own steps, in `loop.fit`."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers, ops

import tapekit as tk
from tapekit import stopping
from tapekit._batches import Stream
from tapekit._drivers import CompiledDriver, Pace
from tapekit._tensors import aligned, lent, to_array

DRIVERS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}
SETTINGS = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}


@pytest.fixture(params=["eager", "graph"])
def driver(request):
    return DRIVERS[request.param]


@pytest.fixture(params=DRIVERS)
def every_driver(request):
    return DRIVERS[request.param]


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(16, 3)).astype("float32")
    return x, (x @ np.array([[1.0], [-2.0], [0.5]]) + 0.3).astype("float32")


def functional(cls=keras.Model, inside=(), **last):
    inputs = keras.Input((3,))
    outputs = inputs
    for layer in inside:
        outputs = layer(outputs)
    return cls(inputs, layers.Dense(1, name="last", **last)(outputs))


def compiled(model, optimizer="sgd", loss="mse", **more):
    model.compile(optimizer, loss, **more)
    return model


def optimizers(model):
    return [value for value in vars(model).values() if isinstance(value, keras.optimizers.Optimizer)]


def everything(model):
    """The values of all variables, those of the optimizers that have been used included."""
    used = [optimizer for optimizer in optimizers(model) if int(optimizer.iterations)]
    slots = [variable for optimizer in used for variable in optimizer.variables]
    return [variable.numpy() for variable in (*model.variables, *slots)]


@functools.lru_cache
def by_fit(make):
    """Returns the values of all variables after `fit`, which runs eagerly, and its history."""
    keras.utils.set_random_seed(0)
    model = make()
    model.run_eagerly = True
    history = model.fit(*_data_for(model), **SETTINGS).history
    for inner in history.pop("compile_metrics", []):  # which newer Keras flattens itself
        for name, value in inner.items():
            history.setdefault(name, []).append(value)
    return everything(model), history


def by_loop(make, callbacks=None, data=None, **loop):
    keras.utils.set_random_seed(0)
    model = make()
    x, y = data or _data_for(model)
    return model, tk.OptimizationLoop(**loop).fit(model, x, y, callbacks=callbacks, **SETTINGS)


def _data_for(model):
    x, y = data()
    several = len(getattr(model, "output_names", None) or []) > 1
    return (x, {"a": y, "b": -y}) if several else (x, y)


def assert_near(ours, theirs, rtol=2e-5):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol / 10)


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_as_in_fit(make, driver, rtol=2e-5):
    """Eager runs agree bit for bit; compiled ones to rounding."""
    theirs, history = by_fit(make)
    model, result = by_loop(make, **driver)
    compare = assert_equal if driver is DRIVERS["eager"] else functools.partial(assert_near, rtol=rtol)
    compare(everything(model), theirs)
    assert result.epoch_history.keys() == history.keys()
    for name, values in history.items():
        compare(result.epoch_history[name], values)
    return model, result


# What Keras does beside the gradient.


class Penalty(layers.Layer):
    """Adds a loss of its own on a weight of its own."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs):
        self.add_loss(0.1 * ops.square(self.scale - 3.0))
        return self.scale * inputs


class OwnTracker(keras.Model):
    """The example at `compute_loss` in the documentation of Keras."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        loss = ops.mean((y_pred - y) ** 2)
        loss += ops.sum(self.losses)
        self.loss_tracker.update_state(loss)
        return loss

    def reset_metrics(self):
        self.loss_tracker.reset_state()

    @property
    def metrics(self):
        return [self.loss_tracker]


class OldSignature(keras.Model):
    """A `compute_loss` from before it had `training`, that adds to the compiled one."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 2.0 * super().compute_loss(x, y, y_pred, sample_weight)


class SeveralValues(keras.Model):
    """A loss for each sample, of which TensorFlow minimizes the sum."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean((y - y_pred) ** 2, axis=-1) / 4.0


class OwnMetrics(keras.Model):
    """A `compute_metrics` of its own."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "largest": ops.max(y_pred)}


SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
AS_IN_FIT = {
    "losses in lists": lambda: compiled(functional(), loss=["mae"], loss_weights=[0.5], metrics=["mse"]),
    "added loss": lambda: compiled(functional(inside=[Penalty()])),
    "regularizer": lambda: compiled(functional(inside=[layers.Dense(4, "tanh", kernel_regularizer="l2")])),
    "state": lambda: compiled(functional(inside=[layers.BatchNormalization(), layers.Dense(8), layers.Dropout(0.4)])),
    "constraint": lambda: compiled(functional(kernel_constraint=keras.constraints.MaxNorm(0.3))),
    "average at the end": lambda: compiled(functional(), Adam(0.1, use_ema=True, ema_momentum=0.8)),
    "average": lambda: compiled(functional(), SGD(0.1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3)),
    "accumulation": lambda: compiled(functional(), Adam(0.1, gradient_accumulation_steps=3)),
    "accumulation and average": lambda: compiled(
        functional(), SGD(0.1, gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=2)
    ),
    "schedule": lambda: compiled(functional(), SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5))),
    "compute_loss": lambda: compiled(functional(OwnTracker), loss=None),
    "compute_loss of before": lambda: compiled(functional(OldSignature), metrics=["mae"]),
    "loss of several values": lambda: compiled(functional(SeveralValues), loss=None),
    "compute_metrics": lambda: compiled(functional(OwnMetrics), metrics=["mae"]),
}
COMPILED = ["average at the end", "accumulation and average", "compute_loss", "compute_metrics", "added loss"]


@pytest.mark.parametrize("name", AS_IN_FIT)
def test_an_eager_run_gives_the_bits_of_fit(name):
    assert_as_in_fit(AS_IN_FIT[name], DRIVERS["eager"])


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_run_gives_the_numbers_of_fit(name):
    assert_as_in_fit(AS_IN_FIT[name], DRIVERS["graph"])


def test_accumulation_and_averages_run_under_xla():
    assert_as_in_fit(AS_IN_FIT["accumulation and average"], DRIVERS["xla"])


def test_losses_weights_and_metrics_of_several_outputs_are_those_of_fit():
    def make():
        inputs = keras.Input((3,))
        outputs = {name: layers.Dense(1, name=name)(inputs) for name in ("a", "b")}
        return compiled(
            keras.Model(inputs, outputs),
            loss={"a": "mse", "b": "mae"},
            loss_weights={"a": 0.3, "b": 2.0},
            metrics={"a": ["mae"], "b": ["mse"]},
        )

    _, result = assert_as_in_fit(make, DRIVERS["graph"])
    assert set(result.epoch_history) == {"loss", "a_loss", "b_loss", "a_mae", "b_mse"}


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_a_loss_that_layers_add_is_enough(driver):
    def make():
        return compiled(functional(inside=[Penalty()], trainable=False), SGD(0.5), loss=None)

    model, result = assert_as_in_fit(make, driver)
    scale = 1.0
    for expected in result.history["loss"]:
        assert expected == pytest.approx(0.1 * (scale - 3.0) ** 2, rel=1e-5)
        scale -= 0.5 * 0.2 * (scale - 3.0)
    assert float(model.trainable_variables[0]) == pytest.approx(scale, rel=1e-5)


# Mixed precision.


@pytest.fixture
def mixed_float16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


def _overflowing(**more):
    """The scale is 2^18 at first, too much for float16 until it has been halved a few times."""
    scaled = keras.optimizers.LossScaleOptimizer(SGD(0.01), initial_scale=2.0**18, dynamic_growth_steps=5)
    return compiled(functional(), scaled, **more)


@pytest.mark.usefixtures("mixed_float16")
def test_mixed_precision_is_that_of_fit_with_true_losses_and_skipped_steps_in_sight(every_driver):
    model, result = assert_as_in_fit(_overflowing, every_driver, rtol=2e-2)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    skipped = result.history["skipped"]
    assert skipped.dtype == bool
    assert skipped[0]
    assert not skipped[-1]
    assert int(model.optimizer.inner_optimizer.iterations) == np.sum(~skipped)
    assert (result.steps, result.reason) == (8, tk.StopReason.LIMIT)
    means = result.history["loss"].reshape(2, 4).mean(axis=1)
    np.testing.assert_allclose(result.epoch_history["loss"], means, rtol=1e-3)
    assert result.history["loss"].max() < 100.0


@pytest.mark.usefixtures("mixed_float16")
@pytest.mark.parametrize("step", ["tape", "minimize"])
@pytest.mark.parametrize("own", [False, True])
def test_hooks_get_unscaled_gradients_under_mixed_precision(step, own):
    def make():
        return compiled(functional(), keras.optimizers.Adagrad(0.1) if own else SGD(0.01))

    capture = tk.callbacks.CaptureGradients()
    optimizer = SGD(0.01) if own else None
    x, y = (0.3 * array for array in data())  # so small that the gradients do not overflow
    model, result = by_loop(make, [capture], (x, y), run_eagerly=True, step=step, optimizer=optimizer)
    assert not result.history["skipped"].any()
    moved = np.sum(capture.gradients[next(iter(capture.gradients))], axis=0)
    keras.utils.set_random_seed(0)
    np.testing.assert_allclose(make().weights[0].numpy() - 0.01 * moved, model.weights[0].numpy(), atol=1e-6)


@pytest.mark.usefixtures("mixed_float16")
def test_a_train_step_that_scales_its_loss_shows_hooks_unscaled_gradients_and_the_true_loss():
    x, y = (0.3 * array for array in data())
    capture = tk.callbacks.CaptureGradients()
    make = lambda cls: lambda: compiled(functional(cls), SGD(0.01))  # noqa: E731
    _, result = by_loop(make(WithScaling), [capture], (x, y), run_eagerly=True)
    plain = tk.callbacks.CaptureGradients()
    _, expected = by_loop(make(keras.Model), [plain], (x, y), run_eagerly=True)
    assert_equal(capture.gradients.values(), plain.gradients.values())
    for name in ("loss", "skipped"):
        np.testing.assert_array_equal(result.history[name], expected.history[name])


@pytest.mark.usefixtures("mixed_float16")
def test_scaling_that_was_switched_off_stays_off():
    model = compiled(functional(), SGD(0.01), auto_scale_loss=False)
    result = tk.OptimizationLoop(SGD(0.01), run_eagerly=True).fit(model, *data(), **SETTINGS)
    assert "skipped" not in result.history


# The settings of the model, and those of the loop that win.


class Counting(layers.Layer):
    """Counts how often Python runs it."""

    calls = 0

    def call(self, inputs):
        type(self).calls += 1
        return 1.0 * inputs


@pytest.mark.parametrize(("of_model", "of_loop", "eager"), [(True, {}, True), (False, {"run_eagerly": True}, True)])
def test_run_eagerly_of_the_model_or_the_loop_runs_python_at_every_step(of_model, of_loop, eager):
    model = compiled(functional(inside=[Counting()]), run_eagerly=of_model)
    Counting.calls = 0
    tk.OptimizationLoop(**of_loop).fit(model, *data(), **SETTINGS)
    assert Counting.calls == 8


class Untranslatable(layers.Layer):
    """Something that XLA cannot compile, and a step must not be compiled without."""

    def call(self, inputs):
        tf.strings.as_string(inputs)
        text = tf.strings.as_string(inputs)
        return inputs + 0.0 * tf.stop_gradient(tf.strings.to_number(text))


def _runs(of_model, of_loop):
    model = compiled(functional(inside=[Untranslatable()]), jit_compile=of_model)
    return tk.OptimizationLoop(**of_loop).fit(model, *data(), **SETTINGS).steps


def test_jit_compile_of_the_model_is_honoured_unless_the_loop_was_given_its_own(caplog):
    with pytest.raises(ValueError, match=r"^`jit_compile` must be False or 'auto' here, received True: XLA cannot"):
        _runs(True, {})
    with pytest.raises(ValueError, match=r"^`jit_compile` must be False"):
        _runs(False, {"jit_compile": True})
    assert _runs(True, {"jit_compile": False}) == 8
    with caplog.at_level(logging.WARNING, "tapekit"):
        assert _runs("auto", {}) == 8
    assert "without XLA" in caplog.text


def _stream():
    return tf.data.Dataset.from_tensor_slices(data()).batch(4)


def _trained(model, dataset, **settings):
    keras.utils.set_random_seed(0)
    loop = tk.OptimizationLoop(**settings)
    result = loop.fit(model, dataset, epochs=2, shuffle=False, verbose=0)
    (driver,) = loop._programs.values()
    return result, [program.jit for program in driver._programs.values()], loop.traces


def test_a_stream_may_have_one_batch_an_epoch():
    def model():
        keras.utils.set_random_seed(1)
        return compiled(functional(), keras.optimizers.Adam(0.1))

    by_keras, ours = model(), model()
    settings = {"epochs": 3, "steps_per_epoch": 1, "shuffle": False, "verbose": 0}
    history = by_keras.fit(_stream().repeat(), **settings).history["loss"]
    result = tk.OptimizationLoop().fit(ours, _stream().repeat(), **settings)
    np.testing.assert_allclose(result.epoch_history["loss"], history, rtol=1e-5)


def test_the_step_of_a_stream_is_compiled_by_xla_and_no_batch_is_lost_for_the_trial():
    def model():
        keras.utils.set_random_seed(1)
        return compiled(functional(), keras.optimizers.Adam(0.1))

    by_keras, ours, compiled_by_force = model(), model(), model()
    history = by_keras.fit(_stream(), epochs=2, shuffle=False, verbose=0).history["loss"]
    result, jit, traces = _trained(ours, _stream())
    assert (result.steps, jit, traces) == (8, [True], 1)
    np.testing.assert_allclose(result.epoch_history["loss"], history, rtol=1e-5)
    forced, _, _ = _trained(compiled_by_force, _stream(), jit_compile=True)
    np.testing.assert_array_equal(result.history["loss"], forced.history["loss"])
    for one, other in zip(everything(ours), everything(compiled_by_force), strict=True):
        np.testing.assert_array_equal(one, other)


def test_steps_wait_for_few_batches_and_take_as_many_as_were_read_meanwhile():
    stream = Stream(iter(tf.data.Dataset.range(100).batch(2)))
    assert stream.stacked(50, 50).length == Stream.FEW
    with stream.reading(30):
        while len(stream._waiting) < 30:
            time.sleep(0.001)
    assert stream.stacked(50, 50).length == 30
    stream.drop(30)
    assert stream.take().numpy().tolist() == [60, 61]


def _address(tensor):
    return to_array(tensor).ctypes.data


def test_batches_are_stacked_in_the_same_memory_each_time_which_tensorflow_shares():
    batches = tf.data.Dataset.range(48).map(lambda n: (tf.cast(n, tf.bfloat16), [[n]], n % 2 == 0))
    stream = Stream(iter(batches))
    seen = []
    for first in (0, 4, 8):
        portion = stream.stacked(50, 16)
        assert portion.length == Stream.FEW
        addresses = [place.ctypes.data for place in stream._places]
        assert list(map(_address, portion.feed[1:])) == addresses[1:]  # NumPy is given a copy of a bfloat16
        seen.append(addresses)
        for n in range(portion.length):
            scalar, matrix, even = portion.batch(portion.feed, n)
            assert (float(scalar), matrix.numpy().tolist(), bool(even)) == (first + n, [[first + n]], n % 2 == 0)
        stream.drop(portion.length)
    assert seen[0] == seen[1] == seen[2]


def test_batches_of_strings_come_one_by_one():
    portion = Stream(iter(tf.data.Dataset.from_tensor_slices([["a"], ["b"]]))).stacked(50, 50)
    assert (portion.length, portion.batch(portion.feed, 0).numpy().tolist()) == (1, [b"a"])


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "float16"])
@pytest.mark.parametrize("shape", [(9, 1000), (100_000,), (0, 3), ()])
def test_tensorflow_shares_the_memory_that_it_is_lent(shape, dtype):
    array = aligned(shape, dtype)
    array[...] = 0
    tensor = lent(array)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    array[...] = 1
    assert np.all(tensor.numpy() == 1)


def test_what_becomes_of_arrays_during_a_fit_changes_nothing():
    def losses(spoils):
        x, y = aligned((10_000, 3), "float32"), np.zeros((10_000, 1), "float32", order="F")
        x[:] = np.linspace(-1.0, 1.0, 30_000).reshape(x.shape)

        def spoil(epoch, logs):
            if spoils:
                x[:], y[:] = 7.0, 7.0

        spoiling = keras.callbacks.LambdaCallback(on_epoch_end=spoil)
        model = compiled(functional(kernel_initializer="ones"))
        settings = {**SETTINGS, "batch_size": 1000, "epochs": 3, "callbacks": [spoiling]}
        return tk.OptimizationLoop().fit(model, x, y, **settings).history["loss"]

    np.testing.assert_array_equal(losses(spoils=True), losses(spoils=False))


@pytest.mark.parametrize("arguments", [{"x": data()[0], "y": data()[1], "batch_size": 4}, {"x": _stream()}])
@pytest.mark.parametrize(("in_graph", "jit"), [(0.02, True), (0.001, False)])
def test_a_graph_is_tried_once_the_steps_pay_for_it_and_taken_if_it_is_faster(
    monkeypatch, caplog, arguments, in_graph, jit
):
    asked = []

    def costs(driver, program, portion):
        asked.append(program.jit)
        return (0.1, 0.01) if program.jit else (0.1, in_graph)

    monkeypatch.setattr(CompiledDriver, "_costs", costs)
    model, loop = compiled(functional(), "adam"), tk.OptimizationLoop()
    seen = []
    with caplog.at_level(logging.INFO, "tapekit"):
        for _ in range(3):  # four steps each: 0.04 s, and half of the 0.1 s that it took to compile one is more
            loop.fit(model, **arguments, epochs=1, shuffle=False, verbose=0)
            (driver,) = loop._programs.values()
            seen.append((list(asked), driver.jit))
    tried = [True, False] if jit else [True, False, True]
    assert seen == [([True], True), (tried, jit), (tried, jit)]
    assert ("a step took 10.0 ms, and 1.0 ms in a graph" in caplog.text) is not jit
    assert loop.traces == 1


def test_a_graph_that_won_while_others_had_the_processor_is_not_taken(monkeypatch):
    under_xla = iter([0.03, 0.01])

    def costs(driver, program, portion):
        return 0.0, next(under_xla) if program.jit else 0.02

    monkeypatch.setattr(CompiledDriver, "_costs", costs)
    _, jit, _ = _trained(compiled(functional()), _stream())
    assert jit == [True]
    assert not list(under_xla)


def _spoil(program):
    """Leaves other numbers in all that a step changes, as a trial does."""
    for variable in program.written:
        variable.assign(tf.fill(variable.shape, tf.cast(7, variable.dtype)))


def test_what_a_graph_cannot_run_stays_with_xla(monkeypatch, caplog):
    def costs(driver, program, portion):
        _spoil(program)
        if program.jit:
            return 0.0, 0.01
        raise tf.errors.InvalidArgumentError(None, None, "no dilation on a CPU.")

    expected, _, _ = _trained(compiled(functional(kernel_initializer="ones")), _stream())
    monkeypatch.setattr(CompiledDriver, "_costs", costs)
    with caplog.at_level(logging.INFO, "tapekit"):
        found, jit, _ = _trained(compiled(functional(kernel_initializer="ones")), _stream())
    assert jit == [True]
    assert "XLA runs this objective, since a graph cannot: no dilation on a CPU." in caplog.text
    np.testing.assert_array_equal(found.history["loss"], expected.history["loss"])


@pytest.mark.parametrize("arguments", [{"x": data()[0], "y": data()[1], "batch_size": 4}, {"x": _stream()}])
def test_a_trial_that_is_broken_off_leaves_the_model_as_it_was(monkeypatch, arguments):
    def costs(driver, program, portion):
        _spoil(program)
        raise KeyboardInterrupt

    monkeypatch.setattr(CompiledDriver, "_costs", costs)
    model = compiled(functional(), "adam")
    model.optimizer.build(model.trainable_variables)
    before = [variable.numpy() for variable in (*model.weights, *model.optimizer.variables)]
    with pytest.raises(KeyboardInterrupt):
        tk.OptimizationLoop().fit(model, **arguments, shuffle=False, verbose=0)
    after = [variable.numpy() for variable in (*model.weights, *model.optimizer.variables)]
    for one, other in zip(after, before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_stream_of_batches_of_changing_shapes_runs_as_a_graph_since_xla_compiles_each():
    inputs = keras.Input((None, 3))
    model = compiled(keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(inputs))))
    result, jit, _ = _trained(model, tf.data.Dataset.from_generator(
        lambda: ((np.ones((4, n, 3)), np.ones((4, 1))) for n in (2, 3, 4)),
        output_signature=(tf.TensorSpec((None, None, 3)), tf.TensorSpec((None, 1))),
    ))  # fmt: skip
    assert (result.steps, jit) == (6, [False])


def _odd_stream(x=None):
    """Batches of 3, 3, 3, 3, 3 and 1."""
    features, targets = data()
    return tf.data.Dataset.from_tensor_slices((features if x is None else x, targets)).batch(3)


@pytest.mark.parametrize(("jit_compile", "compiled_chunks"), [("auto", [False, True]), (True, [True, True])])
def test_of_a_stream_batches_of_another_size_are_compiled_by_xla_only_if_told_to(jit_compile, compiled_chunks):
    by_keras, ours = (compiled(functional(kernel_initializer="ones"), "adam") for _ in range(2))
    history = by_keras.fit(_odd_stream(), epochs=2, shuffle=False, verbose=0).history["loss"]
    loop = tk.OptimizationLoop(jit_compile=jit_compile)
    result = loop.fit(ours, _odd_stream(), epochs=2, shuffle=False, verbose=0)
    np.testing.assert_allclose(result.epoch_history["loss"], history, rtol=1e-5)
    (driver,) = loop._programs.values()
    (program,) = driver._programs.values()
    assert (result.steps, loop.traces, sorted(key[0] for key in program.chunks)) == (12, 1, compiled_chunks)


@pytest.mark.parametrize("most_bytes", [1, 150])
def test_how_many_batches_of_a_stream_are_stacked_changes_no_bit(monkeypatch, most_bytes):
    def trained():
        model = compiled(functional(kernel_initializer="ones"), "adam")
        result = tk.OptimizationLoop(jit_compile=True).fit(model, _odd_stream(), epochs=2, shuffle=False, verbose=0)
        return result.history["loss"], everything(model)

    (losses, values), _ = trained(), monkeypatch.setattr(Stream, "BYTES", most_bytes)
    other_losses, other_values = trained()
    np.testing.assert_array_equal(losses, other_losses)
    for one, other in zip(values, other_values, strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_of_a_stream_that_are_not_finite_are_skipped_as_those_of_arrays():
    x, y = data()
    x[[7, 15]] = np.nan
    of_stream, of_arrays = (compiled(functional(kernel_initializer="ones"), "adam") for _ in range(2))
    settings = {"on_nonfinite": "skip", "jit_compile": True}
    more = {"epochs": 2, "shuffle": False, "verbose": 0}
    streamed = tk.OptimizationLoop(**settings).fit(of_stream, _odd_stream(x), **more)
    result = tk.OptimizationLoop(**settings).fit(of_arrays, x, y, batch_size=3, **more)
    assert np.isnan(streamed.history["loss"]).tolist() == [step in (2, 5, 8, 11) for step in range(12)]
    np.testing.assert_allclose(streamed.history["loss"], result.history["loss"], rtol=1e-6)
    for one, other in zip(everything(of_stream), everything(of_arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def _counted(pause=0.0):
    """Batches that count how many of them were asked for, none of which is made in advance."""
    x, y = data()
    made = []

    def batches():
        for n in itertools.count():
            made.append(n)
            time.sleep(pause)
            yield x[:4], y[:4]

    signature = tuple(tf.TensorSpec((4, width), tf.float32) for width in (3, 1))
    options = tf.data.Options()
    options.autotune.enabled = options.experimental_optimization.apply_default_optimizations = False
    return tf.data.Dataset.from_generator(batches, output_signature=signature).with_options(options), made


def test_a_stream_is_read_no_farther_than_to_the_step_that_somebody_sees():
    class Watch(tk.Callback):
        every = 5

        def on_step(self, step, logs):
            seen.append((step, len(made)))

    (dataset, made), seen = _counted(), []
    loop = tk.OptimizationLoop(jit_compile=True, max_iterations=20)
    loop.fit(compiled(functional()), dataset, shuffle=False, verbose=0, callbacks=[Watch()])
    assert seen == [(step, step) for step in (5, 10, 15, 20)]


def test_a_stream_is_read_on_while_a_chunk_runs_and_by_nobody_while_a_hook_does(monkeypatch):
    class Watch(tk.Callback):
        every = 10

        def on_step(self, step, logs):
            time.sleep(0.01)
            seen.append((step, sum(readers.values())))

    def read(stream):
        readers[threading.current_thread().name] += 1
        return real(stream)

    real, readers, seen = Stream._read, collections.Counter(), []
    monkeypatch.setattr(Stream, "_read", read)
    x, y = (np.repeat(part, 10, axis=0) for part in data())
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    loop = tk.OptimizationLoop(jit_compile=True, steps_per_execution=2)
    result = loop.fit(compiled(functional()), dataset, shuffle=False, verbose=0, callbacks=[Watch()])
    assert len(readers) == 2, "the main thread and another"
    assert seen == [(step, step) for step in range(10, result.steps + 1, 10)]


@pytest.mark.parametrize("driver", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}], ids=str)
@pytest.mark.parametrize("limit", [None, 5], ids=["whole epochs", "a part of one"])
def test_nobody_waits_for_the_end_of_a_pipeline(driver, limit, monkeypatch):
    """TensorFlow keeps whoever deletes an iterator waiting for the thread that tunes its pipeline."""
    begin, threads = Stream.__init__, []

    def watched(self, iterator):
        begin(self, iterator)
        weakref.finalize(iterator, lambda: threads.append(threading.current_thread()))

    monkeypatch.setattr(Stream, "__init__", watched)
    x, y = data()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4).prefetch(2)
    before = {*threading.enumerate()}
    tk.OptimizationLoop(max_iterations=limit, **driver).fit(
        compiled(functional()), dataset, epochs=3, shuffle=False, verbose=0
    )
    for thread in {*threading.enumerate()} - before:
        thread.join(60)
    assert [thread.name for thread in threads] == (2 if limit else 3) * ["tapekit lets go of an iterator"]


_STUCK = """
import keras, os, signal, tensorflow as tf, time, tapekit as tk

has_ended = False

def wait(n):
    while n >= 40 and not has_ended:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    time.sleep(120 if n >= 40 else 0)
    return n

numbers = tf.data.Dataset.range(50).map(lambda n: tf.ensure_shape(tf.numpy_function(wait, [n], tf.int64), []))
dataset = numbers.map(lambda n: (tf.ones((4, 3)), tf.ones((4, 1))))
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
try:
    tk.OptimizationLoop(jit_compile=True).fit(model, dataset, shuffle=False, verbose=0)
except KeyboardInterrupt:
    has_ended = True
    print("left", flush=True)
"""


def test_a_second_interrupt_leaves_a_process_whose_pipeline_gives_nothing():
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", _STUCK], env=environment, capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.returncode) == ("left\n", 0)


def test_a_pipeline_that_raises_while_a_chunk_runs_ends_the_run_after_the_steps_before():
    x, y = (np.repeat(part, 10, axis=0) for part in data())
    x[37 * 4] = np.nan
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).map(lambda x, y: (tf.debugging.check_numerics(x, "broken"), y))
    loop = tk.OptimizationLoop(jit_compile=True, steps_per_execution=2)
    with pytest.raises(tf.errors.InvalidArgumentError, match="broken"):
        loop.fit(compiled(functional()), dataset.batch(4), shuffle=False, verbose=0)
    assert (loop.result.steps, loop.result.reason) == (37, tk.StopReason.ERROR)


def test_a_slow_stream_is_not_waited_for_past_a_limit_of_time(monkeypatch):
    monkeypatch.setattr(Stream, "reading", lambda stream, most: contextlib.nullcontext())  # so that the loop waits
    dataset, made = _counted(pause=0.02)
    model, loop = compiled(functional()), tk.OptimizationLoop(jit_compile=True, stopping=stopping.WallTime(0.4))
    loop.fit(model, dataset.take(2), shuffle=False, verbose=0)  # which compiles
    made.clear()
    assert loop.fit(model, dataset, shuffle=False, verbose=0).reason is tk.StopReason.LIMIT
    most = 0.4 / 0.02 + 2 * Pace.TARGET / 0.02 + 1
    assert len(made) <= most, "each batch lasts at least 0.02 s, however slow all else is, and a chunk 0.1 s and a step"


def test_a_stream_whose_step_xla_refuses_runs_as_a_graph_with_every_batch(caplog):
    keras.utils.set_random_seed(1)
    model = compiled(functional(inside=[Untranslatable()]))
    keras.utils.set_random_seed(1)
    other = compiled(functional(inside=[Untranslatable()]))
    result, jit, _ = _trained(model, _stream())
    assert (result.steps, jit) == (8, [False])
    assert "without XLA" in caplog.text
    in_graph, _, _ = _trained(other, _stream(), jit_compile=False)
    np.testing.assert_array_equal(result.history["loss"], in_graph.history["loss"])


def test_a_model_that_does_not_support_xla_runs_as_a_graph(caplog):
    layer = Untranslatable()
    layer.supports_jit = False
    model = compiled(functional(inside=[layer]))
    with caplog.at_level(logging.INFO, "tapekit"):
        assert tk.OptimizationLoop().fit(model, *data(), **SETTINGS).steps == 8
    assert "XLA" not in caplog.text


@pytest.mark.parametrize("driver", ["eager", "xla"], indirect=True)
def test_the_optimizer_of_the_loop_wins_and_that_of_the_model_is_left_alone(driver):
    own, other = SGD(0.1, momentum=0.5), Adam(0.5)
    keras.utils.set_random_seed(0)
    model = compiled(functional(), other, metrics=["mae"])
    inside = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: inside.append(callback.model.optimizer))
    tk.OptimizationLoop(own, **driver).fit(model, *data(), callbacks=[callback], **SETTINGS)
    assert inside == [own, own]
    assert model.optimizer is other
    assert (int(own.iterations), int(other.iterations), other.built) == (8, 0, False)
    theirs, _ = by_fit(lambda: compiled(functional(), SGD(0.1, momentum=0.5)))
    assert_near(everything(model)[:2], theirs[:2])


@pytest.mark.parametrize("driver", ["eager"], indirect=True)
def test_the_model_is_to_its_owner_as_before(driver):
    model = compiled(functional(), Adam(0.1), metrics=["mae"])
    model.fit(*data(), **SETTINGS)
    keys = lambda: (sorted(vars(model)), model._trackable_children().keys(), model.get_compile_config())  # noqa: E731
    before = keys()
    tk.OptimizationLoop(SGD(0.1), **driver).fit(model, *data(), **SETTINGS)
    assert keys() == before


@pytest.mark.parametrize("driver", ["eager"], indirect=True)
def test_a_model_that_is_not_compiled_is_with_the_loss_that_is_given(driver):
    keras.utils.set_random_seed(0)
    model = functional()
    loop = tk.OptimizationLoop("sgd", **driver)
    result = loop.fit(model, *data(), loss="mse", metrics=["mae"], **SETTINGS)
    for name, values in by_fit(lambda: compiled(functional(), metrics=["mae"]))[1].items():
        np.testing.assert_allclose(result.epoch_history[name], values, rtol=2e-5)
    assert model.optimizer is loop.optimizer
    assert loop.fit(model, *data(), **SETTINGS).epoch_history["mae"][0] < result.epoch_history["mae"][0]


def _plain():
    return compiled(functional(), SGD(0.1))


class Descent:
    """An optimizer of nobody."""

    def apply_gradients(self, gradients_and_variables):
        for gradient, variable in gradients_and_variables:
            variable.assign_sub(0.1 * gradient)


@pytest.mark.parametrize(("is_compiled", "driver"), [(False, "graph"), (True, "eager")], indirect=["driver"])
def test_anything_with_apply_gradients_trains_a_model(is_compiled, driver):
    keras.utils.set_random_seed(0)
    model = compiled(functional()) if is_compiled else functional()
    compiled_with = model.optimizer if is_compiled else None
    more = {} if is_compiled else {"loss": "mse"}
    tk.OptimizationLoop(Descent(), **driver).fit(model, *data(), **SETTINGS, **more)
    assert model.optimizer is compiled_with
    assert_near(everything(model)[:2], by_fit(_plain)[0][:2])


def test_a_model_that_computes_its_loss_needs_none_to_be_compiled_with():
    result = tk.OptimizationLoop("sgd", run_eagerly=True).fit(functional(OwnTracker), *data(), **SETTINGS)
    assert result.epoch_history["loss"][1] < result.epoch_history["loss"][0]


# One model and several loops, one loop and several models, changes in between.


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_a_second_fit_goes_on_where_the_first_one_was(driver):
    x, y = data()
    models = []
    for epochs in ([2], [1, 1]):
        keras.utils.set_random_seed(0)
        model = compiled(functional(inside=[layers.BatchNormalization()]), Adam(0.1), metrics=["mae"])
        loop = tk.OptimizationLoop(**driver)
        for number in epochs:
            last = loop.fit(model, x, y, **{**SETTINGS, "epochs": number})
        models.append([*everything(model), last.history["loss"][-4:]])
    assert_equal(*models)


def test_a_second_fit_of_the_same_model_traces_nothing():
    model, loop = compiled(functional(), metrics=["mae"]), tk.OptimizationLoop(jit_compile=False)
    loop.fit(model, *data(), **SETTINGS)
    traces = loop.traces
    Counting.calls = 0
    loop.fit(model, *data(), **SETTINGS)
    assert loop.traces == traces == 1


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_two_models_with_one_loop_keep_apart(driver):
    loop = tk.OptimizationLoop(**driver)
    make = lambda rate: compiled(functional(), Adam(rate), metrics=["mae"])  # noqa: E731
    alone, together = [], []
    for rate in (0.1, 0.01):
        model, _ = by_loop(lambda rate=rate: make(rate), **driver)
        alone += everything(model)
    models = []
    for rate in (0.1, 0.01):
        keras.utils.set_random_seed(0)
        models.append(make(rate))
    for model in models:
        loop.fit(model, *data(), **SETTINGS)
        together += everything(model)
    assert_equal(together, alone)


@pytest.mark.parametrize("driver", ["eager"], indirect=True)
def test_an_optimizer_of_another_model_is_refused_before_anything_changes(driver):
    loop = tk.OptimizationLoop(Adam(0.1), **driver)
    loop.fit(compiled(functional()), *data(), **SETTINGS)
    model = compiled(functional(), metrics=["mae"])
    before, compiled_with = everything(model), model.optimizer
    with pytest.raises(ValueError, match=r"^`optimizer` must be new or built on the variables"):
        loop.fit(model, *data(), **SETTINGS)
    assert model.optimizer is compiled_with
    assert_equal(everything(model), before)


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_one_model_with_two_loops_goes_on_where_it_is(driver):
    keras.utils.set_random_seed(0)
    model = compiled(functional(), Adam(0.1), metrics=["mae"])
    first = tk.OptimizationLoop(max_iterations=3, **driver)
    second = tk.OptimizationLoop(step="minimize", **driver)
    x, y = data()
    assert first.fit(model, x, y, **SETTINGS).steps == 3
    again = second.fit(model, x[12:], y[12:], **{**SETTINGS, "epochs": 1})
    assert again.steps == 1
    whole, result = by_loop(lambda: compiled(functional(), Adam(0.1)), max_iterations=4, **driver)
    assert again.history["loss"][0] == result.history["loss"][3]
    assert_equal(everything(model)[:2], everything(whole)[:2])


@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_a_model_of_which_nothing_is_trainable_is_only_evaluated(driver):
    with pytest.warns(UserWarning, match="the model does not have any trainable weights"):
        _, result = assert_as_in_fit(lambda: compiled(functional(trainable=False), metrics=["mae"]), driver)
    assert result.variables == []


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_layers_that_are_frozen_between_two_fits_stay_as_they_are(driver):
    model = compiled(functional(inside=[layers.Dense(4, name="hidden"), layers.BatchNormalization()]), metrics=["mae"])
    loop = tk.OptimizationLoop(**driver)
    loop.fit(model, *data(), **SETTINGS)
    for layer in model.layers[1:3]:
        layer.trainable = False
    before = [variable.numpy() for layer in model.layers[1:3] for variable in layer.variables]
    last = model.get_layer("last").kernel.numpy()
    result = loop.fit(model, *data(), **SETTINGS)
    assert len(result.variables) == 2
    after = [variable.numpy() for layer in model.layers[1:3] for variable in layer.variables]
    assert_equal(after, before)
    assert np.abs(model.get_layer("last").kernel.numpy() - last).max() > 0.0


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_a_model_that_is_compiled_anew_has_its_new_loss_metrics_and_optimizer(driver):
    model = compiled(functional(), metrics=["mae"])
    loop = tk.OptimizationLoop(**driver)
    loop.fit(model, *data(), **SETTINGS)
    x, y = data()
    optimizer = SGD(0.001)
    compiled(model, optimizer, "mae", metrics=["mse"])
    expected = np.mean(np.abs(model.predict(x[:4], verbose=0) - y[:4]))
    result = loop.fit(model, x, y, **SETTINGS)
    assert result.history["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert set(result.epoch_history) == {"loss", "mse"}
    assert int(optimizer.iterations) == 8


class PartlyUsed(keras.Model):
    """A model of which the loss does not use every variable."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = layers.Dense(1, name="used"), layers.Dense(1, name="unused")

    def call(self, inputs):
        self.unused(inputs)
        return self.used(inputs)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_variables_that_the_loss_does_not_use_stay_as_they_are(driver):
    def make():
        model = PartlyUsed()
        model(np.zeros((1, 3)))
        return compiled(model, Adam(0.1))

    keras.utils.set_random_seed(0)
    before = make().unused.kernel.numpy()
    model, _ = assert_as_in_fit(make, driver)
    np.testing.assert_array_equal(model.unused.kernel.numpy(), before)


# Models that make their own steps: the styles of the guides of Keras.


class WithComputeLoss(keras.Model):
    """Customizing fit, first example: compute_loss, apply and a loop over the metrics."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


class WithOwnMetrics(keras.Model):
    """Going lower-level: metrics of its own, apply_gradients."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")
        self.loss_fn = keras.losses.MeanSquaredError()

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.loss_fn(y, y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        self.mae_metric.update_state(y, y_pred)
        return {"loss": self.loss_tracker.result(), "mae": self.mae_metric.result()}

    @property
    def metrics(self):
        return [self.loss_tracker, self.mae_metric]


class WithScaling(keras.Model):
    """Sample weights, and a loss that is scaled as Keras does it itself."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
            self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


class WithSuper(keras.Model):
    """What Keras does with something beside it, on inputs that are changed before."""

    def train_step(self, data):
        x, y = data
        logs = super().train_step((2.0 * x, y))
        return {**logs, "rate": self.optimizer.learning_rate}


class WithRawLosses(keras.Model):
    """The loss as it is beside another value whose name ends alike."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            penalty = 0.1 * ops.mean(y_pred**2)
            loss = ops.mean((y - y_pred) ** 2) + penalty
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss, "penalty_loss": penalty}


class WithOptimizers(keras.Model):
    """An optimizer for each of two variables, in a list, and the loss under another name."""

    def compile(self, rates):
        super().compile()
        self.optimizers = [SGD(rate) for rate in rates]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.mean((y - self(x, training=True)) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        for optimizer, gradient, variable in zip(self.optimizers, gradients, self.trainable_variables, strict=True):
            optimizer.apply([gradient], [variable])
        return {"my_loss": loss}


class Autoencoder(keras.Model):
    """The variational autoencoder of the guides: no call, three means of its own, one returned under "loss"."""

    def __init__(self, noisy=True):
        super().__init__()
        self.encoder = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(4)])
        self.decoder = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
        self.noise = keras.random.SeedGenerator(7) if noisy else None
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.reconstruction_loss_tracker, self.kl_loss_tracker]

    def train_step(self, data):
        if isinstance(data, tuple):
            data = data[0]
        with tf.GradientTape() as tape:
            mean, log_variance = ops.split(self.encoder(data), 2, axis=1)
            z = mean
            if self.noise is not None:
                z += ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=self.noise)
            reconstruction_loss = ops.mean(ops.sum((data - self.decoder(z)) ** 2, axis=1))
            kl_loss = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
            kl_loss = ops.mean(ops.sum(kl_loss, axis=1))
            total_loss = reconstruction_loss + kl_loss
        grads = tape.gradient(total_loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
        self.total_loss_tracker.update_state(total_loss)
        self.reconstruction_loss_tracker.update_state(reconstruction_loss)
        self.kl_loss_tracker.update_state(kl_loss)
        return {
            "loss": self.total_loss_tracker.result(),
            "reconstruction_loss": self.reconstruction_loss_tracker.result(),
            "kl_loss": self.kl_loss_tracker.result(),
        }


class Adversaries(keras.Model):
    """The generative adversarial network of the guides: two optimizers, a compile of its own."""

    def __init__(self):
        super().__init__()
        self.discriminator = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(1)], name="d")
        self.generator = keras.Sequential([keras.Input((2,)), layers.Dense(3)], name="g")
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
        self.g_loss_tracker = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_loss_tracker, self.g_loss_tracker]

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    def train_step(self, real):
        if isinstance(real, tuple):
            real = real[0]
        count = ops.shape(real)[0]
        latent = keras.random.normal((count, 2), seed=self.seed_generator)
        combined = ops.concatenate([self.generator(latent), real], axis=0)
        labels = ops.concatenate([ops.ones((count, 1)), ops.zeros((count, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(combined))
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply(grads, self.discriminator.trainable_weights)
        latent = keras.random.normal((count, 2), seed=self.seed_generator)
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(ops.zeros((count, 1)), self.discriminator(self.generator(latent)))
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply(grads, self.generator.trainable_weights)
        self.d_loss_tracker.update_state(d_loss)
        self.g_loss_tracker.update_state(g_loss)
        return {"d_loss": self.d_loss_tracker.result(), "g_loss": self.g_loss_tracker.result()}


def _adversaries():
    model = Adversaries()
    model.compile(Adam(0.01), Adam(0.02), keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def _several():
    model = functional(WithOptimizers)
    model.compile([0.1, 0.05])
    return model


def _autoencoder(noisy=True):
    return compiled(Autoencoder(noisy), Adam(0.01), None)


OWN_STEPS = {
    "compute_loss": lambda: compiled(functional(WithComputeLoss), Adam(0.1), metrics=["mae"]),
    "own metrics": lambda: compiled(functional(WithOwnMetrics), Adam(0.1), None),
    "scaling": lambda: compiled(functional(WithScaling), Adam(0.1), metrics=["mae"]),
    "super": lambda: compiled(functional(WithSuper), Adam(0.1), metrics=["mae"]),
    "raw losses": lambda: compiled(functional(WithRawLosses), Adam(0.1), None),
    "optimizers in a list": _several,
    "autoencoder": _autoencoder,
    "adversaries": _adversaries,
}


@functools.lru_cache
def _one_step_losses(name):
    """The losses that Keras reports of single batches."""
    keras.utils.set_random_seed(0)
    model = OWN_STEPS[name]()
    x, y = data()
    losses = []
    for first in [0, 4, 8, 12] * 2:
        model.reset_metrics()
        logs = model.train_step((x[first : first + 4], y[first : first + 4]))
        named = [float(value) for name, value in logs.items() if name.endswith("loss")]
        losses.append(float(logs["loss"]) if "loss" in logs else sum(named))
    return losses


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        *((name, "eager") for name in OWN_STEPS),
        *((name, "graph") for name in ("compute_loss", "autoencoder", "adversaries")),
    ],
    indirect=["driver"],
)
def test_a_train_step_of_its_own_runs_as_in_fit_with_the_true_loss_in_the_history(name, driver):
    _, result = assert_as_in_fit(OWN_STEPS[name], driver)
    assert result.steps == 8
    np.testing.assert_allclose(result.history["loss"], _one_step_losses(name), rtol=2e-5)


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_the_optimizer_of_the_loop_is_that_of_a_train_step(driver):
    own = SGD(0.1)
    model, _ = by_loop(OWN_STEPS["compute_loss"], optimizer=own, **driver)
    assert_near(everything(model)[:2], by_fit(_plain)[0][:2])
    assert (int(own.iterations), int(model.optimizer.iterations)) == (8, 0)


class OnlyLast(keras.Model):
    """Updates only some of its variables."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        variables = self.get_layer("last").trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"my_loss": loss}


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_an_optimizer_that_was_built_on_what_the_train_step_updates_goes_on(driver):
    def make():
        model = compiled(functional(OnlyLast, inside=[layers.Dense(2)]), Adam(0.1))
        model.fit(*data(), **SETTINGS)
        return model

    model, _ = assert_as_in_fit(make, driver)
    assert len(model.optimizer.variables) == 2 + 2 * 2


def test_an_optimizer_that_the_train_step_does_not_use_is_not_built(driver):
    adversaries, _ = by_loop(_adversaries, **driver)
    assert not adversaries.optimizer.built


def test_a_second_fit_of_a_train_step_of_its_own_traces_nothing():
    model, loop = _autoencoder(), tk.OptimizationLoop(jit_compile=False)
    loop.fit(model, *data(), **SETTINGS)
    assert loop.traces == 1
    loop.fit(model, *data(), **SETTINGS)
    assert loop.traces == 1


def test_a_train_step_of_its_own_runs_under_xla():
    assert_as_in_fit(lambda: _autoencoder(noisy=False), DRIVERS["xla"])


def _parts(model):
    """The variables that are updated in one go."""
    if isinstance(model, Adversaries):
        return [model.discriminator.trainable_variables, model.generator.trainable_variables]
    if isinstance(model, WithOptimizers):
        return [[variable] for variable in model.trainable_variables]
    return [model.trainable_variables]


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        *((name, "eager") for name in ("compute_loss", "scaling", "optimizers in a list", "adversaries")),
        *((name, "graph") for name in ("own metrics", "adversaries")),
    ],
    indirect=["driver"],
)
def test_hooks_see_the_gradients_of_a_train_step_of_its_own_and_change_them(name, driver):
    """Gradients that a hook sets to zero leave everything as it is, whatever the optimizer; the true ones are kept."""
    seen = []

    class Still(tk.Callback):
        def on_gradient(self, gradients, variables):
            seen.append([id(variable) for variable in variables])
            return [ops.zeros_like(gradient) for gradient in gradients]

    keras.utils.set_random_seed(0)
    model = OWN_STEPS[name]()
    before = [variable.numpy() for variable in model.trainable_variables]
    loop = tk.OptimizationLoop(measures={"count": lambda gradients: tf.constant(len(gradients))}, **driver)
    x, y = data()
    result = loop.fit(model, x, y, callbacks=[Still()], **SETTINGS)
    assert_equal([variable.numpy() for variable in model.trainable_variables], before)
    parts = [[id(variable) for variable in part] for part in _parts(model)]
    assert seen[-len(parts) :] == parts
    assert result.history["count"].tolist() == [len(before)] * 8


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_criteria_stop_a_train_step_of_its_own_at_the_exact_step(driver):
    losses = _one_step_losses("compute_loss")
    first = int(np.argmin(losses)) + 1
    assert 4 < first < 8
    criterion = stopping.LossBelow(1.0001 * min(losses))
    model, result = by_loop(OWN_STEPS["compute_loss"], stopping=criterion, **driver)
    assert (result.steps, int(model.optimizer.iterations)) == (first, first)
    norms = by_loop(OWN_STEPS["own metrics"], stopping=stopping.GradientNormBelow(1e-9), **driver)[1]
    _, plain = by_loop(_plain, stopping=stopping.GradientNormBelow(1e-9), **driver)
    assert norms.history["gradient_norm"][0] == pytest.approx(plain.history["gradient_norm"][0], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "driver"),
    [("compute_loss", "eager"), ("adversaries", "eager"), ("adversaries", "graph")],
    indirect=["driver"],
)
def test_callbacks_that_look_at_gradients_do_so_once_a_step_of_a_train_step_of_its_own(name, driver):
    statistics, capture = tk.callbacks.GradientStatistics(every=3), tk.callbacks.CaptureGradients(every=2)
    keras.utils.set_random_seed(0)
    model = OWN_STEPS[name]()
    tk.OptimizationLoop(**driver).fit(model, *data(), callbacks=[statistics, capture], **SETTINGS)
    assert statistics.steps.tolist() == [3, 6]
    assert capture.steps.tolist() == [2, 4, 6, 8]
    assert len(capture.gradients) == len(statistics.statistics) == len(model.trainable_variables)
    for gradients in capture.gradients.values():
        assert np.all(np.abs(gradients).max(axis=tuple(range(1, gradients.ndim))) > 0.0)
        assert len(np.unique(gradients[:, ...].reshape(4, -1)[:, 0])) == 4


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_variables_of_one_of_two_optimizers_are_frozen_for_as_many_steps(driver):
    keras.utils.set_random_seed(0)
    model, seen = _adversaries(), []
    parts = model.discriminator.trainable_variables, model.generator.trainable_variables
    look = lambda step, logs: seen.append([np.concatenate([np.ravel(v) for v in part]) for part in parts])  # noqa: E731
    look(0, {})
    callbacks = [tk.callbacks.FreezeVariables("^d/"), tk.callbacks.FreezeVariables("^g/", until=3), look]
    tk.OptimizationLoop(**driver).fit(model, *data(), callbacks=callbacks, **SETTINGS)
    moved = [
        [bool(np.any(one != other)) for one, other in zip(*pair, strict=True)] for pair in itertools.pairwise(seen)
    ]
    assert moved == [[False, False]] * 3 + [[False, True]] * 5


def test_evaluate_is_the_loss_of_a_train_step_of_its_own_and_changes_nothing():
    values = []
    keras.utils.set_random_seed(0)
    model, loop = _autoencoder(noisy=False), tk.OptimizationLoop(jit_compile=False)
    x, y = data()

    def evaluate(step, logs):
        before = everything(model)
        values.append(loop.evaluate())
        assert_equal(everything(model), before)

    result = loop.fit(model, x[:4], y[:4], callbacks=[evaluate], **SETTINGS)
    assert values[0] == pytest.approx(result.history["loss"][1], rel=1e-5)
    assert result.steps == 2


def test_an_exception_in_a_train_step_undoes_it_in_an_eager_run():
    class Failing(WithOptimizers):
        batches = 0

        def train_step(self, data):
            logs = super().train_step(data)
            self.batches += 1
            if self.batches == 3:
                raise ArithmeticError("in train_step")
            return logs

    def make():
        model = functional(Failing)
        model.compile([0.1, 0.05])
        return model

    keras.utils.set_random_seed(0)
    model, loop = make(), tk.OptimizationLoop(run_eagerly=True)
    with pytest.raises(ArithmeticError, match=r"^in train_step$"):
        loop.fit(model, *data(), **SETTINGS)
    assert loop.result.steps == 2
    two_steps, _ = by_loop(_several, run_eagerly=True, max_iterations=2)
    assert_equal(everything(model), everything(two_steps))
    assert [int(optimizer.iterations) for optimizer in model.optimizers] == [2, 2]


class WithoutLoss(WithRawLosses):
    """Returns nothing that could be the loss."""

    def train_step(self, data):
        return {"penalty": super().train_step(data)["penalty_loss"]}


class WithoutLogs(WithRawLosses):
    """Returns nothing at all."""

    def train_step(self, data):
        super().train_step(data)


class WithHiddenOptimizer(keras.Model):
    """Has its optimizer where nobody finds it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.mean((y - self(x, training=True)) ** 2)
        for variable, gradient in zip(
            self.trainable_variables, tape.gradient(loss, self.trainable_variables), strict=True
        ):
            variable.assign_sub(0.1 * gradient)
        return {"loss": loss}


@pytest.mark.parametrize(
    ("cls", "error", "sentence"),
    [
        (WithoutLoss, ValueError, r"^`train_step` must call compute_loss or return a loss, .* received penalty\.$"),
        (WithoutLogs, TypeError, r"^`train_step` must return a dict of logs, received None\.$"),
    ],
)
def test_a_train_step_that_tells_no_loss_is_refused(cls, error, sentence, driver):
    model = compiled(functional(cls), SGD(0.1), None)
    before = everything(model)
    loop = tk.OptimizationLoop(**driver)
    with pytest.raises(error, match=sentence):
        loop.fit(model, *data(), **SETTINGS)
    assert_equal(everything(model), before)


_NO_GRADIENTS = r"^`train_step` must give its gradients to a Keras optimizer that is an attribute of the model"


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_a_train_step_that_shows_its_gradients_to_no_optimizer_runs_unless_somebody_wants_them(driver):
    model = compiled(functional(WithHiddenOptimizer), SGD(0.1), None)
    result = tk.OptimizationLoop(**driver).fit(model, *data(), **SETTINGS)
    assert np.mean(result.history["loss"][4:]) < np.mean(result.history["loss"][:4])
    loop = tk.OptimizationLoop(callbacks=[tk.callbacks.ClipGradients(norm=1.0)], **driver)
    with pytest.raises(ValueError, match=_NO_GRADIENTS):
        loop.fit(model, *data(), **SETTINGS)


@pytest.mark.parametrize(
    "settings",
    [
        {"stopping": stopping.GradientNormBelow(1e-3)},
        {"measures": {"norm": lambda gradients: tf.linalg.global_norm(gradients)}},
    ],
    ids=["criterion", "measure"],
)
def test_criteria_and_measures_of_gradients_that_nobody_sees_are_refused(settings):
    model = compiled(functional(WithHiddenOptimizer), SGD(0.1), None)
    loop = tk.OptimizationLoop(run_eagerly=True, **settings)
    with pytest.raises(ValueError, match=_NO_GRADIENTS):
        loop.fit(model, *data(), **SETTINGS)


# What is refused.


class OwnStep(tk.Step):
    """A strategy of a user."""

    def take(self, problem):
        return problem.minimize()


class OfTfKeras(tf_keras.optimizers.SGD):
    """An optimizer of a user."""


def _foreign():
    model = tf_keras.Sequential([tf_keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


REFUSED = {
    "a tf_keras model": (
        _foreign,
        {},
        {},
        TypeError,
        r"^`model` must be of Keras 3 for fit, .* use minimize with a func",
    ),
    "a tf_keras optimizer": (
        *(lambda: compiled(functional()), {"optimizer": tf_keras.optimizers.Adam()}, {}, TypeError),
        r"^`optimizer` must be of Keras 3 for fit, received .*Adam.* of tf_keras; use minimize",
    ),
    "an optimizer of a subclass": (
        *(lambda: compiled(functional()), {"optimizer": OfTfKeras()}, {}, TypeError),
        r"^`optimizer` must be of Keras 3 for fit",
    ),
    "no model": (lambda: lambda x: x, {}, {}, TypeError, r"^`model` must be a keras.Model, received"),
    "not compiled, no loss": (
        *(functional, {"optimizer": "sgd"}, {}, ValueError),
        r"^`loss` must be given for a model that is not compiled, received None\.$",
    ),
    "not compiled, no optimizer": (
        *(functional, {}, {"loss": "mse"}, ValueError),
        r"^`optimizer` must be given to the loop for a model that is not compiled, received None\.$",
    ),
    "a loss for a compiled model": (
        *(lambda: compiled(functional()), {}, {"loss": "mae"}, ValueError),
        r"^`loss` must be None for a model that is compiled",
    ),
    "metrics for a compiled model": (
        *(lambda: compiled(functional()), {}, {"metrics": ["mae"]}, ValueError),
        r"^`metrics` must be None for a model that is compiled",
    ),
    "a step for a train_step": (
        *(OWN_STEPS["own metrics"], {"step": OwnStep()}, {}, ValueError),
        r"^`step` must be left to a model that overrides train_step, as WithOwnMetrics does, received OwnStep\.$",
    ),
    "intermediates of a train_step": (
        *(OWN_STEPS["own metrics"], {"step": tk.TapeStep(intermediates=True)}, {}, ValueError),
        r"^`step` must be left to a model that overrides train_step",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(name):
    make, of_loop, of_fit, error, sentence = REFUSED[name]
    model = make()
    with pytest.raises(error, match=sentence):
        tk.OptimizationLoop(**of_loop).fit(model, *data(), **SETTINGS, **of_fit)


def test_strategies_and_minimize_work_with_the_models_and_optimizers_of_tf_keras():
    x, y = data()
    for step in ("tape", "minimize"):
        model = tf_keras.Sequential([tf_keras.Input((3,)), tf_keras.layers.Dense(1, kernel_initializer="zeros")])
        loop = tk.OptimizationLoop(tf_keras.optimizers.SGD(0.1), step, max_iterations=50, jit_compile=False)
        result = loop.minimize(lambda model=model: tf.reduce_mean((model(x) - y) ** 2), model.trainable_variables)
        assert result.loss < 0.1 * result.history["loss"][0]
