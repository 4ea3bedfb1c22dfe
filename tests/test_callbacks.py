"""Hooks: their order, what they see, what they cost; Keras's callbacks; the run as a generator; the table."""

from __future__ import annotations

import contextlib
import csv
import functools
import io

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit import _drivers

DRIVERS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "auto": {}}
COMPILED = {name: driver for name, driver in DRIVERS.items() if name != "eager"}
HOOKS = (
    *("on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_step"),
    *("on_train_batch_end", "on_epoch_end", "on_train_end"),
)


@pytest.fixture(params=DRIVERS)
def driver(request):
    return DRIVERS[request.param]


@pytest.fixture(params=COMPILED)
def compiled(request):
    return COMPILED[request.param]


def _loop(driver, steps=10, cls=tk.OptimizationLoop, **settings):
    """SGD(0.25) halves the distance of x to 4 at every step, so that iterates are known and exact in float32."""
    return cls(keras.optimizers.SGD(0.25), **{"max_iterations": steps, **driver, **settings})


def _iterate(step):
    return 4.0 - 4.0 * 0.5**step


def _loss(step):
    """The loss that the logs of `step` hold: that before the update."""
    return 16.0 * 0.25 ** (step - 1)


class Quadratic:
    """x and its loss (x - 4)**2."""

    def __init__(self, dtype=tf.float32):
        self.x = tf.Variable(0.0, dtype=dtype, name="x")

    def __call__(self):
        return (self.x - 4.0) ** 2


@pytest.fixture
def quadratic():
    return Quadratic()


def _run(loop, quadratic, callbacks=None, **more):
    return loop.minimize(quadratic, [quadratic.x], callbacks=callbacks, **more)


@pytest.fixture
def advances(monkeypatch):
    """The lengths of the chunks that the drivers take, which nothing but hooks and limits makes shorter."""
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


# The order of the hooks.


def _recording(base, events, owner="", hooks=HOOKS, **attributes):
    """Returns a subclass of `base` that appends (owner, hook, position or None, names of the logs) to `events`."""

    def method(hook):
        if hook.startswith("on_train_") and "batch" not in hook:
            return lambda self, logs=None: events.append((owner, hook, None, sorted(logs)))
        return lambda self, position, logs=None: events.append((owner, hook, position, sorted(logs)))

    return type(f"Recording{owner}", (base,), {**{hook: method(hook) for hook in hooks}, **attributes})


@functools.lru_cache
def _order_in_fit(steps_per_epoch, steps):
    """The events of `Model.fit` when a callback stops it after so many steps."""
    events = []

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if sum(event[1] == "on_train_batch_end" for event in events) == steps:
                self.model.stop_training = True

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensors((np.ones((1, 1)), np.ones((1, 1)))).repeat()
    recorder = _recording(keras.callbacks.Callback, events)()
    model.fit(data, epochs=100, steps_per_epoch=steps_per_epoch, shuffle=False, verbose=0, callbacks=[recorder, Stop()])
    return events


@pytest.mark.parametrize("replayable", [False, True])
@pytest.mark.parametrize(("steps_per_epoch", "steps"), [(1, 6), (5, 10), (5, 7)])
def test_hooks_come_in_the_order_of_fit_whatever_the_chunks(steps_per_epoch, steps, replayable, driver):
    for length in (1, 256):
        events, quadratic = [], Quadratic()
        recorder = _recording(tk.Callback, events, replayable=replayable)()
        loop = _loop(driver, steps, steps_per_execution=length)
        _run(loop, quadratic, [recorder], steps_per_epoch=steps_per_epoch)
        assert [event for event in events if event[1] != "on_step"] == _order_in_fit(steps_per_epoch, steps)


@pytest.mark.parametrize("steps_per_epoch", [1, 5])
def test_on_step_comes_before_the_end_of_the_batch_and_counts_from_1(steps_per_epoch, driver, quadratic):
    events = []
    _run(_loop(driver, 5), quadratic, [_recording(tk.Callback, events)()], steps_per_epoch=steps_per_epoch)
    positions = [event[2] for event in events if event[1] == "on_step"]
    assert positions == [1, 2, 3, 4, 5]
    names = [event[1] for event in events]
    for index, name in enumerate(names):
        if name == "on_step":
            assert (names[index - 1], names[index + 1]) == ("on_train_batch_begin", "on_train_batch_end")


