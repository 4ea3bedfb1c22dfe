"""`tk.minimize` means what `minimize` meant in Keras 2, for Keras 3 optimizers and all others."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tapekit as tk

KO, TO = keras.optimizers, tf_keras.optimizers
PAIRS = {
    "SGD": (KO.SGD, TO.SGD),
    "Adam": (KO.Adam, TO.Adam),
    "clipnorm": (lambda rate: KO.SGD(rate, clipnorm=0.5), lambda rate: TO.SGD(rate, clipnorm=0.5)),
    "LossScaleOptimizer": (
        lambda rate: KO.LossScaleOptimizer(KO.Adam(rate), initial_scale=8.0, dynamic_growth_steps=2),
        lambda rate: tf_keras.mixed_precision.LossScaleOptimizer(
            TO.Adam(rate), initial_scale=8.0, dynamic_growth_steps=2
        ),
    ),
}


def _problem(kind=tf.Variable):
    x, y = kind(2.0, dtype="float64"), kind([1.0, -3.0], dtype="float64")
    return [x, y], lambda: x**2 + tf.reduce_sum((y - x) ** 4)


def _values(variables):
    return [variable.numpy() for variable in variables]


def _by_function(minimize, loss, variables):
    minimize(loss, variables)


def _by_functions(minimize, loss, variables):
    minimize(loss, lambda: variables)


def _by_tape(minimize, loss, variables):
    with tf.GradientTape() as tape:
        value = loss()
    minimize(value, variables, tape=tape)


def _by_persistent_tape(minimize, loss, variables):
    with tf.GradientTape(persistent=True) as tape:
        value = loss()
    minimize(value, variables, tape=tape)
    assert tape.gradient(value, variables[0]) is not None


def _by_tape_that_records(minimize, loss, variables):
    with tf.GradientTape() as tape:
        minimize(loss(), variables, tape=tape)


def _by_function_and_tape(minimize, loss, variables):
    minimize(loss, variables, tape=tf.GradientTape(watch_accessed_variables=False))


WAYS = [
    _by_function,
    _by_functions,
    _by_tape,
    _by_persistent_tape,
    _by_tape_that_records,
    _by_function_and_tape,
]


# Keras 2 could not scale the loss under a tape that still records.
CASES = [(n, way) for n in PAIRS for way in WAYS if (n, way) != ("LossScaleOptimizer", _by_tape_that_records)]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_way_to_call_it_does_step_by_step_what_keras_2_did(name, way):
    ours, theirs = (make(0.1) for make in PAIRS[name])
    (x, loss), (y, other) = _problem(), _problem()
    for _ in range(4):
        way(lambda *args, **kwargs: tk.minimize(ours, *args, **kwargs), loss, x)
        way(theirs.minimize, other, y)
        for a, b in zip(_values(x), _values(y), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-14)
    assert [int(o.iterations) for o in (getattr(ours, "inner_optimizer", ours), theirs)] == [4, 4]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [tf.Variable, keras.Variable])
def test_an_optimizer_that_has_minimize_is_asked_for_it_with_any_variables(kind, way):
    (x, loss), (y, other) = _problem(kind), _problem()
    ours, theirs = TO.Adam(0.1), TO.Adam(0.1)
    for _ in range(3):
        way(lambda *args, **kwargs: tk.minimize(ours, *args, **kwargs), loss, x)
        theirs.minimize(other, y)
    np.testing.assert_array_equal(np.hstack(_values(x)), np.hstack(_values(y)))


@pytest.mark.parametrize("make", [KO.Adam, lambda: KO.LossScaleOptimizer(KO.Adam()), TO.Adam])
def test_keras_variables_and_tf_variables_take_the_same_steps(make):
    results = []
    for kind in (tf.Variable, keras.Variable):
        (x, loss), optimizer = _problem(kind), make()
        for way in WAYS:
            if not (way is _by_tape_that_records and hasattr(optimizer, "inner_optimizer")):
                way(lambda *args, **kwargs: tk.minimize(optimizer, *args, **kwargs), loss, x)
        results.append(np.hstack(_values(x)))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_tape_that_still_records_is_enough_under_loss_scaling_too(scaled):
    optimizer = KO.LossScaleOptimizer(KO.SGD(0.25)) if scaled else KO.SGD(0.25)
    x = tf.Variable(0.0)
    with tf.GradientTape() as tape:
        tk.minimize(optimizer, (x - 4.0) ** 2, [x], tape)
    assert x.numpy() == 2.0


@pytest.mark.parametrize("optimizer", [KO.SGD, TO.SGD])
@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: [[x]], lambda x: lambda: x]
)
def test_var_list_may_be_one_variable_or_nested_or_a_function(wrap, optimizer):
    x = tf.Variable(0.0)
    tk.minimize(optimizer(0.25), lambda: (x - 4.0) ** 2, wrap(x))
    with tf.GradientTape() as tape:
        loss = (x - 4.0) ** 2
    tk.minimize(optimizer(0.25), loss, wrap(x), tape=tape)
    assert x.numpy() == 3.0


@pytest.mark.parametrize("optimizer", [KO.SGD, TO.SGD])
def test_a_function_of_variables_is_called_after_the_loss_that_makes_them(optimizer):
    variables = []

    def loss():
        if not variables:
            variables.append(tf.Variable(0.0))
        return (variables[0] - 4.0) ** 2

    tk.minimize(optimizer(0.25), loss, lambda: variables)
    assert variables[0].numpy() == 2.0


@pytest.mark.parametrize("optimizer", [KO.SGD, TO.SGD])
def test_only_var_list_is_updated_and_the_loss_is_called_once(optimizer):
    x, other, fixed = tf.Variable(1.0), tf.Variable(1.0), tf.Variable(1.0, trainable=False)
    calls = []

    def loss():
        calls.append(1)
        return x * other * fixed

    tk.minimize(optimizer(0.25), loss, [x, fixed])
    assert _values([x, other, fixed]) == [0.75, 1.0, 0.75]
    assert len(calls) == 1


@pytest.mark.parametrize("optimizer", [KO.SGD, TO.SGD])
def test_a_loss_that_is_no_scalar_is_summed(optimizer):
    x = tf.Variable([1.0, 2.0])
    tk.minimize(optimizer(0.25), lambda: x**2, [x])
    np.testing.assert_array_equal(x.numpy(), [0.5, 1.0])


@pytest.mark.parametrize("kind", [tf.Variable, keras.Variable])
def test_a_loss_may_be_a_variable(kind):
    x = kind(1.0)
    tk.minimize(KO.SGD(0.25), lambda: x, [x])
    assert x.numpy() == 0.75


class _Returning:
    def apply_gradients(self, grads_and_vars):
        return [float(gradient) for gradient, _ in grads_and_vars], [variable for _, variable in grads_and_vars]


def test_it_returns_what_apply_gradients_returns():
    x, y = tf.Variable(3.0), keras.Variable(4.0)
    gradients, variables = tk.minimize(_Returning(), lambda: x**2 + y, [x, y])
    assert gradients == [6.0, 1.0]
    assert variables[0] is x
    assert variables[1] is y.value
    optimizer = KO.SGD(0.1)
    assert [int(tk.minimize(optimizer, lambda: x**2, [x])) for _ in range(3)] == [1, 2, 3]
    legacy = TO.legacy.SGD(0.1)
    assert [int(tk.minimize(legacy, lambda: x**2, [x])) for _ in range(3)] == [1, 2, 3]


def test_it_passes_the_own_minimize_of_an_optimizer_what_it_takes():
    class Own:
        def minimize(self, objective, variables):
            return objective(), variables

    x, y = tf.Variable(3.0), keras.Variable(4.0)
    value, variables = tk.minimize(Own(), lambda: x * 2.0, [x, y])
    assert value.numpy() == 6.0
    assert variables[0] is x
    assert variables[1] is y.value


SCALED = {
    "loss_scale_factor": lambda: KO.Adam(0.1, loss_scale_factor=1024.0),
    "LossScaleOptimizer": lambda: KO.LossScaleOptimizer(KO.Adam(0.1), initial_scale=1024.0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SCALED)
def test_loss_scaling_changes_no_bit_where_nothing_underflows(name, way):
    results = []
    for optimizer in (SCALED[name](), KO.Adam(0.1)):
        x, loss = _problem()
        for _ in range(3):
            way(lambda *args, **kwargs: tk.minimize(optimizer, *args, **kwargs), loss, x)
        results.append(np.hstack(_values(x)))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loss_scaling_saves_gradients_that_underflow_in_float16(dtype):
    def gradient(optimizer):
        x = tf.Variable(1.0)
        small = tf.constant(1e-4, tf.float16)
        loss = lambda: tf.cast(tf.cast(x, tf.float16) * small, dtype) * 1e-4  # noqa: E731
        tk.minimize(optimizer, loss, [x])
        return (1.0 - x.numpy()) / 1e6

    assert gradient(KO.SGD(1e6)) == 0.0
    np.testing.assert_allclose(gradient(KO.LossScaleOptimizer(KO.SGD(1e6))), 1e-8, rtol=1e-2)


def test_an_overflow_is_skipped_and_halves_the_scale():
    optimizer, x = KO.LossScaleOptimizer(KO.SGD(0.25), initial_scale=2.0**127), tf.Variable(0.0)
    for _ in range(4):
        tk.minimize(optimizer, lambda: (x - 4.0) ** 2, [x])
    assert x.numpy() == 2.0  # three skipped, one taken
    assert optimizer.dynamic_scale.numpy() == 2.0**124


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", [tf.Variable, keras.Variable])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("make", [KO.SGD, KO.Adam, lambda rate: KO.LossScaleOptimizer(KO.Adam(rate)), TO.Adam])
def test_it_works_inside_a_tf_function_of_the_users_which_is_traced_once(make, built, kind, jit_compile):
    (x, loss), optimizer, traces = _problem(kind), make(0.1), []
    if built:
        optimizer.build(x if kind is tf.Variable or make is not TO.Adam else [variable.value for variable in x])

    @tf.function(jit_compile=jit_compile)
    def step():
        traces.append(1)
        tk.minimize(optimizer, loss, x)

    for _ in range(3):
        step()
    expected, other = _problem()
    reference = make(0.1)
    for _ in range(3):
        tk.minimize(reference, other, expected)
    np.testing.assert_allclose(np.hstack(_values(x)), np.hstack(_values(expected)), rtol=1e-12)
    assert len(traces) <= (1 if built else 2)  # TensorFlow traces again what has made variables


class Choosy(KO.SGD):
    """Reads an attribute of `keras.Variable` that `tf.Variable` does not have, as Muon does."""

    def build(self, var_list):
        self.paths = [variable.path for variable in var_list]
        super().build(var_list)


def test_optimizers_that_read_the_path_of_a_variable_take_tf_variables():
    optimizer, x = Choosy(0.25), tf.Variable(0.0, name="x")

    def step():
        tk.minimize(optimizer, lambda: (x - 4.0) ** 2, [x])

    tf.function(step)()
    step()
    assert optimizer.paths == ["x"]
    assert x.numpy() == 3.0


@pytest.mark.parametrize(
    ("error", "sentence", "arguments"),
    [
        (
            ValueError,
            "`tape` must be the tape under which the loss a tf.Tensor of .* was computed",
            {"loss": tf.ones([])},
        ),
        (ValueError, "`tape` must be the tape under which the loss None was computed", {"loss": None}),
        (
            TypeError,
            "`loss` must be a tensor, or a function that returns one, received the float 3",
            {"loss": lambda: 3.0},
        ),
        (TypeError, "`loss` must be a tensor, or a function that returns one, received None", {"loss": lambda: None}),
        (TypeError, "`var_list` must hold tf.Variable .*, received an empty list", {"var_list": []}),
        (TypeError, "`var_list` must hold tf.Variable .*, received None", {"var_list": None}),
        (TypeError, "`var_list` must hold tf.Variable .*, received an empty list", {"var_list": list}),
        (TypeError, "`var_list` must hold tf.Variable .*, received the float 1", {"var_list": [1.0]}),
        (TypeError, "`optimizer` must be an object with .*, received 'sgd'", {"optimizer": "sgd"}),
        (TypeError, "`optimizer` must be an object with .*, received the class SGD", {"optimizer": KO.SGD}),
        (TypeError, "`optimizer` must be an object with .*, received the class SGD", {"optimizer": TO.SGD}),
    ],
)
def test_a_wrong_argument_is_refused_in_a_sentence(error, sentence, arguments):
    x = tf.Variable(1.0)
    with pytest.raises(error, match=f"^{sentence}"):
        tk.minimize(**({"optimizer": KO.SGD(0.1), "loss": lambda: x**2, "var_list": [x]} | arguments))
    assert x.numpy() == 1.0


def test_a_loss_that_reaches_no_variable_is_refused_and_one_that_reaches_some_updates_those():
    x, y = tf.Variable(1.0), tf.Variable(1.0)
    with pytest.raises(ValueError, match="No gradients provided for any variable"):  # as Keras 2 and 3 say it
        tk.minimize(KO.SGD(0.25), lambda: tf.constant(1.0), [x, y])
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        tk.minimize(KO.SGD(0.25), lambda: y**2, [x, y])
    assert _values([x, y]) == [1.0, 0.5]


@pytest.mark.parametrize("optimizer", [KO.SGD, TO.SGD])
def test_an_error_in_the_loss_reaches_the_user_unchanged(optimizer):
    x, error = tf.Variable(1.0), ZeroDivisionError("mine")

    def loss():
        raise error

    with pytest.raises(ZeroDivisionError) as caught:
        tk.minimize(optimizer(0.1), loss, [x])
    assert caught.value is error


def test_a_tape_that_is_used_up_is_an_error():
    x = tf.Variable(1.0)
    with tf.GradientTape() as tape:
        loss = x**2
    tk.minimize(KO.SGD(0.1), loss, [x], tape=tape)
    with pytest.raises(RuntimeError, match="non-persistent"):
        tk.minimize(KO.SGD(0.1), loss, [x], tape=tape)
