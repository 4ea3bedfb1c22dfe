"""Every class of `keras.callbacks` in `loop.fit`: each check runs `keras.Model.fit` and the loop, and compares them.

A check is a program of fits that is run twice, on equal models. What it returns must be the same, and so must the
weights, the optimizer's state and `model.history`: bit for bit eagerly, to rounding compiled.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import inspect
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from test_keras_callbacks import FIT, applying, break_off, check, events_in, server, with_tensorboard

import tapekit as tk

ROUNDING = 1e-5
_RANDOM = np.random.default_rng(0)
X = _RANDOM.normal(size=(5, 2)).astype("float32")  # batches of 2, 2 and 1
Y = (X @ [[1.0], [-2.0]] + 0.5).astype("float32")
HELD_OUT = (X[:2] + 0.5, Y[:2])
FOR_KERAS = [tf.data.Dataset.from_tensor_slices(data).batch(2) for data in ((X, Y), HELD_OUT)]
"""The same data in datasets, which Keras would make of the arrays anew for every fit."""
BATCHES = 3
OPTIMIZERS = {
    "descent": lambda: keras.optimizers.SGD(0.1, momentum=0.5, name="descent"),
    "averaging": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, name="averaging"),
    "scheduled": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9), name="sgd"),
}
HOOKS = [
    *("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_train_batch_begin", "on_train_batch_end"),
    *("on_test_begin", "on_test_end", "on_test_batch_begin", "on_test_batch_end"),
]


def make_model(optimizer: str, steps_per_execution: int, eager: bool) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,), name="input"), keras.layers.Dense(1, name="last")], name="model")
    model.compile(
        OPTIMIZERS[optimizer](), "mse", metrics=["mae"], run_eagerly=eager, steps_per_execution=steps_per_execution
    )
    model.optimizer.build(model.trainable_variables)
    return model


class Subject:
    """A model with a loop, which can be brought back to where they began."""

    def __init__(self, *settings: Any) -> None:
        self.model = make_model(*settings)
        self.loop = tk.OptimizationLoop()
        self._start = [(v, v.numpy()) for v in (*self.model.variables, *self.model.optimizer.variables)]

    def reset(self) -> None:
        for variable, value in self._start:
            variable.assign(value)
        self.model._initial_epoch = None  # which BackupAndRestore leaves behind


@functools.cache
def _compiled(by: str, optimizer: str, steps_per_execution: int) -> Subject:
    """The subject of all compiled fits of a kind, so that it is compiled once."""
    return Subject(optimizer, steps_per_execution, False)


class Fit:
    """Fits a model: by Keras, or by a loop.

    Attributes:
        by: "keras" or "loop".
        model: the model.
        folder: an empty folder.
        seen: what the callbacks that `watch` gives have seen: their name, the hook, its position and logs, and
            what was at hand then.
    """

    def __init__(self, by: str, subject: Subject, folder: Path, capsys: Any) -> None:
        self.by = by
        self.model = subject.model
        self.folder = folder
        self.seen: list[Any] = []
        self.reset = subject.reset
        self._loop = subject.loop
        self._capsys = capsys
        self._begun = 0

    def __call__(self, callbacks: Any, **arguments: Any) -> Any:
        """Runs two epochs, unless the arguments say otherwise; returns what `fit` returns."""
        run = self.model.fit if self.by == "keras" else functools.partial(self._loop.fit, self.model)
        x, held_out = FOR_KERAS if self.by == "keras" else (X, HELD_OUT)
        data = {} if "x" in arguments else {"x": x} if self.by == "keras" else {"x": x, "y": Y, "batch_size": 2}
        settings = {"epochs": 2, "verbose": 0, "shuffle": False, "validation_data": held_out}
        return run(callbacks=callbacks, **(data | settings | arguments))

    def printed(self) -> str:
        """Returns what was printed since this was asked last."""
        return self._capsys.readouterr().out.replace(str(self.folder), "FOLDER")

    def watch(self, name: str = "watching", base: Any = keras.callbacks.Callback, hooks: Any = HOOKS) -> Any:
        """Returns a callback with all hooks, which adds to `seen`."""
        fit = self

        def hook_for(hook: str) -> Any:
            def see(self: Any, position: Any = None, logs: Any = None) -> None:
                getattr(base, hook)(self, *([] if position is None else [position]), logs)
                fit._see(name, hook, position, logs, self)

            if re.search("(train|test)_(begin|end)$", hook):
                return lambda self, logs=None: see(self, None, logs)
            return see

        return type("Watching", (base,), {hook: hook_for(hook) for hook in hooks})()

    def _see(self, name: str, hook: str, position: int | None, logs: Any, callback: Any) -> None:
        if hook == "on_train_batch_begin":
            self._begun = position or 0
        if hook == "on_train_batch_end" and self.by == "keras":  # which gave the first of several before Keras 3.11
            position = self._begun + self.model.steps_per_execution - 1
        at_hand = {
            "updates": int(callback.model.optimizer.iterations),
            "rate": float(callback.model.optimizer.learning_rate),
            "weights": callback.model.get_weights(),
            "params": sorted(callback.params.items()),
        }
        self.seen.append([name, hook, position, dict(logs or {}), at_hand])

    @property
    def hooks(self) -> list[Any]:
        """The hooks that were seen, without what was at hand."""
        return [item[:3] for item in self.seen]


@dataclasses.dataclass
class Case:
    """What a check works with."""

    eager: bool
    folder: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def compare(
        self,
        program: Callable[[Fit], Any],
        optimizer: str = "descent",
        steps_per_execution: int = 1,
        diverges: bool = False,
    ) -> Any:
        """Runs a program by Keras and by a loop; asserts that both did the same, and returns what it returned."""
        outcomes = []
        for by in ("keras", "loop"):
            folder = Path(tempfile.mkdtemp(prefix=by, dir=self.folder))
            settings = optimizer, steps_per_execution
            subject = Subject(*settings, True) if self.eager else _compiled(by, *settings)
            subject.reset()
            self.capsys.readouterr()
            fit = Fit(by, subject, folder, self.capsys)
            model, returned = subject.model, program(fit)
            variables = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
            outcome = {"returned": returned, "variables": variables, "history": model.history.history}
            outcomes.append({"returned": returned} if diverges else outcome)
        theirs, ours = outcomes
        assert_same(ours, theirs, 0.0 if self.eager else ROUNDING)
        return ours["returned"]


def assert_same(ours: Any, theirs: Any, rounding: float, where: str = "") -> None:
    """Asserts that two structures are the same, numbers in them to rounding."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_same(ours[key], theirs[key], rounding, f"{where}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), (where, ours, theirs)
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, rounding, f"{where}[{index}]")
    elif isinstance(theirs, (float, np.ndarray, np.floating)):
        assert np.shape(ours) == np.shape(theirs), where
        largest = np.max(np.abs(np.nan_to_num(theirs)), initial=0.01)
        np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=rounding * largest, err_msg=where)
    else:
        assert ours == theirs, where