@pytest.mark.parametrize("steps_per_epoch", [1, 5])
@pytest.mark.parametrize("length", [1, 256])
def test_the_loops_own_hooks_come_before_those_of_the_callbacks_in_their_order(
    length, steps_per_epoch, driver, quadratic
):
    events = []
    cls = _recording(tk.OptimizationLoop, events, "loop")
    one, two, three = (_recording(tk.Callback, events, owner)() for owner in ("one", "two", "three"))
    loop = _loop(driver, 6, cls, callbacks=[one, two], steps_per_execution=length)
    _run(loop, quadratic, [three], steps_per_epoch=steps_per_epoch)
    assert [event[0] for event in events] == ["loop", "one", "two", "three"] * (len(events) // 4)
    for first in range(0, len(events), 4):
        assert len({event[1:] for event in map(_hashable, events[first : first + 4])}) == 1
    assert {event[1] for event in events} == set(HOOKS)


def _hashable(event):
    return (*event[:3], tuple(event[3]))


def test_logs_of_a_hook_are_those_of_the_step_and_of_an_epoch_those_of_its_last_step(driver, quadratic):
    seen = {}

    class Keep(tk.Callback):
        def on_step(self, step, logs):
            seen["step", step] = logs

        def on_train_batch_end(self, batch, logs=None):
            seen["batch", batch] = logs

        def on_epoch_end(self, epoch, logs=None):
            seen["epoch", epoch] = logs

        def on_train_end(self, logs=None):
            seen["end"] = logs

    loop = _loop(driver, 5, measures={"pair": lambda: tf.stack([quadratic.x, quadratic.x])})
    loop.minimize(
        *(lambda: (quadratic(), {"extra": 2.0 * quadratic.x}), [quadratic.x]), callbacks=[Keep()], steps_per_epoch=3
    )
    for step in range(1, 6):
        logs = seen["step", step]
        assert list(logs) == ["loss", "extra", "pair"]
        assert (logs["loss"], logs["extra"]) == (_loss(step), 2.0 * _iterate(step - 1))
        assert (type(logs["loss"]), type(logs["extra"])) == (float, float)
        np.testing.assert_array_equal(logs["pair"], [_iterate(step)] * 2)
    scalars = {step: {name: seen["step", step][name] for name in ("loss", "extra")} for step in range(1, 6)}
    assert (seen["epoch", 0], seen["epoch", 1], seen["end"]) == (scalars[3], scalars[5], scalars[5])
    assert (seen["batch", 2], seen["batch", 0]) == (scalars[3], scalars[4])


def test_arrays_in_logs_keep_their_values_and_cannot_change_the_history(driver, quadratic):
    kept = []

    def spoil(step, logs):
        kept.append(logs["pair"].copy())
        with contextlib.suppress(ValueError):  # read-only is as good
            logs["pair"][:] = -1.0

    loop = _loop(driver, 8, measures={"pair": lambda: tf.stack([quadratic.x, quadratic.x])})
    result = _run(loop, quadratic, [spoil])
    np.testing.assert_array_equal(result.history["pair"], np.stack(kept))


# What a hook sees: every, replayable, plain functions.


@pytest.mark.parametrize("length", [1, 7, 256, "auto"])
def test_a_callback_is_called_at_multiples_of_every_and_sees_the_variables_of_that_step(length, driver, quadratic):
    seen = {}

    class Live(tk.Callback):
        def __init__(self, every):
            super().__init__()
            self.every = every

        def on_step(self, step, logs):
            seen.setdefault(self.every, []).append((step, logs["loss"], float(quadratic.x)))

    _run(_loop(driver, 20, steps_per_execution=length), quadratic, [Live(3), Live(1), Live(7), Live(25)])
    for every in (1, 3, 7):
        expected = [(step, _loss(step), _iterate(step)) for step in range(every, 21, every)]
        assert seen[every] == expected
    assert 25 not in seen


def test_chunks_end_exactly_where_a_callback_is_due(compiled, advances, quadratic):
    every = lambda n: tk.callbacks.FunctionCallback(lambda step, logs: None, every=n)  # noqa: E731
    _run(_loop(compiled, 20), quadratic, [every(6), every(9)])
    assert advances == [6, 3, 3, 6, 2]
    advances.clear()
    _run(_loop(compiled, 20, steps_per_execution=4), quadratic, [every(6)])
    assert advances == [4, 2, 4, 2, 4, 2, 2]


def test_epoch_hooks_let_chunks_be_as_long_as_an_epoch(compiled, advances, quadratic):
    seen = []
    on_epoch_end = lambda epoch, logs: seen.append((epoch, logs["loss"], float(quadratic.x)))  # noqa: E731
    callback = keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)
    _run(_loop(compiled, 12), quadratic, [callback], steps_per_epoch=5)
    assert advances == [5, 5, 2]
    assert seen == [(0, _loss(5), _iterate(5)), (1, _loss(10), _iterate(10)), (2, _loss(12), _iterate(12))]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 256])
def test_a_replayable_callback_gets_its_steps_in_order_with_their_own_logs(length, every, driver, quadratic):
    seen = []
    callback = tk.callbacks.FunctionCallback(
        lambda step, logs: seen.append((step, logs["loss"], logs["x"])), every=every, replayable=True
    )
    loop = _loop(driver, 20, steps_per_execution=length, measures={"x": lambda: quadratic.x})
    _run(loop, quadratic, [callback])
    assert seen == [(step, _loss(step), _iterate(step)) for step in range(every, 21, every)]


