"""Callbacks that change gradients, inside the compiled step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tapekit._describe import check_integer, check_real, describe, unique_names
from tapekit._tensors import map_values, tf_variable
from tapekit.callbacks._base import Callback, updates_before
from tapekit.callbacks._variables_model import VariablesModel


class ClipGradients(Callback):
    r"""Clips gradients by value, by the norm of each, or by the norm of all together.

    Exactly one of the first three arguments is given. With g_i the gradient of variable i:

        value:        g_i <- min(max(g_i, -value), value), entry by entry
        norm:         g_i <- g_i * min(1, norm / |g_i|)
        global_norm:  g_i <- g_i * min(1, global_norm / |g|), where |g|^2 = sum_i |g_i|^2

    The Euclidean norm of all gradients together before clipping is recorded at every step. Norms are computed
    in float64 and do not overflow. Gradients within the limit keep every bit. A norm that is not finite makes
    all gradients that it scales NaN, as in `tf.clip_by_global_norm`. The last one follows Pascanu et al., "On
    the difficulty of training recurrent neural networks", 2013.

    Args:
        value: the largest absolute entry that is applied; `tf.IndexedSlices` become dense.
        norm: the largest norm of a single gradient that is applied.
        global_norm: the largest norm of all gradients together that is applied.
        log: the name in logs and history of the norm before clipping; `None` leaves it out.

    Raises:
        TypeError: a limit is not a number, or `log` not a string.
        ValueError: a limit is not positive and finite, or not exactly one is given.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable([3.0, 4.0])
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=2)
        >>> clip = tk.callbacks.ClipGradients(global_norm=5.0)
        >>> result = loop.minimize(lambda: tf.reduce_sum(x**2), [x], callbacks=[clip])
        >>> print(result.history["unclipped_norm"].round(3), x.numpy().round(3))
        [10.    9.9] [2.94 3.92]
    """

    def __init__(
        self,
        value: float | None = None,
        norm: float | None = None,
        global_norm: float | None = None,
        log: str | None = "unclipped_norm",
    ) -> None:
        super().__init__()
        limits = {"value": value, "norm": norm, "global_norm": global_norm}
        given = [name for name, limit in limits.items() if limit is not None]
        if len(given) != 1:
            received = " and ".join(f"`{name}`" for name in given) or "none of them"
            raise ValueError(f"exactly one of `value`, `norm` and `global_norm` must be given, received {received}.")
        check_finite(limits[given[0]], given[0], positive=True)
        if log is not None and not isinstance(log, str):
            raise TypeError(f"`log` must be a name or None, received {describe(log)}.")
        self.value = value
        self.norm = norm
        self.global_norm = global_norm
        self.log = log

    def on_gradient(self, gradients, variables):
        """Returns the gradients within the limit."""
        if self.log is not None:
            self.record(self.log, norm_of(gradients))
        if self.value is not None:
            return [_between(dense(gradient), self.value) for gradient in gradients]
        if self.norm is not None:
            return [_scaled(gradient, _shrinkage(self.norm, [gradient])) for gradient in gradients]
        shrinkage = _shrinkage(self.global_norm, gradients)
        return [_scaled(gradient, shrinkage) for gradient in gradients]


def _between(gradient: tf.Tensor, limit: float) -> tf.Tensor:
    # The clipping of older versions of XLA turns NaN into the limit.
    return tf.where(tf.math.is_nan(gradient), gradient, tf.clip_by_value(gradient, -limit, limit))


class CountingCallback(Callback):
    """A callback that knows inside the graph how many steps came before; the count begins anew with every run."""

    _counter: Any = None

    def on_train_begin(self, logs=None):
        """Begins to count."""
        if self._counter is None:  # made here, as a variable made while a step is traced has it traced twice
            self._counter = state_variable((), tf.int64)
        self._counter.assign(0)

    def count(self) -> Any:
        """Returns how many steps came before this one, a scalar of int64; called once in `on_gradient`."""
        before = self._counter.read_value()
        if updates_before():  # by another optimizer in the same step
            return before - 1
        self._counter.assign_add(1)
        return before


class GradientNoise(CountingCallback):
    """Adds Gaussian noise to the gradients, which fades out.

    The noise of step t, from 0, has mean 0 and the variance

        sigma_t^2 = eta / (1 + t)^gamma

    in every entry (Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015,
    who use eta of 0.01, 0.3 or 1.0). It depends on the seed, the step and the position of the variable alone:
    every run draws the same, and so do all drivers, XLA included, to rounding. `tf.IndexedSlices` become dense.

    Args:
        eta: the variance in the first step, in squared units of the gradient, at least 0.
        gamma: how fast the noise fades; 0 keeps it.
        seed: an integer of at least 0. Two of these callbacks in one run need two seeds.

    Raises:
        TypeError: an argument is not a number, or `seed` not an integer.
        ValueError: an argument is negative or not finite.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(0.0)
        >>> noise = tk.callbacks.GradientNoise(eta=1.0)
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=1000, callbacks=[noise])
        >>> result = loop.minimize(lambda: (x - 4.0) ** 2, [x])
        >>> print(result.variables[0].round(1))
        4.0
    """

    def __init__(self, eta: float, gamma: float = 0.55, seed: int = 0) -> None:
        super().__init__()
        self.eta = check_finite(eta, "eta", minimum=0.0)
        self.gamma = check_finite(gamma, "gamma", minimum=0.0)
        self.seed = check_integer(seed, "seed", 0)

    def on_gradient(self, gradients, variables):
        """Returns the gradients with noise."""
        step = self.count()
        deviation = tf.sqrt(self.eta * tf.cast(step + 1, tf.float64) ** -self.gamma)
        noisy = []
        for position, gradient in enumerate(map(dense, gradients)):
            noise = deviation * _normal(tf.shape(gradient), [self.seed, step * len(gradients) + position])
            noisy.append(gradient + tf.cast(noise, gradient.dtype))
        return noisy


def _normal(shape: Any, key: Sequence[Any]) -> tf.Tensor:
    """Returns independent standard normal numbers of float64 (Box and Muller 1958).

    They are made from random integers, since TensorFlow's own normal and uniform numbers are others under XLA.
    """
    seed = tf.stack([tf.cast(part, tf.int64) for part in key])
    shape = tf.concat([[2], shape], 0)
    whole: Any = None  # the whole range of integers
    bits = tf.random.stateless_uniform(shape, seed, whole, whole, tf.int32, alg="philox")
    uniform = (tf.cast(bits, tf.float64) + 0.5) / 2.0**32 + 0.5  # never 0 or 1
    return tf.sqrt(-2.0 * tf.math.log(uniform[0])) * tf.cos(2.0 * math.pi * uniform[1])


class FreezeVariables(CountingCallback):
    """Holds variables in place: their gradients are zero, for a number of steps or the whole run.

    A variable stays where it is if the optimizer leaves variables with zero gradients alone. What does not:

    - Decoupled weight decay (`weight_decay` of Keras optimizers), which is refused; leave the variables out of
      it with the optimizer's `exclude_from_weight_decay`.
    - Momentum that an optimizer brings along from an earlier run, in which the variables were not frozen:
      begin with a new optimizer.
    - `Ftrl`, which computes variables anew from sums of gradients, and sets these ones to zero.

    Optimizers that correct the bias of their averages by the number of steps, as Adam does, take larger steps
    right after a variable is released: its averages start there at zero.

    Args:
        pattern: a regular expression, searched in the paths of the variables.
        until: how many steps of a run the variables stay frozen; `None` means all.

    Raises:
        TypeError: `pattern` is not a string, or `until` not an integer.
        ValueError: `pattern` is not a regular expression, or `until` is below 1; in the first step, `pattern`
            matches no variable, or the optimizer decays the weights of one that it matches.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x, y = tf.Variable(1.0, name="x"), tf.Variable(1.0, name="y")
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=10)
        >>> freeze = tk.callbacks.FreezeVariables("x", until=9)
        >>> result = loop.minimize(lambda: x**2 + y**2, [x, y], callbacks=[freeze])
        >>> print(x.numpy().round(3), y.numpy().round(3))
        0.98 0.817
    """

    def __init__(self, pattern: str, until: int | None = None) -> None:
        super().__init__()
        self.pattern = check_pattern(pattern, "pattern")
        self.until = None if until is None else check_integer(until, "until", 1)

    def on_gradient(self, gradients, variables):
        """Returns the gradients with zeros for the frozen variables."""
        names = unique_names(variables)
        matched = matching(self.pattern, names, "pattern", self.model)
        decayed = [name for name, v in zip(names, variables, strict=True) if name in matched and self._decays(v)]
        if decayed:
            raise ValueError(
                f"`optimizer` must not decay the weights of frozen variables, received a weight_decay that moves"
                f" {', '.join(decayed)} whatever the gradients; call its exclude_from_weight_decay for them."
            )
        frozen = tf.constant(True) if self.until is None else self.count() < self.until
        return {
            name: map_values(lambda values: tf.where(frozen, tf.zeros_like(values), values), gradient)
            for name, gradient in zip(names, gradients, strict=True)
            if name in matched
        }

    def _decays(self, variable: Any) -> bool:
        """Whether the optimizer, or one that it wraps, decays the weights of a variable."""
        optimizer, target = getattr(self.loop or self.model, "optimizer", None), tf_variable(variable)
        while optimizer is not None:
            rate = getattr(optimizer, "weight_decay", None)
            uses = getattr(optimizer, "_use_weight_decay", lambda variable: True)
            if rate is not None and (rate or getattr(optimizer, "adam_weight_decay", None)) and uses(target):
                return True
            index = getattr(optimizer, "_var_to_optimizer_idx", None)  # of keras.optimizers.MultiOptimizer
            inner = optimizer.optimizers[index[optimizer._var_key(target)]] if index else None
            optimizer = inner or getattr(optimizer, "inner_optimizer", None)
        return False


class ScaleGradients(Callback):
    """Multiplies the gradients of some variables by factors: g_i <- c * g_i.

    With plain gradient descent that is a learning rate of c times the optimizer's for these variables.
    Optimizers that divide by the size of past gradients, as Adam does, undo a constant factor.

    Args:
        factors: factors by regular expressions, which are searched in the paths of the variables. A variable
            that several match gets the product.

    Raises:
        TypeError: `factors` is not a dict of numbers by strings.
        ValueError: `factors` is empty, a factor is not finite, or a key not a regular expression; in the first
            step, a key matches no variable.

    Example:
        >>> import tapekit as tk, tensorflow as tf
        >>> x, y = tf.Variable(1.0, name="x"), tf.Variable(1.0, name="y")
        >>> slow = tk.callbacks.ScaleGradients({"x": 0.1})
        >>> loop = tk.OptimizationLoop("sgd", max_iterations=10, callbacks=[slow])
        >>> result = loop.minimize(lambda: x**2 + y**2, [x, y])
        >>> print(x.numpy().round(3), y.numpy().round(3))
        0.98 0.817
    """

    def __init__(self, factors: Mapping[str, float]) -> None:
        super().__init__()
        if not isinstance(factors, Mapping):
            raise TypeError(f"`factors` must be a dict of numbers by patterns, received {describe(factors)}.")
        if not factors:
            raise ValueError("`factors` must hold at least one pattern, received an empty dict.")
        self.factors = {
            check_pattern(pattern, "factors"): check_finite(factor, f"factors[{pattern!r}]")
            for pattern, factor in factors.items()
        }

    def on_gradient(self, gradients, variables):
        """Returns the scaled gradients."""
        names = unique_names(variables)
        scaled = dict(zip(names, gradients, strict=True))
        for pattern, factor in self.factors.items():
            for name in matching(pattern, names, "factors", self.model):
                scaled[name] = _scaled(scaled[name], factor)
        return scaled


class CentralizeGradients(Callback):
    """Takes from every gradient of rank 2 or more its mean over all axes but the last.

        g[..., j] <- g[..., j] - mean(g[..., j])

    In Keras's layout the last axis of a kernel is that of the outputs, so that the weights into each output get
    a gradient of mean zero (Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural
    Networks", 2020). Gradients of lower rank stay as they are; `tf.IndexedSlices` of rank 2 or more become dense.

    Example:
        >>> import keras, tapekit as tk, tensorflow as tf
        >>> kernel = tf.Variable([[1.0, 2.0], [3.0, 4.0]])
        >>> loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=1)
        >>> square = lambda: tf.reduce_sum(kernel**2)
        >>> result = loop.minimize(square, [kernel], callbacks=[tk.callbacks.CentralizeGradients()])
        >>> kernel.numpy().tolist()
        [[1.5, 2.5], [2.5, 3.5]]
    """

    def __init__(self) -> None:
        super().__init__()

    def on_gradient(self, gradients, variables):
        """Returns the centralized gradients."""
        return [_centralized(dense(g)) if len(g.shape) > 1 else g for g in gradients]


def _centralized(gradient: tf.Tensor) -> tf.Tensor:
    wide = _widened(gradient)
    axes = list(range(len(gradient.shape) - 1))
    return tf.cast(wide - tf.reduce_mean(wide, axes, keepdims=True), gradient.dtype)


# What gradient callbacks share.


def dense(gradient: Any) -> tf.Tensor:
    """Returns a gradient as a tensor; rows that `tf.IndexedSlices` name more than once add up."""
    return tf.convert_to_tensor(gradient)


def largest_of(values: Any) -> tf.Tensor:
    """Returns the largest absolute entry, at least 0; NaN if there is one, which the maximum of XLA passes over."""
    largest = tf.maximum(tf.reduce_max(tf.abs(values)), 0.0)  # the maximum of no entries is -inf
    return tf.where(tf.reduce_any(tf.math.is_nan(values)), tf.constant(math.nan, values.dtype), largest)


def norm_of(gradients: Iterable[Any]) -> tf.Tensor:
    """Returns the Euclidean norm of all gradients together, a scalar of float64 that overflows only if it is."""
    values = [tf.cast(dense(gradient), tf.float64) for gradient in gradients]
    largest = largest_of(tf.stack([largest_of(value) for value in values]))
    unit = tf.where((largest > 0.0) & tf.math.is_finite(largest), largest, 1.0)
    return unit * tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(value / unit)) for value in values]))


def state_variable(shape: Any, dtype: Any) -> tf.Variable:
    """Returns a variable of a callback's own."""
    return tf.Variable(tf.zeros(shape, dtype), trainable=False)