# The checks, in the order of the table.


@check("BackupAndRestore", FIT)
def goes_on_with_the_next_epoch(case):
    """a fit after one that was broken off goes on with the next epoch, and removes the backup at its end"""

    def program(fit):
        with pytest.raises(KeyboardInterrupt):
            fit([keras.callbacks.BackupAndRestore(fit.folder / "backup"), break_off(KeyboardInterrupt, epoch=0)])
        saved = contents(fit.folder)
        fit.reset()
        fit([keras.callbacks.BackupAndRestore(fit.folder / "backup"), fit.watch()])
        assert not (fit.folder / "backup").exists()
        return saved, fit.seen

    saved, seen = case.compare(program)
    assert saved["backup/training_metadata.json"] == {"epoch": 1, "batch": 0}
    assert [position for _, hook, position, *_ in seen if hook == "on_epoch_begin"] == [1]


@check("BackupAndRestore", FIT)
def begins_the_epoch_anew(case):
    """after a backup of `save_freq=n` batches it begins the epoch anew"""

    def program(fit):
        def raise_at(batch, logs):
            if fit.model.optimizer.iterations == 5:
                raise ZeroDivisionError

        backup = functools.partial(keras.callbacks.BackupAndRestore, fit.folder / "backup", save_freq=2)
        with pytest.raises(ZeroDivisionError):
            fit([backup(), keras.callbacks.LambdaCallback(on_train_batch_end=raise_at)])
        saved = contents(fit.folder)
        fit.reset()
        fit([backup(delete_checkpoint=False), fit.watch()])
        return saved, contents(fit.folder), fit.seen

    saved, *_, seen = case.compare(program)
    assert saved["backup/training_metadata.json"] == {"epoch": 1, "batch": 0}
    assert [at_hand["updates"] for _, hook, _, _, at_hand in seen if hook == "on_epoch_begin"] == [4]


