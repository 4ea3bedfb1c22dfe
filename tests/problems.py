"""The problems that the tests share: objective, start, known minimum, source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Problem:
    """An objective of variables, where to start, and where its minimum is.

    `make` returns the variables at their start and the objective, a function of no arguments.
    """

    name: str
    make: Callable[[], tuple[list[Any], Callable[[], Any]]]
    minimum: float
    minimizer: list[Any] | None
    source: str
    learning_rate: float = 0.01


def _of(function: Callable[[Any], Any], start: Any) -> Callable[[], tuple[list[Any], Callable[[], Any]]]:
    def make() -> tuple[list[Any], Callable[[], Any]]:
        x = tf.Variable(np.asarray(start, np.float64), name="x")
        return [x], lambda: function(x)

    return make


def rosenbrock(x: Any) -> Any:
    return tf.reduce_sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def _beale(x: Any) -> Any:
    return sum((c - x[0] + x[0] * x[1] ** p) ** 2 for c, p in ((1.5, 1), (2.25, 2), (2.625, 3)))


def _himmelblau(x: Any) -> Any:
    return (x[0] ** 2 + x[1] - 11.0) ** 2 + (x[0] + x[1] ** 2 - 7.0) ** 2


def _booth(x: Any) -> Any:
    return (x[0] + 2.0 * x[1] - 7.0) ** 2 + (2.0 * x[0] + x[1] - 5.0) ** 2


def _matyas(x: Any) -> Any:
    return 0.26 * (x[0] ** 2 + x[1] ** 2) - 0.48 * x[0] * x[1]


_CURVATURES = np.logspace(0, 3, 5)


def _ill_conditioned(x: Any) -> Any:
    return 0.5 * tf.reduce_sum(_CURVATURES * (x - 1.0) ** 2)


def _logistic_regression() -> tuple[list[Any], Callable[[], Any]]:
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    features = tf.constant((features - features.mean(0)) / features.std(0))
    labels = tf.constant(labels, tf.float64)
    weights = tf.Variable(np.zeros(features.shape[1]), name="weights")
    bias = tf.Variable(np.float64(0.0), name="bias")

    def loss() -> Any:
        logits = tf.linalg.matvec(features, weights) + bias
        cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
        return tf.reduce_mean(cross_entropy) + 0.005 * tf.reduce_sum(weights**2)

    return [weights, bias], loss


def _two_dtypes() -> tuple[list[Any], Callable[[], Any]]:
    a = tf.Variable(np.float32(3.0), name="a")
    b = keras.Variable(np.asarray([1.0, -2.0]), dtype="float64", name="b")
    return [a, b], lambda: tf.cast((a - 1.0) ** 2, tf.float64) + tf.reduce_sum((b.value - 0.5) ** 2)


def _embedding() -> tuple[list[Any], Callable[[], Any]]:
    table = tf.Variable(np.arange(12.0).reshape(4, 3), name="table")
    rows = tf.constant([0, 2, 2])  # row 2 twice: its gradients must add up
    target = tf.constant([[1.0, 1.0, 1.0]], tf.float64)
    return [table], lambda: tf.reduce_sum((tf.gather(table, rows) - target) ** 2)


_SURJANOVIC = "Surjanovic and Bingham, Virtual Library of Simulation Experiments"

PROBLEMS = [
    Problem("quadratic", _of(lambda x: (x - 4.0) ** 2, 0.0), 0.0, [4.0], "the one-variable parabola", 0.1),
    Problem("rosenbrock_2", _of(rosenbrock, [-1.2, 1.0]), 0.0, [[1.0, 1.0]], "Rosenbrock 1960", 2e-4),
    Problem("rosenbrock_100", _of(rosenbrock, np.full(100, -1.2)), 0.0, [np.ones(100)], "Rosenbrock 1960", 1e-4),
    Problem("beale", _of(_beale, [1.0, 1.0]), 0.0, [[3.0, 0.5]], f"Beale 1958; {_SURJANOVIC}", 0.01),
    Problem("himmelblau", _of(_himmelblau, [1.0, 1.0]), 0.0, [[3.0, 2.0]], "Himmelblau 1972", 0.005),
    Problem("booth", _of(_booth, [0.0, 0.0]), 0.0, [[1.0, 3.0]], _SURJANOVIC, 0.05),
    Problem("matyas", _of(_matyas, [8.0, -6.0]), 0.0, [[0.0, 0.0]], _SURJANOVIC, 0.5),
    Problem(
        "ill_conditioned", _of(_ill_conditioned, np.zeros(5)), 0.0, [np.ones(5)], "diagonal, condition 1000", 1.5e-3
    ),
    Problem("negative", _of(lambda x: (x - 1.0) ** 2 - 50.0, 6.0), -50.0, [1.0], "a parabola below zero", 0.1),
    Problem(
        "logistic_regression",
        _logistic_regression,
        0.0995913753,
        None,
        "Wisconsin breast cancer data, L2-regularized; minimum found by SciPy's L-BFGS-B",
        1.0,
    ),
    Problem("two_dtypes", _two_dtypes, 0.0, [1.0, [0.5, 0.5]], "a parabola in float32 and float64", 0.1),
    Problem("embedding", _embedding, 0.0, None, "a lookup with a row named twice", 0.1),
]
BY_NAME = {problem.name: problem for problem in PROBLEMS}
DRIVERS = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
}
