"""Every class of `keras.callbacks` in the loop: what each does is checked here, and the table in the docs says it.

A check is a function with the decorator `check`; its docstring is its phrase in the table. After a change,
`python -m tests.test_keras_callbacks` runs the checks and writes the table in docs/keras_callbacks.md anew.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import http.server
import importlib
import inspect
import json
import re
import sys
import threading
import types
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit.callbacks._variables_model import VariablesModel

PAGE = Path(__file__).parents[1] / "docs" / "keras_callbacks.md"
MINIMIZE, FIT = "loop.minimize", "loop.fit"
COLUMNS = {MINIMIZE: "test_keras_callbacks.py", FIT: "test_keras_callbacks_in_fit.py"}
"""The columns of the table, and where their checks are."""
DRIVERS = {"compiled": {}, "eager": {"run_eagerly": True}}
OLDEST = "3.6"
START = {"x": np.float32(0.0), "y": np.float32([3.0, -1.0])}
BEST = {"x": np.float32(4.0), "y": np.float32([1.0, 1.0])}


def point(*rates):
    """The variables after gradient steps of these learning rates, which all scale the distance to the minimum."""
    factor = np.prod([1.0 - 2.0 * rate for rate in rates])
    return {name: BEST[name] + np.float32(factor) * (START[name] - BEST[name]) for name in START}


def value(*rates):
    """The loss after gradient steps of these learning rates. Rates that are sums of few powers of two round nothing."""
    return 24.0 * np.prod([1.0 - 2.0 * rate for rate in rates]) ** 2


@dataclasses.dataclass
class Case:
    """What a check works with: the arguments of the loop, an empty folder, and two of pytest's fixtures."""

    driver: dict[str, Any]
    folder: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def minimize(self, callbacks, *, optimizer=None, rate=0.25, steps=4, stopping=None, measures=None, epoch_length=1):
        """Minimizes (x - 4)² + |y - 1|² over a tf.Variable and a keras.Variable."""
        self.x = x = tf.Variable(START["x"], name="x")
        self.y = y = keras.Variable(START["y"], name="y")
        self.loop = tk.OptimizationLoop(
            keras.optimizers.SGD(rate) if optimizer is None else optimizer,
            max_iterations=steps,
            stopping=stopping,
            measures={"x": lambda: x, **(measures or {})},
            **self.driver,
        )
        loss = lambda: (x - 4.0) ** 2 + tf.reduce_sum((y.value - 1.0) ** 2)  # noqa: E731
        return self.loop.minimize(loss, {"x": x, "y": y}, callbacks, steps_per_epoch=epoch_length)

    def assert_variables(self, expected):
        np.testing.assert_array_equal(self.x.numpy(), expected["x"])
        np.testing.assert_array_equal(self.y.value.numpy(), expected["y"])

    def refused(self, callbacks, sentence, **arguments):
        """Asserts that the run is refused with a sentence before any variable changes."""
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            self.minimize(callbacks, **arguments)
        self.assert_variables(START)


@dataclasses.dataclass(frozen=True)
class Check:
    """A check of one callback in one column of the table."""

    callback: str
    run: Callable[[Case], None]
    column: str
    since: str

    @property
    def phrase(self):
        newer = "" if self.since == OLDEST else f" (Keras {self.since} and newer)"
        return " ".join(str(self.run.__doc__).split()) + newer

    @property
    def applies(self):
        return _version(self.since) <= _version(keras.__version__)


CHECKS: list[Check] = []


def check(callback, column=MINIMIZE, since=OLDEST):
    """Registers a function that checks `callback`, a name in `keras.callbacks`, from the Keras version `since` on."""

    def register(function):
        CHECKS.append(Check(callback, function, column, since))
        return function

    return register


def _version(text):
    return tuple(int(part) for part in text.split(".")[:2])


class PlainDescent:
    """An optimizer that has `apply_gradients` and nothing else."""

    def apply_gradients(self, pairs):
        for gradient, variable in pairs:
            variable.assign_sub(0.25 * gradient)


# Down for two epochs and then up, so that the loss of the third epoch is the best one.
RATES = [0.25, 0.25, 1.25, 1.25, 1.25, 1.25, 1.25]