@check("BackupAndRestore", FIT)
def nothing_is_left_to_do(case):
    """a backup of the last epoch leaves none to run"""

    def program(fit):
        for _ in range(2):
            fit([keras.callbacks.BackupAndRestore(fit.folder / "backup", delete_checkpoint=False), fit.watch()])
        return contents(fit.folder), fit.hooks

    _, hooks = case.compare(program)
    assert hooks[-2:] == [["watching", "on_train_begin", None], ["watching", "on_train_end", None]]


@check("Callback", FIT)
def hooks_of_several(case):
    """every hook is called, those of validation too, in the same order with the same logs, `params`, weights and
    optimizer"""

    def program(fit):
        fit([fit.watch("one"), fit.watch("two"), fit.watch("three")], x=X, y=Y, batch_size=1, validation_data=HELD_OUT)
        return fit.seen

    seen = case.compare(program)
    assert len(seen) == 3 * (2 + 2 * (2 + 2 * len(X) + 2 + 2 * len(HELD_OUT)))
    assert [name for name, *_ in seen] == ["one", "two", "three"] * (len(seen) // 3)


@check("Callback", FIT)
def hooks_of_several_batches(case):
    """where the model is compiled with `steps_per_execution=n` the hooks of batches come once for n of them"""

    def program(fit):
        fit([fit.watch()], x=X[:3], y=Y[:3], batch_size=1)
        return fit.seen

    seen = case.compare(program, steps_per_execution=3)
    assert [item[2] for item in seen if item[1] == "on_train_batch_begin"] == [0] * 2
    assert [item[2] for item in seen if item[1] == "on_train_batch_end"] == [2] * 2


@check("Callback", FIT, since="3.7")
def hooks_of_fewer_batches(case):
    """and once for the fewer batches at the end of an epoch"""

    def program(fit):
        fit([fit.watch()], x=X, y=Y, batch_size=1)
        return fit.seen

    seen = case.compare(program, steps_per_execution=3)
    assert [item[2] for item in seen if item[1] == "on_train_batch_begin"] == [0, 3] * 2
    assert [item[2] for item in seen if item[1] == "on_train_batch_end"] == [2, 5] * 2


@check("Callback", FIT)
def stops(case):
    """`model.stop_training` takes effect after the batch or the epoch"""

    def program(fit):
        updates = []
        for hook, call in (("on_train_batch_end", 2), ("on_epoch_end", 1), ("on_test_batch_end", 1)):
            fit.reset()
            fit([stop_in(hook, call), fit.watch()])
            updates.append(int(fit.model.optimizer.iterations))
        return updates, fit.seen

    updates, _ = case.compare(program)
    assert updates == [2, 3, 3]


@check("Callback", FIT)
def errors(case):
    """an exception in a hook reaches the caller as it is; `on_train_end` is called then too, as not by Keras"""

    def program(fit):
        def fail(batch, logs):
            if batch == 1:
                raise ZeroDivisionError("at batch 1")

        with pytest.raises(ZeroDivisionError, match=r"^at batch 1$"):
            fit([fit.watch(), keras.callbacks.LambdaCallback(on_train_batch_end=fail)])
        ends = [item for item in fit.seen if item[1] == "on_train_end"]
        assert len(ends) == (fit.by == "loop")
        return [item for item in fit.seen if item not in ends]

    assert [item[1] for item in case.compare(program)][-1] == "on_train_batch_end"


@check("Callback", FIT)
def uses_of_the_model(case):
    """hooks may evaluate and predict with `self.model`, and change its weights and its learning rate"""

    def program(fit):
        class Meddling(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                self.model.optimizer.learning_rate = 0.1 / (batch + 1)

            def on_train_batch_end(self, batch, logs=None):
                if batch == 1 and not found:
                    found.append(self.model.predict(X[:2], verbose=0))
                    found.append(self.model.evaluate(X[2:], Y[2:], verbose=0))  # which resets the metrics

            def on_epoch_end(self, epoch, logs=None):
                self.model.set_weights([0.5 * weight for weight in self.model.get_weights()])

        found: list[Any] = []
        fit([Meddling(), fit.watch()])
        return found, fit.seen

    found, _ = case.compare(program)
    assert len(found) == 2


@check("Callback", FIT)
def old_names(case):
    """`on_batch_begin` and `on_batch_end` are called too"""

    def program(fit):
        seen: list[Any] = []

        class Old(keras.callbacks.Callback):
            def on_batch_begin(self, batch, logs=None):
                seen.append(["begin", batch, dict(logs)])

            def on_batch_end(self, batch, logs=None):
                seen.append(["end", batch, dict(logs)])

        fit([Old()])
        return seen

    assert len(case.compare(program)) == 2 * 2 * BATCHES


@check("Callback", FIT)
def parameters(case):
    """`params` tell the epochs, `verbose` and the batches of an epoch if they are known"""

    def program(fit):
        params = []
        for arguments in ({"x": unsized()}, {"steps_per_epoch": 2}, {"verbose": 2}, {"epochs": 5, "initial_epoch": 4}):
            watching = fit.watch(hooks=())
            fit.reset()
            fit([watching], **({"epochs": 1} | arguments))
            params.append(sorted(watching.params.items()))
        return params

    params = case.compare(program)
    assert [dict(items)["steps"] for items in params] == [None, 2, BATCHES, BATCHES]


@check("CallbackList", FIT)
def several_in_a_list(case):
    """the callbacks in it are called"""

    def program(fit):
        params = {"model": fit.model, "epochs": 2, "steps": BATCHES, "verbose": 0}
        for wrap in (lambda several: several, lambda several: [several]):
            history = keras.callbacks.History()
            fit(wrap(keras.callbacks.CallbackList([stop_in("on_epoch_end", 1), fit.watch(), history], **params)))
        return history.history, fit.seen

    history, _ = case.compare(program)
    assert len(history["loss"]) == 1


@check("CSVLogger", FIT)
def rows(case):
    """one row an epoch, with validation; `append=True` goes on in the same file"""

    def program(fit):
        fit([keras.callbacks.CSVLogger(fit.folder / "whole.csv")])
        for _ in range(2):
            fit([keras.callbacks.CSVLogger(fit.folder / "gaps.csv", ";", append=True)], validation_freq=2)
        return table_in(fit.folder / "whole.csv", ","), table_in(fit.folder / "gaps.csv", ";")

    whole, gaps = case.compare(program)
    assert list(whole[0]) == ["epoch", "loss", "mae", "val_loss", "val_mae"]
    assert [row["epoch"] for row in whole] == [0.0, 1.0]
    assert [(row["epoch"], row["val_mae"] == "NA") for row in gaps] == [(0.0, True), (1.0, False)] * 2


@check("EarlyStopping", FIT)
def stops_and_restores(case):
    """stops after `patience` epochs without a better `val_loss`, from `start_from_epoch` on, and restores the weights
    of the best epoch"""

    def program(fit):
        stop = keras.callbacks.EarlyStopping(
            patience=2, start_from_epoch=1, min_delta=1e-3, restore_best_weights=True, verbose=1
        )
        fit([down_and_up(), stop, fit.watch(hooks=HOOKS[2:])], epochs=9)
        return stop.best_epoch, stop.stopped_epoch, stop.best, fit.printed(), fit.seen

    best, stopped, *_ = case.compare(program)
    assert (best, stopped) == (2, 4)


@check("EarlyStopping", FIT)
def other_monitors(case):
    """`baseline` and `mode` mean the same; a `monitor` that the logs do not have is the same warning"""

    def program(fit):
        up = keras.callbacks.LearningRateScheduler(lambda epoch, rate: -0.1)
        stops = [
            keras.callbacks.EarlyStopping(baseline=1e-6, patience=1),
            keras.callbacks.EarlyStopping("val_mae", mode="min", restore_best_weights=True),
        ]
        for stop in stops:
            fit.reset()
            fit([up, stop, fit.watch(hooks=HOOKS[2:])], epochs=2)
        with pytest.warns(UserWarning, match="Early stopping conditioned on metric `accuracy` which is not available"):
            fit([keras.callbacks.EarlyStopping("accuracy", mode="max")], epochs=1)
        return [stop.stopped_epoch for stop in stops], fit.seen

    stopped, _ = case.compare(program)
    assert stopped == [1, 1]


@check("History", FIT)
def epochs(case):
    """one row an epoch, with validation and the learning rate that another callback adds; subclasses too"""

    class Doubled(keras.callbacks.History):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(2 * epoch, logs)

    def program(fit):
        history, doubled = keras.callbacks.History(), Doubled()
        fit([keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5 * rate), history], validation_freq=[2])
        fit([history], epochs=4, initial_epoch=3)
        fit([doubled])
        assert fit.model.history is doubled
        return history.history, history.epoch, doubled.history, doubled.epoch

    history, epochs, doubled, doubled_epochs = case.compare(program)
    rows = {name: len(values) for name, values in history.items()}
    assert rows == {"loss": 3, "mae": 3, "learning_rate": 2, "val_loss": 2, "val_mae": 2}
    assert (epochs, doubled_epochs, len(doubled["loss"])) == ([3], [0, 2], 2)


@check("LambdaCallback", FIT)
def functions(case):
    """each of its functions is called, with the logs of the batch or epoch"""

    def program(fit):
        seen: list[Any] = []
        ends = ("on_train_begin", "on_train_end")
        functions: dict[str, Any] = {
            hook: lambda position, logs, hook=hook: seen.append([hook, position, dict(logs)]) for hook in HOOKS[2:6]
        }
        functions |= {hook: lambda logs, hook=hook: seen.append([hook, dict(logs)]) for hook in ends}
        fit([keras.callbacks.LambdaCallback(**functions)])
        return seen

    assert len(case.compare(program)) == 2 + 2 * 2 * (1 + BATCHES)


@check("LearningRateScheduler", FIT)
def rate_of_every_epoch(case):
    """sets the rate with which the very epoch is run"""

    def program(fit):
        schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (epoch + 2), verbose=1)
        fit([schedule, fit.watch(hooks=HOOKS[2:])])
        return fit.printed(), fit.seen, fit.model.history.history["learning_rate"]

    printed, _, rates = case.compare(program)
    assert printed.count("setting learning rate to") == 2
    np.testing.assert_allclose(rates, [0.1 / 2, 0.1 / 6], rtol=1e-6)


