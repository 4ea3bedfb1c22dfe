"""A curve fitted to measurements, with standard errors from the Hessian, beside certified ones.

The data are Misra1a of the NIST Statistical Reference Datasets (D. Misra, 1978, monomolecular adsorption): a volume y
at fourteen pressures x, and the certified fit by least squares of

    y = b1 (1 - exp(-b2 x)),        S(b) = sum of squared residuals.

With the Hessian H of S at its minimum and s^2 = S / (14 - 2), the covariance of b is 2 s^2 H^-1, and that of the
curve is J cov J^T, with its derivative J by b (G. A. F. Seber and C. J. Wild, "Nonlinear Regression", 1989). NIST
certifies the errors by s^2 (J^T J)^-1, with J at the data, which has no second derivatives of the curve, as H has.
The picture needs matplotlib, `pip install "tapekit[plot]"`, and goes to the folder given, or a temporary one.
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

X = [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0]
Y = [10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78]
CERTIFIED = {"b1": (2.3894212918e2, 2.7070075241e0), "b2": (5.5015643181e-4, 7.2668688436e-6)}
CERTIFIED_SQUARES = 1.2455138894e-01
START = (500.0, 1e-4)  # the far one of the two that NIST gives


def main() -> None:
    x, y = np.array(X), np.array(Y)
    scale = np.array([1e2, 1e-4])  # so that both variables are of the order of one
    b = tf.Variable(START / scale, name="b")

    def curve(x):
        return b[0] * scale[0] * (1.0 - tf.exp(-b[1] * scale[1] * x))

    def squares():
        return tf.reduce_sum((y - curve(x)) ** 2)

    # Each alone raises the loss a lot and both together hardly, so the valley is narrow and many steps are needed.
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.05, 5_000, 0.5))
    stopping = tk.stopping.GradientNormBelow(1e-6)
    loop = tk.OptimizationLoop(optimizer, stopping=stopping, max_iterations=300_000)
    result = loop.minimize(squares, [b])
    print(result.message)
    print(f"{result.steps} steps in {result.seconds:.1f} s\n")

    grid = np.linspace(0.0, 800.0, 201)
    with tk.PersistentTape() as tape:
        fitted = curve(grid)
        hessian, jacobian = tape.hessian(squares(), b), tape.jacobian(fitted, b).numpy()
        at_data = tape.jacobian(curve(x), b).numpy()
    variance = result.loss / (len(x) - len(START))
    covariance = 2.0 * variance * np.linalg.inv(hessian)
    errors = scale * np.sqrt(np.diag(covariance))
    linear = scale * np.sqrt(np.diag(variance * np.linalg.inv(at_data.T @ at_data)))

    print("            value     certified   error by H     by J^T J     certified")
    for (name, (value, error)), *ours in zip(CERTIFIED.items(), b.numpy() * scale, errors, linear, strict=True):
        print(f"{name:>2} {ours[0]:14.8g} {value:13.8g} {ours[1]:12.6g} {ours[2]:12.6g} {error:13.6g}")
    print(f" S {result.loss:14.8g} {CERTIFIED_SQUARES:13.8g}")

    figure = Figure(figsize=(11.0, 3.8), dpi=90, layout="constrained")
    fit, residuals, losses = figure.subplots(1, 3)
    fit.plot(grid, fitted, label="fit")
    fit.plot(x, y, "ko", markersize=4, label="measured")
    fit.set(xlabel="pressure, torr", ylabel="volume, mL")
    fit.legend()
    band = 2.0 * np.sqrt(np.sum(jacobian @ covariance * jacobian, axis=1))
    residuals.fill_between(grid, -band, band, alpha=0.3, label="fit, two standard errors")
    residuals.plot(x, y - curve(x), "ko", markersize=4, label="measured - fit")
    residuals.set(xlabel="pressure, torr", ylabel="mL")
    residuals.legend(loc="upper center")
    residuals.set_ylim(-0.18, 0.28)
    result.plot(["loss"], losses).set(title="", ylabel="sum of squares", xscale="log")
    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "curve_fitting.png")
    figure.savefig(path)
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
