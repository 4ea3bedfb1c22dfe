"""Subclasses the loop: clips gradients, follows their norm, and stops when a target is met.

A curve a * exp(b * t) is fitted to noisy data. From a poor start the gradient is some 70,000 long: one
step of plain gradient descent throws b so far off that the curve is flat and no gradient leads back.
`ClippedLoop` shortens long gradients inside the compiled step and records how long they were. At every
tenth step it looks, in plain NumPy on the host, at data that the fit has not seen, and stops when these
are met to within the noise.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import tapekit as tk


class ClippedLoop(tk.OptimizationLoop):
    """Clips the gradients to a global norm, and stops when a measured error meets a target.

    Args:
        optimizer: see `tk.OptimizationLoop`.
        clip_norm: the largest norm of all gradients together that is applied.
        error: a function of no arguments, called on the host, that returns the error.
        target: stop when the error is at most this.
        **kwargs: other arguments of `tk.OptimizationLoop`.
    """

    every = 10  # the host is needed at every tenth step; those between run in one compiled call

    def __init__(self, optimizer, clip_norm: float, error: Callable[[], float], target: float, **kwargs):
        # A function of the gradients gets them as they are before on_gradient changes them.
        super().__init__(optimizer, measures={"norm": lambda gradients: tf.linalg.global_norm(gradients)}, **kwargs)
        self.clip_norm = clip_norm
        self.error = error
        self.target = target

    def on_train_begin(self, logs=None):
        print(f"{'step':>6}{'loss':>14}{'norm':>14}{'error':>10}")

    def on_gradient(self, gradients, variables):
        clipped, _ = tf.clip_by_global_norm(gradients, self.clip_norm)
        return clipped

    def on_step(self, step, logs):
        error = self.error()
        print(f"{step:6d}{logs['loss']:14.6g}{logs['norm']:14.6g}{error:10.4f}")
        if error <= self.target:
            self.stop(f"the error {error:.4f} on unseen data met the target {self.target}")


def main() -> None:
    t = np.linspace(0.0, 3.0, 40)
    y = 2.0 * np.exp(0.9 * t) + 0.1 * np.random.default_rng(0).normal(size=t.size)
    fitted, unseen = slice(0, None, 2), slice(1, None, 2)
    a, b = tf.Variable(1.0, dtype=tf.float64), tf.Variable(2.0, dtype=tf.float64)

    def loss():
        return tf.reduce_mean((a * tf.exp(b * t[fitted]) - y[fitted]) ** 2)

    def error() -> float:
        curve = a.numpy() * np.exp(b.numpy() * t[unseen])
        return float(np.sqrt(np.mean((curve - y[unseen]) ** 2)))

    def optimizer() -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(learning_rate=0.001, momentum=0.9)

    plain = tk.OptimizationLoop(optimizer(), max_iterations=1000)
    plain.minimize(loss, [a, b])
    print(f"without clipping: a = {a.numpy():.3f}, b = {b.numpy():.3f}, error {error():.4f}\n")

    a.assign(1.0)
    b.assign(2.0)
    loop = ClippedLoop(optimizer(), clip_norm=10.0, error=error, target=0.11, max_iterations=1000)
    result = loop.minimize(loss, [a, b])
    clipped = int(np.sum(result.history["norm"] > loop.clip_norm))
    print(f"with clipping: a = {a.numpy():.3f}, b = {b.numpy():.3f}, error {error():.4f}")
    print(f"{clipped} of {result.steps} gradients were clipped, the longest from {result.history['norm'].max():.0f}")
    print(result.message)


if __name__ == "__main__":
    main()