def down_and_up():
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: RATES[epoch])


# The checks, in the order of the table.


@check("BackupAndRestore")
def begins_where_an_exception_ended(case):
    """a run after one that was broken off begins with its variables and the state of its optimizer"""
    whole = case.minimize([], optimizer=keras.optimizers.SGD(0.125, momentum=0.5), steps=5)
    losses = whole.history["loss"]
    assert losses[4] < min(losses[:4])

    for callbacks in ([break_off(ZeroDivisionError, epoch=1)], []):
        backup = keras.callbacks.BackupAndRestore(case.folder / "backup", delete_checkpoint=False)
        optimizer = keras.optimizers.SGD(0.125, momentum=0.5)
        with pytest.raises(ZeroDivisionError) if callbacks else contextlib.nullcontext():
            case.minimize(
                [backup, *callbacks], optimizer=optimizer, steps=None, stopping=tk.stopping.LossBelow(losses[4])
            )
    np.testing.assert_array_equal(case.loop.result.history["x"], whole.history["x"][2:])
    case.assert_variables(whole.variables)
    assert int(optimizer.iterations) == 5


@check("BackupAndRestore")
def counts_on_from_the_backup(case):
    """epochs, steps and `max_iterations` count on from there, and a run that ends by itself removes the backup"""
    folder = case.folder / "backup"
    for error in (ZeroDivisionError, KeyboardInterrupt):
        epochs, steps = [], []
        look = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs, to=epochs: to.append(epoch))
        backup = keras.callbacks.BackupAndRestore(folder)
        with pytest.raises(error):
            case.minimize([backup, break_off(error, epoch=1)], steps=6, epoch_length=2)
        callbacks = [keras.callbacks.BackupAndRestore(folder), look, lambda step, logs, to=steps: to.append(step)]
        result = case.minimize(callbacks, steps=6, epoch_length=2)
        assert (epochs, steps, result.steps) == ([2], [5, 6], 2)
        assert result.message == "MaxIterations: step 6 reached the limit of 6"
        assert result.history["loss"].tolist() == [value(*[0.25] * 4), value(*[0.25] * 5)]
        case.assert_variables(point(*[0.25] * 6))
        assert not folder.exists()


@check("BackupAndRestore")
def a_finished_backup_leaves_nothing_to_do(case):
    """a backup at `max_iterations` leaves no step to take"""
    for _ in range(2):
        result = case.minimize([keras.callbacks.BackupAndRestore(case.folder / "backup", delete_checkpoint=False)])
        assert result.message == "MaxIterations: step 4 reached the limit of 4"
        case.assert_variables(point(*[0.25] * 4))
    assert result.steps == 0
    assert result.loss == value(*[0.25] * 4)


@check("BackupAndRestore")
def optimizer_without_a_state_to_save(case):
    """an optimizer that is not of Keras 3 is refused"""
    case.refused(
        [keras.callbacks.BackupAndRestore(case.folder / "backup")],
        "`optimizer` must be one of Keras 3, whose state can be saved, for BackupAndRestore, received an object of type"
        " PlainDescent.",
        optimizer=PlainDescent(),
    )


