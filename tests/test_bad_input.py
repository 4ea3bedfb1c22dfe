"""Bad input: each is refused in one sentence before anything changes; the user's own errors reach them unchanged."""

from __future__ import annotations

import re
import threading
import traceback

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit import _drivers

DRIVERS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "auto": {}}


@pytest.fixture(params=DRIVERS)
def driver(request):
    return DRIVERS[request.param]


def _value(variable):
    return tf.convert_to_tensor(variable).numpy().copy()


class World:
    """Variables of every kind, and an optimizer with slots."""

    def __init__(self):
        self.x = tf.Variable(0.0, name="x")
        self.y = tf.Variable(1.0, name="y")
        self.vector = tf.Variable([1.0, 2.0], name="vector")
        self.keras = keras.Variable(3.0, name="kay")
        self.frozen = tf.Variable(0.0, trainable=False, name="frozen")
        self.count = tf.Variable(3, dtype=tf.int32, name="count")
        self.optimizer = keras.optimizers.Adam(0.1)

    def loss(self):
        return (self.x - 4.0) ** 2

    def values(self):
        variables = [self.x, self.y, self.vector, self.keras, self.frozen, self.count]
        return [_value(variable) for variable in variables]

    def run(self, optimizer=None, loss=None, variables=None, on=None, epoch=1, unused=False, **settings):
        loop = tk.OptimizationLoop(optimizer or self.optimizer, **{"max_iterations": 3, **settings})
        loss = self.loss if loss is None else loss
        variables = [self.x] if variables is None else variables
        return loop.minimize(loss, variables, callbacks=on, steps_per_epoch=epoch, allow_unused=unused)


@pytest.fixture
def world():
    return World()


