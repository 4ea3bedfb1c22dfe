"""What XLA computes otherwise than a graph does, or slowly."""

from __future__ import annotations

import logging
from collections.abc import Set
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.auto_control_deps_utils import get_read_write_resource_inputs

# Random ops whose state is hidden in their kernels.
DRAWING = {
    *("RandomUniform", "RandomUniformInt", "RandomStandardNormal", "TruncatedNormal", "RandomShuffle", "Multinomial"),
    *("RandomGammaV3", "RandomPoissonV2", "ParameterizedTruncatedNormal", "RandomGamma", "RandomPoisson"),
}
# Ops that XLA compiles to something else: it drops checks and ignores the seeds of stateful random ops.
_CHANGED_BY_XLA = {"Assert", "CheckNumerics", "CheckNumericsV2", *DRAWING}
# Random ops of layers such as Dropout, which draw other numbers under XLA than in `keras.Model.fit`, and slowly.
_OTHER_NUMBERS_UNDER_XLA = {
    f"Stateless{kind}" for kind in ("RandomUniformV2", "RandomUniformIntV2", "RandomNormalV2", "TruncatedNormalV2")
}
# Ops that XLA runs up to ten times slower than a graph does where there is no GPU.
_SLOW_UNDER_XLA_ON_CPU = {
    *("Conv2DBackpropFilter", "Conv2DBackpropInput", "DepthwiseConv2dNative"),
    *("Conv3D", "Conv3DBackpropFilterV2", "Conv3DBackpropInputV2"),
}


def on_cpu() -> bool:
    """Returns whether there is nothing but a CPU."""
    return not tf.config.list_logical_devices("GPU")


def op_types(function: Any) -> set[str]:
    """Returns the types of all ops of a traced function, the functions that it calls included."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for body in graph.library.function for node in body.node_def)]
    return {node.op for node in nodes}


def written(function: Any) -> list[tf.Variable]:
    """Returns the variables that a traced function changes."""
    places = {id(place): variable for variable in function.variables for place in _places(function, variable)}
    found = [
        places[id(resource)]
        for op in function.graph.get_operations()
        for resource in get_read_write_resource_inputs(op)[1]
        if id(resource) in places
    ]
    return list({id(variable): variable for variable in found}.values())


def _places(function: Any, variable: tf.Variable) -> list[Any]:
    """Returns what stands for a variable inside a traced function."""
    return [inner for outer, inner in function.graph.captures if outer is variable.handle]


def against_xla(types: Set[str], of_a_model: bool) -> tuple[str, int] | None:
    """Returns why a step with these types of ops is better run as a graph, and how loudly to say so.

    Args:
        types: the types of ops.
        of_a_model: whether the numbers must be those of `keras.Model.fit`.
    """
    if changed := sorted(types & _CHANGED_BY_XLA):
        return f"it would change the meaning of {', '.join(changed)}", logging.WARNING
    slow = sorted(types & _SLOW_UNDER_XLA_ON_CPU)
    if slow and on_cpu():
        return f"it is slow at {', '.join(slow)} on a CPU", logging.INFO
    random = sorted(types & _OTHER_NUMBERS_UNDER_XLA)
    if random and of_a_model:
        return f"the random numbers of {', '.join(random)} would be others than Keras's", logging.INFO
    return None
