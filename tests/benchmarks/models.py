"""Keras models on arrays and on `tf.data`, by `Model.fit`, by hand, by `loop.fit`, and by other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tapekit as tk
from tests.benchmarks.harness import OURS, Peer, Table, compare, installed

SAMPLES, CLASSES, EPSILON = 12_800, 10, 1e-7
generator = np.random.default_rng(0)
LABELS = generator.integers(0, CLASSES, SAMPLES)


def images() -> np.ndarray:
    """Random images of 28 x 28."""
    return generator.normal(size=(SAMPLES, 28, 28, 1)).astype("float32")


def dense() -> keras.Model:
    """784, 128, 10."""
    return keras.Sequential([keras.Input((784,)), layers.Dense(128, activation="relu"), layers.Dense(CLASSES)])


def convolutional() -> keras.Model:
    """Two convolutions with pooling."""
    convolutions = [layer for n in (8, 16) for layer in (layers.Conv2D(n, 3, activation="relu"), layers.MaxPooling2D())]
    return keras.Sequential([keras.Input((28, 28, 1)), *convolutions, layers.Flatten(), layers.Dense(CLASSES)])


def recurrent() -> keras.Model:
    """An LSTM of 32 units over 20 steps."""
    return keras.Sequential([keras.Input((20, 16)), layers.LSTM(32), layers.Dense(CLASSES)])


def embedding() -> keras.Model:
    """The mean of 20 vectors out of 2000."""
    inner = [layers.Embedding(2000, 32), layers.GlobalAveragePooling1D()]
    return keras.Sequential([keras.Input((20,), dtype="int32"), *inner, layers.Dense(CLASSES)])


MODELS: dict[str, tuple[Callable[[], keras.Model], Callable[[], np.ndarray]]] = {
    "dense": (dense, lambda: images().reshape(SAMPLES, 784)),
    "convolutional": (convolutional, images),
    "recurrent": (recurrent, lambda: generator.normal(size=(SAMPLES, 20, 16)).astype("float32")),
    "embedding": (embedding, lambda: generator.integers(0, 2000, (SAMPLES, 20)).astype("int32")),
}


def compiled(name: str, **settings: Any) -> keras.Model:
    """A model with the weights that everyone begins with."""
    keras.utils.set_random_seed(0)
    model = MODELS[name][0]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(epsilon=EPSILON), loss, **settings)
    return model


def by_keras(name: str, data: dict[str, Any], **settings: Any) -> Callable[[], float]:
    """`Model.fit`."""
    model = compiled(name, **settings)
    return lambda: model.fit(**data, shuffle=False, verbose=0).history["loss"][-1]


def by_tapekit(name: str, data: dict[str, Any], callbacks: Any = None, **settings: Any) -> Callable[[], float]:
    """`loop.fit`, with one criterion more."""
    model, loop = compiled(name), tk.OptimizationLoop(stopping=tk.stopping.LossBelow(0.0), **settings)
    return lambda: loop.fit(model, **data, shuffle=False, verbose=0, callbacks=callbacks).epoch_history["loss"][-1]


def by_hand(name: str, dataset: Any, samples: int) -> Callable[[], float]:
    """A `tf.function` step in a Python loop over the data, with the mean of the loss."""
    model = compiled(name)
    model.optimizer.build(model.trainable_variables)
    total = tf.Variable(0.0)

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = model.loss(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        total.assign_add(loss * tf.cast(tf.shape(y)[0], tf.float32))

    def run() -> float:
        total.assign(0.0)
        for x, y in dataset:
            step(x, y)
        return float(total) / samples

    return run


def by_torch(name: str, batches: Callable[[], Iterable[Any]], samples: int) -> Callable[[], float]:
    """The loop that people write in PyTorch, on batches that share their memory with it."""
    import torch
    from torch.nn import functional as F

    weights = [torch.tensor(value, requires_grad=True) for value in compiled(name).get_weights()]
    optimizer = torch.optim.Adam(weights, 1e-3, eps=EPSILON)

    def logits(x: Any) -> Any:
        if name == "dense":
            return F.relu(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
        if name == "embedding":
            return weights[0][x].mean(1) @ weights[1] + weights[2]
        if name == "recurrent":  # with Keras's one bias, and the gates in its order, which is PyTorch's
            start = torch.zeros(1, len(x), 32)
            flat = [weights[0].T, weights[1].T, weights[2], torch.zeros(128)]
            _, last, _ = torch._VF.lstm(x, (start, start), flat, True, 1, 0.0, True, False, True)
            return last[0] @ weights[3] + weights[4]
        x = x.permute(0, 3, 1, 2)
        for kernel, bias in (weights[0:2], weights[2:4]):
            x = F.max_pool2d(F.relu(F.conv2d(x, kernel.permute(3, 2, 0, 1), bias)), 2)
        return x.permute(0, 2, 3, 1).flatten(1) @ weights[4] + weights[5]

    def run() -> float:
        total = 0.0
        for x, y in batches():
            optimizer.zero_grad()
            loss = F.cross_entropy(logits(torch.from_dlpack(x)), torch.from_dlpack(y))
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        return total / samples

    return run


def by_jax(name: str, x: np.ndarray, size: int, dataset: Any) -> Callable[[], float]:
    """An epoch in JAX: one `scan` over arrays on the device, or a step that is called for each batch of a dataset."""
    import jax
    import jax.numpy as jnp
    import optax

    transform = optax.adam(1e-3, eps=EPSILON)

    def logits(weights: Any, x: Any) -> Any:
        if name == "dense":
            return jax.nn.relu(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
        if name == "convolutional":
            for kernel, bias in (weights[0:2], weights[2:4]):
                x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
                x = jax.nn.relu(x + bias)
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            return x.reshape(len(x), -1) @ weights[4] + weights[5]
        if name == "recurrent":

            def cell(carry: Any, at: Any) -> Any:
                hidden, memory = carry
                gates = jnp.split(at @ weights[0] + hidden @ weights[1] + weights[2], 4, axis=-1)
                let_in, forget, out = (jax.nn.sigmoid(gates[n]) for n in (0, 1, 3))
                memory = forget * memory + let_in * jnp.tanh(gates[2])
                return (out * jnp.tanh(memory), memory), None

            start = jnp.zeros((len(x), 32))
            (hidden, _), _ = jax.lax.scan(cell, (start, start), x.swapaxes(0, 1))
            return hidden @ weights[3] + weights[4]
        return weights[0][x].mean(1) @ weights[1] + weights[2]

    def loss_of(weights: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits(weights, x), y).mean()

    def step(carry: Any, batch: Any) -> Any:
        weights, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(weights, *batch)
        updates, state = transform.update(gradients, state, weights)
        return (optax.apply_updates(weights, updates), state), loss

    def epoch_of_stream(carry: Any) -> Any:
        losses = []
        for x, y in dataset.as_numpy_iterator():
            carry, loss = one(carry, (x, y))
            losses.append(loss)
        return carry, jnp.stack(losses)

    one, epoch = jax.jit(step, donate_argnums=0), epoch_of_stream
    if not dataset:
        inputs = jnp.asarray(x).reshape(-1, size, *x.shape[1:])
        targets = jnp.asarray(LABELS[: len(x)], jnp.int32).reshape(-1, size)
        epoch = jax.jit(lambda carry: jax.lax.scan(step, carry, (inputs, targets)))
    weights = [jnp.asarray(value) for value in compiled(name).get_weights()]
    carries = [(weights, transform.init(weights))]

    def run() -> float:
        carry, losses = epoch(carries.pop())
        carries.append(carry)
        return float(losses.mean())

    return run


def peers(name: str, x: np.ndarray, size: int, stream: bool) -> dict[str, Callable[[], float]]:
    """Everyone who trains a model on arrays, or on a stream of them."""
    y = LABELS[: len(x)]
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(size, drop_remainder=True).prefetch(4)
    data = {"x": dataset} if stream else {"x": x, "y": y, "batch_size": size}
    found = {
        OURS: by_tapekit(name, data),
        "Model.fit": by_keras(name, data),
        "Model.fit, tuned": by_keras(name, data, steps_per_execution=50),
        "Model.fit, tuned, XLA": by_keras(name, data, steps_per_execution=50, jit_compile=True),
        "tf.function step by hand": by_hand(name, dataset, len(x)),
    }
    if installed("torch"):
        parts = [(x[first : first + size], y[first : first + size]) for first in range(0, len(x), size)]
        found["PyTorch, eager"] = by_torch(name, lambda: dataset if stream else parts, len(x))
    if installed("jax", "optax"):
        how = "a step by hand" if stream else "scan"
        found[f"JAX + optax, {how}"] = by_jax(name, x, size, dataset if stream else None)
    return found


def tables(quick: bool) -> Iterator[Table]:
    """Compares everyone at every model, one epoch a run.

    Args:
        quick: whether to take large batches once, to see that everyone comes to the same.

    Yields:
        A table for each model, kind of data and batch size.
    """
    for name, (_, make) in MODELS.items():
        x = make()[: 256 if quick else SAMPLES]
        for stream in (False, True) if name == "dense" or not quick else (False,):
            for size in (128,) if quick else (32, 512):
                steps = len(x) // size
                runs = peers(name, x, size, stream)
                title = f"{name}, {'tf.data' if stream else 'arrays'}, batches of {size}"
                everyone = [Peer(who, run, steps) for who, run in runs.items()]
                # A convolution in float32 is summed in an order that depends on the processor, for 400 steps.
                tolerance = 1e-3 if name == "convolutional" and not quick else 1e-4
                yield compare(title, everyone, 1 if quick else 5, tolerance)
