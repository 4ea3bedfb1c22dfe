"""Hooks, criteria, strategies and gradient callbacks in `loop.fit`; its ends, good and bad."""

from __future__ import annotations

import functools
import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tapekit as tk
from tapekit import stopping

DRIVERS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}
PER_EPOCH = 5


@pytest.fixture(params=["eager", "graph"])
def driver(request):
    return DRIVERS[request.param]


@pytest.fixture(params=DRIVERS)
def every_driver(request):
    return DRIVERS[request.param]


def make_model(cls=keras.Sequential, inside=(), **settings):
    """A model whose loss in every batch is (w - 4)**2, so that SGD(0.25) halves the distance at every step."""
    dense = layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="last")
    inputs = keras.Input((1,))
    outputs = inputs
    for layer in (*inside, dense):
        outputs = layer(outputs)
    model = cls([inputs, *inside, dense]) if cls is keras.Sequential else cls(inputs, outputs)
    model.compile(**{"optimizer": keras.optimizers.SGD(0.25), "loss": "mse", **settings})
    return model


def data(batches=PER_EPOCH):
    """Batches of 2 samples, each the same."""
    return np.ones((2 * batches, 1), "float32"), np.full((2 * batches, 1), 4.0, "float32")


def fit(loop, model, callbacks=None, epochs=3, batches=PER_EPOCH, **more):
    x, y = data(batches)
    settings = {"batch_size": 2, "epochs": epochs, "shuffle": False, "verbose": 0, "callbacks": callbacks, **more}
    return loop.fit(model, x, y, **settings)


def weight(step):
    return 4.0 - 4.0 * 0.5**step


def loss(step):
    """The loss that the logs of `step` hold: that before the update."""
    return 16.0 * 0.25 ** (step - 1)


def mean_loss(first, last):
    """What Keras reports of the steps of an epoch."""
    return float(np.mean([loss(step) for step in range(first, last + 1)]))


def last_weight(model):
    return float(np.ravel(model.get_layer("last").kernel)[0])


# The order of the hooks.

HOOKS = [
    *("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_train_batch_begin", "on_train_batch_end"),
    *("on_test_begin", "on_test_end", "on_test_batch_begin", "on_test_batch_end"),
]


def _recorder(base, events, hooks=HOOKS, owner=None, **attributes):
    """Returns a subclass of `base` that appends (owner, hook, position, logs) to `events`."""

    def method(hook):
        if hook in ("on_train_begin", "on_train_end", "on_test_begin", "on_test_end"):
            return lambda self, logs=None: events.append((owner, hook, None, dict(logs or {})))
        return lambda self, position, logs=None: events.append((owner, hook, position, dict(logs or {})))

    return type("Recorder", (base,), {**{hook: method(hook) for hook in hooks}, **attributes})