def _loggers(path):
    return {
        "a replayable function": tk.callbacks.FunctionCallback(lambda step, logs: None, replayable=True),
        "a table": tk.callbacks.IterationTable(file=io.StringIO()),
        "History": keras.callbacks.History(),
        "CSVLogger": keras.callbacks.CSVLogger(path / "log.csv"),
    }


def test_loggers_make_no_chunk_shorter(compiled, advances, quadratic, tmp_path):
    _run(_loop(compiled, 300), quadratic, list(_loggers(tmp_path).values()))
    assert advances == [300]


def test_a_subclass_of_a_logger_of_keras_is_live_as_it_may_read_anything(compiled, quadratic):
    seen = []

    class Watching(keras.callbacks.History):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(float(quadratic.x))

    _run(_loop(compiled, 4), quadratic, [Watching()])
    assert seen == [_iterate(step) for step in (1, 2, 3, 4)]


def test_replayable_and_live_callbacks_together_keep_each_its_promise(driver, quadratic):
    live, replayed = [], []
    callbacks = [
        tk.callbacks.FunctionCallback(lambda step, logs: replayed.append((step, logs["loss"])), replayable=True),
        tk.callbacks.FunctionCallback(lambda step, logs: live.append((step, float(quadratic.x))), every=4),
    ]
    _run(_loop(driver, 10), quadratic, callbacks)
    assert live == [(4, _iterate(4)), (8, _iterate(8))]
    assert replayed == [(step, _loss(step)) for step in range(1, 11)]


class _Nothing(tk.Callback):
    """Overrides no hook that is called at a step."""

    def on_train_begin(self, logs=None):
        self.begun = True

    def helper(self):
        pass


@pytest.mark.parametrize("callback", [tk.Callback, keras.callbacks.Callback, _Nothing])
def test_a_hook_that_nobody_overrides_costs_no_edge_and_no_op(callback, compiled, advances):
    ops = []
    for callbacks in ([], [callback()]):
        quadratic = Quadratic()
        loop = _loop(compiled, 300)
        _run(loop, quadratic, callbacks)
        (program,) = loop._programs.values()
        ops.append(sorted(op.type for op in program.steps[0].graph.get_operations()))
    assert ops[0] == ops[1]
    assert advances == [300, 300]


def test_a_hook_that_somebody_overrides_is_what_costs(compiled, advances, quadratic):
    class Doubling(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [2.0 * gradient for gradient in gradients]

    _run(_loop(compiled, 30), quadratic, [Doubling(), lambda step, logs: None])
    assert advances == [1] * 30


class _Callable:
    def __init__(self, seen):
        self.seen = seen

    def __call__(self, step, logs):
        self.seen.append(step)

    def method(self, step, logs, more=None):
        self.seen.append(step)


@pytest.mark.parametrize(
    "make",
    [
        lambda seen: lambda step, logs: seen.append(step),
        lambda seen: lambda *arguments: seen.append(arguments[0]),
        _Callable,
        lambda seen: _Callable(seen).method,
        lambda seen: functools.partial(lambda seen, step, logs: seen.append(step), seen),
    ],
    ids=["lambda", "any number of arguments", "object", "method", "partial"],
)
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: [c], lambda c: (c,)], ids=["alone", "list", "tuple"])
def test_what_can_be_called_with_step_and_logs_is_a_callback(wrap, make, quadratic):
    seen = []
    _run(_loop(DRIVERS["eager"], 3), quadratic, wrap(make(seen)))
    _run(_loop(DRIVERS["eager"], 3, callbacks=wrap(make(seen))), quadratic)
    assert seen == [1, 2, 3, 1, 2, 3]


def test_a_keras_callback_may_have_on_step_and_on_gradient_too(driver, quadratic):
    seen = []

    class Both(keras.callbacks.Callback):
        def on_step(self, step, logs):
            seen.append((step, float(quadratic.x)))

        def on_gradient(self, gradients, variables):
            return [2.0 * gradient for gradient in gradients]

    _run(_loop(driver, 3), quadratic, [Both()])
    assert seen == [(1, 4.0), (2, 4.0), (3, 4.0)]


def test_old_names_of_batch_hooks_work_as_in_keras(driver, quadratic):
    seen = []

    class Old(keras.callbacks.Callback):
        def on_batch_begin(self, batch, logs=None):
            seen.append(("begin", batch))

        def on_batch_end(self, batch, logs=None):
            seen.append(("end", batch))

    _run(_loop(driver, 3), quadratic, [Old()], steps_per_epoch=2)
    assert seen == [("begin", 0), ("end", 0), ("begin", 1), ("end", 1), ("begin", 0), ("end", 0)]


