"""Callbacks: objects with hooks.

Every Keras callback is one. `Callback` adds `on_step` and `on_gradient`, and says how often it needs
the host.
"""

from __future__ import annotations

from typing import Any

import keras

from tapekit._config import Registry
from tapekit._describe import describe
from tapekit.callbacks._at_steps import AtSteps
from tapekit.callbacks._base import Callback, FunctionCallback, takes_step_and_logs
from tapekit.callbacks._checkpoint import Checkpoint
from tapekit.callbacks._gradient_checks import CheckGradients
from tapekit.callbacks._gradient_views import CaptureGradients, GradientStatistics
from tapekit.callbacks._gradients import (
    CentralizeGradients,
    ClipGradients,
    FreezeVariables,
    GradientNoise,
    ScaleGradients,
)
from tapekit.callbacks._json_lines import JSONLinesLogger
from tapekit.callbacks._log_steps import LogSteps
from tapekit.callbacks._progress import Progress
from tapekit.callbacks._stop_when import StopWhen
from tapekit.callbacks._table import IterationTable
from tapekit.callbacks._tensorboard import TensorBoardLogger

__all__ = [
    "AtSteps",
    "Callback",
    "CaptureGradients",
    "CentralizeGradients",
    "CheckGradients",
    "Checkpoint",
    "ClipGradients",
    "FreezeVariables",
    "FunctionCallback",
    "GradientNoise",
    "GradientStatistics",
    "IterationTable",
    "JSONLinesLogger",
    "LogSteps",
    "Progress",
    "ScaleGradients",
    "StopWhen",
    "TensorBoardLogger",
    "get",
]

_NOT_BY_NAME = (keras.callbacks.Callback, keras.callbacks.CallbackList)
_registry = Registry("callbacks", keras.callbacks.Callback, "tapekit.callbacks")
_registry.add(
    *(
        member
        for member in vars(keras.callbacks).values()
        if isinstance(member, type) and issubclass(member, keras.callbacks.Callback) and member not in _NOT_BY_NAME
    ),
    IterationTable,
    FunctionCallback,
    ClipGradients,
    GradientNoise,
    FreezeVariables,
    ScaleGradients,
    CentralizeGradients,
    GradientStatistics,
    CaptureGradients,
    CheckGradients,
    StopWhen,
    Checkpoint,
    JSONLinesLogger,
    Progress,
    LogSteps,
    TensorBoardLogger,
    AtSteps,
)


def get(identifier: Any) -> keras.callbacks.Callback:
    """Returns the callback that a name, a configuration, a function or an object stands for.

    Args:
        identifier: a Keras or tapekit callback; a function `f(step, logs)`; a name such as
            `"iteration_table"` or `"terminate_on_nan"`; or a configuration
            `{"class_name": "IterationTable", "config": {"every": 10}}`.

    Returns:
        The callback.

    Raises:
        ValueError: the name is not known; the sentence lists the known ones and the closest.
        TypeError: it is none of these, or the callback needs other arguments.

    Example:
        >>> import tapekit as tk
        >>> tk.callbacks.get({"class_name": "IterationTable", "config": {"every": 10}}).every
        10
    """
    if isinstance(identifier, (type, str, dict, keras.callbacks.Callback)):
        return _registry.get(identifier)
    if not takes_step_and_logs(identifier):
        raise TypeError(
            "`callbacks` must be callbacks, their names or configurations, or functions f(step, logs),"
            f" received {describe(identifier)}."
        )
    return FunctionCallback(identifier)
