"""Clips the gradients of a fit that explodes, follows their statistics, and finds a gradient that is wrong.

A recurrence h -> growth * h + inflow is fitted to a noisy series of 40 values. Where `growth` is above 1, the
gradient grows with the 40th power of it, and one step of plain gradient descent throws the fit off for good. With
`ClipGradients` it arrives, and the statistics show which parameter is the last to settle. Then the recurrence gets
a derivative written by hand, with a mistake in one exponent, and `CheckGradients` says whose gradient is wrong.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf

import tapekit as tk
from tapekit.callbacks import CheckGradients, ClipGradients, GradientStatistics

STEPS = 40


def series(growth, inflow):
    values = [tf.zeros((), tf.float64)]
    for _ in range(STEPS - 1):
        values.append(growth * values[-1] + inflow)
    return tf.stack(values)


@tf.custom_gradient
def series_by_hand(growth, inflow):
    """The same in closed form: h_t = inflow * (1 + growth + ... + growth^(t-1))."""
    t = tf.range(STEPS, dtype=tf.float64)
    sums = (1.0 - growth**t) / (1.0 - growth)

    def gradient(upstream):
        by_growth = inflow * (sums - t * growth**t) / (1.0 - growth)  # should be growth^(t-1)
        return tf.reduce_sum(upstream * by_growth), tf.reduce_sum(upstream * sums)

    return inflow * sums, gradient


def main() -> None:
    t = np.arange(STEPS)
    data = 10.0 * (1.0 - 0.9**t) + 0.1 * np.random.default_rng(0).normal(size=STEPS)
    growth = tf.Variable(1.2, dtype=tf.float64, name="growth")
    inflow = tf.Variable(0.5, dtype=tf.float64, name="inflow")

    def fit(model, callbacks, steps=100_000):
        growth.assign(1.2)
        inflow.assign(0.5)
        loop = tk.OptimizationLoop(keras.optimizers.SGD(1e-4), tolerance=1e-12, max_iterations=steps)
        return loop.minimize(
            lambda: tf.reduce_mean((model(growth, inflow) - data) ** 2), [growth, inflow], callbacks=callbacks
        )

    result = fit(series, [])
    print(f"plain: {result.message}\n")

    statistics = GradientStatistics(every=2000)
    result = fit(series, [statistics, ClipGradients(global_norm=10.0)])
    print(f"{'step':>6}{'loss':>12}" + "".join(f"{f'|d {name}|':>14}" for name in statistics.statistics))
    norms = [quantities["norm"] for quantities in statistics.statistics.values()]
    for step, *row in zip(statistics.steps, *norms, strict=True):
        print(f"{step:6d}{result.history['loss'][step - 1]:12.4g}" + "".join(f"{norm:14.4g}" for norm in row))
    longest = result.history["unclipped_norm"].max()
    print(f"clipped: growth = {growth.numpy():.3f}, inflow = {inflow.numpy():.3f}, longest gradient {longest:.3g}")
    print(f"{result.message}\n")

    for model in (series, series_by_hand):
        check = CheckGradients()
        try:
            fit(model, [check], steps=1)
            print(f"{model.__name__}: {check.checked} entries of the gradient are right")
        except ValueError as error:
            print(f"{model.__name__}: {error}")


if __name__ == "__main__":
    main()
