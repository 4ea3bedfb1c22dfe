"""Optimizers as the steps see them: Keras 3, `tf_keras`, and anything else with `apply_gradients`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tapekit._describe import describe, variable_name
from tapekit._objective import keras_variable, tf_variable


def minimize(optimizer: Any, loss: Any, var_list: Any, tape: tf.GradientTape | None = None) -> Any:
    """Makes one update of `var_list` that decreases `loss`: the method that Keras 3 dropped.

    It has the meaning of `tf.keras.optimizers.Optimizer.minimize` in Keras 2: the gradient is taken with
    a tape and given to `apply_gradients`. An optimizer that has a `minimize` of its own is asked for it.

    Args:
        optimizer: a Keras optimizer, or any object with `apply_gradients` or `minimize`.
        loss: a function of no arguments that returns the loss, or a tensor computed under `tape`.
        var_list: the variables (`tf.Variable` or `keras.Variable`), or a function that returns them,
            called after the loss.
        tape: the `tf.GradientTape` under which a tensor `loss` was computed.

    Returns:
        What the optimizer's `apply_gradients` returns; for Keras 3, the variable that counts iterations.

    Raises:
        ValueError: `loss` is a tensor and `tape` is None.
        TypeError: the optimizer has neither `apply_gradients` nor `minimize`.

    Example:
        >>> import keras, tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(0.0)
        >>> iterations = tk.minimize(keras.optimizers.SGD(0.25), lambda: (x - 4.0) ** 2, [x])
        >>> int(iterations), float(x)
        (1, 2.0)
    """
    if not callable(loss) and tape is None:
        raise ValueError(f"`tape` must be the tape under which the loss {describe(loss)} was computed, received None.")
    own = getattr(optimizer, "minimize", None)
    if own is not None:
        variables = var_list if callable(var_list) else [tf_variable(variable) for variable in _flat(var_list)]
        return own(loss, variables) if tape is None else own(loss, variables, tape=tape)
    if not hasattr(optimizer, "apply_gradients"):
        raise TypeError(f"`optimizer` must have apply_gradients or minimize, received {describe(optimizer)}.")
    tape = tape or tf.GradientTape()
    if callable(loss):
        with tape:
            if not callable(var_list):
                tape.watch([tf_variable(variable) for variable in _flat(var_list)])
            loss = loss()
    variables = _flat(var_list() if callable(var_list) else var_list)
    if hasattr(optimizer, "scale_loss"):
        with tape:
            loss = optimizer.scale_loss(loss)
    gradients = tape.gradient(loss, [tf_variable(variable) for variable in variables])
    pairs = [(gradient, keras_variable(v)) for gradient, v in zip(gradients, variables, strict=True)]
    return optimizer.apply_gradients(pairs)


def _flat(variables: Any) -> list[Any]:
    return [variables] if isinstance(variables, (tf.Variable, keras.Variable)) else tf.nest.flatten(variables)


class Updater:
    """One way to talk to every kind of optimizer, loss scaling included.

    Args:
        optimizer: a Keras 3 optimizer, its name or configuration, or an object with `apply_gradients`.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = _get_optimizer(optimizer)
        self._is_keras_3 = isinstance(self.optimizer, keras.optimizers.Optimizer)
        self._views: dict[int, tuple[Any, keras.Variable]] = {}

    def native(self, variables: Sequence[Any]) -> list[Any]:
        """Returns the variables as this optimizer wants them."""
        if not self._is_keras_3:
            return [tf_variable(variable) for variable in variables]
        for variable in variables:
            if id(variable) not in self._views:
                self._views[id(variable)] = variable, keras_variable(variable)
        return [self._views[id(variable)][1] for variable in variables]

    def check(self, variables: Sequence[Any]) -> None:
        """Raises if the optimizer has been built without one of `variables`."""
        index = getattr(self.optimizer, "_trainable_variables_indices", None)
        index = getattr(self.optimizer, "_index_dict", None) if index is None else index
        if not index:
            return
        unknown = [variable_name(v) for v in variables if self.optimizer._var_key(tf_variable(v)) not in index]
        if unknown:
            raise ValueError(
                "`optimizer` must be new or built on the variables that are minimized over, received a"
                f" {type(self.optimizer).__name__} built on others, without {', '.join(unknown)}."
            )

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the slot variables, outside of any graph that is being traced."""
        with tf.init_scope():
            if self._is_keras_3:
                if not self.optimizer.built:
                    self.optimizer.build(list(variables))
            elif hasattr(self.optimizer, "build"):
                self.optimizer.build(list(variables))
            elif hasattr(self.optimizer, "_create_all_weights"):  # the legacy optimizers of tf_keras
                self.optimizer._create_all_weights(list(variables))

    def scaled(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss whose gradient the optimizer wants under mixed precision."""
        for method in ("scale_loss", "get_scaled_loss"):
            if hasattr(self.optimizer, method):
                return getattr(self.optimizer, method)(loss)
        return loss

    @property
    def scales(self) -> bool:
        """Whether the optimizer scales the loss at all."""
        one = tf.ones([])
        return self.scaled(one) is not one

    def true(self, gradients: Sequence[Any]) -> list[Any]:
        """Returns the gradients of the loss from those of the scaled loss."""
        if not self.scales:
            return list(gradients)
        scale = self.scaled(tf.ones([]))
        return [map_values(lambda values: values / tf.cast(scale, values.dtype), g) for g in gradients]

    def apply(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Any:
        """Updates the variables from the gradients of the loss."""
        if self._is_keras_3 and self.scales:  # Keras 3 takes the scale out again itself
            scale = self.scaled(tf.ones([]))
            gradients = [map_values(lambda values: values * tf.cast(scale, values.dtype), g) for g in gradients]
        return self.optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))

    def minimize(self, loss: Callable[[], Any], variables: Sequence[Any], transform: Callable[[Any], Any]) -> None:
        """Makes one step by `minimize`, with `transform` between computing and applying the gradients.

        `transform` takes and returns the gradients of the unscaled loss.
        """
        optimizer = self.optimizer

        def apply_gradients(grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
            pairs = list(grads_and_vars)
            gradients = [gradient for gradient, _ in pairs]
            targets = [target for gradient, target in pairs if gradient is not None]
            return self.apply(transform(self.true(gradients) if self._is_keras_3 else gradients), targets)

        seen = _Intercepted(optimizer, apply_gradients)
        if hasattr(optimizer, "minimize"):
            type(optimizer).minimize(seen, loss, [tf_variable(variable) for variable in variables])
        else:
            minimize(seen, loss, self.native(variables))
        if not seen.called:
            raise TypeError(
                f"`optimizer` must call its apply_gradients in minimize for MinimizeStep, which {describe(optimizer)}"
                " does not; use TapeStep."
            )


class _Intercepted:
    """An optimizer, but for an `apply_gradients` that others see first. The optimizer is not touched."""

    def __init__(self, optimizer: Any, apply_gradients: Callable[..., Any]) -> None:
        vars(self).update(_optimizer=optimizer, _apply_gradients=apply_gradients, called=False)

    def apply_gradients(self, *args: Any, **kwargs: Any) -> Any:
        vars(self)["called"] = True
        return self._apply_gradients(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._optimizer, name, value)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # so that super() works inside the optimizer's own minimize
        return type(vars(self)["_optimizer"])


def map_values(function: Callable[[Any], Any], gradient: Any) -> Any:
    """Applies an elementwise `function` to a gradient, dense or `tf.IndexedSlices`."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return gradient if gradient is None else function(gradient)


def _get_optimizer(optimizer: Any) -> Any:
    right = "`optimizer` must be a Keras optimizer, its name or configuration, or an object with apply_gradients"
    if inspect.isclass(optimizer):
        raise TypeError(f"{right}, received {describe(optimizer)}: write {optimizer.__name__}(...) for an instance.")
    if isinstance(optimizer, (str, dict)):
        try:
            return keras.optimizers.get(optimizer)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{right}, received {optimizer!r}, which Keras does not know.") from error
    if not callable(getattr(optimizer, "apply_gradients", None)):
        raise TypeError(f"{right}, received {describe(optimizer)}.")
    return optimizer