@check("Callback")
def hooks_in_order(case):
    """every hook is called, in the order of `Model.fit`; `self.model` owns the variables and the optimizer"""
    seen, models, params = [], [], {}

    class Recorder(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            models.append(self.model)
            params.update(self.params)

    def recording(name):
        return lambda self, position=None, logs=None: seen.append((name, position))

    for name in ("on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_epoch_end"):
        setattr(Recorder, name, recording(name))
    Recorder.on_train_end = lambda self, logs=None: seen.append(("on_train_end", logs["loss"]))

    optimizer = keras.optimizers.SGD(0.25)
    case.minimize([Recorder()], optimizer=optimizer, steps=3, epoch_length=2)
    step = [("on_train_batch_begin", 0), ("on_train_batch_end", 0)]
    assert seen == [
        *(("on_epoch_begin", 0), *step, ("on_train_batch_begin", 1), ("on_train_batch_end", 1), ("on_epoch_end", 0)),
        *(("on_epoch_begin", 1), *step, ("on_epoch_end", 1)),
        ("on_train_end", value(0.25, 0.25)),
    ]
    (model,) = models
    assert isinstance(model, keras.Model)
    assert model.optimizer is optimizer
    assert params["steps"] == 2
    model.set_weights([np.float32(7.0), np.float32([8.0, 9.0])])
    case.assert_variables({"x": 7.0, "y": [8.0, 9.0]})


@check("CallbackList")
def callbacks_in_a_list(case):
    """the callbacks in it are called, with the hooks of tapekit too"""
    history, steps = keras.callbacks.History(), []
    several = keras.callbacks.CallbackList(
        [history, tk.callbacks.FunctionCallback(lambda step, logs: steps.append(step))]
    )
    for callbacks in (several, [several]):
        case.minimize(callbacks, steps=3)
        assert history.history["loss"][-3:] == [value(), value(0.25), value(0.25, 0.25)]
    assert steps == [1, 2, 3, 1, 2, 3]


@check("CSVLogger")
def rows(case):
    """one row an epoch, of its last step, measures included; `append=True` goes on in the same file"""
    for _ in range(2):
        case.minimize([keras.callbacks.CSVLogger(case.folder / "log.csv", append=True)], steps=3, epoch_length=2)
    with open(case.folder / "log.csv", newline="") as file:
        found = [(int(row["epoch"]), float(row["loss"]), float(row["x"])) for row in csv.DictReader(file)]
    rates = [0.25] * 3
    assert found == 2 * [(0, value(*rates[:1]), point(*rates[:2])["x"]), (1, value(*rates[:2]), point(*rates)["x"])]


@check("EarlyStopping")
def stops_and_restores(case):
    """stops after `patience` epochs without a better `loss` and restores the variables of the best epoch"""
    stop = keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True)
    result = case.minimize([down_and_up(), stop], steps=7)
    assert result.history["loss"].tolist() == [value(*RATES[:step]) for step in range(5)]
    assert np.argmin(result.history["loss"]) == 2
    assert (result.reason, result.message) == (
        tk.StopReason.STOPPED,
        "stopped at step 5: a callback set model.stop_training",
    )
    case.assert_variables(point(*RATES[:3]))
    assert result.loss == value(*RATES[:3])


@check("EarlyStopping")
def monitors_a_measure(case):
    """monitors a measure too, such as a `val_loss` on other data"""
    measures = {"val_loss": lambda: (case.x - 3.0) ** 2}
    result = case.minimize(
        [keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)], measures=measures, steps=7
    )
    assert result.history["val_loss"].tolist() == [1.0, 0.0, 0.25, 0.5625]
    case.assert_variables(point(0.25, 0.25))


@check("EarlyStopping")
def waits_for_nothing_that_never_comes(case):
    """a `monitor` that the logs do not have ends the run with a sentence"""
    refused_monitor(case, keras.callbacks.EarlyStopping())
    refused_monitor(case, keras.callbacks.EarlyStopping("accuracy", mode="max"), hint="")


@check("History")
def epochs(case):
    """one row an epoch, of its last step, measures included"""
    history = keras.callbacks.History()
    case.minimize([history], steps=5, epoch_length=2)
    assert history.epoch == [0, 1, 2]
    assert history.history == {
        "loss": [value(*[0.25] * (step - 1)) for step in (2, 4, 5)],
        "x": [point(*[0.25] * step)["x"] for step in (2, 4, 5)],
    }


@check("LambdaCallback")
def functions(case):
    """each of its functions is called, with the logs of the step or epoch"""
    seen = []
    several = ("on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_epoch_end")
    functions = {name: lambda position, logs, name=name: seen.append((name, position, dict(logs))) for name in several}
    ends = {
        name: lambda logs, name=name: seen.append((name, None, dict(logs)))
        for name in ("on_train_begin", "on_train_end")
    }
    case.minimize([keras.callbacks.LambdaCallback(**functions, **ends)], steps=2, epoch_length=2)
    first = {"loss": value(), "x": point(0.25)["x"]}
    second = {"loss": value(0.25), "x": point(0.25, 0.25)["x"]}
    assert seen == [
        ("on_train_begin", None, {}),
        ("on_epoch_begin", 0, {}),
        ("on_train_batch_begin", 0, {}),
        ("on_train_batch_end", 0, first),
        ("on_train_batch_begin", 1, {}),
        ("on_train_batch_end", 1, second),
        ("on_epoch_end", 0, second),
        ("on_train_end", None, second),
    ]


