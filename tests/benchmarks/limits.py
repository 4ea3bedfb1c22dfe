"""Small programs without tapekit that show what it cannot be faster than."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.benchmarks import functions
from tests.benchmarks.harness import Peer, Row, Table, compare, in_new_processes, installed

RATE = 2.0**-20
CALLS = 100
OPS = 16
"""The ops of a function that is compiled."""
ONE_KERNEL = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=65536"
"""Lets XLA make one kernel of a loop whose step moves at most so many bytes; 1,024 if `XLA_FLAGS` says nothing."""


def by_tensorflow(steps: int, is_variable: bool, shape: tuple[int, ...] = ()) -> Callable[[], float]:
    """The descent of (x - 4)^2 in one `tf.while_loop` under XLA, with the rate a constant or, as Keras has it, not."""
    x, rate = tf.Variable(tf.zeros(shape, tf.float64)), tf.Variable(RATE)

    @tf.function(jit_compile=True, autograph=False)
    def descend() -> Any:
        factor = tf.cast(rate, tf.float64) if is_variable else RATE

        def advance(step: Any, x: Any) -> Any:
            return step + 1, x - factor * (2.0 * (x - 4.0))

        return tf.while_loop(lambda step, x: step < steps, advance, (0, x.read_value()))[1]

    return lambda: descend().numpy().flat[0].item()


def by_jax(steps: int, is_variable: bool, shape: tuple[int, ...] = ()) -> Callable[[], float]:
    """The same in JAX."""
    import jax

    jax.config.update("jax_enable_x64", True)
    start = jax.numpy.zeros(shape)

    @jax.jit
    def descend(x: Any, rate: Any) -> Any:
        factor = rate if is_variable else RATE
        return jax.lax.fori_loop(0, steps, lambda _, x: x - factor * (2.0 * (x - 4.0)), x)

    return lambda: descend(start, RATE).flatten()[0].item()


MAKERS: dict[str, Callable[..., Callable[[], float]]] = {"TensorFlow, XLA": by_tensorflow, "JAX": by_jax}


def with_history(name: str, steps: int) -> list[Peer]:
    """A loop by hand under XLA that does what a run does, by an optimizer of Keras, and others beside it.

    The loss of each step is recorded, and one looked for that never comes, as is a step that is not finite.
    """
    problem = functions.problems()[name]
    function, start, method, rate = problem
    x, optimizer = tf.Variable(start), functions.keras_optimizer(keras, method, rate)
    optimizer.build([x])

    @tf.function(jit_compile=True, autograph=False)
    def minimize() -> Any:
        def advance(step: Any, _: Any, losses: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = function(x, functions.IN_TF)
            gradient = tape.gradient(loss, x)
            optimizer.apply_gradients([(gradient, x)])
            ends = (loss <= functions.NEVER) | ~tf.math.is_finite(loss + tf.reduce_sum(gradient))
            return step + 1, ends, losses.write(step, loss)

        begun = 0, False, tf.TensorArray(x.dtype, steps, element_shape=[])
        return tf.while_loop(lambda step, ends, _: (step < steps) & ~ends, advance, begun)[2].stack()

    again = functions.again(optimizer, x, start)
    found = [Peer("TensorFlow and Keras, XLA", lambda: float(minimize()[-1]), steps, again)]
    if installed("tensorflow-probability", "tf_keras"):
        found.append(functions.by_tfp(problem, steps, jit=True))
    if installed("jax", "optax"):
        found.append(functions.by_jax(problem, steps))
    return found


def copies(samples: int) -> dict[str, Callable[[], float]]:
    """Copies of an array, by NumPy, which asks the system for large pages, and by TensorFlow, which does not."""
    array = np.ones((samples, 784), np.float32)
    return {
        "NumPy": lambda: array.copy()[0, 0].item(),
        "TensorFlow": lambda: tf.constant(array)[0, 0].numpy().item(),
    }


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


def compilations() -> dict[str, Callable[[], float]]:
    """Compilations of a function that looks at numbers, by an op that TensorFlow translates by MLIR or by another."""
    numbers = tf.ones([OPS], tf.float64)

    def compiling(look: Callable[[Any], Any]) -> Callable[[], float]:
        def run() -> float:
            @tf.function(jit_compile=True, autograph=False)
            def count(numbers: Any) -> Any:
                return tf.add_n([tf.cast(look(number), tf.float64) for number in tf.unstack(numbers)])

            return float(count(numbers))

        return run

    return {"tf.math.is_finite": compiling(tf.math.is_finite), "a comparison": compiling(lambda x: x < math.inf)}


def passes(batches: int) -> dict[str, Callable[[], float]]:
    """Passes over a pipeline, after which its iterator is deleted, at once or by a thread that keeps nobody waiting."""
    weights = tf.random.normal((784, 784), seed=0)
    samples = tf.random.normal((batches * 512, 784), seed=0)
    dataset = tf.data.Dataset.from_tensor_slices(samples).batch(512, drop_remainder=True).prefetch(4)

    @tf.function
    def read(iterator: Any) -> Any:
        total = 0.0
        for batch in iterator:
            total += tf.reduce_sum(tf.matmul(batch, weights))
        return total

    def run(deleting: Callable[[Callable[[], None]], None]) -> float:
        held = [iter(dataset)]
        total = float(read(held[0]))
        deleting(held.clear)
        return total

    def by_thread(delete: Callable[[], None]) -> None:
        threading.Thread(target=delete).start()

    ways = {"TensorFlow, deleted at once": lambda delete: delete(), "TensorFlow, by a thread": by_thread}
    return {name: functools.partial(run, deleting) for name, deleting in ways.items()}


def convolutions(steps: int) -> dict[str, Callable[[], float]]:
    """Gradients of a convolution with respect to its kernel, as TensorFlow has it and as a convolution that it is."""
    images = tf.random.stateless_uniform((64, 28, 28, 8), (1, 2))
    above = tf.random.stateless_uniform((64, 26, 26, 16), (3, 4), -1.0, 1.0)
    sizes, settings = (3, 3, 8, 16), {"strides": [1, 1, 1, 1], "padding": "VALID"}

    def of_tensorflow(images: Any) -> Any:
        return tf.raw_ops.Conv2DBackpropFilter(input=images, filter_sizes=sizes, out_backprop=above, **settings)

    def transposed(images: Any) -> Any:
        others = tf.transpose(images, (3, 1, 2, 0)), tf.transpose(above, (1, 2, 0, 3))
        return tf.transpose(tf.nn.conv2d(*others, 1, "VALID"), (1, 2, 0, 3))

    def in_a_loop(gradient: Callable[[Any], Any], jit: bool) -> Callable[[], float]:
        @tf.function(jit_compile=jit, autograph=False)
        def run() -> Any:
            def advance(step: Any, kernel: Any) -> Any:
                return step + 1, kernel - 1e-4 * gradient(images + kernel[0, 0, 0, 0])

            return tf.while_loop(lambda step, kernel: step < steps, advance, (0, tf.zeros(sizes)))[1]

        return lambda: float(tf.linalg.norm(run()))

    compiled = tf.function(of_tensorflow, jit_compile=True)
    return {
        "graph": in_a_loop(of_tensorflow, jit=False),
        "XLA, called in a loop of a graph": in_a_loop(compiled, jit=False),
        "XLA, in a loop": in_a_loop(of_tensorflow, jit=True),
        "XLA, in a loop, transposed before": in_a_loop(transposed, jit=True),
    }


def embeddings(steps: int) -> dict[str, Callable[[], float]]:
    """Updates of an embedding by Keras's Adam, which squares each slice of a gradient that is not made dense before."""
    slices = tf.random.stateless_uniform((10_240, 32), (1, 2), -1.0, 1.0)
    rows = tf.random.stateless_uniform([10_240], (3, 4), 0, 2_000, tf.int32)

    def in_a_loop(prepare: Callable[[Any], Any]) -> Callable[[], float]:
        table, adam = keras.Variable(tf.zeros((2_000, 32))), keras.optimizers.Adam()
        adam.build([table])
        _, _, momentum, _ = adam.variables

        @tf.function(jit_compile=True, autograph=False)
        def run() -> Any:
            def advance(step: Any) -> Any:
                values = slices * tf.cast(step, tf.float32)
                adam.apply_gradients([(prepare(tf.IndexedSlices(values, rows, tf.constant((2_000, 32)))), table)])
                return (step + 1,)

            tf.while_loop(lambda step: step < steps, advance, (0,))
            return tf.linalg.norm(momentum.value)

        return lambda: float(run())

    return {"slices": in_a_loop(lambda gradient: gradient), "made dense before": in_a_loop(tf.convert_to_tensor)}


