"""Grad-CAM: where a convolutional network looks, from gradients with respect to an intermediate value.

R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
ICCV 2017: with the activations A of the last convolution, of channels k, and the score y of a class,

    weight_k = mean over the image of dy / dA_k,        heat = ReLU(sum over k of weight_k * A_k).

A network learns which two of scikit-learn's digits (`pip install "tapekit[test]"`) are in an image; nobody
tells it where. Each column of the picture is an unseen image, the heat of the class of its left digit, and
that of its right one. The picture goes to the folder given, or a temporary one.
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
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit('this example needs scikit-learn: pip install "tapekit[test]"') from None

SCALE, GAP = 12, 8  # pixels for one of a digit, and between the images


def scenes(digits, labels, count, generator):
    """Returns images of 8 x 20, each with two digits, and the labels of the left and the right one."""
    chosen, starts = (generator.integers(low, high, (count, 2)) for low, high in ((0, len(digits)), ([0, 10], [3, 13])))
    images = np.zeros((count, 8, 20, 1), "float32")
    for image, pair, places in zip(images, chosen, starts, strict=True):
        for digit, start in zip(digits[pair], places, strict=True):
            image[:, start : start + 8, 0] = digit.reshape(8, 8) / 16.0
    return images, labels[chosen]


def heat_map(tape, score, activations, size):
    """Returns a map for each image, from 0 to 1 where it is hottest."""
    weights = tf.reduce_mean(tape.gradient(score, activations), axis=(1, 2), keepdims=True)
    heat = tf.nn.relu(tf.reduce_sum(weights * activations, axis=-1, keepdims=True)).numpy()
    return np.clip(tf.image.resize(heat / (heat.max((1, 2, 3), keepdims=True) + 1e-9), size, "bicubic"), 0.0, 1.0)


def picture(images, heats):
    """Returns the images in grey, and below them each heat from black through red to yellow."""
    grey = np.repeat(images, 3, axis=-1)
    rows = [grey, *(np.maximum(0.5 * grey, np.clip(2.0 * heat - [0.0, 1.0, 2.0], 0.0, 1.0)) for heat in heats)]
    cells = np.pad(rows, ((0, 0), (0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=1.0)
    whole = np.concatenate(np.concatenate(cells, axis=1), axis=1)
    return np.uint8(255.0 * np.pad(whole, ((0, GAP), (0, GAP), (0, 0)), constant_values=1.0))


def main() -> None:
    keras.utils.set_random_seed(1)
    digits, labels = load_digits(return_X_y=True)
    images, pairs = scenes(digits[:1000], labels[:1000], 800, np.random.default_rng(0))
    unseen, unseen_pairs = scenes(digits[1000:], labels[1000:], 500, np.random.default_rng(1))

    conv = {"kernel_size": 3, "padding": "same", "activation": "relu", "use_bias": False}  # silent where no ink is
    first, *more = (keras.layers.Conv2D(channels, **conv) for channels in (16, 32, 64))
    pooled = [keras.layers.GlobalAveragePooling2D(), keras.layers.Rescaling(10.0), keras.layers.Dense(10)]
    features = keras.Sequential([keras.Input(images.shape[1:]), first, keras.layers.MaxPooling2D(), *more])
    head = keras.Sequential([keras.Input(features.output_shape[1:]), *pooled])

    def loss():
        present = tf.reduce_max(tf.one_hot(pairs, 10), axis=1)
        return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(present, head(features(images))))

    loop = tk.OptimizationLoop(keras.optimizers.Adam(0.01), max_iterations=180, jit_compile=False)  # XLA is slow here
    result = loop.minimize(loss, features.trainable_variables + head.trainable_variables)
    found = np.any(unseen_pairs[:, :, None] == np.argsort(head(features(unseen)))[:, None, -2:], axis=-1)
    print(f"loss {result.loss:.3f}; {100 * found.mean():.1f} % of {found.size} unseen digits are found")

    chosen = np.flatnonzero(found.all(axis=1) & (unseen_pairs[:, 0] != unseen_pairs[:, 1]))[:4]
    shown, classes = np.kron(unseen[chosen], np.ones((1, SCALE, SCALE, 1))), unseen_pairs[chosen]
    with tk.PersistentTape() as tape:
        activations = tape.intermediate("activations", features(unseen[chosen]))
        scores = tf.gather(head(activations), classes, batch_dims=1)
        heats = [heat_map(tape, scores[:, side], activations, shown.shape[1:3]) for side in (0, 1)]

    ink, right = shown > 0.5, np.arange(shown.shape[2])[:, None] >= shown.shape[2] // 2
    for digit, heat, own in zip(classes.T, heats, (~right, right), strict=True):
        on, beside, off = (heat[where].mean() for where in (ink & own, ink & ~own, shown == 0.0))
        print(f"digits {digit}: mean heat on their ink {on:.2f}, on the other's {beside:.2f}, on none {off:.2f}")
    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "grad_cam.png")
    tf.io.write_file(str(path), tf.io.encode_png(picture(shown, heats)))
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