@check("LearningRateScheduler")
def rate_of_every_epoch(case):
    """sets the rate with which the very epoch is run"""
    rates, history = [0.25, 0.125, 1.25], keras.callbacks.History()
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rates[epoch])
    result = case.minimize([schedule, history], rate=0.5, steps=6, epoch_length=2)
    used = np.repeat(rates, 2)
    assert result.history["x"].tolist() == [point(*used[: step + 1])["x"] for step in range(6)]
    assert history.history["learning_rate"] == rates
    case.assert_variables(point(*used))


@check("LearningRateScheduler")
def optimizer_without_a_rate_to_set(case):
    """an optimizer without `learning_rate` is refused"""
    refused_without_rate(case, down_and_up())


@check("ModelCheckpoint")
def weights_of_every_epoch(case):
    """`.weights.h5` files of every epoch, which `callback.model.load_weights` reads back into the variables"""
    keep = keras.callbacks.ModelCheckpoint(case.folder / "{epoch}.weights.h5", save_weights_only=True)
    case.minimize([keep], steps=3)
    assert sorted(path.name for path in case.folder.iterdir()) == [f"{epoch}.weights.h5" for epoch in (1, 2, 3)]
    for epoch in (1, 3, 2):
        keep.model.load_weights(case.folder / f"{epoch}.weights.h5")
        case.assert_variables(point(*[0.25] * epoch))


@check("ModelCheckpoint")
def whole_models(case):
    """`.keras` files, which `keras.models.load_model` makes a model of, with the optimizer and its state"""
    optimizer = keras.optimizers.Adam(0.25)
    states = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: states.append(
            [np.asarray(v.value) for v in (*look.model.weights, *optimizer.variables)]
        )
    )
    case.minimize([keras.callbacks.ModelCheckpoint(case.folder / "{epoch}.keras"), look], optimizer=optimizer, steps=3)
    for epoch in (1, 2, 3):
        model = keras.models.load_model(case.folder / f"{epoch}.keras")
        assert [variable.name for variable in model.weights] == ["x", "y"]
        assert int(model.optimizer.iterations) == epoch
        found = [np.asarray(variable.value) for variable in (*model.weights, *model.optimizer.variables)]
        for array, expected in zip(found, states[epoch - 1], strict=True):
            np.testing.assert_array_equal(array, expected)


@check("ModelCheckpoint")
def best_epoch(case):
    """`save_best_only` keeps the variables of the epoch with the best `loss`"""
    keep = keras.callbacks.ModelCheckpoint(
        case.folder / "best.weights.h5", monitor="loss", save_best_only=True, save_weights_only=True
    )
    case.minimize([down_and_up(), keep], steps=6)
    case.assert_variables(point(*RATES[:6]))
    keep.model.load_weights(case.folder / "best.weights.h5")
    case.assert_variables(point(*RATES[:3]))


@check("ModelCheckpoint")
def every_third_step(case):
    """`save_freq=n` saves at every n-th step"""
    path = case.folder / "{epoch}-{batch}.weights.h5"
    keep = keras.callbacks.ModelCheckpoint(path, save_weights_only=True, save_freq=3)
    case.minimize([keep], steps=7, epoch_length=4)
    assert sorted(path.name for path in case.folder.iterdir()) == ["1-3.weights.h5", "2-2.weights.h5"]
    for name, step in (("1-3", 3), ("2-2", 6)):
        keep.model.load_weights(case.folder / f"{name}.weights.h5")
        case.assert_variables(point(*[0.25] * step))


@check("ModelCheckpoint")
def old_format(case):
    """the old `.h5` format of whole models is refused"""
    with pytest.raises(ValueError, match=r"must end in `\.keras`"):
        case.minimize([keras.callbacks.ModelCheckpoint(case.folder / "model.h5")])
    assert not any(case.folder.iterdir())


