"""Optimizers as the steps see them: Keras 3, `tf_keras`, and anything else with `apply_gradients`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tapekit._describe import describe, variable_name
from tapekit._objective import keras_variable
from tapekit._tensors import KerasVariable, gradient_values, map_values, tf_variable


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
        TypeError: an argument is of the wrong kind, or `var_list` holds no variable.

    Example:
        >>> import keras, tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(0.0)
        >>> iterations = tk.minimize(keras.optimizers.SGD(0.25), lambda: (x - 4.0) ** 2, [x])
        >>> int(iterations), float(x)
        (1, 2.0)
    """
    if inspect.isclass(optimizer) or not (hasattr(optimizer, "apply_gradients") or hasattr(optimizer, "minimize")):
        raise TypeError(
            f"`optimizer` must be an object with apply_gradients or minimize, received {describe(optimizer)}."
        )
    if not callable(loss) and tape is None:
        raise ValueError(f"`tape` must be the tape under which the loss {describe(loss)} was computed, received None.")
    if callable(var_list) and not callable(loss):
        var_list = var_list()
    own = getattr(optimizer, "minimize", None)
    if own is not None:
        targets = (lambda: _tf_variables(var_list())) if callable(var_list) else _tf_variables(var_list)
        more = {} if tape is None else {"tape": tape}
        if "var_list" in inspect.signature(own).parameters:  # which is the third one in tf.compat.v1
            return own(loss, var_list=targets, **more)
        return own(loss, targets, **more)
    tape = tape or tf.GradientTape()
    if callable(loss):
        with tape:
            if not callable(var_list):
                tape.watch(_tf_variables(var_list))
            loss = loss()
    loss = tf_variable(loss)
    if not isinstance(loss, (tf.Tensor, tf.Variable)):
        raise TypeError(f"`loss` must be a tensor, or a function that returns one, received {describe(loss)}.")
    variables = _flat(var_list() if callable(var_list) else var_list)
    scale_loss = getattr(optimizer, "scale_loss", tf.identity)
    scale = tf.cast(scale_loss(tf.ones_like(loss)), loss.dtype)
    gradients = tape.gradient(loss, [tf_variable(v) for v in variables], output_gradients=scale)
    return optimizer.apply_gradients(list(zip(gradients, _native(optimizer, variables), strict=True)))


def _flat(var_list: Any) -> list[Any]:
    variables = [var_list] if isinstance(var_list, (tf.Variable, KerasVariable)) else tf.nest.flatten(var_list)
    strange = [variable for variable in variables if not isinstance(variable, (tf.Variable, KerasVariable))]
    if strange or not variables:
        received = describe(strange[0] if strange else var_list)
        raise TypeError(f"`var_list` must hold tf.Variable or keras.Variable, at least one, received {received}.")
    return variables


