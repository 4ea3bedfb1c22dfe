"""A step and a callback for tapekit, which finds them by the entry points in setup.cfg."""

import tensorflow as tf

import tapekit as tk


class SignStep(tk.Step):
    """Gives the optimizer the signs of the gradient, times `scale`.

    Source: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", 2018.
    """

    def __init__(self, scale=1.0):
        self.scale = scale

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        problem.apply([self.scale * tf.sign(gradient) for gradient in gradients])
        return logs


class Milestones(tk.Callback):
    """Prints the step at which the loss first falls to each of `losses`."""

    replayable = True

    def __init__(self, losses):
        super().__init__()
        self.losses = losses
        self._left = []

    def on_train_begin(self, logs=None):
        self._left = sorted(self.losses)

    def on_step(self, step, logs):
        while self._left and logs["loss"] <= self._left[-1]:
            print(f"the loss fell to {self._left.pop()} at step {step}")