@check("LearningRateScheduler", FIT)
def optimizer_with_a_schedule(case):
    """for an optimizer with a schedule of its own Keras raises"""

    def program(fit):
        with pytest.raises(TypeError, match="LearningRateSchedule") as caught:
            fit([keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1)])
        fit([])
        return str(caught.value), fit.model.optimizer.learning_rate.numpy()

    case.compare(program, optimizer="scheduled")


@check("ModelCheckpoint", FIT)
def files_of_every_epoch(case):
    """`.weights.h5` and `.keras` files of the same names and contents, the state of the optimizer included"""

    def program(fit):
        weights = fit.folder / "{epoch}-{val_loss:.2f}.weights.h5"
        keep = [
            keras.callbacks.ModelCheckpoint(weights, save_weights_only=True, verbose=1),
            keras.callbacks.ModelCheckpoint(fit.folder / "{epoch}.keras"),
        ]
        fit(keep)
        loaded = keras.models.load_model(fit.folder / "2.keras")
        for value, expected in zip(loaded.get_weights(), fit.model.get_weights(), strict=True):
            np.testing.assert_array_equal(value, expected)
        return contents(fit.folder), fit.printed(), int(loaded.optimizer.iterations)

    found, _, iterations = case.compare(program)
    assert iterations == 2 * BATCHES
    names = [re.sub(r"-[\d.]+\.w", "-?.w", name) for name in found]
    assert names == ["1-?.weights.h5", "1.keras", "2-?.weights.h5", "2.keras"]