class StopAt(keras.callbacks.Callback):
    """Stops at the end of the batch with which a number of updates is reached."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) >= self.step:
            self.model.stop_training = True


def _events(steps_per_execution, stop, run, others=(), batches=6):
    events = []
    recorder = _recorder(keras.callbacks.Callback, events)()
    model = make_model(steps_per_execution=steps_per_execution, metrics=["mae"])
    callbacks = [recorder, *([StopAt(stop)] if stop else []), *others]
    x, y = data(batches)
    more = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0}
    run(model, x, y, callbacks=callbacks, validation_data=(x[:2], y[:2]), **more)
    return events


@functools.cache
def _of_fit(steps_per_execution, stop):
    """The events of `Model.fit`, where the end of several batches together is at the last of them."""
    events = []
    for owner, hook, position, logs in _events(
        steps_per_execution, stop, lambda model, *args, **more: model.fit(*args, **more)
    ):
        if hook == "on_train_batch_end":  # older Keras gives the first of them
            position -= position % steps_per_execution - steps_per_execution + 1
        events.append((owner, hook, position, logs))
    return events


CHUNKS = {**DRIVERS, "graph by single steps": {"jit_compile": False, "steps_per_execution": 1}}


@pytest.fixture(params=CHUNKS)
def chunks(request):
    """The settings of drivers with chunks as long as they like to be, and as short as can be."""
    return CHUNKS[request.param]


@pytest.mark.parametrize(
    ("chunks", "steps_per_execution", "stop"),
    [
        *(("eager", 1, 7), ("graph", 1, 7), ("eager", 3, None), ("graph", 3, 7), ("xla", 3, 7)),
        ("graph by single steps", 3, None),
    ],
    indirect=["chunks"],
)
def test_keras_hooks_come_in_the_order_of_fit_with_its_logs(chunks, steps_per_execution, stop):
    events = _events(steps_per_execution, stop, tk.OptimizationLoop(**chunks).fit)
    expected = _of_fit(steps_per_execution, stop)
    assert [event[:3] for event in events] == [event[:3] for event in expected]
    for (*_, logs), (*_, of_fit) in zip(events, expected, strict=True):
        assert logs == pytest.approx(of_fit, rel=1e-6)


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_a_callback_that_sees_every_step_leaves_the_hooks_of_the_others_as_they_are(driver):
    seen = []
    events = _events(3, None, tk.OptimizationLoop(**driver).fit, [lambda step, logs: seen.append(step)])
    assert [event[:3] for event in events] == [event[:3] for event in _of_fit(3, None)]
    assert seen == list(range(1, 13))


@pytest.mark.parametrize("chunks", ["eager", "graph by single steps"], indirect=True)
def test_the_hooks_of_batches_that_the_end_of_an_epoch_cuts_short_are_called(chunks):
    events = _events(3, None, tk.OptimizationLoop(**chunks).fit, batches=5)
    places = [event[1:3] for event in events if event[1].startswith("on_train_batch")]
    begin, end = "on_train_batch_begin", "on_train_batch_end"
    assert places == [(begin, 0), (end, 2), (begin, 3), (end, 5)] * 2
    assert [event[3]["loss"] for event in events if event[1] == end][1] == pytest.approx(mean_loss(1, 5), rel=1e-6)


@pytest.mark.parametrize("chunks", ["eager", "graph", "graph by single steps"], indirect=True)
def test_the_loops_own_hooks_come_first_and_on_step_before_the_end_of_the_batch(chunks):
    events = []
    hooks = ["on_step", *HOOKS[:6]]
    cls = _recorder(tk.OptimizationLoop, events, hooks, "loop")
    one, two = (_recorder(tk.Callback, events, hooks, owner)() for owner in ("one", "two"))
    fit(cls(max_iterations=7, callbacks=[one], **chunks), make_model(), [two])
    assert [event[0] for event in events] == ["loop", "one", "two"] * (len(events) // 3)

    def steps(first, last):
        for step in range(first, last + 1):
            yield "on_train_batch_begin", step - first, {}
            yield "on_step", step, {"loss": loss(step)}
            yield "on_train_batch_end", step - first, {"loss": mean_loss(first, step)}

    expected = [
        ("on_train_begin", None, {}),
        *(("on_epoch_begin", 0, {}), *steps(1, 5), ("on_epoch_end", 0, {"loss": mean_loss(1, 5)})),
        *(("on_epoch_begin", 1, {}), *steps(6, 7), ("on_epoch_end", 1, {"loss": mean_loss(6, 7)})),
        ("on_train_end", None, {"loss": mean_loss(6, 7)}),
    ]
    assert [event[1:3] for event in events[::3]] == [event[:2] for event in expected]
    for position, (*_, logs) in enumerate(events):
        assert logs == pytest.approx(expected[position // 3][-1], rel=1e-6)


# Criteria stop at the exact step, in the middle of an epoch.

CRITERIA = {
    "max_iterations": stopping.MaxIterations(7),
    "max_evaluations": stopping.MaxEvaluations(7),
    "loss": stopping.LossBelow(0.01),
    "loss_change": stopping.LossChangeBelow(0.02),
    "gradient_norm": stopping.GradientNormBelow(0.2),
    "gradient_norm_inf": stopping.GradientNormBelow(0.2, ord=np.inf),
    "variables_change": stopping.VariablesChangeBelow(0.05),
    "plateau": stopping.LossPlateau(1, min_delta=0.02),
    "or": stopping.LossBelow(1e-9) | stopping.GradientNormBelow(0.2),
    "and": stopping.LossBelow(0.1) & stopping.GradientNormBelow(0.2),
    "for_steps": stopping.LossBelow(0.1).for_steps(3),
    "after": stopping.LossBelow(0.1).after(7),
}


def _assert_stopped_at_7(result, model):
    assert result.steps == 7
    assert last_weight(model) == weight(7) == result.variables[0].item()
    np.testing.assert_array_equal(result.history["loss"], [loss(step) for step in range(1, 8)])
    np.testing.assert_allclose(result.epoch_history["loss"], [mean_loss(1, 5), mean_loss(6, 7)], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        *((name, "eager") for name in CRITERIA),
        *((name, "graph") for name in ("max_evaluations", "variables_change", "plateau", "and")),
    ],
    indirect=["driver"],
)
def test_a_criterion_stops_at_the_exact_step_in_the_middle_of_an_epoch(name, driver):
    model = make_model()
    result = fit(tk.OptimizationLoop(stopping=CRITERIA[name], **driver), model)
    _assert_stopped_at_7(result, model)
    assert "step 7" in result.message or "7 evaluations" in result.message


@pytest.mark.parametrize(
    "settings",
    [
        *({"jit_compile": False, "steps_per_execution": length} for length in (1, 3, 256)),
        *({"jit_compile": True, "steps_per_execution": length} for length in (3, "auto")),
    ],
)
def test_the_chunk_length_and_xla_change_nothing_of_a_stop(settings):
    model = make_model()
    result = fit(tk.OptimizationLoop(stopping=CRITERIA["or"], **settings), model)
    _assert_stopped_at_7(result, model)
    np.testing.assert_array_equal(result.history["gradient_norm"], [8.0 * 0.5**step for step in range(7)])
    assert result.message.startswith("GradientNormBelow")


def test_wall_time_stops_between_chunks(driver):
    result = fit(tk.OptimizationLoop(stopping=stopping.WallTime(1e-9), **driver), make_model())
    assert (result.steps, result.reason) == (1, tk.StopReason.LIMIT)
    assert result.message.startswith("WallTime")


def test_a_loss_that_is_not_finite_stops_at_its_batch(driver):
    model = make_model()
    x, y = data(2 * PER_EPOCH)
    y[2 * 7 - 1] = np.nan
    result = tk.OptimizationLoop(**driver).fit(model, x, y, batch_size=2, shuffle=False, verbose=0)
    assert (result.steps, result.reason) == (7, tk.StopReason.NOT_FINITE)
    np.testing.assert_array_equal(result.history["loss"][:6], [loss(step) for step in range(1, 7)])


def test_the_epochs_are_a_limit_where_nothing_else_ends_the_run(driver):
    result = fit(tk.OptimizationLoop(**driver), make_model(), epochs=2)
    assert (result.steps, result.reason) == (10, tk.StopReason.LIMIT)
    assert "2 epochs" in result.message


# Strategies.


def make_network(cls=keras.Model, **settings):
    """A model of two layers with data of which no two batches are alike."""
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, activation="tanh", name="hidden")(inputs)
    model = cls(inputs, layers.Dense(1, name="last")(hidden))
    model.compile(**{"optimizer": keras.optimizers.Adam(0.05), "loss": "mse", "metrics": ["mae"], **settings})
    return model


def network_data():
    random = np.random.default_rng(0)
    return random.normal(size=(16, 3)).astype("float32"), random.normal(size=(16, 1)).astype("float32")


def fit_network(loop, model, callbacks=None, **more):
    x, y = network_data()
    settings = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, **more}
    return loop.fit(model, x, y, callbacks=callbacks, **settings)


def everything(model):
    """The values of all variables, those of the optimizer included."""
    return [variable.numpy() for variable in (*model.variables, *model.optimizer.variables)]


def assert_equal(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def test_both_strategies_give_the_same_bits(every_driver):
    results, values = [], []
    for step in ("tape", "minimize"):
        model = make_model(optimizer=keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=3))
        criterion = stopping.GradientNormBelow(1e-9)
        hook = tk.callbacks.ClipGradients(global_norm=0.1)
        loop = tk.OptimizationLoop(step=step, stopping=criterion, **every_driver)
        results.append(fit(loop, model, [hook]))
        values.append(everything(model))
    assert_equal(*values)
    assert set(results[0].history) == {"loss", "gradient_norm", "unclipped_norm"}
    for history in ("history", "epoch_history"):
        one, other = (getattr(result, history) for result in results)
        assert one.keys() == other.keys()
        assert_equal(list(one.values()), list(other.values()))


class Named(layers.Layer):
    """Names what passes through it."""

    def call(self, inputs):
        return tk.intermediate("hidden", 2.0 * inputs)


def test_gradients_of_an_intermediate_inside_a_layer_are_recorded_and_given_to_hooks_and_measures(every_driver):
    class Double(tk.Callback):
        def on_gradient(self, gradients, variables, intermediates):
            self.record("seen", tf.reduce_sum(intermediates["hidden"]))
            return [2.0 * gradient for gradient in gradients]

    model = make_model(inside=[Named()])  # loss (2 w - 4)**2, so that SGD(0.25 / 4) halves the distance to 2
    measures = {"inner": lambda intermediates: intermediates["hidden"]}
    step = tk.TapeStep(intermediates=["hidden"])
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(0.25 / 8), step, max_iterations=7, measures=measures, **every_driver
    )
    result = fit(loop, model, [Double()])
    assert last_weight(model) == weight(7) / 2
    expected = np.array([-8.0 * 0.5**step for step in range(7)])  # 2 (2 w - 4) w, a mean over two samples
    at = np.array([weight(step) / 2 for step in range(7)])
    inner = np.tile((expected * at / 2)[:, None, None], (1, 2, 1))
    np.testing.assert_allclose(result.history["inner"], inner, rtol=1e-6)
    np.testing.assert_allclose(result.history["seen"], expected * at, rtol=1e-6)
    np.testing.assert_allclose(result.history["gradient_norm/hidden"], np.abs(expected * at) / 2**0.5, rtol=1e-6)


class SAM(tk.Step):
    """Sharpness-aware minimization, which evaluates twice a step."""

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        for variable, gradient in zip(problem.variables, gradients, strict=True):
            variable.assign_add(0.5 * ops.sign(gradient))
        _, perturbed = problem.loss_and_gradients()
        for variable, gradient in zip(problem.variables, gradients, strict=True):
            variable.assign_sub(0.5 * ops.sign(gradient))
        problem.apply(perturbed)
        return logs


class CountsEvaluations(keras.Model):
    """A model with a metric that its own compute_loss updates."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = keras.metrics.Sum(name="seen")

    def compute_loss(self, *args, **kwargs):
        self.seen.update_state(1.0)
        return super().compute_loss(*args, **kwargs)


