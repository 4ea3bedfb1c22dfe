"""A learning-rate range test: a callback that raises the rate until the loss blows up.

L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017. In one short run the rate grows from low to
high, and the loss is watched, smoothed and without bias as the moments of Adam are:

    rate_t = low (high / low)^(t / steps),    s_t = (0.9 s_(t-1) + 0.1 loss_t) / (1 - 0.9^t)

Where s is four times its lowest the run is stopped. A good rate is where the loss falls fastest by the logarithm of the
rate. Training with it is then compared with ten times less and ten times more. The data are scikit-learn's digits; the
picture needs matplotlib (`pip install "tapekit[test]"` brings both), and goes to the folder given, or a temporary one.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import tapekit as tk

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit('this example needs scikit-learn and matplotlib: pip install "tapekit[test]"') from None


class RateRangeTest(tk.Callback):
    """Raises the learning rate from `low` to `high` in `steps` steps, and stops when the loss has blown up."""

    def __init__(self, low=1e-5, high=10.0, steps=400):
        super().__init__()
        self.low, self.high, self.steps = low, high, steps

    def on_train_begin(self, logs=None):
        self.rates, self.losses, self._sum = [], [], 0.0
        self._set(1)

    def _set(self, step):
        self.loop.optimizer.learning_rate = self.low * (self.high / self.low) ** (step / self.steps)

    def on_step(self, step, logs):
        self.rates.append(float(self.loop.optimizer.learning_rate))
        self._sum = 0.9 * self._sum + 0.1 * logs["loss"]
        self.losses.append(self._sum / (1.0 - 0.9**step))
        if self.losses[-1] > 4.0 * min(self.losses) or step == self.steps:
            self.loop.stop(f"the loss was {self.losses[-1]:.2g} at the rate {self.rates[-1]:.2g}")
        self._set(step + 1)

    @property
    def suggestion(self):
        """The rate at which the loss falls fastest."""
        return self.rates[int(np.argmin(np.gradient(self.losses, np.log(self.rates))))]


def network():
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(64, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def main() -> None:
    digits, labels = load_digits(return_X_y=True)
    images = (digits / 16.0).astype("float32")
    sgd = lambda rate: keras.optimizers.SGD(rate, momentum=0.9)  # noqa: E731

    test = RateRangeTest()
    result = tk.OptimizationLoop(sgd(1.0)).fit(network(), images, labels, epochs=20, verbose=0, callbacks=[test])
    print(f"{result.message}\nthe loss fell fastest at the rate {test.suggestion:.2g}\n")
    runs = {}
    for factor in (0.1, 1.0, 10.0):
        rate = factor * test.suggestion
        runs[f"{rate:.2g}"] = run = tk.OptimizationLoop(sgd(rate)).fit(network(), images, labels, epochs=3, verbose=0)
        print(f"rate {rate:7.2g}: loss {run.loss:8.3g} in the third epoch")

    figure = Figure(figsize=(10.0, 3.8), dpi=90, layout="constrained")
    rates, history = figure.subplots(1, 2)
    rates.plot(test.rates, test.losses)
    rates.axvline(test.suggestion, color="gray", linestyle="--", label=f"falls fastest at {test.suggestion:.2g}")
    rates.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss")
    rates.legend()
    tk.plots.compare(runs, ax=history).legend(title="learning rate")
    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "learning_rate_range_test.png")
    figure.savefig(path)
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