@check("ModelCheckpoint", FIT)
def best_epoch(case):
    """`save_best_only` keeps the epochs with the best `val_loss` so far, below `initial_value_threshold`"""

    def program(fit):
        path = functools.partial(str.format, str(fit.folder / "{}-{{epoch}}.keras"))
        keep = functools.partial(keras.callbacks.ModelCheckpoint, save_best_only=True, verbose=1)
        fit([down_and_up(), keep(path("best")), keep(path("none"), initial_value_threshold=1e-6)], epochs=4)
        return contents(fit.folder), fit.printed()

    found, printed = case.compare(program)
    assert list(found) == ["best-1.keras", "best-2.keras", "best-3.keras"]
    assert printed.count("did not improve") == 1 + 4


@check("ModelCheckpoint", FIT)
def files_of_batches(case):
    """`save_freq=n` saves after every n batches"""

    def program(fit):
        path = fit.folder / "{epoch}-{batch}-{loss:.2f}.weights.h5"
        keep = keras.callbacks.ModelCheckpoint(path, save_freq=2, save_weights_only=True)
        fit([keep], x=X, y=Y, batch_size=1)
        return contents(fit.folder)

    assert [name[:3] for name in case.compare(program)] == ["1-2", "1-4", "2-1", "2-3", "2-5"]


