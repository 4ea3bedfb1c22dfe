"""Small programs without tapekit that show what it cannot be faster than."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tests.benchmarks.harness import Peer, Table, compare, installed

RATE = 2.0**-20
CALLS = 100


def by_tensorflow(steps: int, is_variable: bool) -> Callable[[], float]:
    """The descent of (x - 4)^2 in one `tf.while_loop` under XLA, with the rate a constant or, as Keras has it, not."""
    x, rate = tf.Variable(0.0, dtype=tf.float64), tf.Variable(RATE)

    @tf.function(jit_compile=True, autograph=False)
    def descend() -> Any:
        factor = tf.cast(rate, tf.float64) if is_variable else RATE

        def advance(step: Any, x: Any) -> Any:
            return step + 1, x - factor * (2.0 * (x - 4.0))

        return tf.while_loop(lambda step, x: step < steps, advance, (0, x.read_value()))[1]

    return lambda: float(descend())


def by_jax(steps: int, is_variable: bool) -> Callable[[], float]:
    """The same in JAX."""
    import jax

    jax.config.update("jax_enable_x64", True)

    @jax.jit
    def descend(x: Any, rate: Any) -> Any:
        factor = rate if is_variable else RATE
        return jax.lax.fori_loop(0, steps, lambda _, x: x - factor * (2.0 * (x - 4.0)), x)

    return lambda: float(descend(0.0, RATE))


def calls() -> dict[str, Callable[[], float]]:
    """Calls of a compiled function that adds one to a number, and gives the sum to Python."""
    number = tf.constant(1.0)
    add = tf.function(lambda x: x + 1.0, jit_compile=True, autograph=False)
    found = {"TensorFlow, jit_compile=True": lambda: float([add(number) for _ in range(CALLS)][-1])}
    if installed("jax"):
        import jax

        other, jitted = jax.numpy.float32(1.0), jax.jit(lambda x: x + 1.0)
        found["jax.jit"] = lambda: float([jitted(other) for _ in range(CALLS)][-1])
    return found


def tables(quick: bool) -> Iterator[Table]:
    """Measures the limits.

    Args:
        quick: whether to take few steps once.

    Yields:
        A table for the cost of a call, and one for a learning rate that the compiler does not know.
    """
    rounds = 1 if quick else 15
    peers = [Peer(name, run, CALLS) for name, run in calls().items()]
    yield compare("limit: a call, a step being one", peers, rounds, 0.0)
    steps = 1_000 if quick else 100_000
    makers = {"TensorFlow, XLA": by_tensorflow} | ({"JAX": by_jax} if installed("jax") else {})
    peers = [
        Peer(f"{name}, the rate {what}", make(steps, is_variable), steps)
        for name, make in makers.items()
        for what, is_variable in (("a constant", False), ("not", True))
    ]
    yield compare(f"limit: a descent, {steps:,} steps", peers, rounds, 1e-9)
