"""Adversarial examples: digits that hardly change, and that a network no longer knows.

A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018: for a trained network f, images
x with the labels y, and a size e, look for a change d that raises the cross-entropy H,

    max H(f(x + d), y)  over  |d_i| <= e,  0 <= x + d <= 1,

by gradient ascent with projection. The weights stay as they are: what the loop minimizes over is d, one change for each
of 500 images at once, and its `constraint` is the projection, which optimizers apply after each step. The images are
scikit-learn's scanned digits. The picture needs matplotlib (`pip install "tapekit[test]"` brings both), and goes to
the folder given, or a temporary one.
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
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit('this example needs scikit-learn and matplotlib: pip install "tapekit[test]"') from None


def train(images, labels):
    """Returns a network that knows digits."""
    hidden = [keras.layers.Dense(128, activation="relu") for _ in range(2)]
    network = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tk.OptimizationLoop().fit(network, images, labels, epochs=30, verbose=0)
    return network


def attack(network, images, labels, size):
    """Returns the changes that deceive the network, and the result of the run."""
    low, high = np.maximum(-size, -images), np.minimum(size, 1.0 - images)
    change = tf.Variable(tf.zeros_like(images), constraint=lambda d: tf.clip_by_value(d, low, high))

    def loss():
        logits = network(images + change)
        return -tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))

    result = tk.OptimizationLoop(keras.optimizers.Adam(size / 10.0), max_iterations=100).minimize(loss, [change])
    return change.numpy(), result


def main() -> None:
    keras.utils.set_random_seed(0)
    digits, labels = load_digits(return_X_y=True)
    images = (digits / 16.0).astype("float32")
    network = train(images[500:], labels[500:])
    images, labels = images[:500], labels[:500]

    def guesses(changed):
        return network(changed).numpy().argmax(axis=1)

    print(f"known without a change: {np.mean(guesses(images) == labels):.1%} of {len(images)} unseen digits")
    print("largest change of a pixel    known after it    after random signs of that size")
    for size in (0.05, 0.1, 0.15, 0.2):
        change, result = attack(network, images, labels, size)
        noise = np.clip(images + size * np.random.default_rng(0).choice([-1.0, 1.0], images.shape), 0.0, 1.0)
        rates = np.mean(guesses(images + change) == labels), np.mean(guesses(noise.astype("float32")) == labels)
        print(f"{np.abs(change).max():25.2f} {rates[0]:17.1%} {rates[1]:34.1%}")
    print(f"mean cross-entropy {-result.history['loss'][0]:.2f} before, {-result.loss:.2f} after {result.steps} steps")

    changed = images + change
    chosen = np.flatnonzero((guesses(images) == labels) & (guesses(changed) != labels))[:8]
    figure = Figure(figsize=(10.0, 4.2), dpi=90, layout="constrained")
    rows = ("image", images, "gray_r", 0), ("change", change, "RdBu_r", -0.5), ("sum", changed, "gray_r", 0)
    for (title, values, colours, low), axes in zip(rows, figure.subplots(3, 8), strict=True):
        for ax, place in zip(axes, chosen, strict=True):
            ax.imshow(values[place].reshape(8, 8), cmap=colours, vmin=low, vmax=low + 1.0)
            ax.set(xticks=[], yticks=[])
            if title != "change":
                ax.set_title(f"taken for {guesses(values[place][None])[0]}", fontsize="medium")
        axes[0].set_ylabel(title)
    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "adversarial.png")
    figure.savefig(path)
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
