"""Variables and gradients of every kind as TensorFlow takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

KerasVariable: type = keras.Variable.__bases__[0]
"""The class of the variables of layers too, which in older Keras is a parent of `keras.Variable`."""


def tf_variable(variable: Any) -> Any:
    """Returns the `tf.Variable` that a `keras.Variable` holds, or the argument itself."""
    return variable.value if isinstance(variable, KerasVariable) else variable


def map_values(function: Callable[[Any], Any], gradient: Any) -> Any:
    """Applies an elementwise `function` that maps sums to sums to a gradient, dense, `tf.IndexedSlices` or None."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return gradient if gradient is None else function(gradient)
