"""Loggers that count steps: TensorBoard, Python's logging, and Keras's callbacks at steps."""

from __future__ import annotations

import csv
import logging
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tapekit as tk
from tapekit.callbacks._dispatch import Dispatch

DRIVERS = {"xla": {}, "graph": {"jit_compile": False}, "eager": {"run_eagerly": True}}


def minimize(callbacks, n=6, resume_from=None, optimizer=None, **settings):
    x = tf.Variable([0.0, 1.0], dtype=tf.float64, name="x")
    loop = tk.OptimizationLoop(
        optimizer or keras.optimizers.SGD(0.25), max_iterations=n, measures={"x": lambda: x}, **settings
    )
    return loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x], callbacks, resume_from=resume_from)


def small_model():
    inputs = np.linspace(-1.0, 1.0, 64, dtype="float32")[:, None]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones", name="line")])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model, inputs, 3.0 * inputs


# TensorBoard


def board(directory):
    """What TensorBoard reads in a directory."""
    found = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    found.Reload()
    return {
        tag: {event.step: tf.make_ndarray(event.tensor_proto) for event in found.Tensors(tag)}
        for tag in found.Tags()["tensors"]
    }


@pytest.mark.parametrize("driver", DRIVERS)
def test_tensorboard_has_logs_rates_gradients_and_variables(driver, tmp_path):
    result = minimize([tk.callbacks.TensorBoardLogger(tmp_path, every=2)], **DRIVERS[driver])
    found = board(tmp_path)
    numbers = {"loss", "learning_rate", "gradient_norm", "gradient_norm/x"}
    assert set(found) == {*numbers, "x", "gradient/x", "variable/x"}
    assert all(list(rows) == [2, 4, 6] for rows in found.values())
    before = np.concatenate([[[0.0, 1.0]], result.history["x"][:-1]])
    gradients = 2.0 * (before - 4.0)
    for step in (2, 4, 6):
        assert found["loss"][step] == pytest.approx(result.history["loss"][step - 1], rel=1e-6)
        assert found["learning_rate"][step] == 0.25
        norm = np.linalg.norm(gradients[step - 1])
        assert found["gradient_norm"][step] == found["gradient_norm/x"][step] == pytest.approx(norm, rel=1e-6)
        for tag, values in (("gradient/x", gradients[step - 1]), ("variable/x", result.history["x"][step - 1])):
            low, high, count = found[tag][step].T
            assert (low.min(), high.max(), count.sum()) == (pytest.approx(values.min()), pytest.approx(values.max()), 2)
        np.testing.assert_array_equal(found["x"][step], found["variable/x"][step])


def test_without_histograms_the_norms_are_the_same_and_no_gradient_is_copied(tmp_path):
    both = [tk.callbacks.TensorBoardLogger(tmp_path / str(choice), 2, choice) for choice in (True, False)]
    minimize(both)
    rich, poor = (board(tmp_path / str(choice)) for choice in (True, False))
    assert set(poor) == {"loss", "learning_rate", "gradient_norm", "gradient_norm/x"}
    for tag, rows in poor.items():
        assert rows == rich[tag]
    assert [place.shape for place in both[1].shelf._places.popitem()[1]] == [()]


@pytest.mark.parametrize("fit", ["loop.fit", "Model.fit"])
def test_tensorboard_in_a_fit(fit, tmp_path):
    model, x, y = small_model()
    callbacks = [tk.callbacks.TensorBoardLogger(tmp_path, every=3)]
    if fit == "loop.fit":
        tk.OptimizationLoop().fit(model, x, y, batch_size=8, verbose=0, callbacks=callbacks)
    else:
        model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    found = board(tmp_path)
    kernel, bias = (variable.path for variable in model.trainable_variables)
    numbers = {"loss", "mae", "learning_rate", "gradient_norm"}
    assert {*numbers, f"gradient/{kernel}", f"gradient_norm/{bias}", f"variable/{bias}"} <= set(found)
    assert all(list(rows) == [3, 6] for rows in found.values())


def test_the_learning_rate_is_that_of_a_schedule(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.25, 1, 0.5)
    minimize([tk.callbacks.TensorBoardLogger(tmp_path, every=2)], n=4, optimizer=keras.optimizers.SGD(schedule))
    found = board(tmp_path)["learning_rate"]
    assert {step: float(rate) for step, rate in found.items()} == {2: 0.25 / 4, 4: 0.25 / 16}


def test_an_optimizer_without_a_rate_has_none(tmp_path):
    class Descent:
        def apply_gradients(self, pairs):
            for gradient, variable in pairs:
                variable.assign_sub(0.1 * gradient)

    minimize([tk.callbacks.TensorBoardLogger(tmp_path, every=2)], n=2, optimizer=Descent())
    assert "learning_rate" not in board(tmp_path)


def test_the_file_is_whole_after_an_error(tmp_path):
    def fail(step, logs):
        if step == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        minimize([tk.callbacks.TensorBoardLogger(tmp_path, every=2), fail])
    assert list(board(tmp_path)["loss"]) == [2, 4]


def test_without_tensorboard_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    sentence = 'TensorBoardLogger needs tensorboard, which is not installed: pip install "tapekit[tensorboard]".'
    with pytest.raises(ImportError) as raised:
        tk.callbacks.TensorBoardLogger("logs")
    assert str(raised.value) == sentence


# Python's logging


