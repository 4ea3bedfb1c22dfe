"""Named intermediates in the loop, what hooks may return, and what they add to the logs."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tapekit as tk

DRIVERS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}
STRATEGIES = {"tape": tk.TapeStep, "minimize": tk.MinimizeStep}
MATRIX = np.array([[3.0, 1.0], [1.0, 2.0], [-1.0, 0.5]])
START = np.array([2.0, -1.0])
RATE = 0.0625

every_driver = pytest.mark.parametrize("driver", DRIVERS)
eager_and_graph = pytest.mark.parametrize("driver", ["eager", "graph"])
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


class Hook(tk.Callback):
    """A callback whose on_gradient is a function of it, the gradients and the variables."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_gradient(self, gradients, variables):
        return self.function(self, gradients, variables)


class InnerHook(tk.Callback):
    """A callback whose on_gradient asks for the intermediates."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_gradient(self, gradients, variables, intermediates):
        return self.function(gradients, intermediates)


def _variable():
    return tf.Variable(START, name="x")


def _least_squares(x):
    """z = A x, w = z**2 / 2, and the sum of w: the gradients are A'z, z and 1."""

    def loss():
        z = tk.intermediate("z", tf.linalg.matvec(tf.constant(MATRIX), x))
        return tf.reduce_sum(tk.intermediate("w", 0.5 * z**2))

    return loss


def _iterates(steps):
    """The x of gradient descent on the least squares, before each step and after the last."""
    xs = [START]
    for _ in range(steps):
        xs.append(xs[-1] - RATE * MATRIX.T @ MATRIX @ xs[-1])
    return np.array(xs)


def _loop(step=None, optimizer=None, driver="graph", steps=3, **more):
    """A loop of a few steps of gradient descent, with all intermediates unless another step is given."""
    step = tk.TapeStep(intermediates=True) if step is None else step
    optimizer = optimizer or keras.optimizers.SGD(RATE)
    return tk.OptimizationLoop(optimizer, step=step, max_iterations=steps, **DRIVERS[driver], **more)


# tk.intermediate by itself


@pytest.mark.parametrize("value", [tf.constant(1.0), [tf.constant([1, 2])], {"a": 3.0}, None, np.ones(2)], ids=repr)
def test_without_a_tape_intermediate_returns_the_very_value(value):
    assert tk.intermediate("z", value) is value
    assert tk.intermediate("z", value) is value  # a name may come again where nobody collects


@pytest.mark.parametrize("value", [lambda: tf.constant(2.0), lambda: tf.Variable(2.0), lambda: keras.Variable(2.0)])
def test_under_a_step_that_takes_intermediates_it_returns_the_very_value_too(value):
    x, value, returned = _variable(), value(), []

    def loss():
        returned.append(tk.intermediate("z", value))
        return tf.reduce_sum(x**2) * tf.cast(tf.convert_to_tensor(value), tf.float64)

    _loop(driver="eager", steps=1).minimize(loss, x)
    assert len(returned) == 2  # the step and the loss of the result
    assert all(item is value for item in returned)


@every_driver
@pytest.mark.parametrize("step", [tk.TapeStep, tk.MinimizeStep, lambda: tk.TapeStep(intermediates=[])])
def test_a_step_that_is_not_asked_for_intermediates_records_none(step, driver):
    history = _loop(step(), driver=driver).minimize(_least_squares(x := _variable()), x).history
    assert history.keys() == {"loss"}


# What the logs, hooks and measures get


@every_driver
@pytest.mark.parametrize(("asked", "given"), [(True, "zw"), (["z"], "z"), (("w", "z"), "zw")])
def test_norms_of_the_gradients_are_in_the_logs_and_the_history(asked, given, driver):
    logs = []
    loop = _loop(tk.TapeStep(intermediates=asked), driver=driver, callbacks=[lambda step, row: logs.append(row)])
    result = loop.minimize(_least_squares(x := _variable()), x)

    z = _iterates(3)[:-1] @ MATRIX.T
    expected = {"z": np.linalg.norm(z, axis=1), "w": np.full(3, np.sqrt(3.0))}
    assert result.history.keys() == {"loss", *(f"gradient_norm/{name}" for name in given)}
    for name in given:
        column = result.history[f"gradient_norm/{name}"]
        np.testing.assert_allclose(column, expected[name], rtol=1e-12)
        assert [row[f"gradient_norm/{name}"] for row in logs] == column.tolist()
    np.testing.assert_allclose(result.x, _iterates(3)[-1], rtol=1e-12)