# Hooks that act: variables, learning rate, stopping.


@pytest.mark.parametrize("length", [1, 7, 256])
def test_what_a_hook_does_to_a_variable_is_where_the_next_step_starts(length, driver, quadratic):
    def restart(step, logs):
        quadratic.x.assign(0.0)

    callback = tk.callbacks.FunctionCallback(restart, every=3)
    result = _run(_loop(driver, 7, steps_per_execution=length), quadratic, [callback])
    assert result.history["loss"].tolist() == [16.0, 4.0, 1.0] * 2 + [16.0]
    assert float(quadratic.x) == 2.0


def _sgd(driver, *callbacks, **settings):
    x = tf.Variable(1.5, dtype=tf.float64)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.01), **DRIVERS[driver], **settings)
    return loop, loop.minimize(lambda: (x - 4.0) ** 2 + tf.sin(3.0 * x), [x], callbacks=list(callbacks))


@functools.lru_cache
def _limited_to_137(driver):
    return _sgd(driver, max_iterations=137)[1]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("every", "length"), [(1, "auto"), (137, 1), (137, 7), (137, 256), (137, "auto")])
def test_a_callback_that_stops_at_step_137_leaves_the_variables_of_step_137(every, length, driver):
    class Stop(tk.Callback):
        def on_step(self, step, logs):
            if step == 137:
                self.loop.stop("that will do")

    stop = Stop()
    stop.every = every
    loop, stopped = _sgd(driver, stop, max_iterations=300, steps_per_execution=length)
    limited = _limited_to_137(driver)
    assert stopped.variables[0] == limited.variables[0]
    np.testing.assert_array_equal(stopped.history["loss"], limited.history["loss"])
    assert (stopped.steps, stopped.reason) == (137, tk.StopReason.STOPPED)
    assert stopped.message == "stopped at step 137: that will do"
    assert loop.result is stopped


def test_a_stop_is_forgotten_when_the_next_run_begins(driver, quadratic):
    loop = _loop(driver, 10)
    stop = tk.callbacks.FunctionCallback(lambda step, logs: loop.stop(), every=4)
    assert _run(loop, quadratic, [stop]).message == "stopped at step 4: a hook asked for it"
    assert _run(loop, quadratic).steps == 10


@pytest.mark.parametrize("way", ["loop.stop", "model.stop_training"])
@pytest.mark.parametrize(
    ("hook", "call", "most"),
    [("on_train_begin", 1, 1), ("on_epoch_begin", 2, 6), ("on_train_batch_begin", 4, 4), ("on_epoch_end", 2, 10)],
)
def test_a_stop_asked_for_in_any_hook_takes_effect_at_the_same_step_whatever_the_chunks(
    hook, call, most, way, compiled, monkeypatch
):
    monkeypatch.setattr(_drivers.Pace, "limit", lambda self: 1 << 30)
    steps = set()
    for length in (1, 256):
        calls = []

        def act(self, *arguments, calls=calls):
            calls.append(arguments)
            if len(calls) == call and way == "loop.stop":
                self.loop.stop()
            elif len(calls) == call:
                self.model.stop_training = True

        stop = type("Stop", (tk.Callback,), {hook: act})()
        result = _run(_loop(compiled, 50, steps_per_execution=length), Quadratic(), [stop], steps_per_epoch=5)
        assert result.reason is tk.StopReason.STOPPED
        steps.add(result.steps)
    assert len(steps) == 1
    assert steps.pop() <= most


@pytest.mark.parametrize("length", [1, 256])
def test_model_stop_training_ends_the_run_at_that_step(length, driver, quadratic):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if logs["loss"] == _loss(7):
                self.model.stop_training = True

    result = _run(_loop(driver, 50, steps_per_execution=length), quadratic, [Stop()])
    assert (result.steps, result.reason) == (7, tk.StopReason.STOPPED)
    assert result.message == "stopped at step 7: a callback set model.stop_training"
    assert float(quadratic.x) == _iterate(7)


def test_a_criterion_that_fires_at_the_step_of_a_stop_gives_the_reason(driver, quadratic):
    loop = _loop(driver, 5)
    result = _run(loop, quadratic, [lambda step, logs: loop.stop() if step == 5 else None])
    assert (result.steps, result.reason) == (5, tk.StopReason.LIMIT)


# The loop and the model that a callback finds.


