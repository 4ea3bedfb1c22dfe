"""Five optimizers on two functions with names: where they go, how fast, and why each of them stops.

    Rosenbrock:  f(a, b) = (1 - a)^2 + 100 (b - a^2)^2, least in a bent valley at (1, 1)
                 (H. H. Rosenbrock, "An Automatic Method for Finding the Greatest or Least Value of a Function",
                 The Computer Journal 3, 1960)
    Himmelblau:  f(a, b) = (a^2 + b - 11)^2 + (a + b^2 - 7)^2, zero at four points
                 (D. M. Himmelblau, "Applied Nonlinear Programming", 1972)

All runs of a function start at the same point and stop by the same criteria: a loss of 1e-8, or 2500 steps. The
picture, which needs matplotlib (`pip install "tapekit[plot]"`), goes to the folder given, or a temporary one.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import io
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tapekit as tk

try:
    from matplotlib.figure import Figure
    from PIL import Image  # which comes with matplotlib
except ImportError:
    raise SystemExit('this example needs matplotlib: pip install "tapekit[plot]"') from None


def rosenbrock(a, b):
    return (1.0 - a) ** 2 + 100.0 * (b - a**2) ** 2


def himmelblau(a, b):
    return (a**2 + b - 11.0) ** 2 + (a + b**2 - 7.0) ** 2


OPTIMIZERS = {
    "SGD": keras.optimizers.SGD,
    "momentum": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
    "Adagrad": keras.optimizers.Adagrad,
    "RMSprop": keras.optimizers.RMSprop,
    "Adam": keras.optimizers.Adam,
}
FOUR = [(3.0, 2.0), (-2.805118, 3.131313), (-3.779310, -3.283186), (3.584428, -1.848127)]
# function: start, learning rates in the order of OPTIMIZERS, minima, limits of the picture
PROBLEMS = {
    rosenbrock: ((-0.5, 2.4), (0.001, 0.001, 1.0, 0.02, 0.2), [(1.0, 1.0)], (-1.9, 1.9), (-0.6, 2.8)),
    himmelblau: ((-0.3, 0.0), (0.01, 0.01, 3.0, 0.1, 0.8), FOUR, (-5.2, 5.2), (-4.7, 4.7)),
}


def run(function, start, optimizer):
    x = tf.Variable(start, dtype=tf.float64)
    loop = tk.OptimizationLoop(
        optimizer, stopping=tk.stopping.LossBelow(1e-8), max_iterations=2500, measures={"x": lambda: x}
    )
    return loop.minimize(lambda: function(x[0], x[1]), [x])


def shade(plane, function):
    """Colours the plane, dark where the function is low."""
    a, b = np.meshgrid(*(np.linspace(*limits, 200) for limits in (plane.get_xlim(), plane.get_ylim())))
    heights = np.log10(function(a, b) + 0.1)
    plane.contourf(a, b, heights, levels=9, extend="both", cmap="Blues_r", alpha=0.5, zorder=0)


def main() -> None:
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=(3, 2))
    for (function, (start, rates, minima, across, up)), plane, losses in zip(PROBLEMS.items(), *panels, strict=True):
        print(f"{function.__name__:<12} steps      loss  stopped by")
        plane.set(xlim=across, ylim=up, title=f"{function.__name__.capitalize()}'s function")
        shade(plane, function)
        results = {}
        for (name, make), rate in zip(OPTIMIZERS.items(), rates, strict=True):
            results[name] = result = run(function, start, make(rate))
            print(f"  {name:<10}{result.steps:>6}{result.loss:>10.2g}  {result.message}")
            result.plot_trajectory("x", function if len(results) == len(rates) else None, plane)
        marks = plane.plot(*start, "ko", label="start")
        marks += plane.plot(*zip(*minima, strict=True), "k+", markersize=22, label="minimum")
        plane.legend(handles=marks, loc="lower right", markerscale=0.5)
        plane.set(xlabel="a", ylabel="b")
        tk.plots.compare(results, "loss", losses).set_xscale("log")
    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "trajectories.png")
    with io.BytesIO() as pixels:
        figure.savefig(pixels, dpi=100)
        Image.open(pixels).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