def test_steps_and_the_end_are_records(caplog):
    caplog.set_level(logging.INFO, "tapekit")
    minimize([tk.callbacks.LogSteps(every=2), tk.callbacks.LogSteps(every=4, names=["loss"], level=logging.WARNING)], 4)
    *steps, end = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert steps == [
        ("tapekit", "INFO", "step 2: loss 6.25, x [3 3.25]"),
        ("tapekit", "INFO", "step 4: loss 0.390625, x [3.75 3.8125]"),
        ("tapekit", "WARNING", "step 4: loss 0.390625"),
    ]
    assert end[:2] == ("tapekit", "INFO")
    assert end[2].startswith("4 steps in ")
    assert end[2].endswith(" s: MaxIterations: step 4 reached the limit of 4")


def test_what_is_logged_must_be_there(caplog):
    caplog.set_level(logging.INFO, "tapekit")
    with pytest.raises(ValueError, match="`names` must be among loss, x, received mae, acc"):
        minimize([tk.callbacks.LogSteps(names=["loss", "mae", "acc"])])


def test_logging_makes_no_chunk_shorter():
    assert Dispatch([tk.callbacks.LogSteps(every=10)], 1).steps_to_edge(0, 1000) == 1000


# Keras's callbacks at steps


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_csv_file_of_a_fit_has_a_row_for_steps(tmp_path):
    model, x, y = small_model()
    by_epoch = keras.callbacks.CSVLogger(tmp_path / "epochs")
    by_step = tk.callbacks.AtSteps(keras.callbacks.CSVLogger(tmp_path / "steps"), every=4)
    result = tk.OptimizationLoop().fit(
        model, x, y, batch_size=8, epochs=2, verbose=0, validation_split=0.5, callbacks=[by_epoch, by_step]
    )
    assert [row["epoch"] for row in rows_of(tmp_path / "epochs")] == ["0", "1"]
    steps = rows_of(tmp_path / "steps")
    assert [int(row["epoch"]) for row in steps] == [3, 7]
    assert [float(row["loss"]) for row in steps] == list(result.history["loss"][3::4])


@pytest.mark.parametrize("fit", ["loop.fit", "Model.fit"])
def test_a_rate_is_reduced_at_steps(fit):
    model, x, _ = small_model()
    reduce = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=2, min_delta=1e9)
    settings = {"batch_size": 8, "verbose": 0, "callbacks": [tk.callbacks.AtSteps(reduce, every=2)]}
    if fit == "loop.fit":
        tk.OptimizationLoop().fit(model, x, x, **settings)
    else:
        model.fit(x, x, **settings)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)


def test_early_stopping_stops_at_a_step():
    stop = keras.callbacks.EarlyStopping("loss", patience=2, min_delta=1e9)
    result = minimize([tk.callbacks.AtSteps(stop, every=3)], n=100)
    assert result.steps == 9
    assert result.reason is tk.StopReason.STOPPED


def test_hooks_of_keras_come_in_order():
    calls = []

    class Recorder(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            calls.append("train begins")

        def on_epoch_begin(self, epoch, logs=None):
            calls.append(f"{epoch} begins")

        def on_epoch_end(self, epoch, logs=None):
            calls.append(f"{epoch} ends with {sorted(logs)}")

        def on_train_batch_end(self, batch, logs=None):
            calls.append("batch")

        def on_train_end(self, logs=None):
            calls.append("train ends")

    minimize([tk.callbacks.AtSteps(Recorder(), every=2)], n=4)
    assert calls == [
        *["train begins", "0 begins", "1 ends with ['loss']", "2 begins", "3 ends with ['loss']", "4 begins"],
        "train ends",
    ]


def test_a_csv_file_at_steps_makes_no_chunk_shorter_and_others_end_there(tmp_path):
    csv_logger, stop = keras.callbacks.CSVLogger(tmp_path / "a"), keras.callbacks.EarlyStopping("loss")
    for callback, limit in ((csv_logger, 1000), (stop, 10)):
        assert Dispatch([tk.callbacks.AtSteps(callback, 10)], None).steps_to_edge(0, 1000) == limit


def test_a_csv_file_at_steps_goes_on_with_a_checkpoint(tmp_path):
    class Crash(tk.Callback):
        every = 5

        def on_step(self, step, logs):
            raise ZeroDivisionError

    def log(name):
        return tk.callbacks.AtSteps(keras.callbacks.CSVLogger(tmp_path / name))

    minimize([log("whole")])
    saving = [tk.callbacks.Checkpoint(tmp_path / "saved", every=3)]
    with pytest.raises(ZeroDivisionError):
        minimize([log("parts"), *saving, Crash()])
    minimize([log("parts"), *saving], resume_from=tmp_path / "saved")
    assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text()


# Bad arguments


inside = tk.callbacks.AtSteps


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tk.callbacks.TensorBoardLogger(3), TypeError, "`log_dir` must be a path, received the int 3"),
        (lambda: tk.callbacks.TensorBoardLogger("a", histograms=1), TypeError, "`histograms` must be True or False"),
        (lambda: tk.callbacks.TensorBoardLogger("a", every=0), ValueError, "`every` must be"),
        (lambda: tk.callbacks.LogSteps(names="loss"), TypeError, r"`names` must be a list .* write \['loss'\]"),
        (lambda: tk.callbacks.LogSteps(level="INFO"), TypeError, "`level` must be"),
        (lambda: tk.callbacks.AtSteps("csv"), TypeError, "`callback` must be a callback of Keras, received .*csv"),
        (lambda: tk.callbacks.AtSteps(tk.callbacks.LogSteps()), TypeError, "`callback` must be a callback of Keras"),
        (lambda: minimize([inside(keras.callbacks.TensorBoard("a", embeddings_freq=1))]), ValueError, "`embeddings_fr"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