def _assert_refused(world, error, argument, words, act):
    """Asserts that `act` raises `error` with one sentence that has `words`, and changes no variable and no slot."""
    before = world.values()
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert type(caught.value) is error
    assert f"`{argument}`" in message
    for word in words:
        assert word in message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 700
    for old, new in zip(before, world.values(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(world.optimizer.iterations) == 0
    learning_rate = world.optimizer._learning_rate
    for slot in world.optimizer.variables:
        if slot is not learning_rate:
            np.testing.assert_array_equal(_value(slot), np.zeros(slot.shape))


class _Halve(tk.Callback):
    def __init__(self, gradients):
        super().__init__()
        self.gradients = gradients

    def on_gradient(self, gradients, variables):
        return self.gradients


class _Never(tk.Callback):
    every = 0

    def on_step(self, step, logs):
        pass


def _adam_of(variable):
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build([variable])
    return optimizer


SCALAR = "must return a scalar floating-point tensor"
FUNCTION = "must be a function of no arguments, as in `lambda: (x - 4.0) ** 2`"
VARIABLES = "must be trainable floating-point variables"
CALLBACKS = "must be callbacks, their names or configurations, or functions f(step, logs)"
MEASURES = "must be a dict of functions of no arguments, or of the gradients"
OPTIMIZER = "must be a Keras optimizer, its name or configuration, or an object with apply_gradients"
CRITERION = "must be a Criterion, its name or its configuration"

# what is wrong: the argument, the exception, what its sentence says, the arguments of the run
REFUSED = {
    "a loss that is a number": ("loss", TypeError, [FUNCTION, "received the float 3.0"], lambda w: {"loss": 3.0}),
    "a loss that is a tensor": (
        *("loss", TypeError, [FUNCTION, "received a tf.Tensor of shape () and dtype float32"]),
        lambda w: {"loss": tf.constant(1.0)},
    ),
    "a loss that needs an argument": (
        *("loss", TypeError, [FUNCTION, "received the function <lambda> that needs x"]),
        lambda w: {"loss": lambda x, y=1.0: x * y},
    ),
    "a Keras loss": (
        *("loss", TypeError, [FUNCTION, "an object of type MeanSquaredError that needs y_true, y_pred"]),
        lambda w: {"loss": keras.losses.MeanSquaredError()},
    ),
    "a loss that returns a vector": (
        *("loss", ValueError, [SCALAR, "received a tensor of shape (2,)", "tf.reduce_sum"]),
        lambda w: {"loss": lambda: (w.vector - 4.0) ** 2, "variables": [w.vector]},
    ),
    "a loss that returns a vector of one": (
        *("loss", ValueError, [SCALAR, "received a tensor of shape (1,)"]),
        lambda w: {"loss": lambda: tf.reshape(w.loss(), [1])},
    ),
    "a loss that returns an integer tensor": (
        *("loss", TypeError, [SCALAR, "received a tf.Tensor of shape () and dtype int32"]),
        lambda w: {"loss": lambda: tf.cast(w.loss(), tf.int32)},
    ),
    "a loss that returns a complex tensor": (
        *("loss", TypeError, [SCALAR, "dtype complex64"]),
        lambda w: {"loss": lambda: tf.complex(w.x, w.x)},
    ),
    "a loss that returns None": ("loss", TypeError, [SCALAR, "received None"], lambda w: {"loss": lambda: None}),
    "a loss that returns an integer": (
        *("loss", TypeError, [SCALAR, "received the int 3, which no variable reaches"]),
        lambda w: {"loss": lambda: 3},
    ),
    "a loss that returns a float": (
        *("loss", TypeError, [SCALAR, "received the float 3.5, which no variable reaches"]),
        lambda w: {"loss": lambda: 3.5},
    ),
    "a loss that returns an array": (
        *("loss", TypeError, [SCALAR, "received a NumPy array of shape (3,) and dtype float64"]),
        lambda w: {"loss": lambda: np.zeros(3)},
    ),
    "a loss that returns a list": (
        *("loss", TypeError, [SCALAR, "received a list of 1"]),
        lambda w: {"loss": lambda: [w.loss()]},
    ),
    "a loss with a second value that is not a dict": (
        *("loss", TypeError, [SCALAR, "or one with a dict of named scalars", "received a tuple of 2"]),
        lambda w: {"loss": lambda: (w.loss(), w.x)},
    ),
    "a vector beside the loss": (
        *("loss", ValueError, ["scalar numbers beside the loss", "shape (2,)", "under 'extra'", "tf.reduce_mean"]),
        lambda w: {"loss": lambda: (w.loss(), {"extra": w.vector})},
    ),
    "None beside the loss": (
        *("loss", TypeError, ["scalar numbers beside the loss", "received None under 'extra'"]),
        lambda w: {"loss": lambda: (w.loss(), {"extra": None})},
    ),
    "a string beside the loss": (
        *("loss", TypeError, ["scalar numbers beside the loss", "received 'abc' under 'extra'"]),
        lambda w: {"loss": lambda: (w.loss(), {"extra": "abc"})},
    ),
    "a value beside the loss that is called loss": (
        *("loss", ValueError, ["by strings other than evaluations, loss, seconds, step", "the name 'loss'"]),
        lambda w: {"loss": lambda: (w.loss(), {"loss": w.x})},
    ),
    "a value beside the loss without a name": (
        *("loss", ValueError, ["by strings", "received the name 3"]),
        lambda w: {"loss": lambda: (w.loss(), {3: w.x})},
    ),
    "no variables": (
        *("variables", ValueError, ["must hold at least one variable", "received an empty list"]),
        lambda w: {"variables": []},
    ),
    "no variables in a dict": (
        *("variables", ValueError, ["must hold at least one variable", "received an empty dict"]),
        lambda w: {"variables": {}},
    ),
    "an array among the variables": (
        *("variables", TypeError, [VARIABLES, "as item 1 a NumPy array of shape (3,) and dtype float64"]),
        lambda w: {"variables": [w.x, np.zeros(3)]},
    ),
    "a number among the variables": (
        *("variables", TypeError, [VARIABLES, "received as item 1 the float 3.0"]),
        lambda w: {"variables": {"a": w.x, "b": 3.0}},
    ),
    "a tensor among the variables": (
        *("variables", TypeError, [VARIABLES, "received as item 0 a tf.Tensor"]),
        lambda w: {"variables": [tf.constant(1.0)]},
    ),
    "None among the variables": (
        *("variables", TypeError, [VARIABLES, "received as item 1 None"]),
        lambda w: {"variables": [w.x, None]},
    ),
    "a function in place of variables": (
        *("variables", TypeError, [VARIABLES, "received the function <lambda>."]),
        lambda w: {"variables": lambda: [w.x]},
    ),
    "a model in place of variables": (
        *("variables", TypeError, [VARIABLES, "object of type Sequential; give its trainable_variables"]),
        lambda w: {"variables": keras.Sequential()},
    ),
    "a variable that is not trainable": (
        *("variables", ValueError, [VARIABLES, "as item 1 the tf.Variable 'frozen'", "which is not trainable"]),
        lambda w: {"variables": [w.x, w.frozen]},
    ),
    "a variable of integers": (
        *("variables", TypeError, [VARIABLES, "as item 1 the tf.Variable 'count' of shape () and dtype int32"]),
        lambda w: {"variables": [w.x, w.count]},
    ),
    "a variable twice": (
        *("variables", ValueError, ["must name each variable once", "the tf.Variable 'x'", "appears twice"]),
        lambda w: {"variables": {"a": w.x, "b": [w.x]}},
    ),
    "a Keras variable and its tf.Variable": (
        *("variables", ValueError, ["must name each variable once", "'kay'", "appears twice"]),
        lambda w: {"variables": [w.keras, w.keras.value], "loss": lambda: w.keras.value**2},
    ),
    "a variable that the loss does not depend on": (
        *("variables", ValueError, ["its gradient does not reach y", "allow_unused=True lets pass"]),
        lambda w: {"variables": [w.x, w.y]},
    ),
    "variables that the loss does not depend on": (
        *("variables", ValueError, ["its gradient does not reach y, kay"]),
        lambda w: {"variables": [w.y, w.keras], "unused": True},
    ),
    "a constant loss": (
        *("variables", ValueError, ["must be those that `loss` depends on", "does not reach x"]),
        lambda w: {"loss": lambda: tf.constant(1.0)},
    ),
    "an optimizer of unknown name": (
        *("optimizer", ValueError, [OPTIMIZER, "received 'sdg', which Keras does not know"]),
        lambda w: {"optimizer": "sdg"},
    ),
    "an optimizer that is a number": (
        *("optimizer", TypeError, [OPTIMIZER, "received the int 3"]),
        lambda w: {"optimizer": 3},
    ),
    "an optimizer that is a class": (
        *("optimizer", TypeError, [OPTIMIZER, "received the class SGD", "write SGD(...)"]),
        lambda w: {"optimizer": keras.optimizers.SGD},
    ),
    "an optimizer of unknown configuration": (
        *("optimizer", ValueError, [OPTIMIZER, "'class_name': 'Foo'", "which Keras does not know"]),
        lambda w: {"optimizer": {"class_name": "Foo", "config": {}}},
    ),
    "an optimizer built on other variables": (
        *("optimizer", ValueError, ["must be new or built on the variables", "Adam built on others, without x"]),
        lambda w: {"optimizer": _adam_of(w.keras)},
    ),
    "max_iterations of 0": (
        *("max_iterations", ValueError, ["an integer of at least 1, received 0"]),
        lambda w: {"max_iterations": 0},
    ),
    "max_iterations that is a float": (
        *("max_iterations", TypeError, ["an integer of at least 1, received the float 1.5"]),
        lambda w: {"max_iterations": 1.5},
    ),
    "max_iterations that is True": (
        *("max_iterations", TypeError, ["an integer of at least 1, received True"]),
        lambda w: {"max_iterations": True},
    ),
    "a negative tolerance": (
        *("tolerance", ValueError, ["a number of at least 0, received -1"]),
        lambda w: {"tolerance": -1.0},
    ),
    "a tolerance that is NaN": (
        *("tolerance", ValueError, ["a number of at least 0, received nan"]),
        lambda w: {"tolerance": float("nan")},
    ),
    "a tolerance that is a string": (
        *("tolerance", TypeError, ["a number of at least 0, received '1e-6'"]),
        lambda w: {"tolerance": "1e-6"},
    ),
    "nothing that ends the run": (
        *("max_iterations", ValueError, ["`tolerance`, `stopping` or a callback must end the run", "none of them"]),
        lambda w: {"max_iterations": None, "loss": lambda: tf.math.log(w.x - 1.0)},  # NaN, lest a defect runs for ever
    ),
    "nothing but loggers to end the run": (
        *("max_iterations", ValueError, ["must end the run", "none of them"]),
        lambda w: {
            "max_iterations": None,
            "loss": lambda: tf.math.log(w.x - 1.0),
            "on": [keras.callbacks.History(), tk.callbacks.IterationTable()],
        },
    ),
    "a number as a criterion": (
        *("stopping", TypeError, [CRITERION, "received the int 3"]),
        lambda w: {"stopping": 3},
    ),
    "a number among the criteria": (
        *("stopping", TypeError, [CRITERION, "received the int 3"]),
        lambda w: {"stopping": [tk.stopping.LossBelow(0.0), 3]},
    ),
    "a class of criteria": (
        *("stopping", TypeError, [CRITERION, "received the class MaxIterations", "an instance"]),
        lambda w: {"stopping": tk.stopping.MaxIterations},
    ),
    "a criterion of unknown name": (
        *("stopping", ValueError, ["'loss_bellow' is not known", "the closest is 'loss_below'", "max_iterations"]),
        lambda w: {"stopping": "loss_bellow"},
    ),
    "no criterion in a list": (
        *("stopping", ValueError, ["at least one criterion, received an empty list"]),
        lambda w: {"stopping": []},
    ),
    "a number as a callback": ("callbacks", TypeError, [CALLBACKS, "received the int 3"], lambda w: {"on": 3}),
    "a number among the loop's callbacks": (
        *("callbacks", TypeError, [CALLBACKS, "received the int 3"]),
        lambda w: {"callbacks": [print, 3]},
    ),
    "None among the callbacks": ("callbacks", TypeError, [CALLBACKS, "received None"], lambda w: {"on": [None]}),
    "a function of one argument as a callback": (
        *("callbacks", TypeError, [CALLBACKS, "received the function <lambda>"]),
        lambda w: {"on": [lambda step: None]},
    ),
    "a class of callbacks": (
        *("callbacks", TypeError, ["must be a Callback", "received the class History", "an instance"]),
        lambda w: {"on": [keras.callbacks.History]},
    ),
    "a callback of unknown name": (
        *("callbacks", ValueError, ["'histery' is not known", "the closest is 'history'"]),
        lambda w: {"on": "histery"},
    ),
    "a callback that is never due": (
        *("_Never.every", ValueError, ["an integer of at least 1, received 0"]),
        lambda w: {"on": [_Never()]},
    ),
    "steps_per_epoch of 0": (
        *("steps_per_epoch", ValueError, ["an integer of at least 1, received 0"]),
        lambda w: {"epoch": 0},
    ),
    "a class of steps": (
        *("step", TypeError, ["must be a Step", "received the class TapeStep", "write TapeStep(...)"]),
        lambda w: {"step": tk.TapeStep},
    ),
    "a step of unknown name": (
        *("step", ValueError, ["'tapes' is not known", "the closest is 'tape'"]),
        lambda w: {"step": "tapes"},
    ),
    "steps_per_execution of 0": (
        *("steps_per_execution", ValueError, ["an integer of at least 1, received 0"]),
        lambda w: {"steps_per_execution": 0},
    ),
    "measures that are a list": (
        *("measures", TypeError, [MEASURES, "received a list of 1"]),
        lambda w: {"measures": [lambda: w.x]},
    ),
    "a measure that is not a function": (
        *("measures", TypeError, [MEASURES, "the tf.Variable 'x'", "under 'm'"]),
        lambda w: {"measures": {"m": w.x}},
    ),
    "a measure of two arguments": (
        *("measures", TypeError, [MEASURES, "under 'm'", "(a, b)"]),
        lambda w: {"measures": {"m": lambda a, b: w.x}},
    ),
    "a measure that is called loss": (
        *("measures", ValueError, ["the name 'loss'"]),
        lambda w: {"measures": {"loss": lambda: w.x}},
    ),
    "a measure with the name of a value beside the loss": (
        *("measures", ValueError, ["the name 'extra'"]),
        lambda w: {"measures": {"extra": lambda: w.x}, "loss": lambda: (w.loss(), {"extra": w.x})},
    ),
    "a measure that gives None": (
        *("measures", TypeError, ["'m'", "None"]),
        lambda w: {"measures": {"m": lambda: None}},
    ),
    "a measure that gives a string": (
        *("measures", TypeError, ["'m'", "abc"]),
        lambda w: {"measures": {"m": lambda: "abc"}},
    ),
    "a gradient hook that returns a tensor": (
        *("on_gradient", TypeError, ["None or a list of 1 gradients", "received a tf.Tensor"]),
        lambda w: {"on": [_Halve(tf.constant(1.0))]},
    ),
    "a gradient hook that returns too many": (
        *("on_gradient", ValueError, ["None or a list of 1 gradients", "received 2"]),
        lambda w: {"on": [_Halve([1.0, 2.0])]},
    ),
    "a gradient hook that returns another shape": (
        *("on_gradient", ValueError, ["gradient 0 must be of shape () and dtype float32", "received shape (2,)"]),
        lambda w: {"on": [_Halve([tf.zeros([2])])]},
    ),
    "a gradient hook that returns another dtype": (
        *("on_gradient", ValueError, ["gradient 0 must be of shape () and dtype float32", "and dtype float64"]),
        lambda w: {"on": [_Halve([tf.zeros([], tf.float64)])]},
    ),
    "a gradient hook that returns None in a list": (
        *("on_gradient", TypeError, ["None or a list of 1 gradients", "gradient 0", "received None"]),
        lambda w: {"on": [_Halve([None])]},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence_before_anything_changes(case, driver, world):
    argument, error, words, settings = REFUSED[case]
    _assert_refused(world, error, argument, words, lambda: world.run(**driver, **settings(world)))


@pytest.mark.parametrize("jit_compile", ["yes", 2, None])
def test_a_jit_compile_that_is_no_choice_is_refused(jit_compile, world):
    words = ['must be True, False or "auto"', "received"]
    _assert_refused(world, ValueError, "jit_compile", words, lambda: world.run(jit_compile=jit_compile))


@pytest.mark.parametrize("run_eagerly", ["no", 2, None])
def test_a_run_eagerly_that_is_no_truth_value_is_refused(run_eagerly, world):
    words = ["must be True or False", "received"]
    _assert_refused(world, TypeError, "run_eagerly", words, lambda: world.run(run_eagerly=run_eagerly))


@pytest.mark.parametrize("loss", [lambda w: tf.constant(1.0), lambda w: w.frozen**2], ids=["constant", "frozen"])
def test_variables_that_cannot_be_found_are_asked_for(loss, driver, world):
    loop = tk.OptimizationLoop(world.optimizer, max_iterations=3, **driver)
    words = ["must name what to minimize over", "reads no trainable floating-point variable", "received None"]
    _assert_refused(world, ValueError, "variables", words, lambda: loop.minimize(lambda: loss(world)))


def test_an_optimizer_built_on_other_variables_keeps_its_state(driver, world):
    optimizer = _adam_of(world.keras)
    optimizer.apply([tf.constant(1.0)], [world.keras])
    before = [_value(variable) for variable in (world.keras, *optimizer.variables)]
    with pytest.raises(ValueError, match="`optimizer` must be new or built on the variables"):
        world.run(optimizer=optimizer, **driver)
    for old, new in zip(before, (world.keras, *optimizer.variables), strict=True):
        np.testing.assert_array_equal(old, _value(new))


@pytest.mark.parametrize("bad", [{"loss": lambda: None}, {"variables": []}, {"on": [_Halve([1.0, 2.0])]}])
def test_a_loop_that_has_refused_something_can_be_used(bad, driver, world):
    loop = tk.OptimizationLoop(world.optimizer, max_iterations=3, **driver)
    arguments = {"loss": world.loss, "variables": [world.x], "on": None, **bad}
    with pytest.raises((TypeError, ValueError)):
        loop.minimize(arguments["loss"], arguments["variables"], callbacks=arguments["on"])
    assert loop.minimize(world.loss, [world.x]).reason is tk.StopReason.LIMIT
    assert int(world.optimizer.iterations) == 3


@pytest.mark.parametrize("step", [tk.TapeStep(), tk.MinimizeStep()], ids=["tape", "minimize"])
def test_allow_unused_leaves_the_variable_that_the_loss_does_not_reach_as_it_is(step, driver, world):
    optimizer = keras.optimizers.SGD(0.25)
    result = world.run(
        optimizer=optimizer,
        variables={"x": world.x, "kay": world.keras, "y": world.y},
        unused=True,
        step=step,
        **driver,
    )
    assert {name: float(value) for name, value in result.variables.items()} == {"x": 3.5, "kay": 3.0, "y": 1.0}
    assert (float(world.x), float(world.keras.value), float(world.y)) == (3.5, 3.0, 1.0)


# Where a run is not allowed.


@pytest.mark.parametrize("autograph", [True, False])
@pytest.mark.parametrize("method", ["minimize", "steps"])
def test_a_run_inside_a_tf_function_is_refused(method, autograph, driver, world):
    loop = tk.OptimizationLoop(world.optimizer, max_iterations=3, **driver)

    def outer():
        for _ in getattr(loop, method)(world.loss, [world.x]):
            pass

    with pytest.raises(RuntimeError, match=r"must be run from Python, outside of any tf\.function"):
        tf.function(outer, autograph=autograph)()
    assert float(world.x) == 0.0
    assert not world.optimizer.built


def test_a_run_inside_the_loss_of_a_compiled_run_is_refused(world):
    inner = tk.OptimizationLoop("sgd", max_iterations=3)
    with pytest.raises(RuntimeError, match=r"outside of any tf\.function"):
        world.run(loss=lambda: world.loss() + inner.minimize(lambda: world.y**2, [world.y]).loss)
    assert (float(world.x), float(world.y)) == (0.0, 1.0)


@pytest.mark.parametrize("hook", ["on_train_begin", "on_step", "on_train_end"])
def test_a_running_loop_cannot_be_entered_again(hook, driver, world):
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=3, **driver)

    class Again(tk.Callback):
        pass

    setattr(Again, hook, lambda *_: loop.minimize(lambda: (world.y - 1.0) ** 2, [world.y]))
    message = "this loop is running already; make another OptimizationLoop for a run inside a run."
    with pytest.raises(RuntimeError) as caught:
        loop.minimize(world.loss, [world.x], callbacks=[Again()])
    assert str(caught.value) == message
    assert float(world.y) == 1.0
    assert loop.result.reason is tk.StopReason.ERROR
    assert loop.minimize(world.loss, [world.x]).steps == 3


def test_steps_that_have_begun_keep_the_loop_until_they_end(driver, world):
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=3, **driver)
    first, second = (loop.steps(world.loss, [world.x]) for _ in range(2))
    assert next(first)[0] == 1
    with pytest.raises(RuntimeError, match="this loop is running already"):
        next(second)
    assert [step for step, _ in first] == [2, 3]
    assert float(world.x) == 3.5


def test_another_thread_cannot_enter_a_running_loop_and_does_not_disturb_it(driver, world):
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=5, **driver)
    refused = []

    def intrude():
        try:
            loop.minimize(lambda: (world.y - 4.0) ** 2, [world.y])
        except RuntimeError as error:
            refused.append(str(error))

    def on_step(step, logs):
        if step == 2:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    result = loop.minimize(world.loss, [world.x], callbacks=[on_step])
    assert refused == ["this loop is running already; make another OptimizationLoop for a run inside a run."]
    assert (result.steps, result.reason, float(world.x), float(world.y)) == (5, tk.StopReason.LIMIT, 3.875, 1.0)


def test_another_thread_can_stop_a_running_loop(driver, world):
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), **driver)

    def on_step(step, logs):
        if step == 2:
            thread = threading.Thread(target=loop.stop, args=["the window was closed"])
            thread.start()
            thread.join()

    assert loop.minimize(world.loss, [world.x], callbacks=[on_step]).message == (
        "stopped at step 2: the window was closed"
    )
    assert float(world.x) == 3.0


