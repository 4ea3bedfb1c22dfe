"""Functions of a few variables or many: the quadratic, Rosenbrock's, and a logistic regression, by everyone."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import tapekit as tk
from tests.benchmarks.harness import OURS, Peer, Table, check_same, compare, installed

IN_TF = types.SimpleNamespace(sum=tf.reduce_sum, softplus=tf.nn.softplus, dot=tf.linalg.matvec)
EPSILON = 1e-15  # so small that it does not matter where each library adds it
BY_HAND = 300
"""The most steps that are taken from Python; beyond, the time of a step does not change."""
TOLERANCE = 1e-5
"""How much losses may differ, relatively: optax computes its bias correction in float32."""
NEVER = -1.0
"""A loss that is looked for at every step and never met, so that all take all steps."""


def quadratic(x, lib):
    """(x - 4)^2."""
    return (x - 4.0) ** 2


def rosenbrock(x, lib):
    """H. H. Rosenbrock's function of 1960, in any number of dimensions."""
    return lib.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def logistic(w, lib):
    """The mean logistic loss with a ridge of 1/2, as `LogisticRegression(C=1)` has it; the last weight is free."""
    margins = lib.dot(lib.constant(TUMOURS), w)
    return (lib.sum(lib.softplus(-margins)) + 0.5 * lib.sum(w[:-1] ** 2)) / len(TUMOURS)


IN_TF.constant = tf.constant

X, LABELS = load_breast_cancer(return_X_y=True)
X = np.hstack([(X - X.mean(axis=0)) / X.std(axis=0), np.ones((len(X), 1))])
TUMOURS = X * (2.0 * LABELS[:, None] - 1.0)
"""The breast-cancer data of scikit-learn, standardized, with a column of ones, times the labels -1 and 1."""

Problem = tuple[Callable[..., Any], np.ndarray, str, float]
"""A function, where it starts, "adam" or "sgd", and a learning rate that float32 has exactly, as Keras keeps it so."""


def by_tapekit(problem: Problem, steps: int, name: str = OURS, callbacks: Any = None, **settings: Any) -> Peer:
    """The loop with a history, one criterion and a limit."""
    function, start, method, rate = problem
    x, optimizer = tf.Variable(start, name="x"), keras_optimizer(keras, method, rate)
    loop = tk.OptimizationLoop(
        optimizer, **{"stopping": tk.stopping.LossBelow(NEVER), "max_iterations": steps, "keep_best": False, **settings}
    )
    loss = lambda: function(x, IN_TF)  # noqa: E731  # one function, so that it is traced once

    def run() -> float:
        return float(loop.minimize(loss, [x], callbacks).history["loss"][-1])

    return Peer(name, run, steps, again(optimizer, x, start))


def keras_optimizer(of: Any, method: str, rate: float) -> Any:
    """An optimizer of Keras 3 or of tf_keras."""
    return of.optimizers.Adam(rate, epsilon=EPSILON) if method == "adam" else of.optimizers.SGD(rate)


def again(optimizer: Any, x: tf.Variable, start: np.ndarray) -> Callable[[], None]:
    """Returns what puts a variable and the state of an optimizer back."""

    def reset() -> None:
        x.assign(start)
        for variable in optimizer.variables:
            if "learning_rate" not in getattr(variable, "path", variable.name):
                variable.assign(tf.zeros(variable.shape, variable.dtype))

    return reset


def by_hand(problem: Problem, steps: int, compiled: bool) -> Peer:
    """The loop that people write: a tape, `apply_gradients`, and the loss taken to Python at every step."""
    function, start, method, rate = problem
    x, optimizer = tf.Variable(start), keras_optimizer(keras, method, rate)
    optimizer.build([x])

    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = function(x, IN_TF)
        optimizer.apply_gradients(zip(tape.gradient(loss, [x]), [x], strict=True))
        return loss

    step = tf.function(step) if compiled else step

    def run() -> float:
        losses: list[float] = []
        while len(losses) < steps:
            losses.append(float(step()))
            if losses[-1] <= NEVER:
                break
        return losses[-1]

    name = "tf.function step by hand" if compiled else "eager loop by hand"
    return Peer(name, run, steps, again(optimizer, x, start))


def by_tfp(problem: Problem, steps: int, jit: bool) -> Peer:
    """`tfp.math.minimize` with an optimizer of Keras 2, as its documentation has it, and a history of the loss."""
    import tensorflow_probability as tfp
    import tf_keras

    function, start, method, rate = problem
    x, optimizer = tf.Variable(start), keras_optimizer(tf_keras, method, rate)
    optimizer.build([x])

    @tf.function(jit_compile=jit, autograph=False)
    def minimize() -> Any:
        return tfp.math.minimize(lambda: function(x, IN_TF), steps, optimizer, trainable_variables=[x])

    name = "tfp.math.minimize, XLA" if jit else "tfp.math.minimize"
    return Peer(name, lambda: float(minimize()[-1]), steps, again(optimizer, x, start))


