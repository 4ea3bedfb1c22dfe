"""Logs as lines of JSON."""

from __future__ import annotations

import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk

DRIVERS = {"xla": {}, "graph": {"jit_compile": False}, "eager": {"run_eagerly": True}}


def _run(path, n=20, callbacks=(), resume_from=None, driver="xla", **settings):
    x = tf.Variable([0.0, 1.0], dtype=tf.float64, name="x")
    loop = tk.OptimizationLoop(
        keras.optimizers.Adam(0.1), max_iterations=n, measures={"x": lambda: x, "nan": lambda: x[0] * np.nan},
        **DRIVERS[driver],
    )  # fmt: skip
    logger = tk.callbacks.JSONLinesLogger(path, **settings)
    callbacks = [logger, *callbacks]
    return loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x], callbacks, resume_from=resume_from), logger


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("driver", DRIVERS)
def test_each_step_is_an_object_with_exact_numbers(driver, tmp_path):
    result, _ = _run(tmp_path / "log", driver=driver)
    lines = _lines(tmp_path / "log")
    assert [line["step"] for line in lines] == list(range(1, 21))
    np.testing.assert_array_equal([line["loss"] for line in lines], result.history["loss"])
    np.testing.assert_array_equal([line["x"] for line in lines], result.history["x"])
    assert {line["nan"] for line in lines} == {"NaN"}


def test_every_and_append(tmp_path):
    _run(tmp_path / "log", every=7)
    assert [line["step"] for line in _lines(tmp_path / "log")] == [7, 14]
    _run(tmp_path / "log", every=10, append=True)
    assert [line["step"] for line in _lines(tmp_path / "log")] == [7, 14, 10, 20]
    _run(tmp_path / "log", every=20)
    assert [line["step"] for line in _lines(tmp_path / "log")] == [20]


def test_it_makes_no_chunk_shorter_and_whole_lines_are_there_while_the_run_goes_on(tmp_path):
    seen = []
    look = tk.callbacks.FunctionCallback(lambda step, logs: seen.append(len(_lines(tmp_path / "log"))), every=10)
    _run(tmp_path / "log", n=30, callbacks=[look])
    assert seen == [10, 20, 30]


class Crash(tk.Callback):
    every = 15

    def on_step(self, step, logs):
        raise RuntimeError("crash")


def test_a_run_that_goes_on_goes_on_with_its_file(tmp_path):
    _run(tmp_path / "whole")
    saving = [tk.callbacks.Checkpoint(tmp_path / "saved", every=10)]
    with pytest.raises(RuntimeError, match="crash"):
        _run(tmp_path / "parts", callbacks=[*saving, Crash()], resume_from=tmp_path / "saved")
    assert len(_lines(tmp_path / "parts")) == 15
    _run(tmp_path / "parts", callbacks=saving, resume_from=tmp_path / "saved")
    assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text()


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    write, lines = os.write, []

    def fill(file, line):
        lines.append(line)
        return write(file, line if len(lines) < 5 else line[:7])

    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(OSError, match="No space left on device"):
        _run(tmp_path / "log")
    assert len(_lines(tmp_path / "log")) == 4


def test_it_works_in_fit_of_keras(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((64, 1), "float32")
    model.fit(x, x, verbose=0, callbacks=[tk.callbacks.JSONLinesLogger(tmp_path / "log")])
    assert [line["step"] for line in _lines(tmp_path / "log")] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"filename": 3}, TypeError, "`filename` must be a path, received the int 3."),
        ({"every": 0}, ValueError, "`every` must be an integer of at least 1, received 0."),
        ({"append": 1}, TypeError, "`append` must be True or False, received the int 1."),
    ],
)
def test_bad_arguments_are_refused(arguments, error, sentence):
    with pytest.raises(error) as caught:
        tk.callbacks.JSONLinesLogger(**{"filename": "log", **arguments})
    assert str(caught.value) == sentence


def test_a_directory_that_is_not_there_is_told_before_the_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        _run(tmp_path / "none" / "log")