@every_driver
def test_measures_get_the_gradients_whole_under_the_names_of_their_arguments(driver):
    measures = {
        "z": lambda intermediates: intermediates["z"],
        "names": lambda intermediates: tf.constant(sorted(intermediates) == ["w", "z"]),
        "both": lambda gradients, intermediates: tf.concat([gradients[0], intermediates["z"]], 0),
        "turned": lambda intermediates, gradients: tf.concat([gradients[0], intermediates["z"]], 0),
        "neither": lambda intermediates=7.0: tf.constant(intermediates),  # it can do without
    }
    history = _loop(driver=driver, measures=measures).minimize(_least_squares(x := _variable()), x).history
    z = _iterates(3)[:-1] @ MATRIX.T
    np.testing.assert_allclose(history["z"], z, rtol=1e-12)
    np.testing.assert_allclose(history["both"], np.hstack([z @ MATRIX, z]), rtol=1e-12)
    np.testing.assert_array_equal(history["turned"], history["both"])
    assert history["names"].all()
    assert history["neither"].tolist() == [7.0] * 3


@every_driver
def test_a_hook_with_the_argument_gets_the_gradients_whole_and_may_use_them(driver):
    half = InnerHook(lambda gradients, inner: [tf.linalg.matvec(0.5 * MATRIX, inner["z"], transpose_a=True)])
    result = _loop(driver=driver, steps=1, callbacks=[half]).minimize(_least_squares(x := _variable()), x)
    np.testing.assert_allclose(result.x, START - 0.5 * RATE * MATRIX.T @ MATRIX @ START, rtol=1e-12)


def test_what_a_hook_does_to_its_dict_nobody_else_sees():
    seen = []
    greedy = InnerHook(lambda gradients, inner: inner.clear())
    later = InnerHook(lambda gradients, inner: seen.append(sorted(inner)))
    loop = _loop(driver="eager", steps=1, callbacks=[greedy, later])
    history = loop.minimize(_least_squares(x := _variable()), x).history
    assert seen == [["w", "z"]]
    assert history["gradient_norm/w"].tolist() == [pytest.approx(np.sqrt(3.0))]


def test_a_loop_of_ones_own_has_the_same_hook():
    class Loop(tk.OptimizationLoop):
        def on_gradient(self, gradients, variables, intermediates):
            self.record("first", intermediates["z"][0])

    loop = Loop("sgd", step=tk.TapeStep(intermediates=["z"]), max_iterations=1)
    history = loop.minimize(_least_squares(x := _variable()), x).history
    assert history["first"].tolist() == [MATRIX[0] @ START]


@eager_and_graph
@pytest.mark.parametrize(("step", "seen"), [(lambda: tk.TapeStep(True), ["w", "z"]), (tk.MinimizeStep, "default")])
def test_a_hook_whose_argument_has_a_default_gets_them_where_there_are_any(step, seen, driver):
    found = []

    class Optional(tk.Callback):
        def on_gradient(self, gradients, variables, intermediates="default"):
            found.append(intermediates if isinstance(intermediates, str) else sorted(intermediates))

    _loop(step(), driver=driver, steps=1, callbacks=[Optional()]).minimize(_least_squares(x := _variable()), x)
    assert found == [seen]


@every_driver
def test_nested_structures_keep_their_structure(driver):
    x = _variable()

    def loss():
        pair = tk.intermediate("pair", {"square": x**2, "more": (3.0 * x, [x[0] * x[1]])})
        return tf.reduce_sum(pair["square"]) + tf.reduce_sum(pair["more"][0] ** 2) + 5.0 * pair["more"][1][0]

    measures = {
        "square": lambda intermediates: intermediates["pair"]["square"],
        "triple": lambda intermediates: intermediates["pair"]["more"][0],
        "product": lambda intermediates: intermediates["pair"]["more"][1][0],
    }
    history = _loop(driver=driver, steps=1, measures=measures).minimize(loss, x).history
    np.testing.assert_array_equal(history["square"], [[1.0, 1.0]])
    np.testing.assert_allclose(history["triple"], [6.0 * START], rtol=1e-12)
    assert history["product"].tolist() == [5.0]
    norm = np.sqrt(2.0 + 36.0 * START @ START + 25.0)
    np.testing.assert_allclose(history["gradient_norm/pair"], [norm], rtol=1e-12)


@every_driver
def test_rows_of_an_embedding_that_are_read_twice_add_up_in_the_norm(driver):
    table, kinds = tf.Variable(np.arange(6.0).reshape(3, 2)), []

    def loss():
        rows = tf.gather(tk.intermediate("rows", 2.0 * table), [0, 2, 2])
        return 0.5 * tf.reduce_sum(rows**2)

    look = InnerHook(lambda gradients, inner: kinds.append(type(inner["rows"]).__name__))
    history = _loop(driver=driver, steps=1, callbacks=[look]).minimize(loss, table).history
    gradient = 2.0 * np.array([[0.0, 1.0], [0.0, 0.0], [2.0 * 4.0, 2.0 * 5.0]])
    assert kinds == ["IndexedSlices"]
    np.testing.assert_allclose(history["gradient_norm/rows"], [np.linalg.norm(gradient)], rtol=1e-12)


