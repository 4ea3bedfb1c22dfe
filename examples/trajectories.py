"""Five optimizers on two functions of two variables: the ways that they go, and how fast.

H. H. Rosenbrock, "An Automatic Method for Finding the Greatest or Least Value of a Function", 1960, and
D. M. Himmelblau, "Applied Nonlinear Programming", 1972:

    (1 - x)^2 + 100 (y - x^2)^2        has its one minimum at (1, 1), in a narrow curved valley
    (x^2 + y - 11)^2 + (x + y^2 - 7)^2 has four, all of them 0

Where x and y were at each step is recorded by a measure, inside the compiled loop. The picture needs matplotlib,
`pip install "tapekit[plot]"`, and goes to the folder given, or a temporary one.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import sys
import tempfile
from pathlib import Path

import keras
import tensorflow as tf

import tapekit as tk

try:
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit('this example needs matplotlib: pip install "tapekit[plot]"') from None


def rosenbrock(x, y):
    return (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2


def himmelblau(x, y):
    return (x**2 + y - 11.0) ** 2 + (x + y**2 - 7.0) ** 2


# For each function: the start, what the picture shows, and the learning rates of the optimizers below.
PROBLEMS = {
    "Rosenbrock": (rosenbrock, (-1.5, 2.0), ((-2.0, 1.6), (-0.6, 2.9)), (1e-3, 3e-4, 5e-3, 0.05, 0.5)),
    "Himmelblau": (himmelblau, (-0.1, -0.9), ((-5.0, 5.0), (-5.0, 5.0)), (3e-3, 3e-3, 5e-3, 0.05, 0.5)),
}
OPTIMIZERS = {
    "SGD": keras.optimizers.SGD,
    "Nesterov": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
    "RMSprop": keras.optimizers.RMSprop,
    "Adam": keras.optimizers.Adam,
    "Adagrad": keras.optimizers.Adagrad,
}


def run(function, start, optimizer):
    """Minimizes a function of two variables, and records where they are at every step."""
    x, y = tf.Variable(start[0], dtype=tf.float64), tf.Variable(start[1], dtype=tf.float64)
    loop = tk.OptimizationLoop(
        optimizer,
        stopping=tk.stopping.GradientNormBelow(1e-3),
        max_iterations=5000,
        measures={"xy": lambda: tf.stack([x, y])},
    )
    return loop.minimize(lambda: function(x, y), [x, y])


def main() -> None:
    figure = Figure(figsize=(11.0, 7.4), dpi=90, layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=(1.7, 1.0)).T
    for (title, (function, start, (xs, ys), rates)), (plane, losses) in zip(PROBLEMS.items(), panels, strict=True):
        results = {
            name: run(function, start, make(rate)) for (name, make), rate in zip(OPTIMIZERS.items(), rates, strict=True)
        }
        plane.set(xlim=xs, ylim=ys, title=title)
        for number, (name, result) in enumerate(results.items()):
            result.plot_trajectory("xy", None if number else function, plane, label=name)
        plane.plot(*start, "k+", markersize=10, label="start")
        plane.set(xlabel="x", ylabel="y")
        plane.legend()
        tk.plots.compare(results, ax=losses).set_xscale("log")

        print(f"{title}\n{'':9} {'steps':>5} {'loss':>9} {'x':>8} {'y':>8}  why it stopped")
        for name, result in results.items():
            x, y = result.x
            print(f"{name:9} {result.steps:5} {result.loss:9.2e} {x:8.4f} {y:8.4f}  {result.reason.value}")
        print()

    path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "trajectories.png")
    figure.savefig(path)
    print("the picture is", Path(path.parent.name, path.name))


if __name__ == "__main__":
    main()