def test_a_step_that_evaluates_twice_shows_the_first_evaluation_alone_to_metrics(every_driver):
    model = make_model(
        CountsEvaluations, metrics=["mae", keras.metrics.MeanMetricWrapper(lambda y, p: p, name="prediction")]
    )
    result = fit(tk.OptimizationLoop(step=SAM(), **every_driver), model, epochs=2)
    weights = [0.0]
    for _ in range(10):
        perturbed = weights[-1] + 0.5 * np.sign(weights[-1] - 4.0)
        weights.append(weights[-1] - 0.25 * 2 * (perturbed - 4.0))
    assert last_weight(model) == weights[-1]
    assert result.evaluations == 20
    np.testing.assert_allclose(result.history["loss"], (np.array(weights[:-1]) - 4) ** 2, rtol=1e-6)
    first, second = np.array(weights[:5]), np.array(weights[5:10])
    expected = {"loss": lambda w: (w - 4) ** 2, "mae": lambda w: abs(w - 4), "prediction": lambda w: w}
    assert set(result.epoch_history) == {*expected, "seen"}
    assert result.epoch_history["seen"].tolist() == [5.0, 5.0]
    for name, of in expected.items():
        np.testing.assert_allclose(result.epoch_history[name], [of(first).mean(), of(second).mean()], rtol=1e-6)
    # Those of a step are about the epoch so far.
    np.testing.assert_allclose(result.history["prediction"][5:], np.cumsum(second) / np.arange(1, 6), rtol=1e-6)


