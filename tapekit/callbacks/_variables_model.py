"""The model that Keras callbacks find in a run without one."""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="tapekit")
class VariablesModel(keras.Model):
    """The model that callbacks find in a run without one: it owns the variables and the optimizer."""

    def __init__(self, variables: list[keras.Variable], optimizer: Any = None) -> None:
        super().__init__(name="tapekit_variables")
        self.owned = variables
        self.optimizer = optimizer
        self.stop_training = False
        self.built = True

    def call(self, inputs: Any = None) -> Any:
        """Returns `inputs`: the objective is not a function of a batch."""
        return inputs

    def get_config(self) -> dict[str, Any]:
        """Returns what makes variables of the same names, shapes and dtypes."""
        return {"variables": [{"shape": list(v.shape), "dtype": v.dtype, "name": v.name} for v in self.owned]}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> VariablesModel:
        """Returns a model of new variables, which are zero until their values are loaded."""
        return cls(
            [keras.Variable(keras.ops.zeros(v["shape"], v["dtype"]), name=v["name"]) for v in config["variables"]]
        )