def test_two_threads_with_a_loop_each_do_not_disturb_each_other(driver):
    ends = {}

    def work(target):
        x = tf.Variable(0.0)
        loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=60, **driver)
        ends[target] = float(loop.minimize(lambda: (x - target) ** 2, [x]).variables[0])

    threads = [threading.Thread(target=work, args=[target]) for target in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == {1.0: 1.0, 2.0: 2.0}


def test_a_loop_inside_a_callback_of_another_loop_works(driver, world):
    inner = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=2, **driver)
    inner_steps = []

    def on_step(step, logs):
        world.y.assign(0.0)
        result = inner.minimize(lambda: (world.y - 8.0) ** 2, [world.y], callbacks=[lambda s, _: inner_steps.append(s)])
        assert result.history["loss"].tolist() == [64.0, 16.0]

    outer = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=3, **driver)
    result = outer.minimize(world.loss, [world.x], callbacks=[on_step])
    assert (float(world.x), float(world.y), result.steps) == (3.5, 6.0, 3)
    assert inner_steps == [1, 2] * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_stop_outside_of_a_run_is_refused(when, world):
    loop = tk.OptimizationLoop("sgd", max_iterations=3)
    if when == "after":
        loop.minimize(world.loss, [world.x])
    with pytest.raises(RuntimeError, match="stop must be called from a hook of a running loop"):
        loop.stop("too late")


