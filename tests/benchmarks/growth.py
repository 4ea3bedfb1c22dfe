"""How time and memory grow with the work: steps, numbers in a variable, and variables."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import itertools
import json
import sys
import time
from collections.abc import Iterator

from tests.benchmarks.harness import Row, Table, in_new_processes, peak_megabytes

STEPS_OF_MANY = 200


def measure(what: str, amount: int) -> dict[str, object]:
    """Minimizes a sum of squares by Adam: so many steps, numbers in one variable, or variables."""
    import keras
    import tensorflow as tf

    import tapekit as tk

    count, size = (amount, 1) if what == "variables" else (1, amount if what == "numbers" else 2)
    steps = amount if what == "steps" else STEPS_OF_MANY
    variables = [tf.Variable(tf.zeros(size)) for _ in range(count)]
    loop = tk.OptimizationLoop(keras.optimizers.Adam(1e-3), max_iterations=steps, keep_best=False)
    loss = lambda: tf.add_n([tf.reduce_sum((x - 4.0) ** 2) for x in variables])  # noqa: E731  # traced once
    times = []
    for _ in range(6):
        started = time.perf_counter()
        loop.minimize(loss, variables)
        times.append(time.perf_counter() - started)
    return {"cold": times[0], "warm": times[2:], "steps": steps, "megabytes": peak_megabytes()}


def tables(quick: bool) -> Iterator[Table]:
    """Measures growth, each amount in a process of its own.

    Args:
        quick: whether to take one small amount of each.

    Yields:
        A table for steps, one for numbers, one for variables.
    """
    amounts = {
        "steps": [10**n for n in range(2, 7)],
        "numbers": [10**n for n in range(8)],
        "variables": [10**n for n in range(4)],
    }
    runs = [(what, amount) for what, found in amounts.items() for amount in (found[1:2] if quick else found)]
    measured = zip(runs, in_new_processes(__name__, runs, 2 if quick else 1), strict=True)
    for what, group in itertools.groupby(measured, lambda pair: pair[0][0]):
        yield Table(f"growth with {what}", [Row(f"{amount:,} {what}", **found) for (_, amount), found in group])


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
