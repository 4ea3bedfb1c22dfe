"""Measures what saving every second costs a run with a megabyte of state: `python -m tests.benchmarks.checkpoint`.

The same run is made with and without a `Checkpoint`, interleaved. Times differ from machine to machine; the ratios are
what counts.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import statistics
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf

import tapekit as tk

ROUNDS, SECONDS = 7, 5.0


def chain(x):
    """The function of Rosenbrock 1960 in any number of dimensions."""
    return tf.reduce_sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def main() -> None:
    """Prints the cost of saving, and how long a checkpoint takes."""
    x = tf.Variable(np.full(30_000, -1.2), name="x")  # with the moments of Adam and the best ones 960 kB
    loss = lambda: chain(x)  # noqa: E731  # one function, so that it is traced once
    optimizer, steps = keras.optimizers.Adam(1e-3), 5000
    for _ in range(3):
        loop = tk.OptimizationLoop(optimizer, max_iterations=steps)
        loop.minimize(loss, [x])
        steps = int(5000 * SECONDS / loop.minimize(loss, [x]).seconds) if steps == 5000 else steps
    rates: dict[str, list[float]] = {"without": [], "with": []}
    writes = []
    for _ in range(ROUNDS):
        for kind, times in rates.items():
            with tempfile.TemporaryDirectory() as directory:
                saving = tk.callbacks.Checkpoint(directory, every=None, seconds=1.0)
                save = saving.save

                def timed(*arguments, save=save):
                    before = time.perf_counter()
                    save(*arguments)
                    writes.append(time.perf_counter() - before)

                saving.save = timed
                callbacks = [saving] if kind == "with" else []
                x.assign(np.full(30_000, -1.2))
                times.append(loop.minimize(loss, [x], callbacks).seconds / steps)
    ratio = statistics.median(a / b for a, b in zip(rates["with"], rates["without"], strict=True))
    for kind, times in rates.items():
        print(f"{kind:8} {statistics.median(times) * 1e6:8.1f} us a step")
    print(f"ratio    {ratio:8.3f}, of {steps} steps and a checkpoint a second")
    print(f"one checkpoint takes {statistics.median(writes) * 1e3:.1f} ms, at most {max(writes) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
