"""A step strategy of one's own: sharpness-aware minimization (SAM), run under every driver.

P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021: the gradient is evaluated a second time, at the point within distance rho at
which the loss is worst to first order, and that gradient updates the variables.

The loss (u * v - 1)**2 / 2 has a whole curve of minima, u * v = 1, and its largest curvature there is
u**2 + v**2: between 2, at u = v = 1, and infinity. Gradient descent stays at the first minimum that it
meets. SAM moves along the curve to where it is flat.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import tensorflow as tf

import tapekit as tk


class SAMStep(tk.Step):
    """Updates the variables by the gradient at a perturbed point.

    Args:
        rho: the distance to the perturbed point, in units of the variables.
    """

    def __init__(self, rho: float = 0.05):
        self.rho = rho

    def take(self, problem: tk.Problem) -> dict:
        logs, gradients = problem.loss_and_gradients()
        norm = tf.linalg.global_norm(gradients)
        before = [tf.identity(variable) for variable in problem.variables]
        for variable, gradient in zip(problem.variables, gradients, strict=True):
            variable.assign_add(self.rho * gradient / (norm + 1e-12))

        _, perturbed = problem.loss_and_gradients()
        for variable, value in zip(problem.variables, before, strict=True):
            variable.assign(value)
        problem.apply(perturbed)
        return logs


def minimize(step: tk.Step, **driver) -> tk.OptimizationResult:
    """Runs the problem from u = 4, v = 0 with a step strategy and a driver."""
    u, v = tf.Variable(4.0, dtype=tf.float64), tf.Variable(0.0, dtype=tf.float64)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(learning_rate=0.1), step=step, max_iterations=300, **driver)
    return loop.minimize(lambda: 0.5 * (u * v - 1.0) ** 2, [u, v])


def main() -> None:
    print(f"{'step':<10}{'driver':<20}{'u':>12}{'v':>12}{'loss':>12}{'curvature':>12}{'evaluations':>13}")
    eager, graph, xla = {"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}
    losses = []
    for step, driver in ((tk.TapeStep(), xla), (SAMStep(0.2), eager), (SAMStep(0.2), graph), (SAMStep(0.2), xla)):
        result = minimize(step, **driver)
        u, v = result.variables
        name = ", ".join(f"{key}={value}" for key, value in driver.items())
        row = f"{type(step).__name__:<10}{name:<20}{u:12.8f}{v:12.8f}{result.loss:12.8f}{u**2 + v**2:12.6f}"
        print(f"{row}{result.evaluations:13d}")
        if isinstance(step, SAMStep):
            losses.append(result.history["loss"])

    apart = max(abs(losses[0] - other).max() for other in losses[1:])
    print(f"the losses of SAM agree at every step between the drivers to {apart:.0e}")


if __name__ == "__main__":
    main()