# Gradient hooks.


def _sgd(**more):
    return keras.optimizers.SGD(0.1, **more)


def _frozen():
    model = make_network(optimizer=_sgd())
    model.get_layer("hidden").trainable = False
    model.compile(_sgd(), "mse", metrics=["mae"])
    return model


LIKE_KERAS = {
    "global norm": (
        tk.callbacks.ClipGradients(global_norm=0.5),
        lambda: make_network(optimizer=_sgd(global_clipnorm=0.5)),
    ),
    "value": (tk.callbacks.ClipGradients(value=0.1), lambda: make_network(optimizer=_sgd(clipvalue=0.1))),
    "scale": (tk.callbacks.ScaleGradients({".*": 0.5}), lambda: make_network(optimizer=keras.optimizers.SGD(0.05))),
    "freeze": (tk.callbacks.FreezeVariables("hidden/"), _frozen),
}


@pytest.mark.parametrize(
    ("name", "driver"),
    [*((name, "eager") for name in LIKE_KERAS), ("global norm", "graph")],
    indirect=["driver"],
)
def test_a_gradient_callback_does_what_keras_does_in_fit_by_other_means(name, driver):
    callback, make = LIKE_KERAS[name]
    x, y = network_data()
    keras.utils.set_random_seed(0)
    of_keras = make()
    of_keras.run_eagerly = True
    of_keras.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    keras.utils.set_random_seed(0)
    model = make_network(optimizer=_sgd())
    fit_network(tk.OptimizationLoop(**driver), model, [callback])
    for one, other in zip(model.weights, of_keras.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)


