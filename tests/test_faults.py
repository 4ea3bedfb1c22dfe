"""Faults of every kind: what was done before is whole and known, and the loop can be used again."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import tapekit as tk

DRIVERS = {
    "xla": {},
    "graph": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "short": {"steps_per_execution": 2},
}
LIMIT = 4
PAGE = Path(__file__).parents[1] / "docs" / "ways_out.md"


class Own(Exception):
    """An exception of the user's."""


class Plain:
    """A loop over (x - 4)**2 by SGD with momentum, written down; exact, as all numbers are short binary fractions."""

    def __init__(self):
        self.x, self.v, self.losses = 0.0, 0.0, []

    def step(self):
        self.losses.append((self.x - 4.0) ** 2)
        self.v = self.move()
        self.x += self.v

    def move(self):
        return 0.5 * self.v - 0.25 * 2.0 * (self.x - 4.0)


class At(tk.Callback):
    """Does something at a step."""

    def __init__(self, step, action):
        super().__init__()
        self.every = step
        self.action = action
        self.ended = 0

    def on_step(self, step, logs):
        self.action(self)

    def on_train_end(self, logs=None):
        self.ended += 1


def _raise(error):
    raise error


class World:
    """One loop, used again and again, beside the plain one."""

    def __init__(self, driver):
        self.x = tf.Variable(0.0, dtype=tf.float64, name="x")
        self.bad = tf.Variable(np.inf, dtype=tf.float64, trainable=False)
        self.optimizer = keras.optimizers.SGD(0.25, momentum=0.5)
        self.loop = tk.OptimizationLoop(self.optimizer, max_iterations=LIMIT, **DRIVERS[driver])

    def loss(self):
        return tf.where(tf.equal(self.x, self.bad), tf.constant(np.nan, tf.float64), tf.square(self.x - 4.0))

    @property
    def velocity(self):
        return [variable for variable in self.optimizer.variables if "momentum" in variable.path]

    def begin(self):
        self.plain = Plain()
        self.set(0.0, 0.0)

    def set(self, x, v):
        self.x.assign(x)
        self.bad.assign(np.inf)
        for velocity in self.velocity:
            velocity.assign(v)

    def run(self, *callbacks, **arguments):
        return self.loop.minimize(self.loss, [self.x], list(callbacks), **arguments)

    def check(self, steps, reason):
        """Compares the result and the variables with the plain loop, which takes the same steps."""
        self.plain.losses = []
        for _ in range(steps):
            self.plain.step()
        self.compare(steps, reason)

    def compare(self, steps, reason):
        result = self.loop.result
        assert (result.reason, result.steps) == (reason, steps)
        assert self.x.numpy() == self.plain.x
        assert [velocity.numpy() for velocity in self.velocity] == [self.plain.v]
        np.testing.assert_array_equal(result.history["loss"], self.plain.losses)
        assert result.variables[0] == self.plain.x
        assert result.best_loss <= min(loss for loss in self.plain.losses if not math.isnan(loss))

    # What may happen.

    def ends(self, at):
        self.run()
        self.check(LIMIT, tk.StopReason.LIMIT)

    def is_stopped(self, at):
        self.run(At(at, lambda callback: callback.loop.stop("enough")))
        self.check(at, tk.StopReason.STOPPED if at < LIMIT else tk.StopReason.LIMIT)

    def meets_an_exception(self, at):
        error, watcher = Own("mine"), At(LIMIT + 1, None)
        with pytest.raises(Own) as caught:
            self.run(At(at, lambda callback: _raise(error)), watcher)
        assert caught.value is error
        assert watcher.ended == 1
        self.check(at, tk.StopReason.ERROR)

    def is_interrupted(self, at):
        with pytest.raises(KeyboardInterrupt):
            self.run(At(at, lambda callback: os.kill(os.getpid(), signal.SIGINT)))
        self.check(at, tk.StopReason.INTERRUPTED if at < LIMIT else tk.StopReason.LIMIT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def meets_nan(self, at):
        self.plain.losses, visited = [], []
        while len(visited) < at - 1 and self.plain.x + self.plain.move() not in [*visited, self.plain.x]:
            visited.append(self.plain.x)  # since a place that it comes to twice would be bad at the first time
            self.plain.step()
        at, losses = len(visited) + 1, self.plain.losses
        self.bad.assign(self.plain.x)
        self.run()
        self.bad.assign(np.inf)
        self.plain.losses = [*losses, math.nan]
        if at > 1:
            self.compare(at, tk.StopReason.NOT_FINITE)
        assert self.x.numpy() == self.plain.x

    def is_killed_and_goes_on(self, at):
        """As after a kill, nothing is left of the process but its checkpoints."""
        before = self.x.numpy(), [velocity.numpy() for velocity in self.velocity]
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = tk.callbacks.Checkpoint(directory, every=2)
            with pytest.raises(Own):
                self.run(At(at, lambda callback: _raise(Own())), checkpoint, resume_from=directory)
            if at > 2:
                self.set(-77.0, 77.0)
            else:  # none had been made
                self.set(before[0], *before[1] or [0.0])
            self.run(checkpoint, resume_from=directory)
        self.check(LIMIT, tk.StopReason.LIMIT)

    def holds_another(self, at):
        """A loop inside a callback of this one."""
        y = tf.Variable(0.0, dtype=tf.float64)
        inner = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=3, run_eagerly=True)
        self.run(At(at, lambda callback: inner.minimize(lambda: tf.square(y - 4.0), [y])))
        assert inner.result.steps == 3
        assert y.numpy() == 4.0 - 4.0 * 0.5 ** (3 * (LIMIT // at))
        self.check(LIMIT, tk.StopReason.LIMIT)

    def holds_itself(self, at):
        with pytest.raises(RuntimeError, match="this loop is running already"):
            self.run(At(at, lambda callback: self.run()))
        self.check(at, tk.StopReason.ERROR)


HAPPENINGS = [
    World.ends,
    World.is_stopped,
    World.meets_an_exception,
    World.is_interrupted,
    World.meets_nan,
    World.is_killed_and_goes_on,
    World.holds_another,
    World.holds_itself,
]
_worlds = {}


@pytest.mark.parametrize("driver", DRIVERS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(story=st.lists(st.tuples(st.sampled_from(HAPPENINGS), st.integers(1, LIMIT)), min_size=1, max_size=4))
def test_any_sequence_of_ends_and_faults_leaves_what_a_plain_loop_has(driver, story):
    world = _worlds.setdefault(driver, World(driver))
    world.begin()
    for happening, at in story:
        happening(world, at)
    assert world.loop.traces <= 1


# Data that raises.

X = np.random.default_rng(0).normal(size=(200, 8)).astype("float32")
Y = X.sum(1, keepdims=True)


def _pairs(bad, error):
    for index in range(20):
        if index == bad:
            raise error
        yield X[index * 10 : index * 10 + 10], Y[index * 10 : index * 10 + 10]


class Pairs(keras.utils.PyDataset):
    def __init__(self, bad, error, **settings):
        super().__init__(**settings)
        self.bad, self.error = bad, error

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == self.bad:
            raise self.error
        return X[index * 10 : index * 10 + 10], Y[index * 10 : index * 10 + 10]


def _pipeline(bad):
    def check(x, y):
        with tf.control_dependencies([tf.debugging.assert_none_equal(x[0], X[bad * 10, 0], message="a bad sample")]):
            return tf.identity(x), y

    return tf.data.Dataset.from_tensor_slices((X, Y)).map(check).batch(10)


def _fit(data, driver):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    loop = tk.OptimizationLoop(**DRIVERS[driver])
    return model, loop, lambda: loop.fit(model, data, shuffle=False, verbose=0)


def _check_up_to(bad, model, loop, driver):
    short = tf.data.Dataset.from_tensor_slices((X, Y)).batch(10).take(bad)
    short = short.filter(lambda *batch: True)  # so that nobody knows how short it is, which would choose a graph
    whole, other, run = _fit(short, driver)
    run()
    assert (loop.result.steps, loop.result.reason) == (bad, tk.StopReason.ERROR)
    np.testing.assert_array_equal(loop.result.history["loss"], other.result.history["loss"])
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["generator", "PyDataset", "PyDataset with workers"])
@pytest.mark.parametrize("driver", ["xla", "eager"])
def test_the_exception_of_a_python_source_arrives_unchanged(driver, kind):
    error = Own("mine")
    error.__cause__ = cause = KeyError("why")
    workers = {"workers": 2} if "workers" in kind else {}
    model, loop, run = _fit(_pairs(7, error) if kind == "generator" else Pairs(7, error, **workers), driver)
    with pytest.raises(Own) as caught:
        run()
    assert caught.value is error
    assert error.__cause__ is cause
    _check_up_to(7, model, loop, driver)


@pytest.mark.parametrize("error", [Own("mine"), ValueError("mine")])
def test_the_exception_of_a_first_batch_arrives_unchanged(error):
    _, loop, run = _fit(Pairs(0, error), "xla")
    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error
    assert loop.result is None


@pytest.mark.parametrize("bad", [1, 13])
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_pipeline_that_raises_loses_no_step(driver, bad):
    model, loop, run = _fit(_pipeline(bad), driver)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a bad sample"):
        run()
    _check_up_to(bad, model, loop, driver)


def test_a_pipeline_whose_first_element_raises_is_not_tried_again():
    _, loop, run = _fit(_pipeline(0), "xla")
    with pytest.raises(tf.errors.InvalidArgumentError, match="a bad sample"):
        run()
    assert loop.result.steps == 0


def test_a_second_interrupt_leaves_at_once():
    watcher = At(LIMIT + 1, None)

    def interrupt(callback):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the hook went on")

    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop("sgd", max_iterations=9, interrupt="return")
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x], [At(5, interrupt), watcher])
    assert (result.reason, result.steps, watcher.ended) == (tk.StopReason.INTERRUPTED, 5, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


ROWS = re.findall(r"^\| .* \| `?(\w*)`? ?\| `(\w+\.py)::(\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_table_of_ways_out_has_every_reason():
    assert {reason for reason, *_ in ROWS} == {"", *tk.StopReason.__members__}


@pytest.mark.parametrize(("file", "test"), [row[1:] for row in ROWS], ids=lambda name: name)
def test_what_the_table_of_ways_out_names_exists(file, test):
    assert f"\ndef {test}(" in Path(__file__).with_name(file).read_text(encoding="utf-8")


# Disks.


def test_a_log_that_cannot_be_written_ends_the_run_whole(tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    def swap(callback):
        logger.writer = None
        logger.csv_file = Full(logger.csv_file)

    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop("sgd", max_iterations=9)
    with pytest.raises(OSError, match="No space left on device"):
        loop.minimize(lambda: (x - 4.0) ** 2, [x], [At(5, swap), logger])
    assert loop.result.steps == 5
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 5  # the header, and the four steps before
    assert logger.csv_file.closed


def test_a_run_that_cannot_go_on_tells_of_both_errors(caplog):
    class Fails(tk.Callback):
        def on_train_end(self, logs=None):
            raise OSError("second")

    x = tf.Variable(0.0)
    with caplog.at_level(logging.ERROR, "tapekit"), pytest.raises(Own, match="first"):
        tk.OptimizationLoop("sgd", max_iterations=9).minimize(
            lambda: (x - 4.0) ** 2, [x], [At(5, lambda callback: _raise(Own("first"))), Fails()]
        )
    assert "second" in caplog.text
