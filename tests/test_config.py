"""Configuration, Keras's way: `get_config`, `from_config`, JSON and back, and objects by name."""

import io
import json
import math
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit import callbacks
from tapekit.callbacks import FunctionCallback, IterationTable
from tapekit.stopping import (
    AllOf,
    AnyOf,
    Criterion,
    GradientNormBelow,
    LossBelow,
    LossChangeBelow,
    LossPlateau,
    MaxEvaluations,
    MaxIterations,
    NonFinite,
    VariablesChangeBelow,
    WallTime,
)

x = tf.Variable(0.0, dtype=tf.float64, name="x")


def loss():
    return (x - 4.0) ** 2


@keras.saving.register_keras_serializable(package="test_config")
def noted(step, logs):
    pass


@keras.saving.register_keras_serializable(package="test_config")
def double():
    return 2 * x


# What users write: arguments of their own, and those of the base handed through.


class Shrunk(tk.Step):
    def __init__(self, factor=0.5):
        self.factor = factor

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        problem.apply([self.factor * gradient for gradient in gradients])
        return logs


class ShrunkTwice(Shrunk):
    def __init__(self, second, **kwargs):
        super().__init__(**kwargs)
        self.second = second


class Near(LossBelow):
    def __init__(self, value, target=0.0, **kwargs):
        super().__init__(value, **kwargs)
        object.__setattr__(self, "target", target)

    def update(self, state, logs):
        return state, tf.abs(logs["loss"] - self.target) <= self.value


class Guarded(Criterion):
    def __init__(self, inner, bounds=((0, 1), (2, 3)), names=None):
        self.inner = tk.stopping.get(inner)
        self.bounds = bounds
        self.names = names

    def update(self, state, logs):
        return state, self.inner.update((), logs)[1]


class Titled(IterationTable):
    def __init__(self, title="", **kwargs):
        super().__init__(**kwargs)
        self.title = title


class Notes(tk.Callback):
    def __init__(self, schedule, weights, **kwargs):
        super().__init__(**kwargs)
        self.schedule = schedule
        self.weights = weights