def test_centralized_gradients_and_noise_reach_the_optimizer():
    seen = tk.callbacks.CaptureGradients()
    callbacks = [tk.callbacks.CentralizeGradients(), tk.callbacks.GradientNoise(1e-12), seen]
    fit_network(tk.OptimizationLoop(jit_compile=False), make_network(), callbacks)
    gradients = seen.gradients["hidden/kernel"]
    assert gradients.shape == (8, 3, 4)
    means = gradients.mean(axis=1)
    assert 0.0 < np.abs(means).max() < 1e-4
    assert np.abs(gradients).max() > 1e-2


def test_statistics_and_captured_gradients_are_those_of_the_steps_that_are_due(driver):
    statistics, capture = tk.callbacks.GradientStatistics(every=3), tk.callbacks.CaptureGradients(every=2)
    model = make_model()
    fit(tk.OptimizationLoop(max_iterations=9, **driver), model, [statistics, capture])
    assert statistics.steps.tolist() == [3, 6, 9]
    assert capture.steps.tolist() == [2, 4, 6, 8]
    (name,) = capture.gradients
    assert name.endswith("last/kernel")
    np.testing.assert_array_equal(capture.gradients[name].ravel(), [-8.0 * 0.5 ** (step - 1) for step in (2, 4, 6, 8)])
    np.testing.assert_array_equal(statistics.statistics[name]["norm"], [8.0 * 0.5 ** (step - 1) for step in (3, 6, 9)])


