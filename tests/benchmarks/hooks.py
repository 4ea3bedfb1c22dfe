"""What looking costs: callbacks, statistics, the best variables and checkpoints, beside a loop without them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

import tapekit as tk
from tests.benchmarks import functions, models
from tests.benchmarks.harness import OURS, Peer, Table, compare

STEPS, TIMED_STEPS = 20_000, 1_000


class Look(tk.Callback):
    """A callback that needs the host."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def on_step(self, step: int, logs: dict[str, Any]) -> None:
        """Looks at the loss."""
        self.loss = logs["loss"]


def looks(folder: str) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Returns callbacks and settings of a loop, by what they are."""
    callbacks = tk.callbacks
    return {
        OURS: ([], {}),
        "one callback, every=100": ([Look(100)], {}),
        "five callbacks, every=100": ([Look(100) for _ in range(5)], {}),
        "one callback, every=1": ([Look(1)], {}),
        "five callbacks, every=1": ([Look(1) for _ in range(5)], {}),
        "a replayable callback": ([callbacks.JSONLinesLogger(f"{folder}/log", every=10)], {}),
        "Progress": ([callbacks.Progress(file=open("/dev/null", "w"))], {}),
        "gradient statistics, every=100": ([callbacks.GradientStatistics(every=100)], {}),
        "keep_best": ([], {"keep_best": True}),
        "a gradient norm at every step": ([], {"stopping": tk.stopping.GradientNormBelow(0.0)}),
        "a checkpoint a second": ([callbacks.Checkpoint(f"{folder}/saved", every=None, seconds=1.0)], {}),
    }


def tables(quick: bool) -> Iterator[Table]:
    """Compares a loop with itself.

    Args:
        quick: whether to take few steps.

    Yields:
        A table for a function, and one for a model.
    """
    with tempfile.TemporaryDirectory() as folder:
        most, few = (300, 300) if quick else (STEPS, TIMED_STEPS)
        problem = functions.problems()["Rosenbrock 100, Adam"]
        peers = [functions.by_hand(problem, few, compiled=True)]
        for name, (callbacks, settings) in looks(folder).items():
            steps = few if name.endswith("every=1") else most
            peers.append(functions.by_tapekit(problem, steps, name, callbacks, **settings))
        peers = [dataclasses.replace(peer, is_compared=False) for peer in peers]
        yield compare("Rosenbrock 100, looked at", peers, 1 if quick else 7, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        count = 256 if quick else models.SAMPLES
        data = {"x": models.MODELS["dense"][1]()[:count], "y": models.LABELS[:count], "batch_size": 32}
        peers = [
            Peer(name, models.by_tapekit("dense", data, callbacks, **settings), count // 32)
            for name, (callbacks, settings) in looks(folder).items()
            if "norm" not in name
        ]
        batches = tf.data.Dataset.from_tensor_slices((data["x"], data["y"])).batch(32).prefetch(4)
        peers.insert(0, Peer("tf.function step by hand", models.by_hand("dense", batches, count), count // 32))
        yield compare("dense model, looked at", peers, 1 if quick else 5, 1e-3)