@check("ModelCheckpoint", FIT, since="3.11")
def files_of_several_batches(case):
    """with `steps_per_execution` when these have been run"""

    def program(fit):
        path = fit.folder / "{epoch}-{batch}.weights.h5"
        keep = keras.callbacks.ModelCheckpoint(path, save_freq=4, save_weights_only=True)
        fit([keep], x=X[:3], y=Y[:3], batch_size=1)
        return contents(fit.folder)

    assert list(case.compare(program, steps_per_execution=3)) == ["2-3.weights.h5"]


@check("OrbaxCheckpoint", FIT, since="3.14")
def state_for_orbax(case):
    """the same state goes to Orbax, at every epoch, after every n batches or at the best epochs"""

    def program(fit):
        saved = []
        for arguments in ({}, {"save_freq": 2, "save_weights_only": True}, {"save_best_only": True}):
            fit.reset()
            orbax = mock.MagicMock()
            case.monkeypatch.setitem(sys.modules, "orbax.checkpoint", orbax)
            fit([down_and_up(), keras.callbacks.OrbaxCheckpoint("", save_on_background=False, **arguments)], epochs=4)
            calls = orbax.v1.training.Checkpointer.return_value.method_calls
            saved.append([[name, *plain(positional)] for name, positional, _ in calls])
        return saved

    positions = [[call[1] for call in calls if call[0].startswith("save_")] for calls in case.compare(program)]
    assert positions == [[0, 1, 2, 3], [2, 4, 6, 8, 10, 12], [0, 1, 2]]


@check("ProgbarLogger", FIT)
def progress(case):
    """prints the same lines for each `verbose`, and where the number of batches is not known; before Keras 3.15 the
    numbers of a bar are averages over its updates, which are fewer here"""
    averages = not case.eager and "stateless_metrics" not in inspect.signature(keras.utils.Progbar).parameters

    def program(fit):
        fit([], verbose=1, epochs=1, x=unsized())
        printed = [last_states(fit.printed())]
        for verbose, callbacks in ((0, []), (1, []), ("auto", [keras.callbacks.ProgbarLogger()]), (2, [])):
            fit.reset()
            fit(callbacks, verbose=verbose)
            printed.append(last_states(fit.printed()))
        return [[re.sub(r" (loss|mae): [\d.]+", "", line) if averages else line for line in lines] for lines in printed]

    printed = case.compare(program)
    titles = ["Epoch 1/2", "Epoch 2/2"]
    assert [[line for line in lines if "Epoch" in line] for lines in printed] == [[], [], titles, titles, titles]
    assert [len([line for line in lines if "val_mae:" in line]) for lines in printed] == [1, 0, 2, 2, 2]


