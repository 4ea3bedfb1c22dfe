"""The small Keras models that the tests share: how each is built and compiled, and the data it is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

SAMPLES = 20


@dataclasses.dataclass(frozen=True)
class TrainingProblem:
    """A Keras model with data.

    `build` returns the model, not compiled; `data` gives `(x, y)` of 20 samples in NumPy arrays; `settings` gives
    the arguments of `compile`, with a new optimizer each time. Of the 16 samples that a validation split of 0.2
    leaves, a `batch_size` of 6 makes batches of 6, 6 and 4.
    """

    name: str
    build: Callable[[], Any]
    data: Callable[[], tuple[Any, Any]]
    settings: Callable[[], dict[str, Any]]
    batch_size: int = 6

    def make(self, seed: int = 0, **settings: Any) -> Any:
        """Returns the compiled model, the same one for the same seed; `settings` are more arguments of `compile`."""
        keras.utils.set_random_seed(seed)
        model = self.build()
        model.compile(**(self.settings() | settings))
        return model


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(SAMPLES, *shape)).astype("float32")


def _integers(high: int, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (SAMPLES, *shape)).astype("int32")


def _classes(*shape: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Returns data of three classes, each sample of the given shape."""
    return lambda: (_random(*shape), _integers(3))


def _values(*shape: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Returns data of one target value, each sample of the given shape."""
    return lambda: (_random(*shape), _random(1, seed=2))


def _classifier() -> dict[str, Any]:
    # An epsilon this large keeps Adam from dividing rounding by rounding where a gradient is nearly zero.
    optimizer = keras.optimizers.Adam(0.01, epsilon=1e-3)
    return {"optimizer": optimizer, "loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}


def _regression() -> dict[str, Any]:
    return {"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), "loss": "mse", "metrics": ["mae"]}


def _dense() -> Any:
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, activation="tanh"), layers.Dense(3, activation="softmax")]
    )


def _convolutional() -> Any:
    stack = [layers.Conv2D(3, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten()]
    return keras.Sequential([keras.Input((8, 8, 1)), *stack, layers.Dense(3, activation="softmax")])


def _recurrent(kind: Any, **more: Any) -> Callable[[], Any]:
    return lambda: keras.Sequential([keras.Input((3, 3)), kind(4, **more), layers.Dense(1)])


def _stateful() -> Any:
    return keras.Sequential([keras.Input(batch_shape=(4, 3, 3)), layers.GRU(4, stateful=True), layers.Dense(1)])


def _embedding() -> Any:
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4, mask_zero=True),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def _around_hidden(*hidden: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a regression with some layers between two dense ones."""
    return lambda: keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, activation="tanh"), *(make() for make in hidden), layers.Dense(1)]
    )


def _two_in_two_out() -> Any:
    a, b = keras.Input((4,), name="a"), keras.Input((2, 2), name="b")
    joined = layers.Concatenate()([a, layers.Flatten()(b)])
    hidden = layers.Dense(5, activation="tanh")(joined)
    outputs = {
        "value": layers.Dense(1, name="value")(hidden),
        "kind": layers.Dense(3, activation="softmax", name="kind")(hidden),
    }
    return keras.Model({"a": a, "b": b}, outputs)


def _two_in_two_out_data() -> tuple[Any, Any]:
    return {"a": _random(4), "b": _random(2, 2, seed=3)}, {"value": _random(1, seed=2), "kind": _integers(3)}


def _two_losses() -> dict[str, Any]:
    return {
        "optimizer": keras.optimizers.SGD(0.05),
        "loss": {"value": "mse", "kind": "sparse_categorical_crossentropy"},
        "loss_weights": {"value": 0.3, "kind": 2.0},
        "metrics": {"value": ["mae"], "kind": ["accuracy"]},
        "weighted_metrics": {"value": ["mse"], "kind": []},
    }


def _functional() -> Any:
    inputs = keras.Input((4,))
    shared = layers.Dense(4, activation="tanh")
    inner_input = keras.Input((4,))
    inner = keras.Model(inner_input, layers.Dense(4, activation="relu")(inner_input))
    hidden = layers.Add()([shared(inputs), inner(shared(inputs))])
    return keras.Model(inputs, layers.Dense(1)(hidden))


class Subclassed(keras.Model):
    """A model whose variables are made at the first batch, one layer of it not before then."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = layers.Dense(5, activation="tanh")
        self.dropout = layers.Dropout(0.3)
        self.head = layers.Dense(1)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.head(self.dropout(self.hidden(inputs), training=training))


def _unbuilt_sequential() -> Any:
    return keras.Sequential([layers.Dense(5, activation="tanh"), layers.BatchNormalization(), layers.Dense(1)])


class _SmallOutputs(layers.Layer):
    """Adds to the loss what the layer gives."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(ops.mean(ops.square(0.1 * inputs)))
        return inputs