class WrongGradient(layers.Layer):
    def call(self, inputs):
        return tf.custom_gradient(lambda x: (1.0 * x, lambda upstream: 2.0 * upstream))(inputs)


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_check_gradients_tells_right_gradients_from_wrong_ones(driver):
    check = tk.callbacks.CheckGradients(steps=2)
    model = make_network()
    fit_network(tk.OptimizationLoop(**driver), model, [check])
    assert (check.checked, check.failed) == (2 * (10 + 4 + 4 + 1), 0)
    inputs = keras.Input((3,))
    wrong = keras.Model(inputs, WrongGradient()(layers.Dense(1, name="last")(inputs)))
    wrong.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"at step 1 it is .* for last/"):
        fit_network(tk.OptimizationLoop(**driver), wrong, [tk.callbacks.CheckGradients()])


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_a_table_and_functions_see_every_step_they_are_due_at(driver):
    file, seen = io.StringIO(), []
    table = tk.callbacks.IterationTable(every=4, file=file)
    every_third = tk.callbacks.FunctionCallback(lambda step, logs: seen.append((step, logs["loss"])), every=3)
    fit(tk.OptimizationLoop(max_iterations=9, **driver), make_model(), [table, every_third])
    assert seen == [(step, loss(step)) for step in (3, 6, 9)]
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert lines[0][:2] == ["step", "loss"]
    assert [line[0] for line in lines[1:]] == ["4", "8"]
    assert [float(line[1]) for line in lines[1:]] == pytest.approx([loss(4), loss(8)], rel=1e-3)


# Measures, the loop's own hooks, stop and evaluate.


def test_measures_see_the_variables_after_the_update_and_the_gradients_before_the_hooks(every_driver):
    model = make_model()
    measures = {"w": lambda: model.get_layer("last").kernel[0, 0], "norm": lambda gradients: tf.norm(gradients[0])}
    loop = tk.OptimizationLoop(max_iterations=7, measures=measures, **every_driver)
    result = fit(loop, model, [tk.callbacks.ScaleGradients({".*": 1.0})])
    np.testing.assert_array_equal(result.history["w"], [weight(step) for step in range(1, 8)])
    np.testing.assert_array_equal(result.history["norm"], [8.0 * 0.5**step for step in range(7)])
    assert set(result.epoch_history) == {"loss"}


