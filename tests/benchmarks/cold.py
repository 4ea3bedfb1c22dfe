"""A process that begins: how long the import takes, and the first result of a short run."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import importlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.benchmarks.harness import OURS, Row, Table, in_new_processes, installed

IMPORTS = {
    OURS: ("tapekit",),
    "eager loop by hand": ("tensorflow", "keras"),
    "tfp.math.minimize": ("tensorflow", "tf_keras", "tensorflow_probability"),
    "tfp.math.minimize, XLA": ("tensorflow", "tf_keras", "tensorflow_probability"),
}


def measure(who: str, steps: int) -> dict[str, float]:
    """Imports what somebody needs, and makes one run of Rosenbrock's function in 100 dimensions."""
    started = time.perf_counter()
    for module in IMPORTS[who]:
        importlib.import_module(module)
    imported = time.perf_counter()
    from tests.benchmarks import functions

    problem = functions.problems()["Rosenbrock 100, Adam"]
    makers: dict[str, Any] = {
        OURS: functions.by_tapekit,
        "eager loop by hand": lambda problem, n: functions.by_hand(problem, n, compiled=False),
        "tfp.math.minimize": lambda problem, n: functions.by_tfp(problem, n, jit=False),
        "tfp.math.minimize, XLA": lambda problem, n: functions.by_tfp(problem, n, jit=True),
    }
    ready = time.perf_counter()
    loss = makers[who](problem, steps).run()
    return {"import": imported - started, "first": time.perf_counter() - ready, "loss": loss}


def tables(quick: bool) -> Iterator[Table]:
    """Compares first runs, each in a process of its own.

    Args:
        quick: whether to make one short run of each.

    Yields:
        A table for the imports, and one for each number of steps; a step is a whole run.
    """
    whom = [who for who in IMPORTS if "tfp" not in who or installed("tensorflow-probability", "tf_keras")]
    imports: dict[str, list[float]] = {who: [] for who in whom}
    runs = []
    for steps in (10,) if quick else (10, 100, 1000):
        found: dict[str, list[dict[str, float]]] = {who: [] for who in whom}
        turns = [(who, steps) for _ in range(1 if quick else 5) for who in whom]
        for (who, _), made in zip(turns, in_new_processes(__name__, turns, 2 if quick else 1), strict=True):
            found[who].append(made)
            imports[who].append(made["import"])
        rows = [
            Row(who, 1, made[0]["first"], [m["first"] for m in made], made[0]["loss"]) for who, made in found.items()
        ]
        runs.append(Table(f"a new process, first run of {steps} steps", rows))
    yield Table("a new process, import", [Row(who, 1, times[0], times) for who, times in imports.items()])
    yield from runs


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