@check("ModelCheckpoint")
def best_of_nothing(case):
    """a `monitor` of `save_best_only` that the logs do not have ends the run with a sentence"""
    refused_monitor(case, keras.callbacks.ModelCheckpoint(case.folder / "model.keras", save_best_only=True))


@check("OrbaxCheckpoint", since="3.14")
def state_of_every_epoch(case):
    """the variables and the state of the optimizer go to Orbax at every epoch"""
    orbax = mock.MagicMock()
    case.monkeypatch.setitem(sys.modules, "orbax.checkpoint", orbax)
    keep = keras.callbacks.OrbaxCheckpoint(str(case.folder), save_on_background=False)
    case.minimize([keep], optimizer=keras.optimizers.SGD(0.25, name="descent"), steps=3)
    calls = orbax.v1.training.Checkpointer.return_value.method_calls
    saved = [arguments for name, arguments, _ in calls if name.startswith("save_")]
    assert [epoch for epoch, _ in saved] == [0, 1, 2]
    for epoch, payload in saved:
        state = payload.get("pytree", payload)
        assert state["optimizer_variables"]["descent"]["iteration"] == epoch + 1
        for name, expected in point(*[0.25] * (epoch + 1)).items():
            np.testing.assert_array_equal(state["trainable_variables"][name], expected)


@check("OrbaxCheckpoint", since="3.14")
def what_orbax_cannot_save(case):
    """an optimizer that is not of Keras 3 is refused, and a `monitor` of `save_best_only` that the logs do not have"""
    case.monkeypatch.setitem(sys.modules, "orbax.checkpoint", mock.MagicMock())
    case.refused(
        [keras.callbacks.OrbaxCheckpoint(str(case.folder))],
        "`optimizer` must be one of Keras 3, whose state can be saved, for OrbaxCheckpoint, received an object of type"
        " PlainDescent.",
        optimizer=PlainDescent(),
    )
    refused_monitor(case, keras.callbacks.OrbaxCheckpoint(str(case.folder), save_best_only=True))


@check("OrbaxCheckpoint", since="3.14")
def package_of_orbax(case):
    """without the package orbax-checkpoint Keras says how to install it"""
    case.monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"^OrbaxCheckpoint requires the 'orbax-checkpoint' package"):
        keras.callbacks.OrbaxCheckpoint(str(case.folder))


@check("ProgbarLogger")
def progress(case):
    """prints the number of every epoch and a bar with its logs"""
    case.minimize([keras.callbacks.ProgbarLogger()], steps=3)
    title, *epochs = re.split(r"^Epoch ", case.capsys.readouterr().out, flags=re.MULTILINE)
    assert title == ""
    assert [epoch.partition("\n")[0] for epoch in epochs] == ["1/3", "2/3", "3/3"]
    assert [{*re.findall(r"loss: ([\d.]+)", epoch)} for epoch in epochs] == [{"24.0000"}, {"6.0000"}, {"1.5000"}]


@check("ProgbarLogger")
def progress_without_an_end(case):
    """also where `max_iterations` does not tell the last epoch"""
    case.minimize([keras.callbacks.ProgbarLogger()], steps=None, stopping=tk.stopping.LossBelow(7.0))
    out = case.capsys.readouterr().out
    assert re.findall(r"^Epoch (\d+)", out, re.MULTILINE) == ["1", "2"]
    assert "loss: 6.0000" in out


@check("ReduceLROnPlateau")
def rate_after_a_plateau(case):
    """the step after `patience` epochs without a better `loss` has the smaller rate"""
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.25, patience=2, min_lr=0.125)
    history = keras.callbacks.History()
    result = case.minimize([plateau, history], rate=1.0, steps=7)  # a rate of 1 jumps to and fro at one height
    rates = [1.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.25]
    assert history.history["learning_rate"] == rates
    assert result.history["x"].tolist() == [point(*rates[: step + 1])["x"] for step in range(7)]


@check("ReduceLROnPlateau")
def plateau_without_a_rate_to_set(case):
    """an optimizer without `learning_rate` is refused"""
    refused_without_rate(case, keras.callbacks.ReduceLROnPlateau("loss"))


