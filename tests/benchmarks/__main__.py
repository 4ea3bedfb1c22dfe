"""Measures a step of tapekit against its peers, interleaved in one run: `python -m tests.benchmarks`.

Needs the extra `benchmarks`. Times differ from machine to machine; the ratios are what counts.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import statistics
import time

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import tensorflow as tf

import tapekit as tk

jax.config.update("jax_enable_x64", True)

STEPS, ROUNDS = 100_000, 15
HAND_STEPS = 300


def rosenbrock(x):
    """The Rosenbrock function of a TensorFlow or JAX vector."""
    total = jnp.sum if isinstance(x, jax.Array) else tf.reduce_sum
    return total(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


PROBLEMS = {
    "quadratic, SGD": (lambda x: (x - 4.0) ** 2, np.float64(0.0), keras.optimizers.SGD, optax.sgd, 1e-6),
    "Rosenbrock 100, Adam": (rosenbrock, np.full(100, -1.2), keras.optimizers.Adam, optax.adam, 1e-4),
}


def by_tapekit(function, start, optimizer, rate, callbacks=None, steps=STEPS):
    """The loop with a history and one criterion, and a limit."""
    x = tf.Variable(start)
    loop = tk.OptimizationLoop(optimizer(rate), tolerance=1e-300, max_iterations=steps)

    def loss():
        return function(x)

    def run():
        x.assign(start)
        return loop.minimize(loss, [x], callbacks=callbacks).history["loss"][-1]

    return run


def by_jax(function, start, optimizer, rate):
    """A jitted `while_loop` that records the same array under the same criterion."""
    transform = optimizer(rate)

    @jax.jit
    def minimize(x):
        def proceed(carry):
            return (carry[0] < STEPS) & ~carry[4]

        def advance(carry):
            step, x, state, last, _, history = carry
            loss, gradient = jax.value_and_grad(function)(x)
            updates, state = transform.update(gradient, state, x)
            stop = jnp.abs(loss - last) <= 1e-300
            return step + 1, optax.apply_updates(x, updates), state, loss, stop, history.at[step].set(loss)

        return jax.lax.while_loop(proceed, advance, (0, x, transform.init(x), jnp.inf, False, jnp.zeros(STEPS)))

    return lambda: np.asarray(minimize(jnp.asarray(start))[5])[-1]


def by_hand(function, start, optimizer, rate, compiled):
    """The loop that people write: a tape, `apply_gradients` and `float(loss)` at every step."""
    x = tf.Variable(start)
    optimizer = optimizer(rate)
    optimizer.build([x])

    def step():
        with tf.GradientTape() as tape:
            loss = function(x)
        optimizer.apply_gradients(zip(tape.gradient(loss, [x]), [x], strict=True))
        return loss

    step = tf.function(step) if compiled else step

    def run():
        for _ in range(HAND_STEPS):
            loss = float(step())
        return loss

    return run


def measure(peers, rounds=ROUNDS):
    """Runs all peers in turn and returns the cold time and the median warm time of each, in microseconds a step."""
    times = {name: [] for name in peers}
    for _ in range(rounds):
        for name, (run, steps) in peers.items():
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) / steps)
    return {name: (values[0] * peers[name][1], statistics.median(values[2:]) * 1e6) for name, values in times.items()}


def main():
    """Prints one table a problem."""
    for title, (function, start, optimizer, jax_optimizer, rate) in PROBLEMS.items():
        arguments = function, start, optimizer, rate
        live = by_tapekit(*arguments, callbacks=[lambda step, logs: None], steps=HAND_STEPS)
        peers = {
            "tapekit": (by_tapekit(*arguments), STEPS),
            "JAX + optax, jitted while_loop": (by_jax(function, start, jax_optimizer, rate), STEPS),
            "tapekit, live callback at every step": (live, HAND_STEPS),
            "tf.function step by hand": (by_hand(*arguments, compiled=True), HAND_STEPS),
            "eager loop by hand": (by_hand(*arguments, compiled=False), HAND_STEPS),
        }
        measured = measure(peers)
        print(f"\n| {title} | first run, s | warm, us a step | beside tapekit |\n| --- | --- | --- | --- |")
        for name, (cold, warm) in measured.items():
            print(f"| {name} | {cold:.2f} | {warm:.4g} | {warm / measured['tapekit'][1]:.3g} |", flush=True)


if __name__ == "__main__":
    main()
