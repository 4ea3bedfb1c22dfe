"""Measures `loop.fit` against `keras.Model.fit`, interleaved in one run: `python -m tests.benchmarks.fit [model ...]`.

Both train the same models on the same batches, with a history, a progress bar and, in the loop, one criterion more.
Times differ from machine to machine; the ratios are what counts.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import io
import resource
import statistics
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tapekit as tk

ROUNDS, BATCH = 7, 32
generator = np.random.default_rng(0)


def images(samples):
    """Random images of 28 x 28 with labels."""
    return generator.normal(size=(samples, 28, 28, 1)).astype("float32"), generator.integers(0, 10, samples)


def flat(samples):
    """Random vectors of 784 numbers with labels."""
    x, y = images(samples)
    return x.reshape(samples, -1), y


def series(samples):
    """Random series of 20 vectors with labels."""
    return generator.normal(size=(samples, 20, 16)).astype("float32"), generator.integers(0, 10, samples)


def tokens(samples):
    """Random texts of 20 tokens out of 2000, with labels."""
    return generator.integers(0, 2000, (samples, 20)), generator.integers(0, 10, samples)


def attention():
    """A functional model with one attention layer."""
    inputs = keras.Input((20, 16))
    hidden = layers.MultiHeadAttention(2, 16)(inputs, inputs)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(hidden)))


def sequential(*inner):
    """A function that makes a classifier of these layers."""
    return lambda: keras.Sequential([*(make() for make in inner), layers.Dense(10)])


def hidden(units=128):
    """A dense layer with ReLU."""
    return lambda: layers.Dense(units, activation="relu")


MODELS = {
    "dense": (sequential(lambda: keras.Input((784,)), hidden()), flat(19200)),
    "wide": (sequential(lambda: keras.Input((784,)), hidden(1024), hidden(1024)), flat(3200)),
    "normalized": (sequential(lambda: keras.Input((784,)), hidden(), layers.BatchNormalization), flat(6400)),
    "dropout": (sequential(lambda: keras.Input((784,)), hidden(), lambda: layers.Dropout(0.5)), flat(6400)),
    "convolutional": (
        sequential(
            lambda: keras.Input((28, 28, 1)),
            lambda: layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D,
            lambda: layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D,
            layers.Flatten,
        ),
        images(3200),
    ),
    "recurrent": (sequential(lambda: keras.Input((20, 16)), lambda: layers.LSTM(32)), series(3200)),
    "embedding": (
        sequential(lambda: keras.Input((20,)), lambda: layers.Embedding(2000, 32), layers.GlobalAveragePooling1D),
        tokens(6400),
    ),
    "attention": (attention, series(3200)),
}


def compiled(name, **settings):
    """A compiled model of the table with its initial weights."""
    keras.utils.set_random_seed(0)
    model = MODELS[name][0]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], **settings)
    return model


def runs(name, stream):
    """One epoch by each of those that are compared."""
    x, y = MODELS[name][1]
    data = {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).prefetch(4)} if stream else {"x": x, "y": y}
    common = data | {"shuffle": False, "verbose": 1} | ({} if stream else {"batch_size": BATCH})

    def by_keras(**settings):
        model = compiled(name, **settings)
        return lambda: model.fit(**common).history["loss"][-1]

    def by_tapekit():
        model = compiled(name)
        loop = tk.OptimizationLoop(stopping=tk.stopping.LossBelow(0.0))
        return lambda: loop.fit(model, **common).epoch_history["loss"][-1]

    tuned = {"steps_per_execution": 50} | ({} if stream else {"jit_compile": True})
    return {"fit": by_keras(), "tuned": by_keras(**tuned), "tapekit": by_tapekit()}


def compare(name, stream):
    """Prints the medians of one model, in microseconds a step, and the ratios."""
    everyone = runs(name, stream)
    times, losses, cold = {who: [] for who in everyone}, {}, {}
    for number in range(ROUNDS + 1):
        for who, run in everyone.items():
            with contextlib.redirect_stdout(io.StringIO()):
                started = time.perf_counter()
                loss = run()
                seconds = time.perf_counter() - started
            if number:
                times[who].append(seconds)
            else:
                cold[who], losses[who] = seconds, loss
    steps = len(MODELS[name][1][0]) / BATCH
    fit, tuned, ours = (1e6 * statistics.median(times[who]) / steps for who in everyone)
    agree = max(abs(loss / losses["fit"] - 1) for loss in losses.values())
    print(
        f"| {name}{', tf.data' if stream else ''} | {fit:.0f} | {tuned:.0f} | {ours:.0f} | {fit / ours:.2f}"
        f" | {tuned / ours:.2f} | {cold['fit']:.1f} | {cold['tapekit']:.1f} | {agree:.0e} |",
        flush=True,
    )


def memory():
    """Prints the peak memory of one fit of 300 MB of data, each in a process of its own."""
    for who in ("fit", "tapekit"):
        output = subprocess.run([sys.executable, "-m", __spec__.name, "--peak", who], capture_output=True, check=True)
        print(f"peak memory of {who}: {output.stdout.decode().strip()} MB for 301 MB of data")


def peak(who):
    """Prints the peak memory of this process after a fit."""
    x, y = np.ones((96_000, 784), "float32"), np.zeros(96_000, "int64")
    model = compiled("dense")
    with contextlib.redirect_stdout(io.StringIO()):
        if who == "fit":
            model.fit(x, y, epochs=2)
        else:
            tk.OptimizationLoop().fit(model, x, y, epochs=2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main():
    """Prints the table."""
    if sys.argv[1:2] == ["--peak"]:
        peak(sys.argv[2])
        return
    columns = ["us a step", "`Model.fit`", "tuned", "`loop.fit`", "fit / loop", "tuned / loop"]
    print("|", " | ".join([*columns, "first fit, s", "first loop, s", "losses differ"]), "|")
    print("|" + " --- |" * 9)
    for name in sys.argv[1:] or MODELS:
        compare(name, stream=False)
    if not sys.argv[1:]:
        compare("dense", stream=True)
        compare("convolutional", stream=True)
        memory()


if __name__ == "__main__":
    main()