# The user's own errors. SGD(0.25) on (x - 4)**2 halves the distance to 4 at every step.


@pytest.fixture
def long_chunks(monkeypatch):
    """Makes chunks as long as they may be, whatever the speed of the machine."""
    monkeypatch.setattr(_drivers.Pace, "limit", lambda self: 1 << 30)


class Trouble(Exception):
    """An exception that cannot be made from a message alone."""

    def __init__(self, where, number):
        super().__init__(where, number)


def _trouble():
    raise Trouble("here", 5)


def _iterate(step):
    return 4.0 - 4.0 * 0.5**step


def _assert_trouble(loop, act, steps=None):
    """Asserts that `act` raises `Trouble` as `_trouble` made it, and that the result holds the history of `steps`."""
    with pytest.raises(Trouble) as caught:
        act()
    assert caught.value.args == ("here", 5)
    frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert (__file__, "_trouble") in frames
    if steps is None:
        return
    assert loop.result.reason is tk.StopReason.ERROR
    assert loop.result.steps == steps
    assert loop.result.message == f"Trouble after step {steps}: ('here', 5)"
    losses = loop.result.history.get("loss", np.empty(0))
    assert losses.tolist() == [(_iterate(step) - 4.0) ** 2 for step in range(steps)]
    assert not loop.result.converged