class Watching(tk.OptimizationLoop):
    """A loop with hooks of its own that stops itself."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_gradient(self, gradients, variables):
        return [0.5 * gradient for gradient in gradients]

    def on_step(self, step, logs):
        self.seen.append((step, logs["loss"], self.evaluate()))
        if step == 7:
            self.stop("seen enough")

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(("epoch", epoch, logs["loss"]))


def test_a_subclassed_loop_changes_gradients_evaluates_and_stops_at_the_step(every_driver):
    model = make_model()
    loop = Watching(keras.optimizers.SGD(0.5), **every_driver)
    result = fit(loop, model)
    steps = [(step, loss(step), loss(step + 1)) for step in range(1, 8)]
    assert [item for item in loop.seen if item[0] != "epoch"] == steps
    assert [item[:2] for item in loop.seen if item[0] == "epoch"] == [("epoch", 0), ("epoch", 1)]
    _assert_stopped_at_7(result, model)
    assert (result.reason, result.message) == (tk.StopReason.STOPPED, "stopped at step 7: seen enough")


@pytest.mark.parametrize("driver", ["graph"], indirect=True)
def test_evaluate_changes_nothing(driver):
    def evaluated(often):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        hidden = layers.Dropout(0.5, seed=1)(layers.BatchNormalization()(layers.Dense(4)(inputs)))
        model = keras.Model(inputs, layers.Dense(1)(hidden))
        model.compile("adam", "mse", metrics=["mae"])
        loop = tk.OptimizationLoop(**driver)
        result = fit_network(loop, model, [lambda step, logs: [loop.evaluate() for _ in range(often)]])
        return [*everything(model), *result.history.values(), *result.epoch_history.values()]

    assert_equal(evaluated(0), evaluated(2))


@pytest.mark.parametrize(
    ("hook", "driver"),
    [
        *(("on_train_begin", "eager"), ("on_epoch_begin", "graph"), ("on_train_batch_begin", "eager")),
        *(("on_train_batch_begin", "graph"), ("on_epoch_end", "graph")),
    ],
    indirect=["driver"],
)
def test_a_stop_takes_effect_before_the_next_step(hook, driver):
    def stop(self, *position, logs=None):
        self.calls = getattr(self, "calls", 0) + 1
        self.loop.stop(f"from {hook}")

    model = make_model()
    result = fit(tk.OptimizationLoop(**driver), model, [type("Stopping", (tk.Callback,), {hook: stop})()])
    steps = 5 if hook == "on_epoch_end" else 0
    assert (result.steps, last_weight(model)) == (steps, weight(steps))
    assert result.message == f"stopped at step {steps}: from {hook}"
    assert len(result.epoch_history.get("loss", ())) <= 1


def test_a_keras_callback_stops_at_its_batch_and_mixes_with_tapekits(every_driver):
    model, seen = make_model(), []
    callbacks = [StopAt(7), lambda step, logs: seen.append(step), "terminate_on_nan", keras.callbacks.History()]
    result = fit(tk.OptimizationLoop(**every_driver), model, callbacks)
    assert seen == list(range(1, 8))
    _assert_stopped_at_7(result, model)
    assert result.message == "stopped at step 7: a callback set model.stop_training"
    assert callbacks[-1].history["loss"] == result.epoch_history["loss"].tolist()


# Ends, good and bad.


class Boom(Exception):
    """What the tests raise."""


def raising(hook, when):
    def method(self, position=None, logs=None):
        self.calls = getattr(self, "calls", 0) + 1
        if when is None or position == when:
            raise Boom(f"in {hook}")

    return type("Raising", (tk.Callback,), {hook: method})()


def _assert_can_be_used_again(loop, model, compiled, before):
    """The model has the optimizer that it was compiled with, and the loop goes on from where it is."""
    assert model.optimizer is compiled
    result = fit(loop, model, epochs=1)
    assert loop.result is result
    assert (result.steps, result.reason) == (5, tk.StopReason.LIMIT)
    assert last_weight(model) == weight(before + 5)


@pytest.mark.parametrize(
    ("hook", "when", "steps", "own", "driver"),
    [
        *(("on_step", 7, 7, False, "eager"), ("on_step", 7, 7, False, "graph"), ("on_step", 7, 7, True, "graph")),
        *(("on_train_batch_end", 3, 4, False, "graph"), ("on_epoch_begin", 1, 5, False, "eager")),
        *(("on_epoch_end", 1, 10, True, "eager"), ("on_epoch_end", 1, 10, False, "graph")),
    ],
    indirect=["driver"],
)
def test_after_an_exception_in_a_hook_everything_is_as_after_the_last_step(hook, when, steps, own, driver):
    model = make_model()
    compiled = model.optimizer
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25) if own else None, **driver)
    with pytest.raises(Boom, match=f"^in {hook}$") as caught:
        fit(loop, model, [raising(hook, when)])
    assert type(caught.value) is Boom
    assert (loop.result.steps, loop.result.reason) == (steps, tk.StopReason.ERROR)
    assert "Boom" in loop.result.message
    assert last_weight(model) == weight(steps)
    assert len(loop.result.history["loss"]) == steps
    _assert_can_be_used_again(loop, model, compiled, steps)


class Fragile(keras.metrics.Mean):
    """A metric that raises at the seventh batch."""

    def __init__(self, **kwargs):
        super().__init__(name="fragile", **kwargs)
        self.batches = 0
        self.at = 7

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(y_pred)
        self.batches += 1
        if self.batches == self.at:
            raise Boom("in a metric")


@pytest.mark.parametrize("own", [False, True])
def test_an_exception_in_a_metric_undoes_the_step_of_an_eager_run(own):
    model = make_model(metrics=[Fragile()], optimizer=keras.optimizers.SGD(0.25, momentum=0.0))
    compiled = model.optimizer
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25) if own else None, run_eagerly=True)
    with pytest.raises(Boom, match=r"^in a metric$"):
        fit(loop, model)
    assert (loop.result.steps, loop.result.reason) == (6, tk.StopReason.ERROR)
    assert last_weight(model) == weight(6)
    assert int((loop.optimizer or compiled).iterations) == 6
    _assert_can_be_used_again(loop, model, compiled, 6)


def _generator(failing):
    x, y = data(1)
    for batch in range(100):
        if batch == failing:
            raise Boom("in the data")
        yield x, y


class Sequence(keras.utils.PyDataset):
    """Batches of which one raises."""

    def __init__(self, failing):
        super().__init__()
        self.failing = failing

    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index == self.failing:
            raise Boom("in the data")
        return data(1)


@pytest.mark.parametrize("source", [_generator, Sequence])
def test_an_exception_in_the_data_source_leaves_the_last_whole_step(source, driver):
    model = make_model()
    compiled = model.optimizer
    loop = tk.OptimizationLoop(**driver)
    with pytest.raises(Exception, match="in the data"):
        loop.fit(model, source(6), epochs=2, steps_per_epoch=9, shuffle=False, verbose=0)
    assert (loop.result.steps, loop.result.reason) == (6, tk.StopReason.ERROR)
    assert last_weight(model) == weight(6)
    _assert_can_be_used_again(loop, model, compiled, 6)


def test_an_exception_in_the_loss_arrives_unchanged_before_any_variable_has_changed(driver):
    def raises(y, p):
        raise Boom("in the loss")

    model = make_model(loss=raises)
    compiled, loop = model.optimizer, tk.OptimizationLoop(**driver)
    with pytest.raises(Boom, match=r"^in the loss$"):
        fit(loop, model)
    assert last_weight(model) == 0.0
    assert model.optimizer is compiled
    model.compile(compiled, "mse")
    _assert_can_be_used_again(loop, model, compiled, 0)


@pytest.mark.parametrize(("hook", "steps", "reason"), [("on_train_begin", 0, "ERROR"), ("on_train_end", 15, "ERROR")])
def test_an_exception_at_the_beginning_or_the_end_of_a_run_leaves_nothing_behind(hook, steps, reason):
    class Ends(tk.Callback):
        ended = 0

        def on_train_end(self, logs=None):
            self.ended += 1

    model, others = make_model(), [Ends(), Ends()]
    compiled, loop = model.optimizer, tk.OptimizationLoop(keras.optimizers.SGD(0.25), run_eagerly=True)
    with pytest.raises(Boom, match=rf"^in {hook}$"):
        fit(loop, model, [others[0], raising(hook, None), others[1]])
    assert (loop.result.steps, loop.result.reason) == (steps, tk.StopReason[reason])
    assert [callback.ended for callback in others] == [1, 1]
    assert last_weight(model) == weight(steps)
    _assert_can_be_used_again(loop, model, compiled, steps)


def test_an_interrupt_ends_the_run_as_an_end_and_reaches_the_caller(driver):
    class Interrupt(tk.Callback):
        ended = 0

        def on_step(self, step, logs):
            if step == 7:
                raise KeyboardInterrupt

        def on_train_end(self, logs=None):
            self.ended += 1

    model, callback = make_model(), Interrupt()
    compiled, loop = model.optimizer, tk.OptimizationLoop(**driver)
    with pytest.raises(KeyboardInterrupt):
        fit(loop, model, [callback])
    assert (loop.result.steps, loop.result.reason) == (7, tk.StopReason.INTERRUPTED)
    assert callback.ended == 1
    _assert_can_be_used_again(loop, model, compiled, 7)


def test_a_run_inside_a_run_of_the_same_loop_is_refused_and_ends_nothing():
    caught = []
    loop, model = tk.OptimizationLoop(run_eagerly=True), make_model()

    def nested(step, logs):
        with pytest.raises(RuntimeError, match="running already") as error:
            fit(loop, make_model())
        caught.append(error)

    assert fit(loop, model, [nested], epochs=1).steps == 5
    assert len(caught) == 5
    assert last_weight(model) == weight(5)
