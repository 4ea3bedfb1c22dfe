"""Minimizes (x - 4)**2 twice, with each of the two ways to make a step, and shows that they agree.

`MinimizeStep` leaves the gradient to the optimizer's `minimize`, the method that Keras 3 dropped.
`TapeStep` takes the gradient with a `tf.GradientTape`, so that it can be recorded. Both runs stop at a
tolerance on the change of the loss, or at a limit of iterations, whichever comes first.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import tensorflow as tf

import tapekit as tk


def minimize(step: tk.Step) -> tk.OptimizationResult:
    """Runs the problem with a step strategy and prints the iterations and why they ended."""
    x = tf.Variable(0.0)
    measures = {"x": lambda: x}
    if isinstance(step, tk.TapeStep):
        measures["gradient"] = lambda gradients: gradients[0]

    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(learning_rate=0.3),
        step=step,
        tolerance=1e-6,
        max_iterations=100,
        measures=measures,
    )
    print(type(step).__name__)
    table = tk.callbacks.IterationTable(["x", "loss", *list(measures)[1:]])
    result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[table])
    print(f"stopped: {result.message}\n")
    return result


def main() -> None:
    print("x is the value after a step; loss and gradient were evaluated before it.\n")
    by_minimize = minimize(tk.MinimizeStep())
    by_tape = minimize(tk.TapeStep())

    same = all(by_minimize.history[name].tobytes() == by_tape.history[name].tobytes() for name in ("x", "loss"))
    print(f"x = {by_minimize.variables[0]:.6f} by MinimizeStep, {by_tape.variables[0]:.6f} by TapeStep")
    print(f"every x and every loss equal bit for bit: {same}")


if __name__ == "__main__":
    main()