@check("ReduceLROnPlateau")
def plateau_of_nothing(case):
    """a `monitor` that the logs do not have ends the run with a sentence"""
    refused_monitor(case, keras.callbacks.ReduceLROnPlateau())


@check("RemoteMonitor")
def posts(case):
    """posts the logs of every epoch, as JSON or as a form"""
    expected = [
        {"epoch": epoch, "loss": value(*[0.25] * epoch), "x": float(point(*[0.25] * (epoch + 1))["x"])}
        for epoch in range(3)
    ]
    case.monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with server() as (root, received):
        case.minimize([keras.callbacks.RemoteMonitor(root, path="/json", send_as_json=True)], steps=3)
        assert [(path, json.loads(body)) for path, body in received] == [("/json", logs) for logs in expected]
        received.clear()
        case.minimize([keras.callbacks.RemoteMonitor(root, field="logs")], steps=3)
        forms = [json.loads(urllib.parse.parse_qs(body)["logs"][0]) for _, body in received]
        assert forms == expected


@check("RemoteMonitor")
def nobody_listens(case):
    """a server that cannot be reached is a warning, and the run goes on"""
    with server() as (root, _):
        pass
    case.monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.warns(UserWarning, match=f"^Could not reach RemoteMonitor root server at {root}$"):
        result = case.minimize([keras.callbacks.RemoteMonitor(root)])
    assert result.steps == 4


@check("SwapEMAWeights")
def averages(case):
    """with `swap_on_epoch=True` later callbacks and the result see the averages, and the steps go on without them"""
    path = [point(*[0.25] * step) for step in range(1, 5)]
    average, expected = path[0], [path[0]]
    for at in path[1:]:
        average = {name: np.float32(0.5) * (average[name] + at[name]) for name in at}
        expected.append(average)

    for limit in ({"steps": 4}, {"steps": None, "stopping": tk.stopping.LossBelow(value(0.25, 0.25, 0.25))}):
        seen = []
        look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs, to=seen: to.append(float(case.x)))
        optimizer = keras.optimizers.SGD(0.25, use_ema=True, ema_momentum=0.5)
        result = case.minimize([keras.callbacks.SwapEMAWeights(swap_on_epoch=True), look], optimizer=optimizer, **limit)
        assert result.history["x"].tolist() == [at["x"] for at in path]
        assert seen == [at["x"] for at in expected]
        case.assert_variables(expected[-1])
        np.testing.assert_array_equal(result.variables["y"], expected[-1]["y"])


@check("SwapEMAWeights")
def no_evaluation_to_swap_for(case):
    """`swap_on_epoch=False` is refused, and so is an optimizer without `use_ema=True`"""
    case.refused(
        [keras.callbacks.SwapEMAWeights()],
        "`swap_on_epoch` of SwapEMAWeights must be True in minimize, which evaluates no model on other data, received"
        " False.",
        optimizer=keras.optimizers.SGD(0.25, use_ema=True),
    )
    for optimizer, received in (
        (keras.optimizers.SGD(0.25), "an object of type SGD"),
        (PlainDescent(), "an object of type PlainDescent"),
    ):
        case.refused(
            [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)],
            f"`optimizer` must be one of Keras 3 with use_ema=True for SwapEMAWeights, received {received}.",
            optimizer=optimizer,
        )


@check("TensorBoard")
def events_of_every_epoch(case):
    """event files with the logs and the learning rate of every epoch"""
    events = board(case, rate=0.25)
    for epoch in range(3):
        assert events[epoch, "epoch_loss"] == value(*[0.25] * epoch)
        assert events[epoch, "epoch_x"] == point(*[0.25] * (epoch + 1))["x"]
        assert events[epoch, "epoch_learning_rate"] == 0.25
    assert {step for step, _ in events} == {0, 1, 2}


@check("TensorBoard", since="3.7")
def events_of_every_step(case):
    """`update_freq="batch"` adds those of every step"""
    events = board(case, update_freq="batch", epoch_length=2)
    found = {(step, float(loss)) for (step, tag), loss in events.items() if tag == "batch_loss"}
    assert found == {(step + 1, value(*[0.25] * step)) for step in range(3)}