@every_driver
def test_dtypes_may_be_mixed_and_each_gradient_has_that_of_its_intermediate(driver):
    x, y = _variable(), tf.Variable(np.float32([1.0, 0.5]), name="y")

    def loss():
        narrow = tk.intermediate("narrow", 2.0 * y)
        half = tk.intermediate("half", tf.cast(narrow, tf.float16))
        wide = tk.intermediate("wide", x + tf.cast(half, tf.float64))
        return tf.reduce_sum(wide**2)

    measures = {name: lambda intermediates, name=name: intermediates[name] for name in ("narrow", "half", "wide")}
    history = _loop(driver=driver, steps=1, measures=measures).minimize(loss, [x, y]).history
    expected = 2.0 * (START + np.array([2.0, 1.0]))
    for name, dtype in {"narrow": np.float32, "half": np.float16, "wide": np.float64}.items():
        assert history[name].dtype == dtype
        np.testing.assert_array_equal(history[name], [expected])
        np.testing.assert_allclose(history[f"gradient_norm/{name}"], [np.linalg.norm(expected)], rtol=1e-12)


@pytest.mark.parametrize("driver", ["eager", "graph", "xla"])
@pytest.mark.parametrize(
    "scaled",
    [
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE), initial_scale=4096.0),
        lambda: tf_keras.mixed_precision.LossScaleOptimizer(
            tf_keras.optimizers.SGD(RATE), dynamic=False, initial_scale=4096.0
        ),
    ],
    ids=["keras", "tf_keras"],
)
def test_gradients_are_unscaled_under_loss_scaling(scaled, driver):
    measures = {"z": lambda intermediates: intermediates["z"]}
    hooked = InnerHook(lambda gradients, inner: None)
    more = {"driver": driver, "measures": measures, "callbacks": [hooked]}
    history = _loop(optimizer=scaled(), **more).minimize(_least_squares(x := _variable()), x).history
    plain = _loop(**more).minimize(_least_squares(y := _variable()), y).history
    for name in ("z", "gradient_norm/z", "gradient_norm/w"):
        np.testing.assert_allclose(history[name], plain[name], rtol=1e-12)
    np.testing.assert_allclose(x.numpy(), y.numpy(), rtol=1e-12)


@every_driver
def test_what_is_no_variable_of_the_run_can_be_an_intermediate(driver):
    x, data = _variable(), tf.constant([3.0, 4.0], tf.float64)
    frozen, other = keras.Variable(data, trainable=False, dtype="float64"), tf.Variable(data)

    def loss():
        return tf.reduce_sum(x * tk.intermediate("data", data) * tk.intermediate("frozen", frozen)) + tf.reduce_sum(
            x * tk.intermediate("other", other)
        )

    history = _loop(driver=driver, steps=1).minimize(loss, x).history
    expected = {"data": START * data, "frozen": START * data, "other": START}
    for name, gradient in expected.items():
        np.testing.assert_allclose(history[f"gradient_norm/{name}"], [np.linalg.norm(gradient)], rtol=1e-12)


@every_driver
def test_a_criterion_can_read_the_norm(driver):
    class InnerNormBelow(tk.stopping.Criterion):
        def __init__(self, tolerance):
            self.tolerance = tolerance

        def init(self):
            return ()

        def update(self, state, logs):
            return state, logs["gradient_norm/z"] <= self.tolerance

    norms = np.linalg.norm(_iterates(30)[:-1] @ MATRIX.T, axis=1)
    loop = _loop(driver=driver, steps=30, stopping=InnerNormBelow(float(norms[10:12].mean())))
    assert loop.minimize(_least_squares(x := _variable()), x).steps == 12


def test_activations_of_a_keras_model_can_be_named():
    hidden, output = keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)
    features, labels = np.random.default_rng(0).normal(size=(2, 8, 3)).astype("float32")
    hidden.build((None, 3))
    output.build((None, 4))

    def loss():
        activations = tk.intermediate("hidden", hidden(features))
        return keras.ops.mean((output(activations) - labels[:, :1]) ** 2)

    variables = hidden.trainable_variables + output.trainable_variables
    kernel = output.kernel.numpy()
    error = output(hidden(features)).numpy() - labels[:, :1]
    measures = {"hidden": lambda intermediates: intermediates["hidden"]}
    history = _loop(driver="xla", steps=1, measures=measures).minimize(loss, variables).history
    np.testing.assert_allclose(history["hidden"][0], 2.0 / 8.0 * error @ kernel.T, rtol=1e-4, atol=1e-6)


# What it costs and what it leaves alone


def _network():
    """A small network in float64, its objective, and its variables from a fixed seed."""
    generator = np.random.default_rng(3)
    features, labels = generator.normal(size=(16, 5)), generator.normal(size=(16, 1))
    first, second = tf.Variable(generator.normal(size=(5, 7))), tf.Variable(generator.normal(size=(7, 1)))

    def loss():
        hidden = tk.intermediate("hidden", tf.tanh(features @ first))
        return tf.reduce_mean((tk.intermediate("output", hidden @ second) - labels) ** 2)

    return loss, [first, second]


