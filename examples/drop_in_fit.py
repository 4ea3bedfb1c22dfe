"""Existing Keras code before and after: three lines change, the weights and the epoch logs do not.

The data is the first problem of J. H. Friedman, "Multivariate Adaptive Regression Splines", Annals of Statistics 19,
1991: y = 10 sin(pi x1 x2) + 20 (x3 - 0.5)^2 + 10 x4 + 5 x5 + noise of variance 1, with five more inputs that say
nothing. `before` is plain Keras, `after` the same with tapekit; the lines that change are numbered. Then comes what
the loop adds: a stop at the very step, with its reason; a hook that sees and changes gradients; and less time.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import functools
import time

import keras
import numpy as np
import tensorflow as tf

import tapekit as tk  # 1


def before(model, x, y, epochs):
    history = model.fit(x, y, epochs=epochs, validation_split=0.2, shuffle=False, verbose=0)
    return history.history


def after(model, x, y, epochs):
    history = tk.OptimizationLoop().fit(model, x, y, epochs=epochs, validation_split=0.2, shuffle=False, verbose=0)  # 2
    return history.epoch_history  # 3


def make_model(**settings) -> keras.Model:
    """Returns a compiled model, with the same weights at every call."""
    keras.utils.set_random_seed(1)
    hidden = [keras.layers.Dense(32, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((10,)), *hidden, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.003), loss="mse", metrics=["mae"], **settings)
    return model


class ShortenGradients(tk.Callback):
    """Clips the gradients to a global norm of 30 inside the compiled step, and records how long they were."""

    def on_gradient(self, gradients, variables):
        shortened, norm = tf.clip_by_global_norm(gradients, 30.0)
        self.record("norm", norm)
        return shortened


def furthest(arrays, others) -> float:
    """Returns the largest difference between arrays, relative to the largest entry."""
    pairs = zip(map(np.asarray, arrays), map(np.asarray, others), strict=True)
    return max(np.max(np.abs(a - b)) / np.max(np.abs(a)) for a, b in pairs)


def seconds_of(fit, x, y) -> float:
    """Returns how long ten epochs take, without the first one, which compiles."""
    fit(x, y, verbose=0)
    started = time.perf_counter()
    fit(x, y, epochs=10, verbose=0)
    return time.perf_counter() - started


def main() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(size=(3000, 10)).astype("float32")
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y += generator.normal(size=3000).astype("float32")

    print("the largest difference between Model.fit and loop.fit, relative to the largest entry:")
    for settings, epochs, samples in (({"run_eagerly": False}, 5, 3000), ({"run_eagerly": True}, 1, 640)):
        model, model_in_loop = make_model(**settings), make_model(**settings)
        logs = before(model, x[:samples], y[:samples], epochs)
        logs_in_loop = after(model_in_loop, x[:samples], y[:samples], epochs)
        weights = furthest(model.get_weights(), model_in_loop.get_weights())
        values = furthest(logs.values(), [logs_in_loop[name] for name in logs])
        print(f"  {settings}: {weights:.0g} in the weights, {values:.0g} in {', '.join(logs)}")

    loop = tk.OptimizationLoop(stopping=tk.stopping.LossBelow(2.0).for_steps(3), callbacks=[ShortenGradients()])
    result = loop.fit(make_model(), x, y, epochs=100, verbose=0)
    print(f"\n{result.message}")
    (epochs, steps), norms = divmod(result.steps, 94), result.history["norm"]
    print(f"that is {epochs} epochs of 94 steps and {steps} steps more")
    print(f"{np.sum(norms > 30.0)} of {norms.size} gradients were clipped, the longest from {norms.max():.1f}")

    keras_seconds = seconds_of(make_model().fit, x, y)
    loop_seconds = seconds_of(functools.partial(tk.OptimizationLoop().fit, make_model()), x, y)
    print(f"\nModel.fit takes {keras_seconds / loop_seconds:.1f} times as long as loop.fit")


if __name__ == "__main__":
    main()
