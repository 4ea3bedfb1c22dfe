"""The arguments of a loop, checked."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tapekit import callbacks as _callbacks
from tapekit import stopping as _stopping
from tapekit._describe import describe
from tapekit._objective import RESERVED, required_arguments

MOST_CRITERIA = 30  # a bit each of a 32-bit integer, which needs one for its sign and one for what is not finite


def check_count(criteria: list[_stopping.Criterion]) -> list[_stopping.Criterion]:
    """Returns the criteria of a run, or raises if there are more than a step has bits for."""
    if len(criteria) > MOST_CRITERIA:
        raise ValueError(f"`stopping` must hold at most {MOST_CRITERIA - 3} criteria, received {len(criteria)}.")
    return criteria


def identity(function: Callable[..., Any]) -> tuple[int, int]:
    """Returns what tells a function, or the method of an object, from others."""
    return id(getattr(function, "__self__", None)), id(getattr(function, "__func__", function))


def callback_list(callbacks: Any) -> list[Any]:
    """Returns the callbacks that an argument stands for."""
    if callbacks is None:
        return []
    items = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    lists = [item.callbacks if isinstance(item, keras.callbacks.CallbackList) else [item] for item in items]
    return [_callbacks.get(item) for item in itertools.chain.from_iterable(lists)]


def check_measures(measures: Any) -> dict[str, Callable[..., Any]]:
    """Returns the measures, or raises if they are not a dict of functions."""
    right = "`measures` must be a dict of functions of no arguments, or of the gradients"
    if measures is None:
        return {}
    if not isinstance(measures, Mapping):
        raise TypeError(f"{right}, received {describe(measures)}.")
    for name, function in measures.items():
        if not isinstance(name, str) or not callable(function):
            raise TypeError(f"{right}, received {describe(function)} under {name!r}.")
        parameters = inspect.signature(function).parameters.values()
        if any(item.kind is item.KEYWORD_ONLY and item.default is item.empty for item in parameters):
            raise TypeError(f"{right}, received under {name!r} one of {inspect.signature(function)}.")
        if name in RESERVED:
            raise ValueError(f"`measures` must not use the name {name!r}, which the logs have already.")
        if len(set(required_arguments(function)) - {"intermediates"}) > 1:
            raise TypeError(f"{right}, received under {name!r} one of {inspect.signature(function)}.")
    return dict(measures)