def _trained(intermediates, driver, steps=20, **more):
    loss, variables = _network()
    optimizer = keras.optimizers.Adam(0.01)
    loop = _loop(tk.TapeStep(intermediates), optimizer, driver, steps, **more)
    result = loop.minimize(loss, variables)
    return result.history, [*result.variables, *(slot.numpy() for slot in optimizer.variables)]


def _assert_equal_bits(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@every_driver
def test_asking_for_intermediates_changes_no_bit_of_the_update(driver):
    plain, inner = _trained(False, driver), _trained(True, driver)
    _assert_equal_bits(plain[1], inner[1])
    np.testing.assert_array_equal(plain[0]["loss"], inner[0]["loss"])
    assert set(inner[0]) - set(plain[0]) == {"gradient_norm/hidden", "gradient_norm/output"}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_chunk_length_changes_no_bit_of_what_is_recorded(jit_compile):
    def record(length):
        loss, variables = _network()
        loop = tk.OptimizationLoop(
            keras.optimizers.Adam(0.01),
            step=tk.TapeStep(intermediates=True),
            max_iterations=20,
            measures={"output": lambda intermediates: intermediates["output"]},
            jit_compile=jit_compile,
            steps_per_execution=length,
        )
        result = loop.minimize(loss, variables)
        return [result.history[name] for name in sorted(result.history)] + result.variables

    by_one = record(1)
    for length in (7, 256):
        _assert_equal_bits(by_one, record(length))


@every_driver
def test_the_gradients_are_taken_in_the_same_backward_pass(driver):
    def count(intermediates):
        x, calls = _variable(), {"forward": 0, "backward": 0}

        @tf.custom_gradient
        def square(value):
            calls["forward"] += 1

            def backward(upstream):
                calls["backward"] += 1
                return 2.0 * value * upstream

            return value**2, backward

        def loss():
            return tf.reduce_sum(tk.intermediate("squares", square(tk.intermediate("shifted", x - 4.0))))

        result = _loop(tk.TapeStep(intermediates), driver=driver).minimize(loss, x)
        assert result.evaluations == 4  # three steps and the loss of the result
        return calls

    if driver == "eager":  # once in each of three steps
        assert count(True)["backward"] == 3
        assert count(True) == count(False)
    else:  # traced once in the first look at the loss, and once in a step that cannot take that
        assert count(True) == {"forward": 2, "backward": 2}
        assert count(False) == {"forward": 1, "backward": 1}


def test_a_second_run_of_the_same_objective_traces_nothing():
    loop, loss = _loop(driver="xla"), _least_squares(x := _variable())
    first = loop.minimize(loss, x)
    x.assign(START)
    second = loop.minimize(loss, x)
    assert loop.traces == 1
    np.testing.assert_array_equal(first.history["gradient_norm/z"], second.history["gradient_norm/z"])


@every_driver
def test_a_step_of_ones_own_may_provide_intermediates(driver):
    class Plain(tk.Step):
        provides = frozenset({"gradients", "intermediates"})

        def take(self, problem):
            logs, gradients = problem.loss_and_gradients(intermediates=["z"])
            problem.apply(gradients)
            return logs

    measures = {"z": lambda intermediates: intermediates["z"]}
    result = _loop(Plain(), driver=driver, measures=measures).minimize(_least_squares(x := _variable()), x)
    np.testing.assert_allclose(result.history["z"], _iterates(3)[:-1] @ MATRIX.T, rtol=1e-12)
    assert set(result.history) == {"loss", "gradient_norm/z", "z"}


# What is refused


def _in_function(x):
    return tf.function(lambda: tf.reduce_sum(tk.intermediate("z", x - 1.0) ** 2))


def _in_map(x):
    return lambda: tf.reduce_sum(tf.map_fn(lambda value: tk.intermediate("z", value) ** 2, x))


def _beside(make):
    return lambda x: lambda: (make(x), tf.reduce_sum(x**2))[1]


REFUSED = {
    "a name given twice": (
        lambda x: lambda: tf.reduce_sum(tk.intermediate("z", x) * tk.intermediate("z", 2.0 * x)),
        True,
        ValueError,
        "`name` must be new in an evaluation, received 'z' for the second time.",
    ),
    "a name that is no string": (
        _beside(lambda x: tk.intermediate(3, x)),
        True,
        TypeError,
        "`name` must be a string, received the int 3.",
    ),
    "a number": (
        _beside(lambda x: tk.intermediate("z", 3.0)),
        True,
        TypeError,
        "`value` of 'z' must be a tensor or variable, or hold them, received the float 3.0.",
    ),
    "an array among tensors": (
        _beside(lambda x: tk.intermediate("z", [x, np.ones(2)])),
        True,
        TypeError,
        "`value` of 'z' must be a tensor or variable, or hold them,"
        " received a NumPy array of shape (2,) and dtype float64.",
    ),
    "unknown names": (
        lambda x: _least_squares(x),
        ["y", "z", "v"],
        ValueError,
        "`intermediates` must be names that `loss` gives with tapekit.intermediate (z, w), received y, v.",
    ),
    "no names at all": (
        lambda x: lambda: tf.reduce_sum(x**2),
        True,
        ValueError,
        "`intermediates` must be names that `loss` gives with tapekit.intermediate (none), received True; those given"
        " inside a tf.function are not seen.",
    ),
    "no dependence": (
        _beside(lambda x: tk.intermediate("z", x - 1.0)),
        ["z"],
        ValueError,
        "`intermediates` must be floating-point values that `loss` depends on, unlike z.",
    ),
    "integers": (
        _beside(lambda x: tk.intermediate("z", tf.cast(x, tf.int32))),
        True,
        ValueError,
        "`intermediates` must be floating-point values that `loss` depends on, unlike z.",
    ),
    "nothing": (
        _beside(lambda x: tk.intermediate("z", [])),
        True,
        ValueError,
        "`intermediates` must be floating-point values that `loss` depends on, unlike z.",
    ),
    "a part without dependence": (
        lambda x: lambda: tf.reduce_sum(tk.intermediate("z", {"used": x**2, "unused": 2.0 * x})["used"]),
        True,
        ValueError,
        "`intermediates` must be floating-point values that `loss` depends on, unlike z.",
    ),
}


@every_driver
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_intermediate_is_refused_in_a_sentence_before_anything_changes(case, driver):
    make, asked, kind, sentence = REFUSED[case]
    x, optimizer, seen = _variable(), keras.optimizers.Adam(0.1), []
    loop = _loop(tk.TapeStep(asked), optimizer, driver, callbacks=[lambda step, logs: seen.append(step)])
    with pytest.raises(kind, match=re.escape(sentence) + "$"):
        loop.minimize(make(x), x)
    np.testing.assert_array_equal(x.numpy(), START)
    assert int(optimizer.iterations) == 0
    assert not any(np.any(slot.numpy()) for slot in optimizer.variables if "momentum" in slot.path)
    assert seen == []


@every_driver
@pytest.mark.parametrize("asked", [True, ["z"]])
@pytest.mark.parametrize("inside", [_in_function, _in_map])
def test_a_name_given_where_no_tape_sees_it_is_refused_with_the_reason(inside, asked, driver):
    if inside is _in_map and driver == "eager":  # then the function is called for each of the entries
        reason = "`name` must be new in an evaluation, received 'z' for the second time"
    elif inside is _in_function and driver != "eager":  # it has been traced when the loss was looked at
        reason = "those given inside a tf.function are not seen"
    else:
        reason = "`value` of 'z' must not be named inside a tf.function, branch or loop"
    x = _variable()
    with pytest.raises(ValueError, match=re.escape(reason)):
        _loop(tk.TapeStep(asked), driver=driver).minimize(inside(x), x)
    np.testing.assert_array_equal(x.numpy(), START)


@pytest.mark.parametrize("intermediates", ["z", 3, None, ["z", 1], {"z": 1}], ids=repr)
def test_tape_step_refuses_what_is_neither_a_bool_nor_a_list_of_names(intermediates):
    with pytest.raises(TypeError, match=r"^`intermediates` must be a bool or a list of names, received .+\.$"):
        tk.TapeStep(intermediates=intermediates)


@pytest.mark.parametrize("intermediates", [True, ["z"], None], ids=repr)
def test_minimize_step_refuses_intermediates_with_the_reason(intermediates):
    with pytest.raises(ValueError, match=r"whose tape is the optimizer's own .*; use TapeStep\.$"):
        tk.MinimizeStep(intermediates=intermediates)


class PlainStep(tk.Step):
    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        problem.apply(gradients)
        return logs


@pytest.mark.parametrize("step", [tk.TapeStep, tk.MinimizeStep, PlainStep], ids=lambda step: step.__name__)
@pytest.mark.parametrize("asks", ["callback", "measure", "loop", "callback of the run"])
def test_asking_for_intermediates_that_the_step_does_not_provide_is_refused_before_the_run(asks, step):
    class Asking(tk.OptimizationLoop):
        def on_gradient(self, gradients, variables, intermediates):
            return None

    hook = InnerHook(lambda gradients, inner: None)
    who = {"callback": "InnerHook", "measure": "measure 'z'", "loop": "Asking", "callback of the run": "InnerHook"}
    sentence = f"`step` must provide intermediates for {who[asks]}, received {step.__name__}, which does not"
    more = {"callback": {"callbacks": [hook]}, "measure": {"measures": {"z": lambda intermediates: 0.0}}}.get(asks, {})
    kind = Asking if asks == "loop" else tk.OptimizationLoop
    if asks == "callback of the run":
        loop, x = kind("sgd", step=step(), max_iterations=1), _variable()
        with pytest.raises(ValueError, match=re.escape(sentence)):
            loop.minimize(lambda: tf.reduce_sum(x**2), x, callbacks=[hook])
        np.testing.assert_array_equal(x.numpy(), START)
    else:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            kind("sgd", step=step(), max_iterations=1, **more)


# Configuration


@pytest.mark.parametrize("intermediates", [False, True, ["z", "w"], ("z",), []], ids=repr)
def test_the_step_survives_json_and_provides_the_same(intermediates):
    step = tk.TapeStep(intermediates=intermediates)
    text = json.dumps(keras.saving.serialize_keras_object(step))
    restored = keras.saving.deserialize_keras_object(json.loads(text))
    assert restored == step
    assert restored.provides == step.provides
    assert ("intermediates" in step.provides) == bool(intermediates)
    assert (restored == tk.TapeStep(["other"])) is False


def test_a_loop_can_be_given_the_step_as_a_configuration():
    step = {"class_name": "TapeStep", "config": {"intermediates": ["z"]}}
    loop = tk.OptimizationLoop("sgd", step=step, max_iterations=1)
    history = loop.minimize(_least_squares(x := _variable()), x).history
    np.testing.assert_allclose(history["gradient_norm/z"], [np.linalg.norm(MATRIX @ START)], rtol=1e-12)


# What on_gradient may return


def _pair():
    """Two variables, one of each kind, whose gradients are 2 x and 2 y."""
    x, y = tf.Variable([1.0, 2.0], name="x"), keras.Variable([3.0, 4.0, 5.0], name="y")
    return [x, y], lambda: tf.reduce_sum(x**2) + tf.reduce_sum(y.value**2)


RETURNED = {
    "None": (lambda g, v: None, 1.0, 1.0),
    "a list": (lambda g, v: [0.5 * g[0], 3.0 * g[1]], 0.5, 3.0),
    "a tuple": (lambda g, v: (0.5 * g[0], g[1]), 0.5, 1.0),
    "a list of arrays and numbers": (lambda g, v: [np.float32([1.0, 2.0]), [6.0, 8.0, 10.0]], 0.5, 1.0),
    "a dict of one": (lambda g, v: {"y": 0.25 * g[1]}, 1.0, 0.25),
    "a dict of all": (lambda g, v: {"y": 0.25 * g[1], "x": 2.0 * g[0]}, 2.0, 0.25),
    "an empty dict": (lambda g, v: {}, 1.0, 1.0),
}


@every_driver
@every_strategy
@pytest.mark.parametrize("returned", RETURNED)
def test_on_gradient_may_return_none_a_list_or_a_dict_by_name(returned, strategy, driver):
    function, *factors = RETURNED[returned]
    hook = Hook(lambda callback, gradients, variables: function(gradients, variables))
    variables, loss = _pair()
    starts = [variable.numpy() for variable in variables]
    result = _loop(STRATEGIES[strategy](), driver=driver, steps=1, callbacks=[hook]).minimize(loss, variables)
    for found, start, factor in zip(result.variables, starts, factors, strict=True):
        np.testing.assert_array_equal(found, start - np.float32(RATE) * np.float32(factor) * 2.0 * start)


@every_strategy
def test_variables_of_a_keras_model_have_their_paths_as_names(strategy):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    variables = model.trainable_variables  # a kernel and a bias of each layer
    frozen = (variables[0].path, variables[3].path)

    def freeze(callback, gradients, variables):
        by_path = {variable.path: gradient for variable, gradient in zip(variables, gradients, strict=True)}
        return {path: 0.0 * by_path[path] for path in frozen}

    before = [variable.numpy() for variable in variables]
    loop = _loop(STRATEGIES[strategy](), steps=2, callbacks=[Hook(freeze)])
    loop.minimize(lambda: keras.ops.mean((model(np.float32([[1.0, 2.0]])) - 5.0) ** 2), variables)
    moved = [np.any(variable.numpy() != old) for variable, old in zip(variables, before, strict=True)]
    assert moved == [False, True, True, False]


@eager_and_graph
@every_strategy
@pytest.mark.parametrize("kind", [tf.Variable, keras.Variable])
def test_variables_of_one_name_are_told_apart_by_a_number(kind, strategy, driver):
    variables = [kind([1.0, 2.0], name=name) for name in ("w", "w", "w_1", "w")]
    hook = Hook(lambda callback, g, v: {"w": 0.0 * g[0], "w_1": 2.0 * g[1], "w_1_1": 3.0 * g[2], "w_2": 4.0 * g[3]})
    loop = _loop(STRATEGIES[strategy](), driver=driver, steps=1, callbacks=[hook])
    loss = lambda: tf.add_n([tf.reduce_sum(tf.convert_to_tensor(variable)) for variable in variables])  # noqa: E731
    result = loop.minimize(loss, variables)
    for factor, found in zip((0.0, 2.0, 3.0, 4.0), result.variables, strict=True):
        np.testing.assert_array_equal(found, np.float32([1.0, 2.0]) - np.float32(RATE * factor))


@eager_and_graph
def test_rows_may_be_given_for_a_whole_gradient(driver):
    rows = lambda g: tf.IndexedSlices(g[0][:1], tf.constant([0]))  # noqa: E731
    loop = _loop(tk.TapeStep(), driver=driver, steps=1, callbacks=[Hook(lambda c, g, v: {"x": rows(g)})])
    result = loop.minimize(lambda: tf.reduce_sum(x**2), x := _variable())
    np.testing.assert_allclose(result.x, [START[0] * (1.0 - 2.0 * RATE), START[1]], rtol=1e-12)


def test_each_hook_gets_what_the_one_before_it_returned():
    double = Hook(lambda callback, gradients, variables: {"y": 2.0 * gradients[1]})
    add = Hook(lambda callback, gradients, variables: [gradient + 1.0 for gradient in gradients])
    variables, loss = _pair()
    result = _loop(tk.TapeStep(), steps=1, callbacks=[double, add, double]).minimize(loss, variables)
    np.testing.assert_allclose(result.variables[0], [1.0 - 3.0 * RATE, 2.0 - 5.0 * RATE])
    np.testing.assert_allclose(result.variables[1], [3.0 - 26.0 * RATE, 4.0 - 34.0 * RATE, 5.0 - 42.0 * RATE])


_LIST = "`on_gradient` must return None or a list of 2 gradients"
WRONG = {
    "too few": (lambda g: g[:1], ValueError, f"{_LIST}, received 1."),
    "too many": (lambda g: [*g, g[0]], ValueError, f"{_LIST}, received 3."),
    "a tensor": (lambda g: g[0], TypeError, f"{_LIST}, received a tf.Tensor of shape (2,) and dtype float32."),
    "a generator": (lambda g: (item for item in g), TypeError, f"{_LIST}, received an object of type generator."),
    "None for one": (lambda g: [g[0], None], TypeError, f"{_LIST}, received None as gradient 1."),
    "None in a dict": (lambda g: {"y": None}, TypeError, f"{_LIST}, received None as gradient 1."),
    "a wrong shape": (
        lambda g: [g[0], g[1][:2]],
        ValueError,
        f"{_LIST} of the shapes and dtypes of the variables; gradient 1 must be of shape (3,) and dtype float32,"
        " received shape (2,) and dtype float32.",
    ),
    "a wrong shape in a dict": (
        lambda g: {"x": g[0][:, None]},
        ValueError,
        f"{_LIST} of the shapes and dtypes of the variables; gradient 0 must be of shape (2,) and dtype float32,"
        " received shape (2, 1) and dtype float32.",
    ),
    "a wrong dtype": (
        lambda g: [tf.cast(g[0], tf.float64), g[1]],
        ValueError,
        f"{_LIST} of the shapes and dtypes of the variables; gradient 0 must be of shape (2,) and dtype float32,"
        " received shape (2,) and dtype float64.",
    ),
    "rows of a wrong shape": (
        lambda g: {"y": tf.IndexedSlices(tf.ones([1, 4]), tf.constant([0]))},
        ValueError,
        f"{_LIST} of the shapes and dtypes of the variables; gradient 1 must be of shape (3,) and dtype float32,"
        " received tf.IndexedSlices with values of shape (1, 4) and dtype float32.",
    ),
    "unknown names": (
        lambda g: {"x": g[0], "z": g[0], 3: g[1]},
        ValueError,
        "`on_gradient` must return gradients under the names of the variables (x, y), received z, 3.",
    ),
}


@every_strategy
@eager_and_graph
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_return_is_refused_in_a_sentence_when_it_is_first_traced(case, driver, strategy):
    function, kind, sentence = WRONG[case]
    variables, loss = _pair()
    before, optimizer = [variable.numpy() for variable in variables], keras.optimizers.Adam(0.1)
    hook = Hook(lambda callback, gradients, _: function(gradients))
    with pytest.raises(kind, match="^" + re.escape(sentence) + "$"):
        _loop(STRATEGIES[strategy](), optimizer, driver, callbacks=[hook]).minimize(loss, variables)
    _assert_equal_bits([variable.numpy() for variable in variables], before)
    assert int(optimizer.iterations) == 0


# What hooks add to the logs


@every_driver
@every_strategy
def test_what_a_hook_records_is_in_the_logs_and_the_history(strategy, driver):
    logs = []
    record = Hook(lambda callback, gradients, variables: callback.record("size", tf.norm(gradients[0])))
    loop = _loop(STRATEGIES[strategy](), driver=driver, callbacks=[record, lambda step, row: logs.append(row)])
    result = loop.minimize(lambda: tf.reduce_sum(x**2), x := _variable())
    expected = 2.0 * np.linalg.norm(START) * (1.0 - 2.0 * RATE) ** np.arange(3)
    np.testing.assert_allclose(result.history["size"], expected, rtol=1e-12)
    assert [row["size"] for row in logs] == result.history["size"].tolist()
    assert all(isinstance(row["size"], float) for row in logs)
    np.testing.assert_allclose(result.x, START * (1.0 - 2.0 * RATE) ** 3, rtol=1e-12)


@every_driver
@every_strategy
def test_a_record_may_have_any_fixed_shape_and_dtype_like_a_measure(strategy, driver):
    class Record(tk.Callback):
        def on_gradient(self, gradients, variables):
            self.record("whole", gradients[0])
            self.record("positive", gradients[0] > 0.0)
            self.record("count", tf.size(gradients[0]))
            self.record("number", 2.5)

    epochs = []
    keras_logs = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(sorted(logs)))
    loop = _loop(STRATEGIES[strategy](), driver=driver, callbacks=[Record(), keras_logs])
    history = loop.minimize(lambda: tf.reduce_sum(x**2), x := _variable()).history
    expected = 2.0 * START * (1.0 - 2.0 * RATE) ** np.arange(3)[:, None]
    np.testing.assert_allclose(history["whole"], expected, rtol=1e-12)
    assert history["positive"].tolist() == [[True, False]] * 3
    assert history["count"].tolist() == [2] * 3
    assert history["number"].tolist() == [2.5] * 3
    assert epochs == [["count", "loss", "number"]] * 3  # Keras callbacks expect scalars


