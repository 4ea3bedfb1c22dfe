"""Runs for child processes that are killed: what they do, and how they are started quickly."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from children import CONTEXT
from problems import rosenbrock

import tapekit as tk

_PATIENCE = 120.0
"""Seconds after which a child that is silent fails a test, rather than keep it waiting."""


class Moments(tk.Callback):
    """A callback with state of many kinds: numbers, lists, arrays, a generator, and what the caller holds too."""

    every = 3

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.mean = np.zeros(2)
        self.seen: list[tuple[int, float]] = []
        self.random = np.random.default_rng(5)

    def on_step(self, step, logs):
        self.count += 1
        self.mean += (self.random.normal() - self.mean) / self.count
        self.seen.append((step, logs["loss"] + random.random() + np.random.normal()))


def minimize(directory: str | None, begun: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Minimizes a function by Adam, with a criterion and callbacks that have state; returns everything."""
    keras.utils.set_random_seed(1)
    x = tf.Variable(np.linspace(-1.0, 1.0, 6), name="x")
    noise = tf.random.Generator.from_seed(7)
    moments, stopping = Moments(), keras.callbacks.EarlyStopping("loss", patience=300)
    rate = keras.callbacks.ReduceLROnPlateau("loss", factor=0.9, patience=7)
    begin = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: begun())
    callbacks = [moments, stopping, rate, begin]
    if directory:
        callbacks.append(tk.callbacks.Checkpoint(directory, every=20))
    optimizer = keras.optimizers.Adam(0.02)
    loop = tk.OptimizationLoop(
        optimizer, stopping=tk.stopping.LossPlateau(250), max_iterations=900, measures={"x": lambda: x}
    )
    result = loop.minimize(
        lambda: rosenbrock(x) + 0.01 * noise.normal([], dtype=tf.float64),
        [x],
        callbacks,
        steps_per_epoch=3,
        resume_from=directory,
    )
    return _everything(result, optimizer, [moments.count, moments.mean, moments.seen, rate.best, rate.wait])


def fit(directory: str | None, begun: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Trains a model with shuffled batches, Dropout, BatchNormalization and validation; returns everything."""
    keras.utils.set_random_seed(2)
    x = np.random.default_rng(0).normal(size=(90, 8)).astype("float32")
    y = (x.sum(1, keepdims=True) > 0).astype("float32")
    layers = [
        keras.layers.Dense(16, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(1, "sigmoid"),
    ]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
    moments = Moments()
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=5, restore_best_weights=True)
    begin = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: begun())
    callbacks = [moments, stopping, begin]
    if directory:
        callbacks.append(tk.callbacks.Checkpoint(directory, every=4))
    result = tk.OptimizationLoop(stopping=tk.stopping.LossPlateau(100)).fit(
        model, x, y, batch_size=16, epochs=25, verbose=0, callbacks=callbacks, validation_split=0.2,
        resume_from=directory,
    )  # fmt: skip
    state = [moments.count, moments.mean, moments.seen, stopping.best, stopping.wait]
    return _everything(result, model.optimizer, [*state, *(v.numpy() for v in model.variables)])


def _everything(result: Any, optimizer: Any, state: Any) -> dict[str, Any]:
    return {
        "variables": result.variables,
        "slots": [np.asarray(variable) for variable in optimizer.variables],
        "history": result.history,
        "epoch_history": result.epoch_history,
        "best": [result.best_loss, result.best_variables],
        "result": [result.loss, result.steps, result.evaluations, result.reason.name, result.message],
        "callbacks": state,
    }


def same_bits(one: Any, other: Any) -> bool:
    """Returns whether two results of a run are equal, NaN included."""
    return [_bits(leaf) for leaf in keras.tree.flatten(one)] == [_bits(leaf) for leaf in keras.tree.flatten(other)]


def _bits(leaf: Any) -> Any:
    return (leaf.dtype.str, leaf.shape, leaf.tobytes()) if isinstance(leaf, np.ndarray) else repr(leaf)


def _child(run: Callable[..., Any], directory: str | None, pipe: Any) -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    pipe.send(("done", run(directory, lambda: pipe.send(("begun", None)))))


def in_child(run: Callable[..., Any], directory: str | None, seconds: float | None = None) -> Any:
    """Makes a run in a process of its own.

    Args:
        run: `minimize` or `fit`.
        directory: where it saves, and goes on from.
        seconds: after how long it is killed, once it has begun; `None` lets it end.

    Returns:
        What the run returns; `None` if it was killed before.
    """
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_child, args=(run, directory, there))
    process.start()
    there.close()
    try:
        assert here.poll(_PATIENCE), "the run has not begun"
        assert here.recv() == ("begun", None)
        if here.poll(_PATIENCE if seconds is None else seconds):
            return here.recv()[1]
        assert seconds is not None, "the run has not ended"
        return None
    finally:
        process.kill()
        process.join()
