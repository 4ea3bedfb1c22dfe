"""Trains a small convolutional network on real digits, with validation, and stops it at a criterion.

The data are the 1,797 scanned digits of 8 x 8 pixels that come with scikit-learn (`pip install "tapekit[test]"`), by
E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998. In
shuffled order, the network learns from the first 1,080, is validated on the next 120, and is tried on the 597 others.
The criterion looks at the loss of every batch: ten in a row below 0.05 end the training, in the middle of an epoch.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import numpy as np

import tapekit as tk

try:
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit('this example needs scikit-learn: pip install "tapekit[test]"') from None


def make_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.003), loss, metrics=["accuracy"])
    return model


def main() -> None:
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].reshape(-1, 8, 8, 1).astype("float32") / 16.0, labels[order]

    model = make_model()
    loop = tk.OptimizationLoop(stopping=tk.stopping.LossBelow(0.05).for_steps(10) | tk.stopping.WallTime(60))
    result = loop.fit(model, images[:1200], labels[:1200], epochs=50, validation_split=0.1, verbose=0)

    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    print(f"{'epoch':>5}" + "".join(f"{name:>14}" for name in names))
    for epoch, row in enumerate(zip(*(result.epoch_history[name] for name in names), strict=True), start=1):
        print(f"{epoch:5d}" + "".join(f"{value:14.4f}" for value in row))
    print(result.message)
    print(f"of the last epoch that is step {(result.steps - 1) % 34 + 1} of 34")
    loss, accuracy = model.evaluate(images[1200:], labels[1200:], verbose=0)
    print(f"on the 597 others: loss {loss:.4f}, accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
