"""Variational inference: a posterior by optimization, beside the exact one.

D. P. Kingma and M. Welling, "Auto-Encoding Variational Bayes", 2014, and A. Kucukelbir et al., "Automatic
Differentiation Variational Inference", 2017. For data y = X w + noise of known variance s^2 and the prior w ~ N(0, I),
the Gaussian q = N(m, L L^T) is sought that is nearest to the posterior. It maximizes the evidence lower bound

    ELBO = E log p(y | m + L e) - KL(q || prior),    e ~ N(0, I),

whose gradient by m and L is taken at samples of e. Here the posterior is known: its covariance is (X^T X / s^2 + I)^-1.
A diagonal L (mean field) finds its mean but too small deviations, a triangular L finds both. The data are six columns
of scikit-learn's diabetes set. The picture needs matplotlib (`pip install "tapekit[test]"` brings both).
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tapekit as tk

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_diabetes
except ImportError:
    raise SystemExit('this example needs scikit-learn and matplotlib: pip install "tapekit[test]"') from None

NAMES, STEPS, SAMPLES = ("bmi", "bp", "s1", "s2", "s3", "s5"), 20_000, 8


def infer(x, y, variance, is_full):
    """Returns the mean and the covariance of q, and the result of the run."""
    count = x.shape[1]
    mean, below = tf.Variable(tf.zeros(count, x.dtype)), tf.Variable(tf.zeros((count, count), x.dtype))
    logs = tf.Variable(tf.fill(count, tf.cast(np.log(0.1), x.dtype)))  # of the diagonal
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.02, STEPS))

    def factor():
        strictly_below = below * np.tri(count, k=-1)
        return (strictly_below if is_full else 0.0 * strictly_below) + tf.linalg.diag(tf.exp(logs))

    def negative_elbo():
        step = tf.cast(optimizer.iterations, tf.int32)  # so that every step draws anew, and every run the same
        noise = tf.random.stateless_normal((SAMPLES, count), (1, step), dtype=x.dtype)
        weights = mean + tf.matmul(noise, factor(), transpose_b=True)
        misfit = tf.reduce_sum((y - tf.matmul(weights, x, transpose_b=True)) ** 2, axis=1)
        divergence = 0.5 * (tf.reduce_sum(factor() ** 2) + tf.reduce_sum(mean**2) - count) - tf.reduce_sum(logs)
        return tf.reduce_mean(misfit) / (2.0 * variance) + 0.5 * len(y) * np.log(2.0 * np.pi * variance) + divergence

    loop = tk.OptimizationLoop(optimizer, max_iterations=STEPS)
    result = loop.minimize(negative_elbo, [mean, logs, below], allow_unused=True)
    return mean.numpy(), factor().numpy() @ factor().numpy().T, result


def main() -> None:
    table = load_diabetes(as_frame=True, scaled=False)
    x, y = table.data[list(NAMES)].to_numpy(), table.target.to_numpy()
    x, y = (x - x.mean(axis=0)) / x.std(axis=0), (y - y.mean()) / y.std()
    variance = np.mean((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2)
    covariance = np.linalg.inv(x.T @ x / variance + np.eye(len(NAMES)))
    exact = covariance @ x.T @ y / variance, covariance
    mean_field, full = (infer(x, y, variance, is_full) for is_full in (False, True))

    found = {"exact": exact, "full": full[:2], "mean field": mean_field[:2]}
    print("     " + "".join(f"{name:>22}" for name in found))
    for place, name in enumerate(NAMES):
        cells = (f"{mean[place]:13.3f} +- {np.sqrt(cov[place, place]):.3f}" for mean, cov in found.values())
        print(f"{name:5}" + "  ".join(cells))
    for name, (_, _, result) in {"full": full, "mean field": mean_field}.items():
        last = -result.history["loss"][-1000:].mean()
        print(f"{name}: ELBO {last:.1f}, {1e6 * result.seconds / result.steps:.0f} us a step")

    figure = Figure(figsize=(10.0, 3.8), dpi=90, layout="constrained")
    plane, history = figure.subplots(1, 2)
    circle = np.stack([np.cos(np.linspace(0, 2 * np.pi, 200)), np.sin(np.linspace(0, 2 * np.pi, 200))])
    for (name, (mean, cov)), style in zip(found.items(), ("-", "--", ":"), strict=True):
        ellipse = mean[[2, 3], None] + 2.0 * np.linalg.cholesky(cov[2:4, 2:4]) @ circle
        plane.plot(*ellipse, style, label=name)
    plane.set(xlabel="weight of s1", ylabel="weight of s2", title="two standard deviations")
    plane.legend()
    tk.plots.compare({"mean field": mean_field[2], "full": full[2]}, ax=history).set(ylabel="-ELBO", xscale="log")
    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "variational_inference.png")
    figure.savefig(path)
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
