"""Measures a `PersistentTape` against `tf.GradientTape(persistent=True)` with `del`: `python -m tests.benchmarks.tape`.

Both run in turn, block by block, so that a change of the machine's speed meets both. Times differ from machine to
machine; the ratios are what counts.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import gc
import statistics
import time

import keras
import tensorflow as tf

import tapekit as tk

ROUNDS = 5000

x = tf.Variable(1.0)
pair = [tf.Variable(1.0), keras.Variable(2.0)]
inputs = tf.random.stateless_normal([32, 8], [0, 1])
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
weights = [variable.value for variable in model.trainable_variables]


def article():
    """The value and intermediate of `z = x - 4; y = z**2`."""
    z = x - 4.0
    return z**2, z, x


def two_variables():
    """A list of variables as sources."""
    z = pair[0] * pair[1].value
    return z**2, z, [pair[0], pair[1].value]


def dense_model():
    """A small model and its weights."""
    z = model(inputs)
    return tf.reduce_mean(z**2), z, weights


def by_tensorflow(compute):
    """Two gradients by TensorFlow's own tape, which the caller deletes."""
    with tf.GradientTape(persistent=True) as tape:
        y, z, sources = compute()
    found = tape.gradient(y, z), tape.gradient(y, sources)
    del tape
    return found


def by_tapekit(compute):
    """Two gradients by a tape that releases itself."""
    with tk.PersistentTape() as tape:
        y, z, sources = compute()
        return tape.gradient(y, z), tape.gradient(y, sources)


def ops(by, compute):
    """The number of ops in the graph of a `tf.function`."""
    return len(tf.function(lambda: by(compute)).get_concrete_function().graph.get_operations())


def measure(compute, rounds=ROUNDS):
    """The median time of a block by each tape, in microseconds."""
    times = {by_tensorflow: [], by_tapekit: []}
    for turn in range(rounds):
        for by in list(times)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            by(compute)
            times[by].append(time.perf_counter() - started)
    return [statistics.median(values[rounds // 10 :]) * 1e6 for values in times.values()]


def main():
    """Prints one table."""
    print("| block with two gradients | tf.GradientTape, us | PersistentTape, us | overhead | ops in a graph |")
    print("| --- | --- | --- | --- | --- |")
    gc.disable()
    for compute, rounds in ((article, ROUNDS), (two_variables, ROUNDS), (dense_model, ROUNDS // 5)):
        theirs, ours = measure(compute, rounds)
        counts = f"{ops(by_tensorflow, compute)}, {ops(by_tapekit, compute)}"
        print(f"| {compute.__name__} | {theirs:.1f} | {ours:.1f} | {ours / theirs - 1:.1%} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