@every_driver
def test_a_record_is_of_the_gradients_that_the_hook_gets_and_true_under_loss_scaling(driver):
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE))
    halve = Hook(lambda callback, gradients, variables: [0.5 * gradients[0]])
    record = Hook(lambda callback, gradients, variables: callback.record("first", gradients[0][0]))
    loop = _loop(tk.TapeStep(), scaled, driver, 1, callbacks=[halve, record])
    history = loop.minimize(lambda: tf.reduce_sum(x**2), x := _variable()).history
    assert history["first"].tolist() == [START[0]]


@eager_and_graph
@every_strategy
def test_a_loop_of_ones_own_can_record(strategy, driver):
    class Loop(tk.OptimizationLoop):
        def on_gradient(self, gradients, variables):
            self.record("first", gradients[0][0])

    loop = Loop("sgd", step=STRATEGIES[strategy](), max_iterations=1, **DRIVERS[driver])
    assert loop.minimize(lambda: tf.reduce_sum(x**2), x := _variable()).history["first"].tolist() == [4.0]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_chunk_length_changes_no_bit_of_a_record(jit_compile):
    def record(length):
        hook = Hook(lambda callback, gradients, variables: callback.record("size", tf.linalg.global_norm(gradients)))
        loss, variables = _network()
        loop = tk.OptimizationLoop(
            "adam", max_iterations=20, callbacks=[hook], jit_compile=jit_compile, steps_per_execution=length
        )
        return loop.minimize(loss, variables).history["size"]

    by_one = record(1)
    assert len(set(by_one)) == 20
    for length in (7, 256):
        np.testing.assert_array_equal(record(length), by_one)