def _assert_runs_again(loop, x):
    """Asserts that a loop can be used after an error, from where the variables are."""
    start = float(x)
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x])
    assert (result.reason, result.steps) == (tk.StopReason.LIMIT, loop.max_iterations)
    assert float(x) == 4.0 - (4.0 - start) * 0.5**result.steps


def _loop(driver, **settings):
    return tk.OptimizationLoop(keras.optimizers.SGD(0.25), **{"max_iterations": 10, **driver, **settings})


class _Counted:
    """Calls `_trouble` at the n-th call of `check`."""

    def __init__(self, n):
        self.left = n

    def check(self):
        self.left -= 1
        if self.left == 0:
            _trouble()


def test_an_error_in_the_loss_at_the_first_evaluation_reaches_the_user(driver, world):
    loop = _loop(driver)
    _assert_trouble(loop, lambda: loop.minimize(_trouble, [world.x]))
    assert float(world.x) == 0.0
    _assert_runs_again(loop, world.x)


@pytest.mark.parametrize("length", [1, 3, "auto"])
@pytest.mark.usefixtures("long_chunks")
def test_an_error_in_the_loss_at_a_later_step_leaves_the_step_before(length, world):
    loop, calls = _loop(DRIVERS["eager"], steps_per_execution=length), _Counted(5)

    def loss():
        calls.check()
        return world.loss()

    _assert_trouble(loop, lambda: loop.minimize(loss, [world.x]), steps=4)
    assert float(world.x) == _iterate(4)
    assert loop.result.loss == loop.result.history["loss"][-1]
    np.testing.assert_array_equal(loop.result.variables[0], _iterate(4))
    _assert_runs_again(loop, world.x)


