"""A generative adversarial network: two networks, two optimizers, one loop.

I. Goodfellow et al., "Generative Adversarial Networks", 2014, with the generator's loss that does not saturate:

    D minimizes  -mean(log D(x)) - mean(log(1 - D(G(z)))),        G minimizes  -mean(log D(G(z)))

It is a Keras model with a plain `train_step`. `loop.fit` runs many of its steps in one compiled call, records both
losses at each, and lets a callback look at samples now and then. The data are eight Gaussians on a ring. The picture
needs matplotlib, `pip install "tapekit[plot]"`, and goes to the folder given, or a temporary one.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tapekit as tk

try:
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit('this example needs matplotlib: pip install "tapekit[plot]"') from None

NOISE, SPREAD, ANGLES = 8, 0.1, np.arange(8, dtype="float32") * np.float32(np.pi / 4)
CENTRES = 2.0 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)


def network(inputs, outputs):
    hidden = [layers.Dense(128, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


class GAN(keras.Model):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = network(NOISE, 2), network(2, 1)
        self.optimizers = [keras.optimizers.Adam(5e-4, beta_1=0.5) for _ in range(2)]
        self.noise = keras.random.SeedGenerator(0)

    def samples(self, count):
        return self.generator(keras.random.normal((count, NOISE), seed=self.noise))

    def train_step(self, real):
        deceiver, judge = self.generator.trainable_variables, self.discriminator.trainable_variables
        with tk.PersistentTape() as tape:
            fake = self.samples(tf.shape(real)[0])
            on_real, on_fake = self.discriminator(real), self.discriminator(fake)
            judged = tf.reduce_mean(tf.nn.softplus(-on_real) + tf.nn.softplus(on_fake))
            deceived = tf.reduce_mean(tf.nn.softplus(-on_fake))
            gradients = tape.gradient(judged, judge), tape.gradient(deceived, deceiver)
        self.optimizers[0].apply(gradients[0], judge)
        self.optimizers[1].apply(gradients[1], deceiver)
        return {"discriminator_loss": judged, "generator_loss": deceived}


def quality(samples):
    """Returns how many of the Gaussians have samples, and the share of samples that are in one of them."""
    distances = np.linalg.norm(samples[:, None] - CENTRES, axis=-1)
    inside = distances.min(axis=1) < 3.0 * SPREAD
    counts = np.bincount(distances[inside].argmin(axis=1), minlength=8)
    return np.sum(counts > 0.02 * len(samples)), inside.mean()


def main() -> None:
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    data = CENTRES[random.integers(8, size=25_600)] + SPREAD * random.standard_normal((25_600, 2), "float32")
    gan = GAN()
    gan.compile()
    seen = {0: gan.samples(2000).numpy()}
    look = tk.callbacks.FunctionCallback(lambda step, logs: seen.update({step: gan.samples(2000).numpy()}), every=1000)
    result = tk.OptimizationLoop(callbacks=[look]).fit(gan, data, batch_size=128, epochs=25, verbose=0)

    print(" step  Gaussians of 8  samples inside")
    for step, samples in seen.items():
        print("{:5} {:15} {:15.0%}".format(step, *quality(samples)))
    print(f"{result.steps} steps in {result.seconds:.1f} s; {result.message}")
    figure = Figure(figsize=(11.0, 5.4), dpi=90, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.3, 1.0))
    for ax, (step, samples) in zip(above.subplots(1, 6), seen.items(), strict=True):
        ax.plot(*data[:2000].T, ".", color="lightgray", markersize=1)
        ax.plot(*samples.T, ".", markersize=1)
        ax.set(title=f"step {step}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    result.plot(["discriminator_loss", "generator_loss"], below.subplots(1, 2))
    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "gan.png")
    figure.savefig(path)
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