def tables(quick: bool) -> Iterator[Table]:
    """Measures the limits.

    Args:
        quick: whether to take few steps once.

    Yields:
        A table for the cost of a call, one for a compilation, one for a copy, one for the end of a pipeline, one for
        convolutions, one for an embedding, one for a learning rate that the compiler does not know, three for what a
        run does beside the descent, and one for a step that moves more bytes than XLA has in a loop that is one kernel.
    """
    rounds = 1 if quick else 15
    peers = [Peer(name, run, CALLS) for name, run in calls().items()]
    yield compare("limit: a call, a step being one", peers, rounds, 0.0)
    peers = [Peer(name, run, OPS) for name, run in compilations().items()]
    yield compare(f"limit: a compilation of {OPS} ops, a step being one", peers, rounds, 0.0)
    samples = 128 if quick else 12_800
    peers = [Peer(name, run, 1) for name, run in copies(samples).items()]
    yield compare(f"limit: a copy of {samples:,} images of 28 by 28, a step being one", peers, rounds, 0.0)
    batches = 2 if quick else 25
    peers = [Peer(name, run, batches) for name, run in passes(batches).items()]
    yield compare(f"limit: a pass over a pipeline of {batches} batches", peers, rounds, 1e-6)
    steps = 2 if quick else 10
    peers = [Peer(name, run, steps) for name, run in convolutions(steps).items()]
    yield compare("limit: the gradient of a convolution", peers, rounds, 1e-3)
    steps = 2 if quick else 100
    peers = [Peer(name, run, steps) for name, run in embeddings(steps).items()]
    yield compare("limit: the update of an embedding", peers, rounds, 1e-4)
    steps = 1_000 if quick else 100_000
    makers = MAKERS if installed("jax") else {"TensorFlow, XLA": by_tensorflow}
    peers = [
        Peer(f"{name}, the rate {what}", make(steps, is_variable), steps)
        for name, make in makers.items()
        for what, is_variable in (("a constant", False), ("not", True))
    ]
    yield compare(f"limit: a descent, {steps:,} steps", peers, rounds, 1e-9)
    for name in ("quadratic, SGD", "Rosenbrock 10000, Adam", "logistic regression, Adam"):
        few = steps if name.startswith("quadratic") else min(steps, 10_000)
        title = f"limit: {name}, with a history, {few:,} steps"
        yield compare(title, with_history(name, few), rounds, 1e-4)  # for optax has a float32 in it

    cases = {f"{who}{how}": (who, flags) for who in makers for how, flags in (("", ""), (", one kernel", ONE_KERNEL))}
    names = list(cases)[:1] if quick else 5 * list(cases)
    found: dict[str, list[dict[str, float]]] = {}
    for name, made in zip(names, in_new_processes(__name__, [(*cases[n], steps) for n in names], 1), strict=True):
        found.setdefault(name, []).append(made)
    rows = [
        Row(name, steps, made[0]["first"], [once["second"] for once in made], made[0]["loss"])
        for name, made in found.items()
    ]
    yield Table(f"limit: a descent in 100 dimensions, {steps:,} steps", rows)


def measure(who: str, flags: str, steps: int) -> dict[str, float]:
    """Makes the descent in a hundred dimensions twice, in a process in which XLA has not been used."""
    os.environ["XLA_FLAGS"] = flags
    run, times = MAKERS[who](steps, False, (100,)), [time.perf_counter()]
    for _ in range(2):
        value = run()
        times.append(time.perf_counter())
    return {"first": times[1] - times[0], "second": times[2] - times[1], "loss": value}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
