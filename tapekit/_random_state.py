"""The state of the generators of random numbers that everyone in a process shares."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random import seed_generator
from tensorflow.python.eager import context
from tensorflow.python.ops import stateful_random_ops


def host_random_state() -> list[Any]:
    """Returns the state of the global generators of Python and NumPy."""
    return [random.getstate(), np.random.get_state()]


def set_host_random_state(state: Sequence[Any]) -> None:
    """Sets the state of the global generators of Python and NumPy."""
    random.setstate(state[0])
    np.random.set_state(state[1])


def random_state() -> dict[str, Any]:
    """Returns the state of all global generators; those of TensorFlow and Keras that nobody has used are `None`."""
    tensorflow: Any = context.context()
    generator: Any = stateful_random_ops.global_generator
    keras_generator: Any = global_state.get_global_attribute("global_seed_generator")
    eager = None if tensorflow._seed is None else [tensorflow._seed, tensorflow._rng.getstate()]
    return {
        "host": host_random_state(),
        "tensorflow eager": eager,
        "tensorflow": None if generator is None else [generator.algorithm, generator.state.numpy()],
        "keras": None if keras_generator is None else keras_generator.state.numpy(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets what `random_state` has returned."""
    if state["tensorflow eager"] is not None:
        tensorflow: Any = context.context()
        tensorflow._seed, inner = state["tensorflow eager"]
        tensorflow._rng = random.Random()
        tensorflow._rng.setstate(inner)
    if state["tensorflow"] is not None:
        algorithm, value = state["tensorflow"]
        if stateful_random_ops.global_generator is None:
            tf.random.set_global_generator(tf.random.Generator.from_state(value, algorithm))
        else:
            tf.random.get_global_generator().state.assign(value)
    if state["keras"] is not None:
        seed_generator.global_seed_generator().state.assign(state["keras"])
    set_host_random_state(state["host"])
