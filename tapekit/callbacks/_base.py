"""The hooks of a run, and the callbacks that have them."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from tapekit._config import Configurable
from tapekit._describe import check_integer, describe

_updates_before: contextvars.ContextVar[int] = contextvars.ContextVar("updates_before", default=0)
_recording: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(records: dict[str, Any], updates_before: int = 0) -> Iterator[None]:
    """Sends what `record` is given inside the block to `records`.

    Args:
        records: where to.
        updates_before: how many updates the step has made before, as one with several optimizers does.
    """
    token, place = _recording.set(records), _updates_before.set(updates_before)
    try:
        yield
    finally:
        _recording.reset(token)
        _updates_before.reset(place)


def updates_before() -> int:
    """Returns how many updates the step has made before the one that the hook is called for."""
    return _updates_before.get()


joining: list[Callable[[Any], None]] = []
"""What a callback is given to when it is told of its model, so that its hooks work in `keras.Model.fit`."""


class Hooks:
    """The hooks of a run, which `Callback` and `OptimizationLoop` share. Those left alone cost nothing.

    Attributes:
        every: `on_step` is called at every `every`-th step; chunks of compiled steps end there. `None` calls it
            whenever the host looks, about twenty times a second.
        replayable: `True` says that `on_step` reads `step` and `logs` alone. It is then called for
            every step after a chunk and never makes a chunk shorter.
    """

    every: int | None = 1
    replayable: bool = False

    def on_step(self, step: int, logs: dict[str, Any]) -> None:
        """Called on the host after an update.

        The variables that it can read are those of this very step, unless it is `replayable`.

        Args:
            step: the number of the update, from 1.
            logs: the loss before the update, what the objective returned beside it, the measures, and
                what criteria need; Python numbers for scalars, NumPy arrays for the rest.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> class Show(tk.Callback):
            ...     every = 50
            ...     def on_step(self, step, logs):
            ...         print(f"{step} {logs['loss']:.3f} {float(x):.3f}")
            >>> x = tf.Variable(0.0)
            >>> loop = tk.OptimizationLoop("sgd", max_iterations=100)
            >>> result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[Show()])
            50 2.209 2.543
            100 0.293 3.470
        """

    def on_gradient(self, gradients: list[Any], variables: list[Any]) -> Sequence[Any] | None:
        """Called inside the compiled step, between computing the gradients and applying them.

        It is traced once and then runs as part of the graph, so it is written in TensorFlow or Keras ops.

        Args:
            gradients: the gradient of the loss for each variable: tensors of its shape and dtype, or
                `tf.IndexedSlices`; unscaled under mixed precision, before the optimizer's own clipping.
            variables: the variables, in the same order.

        A hook with a third argument, `intermediates`, gets the gradients with respect to the intermediates
        that `TapeStep(intermediates=...)` takes: a dict by name.

        Returns:
            The gradients to apply instead: a list, as many and of the same shapes and dtypes; a dict of
            some of them by the name of their variable; or `None`.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> class Sign(tk.Callback):
            ...     def on_gradient(self, gradients, variables):
            ...         self.record("size", tf.norm(gradients[0]))
            ...         return [tf.sign(gradient) for gradient in gradients]
            >>> x = tf.Variable([0.0, 8.0])
            >>> loop = tk.OptimizationLoop("sgd", max_iterations=100, callbacks=[Sign()])
            >>> result = loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x])
            >>> x.numpy().round(2), result.history["size"][:2].round(2)
            (array([1., 7.], dtype=float32), array([11.31, 11.29], dtype=float32))
        """

    def record(self, name: str, value: Any) -> None:
        """Adds a value of this step to the logs and the history; called in `on_gradient`.

        Args:
            name: its name, which the logs must not have yet.
            value: a tensor of any fixed shape; Keras callbacks see scalars alone.

        Raises:
            TypeError: `name` is not a string.
            RuntimeError: it is called outside of `on_gradient`.
            ValueError: the name is taken.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> class Largest(tk.Callback):
            ...     def on_gradient(self, gradients, variables):
            ...         self.record("largest", tf.reduce_max(tf.abs(gradients[0])))
            >>> x = tf.Variable([0.0, 3.0])
            >>> loop = tk.OptimizationLoop("sgd", max_iterations=2, callbacks=[Largest()])
            >>> loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x]).history["largest"].round(2)
            array([8.  , 7.84], dtype=float32)
        """
        records = _recording.get()
        if records is None:
            raise RuntimeError("record must be called in on_gradient, which runs inside the step.")
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string, received {describe(name)}.")
        if name in records:
            raise ValueError(f"`name` must be new in the logs of a step, received {name!r} for the second time.")
        records[name] = value

    def on_train_begin(self, logs: Any = None) -> None:
        """Called before the first step.

        Args:
            logs: an empty dict, as Keras gives it; may be `None`.
        """

    def on_train_end(self, logs: Any = None) -> None:
        """Called after the last step, whichever way the run ended.

        Args:
            logs: those of the last epoch, as Keras gives them; may be empty or `None`.
        """

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Called before the first step of an epoch, which has `steps_per_epoch` steps.

        Args:
            epoch: the number of the epoch, from 0, as in Keras.
            logs: an empty dict, as Keras gives it; may be `None`.
        """

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Called after an epoch with the scalar logs of its last step.

        Args:
            epoch: the number of the epoch, from 0.
            logs: a dict of Python numbers by name; in `fit` those of Keras, with the metrics of the epoch and those
                of the validation.
        """

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Called before every step; it takes the host there, as it does in Keras.

        Args:
            batch: the number of the step in its epoch, from 0.
            logs: an empty dict, as Keras gives it; may be `None`.
        """

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Called after every step with its scalar logs; it takes the host there, as it does in Keras.

        Args:
            batch: the number of the step in its epoch, from 0.
            logs: a dict of Python numbers by name; in `fit` those of Keras, which are about the epoch so far.
        """


class Callback(Configurable, keras.callbacks.Callback):
    """A Keras callback with two more hooks, `on_step` and `on_gradient`.

    Attributes:
        every: `on_step` is called at every `every`-th step. Chunks of compiled steps end exactly there,
            so that what it sees is live and a stop asked for there takes effect there. `None` calls it whenever the
            host looks, about twenty times a second.
        replayable: `True` says that the hooks read `step` and `logs` alone. They are then called for
            every step in order, after a chunk, and never make a chunk shorter.
        loop: what runs it, an `OptimizationLoop`, or in `keras.Model.fit` an object with its `stop`,
            `evaluate` and `optimizer`; `self.loop.stop("reason")` ends the run.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> class Halve(tk.Callback):
        ...     def on_gradient(self, gradients, variables):
        ...         return [0.5 * gradient for gradient in gradients]
        ...     def on_step(self, step, logs):
        ...         if logs["loss"] < 1.0:
        ...             self.loop.stop("small enough")
        >>> x = tf.Variable(0.0)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=1000)
        >>> loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[Halve()]).message
        'stopped at step 139: small enough'
    """

    every: int = 1
    replayable: bool = False
    loop: Any = None

    on_step = Hooks.on_step
    on_gradient = Hooks.on_gradient
    record = Hooks.record

    def set_model(self, model: Any) -> None:
        """Takes the model; called by Keras, where it makes the hooks known to `keras.Model.fit`.

        Args:
            model: the model that is trained; in `minimize` one that owns the variables and the optimizer.
        """
        super().set_model(model)
        for join in joining:
            join(self)


class FunctionCallback(Callback):
    """Calls a function `f(step, logs)` as `on_step`; what a plain function in a list of callbacks becomes.

    Args:
        function: called with the step, from 1, and the logs.
        every: at every how many steps, at least 1.
        replayable: whether the function reads its arguments alone, see `Callback`.

    Raises:
        TypeError: `function` cannot be called as `f(step, logs)`, or `every` is not an integer.
        ValueError: `every` is below 1.

    Example:
        >>> import tapekit as tk
        >>> show = tk.callbacks.FunctionCallback(lambda step, logs: print(step, logs["loss"]), every=100)
    """

    def __init__(self, function: Callable[[int, dict[str, Any]], Any], every: int = 1, replayable: bool = False):
        super().__init__()
        if not takes_step_and_logs(function):
            raise TypeError(f"`function` must be callable as f(step, logs), received {describe(function)}.")
        self.function = function
        self.every = check_integer(every, "every", 1)
        self.replayable = replayable

    def on_step(self, step, logs):
        """Calls the function."""
        self.function(step, logs)


def takes_step_and_logs(function: Any) -> bool:
    try:
        inspect.signature(function).bind(0, {})
    except TypeError:
        return False
    except ValueError:  # some functions written in C do not tell what they take
        pass
    return callable(function)
