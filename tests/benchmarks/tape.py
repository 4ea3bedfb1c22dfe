"""A `PersistentTape` beside `tf.GradientTape(persistent=True)` with `del`, two gradients each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

import tapekit as tk
from tests.benchmarks.harness import OURS, Peer, Table, compare

BLOCKS = 200


def problems() -> dict[str, Callable[[], tuple[Any, Any, Any]]]:
    """What gives a value, an intermediate one, and sources."""
    x, pair = tf.Variable(1.0), [tf.Variable(1.0), keras.Variable(2.0)]
    inputs = tf.random.stateless_normal([32, 8], [0, 1])
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    weights = [variable.value for variable in model.trainable_variables]

    def article() -> tuple[Any, Any, Any]:
        z = x - 4.0
        return z**2, z, x

    def two_variables() -> tuple[Any, Any, Any]:
        z = pair[0] * pair[1].value
        return z**2, z, [pair[0], pair[1].value]

    def dense_model() -> tuple[Any, Any, Any]:
        z = model(inputs)
        return tf.reduce_mean(z**2), z, weights

    return {"(x - 4)^2": article, "two variables": two_variables, "a dense model": dense_model}


def by_tensorflow(compute: Callable[[], Any], blocks: int) -> Callable[[], float]:
    """Blocks with TensorFlow's own tape, which the caller deletes."""

    def run() -> float:
        for _ in range(blocks):
            with tf.GradientTape(persistent=True) as tape:
                y, z, sources = compute()
            inner, _ = tape.gradient(y, z), tape.gradient(y, sources)
            del tape
        return float(tf.reduce_sum(inner))

    return run


def by_tapekit(compute: Callable[[], Any], blocks: int) -> Callable[[], float]:
    """Blocks with a tape that releases itself."""

    def run() -> float:
        for _ in range(blocks):
            with tk.PersistentTape() as tape:
                y, z, sources = compute()
                inner, _ = tape.gradient(y, z), tape.gradient(y, sources)
        return float(tf.reduce_sum(inner))

    return run


def tables(quick: bool) -> Iterator[Table]:
    """Compares both tapes.

    Args:
        quick: whether to make few blocks.

    Yields:
        A table for each problem; a step is a block with two gradients.
    """
    blocks = 5 if quick else BLOCKS
    for name, compute in problems().items():
        pair = [
            Peer(OURS, by_tapekit(compute, blocks), blocks),
            Peer("tf.GradientTape(persistent=True)", by_tensorflow(compute, blocks), blocks),
        ]
        yield compare(f"tape: {name}", pair, 1 if quick else 15, 1e-6)