@check("ReduceLROnPlateau", FIT)
def rate_after_a_plateau(case):
    """the epoch after `patience` epochs without a better `val_loss` has the smaller rate"""

    def program(fit):
        plateau = keras.callbacks.ReduceLROnPlateau(factor=0.25, min_delta=100.0, patience=1, cooldown=1, verbose=1)
        fit([plateau, fit.watch(hooks=HOOKS[2:])], epochs=5)
        return fit.printed(), fit.seen, fit.model.history.history["learning_rate"]

    printed, _, rates = case.compare(program)
    assert len(set(rates)) > 2
    assert printed.count("ReduceLROnPlateau reducing learning rate") >= 2


@check("RemoteMonitor", FIT)
def posts(case):
    """posts the logs of every epoch; a server that cannot be reached is a warning"""
    case.monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def program(fit):
        with server() as (root, received):
            fit([keras.callbacks.RemoteMonitor(root, path="/json", send_as_json=True)])
        with pytest.warns(UserWarning, match="^Could not reach RemoteMonitor root server at"):
            fit([keras.callbacks.RemoteMonitor(root)])
        return [[path, json.loads(body)] for path, body in received]

    assert [list(logs) for _, logs in case.compare(program)] == 2 * [["epoch", "loss", "mae", "val_loss", "val_mae"]]


@check("SwapEMAWeights", FIT)
def averages_in_validation(case):
    """validation sees the averages, the steps go on without them, and the model has them at the end"""

    def program(fit):
        fit([keras.callbacks.SwapEMAWeights(), fit.watch()])
        return fit.seen

    seen = case.compare(program, optimizer="averaging")
    kernels = {(hook, at_hand["updates"]): at_hand["weights"][0] for _, hook, _, _, at_hand in seen}
    np.testing.assert_allclose(kernels["on_epoch_end", 3], kernels["on_train_batch_end", 3], rtol=1e-5)
    assert np.all(np.abs(kernels["on_test_batch_end", 3] - kernels["on_epoch_end", 3]) > 1e-3)
    np.testing.assert_allclose(kernels["on_train_end", 6], kernels["on_test_batch_end", 6], rtol=1e-5)


@check("SwapEMAWeights", FIT)
def averages_in_files(case):
    """with `swap_on_epoch=True` later callbacks see them too, such as ModelCheckpoint"""

    def program(fit):
        keep = keras.callbacks.ModelCheckpoint(fit.folder / "{epoch}.weights.h5", save_weights_only=True)
        for more in ({"validation_data": None}, {}):
            fit([keras.callbacks.SwapEMAWeights(swap_on_epoch=True), keep, fit.watch()], **more)
        return contents(fit.folder), fit.seen

    case.compare(program, optimizer="averaging")


@check("SwapEMAWeights", FIT)
def no_averages(case):
    """for an optimizer without `use_ema=True` Keras raises"""

    def program(fit):
        with pytest.raises(ValueError, match="must be used when `use_ema=True` is set on the optimizer"):
            fit([keras.callbacks.SwapEMAWeights()])
        return int(fit.model.optimizer.iterations)

    assert case.compare(program) == BATCHES


@check("TensorBoard", FIT)
def events_of_every_epoch(case):
    """the same events of training and validation, with the learning rate and the model; not the graph of the step that
    older TensorFlow adds"""
    events = board(case)
    scalars = [("train", "epoch_learning_rate")]
    scalars += [(part, f"epoch_{name}") for part in ("train", "validation") for name in ("loss", "mae")]
    scalars += [("validation", f"evaluation_{name}_vs_iterations") for name in ("loss", "mae")]
    assert {(part, tag) for part, _, tag in events} == {*scalars, ("train", "keras")}


@check("TensorBoard", FIT, since="3.7")
def events_of_batches(case):
    """`update_freq="batch"` or n adds those of batches"""
    for freq, steps in (("batch", [1, 2, 3, 4, 5, 6]), (4, [4])):
        assert [step for _, step, tag in board(case, update_freq=freq) if tag == "batch_loss"] == steps