@pytest.mark.parametrize("length", [1, 3, "auto"])
@pytest.mark.usefixtures("long_chunks")
def test_an_error_in_a_gradient_hook_leaves_the_step_before(length, world):
    calls = _Counted(5)

    class Hook(tk.Callback):
        def on_gradient(self, gradients, variables):
            calls.check()

    loop = _loop(DRIVERS["eager"], steps_per_execution=length)
    _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x], callbacks=[Hook()]), steps=4)
    assert float(world.x) == _iterate(4)
    _assert_runs_again(loop, world.x)


def test_an_error_in_a_gradient_hook_as_it_is_compiled_changes_nothing(driver, world):
    class Hook(tk.Callback):
        def on_gradient(self, gradients, variables):
            _trouble()

    loop = _loop(driver)
    _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x], callbacks=[Hook()]), steps=0)
    assert float(world.x) == 0.0
    _assert_runs_again(loop, world.x)


class _Troubled(tk.stopping.Criterion):
    """Stops at step 5, with trouble in `update` or in `message`."""

    def __init__(self, update=None):
        self.called = update

    def update(self, state, logs):
        if self.called:
            self.called()
        return state, logs["step"] >= 5

    def message(self, state, logs):
        return _trouble()


@pytest.mark.parametrize("place", ["measure", "criterion"])
@pytest.mark.parametrize("length", [1, 3, "auto"])
@pytest.mark.usefixtures("long_chunks")
def test_an_error_in_a_measure_or_a_criterion_leaves_a_whole_step_and_its_history(place, length, world):
    calls = _Counted(5)

    def measure():
        calls.check()
        return world.x

    more = {"measures": {"x": measure}} if place == "measure" else {"stopping": _Troubled(calls.check)}
    loop = _loop(DRIVERS["eager"], steps_per_execution=length, **more)
    _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x]), steps=4)
    assert float(world.x) in (_iterate(4), _iterate(5))


@pytest.mark.parametrize("place", ["measure", "criterion"])
def test_an_error_in_a_measure_or_a_criterion_as_it_is_compiled_changes_nothing(place, world):
    more = {"measures": {"m": _trouble}} if place == "measure" else {"stopping": _Troubled(_trouble)}
    for settings in (DRIVERS["graph"], DRIVERS["auto"]):
        loop = _loop(settings, **more)
        _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x]), steps=0)
        assert float(world.x) == 0.0