def test_callbacks_find_the_loop_and_a_model_that_shares_the_storage_of_the_variables(driver):
    scalar = tf.Variable(1.0, name="scalar")
    vector = keras.Variable([1.0, 2.0], name="vector")
    wide = tf.Variable([[3.0]], dtype=tf.float64, name="wide")
    found = []

    class Look(tk.Callback):
        def on_train_begin(self, logs=None):
            found.append((self.loop, self.model, dict(self.params)))

        def on_step(self, step, logs):
            weights = [np.asarray(weight) for weight in self.model.get_weights()]
            for weight, variable in zip(weights, (scalar, vector.value, wide), strict=True):
                np.testing.assert_array_equal(weight, variable.numpy())

    def loss():
        return tf.cast(scalar**2 + tf.reduce_sum(vector.value**2), tf.float64) + tf.reduce_sum(wide**2)

    optimizer = keras.optimizers.SGD(0.25)
    loop = tk.OptimizationLoop(optimizer, max_iterations=2, **driver)
    loop.minimize(loss, [scalar, vector, wide], callbacks=[Look()], steps_per_epoch=2)
    ((seen_loop, model, params),) = found
    assert seen_loop is loop
    assert isinstance(model, keras.Model)
    assert model.optimizer is optimizer
    assert params == {"epochs": 1, "steps": 2, "verbose": 1}
    assert [weight.dtype for weight in model.trainable_variables] == ["float32", "float32", "float64"]
    model.set_weights([np.float32(7.0), np.float32([8.0, 9.0]), np.float64([[10.0]])])
    assert (float(scalar), vector.value.numpy().tolist(), wide.numpy().tolist()) == (7.0, [8.0, 9.0], [[10.0]])
    assert optimizer.learning_rate == 0.25


@pytest.mark.parametrize("whole", [False, True], ids=["weights", "model"])
def test_the_model_can_be_saved_and_loaded(whole, driver, quadratic, tmp_path):
    path = tmp_path / ("step_3.keras" if whole else "step_3.weights.h5")
    models = []

    class Save(tk.Callback):
        def on_step(self, step, logs):
            models.append(self.model)
            if step == 3:
                (self.model.save if whole else self.model.save_weights)(path)

    _run(_loop(driver, 5), quadratic, [Save()])
    assert float(quadratic.x) == _iterate(5)
    if whole:
        (weight,) = keras.models.load_model(path).weights
        assert (weight.name, weight.dtype, float(weight)) == ("x", "float32", _iterate(3))
    else:
        models[0].load_weights(path)
        assert float(quadratic.x) == _iterate(3)


# Keras's callbacks in minimize.


@pytest.mark.parametrize("steps_per_epoch", [1, 3])
def test_history_and_csv_logger_record_the_last_step_of_every_epoch(steps_per_epoch, driver, quadratic, tmp_path):
    history, log = keras.callbacks.History(), keras.callbacks.CSVLogger(tmp_path / "log.csv")
    loop = _loop(driver, 7, measures={"x": lambda: quadratic.x, "pair": lambda: tf.stack([quadratic.x] * 2)})
    _run(loop, quadratic, [history, log], steps_per_epoch=steps_per_epoch)
    last = [*range(steps_per_epoch, 7, steps_per_epoch), 7]
    assert history.epoch == list(range(len(last)))
    assert history.history == {
        "loss": [_loss(step) for step in last],
        "x": [_iterate(step) for step in last],
    }
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["epoch"]), float(row["loss"]), float(row["x"])) for row in rows] == [
        (epoch, _loss(step), _iterate(step)) for epoch, step in enumerate(last)
    ]


def test_history_begins_anew_in_every_run(driver, quadratic):
    loop = _loop(driver, 3, callbacks=[history := keras.callbacks.History()])
    for start in (0.0, 2.0):
        quadratic.x.assign(start)
        _run(loop, quadratic)
        assert history.epoch == [0, 1, 2]
        assert history.history["loss"][-1] == (4.0 - start) ** 2 / 16.0


def test_lambda_callback_calls_only_what_it_was_given(driver, advances, quadratic):
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: seen.append("begin"), on_train_end=lambda logs: seen.append(logs)
    )
    _run(_loop(driver, 9), quadratic, [callback])
    assert seen == ["begin", {"loss": _loss(9)}]
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((batch, logs)))
    quadratic.x.assign(0.0)
    _run(_loop(driver, 2), quadratic, [callback])
    assert seen[2:] == [(0, {"loss": _loss(1)}), (0, {"loss": _loss(2)})]


def test_terminate_on_nan_agrees_with_the_loop_about_the_step(driver, capsys):
    x = tf.Variable(1.0, dtype=tf.float64)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.6), max_iterations=50, **driver)
    result = loop.minimize(lambda: tf.math.log(x), [x], callbacks=[keras.callbacks.TerminateOnNaN()])
    assert (result.steps, result.reason) == (3, tk.StopReason.NOT_FINITE)
    assert "Invalid loss" in capsys.readouterr().out