@check("TensorBoard")
def histograms(case):
    """`histogram_freq=n` adds histograms of the variables at every n-th epoch"""
    events = board(case, histogram_freq=2)
    found = {(step, tag): values for (step, tag), values in events.items() if tag.endswith("/histogram")}
    assert sorted(found) == [(0, "x/histogram"), (0, "y/histogram"), (2, "x/histogram"), (2, "y/histogram")]
    for (epoch, tag), values in found.items():
        np.testing.assert_array_equal(values, point(*[0.25] * (epoch + 1))[tag[0]])


@check("TensorBoard")
def nothing_to_embed(case):
    """`embeddings_freq` is refused, and `write_steps_per_second` with an optimizer that does not count its steps"""
    case.refused(
        [keras.callbacks.TensorBoard(case.folder, embeddings_freq=1)],
        "`embeddings_freq` of TensorBoard must be 0 in minimize, which has no Embedding layer, received 1.",
    )
    case.refused(
        [keras.callbacks.TensorBoard(case.folder, write_steps_per_second=True)],
        "`optimizer` must count its iterations for TensorBoard, received an object of type PlainDescent.",
        optimizer=PlainDescent(),
    )


@check("TensorBoard")
def package_of_tensorboard(case):
    """without the package tensorboard TensorFlow says that it is missing"""
    for name in ("tensorboard", "tensorboard.summary", "tensorboard.summary.v2"):
        case.monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Exception, match="TensorBoard is not installed"):
        case.minimize([keras.callbacks.TensorBoard(case.folder)])


@check("TerminateOnNaN")
def tells_of_the_first_loss_that_is_not_finite(case):
    """tells of the first loss that is not finite, at which every run ends"""
    result = case.minimize([keras.callbacks.TerminateOnNaN()], rate=1e25)
    assert (result.steps, result.reason) == (2, tk.StopReason.NOT_FINITE)
    assert case.capsys.readouterr().out == "Batch 0: Invalid loss, terminating training\n"


@check("TerminateOnNaN", since="3.13")
def raises(case):
    """`raise_error=True` raises there"""
    with pytest.raises(RuntimeError, match=r"^NaN or Inf loss encountered at batch 0"):
        case.minimize([keras.callbacks.TerminateOnNaN(raise_error=True)], rate=1e25)
    assert (case.loop.result.steps, case.loop.result.reason) == (2, tk.StopReason.ERROR)


# What several checks use.


def break_off(error, epoch):
    def raise_at(at, logs):
        if at == epoch:
            raise error

    return keras.callbacks.LambdaCallback(on_epoch_end=raise_at)


