"""Runs that are saved, killed and gone on with."""

from __future__ import annotations

import csv
import errno
import functools
import itertools
import json
import logging
import os
import pickle
import random
import shutil
import signal
import time

import keras
import long_runs
import numpy as np
import pytest
import tensorflow as tf
from long_runs import same_bits
from problems import rosenbrock

import tapekit as tk

DRIVERS = {"xla": {"jit_compile": True}, "graph": {"jit_compile": False}, "eager": {"run_eagerly": True}}


class Crash(tk.Callback):
    """Raises at a step."""

    def __init__(self, at):
        super().__init__()
        self.every = at

    def on_step(self, step, logs):
        raise RuntimeError("crash")


class Remember(tk.Callback):
    """Keeps what it sees in a list that others may hold too."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def on_step(self, step, logs):
        self.seen.append((step, logs["loss"], random.random()))


class Setting:
    """A function, its optimizer, and a loop that may save and go on."""

    def __init__(
        self, directory=None, n=60, at=None, size=4, dtype="float64", optimizer=None, callbacks=(), **settings
    ):
        keras.utils.set_random_seed(0)
        self.x = tf.Variable(np.full(size, -1.0), dtype=dtype, name="x")
        self.optimizer = optimizer or keras.optimizers.Adam(0.05)
        self.seen = []
        self.callbacks = [Remember(self.seen), *callbacks]
        if directory is not None:
            self.callbacks.append(tk.callbacks.Checkpoint(directory, every=10))
        if at:
            self.callbacks.append(Crash(at))
        settings.setdefault("stopping", tk.stopping.LossPlateau(1000))
        settings.setdefault("jit_compile", False)  # which is traced sooner; the drivers are compared above
        self.loop = tk.OptimizationLoop(self.optimizer, max_iterations=n, **settings)

    def loss(self):
        return rosenbrock(self.x)

    def run(self, resume_from=None, **settings):
        return self.loop.minimize(self.loss, [self.x], self.callbacks, resume_from=resume_from, **settings)


def _crash(directory, at, **settings):
    setting = Setting(directory, at=at, **settings)
    with pytest.raises(RuntimeError, match="crash"):
        setting.run(directory)
    return setting


def _everything(setting, result):
    slots = [np.asarray(variable) for variable in setting.optimizer.variables]
    best = [result.best_loss, result.best_variables]
    numbers = [result.loss, result.steps, result.evaluations, result.reason, result.message]
    return [result.variables, slots, result.history, best, numbers, setting.seen]


@functools.cache
def _expected_of(driver):
    whole = Setting(**DRIVERS[driver])
    return _everything(whole, whole.run())


def _steps(directory):
    return sorted(int(path.name.rpartition("-")[2]) for path in directory.iterdir())


@pytest.mark.parametrize(("run", "kills", "window"), [(long_runs.minimize, 20, 0.5), (long_runs.fit, 10, 1.2)])
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_that_was_not(run, kills, window, tmp_path):
    expected = long_runs.in_child(run, None)
    moments, killed = random.Random(4), 0
    while killed < kills:
        outcome = long_runs.in_child(run, str(tmp_path / "saved"), moments.uniform(0.0, window))
        killed += outcome is None
        if outcome is not None:
            assert same_bits(outcome, expected)
            shutil.rmtree(tmp_path / "saved")
    assert same_bits(long_runs.in_child(run, str(tmp_path / "saved")), expected)


@pytest.mark.parametrize("at", [10, 17, 43])
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_run_that_goes_on_equals_one_that_never_stopped(driver, at, tmp_path):
    expected = _expected_of(driver)
    _crash(tmp_path, at, **DRIVERS[driver])
    setting = Setting(tmp_path, **DRIVERS[driver])
    assert same_bits(_everything(setting, setting.run(tmp_path)), expected)


def test_going_on_traces_the_step_once_and_saves_no_more_than_is_due(tmp_path, monkeypatch):
    saved = []
    write = tk.callbacks._checkpoint.Store.write
    monkeypatch.setattr(
        tk.callbacks._checkpoint.Store,
        "write",
        lambda self, step, *rest: (saved.append(step), write(self, step, *rest)),
    )
    _crash(tmp_path, 25)
    assert saved == [10, 20]
    setting = Setting(tmp_path)
    setting.run(tmp_path)
    assert setting.loop.traces == 1
    assert saved == [10, 20, 30, 40, 50, 60]


class Heavy(tk.Step):
    """A strategy with a state of its own, a velocity."""

    provides = frozenset({"gradients"})

    def build(self, variables):
        self.velocity = [tf.Variable(tf.zeros_like(tf.convert_to_tensor(v)), name="velocity") for v in variables]

    def reset(self):
        for velocity in self.velocity:
            velocity.assign(tf.zeros_like(velocity))

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        gradients = problem.transform(gradients)
        for velocity, gradient in zip(self.velocity, gradients, strict=True):
            velocity.assign(0.9 * velocity + gradient)
        problem.apply([tf.identity(velocity) for velocity in self.velocity])
        return logs


@pytest.mark.parametrize(
    "make",
    {
        "a strategy with a state": lambda: {"step": Heavy(), "optimizer": keras.optimizers.SGD(1e-4)},
        "criteria inside others": lambda: {
            "stopping": [tk.stopping.LossPlateau(30).after(5) | tk.stopping.LossChangeBelow(1e-12).for_steps(3)]
        },
        "a schedule": lambda: {"optimizer": keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(1e-4, 60))},
        "rollback": lambda: {"on_nonfinite": "rollback"},
        "no best": lambda: {"keep_best": False},
        "gradient callbacks": lambda: {
            "callbacks": [tk.callbacks.GradientNoise(0.1), tk.callbacks.GradientStatistics(every=4)]
        },
    }.items(),
    ids=lambda item: item[0],
)
def test_every_part_of_a_run_goes_on(make, tmp_path):
    whole = Setting(**make[1]())
    expected = _everything(whole, whole.run())
    _crash(tmp_path, 33, **make[1]())
    setting = Setting(tmp_path, **make[1]())
    assert same_bits(_everything(setting, setting.run(tmp_path)), expected)


def test_a_rolled_back_run_goes_on_with_its_rate_and_count(tmp_path):
    def make(directory=None, at=None):
        setting = Setting(
            directory, n=40, at=at, on_nonfinite=tk.Rollback(0.5, 2), optimizer=keras.optimizers.SGD(1e-4)
        )
        plain, nan = setting.loss, tf.constant(np.nan, tf.float64)
        setting.loss = lambda: plain() * tf.where(setting.x[0] > -0.965, nan, tf.ones_like(nan))
        return setting

    whole = make()
    expected = _everything(whole, whole.run())
    assert "rolled back 2 times" in expected[4][4]
    step = int(np.flatnonzero(np.isnan(expected[2]["loss"]))[1])
    with pytest.raises(RuntimeError, match="crash"):
        make(tmp_path, at=step).run(tmp_path)
    setting = make(tmp_path)
    assert same_bits(_everything(setting, setting.run(tmp_path)), expected)


# Data of every kind.

X = np.random.default_rng(0).normal(size=(100, 8)).astype("float32")
Y = (X.sum(1, keepdims=True) > 0).astype("float32")


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[index * 16 : index * 16 + 16], Y[index * 16 : index * 16 + 16]


def _endless():
    for index in itertools.cycle(range(6)):
        yield X[index * 16 : index * 16 + 16], Y[index * 16 : index * 16 + 16]


def _dataset(repeat=False):
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(50).batch(16)
    return dataset.repeat() if repeat else dataset


DATA = {
    "arrays": lambda: {"x": X, "y": Y, "batch_size": 16},
    "parts of a pass": lambda: {"x": X[:96], "y": Y[:96], "batch_size": 16, "steps_per_epoch": 3},
    "streamed arrays": lambda: {"x": X, "y": Y, "batch_size": 16, "device_bytes": 0},
    "a dataset": lambda: {"x": _dataset(), "shuffle": False},
    "an endless dataset": lambda: {"x": _dataset(repeat=True), "shuffle": False, "steps_per_epoch": 5},
    "a PyDataset": lambda: {"x": Pairs()},
    "a generator": lambda: {"x": _endless(), "shuffle": False, "steps_per_epoch": 7},
}


class Fit:
    """A model with state of every kind, and a loop that may save and go on."""

    def __init__(self, data, directory=None, at=None, epochs=3, eager=False, layers=(), callbacks=()):
        keras.utils.set_random_seed(3)
        layers = layers or [
            keras.layers.Dense(8, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1, "sigmoid"),
        ]
        self.model = keras.Sequential([keras.Input((8,)), *layers])
        self.model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"], run_eagerly=eager)
        self.seen = []
        self.callbacks = [Remember(self.seen), keras.callbacks.ReduceLROnPlateau("loss", patience=1), *callbacks]
        if directory is not None:
            self.callbacks.append(tk.callbacks.Checkpoint(directory, every=3))
        if at:
            self.callbacks.append(Crash(at))
        self.settings = DATA[data]() | {"epochs": epochs, "verbose": 0, "validation_data": (X, Y)}
        self.loop = tk.OptimizationLoop(jit_compile="auto" if data == "arrays" else False)

    def run(self, resume_from=None):
        result = self.loop.fit(self.model, callbacks=self.callbacks, resume_from=resume_from, **self.settings)
        variables = [np.asarray(v) for v in (*self.model.variables, *self.model.optimizer.variables)]
        return [variables, result.history, result.epoch_history, result.loss, result.steps, result.message, self.seen]


@functools.cache
def _expected(data):
    return Fit(data).run()


# In the middle of an epoch, at its end, and after it.
@pytest.mark.parametrize(
    ("data", "at"), [*((data, 8) for data in DATA), ("arrays", 4), ("arrays", 7), ("a dataset", 7)]
)
def test_a_fit_that_goes_on_equals_one_that_never_stopped(data, at, tmp_path):
    expected = _expected(data)
    with pytest.raises(RuntimeError, match="crash"):
        Fit(data, tmp_path, at=at).run(tmp_path)
    assert same_bits(Fit(data, tmp_path).run(tmp_path), expected)


def test_an_eager_fit_goes_on(tmp_path):
    expected = Fit("arrays", eager=True).run()
    with pytest.raises(RuntimeError, match="crash"):
        Fit("arrays", tmp_path, at=8, eager=True).run(tmp_path)
    assert same_bits(Fit("arrays", tmp_path, eager=True).run(tmp_path), expected)


def test_a_fit_that_had_ended_goes_on_to_more_epochs(tmp_path):
    expected = Fit("arrays", epochs=4).run()
    ended = Fit("arrays", tmp_path, epochs=2).run(tmp_path)
    assert same_bits(Fit("arrays", tmp_path, epochs=2).run(tmp_path), ended)
    assert same_bits(Fit("arrays", tmp_path, epochs=4).run(tmp_path), expected)


def test_a_file_of_csv_logger_is_gone_on_with(tmp_path):
    def run(name, **settings):
        logger = keras.callbacks.CSVLogger(tmp_path / name)
        return Fit("arrays", callbacks=[logger], **settings)

    run("whole.csv").run()
    with pytest.raises(RuntimeError, match="crash"):
        run("parts.csv", directory=tmp_path / "saved", at=18).run(tmp_path / "saved")
    for path in sorted((tmp_path / "saved").iterdir())[1:]:  # so that the file has a row more than a checkpoint knows
        shutil.rmtree(path)
    run("parts.csv", directory=tmp_path / "saved").run(tmp_path / "saved")
    rows = [list(csv.reader((tmp_path / name).open())) for name in ("whole.csv", "parts.csv")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


# What a checkpoint holds, and when it is made.


def test_a_run_that_had_ended_returns_at_once_unless_its_criteria_have_changed(tmp_path):
    setting = Setting(tmp_path)
    ended = _everything(setting, setting.run(tmp_path))
    again = Setting(tmp_path)
    assert same_bits(_everything(again, again.run(tmp_path)), ended)
    whole = Setting(n=90)
    expected = _everything(whole, whole.run())
    longer = Setting(tmp_path, n=90)
    assert same_bits(_everything(longer, longer.run(tmp_path)), expected)
    shorter = Setting(tmp_path, n=30)
    result = shorter.run(tmp_path)
    assert (result.steps, result.message) == (90, "MaxIterations: step 90 reached the limit of 30")


def test_the_newest_and_the_best_are_kept(tmp_path):
    class Climb(tk.Callback):
        def on_gradient(self, gradients, variables):
            return [-gradient for gradient in gradients]

    checkpoint = tk.callbacks.Checkpoint(tmp_path, every=10, keep=2)
    (tmp_path / "writing-checkpoint-000001-step-5").mkdir()
    Setting(n=55, callbacks=[checkpoint, Climb()], optimizer=keras.optimizers.SGD(1e-6)).run()
    assert _steps(tmp_path) == [10, 50, 55]
    last = tk.callbacks.Checkpoint(tmp_path / "last", every=10, keep=1, best=False)
    Setting(n=55, callbacks=[last, Climb()], optimizer=keras.optimizers.SGD(1e-6)).run()
    assert _steps(tmp_path / "last") == [55]


def test_seconds_save_without_every(tmp_path):
    checkpoint = tk.callbacks.Checkpoint(tmp_path, every=None, seconds=0.05, keep=100)
    slow = tk.callbacks.FunctionCallback(lambda step, logs: time.sleep(0.02))
    Setting(n=20, callbacks=[slow, checkpoint]).run()
    steps = _steps(tmp_path)
    assert steps[-1] == 20
    assert 3 < len(steps) < 15


def test_seconds_count_on(tmp_path):
    slow = tk.callbacks.FunctionCallback(lambda step, logs: time.sleep(0.01))
    _crash(tmp_path, 25, callbacks=[slow])
    setting = Setting(tmp_path, stopping=tk.stopping.WallTime(0.15))
    result = setting.run(tmp_path)
    assert result.seconds > 0.2
    assert (result.steps, result.reason) == (21, tk.StopReason.LIMIT)


def test_random_numbers_of_every_kind_go_on(tmp_path):
    class Draw(tk.Callback):
        def __init__(self, seen):
            super().__init__()
            self.seen = seen

        def on_step(self, step, logs):
            own = [random.random(), np.random.random(), float(tf.random.uniform([])), float(keras.random.uniform([]))]
            self.seen.append((*own, float(tf.random.get_global_generator().uniform([]))))

    def run(directory=None, at=None):
        tf.random.set_global_generator(tf.random.Generator.from_seed(1))
        seen = []
        setting = Setting(directory, at=at, callbacks=[Draw(seen)], n=30)
        return setting, seen

    whole, expected = run()
    whole.run()
    crashing, _ = run(tmp_path, at=15)
    with pytest.raises(RuntimeError, match="crash"):
        crashing.run(tmp_path)
    setting, seen = run(tmp_path)
    setting.run(tmp_path)
    assert seen == expected


def test_nothing_is_loaded_that_could_run_code(tmp_path, monkeypatch):
    _crash(tmp_path, 15)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, lambda *args, **kwargs: pytest.fail("a pickle was loaded"))
    assert Setting(tmp_path).run(tmp_path).steps == 60
    newest = max(tmp_path.iterdir())
    assert {path.name.partition(".")[0] for path in newest.iterdir()} == {"tensors", "state"}
    checksum, text = (newest / "state.json").read_text().split("\n")
    assert len(checksum) == 64
    assert json.loads(text)["state"]["progress"]
    assert len(tf.train.list_variables(str(newest / "tensors"))) > 5


class Awkward(tk.Callback):
    """A callback with a state that is not plain data."""

    def on_train_begin(self, logs=None):
        self.lock = object()
        self.count = 0


def test_what_cannot_be_saved_is_named_when_the_first_checkpoint_is_made(tmp_path, caplog):
    setting = Setting(tmp_path, callbacks=[Awkward()])
    plain = setting.loss
    setting.loss = lambda: plain() + 0.0 * tf.random.normal([], dtype=tf.float64)
    with caplog.at_level(logging.WARNING, "tapekit"):
        setting.run()
    told = [record.getMessage() for record in caplog.records if "may differ" in record.getMessage()]
    assert told == [
        "a run that goes on from these checkpoints may differ in lock of Awkward; the state of RandomStandardNormal"
        " (draw with keras.random, or a tf.random.Generator)."
    ]


def test_what_of_the_data_cannot_be_saved_is_named(tmp_path, caplog):
    class Reordered(Pairs):
        def on_epoch_end(self):
            self.order = np.random.permutation(6)

    tf.random.set_seed(None)
    unseeded = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(50).batch(16)
    for data in (unseeded, Reordered()):
        setting = Fit("arrays", tmp_path / str(id(data)), epochs=1)
        setting.settings = {"x": data, "shuffle": False, "verbose": 0}
        with caplog.at_level(logging.WARNING, "tapekit"):
            setting.run()
    told = [record.getMessage() for record in caplog.records if "may differ" in record.getMessage()]
    assert "Dataset.shuffle without a seed" in told[0]
    assert "what on_epoch_end of Reordered have changed" in told[1]


# What is refused, and damage.


def _untouched(setting, resume_from):
    before = [setting.x.numpy(), random.getstate(), list(setting.seen)]
    with pytest.raises(ValueError, match=r"^`resume_from` must") as caught:
        setting.run(resume_from)
    assert same_bits([setting.x.numpy(), random.getstate(), list(setting.seen)], before)
    assert setting.loop.result is None
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ({"optimizer": lambda: keras.optimizers.SGD(0.1)}, ["optimizer is SGD, saved was Adam"]),
        ({"optimizer": lambda: keras.optimizers.Adam(0.1, beta_1=0.8)}, ["optimizer beta_1 is 0.8, saved was 0.9"]),
        ({"size": 5}, ["variable x has shape (5,) and dtype float64, saved was x of shape (4,) and dtype float64"]),
        ({"dtype": "float32"}, ["variable x has shape (4,) and dtype float32"]),
        ({"loss": lambda x: tf.reduce_sum(x**2)}, ["the loss computes something else"]),
        ({"loss": lambda x: rosenbrock(x) + 1.0}, ["the loss computes something else"]),
    ],
    ids=["optimizer", "setting", "shape", "dtype", "objective", "constant"],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_differences(make, words, tmp_path):
    _crash(tmp_path, 15)
    loss = make.pop("loss", None)
    make = {name: value() if callable(value) else value for name, value in make.items()}
    setting = Setting(tmp_path, **make)
    if loss:
        setting.loss = lambda: loss(setting.x)
    sentence = _untouched(setting, tmp_path)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: {"layers": [keras.layers.Dense(8, "tanh"), keras.layers.Dense(1, "sigmoid")]}, "layers is"),
        (lambda: {"data": "parts of a pass"}, "batches an epoch is 3, saved was 7"),
    ],
)
def test_a_fit_of_another_model_or_other_data_is_refused(make, word, tmp_path):
    layers = [keras.layers.Dense(8, "relu"), keras.layers.Dense(1, "sigmoid")]
    Fit("arrays", tmp_path, epochs=1, layers=layers).run()
    changed = {"data": "arrays", "layers": [keras.layers.Dense(8, "relu"), keras.layers.Dense(1, "sigmoid")]} | make()
    setting = Fit(**changed)
    before = [variable.numpy() for variable in setting.model.variables]
    with pytest.raises(ValueError, match=r"^`resume_from` must hold a checkpoint of the same run") as caught:
        setting.run(tmp_path)
    assert word in str(caught.value)
    assert same_bits([variable.numpy() for variable in setting.model.variables], before)


def _truncate(path):
    data = next(path.glob("tensors.data*"))
    data.write_bytes(data.read_bytes()[:-7])


def _flip(path):
    data = next(path.glob("tensors.data*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


DAMAGES = {
    "truncated": _truncate,
    "a flipped bit": _flip,
    "no index": lambda path: next(path.glob("tensors.index")).unlink(),
    "no state": lambda path: (path / "state.json").unlink(),
    "half a state": lambda path: (path / "state.json").write_bytes((path / "state.json").read_bytes()[:500]),
    "an empty state": lambda path: (path / "state.json").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(damage, tmp_path, caplog):
    whole = Setting()
    expected = _everything(whole, whole.run())
    _crash(tmp_path, 35)
    assert _steps(tmp_path) == [10, 20, 30]
    DAMAGES[damage](max(tmp_path.iterdir()))
    setting = Setting(tmp_path)
    with caplog.at_level(logging.INFO, "tapekit"):
        assert same_bits(_everything(setting, setting.run(tmp_path)), expected)
    messages = [record.getMessage() for record in caplog.records]
    assert "is damaged" in messages[0]
    assert "goes on after step 20" in messages[1]


def test_a_directory_where_all_are_damaged_is_refused(tmp_path):
    _crash(tmp_path, 15)
    _truncate(max(tmp_path.iterdir()))
    assert "where all are damaged (checkpoint-000001-step-10: tensors.data" in _untouched(Setting(tmp_path), tmp_path)


def test_a_directory_without_checkpoints_begins_anew_only_if_the_run_saves_there(tmp_path):
    sentence = _untouched(Setting(), tmp_path / "misspelt")
    assert "misspelt', which has none" in sentence
    assert Setting(tmp_path / "new").run(tmp_path / "new").steps == 60


def test_it_cannot_be_used_beside_backup_and_restore(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    assert "BackupAndRestore" in _untouched(Setting(tmp_path, callbacks=[backup]), tmp_path)


def test_a_directory_that_is_no_path_is_refused():
    with pytest.raises(TypeError, match="`resume_from` must be a path, received the int 3"):
        Setting().run(3)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"directory": 3}, TypeError, "`directory` must be a path, received the int 3."),
        ({"every": 0}, ValueError, "`every` must be an integer of at least 1, received 0."),
        ({"every": 2.5}, TypeError, "`every` must be an integer of at least 1, received the float 2.5."),
        ({"every": None}, ValueError, "`every` or `seconds` must be given, received None for both."),
        ({"seconds": -1.0}, ValueError, "`seconds` must be a number of at least 0, received -1.0."),
        ({"keep": 0}, ValueError, "`keep` must be an integer of at least 1, received 0."),
        ({"best": 1}, TypeError, "`best` must be True or False, received the int 1."),
        ({"on_error": "no"}, ValueError, '`on_error` must be "raise" or "warn", received \'no\'.'),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence, tmp_path):
    with pytest.raises(error) as caught:
        tk.callbacks.Checkpoint(**{"directory": tmp_path, **arguments})
    assert str(caught.value) == sentence


def test_fit_of_keras_refuses_it(tmp_path):
    setting = Fit("arrays")
    with pytest.raises(ValueError, match=r"`callbacks` of keras.Model.fit must not hold Checkpoint"):
        setting.model.fit(X, Y, verbose=0, callbacks=[tk.callbacks.Checkpoint(tmp_path)])


# Ends of a run, and disks.


def test_an_interrupted_run_is_saved_and_goes_on(tmp_path):
    whole = Setting()
    expected = _everything(whole, whole.run())
    interrupt = tk.callbacks.FunctionCallback(lambda step, logs: os.kill(os.getpid(), signal.SIGTERM), every=33)
    setting = Setting(tmp_path, callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        setting.run(tmp_path)
    assert setting.loop.result.reason is tk.StopReason.INTERRUPTED
    assert _steps(tmp_path)[-1] == 33
    again = Setting(tmp_path)
    assert same_bits(_everything(again, again.run(tmp_path)), expected)


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_full_disk_leaves_what_was_written_whole(on_error, tmp_path, monkeypatch, caplog):
    def fill(step, logs):
        monkeypatch.setattr(tf.train.Checkpoint, "write", _full)

    checkpoint = tk.callbacks.Checkpoint(tmp_path, every=10, on_error=on_error)
    setting = Setting(callbacks=[checkpoint, tk.callbacks.FunctionCallback(fill, every=25)])
    with caplog.at_level(logging.WARNING, "tapekit"):
        if on_error == "raise":
            with pytest.raises(OSError, match=r"no checkpoint could be written to .* at step 30: .*No space left"):
                setting.run()
        else:
            setting.run()
    result = setting.loop.result
    assert (result.steps, result.reason) == (
        (30, tk.StopReason.ERROR) if on_error == "raise" else (60, tk.StopReason.LIMIT)
    )
    assert len(caplog.records) == (on_error == "warn")
    assert len(result.history["loss"]) == result.steps
    monkeypatch.undo()
    assert _steps(tmp_path) == [10, 20]
    whole, again = Setting(), Setting(tmp_path)
    expected = whole.run()
    assert same_bits(again.run(tmp_path).history, expected.history)


def test_a_directory_that_cannot_be_written_ends_the_run_with_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    setting = Setting(tmp_path / "file" / "saved")
    with pytest.raises(OSError, match=r"no checkpoint could be written to .* at step 10: .*Not a directory"):
        setting.run()
    assert setting.loop.result.steps == 10


def test_a_directory_that_vanishes_is_made_again(tmp_path):
    vanish = tk.callbacks.FunctionCallback(lambda step, logs: shutil.rmtree(tmp_path / "saved"), every=25)
    Setting(tmp_path / "saved", n=45, callbacks=[vanish]).run()
    assert _steps(tmp_path / "saved") == [30, 40, 45]


def test_an_exception_saves_nothing_that_is_not_whole(tmp_path):
    setting = _crash(tmp_path, 15)
    assert _steps(tmp_path) == [10]
    assert setting.loop.result.steps == 15


def test_steps_in_the_hands_of_the_caller_are_saved_and_gone_on_with(tmp_path):
    setting = Setting(tmp_path)
    for step, _ in setting.loop.steps(setting.loss, [setting.x], setting.callbacks):
        if step == 23:
            break
    assert _steps(tmp_path)[-1] == 23
    whole = Setting()
    expected = _everything(whole, whole.run())
    again = Setting(tmp_path)
    assert same_bits(_everything(again, again.run(tmp_path)), expected)


# Models of other kinds.


class TwoOptimizers(keras.Model):
    """A model with its own `train_step`, two optimizers, and noise from a generator that Keras does not know of."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(4), keras.layers.Dense(1)
        self.noise = tf.random.Generator.from_seed(3)
        self.mean = keras.metrics.Mean("loss")

    def compile(self, one, other):
        super().compile()
        self.one, self.other = one, other

    @property
    def metrics(self):
        return [self.mean]

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean((self(x + 0.1 * self.noise.normal(tf.shape(x))) - y) ** 2)
        for optimizer, layer in ((self.one, self.first), (self.other, self.second)):
            variables = layer.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
        self.mean.update_state(loss)
        return {"loss": self.mean.result()}


