"""The model that Keras callbacks find in a run without one, and what they cannot do there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from tapekit._describe import describe

_ORBAX: tuple[Any, ...] = tuple(filter(None, [getattr(keras.callbacks, "OrbaxCheckpoint", None)]))  # since Keras 3.14


class _Owner(keras.layers.Layer):
    """The one layer of the model, as TensorBoard looks for variables in layers alone."""

    def __init__(self, variables: list[keras.Variable]) -> None:
        super().__init__(name="variables")
        self.owned = variables
        self.built = True


@keras.saving.register_keras_serializable(package="tapekit")
class VariablesModel(keras.Model):
    """The model that callbacks find in a run without one: it owns the variables and the optimizer."""

    def __init__(self, variables: list[keras.Variable], optimizer: Any = None) -> None:
        super().__init__(name="tapekit_variables")
        self.owner = _Owner(variables)
        self.optimizer = optimizer
        self.stop_training = False
        self.built = True

    def call(self, inputs: Any = None) -> Any:
        """Returns `inputs`: the objective is not a function of a batch."""
        return inputs

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the variables, and the optimizer with its state if it is one of Keras."""
        if not str(filepath).endswith(".keras"):  # the older formats write a file that nobody can load
            raise ValueError(
                f"The filepath must end in `.keras` to save the variables of a run, received {str(filepath)!r}."
            )
        super().save(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns what makes variables of the same names, shapes and dtypes."""
        return {"variables": [{"shape": list(v.shape), "dtype": v.dtype, "name": v.name} for v in self.owner.owned]}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> VariablesModel:
        """Returns a model of new variables, which are zero until their values are loaded."""
        return cls(
            [keras.Variable(keras.ops.zeros(v["shape"], v["dtype"]), name=v["name"]) for v in config["variables"]]
        )

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the optimizer, if it is one of Keras."""
        return {"optimizer": self.optimizer} if isinstance(self.optimizer, keras.optimizers.Optimizer) else {}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Makes the optimizer, ready for its state to be loaded."""
        self.optimizer = keras.saving.deserialize_keras_object(config["optimizer"])
        self.optimizer.build(self.trainable_variables)


def check_callbacks(callbacks: Iterable[Any], optimizer: Any) -> None:
    """Raises for callbacks of Keras that would fail, or do nothing, in a run without a model.

    Args:
        callbacks: those of the run.
        optimizer: that of the run.
    """
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.SwapEMAWeights) and not callback.swap_on_epoch:
            raise ValueError(
                "`swap_on_epoch` of SwapEMAWeights must be True in minimize, which evaluates no model on other data,"
                " received False."
            )
        if isinstance(callback, keras.callbacks.TensorBoard) and callback.embeddings_freq:
            raise ValueError(
                "`embeddings_freq` of TensorBoard must be 0 in minimize, which has no Embedding layer, received"
                f" {callback.embeddings_freq}."
            )
        if missing := _missing(callback, optimizer):
            raise ValueError(
                f"`optimizer` must {missing} for {type(callback).__name__}, received {describe(optimizer)}."
            )


def _missing(callback: Any, optimizer: Any) -> str | None:
    """Returns what an optimizer must do for a callback and does not."""
    of_keras = isinstance(optimizer, keras.optimizers.Optimizer)
    parts = getattr(optimizer, "optimizers", [getattr(optimizer, "inner_optimizer", optimizer)])
    if isinstance(callback, (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)):
        return None if all(hasattr(part, "learning_rate") for part in parts) else "have a learning_rate"
    if isinstance(callback, keras.callbacks.SwapEMAWeights):
        averages = of_keras and any(getattr(part, "use_ema", False) for part in parts)
        return None if averages else "be one of Keras 3 with use_ema=True"
    if isinstance(callback, keras.callbacks.TensorBoard) and callback.write_steps_per_second:
        return None if hasattr(optimizer, "iterations") else "count its iterations"
    if isinstance(callback, (keras.callbacks.BackupAndRestore, *_ORBAX)):
        return None if of_keras else "be one of Keras 3, whose state can be saved,"
    return None


def check_monitor(callback: Any, logs: Mapping[str, Any]) -> None:
    """Raises if a callback waits for a value that the logs of an epoch do not have, of which Keras only warns.

    Args:
        callback: any callback.
        logs: those of an epoch, as the callback gets them.
    """
    kind = type(callback)  # since a subclass may look elsewhere
    waits = kind in (keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau)
    keeps_best = kind in (keras.callbacks.ModelCheckpoint, *_ORBAX) and callback.save_best_only
    if (waits or keeps_best) and callback.monitor not in logs:
        hint = ", as minimize has no validation data" if callback.monitor.startswith("val_") else ""
        raise ValueError(
            f"`monitor` of {kind.__name__} must be one of the logs {', '.join(logs)}, received"
            f" {callback.monitor!r}{hint}."
        )