def test_early_stopping_waits_its_patience_and_restores_the_best_weights(driver):
    x = tf.Variable(0.0)
    weights = []
    # gradient steps of 1.25 overshoot: the distance to 4 grows by 1.5 at every step, so the first epoch is the best
    stop = keras.callbacks.EarlyStopping("loss", patience=3, restore_best_weights=True)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(1.25), max_iterations=50, **driver)
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[lambda step, logs: weights.append(float(x)), stop])
    assert (result.steps, result.reason) == (4, tk.StopReason.STOPPED)
    assert weights == [10.0, -5.0, 17.5, -16.25]
    assert float(x) == weights[0]
    np.testing.assert_array_equal(result.variables[0], weights[0])
    assert result.loss == 36.0


def test_learning_rate_scheduler_sets_the_rate_of_the_very_epoch(driver):
    x = tf.Variable(0.0, dtype=tf.float64)
    optimizer = keras.optimizers.SGD(0.25)
    rates = [0.25, 0.125, 0.5, 0.0625]
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rates[epoch])
    history = keras.callbacks.History()
    loop = tk.OptimizationLoop(optimizer, max_iterations=4, measures={"x": lambda: x}, **driver)
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[schedule, history])
    expected = np.cumprod([1.0 - 2.0 * rate for rate in rates])
    np.testing.assert_array_equal(result.history["x"], 4.0 - 4.0 * expected)
    assert history.history["learning_rate"] == rates  # added to the logs by one callback, seen by the next


def test_reduce_lr_on_plateau_reduces_the_rate_that_the_next_step_uses(driver):
    x = tf.Variable(0.0, dtype=tf.float64)
    optimizer = keras.optimizers.SGD(1.0)  # jumps to and fro between 0 and 8
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=2)
    loop = tk.OptimizationLoop(optimizer, max_iterations=5, measures={"x": lambda: x}, **driver)
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[plateau])
    assert result.history["x"].tolist() == [8.0, 0.0, 8.0, 4.0, 4.0]
    assert float(optimizer.learning_rate) == 0.5


def test_model_checkpoint_keeps_the_best_epoch(driver, tmp_path):
    x = tf.Variable(0.0)
    path = tmp_path / "best.weights.h5"
    keep = keras.callbacks.ModelCheckpoint(path, monitor="loss", save_best_only=True, save_weights_only=True)
    models = []

    class Model(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            models.append(self.model)

    loop = tk.OptimizationLoop(keras.optimizers.SGD(1.25), max_iterations=4, **driver)
    loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[keep, Model()])
    models[0].load_weights(path)
    assert float(x) == 10.0


def test_callbacks_of_keras_work_with_an_optimizer_that_is_not_of_keras(driver, quadratic):
    class Own:
        def apply_gradients(self, pairs):
            for gradient, variable in pairs:
                variable.assign_sub(0.25 * gradient)

    history = keras.callbacks.History()
    loop = tk.OptimizationLoop(Own(), max_iterations=3, **driver)
    _run(loop, quadratic, [history])
    assert history.history["loss"] == [16.0, 4.0, 1.0]


@pytest.mark.parametrize("name", ["terminate_on_nan", "history", "csv_logger", "History", "TerminateOnNaN"])
def test_callbacks_of_keras_are_known_by_their_names(name, tmp_path):
    config = {"filename": str(tmp_path / "log.csv")} if name == "csv_logger" else {}
    callback = tk.callbacks.get({"class_name": name, "config": config})
    assert type(callback).__name__.lower() == name.replace("_", "").lower()


# Hooks of a subclassed loop.


class _Clipped(tk.OptimizationLoop):
    every = 2

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_gradient(self, gradients, variables):
        return [tf.clip_by_value(gradient, -2.0, 2.0) for gradient in gradients]

    def on_step(self, step, logs):
        self.seen.append((step, logs["loss"]))
        if logs["loss"] <= 6.25:
            self.stop("close enough")


@pytest.mark.parametrize("length", [1, 256])
def test_a_subclassed_loop_has_the_hooks_of_a_callback(length, driver, quadratic):
    loop = _loop(driver, 100, _Clipped, steps_per_execution=length)
    result = _run(loop, quadratic)
    # the clipped gradient of -2 moves x by 0.5 a step: 0, 0.5, 1, 1.5, ...
    assert loop.seen == [(2, 12.25), (4, 6.25)]
    assert result.message == "stopped at step 4: close enough"
    assert float(quadratic.x) == 2.0


def test_gradient_hooks_pass_the_gradient_on_from_the_loop_to_the_last_callback(driver, quadratic):
    class Loop(tk.OptimizationLoop):
        def on_gradient(self, gradients, variables):
            return [gradients[0] + 4.0]  # -8 + 4 = -4

    class Times(tk.Callback):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def on_gradient(self, gradients, variables):
            assert variables[0] is quadratic.x
            return [self.factor * gradients[0]]

    class Silent(tk.Callback):
        def on_gradient(self, gradients, variables):
            return None

    loop = _loop(driver, 1, Loop, callbacks=[Times(2.0), Silent()], measures={"g": lambda gradients: gradients[0]})
    result = _run(loop, quadratic, [Times(0.5)])
    assert float(quadratic.x) == 1.0
    assert result.history["g"].tolist() == [-8.0]