def _two_optimizers():
    model = TwoOptimizers()
    model.compile(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01))
    return model


def _mixed():
    dense = [keras.layers.Dense(8, "relu", dtype="mixed_float16"), keras.layers.Dense(1, dtype="float32")]
    model = keras.Sequential([keras.Input((8,)), *dense])
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01, use_ema=True)), "mse")
    return model


def _recurrent():
    wrapped = keras.layers.Bidirectional(keras.layers.GRU(3))
    model = keras.Sequential([keras.Input((8,)), keras.layers.Reshape((4, 2)), wrapped, keras.layers.Dense(1)])
    model.compile("rmsprop", "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize("make", [_two_optimizers, _mixed, _recurrent])
def test_a_model_of_another_kind_goes_on(make, tmp_path):
    def run(directory=None, at=None):
        keras.utils.set_random_seed(3)
        model = make()
        callbacks = [tk.callbacks.Checkpoint(directory, every=3)] if directory else []
        loop = tk.OptimizationLoop(callbacks=[Crash(at)] if at else None, jit_compile=False)
        result = loop.fit(
            model, X, Y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks, resume_from=directory
        )  # fmt: skip
        return [result.history, result.epoch_history, result.loss, *model.get_weights()]

    expected = run()
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, at=8)
    assert same_bits(run(tmp_path), expected)