def _regularized() -> Any:
    hidden = layers.Dense(
        5, activation="tanh", kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.02)
    )
    return keras.Sequential([keras.Input((4,)), hidden, _SmallOutputs(), layers.Dense(1, bias_regularizer="l1")])


def _constrained() -> Any:
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, activation="tanh", kernel_constraint="unit_norm", bias_constraint="non_neg"),
            layers.Dense(1, kernel_constraint=keras.constraints.MinMaxNorm(0.1, 0.5)),
        ]
    )


def _preprocessing() -> Any:
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.RandomFlip("horizontal"),
            layers.GaussianNoise(0.1),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )


def _unbuilt_preprocessing() -> Any:
    return keras.Sequential(
        [layers.RandomFlip("horizontal"), layers.GaussianNoise(0.1), layers.Flatten(), layers.Dense(1)]
    )


def _attention() -> Any:
    inputs = keras.Input((4, 6))
    attended = layers.MultiHeadAttention(2, 3, dropout=0.2)(inputs, inputs)
    hidden = layers.LayerNormalization()(layers.Add()([inputs, attended]))
    return keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(hidden)))


def _float64() -> Any:
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, activation="tanh", dtype="float64"), layers.Dense(1, dtype="float64")]
    )


class OwnLoss(keras.Model):
    """A model that overrides compute_loss and has a metric of its own, which that updates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.largest = keras.metrics.Mean(name="largest")

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, **_: Any
    ) -> Any:
        self.largest.update_state(ops.max(ops.abs(y - y_pred)))
        return ops.mean(ops.log(ops.cosh(y - y_pred)))


def _own_loss() -> Any:
    inputs = keras.Input((4,))
    return OwnLoss(inputs, layers.Dense(1)(inputs))


def _averaged() -> dict[str, Any]:
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=4)
    return {"optimizer": optimizer, "loss": "mse"}


def _accumulated() -> dict[str, Any]:
    return {"optimizer": keras.optimizers.SGD(0.05, gradient_accumulation_steps=2, clipnorm=0.5), "loss": "mse"}


def _many_metrics() -> dict[str, Any]:
    metrics = [
        "accuracy",
        keras.metrics.F1Score(name="f1"),  # one value a class
        keras.metrics.AUC(name="auc"),
        keras.metrics.MeanMetricWrapper(lambda y, p: ops.max(p), name="highest"),
    ]
    return {"optimizer": "sgd", "loss": "categorical_crossentropy", "metrics": metrics}


MODELS = [
    TrainingProblem("dense", _dense, _classes(4), _classifier),
    TrainingProblem("convolutional", _convolutional, _classes(8, 8, 1), _classifier),
    TrainingProblem("lstm", _recurrent(layers.LSTM), _values(3, 3), _regression),
    TrainingProblem("gru", _recurrent(layers.GRU, recurrent_dropout=0.2), _values(3, 3), _regression),
    TrainingProblem("stateful", _stateful, _values(3, 3), _regression, batch_size=4),
    TrainingProblem("embedding", _embedding, lambda: (_integers(7, 5), _integers(3, seed=4)), _classifier),
    TrainingProblem("batch_norm", _around_hidden(layers.BatchNormalization), _values(4), _regression),
    TrainingProblem("dropout", _around_hidden(lambda: layers.Dropout(0.4)), _values(4), _regression),
    TrainingProblem("two_in_two_out", _two_in_two_out, _two_in_two_out_data, _two_losses),
    TrainingProblem("functional", _functional, _values(4), _regression),
    TrainingProblem("subclassed", Subclassed, _values(4), _regression),
    TrainingProblem("unbuilt_sequential", _unbuilt_sequential, _values(4), _regression),
    TrainingProblem("regularized", _regularized, _values(4), _regression),
    TrainingProblem("constrained", _constrained, _values(4), _regression),
    TrainingProblem("preprocessing", _preprocessing, _values(4, 4, 1), _regression),
    TrainingProblem("unbuilt_preprocessing", _unbuilt_preprocessing, _values(4, 4, 1), _regression),
    TrainingProblem("attention", _attention, _values(4, 6), _regression),
    TrainingProblem("float64", _float64, _values(4), _regression),
    TrainingProblem("own_loss", _own_loss, _values(4), lambda: {"optimizer": "sgd"}),
    TrainingProblem("averaged", _around_hidden(), _values(4), _averaged),
    TrainingProblem("accumulated", _around_hidden(), _values(4), _accumulated),
    TrainingProblem(
        "many_metrics", _dense, lambda: (_random(4), np.eye(3, dtype="float32")[_integers(3)]), _many_metrics
    ),
]
BY_NAME = {problem.name: problem for problem in MODELS}