# The run as a generator.


def test_steps_gives_the_numbers_of_minimize_and_live_variables(driver):
    def variables_and_loop():
        x = tf.Variable(1.5, dtype=tf.float64)
        loop = tk.OptimizationLoop(keras.optimizers.Adam(0.1), max_iterations=20, **driver)
        return x, loop, lambda: ((x - 4.0) ** 2 + tf.sin(x), {"x before": x})

    x, loop, loss = variables_and_loop()
    minimized = loop.minimize(loss, [x], callbacks=[lambda step, logs: live.append(float(x))] if (live := []) else [])
    x, loop, loss = variables_and_loop()
    seen = [(step, logs, float(x)) for step, logs in loop.steps(loss, [x])]
    assert [step for step, _, _ in seen] == list(range(1, 21))
    for name, values in minimized.history.items():
        assert [logs[name] for _, logs, _ in seen] == values.tolist()
        np.testing.assert_array_equal(loop.result.history[name], values)
    assert [after for _, _, after in seen][:-1] == minimized.history["x before"].tolist()[1:]
    assert loop.result.variables[0] == minimized.variables[0] == seen[-1][2]
    assert (loop.result.steps, loop.result.message) == (20, minimized.message)
    assert loop.result.loss == minimized.loss


def test_what_the_caller_changes_at_the_last_step_is_in_the_result(driver, quadratic):
    loop = _loop(driver, 3)
    for step, _ in loop.steps(quadratic, [quadratic.x]):
        if step == 3:
            quadratic.x.assign(10.0)
    assert (loop.result.loss, loop.result.variables[0]) == (36.0, 10.0)


def test_steps_calls_the_hooks_of_minimize(driver, quadratic):
    events = {"minimize": [], "steps": []}
    for way, seen in events.items():
        quadratic.x.assign(0.0)
        loop = _loop(driver, 7, _recording(tk.OptimizationLoop, seen, "loop"))
        run = getattr(loop, way)
        for _ in (
            run(quadratic, [quadratic.x], [_recording(tk.Callback, seen)()], 3)
            if way == "steps"
            else [run(quadratic, [quadratic.x], [_recording(tk.Callback, seen)()], 3)]
        ):
            pass
    assert events["steps"] == events["minimize"]


def test_break_ends_a_run_cleanly(driver, quadratic):
    ends = []
    end = keras.callbacks.LambdaCallback(on_train_end=ends.append)
    loop = _loop(driver)
    for step, _ in loop.steps(quadratic, [quadratic.x], [end]):
        assert loop.result is None
        if step == 5:
            break
    assert (loop.result.steps, loop.result.reason) == (5, tk.StopReason.STOPPED)
    assert loop.result.message == "stopped at step 5: the caller left the loop"
    assert loop.result.history["loss"].tolist() == [_loss(step) for step in range(1, 6)]
    assert loop.result.loss == (_iterate(5) - 4.0) ** 2
    assert ends == [{"loss": _loss(5)}]
    assert _run(loop, quadratic).steps == 10


def test_an_exception_in_the_body_of_the_caller_ends_the_run_and_arrives(driver, quadratic):
    loop = _loop(driver)

    def body():
        for step, logs in loop.steps(quadratic, [quadratic.x]):
            if step == 3:
                logs["no such name"]

    with pytest.raises(KeyError, match="no such name"):
        body()
    assert (loop.result.steps, loop.result.reason) == (3, tk.StopReason.STOPPED)
    assert float(quadratic.x) == _iterate(3)
    assert _run(loop, quadratic).steps == 10


def test_an_exception_thrown_into_the_generator_ends_the_run_with_an_error(driver, quadratic):
    loop = _loop(driver)
    run = loop.steps(quadratic, [quadratic.x])
    next(run)
    with pytest.raises(ZeroDivisionError, match="mine"):
        run.throw(ZeroDivisionError("mine"))
    assert (loop.result.steps, loop.result.reason) == (1, tk.StopReason.ERROR)
    assert loop.result.message == "ZeroDivisionError after step 1: mine"


def test_a_generator_that_is_dropped_or_never_begun_leaves_the_loop_free(driver, quadratic):
    loop = _loop(driver)
    run = loop.steps(quadratic, [quadratic.x])
    assert loop.result is None
    del run
    run = loop.steps(quadratic, [quadratic.x])
    next(run)
    next(run)
    del run
    assert (loop.result.steps, loop.result.reason) == (2, tk.StopReason.STOPPED)
    assert float(quadratic.x) == _iterate(2)
    assert _run(loop, quadratic).steps == 10


