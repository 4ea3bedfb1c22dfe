"""Measures what `Progress` costs a run: `python -m tests.benchmarks.progress`.

The same run of about two seconds is made with and without it, interleaved, drawn for a terminal. Times differ from
machine to machine; the ratios are what counts.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TERM"] = "xterm-256color"

import io
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

import tapekit as tk

ROUNDS, SECONDS = 9, 2.0


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        """Says so."""
        return True


def by_minimize():
    """Returns what minimizes a function of 100 variables for some steps, with callbacks."""
    x = tf.Variable(np.full(100, -1.2))
    optimizer = keras.optimizers.Adam(1e-4)
    loops = {}

    def loss():
        return tf.reduce_sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)

    def run(steps, callbacks):
        loop = loops.setdefault(steps, tk.OptimizationLoop(optimizer, tolerance=1e-300, max_iterations=steps))
        x.assign(np.full(100, -1.2))
        loop.minimize(loss, [x], callbacks)

    return run, 100_000


def by_fit():
    """Returns what trains a small model on arrays for some epochs, with callbacks."""
    inputs = np.linspace(-1.0, 1.0, 16_000, dtype="float32")[:, None]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    loop = tk.OptimizationLoop()
    return lambda epochs, callbacks: loop.fit(
        model, inputs, np.sin(3.0 * inputs), epochs=epochs, verbose=0, callbacks=callbacks
    ), 10


def seconds(run, *arguments):
    """Returns how long a call takes."""
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def main() -> None:
    """Prints the ratio of runs with and without."""
    for title, (run, work) in {"minimize, Rosenbrock 100": by_minimize(), "fit, dense": by_fit()}.items():
        run(work, [])
        work = int(work * SECONDS / seconds(run, work, []))
        run(work, [])
        pairs = []
        for turn in range(ROUNDS):
            shown = [tk.callbacks.Progress(file=Terminal(), verbose=1)]
            both = [seconds(run, work, callbacks) for callbacks in ([[], shown], [shown, []])[turn % 2]]
            pairs.append(both if turn % 2 == 0 else both[::-1])
        without = statistics.median(plain for plain, _ in pairs)
        ratios = [shown / plain for plain, shown in pairs]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{title}: {without:.2f} s without, ratio {statistics.median(ratios):.3f}, {spread}")


if __name__ == "__main__":
    main()