def _native(optimizer: Any, variables: Sequence[Any]) -> list[Any]:
    """Returns the variables as an optimizer wants them: some of Keras 3 read attributes that `tf.Variable` has not."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return [tf_variable(variable) for variable in variables]
    return [keras_variable(variable) for variable in variables]


def _tf_variables(var_list: Any) -> list[tf.Variable]:
    return [tf_variable(variable) for variable in _flat(var_list)]


class Updater:
    """One way to talk to every kind of optimizer, loss scaling included.

    Args:
        optimizer: a Keras 3 optimizer, its name or configuration, or an object with `apply_gradients`.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = _get_optimizer(optimizer)
        self._views: dict[int, tuple[Any, Any]] = {}
        self._saved: dict[int, tuple[tf.Variable, tf.Tensor]] = {}

    def native(self, variables: Sequence[Any]) -> list[Any]:
        """Returns the variables as this optimizer wants them, the same ones at every step."""
        fresh = [variable for variable in variables if id(variable) not in self._views]
        self._views |= {id(v): (v, view) for v, view in zip(fresh, _native(self.optimizer, fresh), strict=True)}
        return [self._views[id(variable)][1] for variable in variables]

    def check(self, variables: Sequence[Any]) -> None:
        """Raises if the optimizer, or one that it wraps, has been built without one of `variables`."""
        optimizer = self.optimizer
        while optimizer is not None:
            index = getattr(optimizer, "_trainable_variables_indices", None) or getattr(optimizer, "_index_dict", None)
            unknown = [variable_name(v) for v in variables if index and optimizer._var_key(tf_variable(v)) not in index]
            if unknown:
                raise ValueError(
                    "`optimizer` must be new or built on the variables that are minimized over, received"
                    f" {describe(optimizer)} built on others, without {', '.join(unknown)}."
                )
            optimizer = getattr(optimizer, "inner_optimizer", None)

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the slot variables, outside of any graph that is being traced."""
        with tf.init_scope():
            if hasattr(self.optimizer, "build"):
                if not getattr(self.optimizer, "built", False):
                    self.optimizer.build(list(variables))
            elif hasattr(self.optimizer, "_create_all_weights"):  # the legacy optimizers of tf_keras
                self.optimizer._create_all_weights(list(variables))
            if self._saved:
                self._save(self.slots())

    @property
    def scales(self) -> bool:
        """Whether the optimizer scales the loss at all, as under mixed precision."""
        return self.scale(tf.float32) is not None

    def scale(self, dtype: Any) -> Any:
        """Returns the factor on the loss that the optimizer asks for, or None."""
        one = tf.ones([], dtype)
        for method in ("scale_loss", "get_scaled_loss"):  # Keras 3, tf_keras
            if hasattr(self.optimizer, method):
                scaled = getattr(self.optimizer, method)(one)
                return None if scaled is one else tf.cast(scaled, dtype)
        return None

    def true(self, gradients: Sequence[Any]) -> list[Any]:
        """Returns the gradients of the loss from those of the scaled loss."""
        if not self.scales:
            return list(gradients)
        if hasattr(self.optimizer, "get_unscaled_gradients"):
            return self.optimizer.get_unscaled_gradients(gradients)
        return [map_values(lambda values: values / self.scale(values.dtype), gradient) for gradient in gradients]

    @property
    def _takes_scaled(self) -> bool:
        """Whether `apply_gradients` takes the scale out again, as in Keras 3 and unlike in tf_keras."""
        return hasattr(self.optimizer, "scale_loss")

    def apply(self, gradients: Sequence[Any], variables: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Updates the variables from the gradients of the loss."""
        gradients = self.scaled(gradients)
        return self.optimizer.apply_gradients(list(zip(gradients, variables, strict=True)), *args, **kwargs)

    def scaled(self, gradients: Sequence[Any]) -> list[Any]:
        """Returns the gradients as `apply_gradients` takes them, from those of the loss."""
        if not (self._takes_scaled and self.scales):
            return list(gradients)
        return [map_values(lambda values: values * self.scale(values.dtype), gradient) for gradient in gradients]

    def minimize(
        self,
        loss: Callable[[], Any],
        variables: Sequence[Any],
        transform: Callable[[Any], Any],
        update: Callable[..., Any],
    ) -> None:
        """Makes one step by `minimize`, with `transform` between computing and applying the gradients.

        `transform` takes one gradient of the loss, or None, for each variable, and returns those to apply;
        `update` is given a function that applies them, the gradients and the variables, and calls it or not.
        """
        called = False

        def apply_gradients(grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal called
            called = True
            found = {id(tf_variable(target)): gradient for gradient, target in grads_and_vars}
            gradients = [found.get(id(tf_variable(variable))) for variable in variables]
            targets = [v for v, gradient in zip(self.native(variables), gradients, strict=True) if gradient is not None]
            gradients = transform(self.true(gradients) if self._takes_scaled else gradients)
            update(lambda: self.apply(gradients, targets, *args, **kwargs), gradients, targets)

        minimize(_Intercepted(self.optimizer, apply_gradients), loss, self.native(variables))
        if not called:
            raise TypeError(
                "`optimizer` must call its apply_gradients in minimize for MinimizeStep, which"
                f" {describe(self.optimizer)} does not; use TapeStep."
            )

    @property
    def skips(self) -> bool:
        """Whether the optimizer leaves out the updates whose gradients are not finite."""
        return self.scales and getattr(self.optimizer, "inner_optimizer", None) is not None

    def save(self, variables: Sequence[Any]) -> None:
        """Remembers the values of variables and slots, for `roll_back`."""
        self._saved = {}
        self._save([*variables, *self.slots()])

    def roll_back(self) -> None:
        """Gives the variables and slots the values that they had at `save`, or were made with since."""
        for variable, value in self._saved.values():
            variable.assign(value)

    def _save(self, variables: Sequence[Any]) -> None:
        for variable in map(tf_variable, variables):
            if isinstance(variable, tf.Variable):
                self._saved.setdefault(id(variable), (variable, tf.identity(variable)))

    @property
    def learning_rate(self) -> Any:
        """The learning rate, a variable unless a schedule gives it."""
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        return getattr(optimizer, "_learning_rate", getattr(optimizer, "learning_rate", None))

    def slots(self) -> list[Any]:
        """Returns the variables of the optimizer."""
        slots = getattr(self.optimizer, "variables", ())
        return tf.nest.flatten(slots() if callable(slots) else slots)


class _Intercepted:
    """An optimizer, but for an `apply_gradients` that others see first. The optimizer is not touched."""

    def __init__(self, optimizer: Any, apply_gradients: Callable[..., Any]) -> None:
        vars(self).update(__optimizer=optimizer, apply_gradients=apply_gradients)

    def __getattr__(self, name: str) -> Any:
        optimizer = vars(self)["__optimizer"]
        value = getattr(optimizer, name)
        if inspect.ismethod(value) and value.__self__ is optimizer:
            return types.MethodType(value.__func__, self)  # which may call apply_gradients in its turn
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["__optimizer"], name, value)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # so that super() works inside the optimizer's own methods
        return type(vars(self)["__optimizer"])


