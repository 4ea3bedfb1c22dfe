"""Drivers: how steps are executed. One step body runs eagerly, as a graph, or in XLA-compiled chunks."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tapekit._body import StepBody
from tapekit._drivers._base import Advance, Driver, Pace, logger
from tapekit._drivers._compiled import CompiledDriver
from tapekit._drivers._eager import EagerDriver
from tapekit._objective import read_variables, used_variables, watched_variables
from tapekit._tensors import tf_variable

__all__ = ["Advance", "CompiledDriver", "Driver", "EagerDriver", "Pace", "logger", "make_driver"]


def make_driver(body: StepBody, eager: bool, jit_compile: bool | str, longest: int) -> Driver:
    """Returns the driver of a run, after a look at the objective that changes no variable.

    With no variables given, those that the objective reads are used. The compiled drivers trace the
    objective and its gradient, so that an objective that cannot be minimized is refused here; the eager one
    finds that at its first step, before it applies anything.
    """
    if body.objective.needs_batch:
        body.updater.check(body.variables)
        if body.variables and not eager:  # whose first batch may make more variables
            body.updater.build(body.updater.native(body.variables))
        body.build()
        return EagerDriver(body, longest) if eager else CompiledDriver(body, longest, None, jit_compile)
    if eager:
        if not body.variables:
            body.variables = read_variables(body.objective)
        body.updater.check(body.variables)
        body.build()
        return EagerDriver(body, longest)

    def evaluate() -> tuple[Any, Any, Any]:
        with tf.GradientTape(watch_accessed_variables=not body.variables) as tape:
            tape.watch([tf_variable(variable) for variable in body.variables])
            loss, extras = body.objective()
        body.variables = body.variables or watched_variables(tape)
        gradients = tape.gradient(loss, [tf_variable(variable) for variable in body.variables])
        if "gradients" in body.step.provides:
            body.variables = used_variables(body.variables, gradients, body.allow_unused)
        return loss, extras, [gradient for gradient in gradients if gradient is not None]

    def loss() -> tf.Tensor:
        return tf.cast(evaluation()[0], tf.float64)

    evaluation: Any = tf.function(evaluate, autograph=False).get_concrete_function()
    body.updater.check(body.variables)
    body.updater.build(body.updater.native(body.variables))
    body.build()
    if body.is_plain and not body.updater.scales:
        body.evaluation = evaluation
    return CompiledDriver(body, longest, loss, jit_compile)
