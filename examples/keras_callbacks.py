"""Keras callbacks in tapekit's loop, with a model and without one; and tapekit's callbacks in `Model.fit`.

A line is fitted to data of which a fifth are outliers. The mean absolute error hardly heeds outliers, but it has
kinks, over which gradient descent jumps to and fro until the learning rate is reduced. The same four callbacks of
Keras watch over `Model.fit`, over `loop.fit` with the same model, and over `loop.minimize` with a function of two
variables, where an epoch is a step. Then `Model.fit` minimizes the squared error with three callbacks of tapekit: one
follows the gradients, one clips them inside the compiled step, and one stops at a criterion.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tapekit as tk
from tapekit.callbacks import ClipGradients, GradientStatistics, StopWhen


def line(loss: str) -> keras.Model:
    """Returns a compiled model of slope 0 and intercept 0."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.05), loss)
    return model


def watch(run, folder: str) -> str:
    """Calls `run` with callbacks of Keras, and returns what they did as a row of a table."""
    path, history = Path(folder, "best.weights.h5"), keras.callbacks.History()
    run(
        [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: 2.0 * rate if 0 < epoch < 4 else rate),
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=3, min_lr=0.01),
            keras.callbacks.ModelCheckpoint(path, "loss", save_best_only=True, save_weights_only=True),
            keras.callbacks.EarlyStopping("loss", patience=15, restore_best_weights=True),
            history,
        ]
    )
    rates, losses = history.history["learning_rate"], history.history["loss"]
    slope, intercept = restored = [float(np.ravel(v)[0]) for v in history.model.trainable_variables]
    history.model.load_weights(path)
    same = restored == [float(np.ravel(v)[0]) for v in history.model.trainable_variables]
    numbers = f"{rates[0]:7.2f}{max(rates):9.2f}{rates[-1]:9.2f}{min(losses):11.6f}{slope:8.3f}{intercept:11.3f}"
    return f"{len(losses):8d}{numbers}{same!s:>13}"


def main() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(-1.0, 1.0, (40, 1)).astype("float32")
    y = 2.0 * x + 1.0 + 0.1 * generator.normal(size=x.shape).astype("float32")
    y[:8] += 10.0

    settings = {"batch_size": 40, "epochs": 500, "shuffle": False, "verbose": 0}
    model, model_in_loop = line("mae"), line("mae")
    slope, intercept = tf.Variable(0.0), tf.Variable(0.0)
    fitting, minimizing = tk.OptimizationLoop(), tk.OptimizationLoop(keras.optimizers.SGD(0.05), max_iterations=500)

    def error():
        return tf.reduce_mean(tf.abs(slope * x + intercept - y))

    heads = f"{'rate':>7}{'at most':>9}{'at last':>9}{'best loss':>11}{'slope':>8}{'intercept':>11}{'same in file':>13}"
    print(f"{'':<14}{'epochs':>8}{heads}")
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "Model.fit": lambda callbacks: model.fit(x, y, callbacks=callbacks, **settings),
            "loop.fit": lambda callbacks: fitting.fit(model_in_loop, x, y, callbacks=callbacks, **settings),
            "loop.minimize": lambda callbacks: minimizing.minimize(error, [slope, intercept], callbacks=callbacks),
        }
        for name, run in runs.items():
            print(f"{name:<14}{watch(run, folder)}")

    model = line("mse")
    look = GradientStatistics(every=50)
    stop = StopWhen(tk.stopping.GradientNormBelow(1e-3) | tk.stopping.WallTime(60))
    model.fit(x, y, callbacks=[look, ClipGradients(global_norm=1.0), stop], **settings)
    print(f"\n{'step':<14}" + "".join(f"{step:9d}" for step in look.steps))
    for name, quantities in look.statistics.items():
        print(f"{f'|d {Path(name).name}|':<14}" + "".join(f"{norm:9.4f}" for norm in quantities["norm"]))
    print(stop.message)
    slope, intercept = (value.item() for value in model.get_weights())
    expected = np.polyfit(x[:, 0], y[:, 0], 1)
    print(f"slope {slope:.3f}, intercept {intercept:.3f}; by numpy.polyfit {expected[0]:.3f} and {expected[1]:.3f}")


if __name__ == "__main__":
    main()