class Clipped(tk.OptimizationLoop):
    def __init__(self, *args, limit=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.limit = limit

    def on_gradient(self, gradients, variables):
        return [tf.clip_by_value(gradient, -self.limit, self.limit) for gradient in gradients]


class Renamed(tk.Step):
    def __init__(self, rate):
        self._rate = rate

    def get_config(self):
        return {"rate": self._rate}


def decay(rate):
    return keras.optimizers.schedules.ExponentialDecay(0.25, decay_steps=10, decay_rate=rate)


# Each object with one that is almost the same.
OBJECTS = {
    "ClipGradients": (callbacks.ClipGradients(norm=2.0, log="n"), callbacks.ClipGradients(global_norm=2.0, log="n")),
    "GradientNoise": (callbacks.GradientNoise(0.3, seed=3), callbacks.GradientNoise(0.3, seed=4)),
    "FreezeVariables": (callbacks.FreezeVariables("a|b", until=5), callbacks.FreezeVariables("a|b")),
    "ScaleGradients": (callbacks.ScaleGradients({"a": 2.0, "b": 3}), callbacks.ScaleGradients({"a": 2.0, "b": 4})),
    "CentralizeGradients": (callbacks.CentralizeGradients(), callbacks.ClipGradients(1.0)),
    "GradientStatistics": (callbacks.GradientStatistics(every=3), callbacks.GradientStatistics(every=4)),
    "CaptureGradients": (callbacks.CaptureGradients(every=3), callbacks.GradientStatistics(every=3)),
    "CheckGradients": (callbacks.CheckGradients(2, entries=None), callbacks.CheckGradients(2)),
    "JSONLinesLogger": (callbacks.JSONLinesLogger("log", every=2), callbacks.JSONLinesLogger("log", append=True)),
    "LogSteps": (callbacks.LogSteps(every=2, names=["loss"], level=10), callbacks.LogSteps(every=2, names=["loss"])),
    "TensorBoardLogger": (
        callbacks.TensorBoardLogger("log", every=2, histograms=False),
        callbacks.TensorBoardLogger("log", every=2),
    ),
    "Progress": (callbacks.Progress(["mae"], interval=0.5, verbose=2), callbacks.Progress(["mae"])),
    "Checkpoint": (callbacks.Checkpoint("a", seconds=60.0), callbacks.Checkpoint("a", every=None, seconds=60.0)),
    "StopWhen": (
        callbacks.StopWhen(tk.stopping.LossBelow(0.5) | tk.stopping.WallTime(60)),
        callbacks.StopWhen(tk.stopping.LossBelow(0.25)),
    ),
    "TapeStep": (tk.TapeStep(), tk.MinimizeStep()),
    "MinimizeStep": (tk.MinimizeStep(), tk.TapeStep()),
    "a user's step": (Shrunk(0.25), Shrunk(0.5)),
    "a user's step of another": (ShrunkTwice(3, factor=0.25), ShrunkTwice(3, factor=0.5)),
    "a user's step with get_config": (Renamed(1), Renamed(2)),
    "MaxIterations": (MaxIterations(100), MaxIterations(101)),
    "MaxEvaluations": (MaxEvaluations(100), MaxIterations(100)),
    "WallTime": (WallTime(1.5), WallTime(2)),
    "LossBelow": (LossBelow(-1e-6), LossBelow(1e-6)),
    "LossChangeBelow": (LossChangeBelow(1e-6, rtol=1e-3), LossChangeBelow(1e-6)),
    "GradientNormBelow": (GradientNormBelow(1e-3), GradientNormBelow(1e-3, ord=math.inf)),
    "GradientNormBelow inf": (GradientNormBelow(1e-3, ord=math.inf), GradientNormBelow(1e-3)),
    "VariablesChangeBelow": (VariablesChangeBelow(1e-3, 0.1), VariablesChangeBelow(1e-3, 0.2)),
    "LossPlateau": (LossPlateau(5, min_delta=0.1), LossPlateau(5)),
    "NonFinite": (NonFinite(), MaxIterations(1)),
    "Rollback": (tk.Rollback(0.1, times=5), tk.Rollback(0.1)),
    "AnyOf": (LossBelow(1) | MaxIterations(3) | NonFinite(), LossBelow(1) | NonFinite() | MaxIterations(3)),
    "AllOf": (LossBelow(1) & MaxIterations(3), LossBelow(1) | MaxIterations(3)),
    "ForSteps": (LossBelow(1).for_steps(3), LossBelow(1).for_steps(4)),
    "After": (LossBelow(1).after(3), LossBelow(2).after(3)),
    "a nested criterion": (
        (LossBelow(1).for_steps(3) & (WallTime(3) | GradientNormBelow(1, math.inf)).after(7)) | LossPlateau(9),
        (LossBelow(1).for_steps(3) & (WallTime(3) | GradientNormBelow(1)).after(7)) | LossPlateau(9),
    ),
    "a user's criterion": (Guarded(LossBelow(1), names={"a": (1, [2])}), Guarded(LossBelow(1), names={"a": (1, [3])})),
    "a user's criterion of tapekit's": (Near(0.5, target=1.0), Near(0.5, target=2.0)),
    "a user's criterion in a combination": (Near(0.5).for_steps(2) | Near(1.0), Near(0.5).for_steps(2) | Near(2.0)),
    "IterationTable": (IterationTable(["loss"], every=10), IterationTable(every=10)),
    "FunctionCallback": (FunctionCallback(noted, every=3, replayable=True), FunctionCallback(noted, every=3)),
    "a user's callback": (
        Notes(decay(0.5), np.array([[1.0, 2.0], [3.0, 4.0]])),
        Notes(decay(0.5), np.array([[1.0, 2.0], [3.0, 5.0]])),
    ),
    "a user's callback with a Keras object": (Notes(decay(0.5), None), Notes(decay(0.6), None)),
    "a user's callback of tapekit's": (Titled("run 1", every=10), Titled("run 2", every=10)),
    "a loop": (tk.OptimizationLoop("sgd", max_iterations=10), tk.OptimizationLoop("adam", max_iterations=10)),
    "a loop with everything": (
        tk.OptimizationLoop(
            keras.optimizers.Adam(decay(0.5), clipnorm=1.0),
            step=ShrunkTwice(2),
            stopping=[LossBelow(1e-3).for_steps(2), "non_finite"],
            callbacks=[IterationTable(every=5), noted, Titled("a")],
            tolerance=1e-9,
            max_iterations=50,
            measures={"double": double},
            jit_compile=False,
            steps_per_execution=7,
        ),
        tk.OptimizationLoop(
            keras.optimizers.Adam(decay(0.5), clipnorm=1.0),
            step=ShrunkTwice(2),
            stopping=[LossBelow(1e-3).for_steps(2), "non_finite"],
            callbacks=[IterationTable(every=5), noted, Titled("b")],
            tolerance=1e-9,
            max_iterations=50,
            measures={"double": double},
            jit_compile=False,
            steps_per_execution=7,
        ),
    ),
    "a loop with loss scaling": (
        tk.OptimizationLoop(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=8.0), tolerance=0.1
        ),
        tk.OptimizationLoop(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=4.0), tolerance=0.1
        ),
    ),
    "a user's loop": (
        Clipped("sgd", limit=0.5, max_iterations=5, run_eagerly=True),
        Clipped("sgd", limit=0.6, max_iterations=5, run_eagerly=True),
    ),
}
over_objects = pytest.mark.parametrize(("original", "different"), OBJECTS.values(), ids=OBJECTS)