def all_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Returns whether no gradient, dense or `tf.IndexedSlices`, holds a NaN or an infinity."""
    finite = tf.constant(True)
    for gradient in gradients:
        finite &= tf.reduce_all(tf.math.is_finite(gradient_values(gradient)))
    return finite


def sum_finite(gradients: Sequence[Any], undone: Any) -> tf.Tensor:
    """Returns whether the sums of gradients are finite: not if an entry is NaN or infinite, nor if a sum overflows.

    XLA computes a gradient once for a sum of it, and once for each use of it beside any look at its entries.

    Args:
        gradients: dense or `tf.IndexedSlices`.
        undone: a bool or a scalar bool tensor, whether XLA makes the update in any case, without waiting for this.
    """
    sums = [tf.cast(_sum(gradient, undone), tf.float64) for gradient in gradients]
    return tf.math.is_finite(tf.add_n([tf.zeros([], tf.float64), *sums]))


def _sum(gradient: Any, undone: Any) -> tf.Tensor:
    """Returns the sum of a gradient, for XLA of the fewest numbers that it is known to have.

    Most optimizers make `tf.IndexedSlices` dense. XLA does that once for both, and sums up numbers one by one.
    """
    values = gradient_values(gradient)
    shape = gradient.dense_shape if isinstance(gradient, tf.IndexedSlices) else None
    shape = None if shape is None else tf.get_static_value(shape)
    if shape is None or np.prod(shape) > (values.shape.num_elements() or 0):
        return tf.reduce_sum(values)
    if isinstance(undone, bool):
        return tf.reduce_sum(tf.convert_to_tensor(gradient) if undone else values)
    return tf.cond(undone, lambda: tf.reduce_sum(tf.convert_to_tensor(gradient)), lambda: tf.reduce_sum(values))


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