@eager_and_graph
@every_strategy
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("twice", "`name` must be new in the logs of a step, received 'twice' for the second time."),
        ("loss", "`record` must not use the name 'loss', which the logs have already."),
        ("beside", "`record` must not use the name 'beside', which the logs have already."),
        ("measured", "`measures` must not use the name 'measured', which the logs have already."),
    ],
)
def test_a_name_that_the_logs_have_already_is_refused(name, sentence, strategy, driver):
    def record(callback, gradients, variables):
        callback.record(name, 1.0)
        if name == "twice":
            callback.record(name, 2.0)

    x, measures = _variable(), {"measured": lambda: tf.constant(1.0)}
    loop = _loop(STRATEGIES[strategy](), driver=driver, callbacks=[Hook(record)], measures=measures)
    with pytest.raises(ValueError, match="^" + re.escape(sentence) + "$"):
        loop.minimize(lambda: (tf.reduce_sum(x**2), {"beside": 2.0 * x[0]}), x)
    np.testing.assert_array_equal(x.numpy(), START)


def test_two_hooks_cannot_record_the_same_name():
    hooks = [Hook(lambda callback, gradients, variables: callback.record("size", 1.0)) for _ in range(2)]
    x = _variable()
    with pytest.raises(ValueError, match=r"^`name` must be new in the logs of a step, received 'size' for the second"):
        _loop(tk.TapeStep(), callbacks=hooks).minimize(lambda: tf.reduce_sum(x**2), x)
    np.testing.assert_array_equal(x.numpy(), START)


@eager_and_graph
def test_recording_outside_of_on_gradient_is_refused(driver):
    class Late(tk.Callback):
        def on_step(self, step, logs):
            self.record("late", 1.0)

    sentence = r"^record must be called in on_gradient, which runs inside the step\.$"
    with pytest.raises(RuntimeError, match=sentence):
        _loop(tk.TapeStep(), driver=driver, callbacks=[Late()]).minimize(lambda: tf.reduce_sum(x**2), x := _variable())
    with pytest.raises(RuntimeError, match=sentence):
        Late().record("never", 1.0)
    with pytest.raises(RuntimeError, match=sentence):
        tk.OptimizationLoop("sgd", max_iterations=1).record("never", 1.0)