def by_jax(problem: Problem, steps: int) -> Peer:
    """A jitted `while_loop` that records the same array under the same criterion."""
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    lib = types.SimpleNamespace(sum=jnp.sum, softplus=jax.nn.softplus, dot=jnp.dot, constant=jnp.asarray)
    function, start, method, rate = problem
    transform = optax.adam(rate, eps=EPSILON) if method == "adam" else optax.sgd(rate)

    @jax.jit
    def minimize(x: Any) -> Any:
        def proceed(carry: Any) -> Any:
            return (carry[0] < steps) & ~carry[3]

        def advance(carry: Any) -> Any:
            step, x, state, _, history = carry
            loss, gradient = jax.value_and_grad(lambda x: function(x, lib))(x)
            updates, state = transform.update(gradient, state, x)
            return step + 1, optax.apply_updates(x, updates), state, loss <= NEVER, history.at[step].set(loss)

        return jax.lax.while_loop(proceed, advance, (0, x, transform.init(x), False, jnp.zeros(steps)))

    return Peer("JAX + optax, while_loop", lambda: float(np.asarray(minimize(jnp.asarray(start))[4])[-1]), steps)


def by_torch(problem: Problem, steps: int, compiled: bool) -> Peer:
    """The loop that people write in PyTorch; `torch.compile` takes the loss."""
    import torch

    lib = types.SimpleNamespace(
        sum=torch.sum, softplus=torch.nn.functional.softplus, dot=torch.mv, constant=torch.as_tensor
    )
    function, start, method, rate = problem
    loss_of = torch.compile(lambda x: function(x, lib)) if compiled else lambda x: function(x, lib)

    def run() -> float:
        x = torch.tensor(start, requires_grad=True)
        optimizer = torch.optim.Adam([x], rate, eps=EPSILON) if method == "adam" else torch.optim.SGD([x], rate)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(x)
            loss.backward()
            optimizer.step()
            last = loss.item()
        return last

    return Peer("PyTorch, torch.compile" if compiled else "PyTorch, eager", run, steps)


def everyone(problem: Problem, steps: int) -> list[Peer]:
    """Returns all that are installed; those that are slow take fewer steps, of which each takes as long."""
    few = min(steps, BY_HAND)
    found = [by_tapekit(problem, steps), *(by_hand(problem, few, compiled) for compiled in (False, True))]
    if installed("tensorflow-probability", "tf_keras"):
        found += [by_tfp(problem, min(steps, 10_000), jit=False), by_tfp(problem, steps, jit=True)]
    if installed("jax", "optax"):
        found.append(by_jax(problem, steps))
    if installed("torch"):
        found += [by_torch(problem, few, compiled) for compiled in (False, True)]
    return found


def problems(sizes: Sequence[int] = (2, 100, 10_000)) -> dict[str, Problem]:
    """The problems by name: function, start, method and learning rate; Rosenbrock's in the dimensions `sizes`."""
    chains = {f"Rosenbrock {n}, Adam": (rosenbrock, np.full(n, -1.2), "adam", 2.0**-10) for n in sizes}
    weights = np.zeros(TUMOURS.shape[1])
    return {
        "quadratic, SGD": (quadratic, np.float64(0.0), "sgd", 2.0**-20),
        **chains,
        "logistic regression, Adam": (logistic, weights, "adam", 2.0**-7),
    }


def tables(quick: bool) -> Iterator[Table]:
    """Compares everyone at every problem.

    Args:
        quick: whether to take few steps once, of one Rosenbrock, to see that everyone comes to the same.

    Yields:
        A table for each problem and number of steps.
    """
    for name, problem in (problems([100]) if quick else problems()).items():
        yield compare(f"{name}, 100 steps", everyone(problem, 100), 1 if quick else 15, TOLERANCE)
        if quick:
            continue
        is_large = np.size(problem[1]) > 1000
        turns = {10_000: 7, 100_000: 3, 1_000_000: 1} if is_large else {10_000: 7, 100_000: 7, 1_000_000: 3}
        for steps, rounds in turns.items():
            # Those that take fewer steps come elsewhere; that all do the same work has been seen above.
            peers = [dataclasses.replace(peer, is_compared=False) for peer in everyone(problem, steps)]
            yield compare(f"{name}, {steps:,} steps", peers, rounds, TOLERANCE)
    if not quick:  # the last problem, to its end
        reached = {OURS: by_tapekit(problem, 20_000).run(), "scikit-learn": by_scikit_learn()}
        check_same("logistic regression", reached, 1e-6)


def by_scikit_learn() -> float:
    """The loss that `LogisticRegression` reaches."""
    fitted = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(X[:, :-1], LABELS)
    return float(logistic(tf.constant(np.append(fitted.coef_, fitted.intercept_)), IN_TF))