def refused_monitor(case, callback, hint=", as minimize has no validation data"):
    sentence = (
        f"`monitor` of {type(callback).__name__} must be one of the logs loss, x, received {callback.monitor!r}{hint}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        case.minimize([callback])
    assert case.loop.result.steps == 1
    assert not any(case.folder.iterdir())


def refused_without_rate(case, callback):
    case.refused(
        [callback],
        f"`optimizer` must have a learning_rate for {type(callback).__name__}, received an object of type"
        " PlainDescent.",
        optimizer=PlainDescent(),
    )


@contextlib.contextmanager
def server():
    """Gives the address of a server and the list of the paths and bodies that it is sent."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}", received
        finally:
            listening.shutdown()
            thread.join()


def with_tensorboard(monkeypatch):
    """Plays the part of the package tensorboard, which newer TensorFlow does not bring along.

    It formats a value, and TensorFlow writes it.
    """

    def write(name, data, step=None, **how):
        metadata = tf.compat.v1.SummaryMetadata()
        metadata.plugin_data.plugin_name = "scalars"
        return tf.summary.write(name, tf.cast(data, tf.float32), step=step, metadata=metadata)

    v2 = types.SimpleNamespace(scalar=write, histogram=write, image=write)
    for name in ("tensorboard", "tensorboard.summary", "tensorboard.summary.v2"):
        monkeypatch.setitem(sys.modules, name, v2)
    projector = types.SimpleNamespace(ProjectorConfig=tf.compat.v1.SummaryMetadata)
    monkeypatch.setitem(sys.modules, "tensorboard.plugins", types.SimpleNamespace(projector=projector))


def events_in(folder):
    """Returns what the event files of a folder hold by step and tag."""
    events = {}
    for path in sorted(folder.glob("*tfevents*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for found in event.summary.value:
                assert (event.step, found.tag) not in events
                value = tf.make_ndarray(found.tensor)
                events[event.step, found.tag] = value.tolist() if value.dtype.kind in "OS" else value
    return events


def board(case, rate=0.25, epoch_length=1, **arguments):
    """Runs three steps with TensorBoard; returns what its files hold by step and tag."""
    with_tensorboard(case.monkeypatch)
    case.minimize(
        [keras.callbacks.TensorBoard(case.folder, **arguments)], rate=rate, steps=3, epoch_length=epoch_length
    )
    return events_in(case.folder / "train")


# The table.


def every_check():
    """The checks of both columns."""
    importlib.import_module("test_keras_callbacks_in_fit")
    return CHECKS


def classes():
    """The classes of `keras.callbacks` by name."""
    return dict(inspect.getmembers(keras.callbacks, inspect.isclass))


def without_entry(names):
    """A sentence for each callback that a column of the table has no check of."""
    return [
        f"keras.callbacks.{name} has no entry for {column}: add a check of it to {file}."
        for column, file in COLUMNS.items()
        for name in sorted(names)
        if name not in {item.callback for item in every_check() if item.column == column}
    ]


def table():
    """The table of the docs: a row a callback, with the phrases of its checks."""
    checks = every_check()
    lines = ["| callback | " + " | ".join(f"in `{column}`" for column in COLUMNS) + " |"]
    lines.append("| --- |" + " --- |" * len(COLUMNS))
    for name in sorted({item.callback for item in checks}, key=str.lower):
        cells = ["; ".join(i.phrase for i in checks if (i.callback, i.column) == (name, column)) for column in COLUMNS]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page():
    """The page of the docs: what is written there by hand, and the table."""
    return PAGE.read_text(encoding="utf-8").partition("| callback |")[0] + table()


def applying(column):
    """Returns what parametrizes a test by the checks of a column that apply to this Keras, and by the drivers."""
    items = [item for item in CHECKS if item.column == column and item.applies]
    by_item = pytest.mark.parametrize("item", items, ids=[f"{item.callback}-{item.run.__name__}" for item in items])
    return lambda test: pytest.mark.parametrize("driver", DRIVERS)(by_item(test))


@applying(MINIMIZE)
def test_callback_does_what_the_table_says(item, driver, tmp_path, capsys, monkeypatch):
    item.run(Case(DRIVERS[driver], tmp_path, capsys, monkeypatch))


def test_every_callback_of_keras_has_an_entry_in_the_table():
    assert without_entry(classes()) == []


def test_a_callback_that_a_newer_keras_brings_is_named():
    assert without_entry([*classes(), "Telepathy"]) == [
        f"keras.callbacks.Telepathy has no entry for {column}: add a check of it to {file}."
        for column, file in COLUMNS.items()
    ]


@pytest.mark.parametrize("column", COLUMNS)
def test_entries_of_callbacks_that_this_keras_lacks_are_for_newer_versions(column):
    assert {item.callback for item in every_check() if item.applies and item.column == column} == set(classes())


def test_the_table_in_the_docs_is_the_one_that_these_checks_make():
    command = "python -m tests.test_keras_callbacks writes it anew"
    assert PAGE.read_text(encoding="utf-8") == page(), command


def test_a_model_without_an_optimizer_of_keras_is_saved_without_it(tmp_path):
    model = VariablesModel([keras.Variable([1.0, 2.0], name="y")], PlainDescent())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer is None
    np.testing.assert_array_equal(loaded.get_weights(), [[1.0, 2.0]])


if __name__ == "__main__":
    if pytest.main([*(str(Path(__file__).with_name(file)) for file in COLUMNS.values()), "-k", "callback_does_what"]):
        sys.exit("The table is not written, as a check has failed.")
    collected = importlib.import_module("test_keras_callbacks")  # which has the checks that pytest has found
    PAGE.write_text(collected.page(), encoding="utf-8")