def through_json(value):
    return json.loads(json.dumps(value, allow_nan=False))


@over_objects
def test_an_object_survives_serialization_and_json(original, different):
    serialized = through_json(keras.saving.serialize_keras_object(original))
    again = keras.saving.deserialize_keras_object(serialized)
    assert type(again) is type(original)
    assert again is not original
    assert again == original
    assert again != different
    assert through_json(keras.saving.serialize_keras_object(again)) == serialized


@over_objects
def test_from_config_makes_the_object_that_get_config_describes(original, different):
    config = through_json(original.get_config())
    for _ in range(2):
        again = type(original).from_config(config)
        assert type(again) is type(original)
        assert again == original
        assert again != different
    assert config == through_json(original.get_config())


@over_objects
def test_equal_objects_have_equal_hashes(original, different):
    assert hash(type(original).from_config(original.get_config())) == hash(original)


def test_the_objects_are_of_every_class_of_tapekit():
    public = {getattr(module, name) for module in (tk, tk.steps, tk.stopping, tk.callbacks) for name in module.__all__}
    classes = {item for item in public if isinstance(item, type) and hasattr(item, "get_config")}
    abstract = {tk.Step, tk.Callback, Criterion}
    abstract |= {callbacks.AtSteps}  # what is inside is one of Keras, which have no configuration
    assert {type(original) for original, _ in OBJECTS.values()} >= classes - abstract


@pytest.mark.parametrize(
    ("get", "original"),
    [
        (tk.steps.get, ShrunkTwice(3, factor=0.25)),
        (tk.stopping.get, LossBelow(1).for_steps(2) & Near(0.5)),
        (tk.callbacks.get, Titled("run 1", every=10)),
    ],
)
def test_get_takes_what_keras_has_serialized(get, original):
    assert get(through_json(keras.saving.serialize_keras_object(original))) == original


def test_a_class_that_loses_an_argument_is_told_so():
    class Forgetful(tk.Step):
        def __init__(self, rate):
            self.speed = rate

    with pytest.raises(TypeError) as caught:
        Forgetful(1).get_config()
    assert str(caught.value) == (
        "Forgetful must keep its argument `rate` as an attribute of that name or override get_config,"
        " to be configured and compared."
    )


def test_classes_of_one_name_in_two_modules_stay_apart():
    def namesake(module):
        return types.new_class("Namesake", (tk.Step,), exec_body=lambda body: body.update(__module__=module))

    first, second = namesake("package.first"), namesake("package.second")
    for cls in (first, second):
        assert type(keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(cls()))) is cls


