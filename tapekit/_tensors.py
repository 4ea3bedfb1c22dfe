"""Variables and gradients of every kind as TensorFlow takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

KerasVariable: type = keras.Variable.__bases__[0]
"""The class of the variables of layers too, which in older Keras is a parent of `keras.Variable`."""


def tf_variable(variable: Any) -> Any:
    """Returns the `tf.Variable` that a `keras.Variable` holds, or the argument itself."""
    return variable.value if isinstance(variable, KerasVariable) else variable


def read_variable(variable: tf.Variable) -> tf.Tensor:
    """Returns the value of a variable, without the copy and the Python of `variable.numpy()` and its like."""
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)


_OF_NUMPY = {tf.float64, tf.float32, tf.int64, tf.int32, tf.bool}


def to_array(tensor: tf.Tensor) -> np.ndarray:
    """Returns the array of a tensor, whose memory it shares if it is of one of the usual dtypes."""
    if tensor.dtype in _OF_NUMPY:
        buffer: Any = tensor
        return np.asarray(memoryview(buffer))
    return np.asarray(tensor.numpy())


_ALIGNMENT = 64
"""Bytes to a multiple of which an address must be for TensorFlow to take the memory of an array as it is."""


def aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Returns an empty array in memory that `lent` can lend to TensorFlow.

    For a large one NumPy asks the system for large pages. TensorFlow does not, and to be given ten thousand small ones
    takes three times as long as to copy what goes there.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def lent(array: np.ndarray) -> tf.Tensor:
    """Returns a tensor that shares the memory of an array from `aligned`, which it keeps alive."""
    shared: Any = _Lent(array)
    return tf.convert_to_tensor(shared)


class _Lent:
    """An array that TensorFlow does not know as such; of one that it does it makes a copy first."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._array


def gradient_values(gradient: Any) -> tf.Tensor:
    """Returns the numbers that a gradient holds, dense or `tf.IndexedSlices`."""
    return tf.convert_to_tensor(gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient)


def map_values(function: Callable[[Any], Any], gradient: Any) -> Any:
    """Applies an elementwise `function` that maps sums to sums to a gradient, dense, `tf.IndexedSlices` or None."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return gradient if gradient is None else function(gradient)


def with_known_shape(gradient: Any, variable: Any) -> Any:
    """Returns a gradient, which may be `tf.IndexedSlices`, with the shape of its variable where that is fixed.

    XLA must know such a shape when it compiles. Where it comes out of a call of a `tf.function`, TensorFlow takes what
    goes into the call for known too, the values of variables included, and compiles anew for other values.
    """
    if not isinstance(gradient, tf.IndexedSlices) or not variable.shape.is_fully_defined():
        return gradient
    return tf.IndexedSlices(gradient.values, gradient.indices, tf.constant(variable.shape.as_list(), tf.int64))