def test_an_error_in_the_message_of_a_criterion_leaves_its_step(driver, world):
    loop = _loop(driver, stopping=_Troubled())
    _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x]), steps=5)
    assert float(world.x) == _iterate(5)


HOOKS = {
    "on_train_begin": 0,
    "on_epoch_begin": 4,
    "on_train_batch_begin": 4,
    "on_step": 5,
    "on_train_batch_end": 5,
    "on_epoch_end": 5,
    "on_train_end": 10,
}


@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_in_a_hook_leaves_the_variables_of_its_step(hook, driver, world):
    calls = _Counted(1 if hook in ("on_train_begin", "on_train_end") else 5)
    loop, callbacks = _loop(driver), [type("Hooked", (tk.Callback,), {hook: lambda *_: calls.check()})()]
    minimize = lambda: loop.minimize(world.loss, [world.x], callbacks=callbacks)  # noqa: E731
    _assert_trouble(loop, minimize, steps=HOOKS[hook])
    assert float(world.x) == _iterate(HOOKS[hook])
    world.x.assign(0.0)
    calls.left = -1
    assert minimize().reason is tk.StopReason.LIMIT
    assert float(world.x) == _iterate(10)


@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_in_a_hook_of_a_subclassed_loop_leaves_the_variables_of_its_step(hook, world):
    calls = _Counted(1 if hook in ("on_train_begin", "on_train_end") else 5)
    cls = type("HookedLoop", (tk.OptimizationLoop,), {hook: lambda *_: calls.check()})
    loop = cls(keras.optimizers.SGD(0.25), max_iterations=10, run_eagerly=True)
    _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x]), steps=HOOKS[hook])
    assert float(world.x) == _iterate(HOOKS[hook])


@pytest.mark.parametrize("length", [1, 7, "auto"])
@pytest.mark.usefixtures("long_chunks")
def test_an_error_in_a_hook_that_is_seldom_due_leaves_the_variables_of_its_step(length, driver, world):
    class Hook(tk.Callback):
        every = 5

        def on_step(self, step, logs):
            _trouble()

    loop = _loop(driver, steps_per_execution=length)
    _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x], callbacks=[Hook()]), steps=5)
    assert float(world.x) == _iterate(5)


def test_an_error_tells_everyone_of_the_end_once(driver, world):
    ends = []

    class Closing(tk.Callback):
        def on_step(self, step, logs):
            if step == 5:
                _trouble()

        def on_train_end(self, logs=None):
            ends.append(logs)

    loop = _loop(driver)
    _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x], callbacks=[Closing()]), steps=5)
    assert ends == [{"loss": (_iterate(4) - 4.0) ** 2}]


def test_a_second_error_at_the_end_does_not_hide_the_first(driver, world):
    class Closing(tk.Callback):
        def on_step(self, step, logs):
            if step == 5:
                _trouble()

        def on_train_end(self, logs=None):
            raise OSError("the file was never opened")

    loop = _loop(driver)
    _assert_trouble(loop, lambda: loop.minimize(world.loss, [world.x], callbacks=[Closing()]), steps=5)


@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyError, RuntimeError])
def test_an_exception_that_python_itself_uses_arrives_as_what_it_is(error, driver, world):
    def on_step(step, logs):
        if step == 5:
            raise error("mine")

    loop = _loop(driver)
    with pytest.raises(error) as caught:
        loop.minimize(world.loss, [world.x], callbacks=[on_step])
    assert type(caught.value) is error
    assert caught.value.args == ("mine",)
    assert (loop.result.reason, loop.result.steps) == (tk.StopReason.ERROR, 5)
    assert float(world.x) == _iterate(5)


@pytest.mark.usefixtures("long_chunks")
def test_an_assertion_of_tensorflow_in_the_loss_leaves_the_step_before(driver, world):
    def loss():
        tf.debugging.assert_less(world.x, 3.2, message="x is too large")
        return world.loss()

    loop = _loop(driver)
    with pytest.raises(tf.errors.InvalidArgumentError, match="x is too large"):
        loop.minimize(loss, [world.x])
    assert float(world.x) == _iterate(3)
    assert (loop.result.reason, loop.result.steps) == (tk.StopReason.ERROR, 3)
    assert loop.result.history["loss"].tolist() == [16.0, 4.0, 1.0]


# Objectives that look like bad input and are not.


def test_a_loss_that_branches_on_a_tensor_gives_the_numbers_of_its_branches(driver):
    def statement():
        if x > 2.0:
            return (x - 4.0) ** 2
        return (x - 4.0) ** 2 + 3.0 * (x - 2.0) ** 2

    def expression():
        return (x - 4.0) ** 2 if x > 2.0 else (x - 4.0) ** 2 + 3.0 * (x - 2.0) ** 2

    def repetition():
        total = (x - 4.0) ** 2
        for _ in tf.range(tf.where(x > 2.0, 0, 3)):
            total += (x - 2.0) ** 2
        return total

    def reference():
        return (x - 4.0) ** 2 + tf.where(x > 2.0, 0.0, 3.0 * (x - 2.0) ** 2)

    losses = {}
    for loss in (reference, statement, expression, repetition):
        x = tf.Variable(0.0, dtype=tf.float32)
        losses[loss.__name__] = _loop(driver, max_iterations=12).minimize(loss, [x]).history["loss"]
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["reference"], rtol=1e-6, err_msg=name)