def test_stop_from_the_body_ends_the_run_at_that_step(driver, quadratic):
    loop = _loop(driver)
    steps = []
    for step, _ in loop.steps(quadratic, [quadratic.x]):
        steps.append(step)
        if step == 4:
            loop.stop("seen enough")
    assert steps == [1, 2, 3, 4]
    assert loop.result.message == "stopped at step 4: seen enough"


def test_steps_needs_nothing_that_ends_the_run(driver, quadratic):
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), **driver)
    for _, logs in loop.steps(quadratic, [quadratic.x]):
        if logs["loss"] < 1e-3:
            break
    assert loop.result.steps == 8


# The table.


def test_the_table_of_scalars(driver):
    quadratic, file = Quadratic(), io.StringIO()
    measures = {
        "x": lambda: quadratic.x,
        "below": lambda: quadratic.x < 3.2,
        "count": lambda: tf.cast(quadratic.x * 1e6, tf.int64),
        "the distance to 4": lambda: 4.0 - quadratic.x,
    }
    table = tk.callbacks.IterationTable(file=file)
    _run(_loop(driver, 3, measures=measures), quadratic, [table])
    assert file.getvalue() == (
        "  step          loss             x         below         count  the distance to 4\n"
        "     1            16             2          True       2000000                  2\n"
        "     2             4             3          True       3000000                  1\n"
        "     3             1           3.5         False       3500000                0.5\n"
    )


def test_the_table_of_vectors(driver):
    quadratic, file = Quadratic(), io.StringIO()
    measures = {
        "pair": lambda: tf.stack([quadratic.x, -1e-7 * quadratic.x]),
        "long": lambda: quadratic.x * tf.range(10.0),
        "square": lambda: tf.reshape(tf.stack([quadratic.x] * 4), [2, 2]),
    }
    table = tk.callbacks.IterationTable(["long", "loss"], file=file)
    _run(_loop(driver, 2, measures=measures), quadratic, [table])
    assert file.getvalue() == (
        "  step                                                       long          loss\n"
        "     1  [           0            2 ...           16           18]            16\n"
        "     2  [           0            3 ...           24           27]             4\n"
    )
    file.seek(0)
    file.truncate()
    quadratic.x.assign(0.0)
    table = tk.callbacks.IterationTable(["pair", "square"], file=file)
    _run(_loop(driver, 2, measures=measures), quadratic, [table])
    assert file.getvalue() == (
        "  step                         pair                                                     square\n"
        "     1  [           2       -2e-07]  [[           2            2] [           2            2]]\n"
        "     2  [           3       -3e-07]  [[           3            3] [           3            3]]\n"
    )


def test_the_table_prints_the_chosen_columns_at_multiples_of_every_to_standard_output(driver, quadratic, capsys):
    measures = {"x": lambda: quadratic.x}
    table = tk.callbacks.IterationTable(columns=("x",), every=2)
    loop = _loop(driver, 5, measures=measures)
    _run(loop, quadratic, [table])
    expected = "  step             x\n     2             3\n     4          3.75\n"
    assert capsys.readouterr().out == expected
    quadratic.x.assign(0.0)
    _run(loop, quadratic, [table])
    assert capsys.readouterr().out == expected


def test_the_table_without_columns_counts_the_steps(quadratic, capsys):
    _run(_loop(DRIVERS["eager"], 2), quadratic, [tk.callbacks.IterationTable(columns=[])])
    assert capsys.readouterr().out == "  step\n     1\n     2\n"


def test_a_column_that_nobody_records_is_refused_with_those_that_are(driver, quadratic):
    loop = _loop(driver, 5, measures={"x": lambda: quadratic.x})
    with pytest.raises(ValueError, match="`columns`") as caught:
        _run(loop, quadratic, [tk.callbacks.IterationTable(["loss", "y", "z"])])
    assert str(caught.value) == "`columns` must be among loss, x, received y, z."
    assert loop.result.reason is tk.StopReason.ERROR


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"columns": "loss"}, TypeError, "`columns` must be a list of names of logs, received 'loss'; write ['loss']."),
        ({"every": 0}, ValueError, "`every` must be an integer of at least 1, received 0."),
        ({"every": 2.5}, TypeError, "`every` must be an integer of at least 1, received the float 2.5."),
    ],
)
def test_a_table_refuses_bad_arguments(settings, error, message):
    with pytest.raises(error) as caught:
        tk.callbacks.IterationTable(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "`function` must be callable as f(step, logs), received the int 3."),
        (lambda step: None, "`function` must be callable as f(step, logs), received the function <lambda>."),
    ],
)
def test_a_function_callback_refuses_what_cannot_be_called(function, message):
    with pytest.raises(TypeError) as caught:
        tk.callbacks.FunctionCallback(function)
    assert str(caught.value) == message
