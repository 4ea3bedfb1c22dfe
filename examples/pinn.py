"""A physics-informed network: a differential equation solved without a grid, beside its known solution.

M. Raissi, P. Perdikaris and G. E. Karniadakis, "Physics-informed neural networks", 2019. A damped oscillator obeys

    u'' + 2 d u' + w^2 u = 0,    u(0) = 1,  u'(0) = 0,

with the solution exp(-d t) (cos(v t) + d / v sin(v t)), v^2 = w^2 - d^2. The network N makes u(t) = 1 + t^2 N(t), so
that the initial values hold whatever it is, and the loss is the mean square of the left side at 200 times: the
derivatives by t come from tapes inside the loss, and those by the weights from the step. The picture needs
matplotlib, `pip install "tapekit[plot]"`, and goes to the folder given, or a temporary one.
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
except ImportError:
    raise SystemExit('this example needs matplotlib: pip install "tapekit[plot]"') from None

D, W, END, STEPS = 0.4, 3.0, 4.0, 15_000


def exact(t):
    v = np.sqrt(W**2 - D**2)
    return np.exp(-D * t) * (np.cos(v * t) + D / v * np.sin(v * t))


def main() -> None:
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(32, activation="tanh", dtype="float64") for _ in range(3)]
    network = keras.Sequential([keras.Input((1,)), *hidden, keras.layers.Dense(1, dtype="float64")])
    times = tf.constant(np.linspace(0.0, END, 200)[:, None])

    def solution(t):
        return 1.0 + t**2 * network(2.0 * t / END - 1.0)

    def loss():
        with tf.GradientTape() as second:
            second.watch(times)
            with tf.GradientTape() as first:
                first.watch(times)
                u = solution(times)
            slope = first.gradient(u, times)
        residual = second.gradient(slope, times) + 2.0 * D * slope + W**2 * u
        return tf.reduce_mean(residual**2)

    rate = keras.optimizers.schedules.CosineDecay(0.01, STEPS)
    loop = tk.OptimizationLoop(
        keras.optimizers.Adam(rate),
        stopping=tk.stopping.LossBelow(1e-3).for_steps(100) | tk.stopping.MaxIterations(STEPS),
        measures={"error": lambda: tf.reduce_max(tf.abs(solution(times) - exact(times.numpy())))},
    )
    result = loop.minimize(loss, network.trainable_variables)
    print(result.message)
    for step in (1, result.steps // 2, result.steps):
        residual, error = np.sqrt(result.history["loss"][step - 1]), result.history["error"][step - 1]
        print(f"step {step:5}: residual {residual:.1e}, largest error {error:.1e}")
    print(f"{1e6 * result.seconds / result.steps:.0f} us a step")

    t = np.linspace(0.0, END, 400)[:, None]
    figure = Figure(figsize=(11.0, 3.8), dpi=90, layout="constrained")
    curves, errors, history = figure.subplots(1, 3)
    curves.plot(t, exact(t), linewidth=4, alpha=0.4, label="exact")
    curves.plot(t, solution(t), "k--", linewidth=1, label="network")
    curves.set(xlabel="t", ylabel="u")
    curves.legend()
    errors.plot(t, solution(t) - exact(t))
    errors.set(xlabel="t", ylabel="network - exact")
    result.plot(["error"], history).set(title="", ylabel="largest error")
    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "pinn.png")
    figure.savefig(path)
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