def test_an_error_in_a_loss_that_branches_is_the_users_own(driver, world):
    def loss():
        if world.x > 2.0:
            return world.loss()
        return _trouble()

    with pytest.raises(Trouble) as caught:
        _loop(driver).minimize(loss, [world.x])
    assert caught.value.args == ("here", 5)
    text = "".join(traceback.format_exception(caught.value))
    assert f'File "{__file__}"' in text
    assert "in _trouble" in text
    assert float(world.x) == 0.0


def test_a_loss_of_unknown_static_shape_is_taken_at_its_word_and_held_to_it(driver, world):
    loss = lambda: tf.py_function(lambda x: (x - 4.0) ** 2, [world.x], tf.float32)  # noqa: E731
    assert world.run(optimizer=keras.optimizers.SGD(0.25), loss=loss, **driver).history["loss"].tolist() == [16, 4, 1]
    vector = lambda: tf.py_function(lambda x: tf.stack([x, x]), [world.x], tf.float32)  # noqa: E731
    with pytest.raises((ValueError, tf.errors.OpError)):  # as an op of the graph, or in its gradient
        world.run(optimizer=keras.optimizers.SGD(0.25), loss=vector, **driver)
    assert float(world.x) == 3.5


def test_an_argument_with_a_default_is_the_measures_own(driver, world):
    measures = {f"entry {i}": lambda i=i: world.vector[i] for i in range(2)}
    loss = lambda: tf.reduce_sum(world.vector**2)  # noqa: E731
    history = world.run(
        optimizer=keras.optimizers.SGD(0.25), loss=loss, variables=[world.vector], measures=measures, **driver
    ).history
    assert history["entry 0"].tolist() == [0.5, 0.25, 0.125]
    assert history["entry 1"].tolist() == [1.0, 0.5, 0.25]


# Measures that change.


@pytest.mark.usefixtures("long_chunks")
def test_a_measure_that_changes_its_shape_is_refused_when_it_does(world):
    loop = _loop(DRIVERS["eager"], measures={"m": lambda: tf.zeros([3 if world.x > 3.6 else 2])})
    with pytest.raises(ValueError, match="`measures`") as caught:
        loop.minimize(world.loss, [world.x])
    message = str(caught.value)
    for word in ("'m'", "(2,)", "(3,)"):
        assert word in message
    assert message.endswith(".")
    assert loop.result.reason is tk.StopReason.ERROR
    assert loop.result.history["m"].shape == (3, 2)


def test_a_measure_of_a_shape_that_depends_on_the_data_is_refused_before_anything_changes(world):
    words = ["tensors of a fixed shape", "'m' of shape (None,)"]
    measures = {"m": lambda: tf.boolean_mask(world.vector, world.vector > world.x)}
    for settings in (DRIVERS["graph"], DRIVERS["auto"]):
        _assert_refused(
            *(world, ValueError, "measures", words),
            lambda settings=settings: world.run(measures=measures, **settings),
        )


@pytest.mark.usefixtures("long_chunks")
def test_values_beside_the_loss_that_change_their_names_are_refused(world):
    def loss():
        return world.loss(), {"late" if world.x > 3.2 else "early": world.x}

    loop = _loop(DRIVERS["eager"])
    with pytest.raises(ValueError, match="`loss`") as caught:
        loop.minimize(loss, [world.x])
    assert "'early'" in str(caught.value)
    assert "'late'" in str(caught.value)
    assert loop.result.history["loss"].tolist() == [16.0, 4.0, 1.0]


# Numbers that are not finite.

NOT_FINITE = {
    # log(x) from 1 by gradient steps of 0.6: 1, 0.4, -1.1
    "the loss is nan at step 3": (1.0, 0.6, tf.math.log),
    "the loss is inf at step 1": (-1.0, 0.1, lambda x: tf.exp(-1000.0 * x)),
    "the loss is -inf at step 1": (0.0, 0.1, lambda x: tf.math.log(x)),
    # sqrt(x) from 1 by gradient steps of 2: 1, 0
    "a gradient is not finite at step 2, where the loss is 0": (1.0, 2.0, tf.sqrt),
}


@pytest.mark.parametrize("message", NOT_FINITE)
@pytest.mark.parametrize("length", [1, "auto"])
def test_a_number_that_is_not_finite_ends_the_run_at_its_step_and_says_which(message, length, driver):
    start, rate, function = NOT_FINITE[message]
    x = tf.Variable(start, dtype=tf.float64)
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(rate), max_iterations=100, tolerance=0.0, steps_per_execution=length, **driver
    )
    result = loop.minimize(lambda: function(x), [x])
    assert result.reason is tk.StopReason.NOT_FINITE
    assert re.fullmatch(rf"NonFinite: {message}(.* \w+ \(1 of 1 entries\))?", result.message)
    assert f"at step {result.steps}" in message
    assert len(result.history["loss"]) == result.steps
    assert not result.converged
