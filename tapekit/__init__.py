"""The optimization loop that TensorFlow and Keras 3 leave to the user.

Every step can be observed, every stop is explained, gradients can be seen and changed, and the whole
thing runs at compiled speed.

Example:
    >>> import tapekit as tk, tensorflow as tf
    >>> x = tf.Variable(0.0)
    >>> loop = tk.OptimizationLoop("adam", tolerance=1e-9, max_iterations=100_000)
    >>> loop.minimize(lambda: (x - 4.0) ** 2, [x]).converged
    True
"""

import keras as _keras

if _keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"tapekit runs Keras on TensorFlow, and the Keras backend is {_keras.backend.backend()!r}: set the"
        " environment variable KERAS_BACKEND=tensorflow before Keras is imported."
    )

from tapekit import _session as _session
from tapekit import callbacks, plots, steps, stopping
from tapekit._loop import OptimizationLoop
from tapekit._nonfinite import Rollback
from tapekit._optimizers import minimize
from tapekit._result import NonFiniteError, OptimizationResult, StopReason
from tapekit._tape import PersistentTape, TapeReleasedError, intermediate
from tapekit._version import __version__ as __version__
from tapekit.callbacks import Callback
from tapekit.steps import MinimizeStep, Problem, Step, TapeStep

__all__ = [
    "Callback",
    "MinimizeStep",
    "NonFiniteError",
    "OptimizationLoop",
    "OptimizationResult",
    "PersistentTape",
    "Problem",
    "Rollback",
    "Step",
    "StopReason",
    "TapeReleasedError",
    "TapeStep",
    "callbacks",
    "intermediate",
    "minimize",
    "plots",
    "steps",
    "stopping",
]