def test_what_cannot_be_serialized_is_equal_to_itself_alone():
    vector = tf.Variable([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one, other in [
            (IterationTable(file=io.StringIO()), IterationTable(file=io.StringIO())),
            (FunctionCallback(lambda step, logs: None), FunctionCallback(lambda step, logs: None)),
            (
                tk.OptimizationLoop("sgd", measures={"x": lambda: vector}, callbacks=["history"]),
                tk.OptimizationLoop("sgd", measures={"x": lambda: vector}, callbacks=["history"]),
            ),
        ]:
            assert one == one
            assert one != other


def test_tapekit_keeps_its_registered_names_wherever_a_class_moves():
    assert keras.saving.get_registered_name(LossBelow) == "tapekit>LossBelow"
    assert keras.saving.get_registered_name(tk.OptimizationLoop) == "tapekit>OptimizationLoop"


# Loops from configurations run.


def run(loop, start=0.0):
    x.assign(start)
    result = loop.minimize(loss, [x])
    return result.steps, result.reason, result.message, result.loss, result.history


def assert_same_run(one, other):
    assert one[:-1] == other[:-1]
    assert one[-1].keys() == other[-1].keys()
    for name in one[-1]:
        np.testing.assert_array_equal(one[-1][name], other[-1][name])


@pytest.mark.parametrize(
    "make",
    [
        lambda: tk.OptimizationLoop(keras.optimizers.SGD(0.25), tolerance=1e-6, max_iterations=100),
        lambda: Clipped(keras.optimizers.SGD(0.25), limit=0.5, tolerance=1e-6, run_eagerly=True),
        lambda: tk.OptimizationLoop(
            keras.optimizers.Adam(decay(0.9)),
            step=Shrunk(0.5),
            stopping=[LossBelow(1e-2).for_steps(3) & VariablesChangeBelow(1e-2), MaxIterations(300)],
            measures={"double": double},
            jit_compile=False,
        ),
    ],
    ids=["tolerance", "a user's loop", "everything"],
)
def test_a_loop_from_its_configuration_runs_and_gives_the_same(make):
    loop = make()
    again = keras.saving.deserialize_keras_object(through_json(keras.saving.serialize_keras_object(loop)))
    expected = run(loop)
    assert expected[0] > 5
    assert_same_run(run(again), expected)


def test_the_configuration_is_that_of_a_new_loop_after_a_run_too():
    loop = tk.OptimizationLoop(keras.optimizers.Adam(0.25), tolerance=1e-6, max_iterations=20, run_eagerly=True)
    before = loop.get_config()
    expected = run(loop)
    assert loop.get_config() == before
    assert_same_run(run(tk.OptimizationLoop.from_config(before)), expected)


def test_a_loop_made_of_names_runs_as_one_made_of_objects():
    by_name = tk.OptimizationLoop(
        {"class_name": "SGD", "config": {"learning_rate": 0.25}},
        step="minimize",
        stopping={"class_name": "loss_below", "config": {"value": 1e-3}},
        callbacks="terminate_on_nan",
        jit_compile=False,
    )
    by_object = tk.OptimizationLoop(
        keras.optimizers.SGD(0.25),
        step=tk.MinimizeStep(),
        stopping=LossBelow(1e-3),
        callbacks=[keras.callbacks.TerminateOnNaN()],
        jit_compile=False,
    )
    assert type(by_name.step) is tk.MinimizeStep
    assert by_name.stopping == LossBelow(1e-3)
    assert [type(callback) for callback in by_name.callbacks] == [keras.callbacks.TerminateOnNaN]
    expected = run(by_object)
    assert expected[0] == 8
    assert_same_run(run(by_name), expected)


# By name.


@pytest.mark.parametrize(
    ("get", "identifier", "expected"),
    [
        (tk.steps.get, "tape", tk.TapeStep()),
        (tk.steps.get, "TapeStep", tk.TapeStep()),
        (tk.steps.get, "tape_step", tk.TapeStep()),
        (tk.steps.get, "minimize", tk.MinimizeStep()),
        (tk.steps.get, {"class_name": "tape"}, tk.TapeStep()),
        (tk.steps.get, {"class_name": "TapeStep", "config": {}}, tk.TapeStep()),
        (tk.steps.get, {"class_name": "TapeStep", "config": None}, tk.TapeStep()),
        (tk.steps.get, "test_config>Shrunk", Shrunk()),
        (tk.steps.get, {"class_name": "test_config>Shrunk", "config": {"factor": 2}}, Shrunk(2)),
        (tk.stopping.get, "non_finite", NonFinite()),
        (tk.stopping.get, "NonFinite", NonFinite()),
        (tk.stopping.get, {"class_name": "MaxIterations", "config": {"n": 9}}, MaxIterations(9)),
        (tk.stopping.get, {"class_name": "max_iterations", "config": {"n": 9}}, MaxIterations(9)),
        (
            tk.stopping.get,
            {"class_name": "GradientNormBelow", "config": {"tol": 1, "ord": "inf"}},
            GradientNormBelow(1, math.inf),
        ),
        (tk.stopping.get, ["non_finite", MaxIterations(9)], NonFinite() | MaxIterations(9)),
        (
            tk.stopping.get,
            {"class_name": "any_of", "config": {"criteria": ["non_finite", {"class_name": "NonFinite"}]}},
            AnyOf([NonFinite(), NonFinite()]),
        ),
        (
            tk.stopping.get,
            {
                "class_name": "AllOf",
                "config": {
                    "criteria": [
                        {"class_name": "LossBelow", "config": {"value": 1}},
                        {"class_name": "for_steps", "config": {"criterion": "non_finite", "n": 2}},
                    ]
                },
            },
            AllOf([LossBelow(1), NonFinite().for_steps(2)]),
        ),
        (tk.callbacks.get, "iteration_table", IterationTable()),
        (tk.callbacks.get, {"class_name": "IterationTable", "config": {"every": 10}}, IterationTable(every=10)),
    ],
)
def test_a_name_or_a_configuration_stands_for_an_object(get, identifier, expected):
    assert get(identifier) == expected


@pytest.mark.parametrize(
    ("get", "thing"),
    [(tk.steps.get, tk.TapeStep()), (tk.stopping.get, NonFinite()), (tk.callbacks.get, keras.callbacks.History())],
)
def test_an_object_stands_for_itself(get, thing):
    assert get(thing) is thing


@pytest.mark.parametrize(
    ("identifier", "cls"),
    [
        ("terminate_on_nan", keras.callbacks.TerminateOnNaN),
        ("TerminateOnNaN", keras.callbacks.TerminateOnNaN),
        ("early_stopping", keras.callbacks.EarlyStopping),
        ("reduce_lr_on_plateau", keras.callbacks.ReduceLROnPlateau),
        ("lambda_callback", keras.callbacks.LambdaCallback),
        ("history", keras.callbacks.History),
        ({"class_name": "csv_logger", "config": {"filename": "log.csv"}}, keras.callbacks.CSVLogger),
        ({"class_name": "CSVLogger", "config": {"filename": "log.csv"}}, keras.callbacks.CSVLogger),
    ],
)
def test_the_callbacks_of_keras_have_names(identifier, cls):
    assert type(tk.callbacks.get(identifier)) is cls


def test_the_configuration_of_a_keras_callback_reaches_it():
    callback = tk.callbacks.get({"class_name": "EarlyStopping", "config": {"monitor": "loss", "patience": 3}})
    assert (callback.monitor, callback.patience) == ("loss", 3)


def test_a_function_stands_for_a_callback():
    callback = tk.callbacks.get(noted)
    assert type(callback) is FunctionCallback
    assert callback.function is noted


CRITERIA = (
    "after, all_of, any_of, for_steps, gradient_norm_below, loss_below, loss_change_below, loss_plateau,"
    " max_evaluations, max_iterations, non_finite, variables_change_below, wall_time"
)


@pytest.mark.parametrize(
    ("get", "name", "sentence"),
    [
        (
            tk.steps.get,
            "tap",
            "`step` 'tap' is not known, the closest is 'tape'; the known names are minimize, tape.",
        ),
        (tk.steps.get, "Newton", "`step` 'Newton' is not known; the known names are minimize, tape."),
        (
            tk.stopping.get,
            "max_iteration",
            "`stopping` 'max_iteration' is not known, the closest is 'max_iterations';"
            f" the known names are {CRITERIA}.",
        ),
        (tk.stopping.get, "", f"`stopping` '' is not known; the known names are {CRITERIA}."),
        (
            tk.stopping.get,
            {"class_name": "LossBelo", "config": {"value": 1}, "module": "gone", "registered_name": "gone>LossBelo"},
            f"`stopping` 'LossBelo' is not known, the closest is 'loss_below'; the known names are {CRITERIA}.",
        ),
        (
            lambda name: tk.OptimizationLoop("sgd", step=name),
            "minimise",
            "`step` 'minimise' is not known, the closest is 'minimize'; the known names are minimize, tape.",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones_and_the_closest(get, name, sentence):
    with pytest.raises(ValueError, match="is not known") as caught:
        get(name)
    assert str(caught.value) == sentence


def test_the_known_names_of_callbacks_are_those_of_keras_and_tapekit():
    with pytest.raises(
        ValueError, match=r"^`callbacks` 'csv_loger' is not known, the closest is 'csv_logger';"
    ) as error:
        tk.callbacks.get("csv_loger")
    known = str(error.value).partition("the known names are ")[2].rstrip(".").split(", ")
    assert known == sorted(known)
    assert {"iteration_table", "function_callback", "csv_logger", "terminate_on_nan", "history"} <= set(known)


STEP = "`step` must be a Step, its name or its configuration, received "
STOPPING = "`stopping` must be a Criterion, its name or its configuration, received "
CALLBACK = "`callbacks` must be a Callback, its name or its configuration, received "


@pytest.mark.parametrize(
    ("get", "wrong", "sentence"),
    [
        (tk.steps.get, 3, STEP + "the int 3."),
        (tk.steps.get, None, STEP + "None."),
        (tk.steps.get, tk.TapeStep, STEP + "the class TapeStep: write TapeStep(...) to make an instance."),
        (tk.steps.get, NonFinite(), STEP + "an object of type NonFinite."),
        (tk.steps.get, ["tape"], STEP + "a list of 1."),
        (tk.steps.get, {"config": {}}, STEP + "a dict of 1."),
        (tk.steps.get, {"class_name": tk.TapeStep}, STEP + "a dict of 1."),
        (tk.steps.get, "tapekit>NonFinite", STEP + "an object of type NonFinite by the name 'tapekit>NonFinite'."),
        (tk.stopping.get, 1e-3, STOPPING + "the float 0.001."),
        (tk.stopping.get, LossBelow, STOPPING + "the class LossBelow: write LossBelow(...) to make an instance."),
        (tk.stopping.get, tk.TapeStep, STOPPING + "the class TapeStep."),
        (tk.stopping.get, ["non_finite", 3], STOPPING + "the int 3."),
        (
            tk.callbacks.get,
            IterationTable,
            CALLBACK + "the class IterationTable: write IterationTable(...) to make an instance.",
        ),
        (
            tk.callbacks.get,
            keras.callbacks.EarlyStopping,
            CALLBACK + "the class EarlyStopping: write EarlyStopping(...) to make an instance.",
        ),
        (
            lambda step: tk.OptimizationLoop("sgd", step=step),
            tk.TapeStep,
            STEP + "the class TapeStep: write TapeStep(...) to make an instance.",
        ),
        (lambda stopping: tk.OptimizationLoop("sgd", stopping=stopping), 1e-3, STOPPING + "the float 0.001."),
    ],
)
def test_the_wrong_kind_is_refused_in_one_sentence(get, wrong, sentence):
    with pytest.raises(TypeError) as caught:
        get(wrong)
    assert str(caught.value) == sentence


def test_an_empty_list_is_no_criterion():
    with pytest.raises(ValueError, match=r"^`stopping` must name at least one criterion, received an empty list\.$"):
        tk.stopping.get([])


@pytest.mark.parametrize("number", [3, 1.5, True])
def test_a_number_is_no_callback(number):
    with pytest.raises(TypeError, match=r"^`callbacks` must be [^.]*, received (the int 3|the float 1\.5|True)\.$"):
        tk.callbacks.get(number)


@pytest.mark.parametrize(
    ("get", "identifier", "sentence"),
    [
        (
            tk.stopping.get,
            "max_iterations",
            "`stopping` 'max_iterations' needs other arguments (missing a required argument: 'n'): give"
            ' {"class_name": "max_iterations", "config": {...}} for MaxIterations(n).',
        ),
        (
            tk.stopping.get,
            {"class_name": "loss_below", "config": {"value": 1, "rtol": 2}},
            "`stopping` 'loss_below' needs other arguments (got an unexpected keyword argument 'rtol'): give"
            ' {"class_name": "loss_below", "config": {...}} for LossBelow(value).',
        ),
        (
            tk.callbacks.get,
            "csv_logger",
            "`callbacks` 'csv_logger' needs other arguments (missing a required argument: 'filename'): give"
            ' {"class_name": "csv_logger", "config": {...}} for CSVLogger(filename, separator=\',\', append=False).',
        ),
    ],
)
def test_missing_and_unknown_arguments_of_a_name_are_told(get, identifier, sentence):
    with pytest.raises(TypeError) as caught:
        get(identifier)
    assert str(caught.value) == sentence


def test_a_wrong_value_in_a_configuration_is_refused_by_the_class_itself():
    with pytest.raises(ValueError, match=r"^`n` must be an integer of at least 1, received 0\.$"):
        tk.stopping.get({"class_name": "max_iterations", "config": {"n": 0}})