def matching(pattern: str, names: Sequence[str], argument: str, model: Any) -> list[str]:
    """Returns the names in which a regular expression is found, or raises if there are none in the whole model."""
    found = [name for name in names if re.search(pattern, name)]
    # A train_step with several optimizers updates only a part of the variables of its model at a time.
    others = [] if isinstance(model, VariablesModel) else unique_names(model.trainable_variables)
    if not found and not any(re.search(pattern, name) for name in others):
        raise ValueError(f"`{argument}` must match a variable, one of {', '.join(names)}, received {pattern!r}.")
    return found


def check_pattern(value: Any, name: str) -> str:
    """Returns `value`, or raises unless it is a regular expression."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a regular expression in a string, received {describe(value)}.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"`{name}` must be a regular expression, received {value!r} ({error}).") from None
    return value


def check_finite(value: Any, name: str, minimum: float = -math.inf, positive: bool = False) -> float:
    """Returns `value` as a float, or raises unless it is a finite number within the bound."""
    number = check_real(value, name, minimum)
    if math.isinf(number) or (positive and number <= 0.0):
        raise ValueError(f"`{name}` must be a {'positive ' if positive else ''}finite number, received {value}.")
    return number


def _widened(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(values, tf.float32) if values.dtype in (tf.float16, tf.bfloat16) else values


def _scaled(gradient: Any, factor: Any) -> Any:
    def scale(values: tf.Tensor) -> tf.Tensor:
        wide = _widened(values)
        return tf.cast(wide * tf.cast(factor, wide.dtype), values.dtype)

    return map_values(scale, gradient)


def _shrinkage(limit: Any, gradients: Sequence[Any]) -> tf.Tensor:
    """Returns the factor, at most 1, that brings gradients within a limit of their norm."""
    norm = norm_of(gradients)
    return tf.where(tf.math.is_finite(norm), limit / tf.maximum(norm, limit), math.nan)