@check("TensorBoard", FIT)
def weights_in_events(case):
    """histograms and images of the weights, embeddings, the speed, and a profile"""
    every = {"histogram_freq": 1, "embeddings_freq": 1, "write_images": True, "write_steps_per_second": True}
    events = board(case, **every, profile_batch=2)
    tags = [re.sub(".*/|-.*", "", tag) for _, _, tag in events]
    counts = {"histogram": 4, "image": 2, "epoch_steps_per_second": 2, "keras_embedding.ckpt": 2, "profile": 1}
    assert {tag: tags.count(tag) for tag in counts} == counts


@check("TerminateOnNaN", FIT)
def stops_at_the_batch(case):
    """stops at the first batch whose loss is not finite"""

    def program(fit):
        fit([keras.callbacks.TerminateOnNaN(), fit.watch()], x=spoiled(), y=Y, batch_size=2)
        return fit.printed(), [hook[:2] for hook in fit.seen]  # the loop, unlike Keras, updates nothing at that batch

    assert case.compare(program, diverges=True)[0] == "Batch 1: Invalid loss, terminating training\n"


@check("TerminateOnNaN", FIT, since="3.13")
def raises(case):
    """`raise_error=True` raises there"""

    def program(fit):
        with pytest.raises(RuntimeError, match=r"^NaN or Inf loss encountered at batch 1\.") as caught:
            fit([keras.callbacks.TerminateOnNaN(raise_error=True)], x=spoiled(), y=Y, batch_size=2)
        return str(caught.value)

    assert "batch 1" in case.compare(program, diverges=True)


# What several checks use.


def down_and_up():
    """Returns a callback with which the third epoch is the best one."""
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 if epoch < 3 else -0.1)


def stop_in(hook, call):
    """Returns a callback that stops training in a hook when it is called for the n-th time."""
    calls = []

    def stop(self, *args, **kwargs):
        calls.append(hook)
        if len(calls) == call:
            self.model.stop_training = True

    return type("Stopping", (keras.callbacks.Callback,), {hook: stop})()


def spoiled():
    """Returns inputs whose second batch gives no finite loss."""
    inputs = X.copy()
    inputs[2] = np.nan
    return inputs


def unsized():
    """Returns a dataset that does not know how many batches it has."""
    return tf.data.Dataset.from_tensor_slices((X, Y)).filter(lambda x, y: True).batch(2)


def contents(folder):
    """Returns what the files of a folder hold, by their paths."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def content(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("config.json")), arrays_in(archive.open("model.weights.h5"))
    return arrays_in(path)


def arrays_in(path):
    """Returns the arrays of an h5 file by name."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def table_in(path, delimiter):
    """Returns the rows of a CSV file, with numbers where it has them."""

    def number(text):
        with contextlib.suppress(ValueError):
            return float(text)
        return text

    with open(path, newline="") as file:
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file, delimiter=delimiter)]


def last_states(printed):
    """Returns the last state of each line, without times and colours."""
    lines = [re.split("[\r\b]+", line)[-1] for line in re.sub("\x1b\\[[0-9;]*m", "", printed).split("\n")]
    return [re.sub(r"\b\d+(us|ms|s)(/step|/epoch)?", "T", line) for line in lines]


def plain(value):
    """Returns a structure of arrays and variables with arrays alone."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float)) else np.asarray(value)


def board(case, **arguments):
    """Compares what TensorBoard writes in a fit by Keras and by a loop; returns it by part, step and tag."""
    with_tensorboard(case.monkeypatch)

    def program(fit):
        fit([keras.callbacks.TensorBoard(fit.folder / "board", **arguments)])
        events: dict[Any, Any] = {}
        for folder in (fit.folder / "board" / "train", fit.folder / "board" / "validation"):
            for (step, tag), value in events_in(folder).items():
                is_same = not re.search("_per_second|^batch_[0-9]", tag)  # rather than a speed, or a graph of ops
                events[folder.name, step, tag] = value if is_same else None
            events |= {(folder.name, None, path.name): arrays_in(path) for path in sorted(folder.glob("*.h5"))}
        profiles = {("", None, path.name): None for path in (fit.folder / "board").rglob("plugins/profile")}
        return events | profiles

    return case.compare(program)


@applying(FIT)
def test_callback_does_what_it_does_in_fit_of_keras(item, driver, tmp_path, capsys, monkeypatch):
    item.run(Case(driver == "eager", tmp_path, capsys, monkeypatch))
