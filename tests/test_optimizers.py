"""Every optimizer gives the same numbers under both strategies, every driver and in a loop written by hand."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tapekit as tk

DRIVERS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": "auto"}}
STEPS = 5
KO, TO = keras.optimizers, tf_keras.optimizers


def _classes(module, base):
    """The optimizers of a module: every class that extends `base`, which leaves out `base` itself and helpers."""
    members = vars(module).items()
    return {name: c for name, c in members if inspect.isclass(c) and issubclass(c, base) and c is not base}


ARGUMENTS = {
    "LossScaleOptimizer": lambda: {"inner_optimizer": KO.Adam(0.1), "initial_scale": 8.0, "dynamic_growth_steps": 2},
    "MultiOptimizer": lambda: {"optimizer_map": KO.OptimizerMap(KO.SGD(0.1), {"matrix": KO.Adam(0.1)})},
    "Muon": lambda: {"rms_rate": None},  # whose default multiplies by a float32 tensor: no float64 matrix passes
}
KERAS = {
    name: lambda name=name, c=c: c(**ARGUMENTS.get(name, dict)())
    for name, c in sorted(_classes(KO, KO.Optimizer).items())
}
OPTIONS = {
    "clipnorm": lambda: KO.SGD(0.1, clipnorm=0.5),
    "clipvalue": lambda: KO.SGD(0.1, clipvalue=0.5),
    "global_clipnorm": lambda: KO.Adam(0.1, global_clipnorm=0.5),
    "weight_decay": lambda: KO.SGD(0.1, weight_decay=0.1),
    "use_ema": lambda: KO.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "gradient_accumulation_steps": lambda: KO.Adam(0.1, gradient_accumulation_steps=2),
    "schedule": lambda: KO.SGD(KO.schedules.ExponentialDecay(0.1, 2, 0.7)),
    "learning rate by a function": lambda: KO.SGD(lambda: 0.1, momentum=0.9),
    "loss_scale_factor": lambda: KO.SGD(0.1, loss_scale_factor=1024.0),
}
COMBINED = {
    "accumulation and averages": lambda: KO.SGD(
        0.1,
        momentum=0.9,
        clipnorm=0.5,
        weight_decay=0.1,
        gradient_accumulation_steps=2,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=2,
        loss_scale_factor=1024.0,
    ),
    "schedule": lambda: KO.Adam(KO.schedules.ExponentialDecay(0.1, 2, 0.7), global_clipnorm=0.5),
    "clipvalue": lambda: KO.SGD(lambda: 0.1, clipvalue=0.5),
}
TF_KERAS = dict(sorted(_classes(TO, TO.Optimizer).items()))
TF_KERAS |= {f"legacy.{name}": getattr(TO.legacy, name) for name in ("SGD", "RMSprop")}
OTHERS = {
    "Adam": TO.Adam,
    "legacy.Adam": TO.legacy.Adam,
    "LossScaleOptimizer": lambda: tf_keras.mixed_precision.LossScaleOptimizer(TO.Adam(0.1)),
    "LossScaleOptimizer of no power of 2": lambda: tf_keras.mixed_precision.LossScaleOptimizer(
        TO.Adam(0.1), dynamic=False, initial_scale=1000.0
    ),
    "legacy.LossScaleOptimizer": lambda: tf_keras.mixed_precision.LossScaleOptimizer(TO.legacy.Adam(0.1)),
    "schedule": lambda: TO.SGD(TO.schedules.ExponentialDecay(0.1, 2, 0.7), clipnorm=0.5),
}
EVERY = {"keras": KERAS, "options": OPTIONS, "combined": COMBINED, "tf_keras": TF_KERAS, "others": OTHERS}


def _tf(value, dtype, name):
    return tf.Variable(value, dtype=dtype, name=name)


def _keras(value, dtype, name):
    return keras.Variable(value, dtype=dtype, name=name)


def _problem(kinds=(_tf, _keras), dtypes=("float64", "float64")):
    matrix = kinds[0](np.linspace(-1.0, 1.0, 6).reshape(2, 3), dtypes[0], "matrix")
    vector = kinds[1](np.linspace(0.5, 2.0, 4), dtypes[1], "vector")

    def loss():
        m, v = tf.cast(matrix, "float64"), tf.cast(vector, "float64")
        return tf.reduce_sum((m - 0.3) ** 2) + tf.reduce_sum(tf.exp(0.3 * v) - v) * tf.reduce_mean(m**2)

    return [matrix, vector], loss


def _slots(optimizer):
    slots = getattr(optimizer, "variables", ())
    return slots() if callable(slots) else slots


def _outcome(variables, optimizer, losses):
    """Everything that a run leaves behind, as arrays by name."""
    outcome = {f"variable {i}": np.array(tf.convert_to_tensor(v)) for i, v in enumerate(variables)}
    outcome |= {f"slot {i}": np.array(tf.convert_to_tensor(v)) for i, v in enumerate(_slots(optimizer))}
    return outcome | {"loss": np.asarray(losses)}


def _run(make, step, driver, problem=_problem, steps=STEPS, **settings):
    variables, loss = problem()
    loop = tk.OptimizationLoop(make(), step=step, max_iterations=steps, **DRIVERS[driver], **settings)
    return _outcome(variables, loop.optimizer, loop.minimize(loss, variables).history["loss"])


@functools.cache
def _run_once(table, name, step, driver):
    return _run(EVERY[table][name], step, driver)


def _by_hand(make, problem, steps=STEPS, wrap=lambda function: function):
    """What people write without tapekit."""
    (variables, loss), optimizer, losses = problem(), make(), []
    targets = [
        getattr(variable, "value", variable) if isinstance(variable, keras.Variable) else variable
        for variable in variables
    ]

    def step():
        with tf.GradientTape() as tape:
            value = loss()
            scaled = value
            for scale in ("scale_loss", "get_scaled_loss"):
                scaled = getattr(optimizer, scale, lambda x: x)(scaled)
        gradients = tape.gradient(scaled, targets)
        gradients = getattr(optimizer, "get_unscaled_gradients", lambda x: x)(gradients)
        optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
        return value

    step = wrap(step)
    for _ in range(steps):
        losses.append(step().numpy())
    return _outcome(variables, optimizer, losses)


def _assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert array.tobytes() == second[name].tobytes(), name


def _assert_close(first, second, rtol=1e-12):
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=rtol, atol=rtol * 1e-3, err_msg=name)


def test_the_tables_hold_the_optimizers_of_their_modules():
    assert {"SGD", "Adam", "LossScaleOptimizer"} < KERAS.keys()
    assert not {"Optimizer", "OptimizerMap"} & KERAS.keys()  # the base, and a dict
    assert {"SGD", "Adam"} < TF_KERAS.keys()
    assert "Optimizer" not in TF_KERAS


def _runs(**drivers):
    """Parametrizes a test over the optimizers of tables and the drivers named for each."""
    cases = [(table, name, driver) for table in drivers for name in EVERY[table] for driver in drivers[table].split()]
    return pytest.mark.parametrize(("table", "name", "driver"), cases)


@_runs(keras="eager graph xla", options="eager", combined="xla", tf_keras="eager", others="eager graph")
def test_strategies_agree_bit_for_bit(table, name, driver):
    _assert_same_bits(_run_once(table, name, "tape", driver), _run_once(table, name, "minimize", driver))


@_runs(keras="graph xla", combined="xla", others="graph")
def test_compiled_drivers_agree_with_the_eager_one_to_rounding(table, name, driver):
    """Keras keeps hyperparameters in float32, but casts them first, so that all is float64 from there on."""
    # A schedule is computed in float32, which XLA rounds otherwise.
    rtol = 1e-6 if name == "schedule" else 1e-12
    _assert_close(_run_once(table, name, "tape", driver), _run_once(table, name, "tape", "eager"), rtol)


@_runs(keras="eager", options="eager", combined="eager", tf_keras="eager", others="eager")
def test_an_eager_run_is_a_loop_written_by_hand_bit_for_bit(table, name, driver):
    kind = _tf if table in ("tf_keras", "others") else _keras  # which the two want; the loop takes both, mixed
    by_hand = _by_hand(EVERY[table][name], lambda: _problem(kinds=(kind, kind)))
    _assert_same_bits(_run_once(table, name, "tape", driver), by_hand)


@pytest.mark.parametrize("name", KERAS)
def test_float32_and_float64_variables_are_minimized_together(name):
    dtypes = "float32", "float64"
    ours = _run(KERAS[name], "tape", "eager", lambda: _problem(dtypes=dtypes))
    _assert_same_bits(ours, _by_hand(KERAS[name], lambda: _problem((_keras, _keras), dtypes)))
    assert [ours["variable 0"].dtype, ours["variable 1"].dtype] == list(dtypes)


class Choosy(KO.SGD):
    """Reads attributes of `keras.Variable` that `tf.Variable` does not have."""

    def build(self, var_list):
        assert all(variable.path and not variable.overwrite_with_gradient for variable in var_list)
        super().build(var_list)


@pytest.mark.parametrize("step", ["tape", "minimize"])
@pytest.mark.parametrize("make", [Choosy, *(KO.Muon for _ in range(hasattr(KO, "Muon")))])
def test_optimizers_that_read_the_path_of_a_variable_take_tf_variables(make, step):
    dtypes = "float32", "float32"
    ours = _run(make, step, "eager", lambda: _problem((_tf, _tf), dtypes))
    _assert_same_bits(ours, _by_hand(make, lambda: _problem((_keras, _keras), dtypes)))


def test_a_run_goes_on_from_the_slots_of_the_run_before_and_of_steps_made_by_hand():
    def make():
        return KO.Adam(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)

    (variables, loss), optimizer = _problem((_keras, _keras)), make()
    for _ in range(2):
        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(value, [variable.value for variable in variables])
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    loop = tk.OptimizationLoop(optimizer, max_iterations=2, run_eagerly=True)
    loop.minimize(loss, variables)
    losses = loop.minimize(loss, variables).history["loss"]
    whole = _by_hand(make, _problem, steps=6)
    _assert_same_bits(_outcome(variables, optimizer, losses), {**whole, "loss": whole["loss"][4:]})


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_learning_rate_that_a_callback_sets_holds_from_the_next_step(driver):
    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop(KO.SGD(0.25), max_iterations=4, **DRIVERS[driver])

    def set_rate(step, logs):
        loop.optimizer.learning_rate = 0.5 if step == 2 else 0.0

    loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[set_rate])
    assert x.numpy() == 4.0  # 0 -> 2 at rate 0.25, not moved at rate 0, at the minimum by rate 0.5


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("step", ["tape", "minimize"])
def test_constraints_hold_after_every_step(step, driver):
    class Clip(keras.constraints.Constraint):
        def __call__(self, value):
            return tf.clip_by_value(value, -1.0, 0.5)

    x = tf.Variable(0.0, constraint=lambda value: tf.clip_by_value(value, -1.0, 0.5))
    y = keras.Variable(0.0)
    y.constraint = Clip()
    measures = {"x": lambda: x, "y": lambda: y}
    loop = tk.OptimizationLoop(KO.SGD(0.1), step=step, max_iterations=3, measures=measures, **DRIVERS[driver])
    result = loop.minimize(lambda: (x - 4.0) ** 2 + (y + 4.0) ** 2, [x, y])
    np.testing.assert_array_equal(result.history["x"], np.float32([0.5, 0.5, 0.5]))
    np.testing.assert_array_equal(result.history["y"], np.float32([-0.8, -1.0, -1.0]))


SCALING = {
    "loss_scale_factor": lambda: KO.SGD(0.25, loss_scale_factor=1024.0),
    "LossScaleOptimizer": lambda: KO.LossScaleOptimizer(KO.SGD(0.25), initial_scale=1024.0),
    "tf_keras": lambda: tf_keras.mixed_precision.LossScaleOptimizer(TO.SGD(0.25), initial_scale=1024.0),
}


class _Recorder(tk.Callback):
    """Keeps the gradients that a hook sees, under every driver."""

    def __init__(self):
        super().__init__()
        self.seen = tf.Variable(tf.zeros([10]))
        self.count = tf.Variable(0)

    def on_gradient(self, gradients, variables):
        self.seen.scatter_nd_update([[self.count]], [gradients[0]])
        self.count.assign_add(1)


@pytest.mark.parametrize("driver", ["eager", "xla"])
@pytest.mark.parametrize("step", ["tape", "minimize"])
@pytest.mark.parametrize("name", SCALING)
def test_logs_hooks_and_criteria_see_the_loss_and_gradients_unscaled(name, step, driver):
    x, recorder = tf.Variable(0.0), _Recorder()
    stop = [tk.stopping.GradientNormBelow(1.0), tk.stopping.MaxIterations(9)]
    loop = tk.OptimizationLoop(SCALING[name](), step=step, stopping=stop, callbacks=[recorder], **DRIVERS[driver])
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x])
    assert result.history["loss"].tolist() == [16.0, 4.0, 1.0, 0.25]
    assert result.history["gradient_norm"].tolist() == [8.0, 4.0, 2.0, 1.0]
    assert recorder.seen.numpy()[:5].tolist() == [-8.0, -4.0, -2.0, -1.0, 0.0]
    assert result.converged
    assert (result.steps, x.numpy()) == (4, 3.75)


OVERFLOWING = {
    "keras": lambda: KO.LossScaleOptimizer(KO.SGD(0.25), initial_scale=2.0**127),
    "tf_keras": lambda: tf_keras.mixed_precision.LossScaleOptimizer(TO.SGD(0.25), initial_scale=2.0**127),
}


@pytest.mark.parametrize("driver", ["eager", "xla"])
@pytest.mark.parametrize("step", ["tape", "minimize"])
@pytest.mark.parametrize("name", OVERFLOWING)
@pytest.mark.parametrize("clip", [None, 100.0])
def test_an_overflow_of_the_scaled_gradient_skips_updates_and_does_not_stop_the_run(clip, name, step, driver):
    """The gradient -8 times 2**127, 2**126 and 2**125 is infinite in float32, and no clipping hook may hide that."""

    class Clip(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [tf.clip_by_value(gradient, -clip, clip) for gradient in gradients]

    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop(OVERFLOWING[name](), step=step, max_iterations=5, **DRIVERS[driver])
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[Clip()] if clip else [])
    assert result.history["loss"].tolist() == [16.0, 16.0, 16.0, 16.0, 4.0]
    assert result.reason is tk.StopReason.LIMIT
    assert x.numpy() == 3.0


def test_loss_scaling_saves_gradients_that_underflow_in_float16():
    def gradient_norm(optimizer):
        x = tf.Variable(1.0)
        measure = {"gradient": lambda gradients: gradients[0]}
        loop = tk.OptimizationLoop(optimizer, max_iterations=1, measures=measure, run_eagerly=True)
        small = tf.constant(1e-4, tf.float16)
        result = loop.minimize(lambda: tf.cast(tf.cast(x, tf.float16) * small, tf.float32) * 1e-4, [x])
        return result.history["gradient"].item()

    assert gradient_norm(KO.SGD(0.1)) == 0.0
    np.testing.assert_allclose(gradient_norm(KO.LossScaleOptimizer(KO.SGD(0.1))), 1e-8, rtol=1e-3)


class _Descent:
    """The least that an optimizer can be."""

    rate = 0.25

    def apply_gradients(self, grads_and_vars):
        for gradient, variable in grads_and_vars:
            variable.assign_sub(self.rate * gradient)


class _Momentum(_Descent):
    """Makes its state when it first needs it."""

    state = None

    def apply_gradients(self, grads_and_vars):
        grads_and_vars = list(grads_and_vars)
        if self.state is None:
            with tf.init_scope():
                self.state = [tf.Variable(tf.zeros_like(variable)) for _, variable in grads_and_vars]
        for state, (gradient, variable) in zip(self.state, grads_and_vars, strict=True):
            state.assign(0.5 * state - self.rate * gradient)
            variable.assign_add(state)


class _Minimizing(_Descent):
    def minimize(self, loss, variables):
        with tf.GradientTape() as tape:
            value = loss()
        self.apply_gradients(self.pairs(tape.gradient(value, variables), variables))

    def pairs(self, gradients, variables):
        return zip(gradients, variables, strict=True)


class _MinimizingBySuper(_Minimizing):
    def minimize(self, loss, variables):
        super().minimize(loss, variables)


class _MinimizingByAnother(_Minimizing):
    def minimize(self, loss, variables):
        self.descend(loss, variables)

    def descend(self, loss, variables):
        super().minimize(loss, variables)


class _MinimizingBackwards(_Minimizing):
    def pairs(self, gradients, variables):
        return reversed(list(zip(gradients, variables, strict=True)))


class _MinimizingTwice(_Minimizing):
    def minimize(self, loss, variables):
        super().minimize(loss, variables)
        loss()  # after the update


class _Wrapper:
    """Hands everything on to a Keras optimizer, which it is not."""

    def __init__(self):
        self.inner = KO.LossScaleOptimizer(KO.SGD(0.25), initial_scale=1024.0)

    def __getattr__(self, name):
        return getattr(self.inner, name)


DUCKS = (
    _Descent,
    _Momentum,
    _Minimizing,
    _MinimizingBySuper,
    _MinimizingByAnother,
    _MinimizingBackwards,
    _MinimizingTwice,
    _Wrapper,
)


@pytest.mark.parametrize("driver", ["eager", "xla"])
@pytest.mark.parametrize("duck", DUCKS)
def test_any_object_with_apply_gradients_is_an_optimizer_for_both_strategies(duck, driver):
    def run(step):
        x, y = tf.Variable(0.0), keras.Variable([1.0, 2.0])
        loop = tk.OptimizationLoop(duck(), step=step, max_iterations=4, callbacks=[_Recorder()], **DRIVERS[driver])
        result = loop.minimize(lambda: (x - 4.0) ** 2 + tf.reduce_sum((y - 1.0) ** 2), [x, y])
        return result, loop.callbacks[0].seen.numpy()

    (tape, tape_saw), (minimize, minimize_saw) = run("tape"), run("minimize")
    reference = KO.SGD(0.25, momentum=0.5 if duck is _Momentum else 0.0)
    expected = _by_hand(lambda: reference, lambda: _one_and_two(), steps=4)["loss"]
    np.testing.assert_array_equal(tape.history["loss"], expected)
    np.testing.assert_array_equal(minimize.history["loss"], expected)
    np.testing.assert_array_equal(tape.x, minimize.x)
    np.testing.assert_array_equal(tape_saw, minimize_saw)
    assert tape_saw[0] == -8.0


class _MinimizingWithOptions(_Descent):
    def minimize(self, loss, variables):
        with tf.GradientTape() as tape:
            value = loss()
        self.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True), rate=0.5)

    def apply_gradients(self, grads_and_vars, rate=0.25):
        self.rate = rate
        super().apply_gradients(grads_and_vars)


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_minimize_gives_apply_gradients_beside_the_gradients_arrives(driver):
    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop(_MinimizingWithOptions(), step="minimize", max_iterations=1, **DRIVERS[driver])
    assert loop.minimize(lambda: (x - 4.0) ** 2, [x]).x == 4.0


def _one_and_two():
    x, y = tf.Variable(0.0), tf.Variable([1.0, 2.0])
    return [x, y], lambda: (x - 4.0) ** 2 + tf.reduce_sum((y - 1.0) ** 2)


class _Never(_Descent):
    """Updates in minimize, without apply_gradients."""

    def __init__(self):
        self.variables = [tf.Variable(0.0)]

    def minimize(self, loss, variables):
        loss()
        for variable in variables:
            variable.assign(7.0)
        self.variables[0].assign(7.0)


class _NeverItsOwn(_Never):
    def minimize(self, loss, variables):
        with tf.GradientTape() as tape:
            value = loss()
        super().apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("optimizer", [_Never, _NeverItsOwn])
def test_a_minimize_that_goes_past_apply_gradients_is_refused_and_undone(optimizer, driver):
    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop(optimizer(), step="minimize", max_iterations=2, **DRIVERS[driver])
    with pytest.raises(TypeError, match=r"`optimizer` must call its apply_gradients .* type _Never\w* does not; use"):
        loop.minimize(lambda: (x - 4.0) ** 2, [x])
    assert x.numpy() == 0.0
    assert loop.optimizer.variables[0].numpy() == 0.0
    by_tape = tk.OptimizationLoop(loop.optimizer, step="tape", max_iterations=1, **DRIVERS[driver])
    assert by_tape.minimize(lambda: (x - 4.0) ** 2, [x]).x == 2.0


@pytest.mark.parametrize("driver", ["eager", "xla"])
@pytest.mark.parametrize("step", ["tape", "minimize"])
@pytest.mark.parametrize("make", [KO.Adam, TO.Adam, _MinimizingByAnother])
def test_the_optimizer_is_left_as_a_loop_written_by_hand_leaves_it(make, step, driver):
    optimizer, other = make(), make()
    variables, loss = _one_and_two()
    loop = tk.OptimizationLoop(optimizer, step=step, max_iterations=2, callbacks=[_Recorder()], **DRIVERS[driver])
    loop.minimize(loss, variables)
    _by_hand(lambda: other, _one_and_two, steps=2)
    assert loop.optimizer is optimizer
    assert type(optimizer) is type(other)
    assert vars(optimizer).keys() == vars(other).keys()
    assert not {"apply_gradients", "minimize"} & vars(optimizer).keys()
    assert optimizer.apply_gradients.__func__ is type(optimizer).apply_gradients


@pytest.mark.parametrize("wrap", [lambda o: o, KO.LossScaleOptimizer], ids=["bare", "wrapped"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_an_optimizer_built_on_other_variables_is_refused_before_anything_changes(driver, wrap):
    x, other = tf.Variable(1.0, name="x"), tf.Variable(1.0)
    inner = KO.Adam(0.1)
    inner.build([other])
    loop = tk.OptimizationLoop(wrap(inner), max_iterations=1, **DRIVERS[driver])
    with pytest.raises(ValueError, match=r"`optimizer` must be new or .* of type Adam built on others, without x\."):
        loop.minimize(lambda: x**2, [x])
    assert x.numpy() == 1.0
    assert inner.iterations.numpy() == 0
