"""How a refused value is named in a sentence: its kind, and as much of it as fits a line."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tapekit._tensors import KerasVariable


def describe(value: Any) -> str:
    """Returns a short description of `value` that fits after the word "received"."""
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    if isinstance(value, numbers.Number):
        return f"the {type(value).__name__} {value}"
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, (tf.Variable, KerasVariable)):
        kind = "keras.Variable" if isinstance(value, KerasVariable) else "tf.Variable"
        return f"the {kind} {variable_name(value)!r} of {shape_and_dtype(value)}"
    if isinstance(value, (tf.Tensor, np.ndarray)):
        kind = "tf.Tensor" if isinstance(value, tf.Tensor) else "NumPy array"
        return f"a {kind} of {shape_and_dtype(value)}"
    if isinstance(value, (list, tuple, dict, set)):
        kind = type(value).__name__
        return f"a {kind} of {len(value)}" if value else f"an empty {kind}"
    return f"an object of type {type(value).__name__}"


def shape_and_dtype(value: Any) -> str:
    """Returns "shape (2,) and dtype float32" of a tensor, an array or a variable."""
    dtype = getattr(value.dtype, "name", value.dtype)
    shape = "unknown shape" if tf.TensorShape(value.shape).rank is None else f"shape {tuple(value.shape)}"
    return f"{shape} and dtype {dtype}"


def variable_name(variable: Any) -> str:
    """Returns the path of a `keras.Variable`, or the name of a `tf.Variable` without its ":0"."""
    if isinstance(variable, KerasVariable):
        return variable.path
    return variable.name.split(":")[0]


def unique_names(variables: Iterable[Any]) -> list[str]:
    """Returns the names of variables; one that comes again is told apart by a number, as in "w", "w_1"."""
    names: list[str] = []
    for variable in variables:
        name = variable_name(variable)
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return names


def check_integer(value: Any, name: str, minimum: int) -> int:
    """Returns `value` as an int, or raises unless it is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer of at least {minimum}, received {describe(value)}.")
    integer = int(value)
    if not minimum <= integer < 1 << 63:
        bound = f"of at least {minimum}" if integer < minimum else "below 2**63"
        raise ValueError(f"`{name}` must be an integer {bound}, received {integer}.")
    return integer


def check_real(value: Any, name: str, minimum: float = -math.inf) -> float:
    """Returns `value` as a float, or raises unless it is a number, not NaN and at least `minimum`."""
    right = "a number" if minimum == -math.inf else f"a number of at least {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be {right}, received {describe(value)}.")
    number = float(value)
    if not number >= minimum:
        raise ValueError(f"`{name}` must be {right}, received {value}.")
    return number
