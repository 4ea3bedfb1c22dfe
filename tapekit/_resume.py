"""What a run is made of, as plain data and arrays, and how another process gets it back."""

from __future__ import annotations

import hashlib
import inspect
import random
import types
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

from tapekit._config import argument_names
from tapekit._describe import describe, variable_name
from tapekit._drivers import CompiledDriver, Driver
from tapekit._store import Saved
from tapekit._tensors import tf_variable
from tapekit._xla import DRAWING, op_types

_FORMAT = 1
# What the framework gives to callbacks, and gives them again.
_GIVEN = {"model", "_model", "params", "_params", "loop", "_program_in_fit", "validation_data"}
_NO_STATE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type, np.ufunc)
_PLAIN = (bool, int, float, str, type(None))


class Packer:
    """Makes plain data ready for JSON, with the arrays in a list of their own."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def pack(self, value: Any) -> Any:
        """Returns what stands for a value; raises `TypeError` for one that is not plain data."""
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, (list, tuple, set)):
            return {"kind": type(value).__name__, "items": [self.pack(item) for item in value]}
        if isinstance(value, dict):
            return {"kind": "dict", "items": [[self.pack(key), self.pack(item)] for key, item in value.items()]}
        if isinstance(value, np.random.Generator):
            return {"kind": "generator", "state": self.pack(value.bit_generator.state)}
        if isinstance(value, random.Random):
            return {"kind": "random", "state": self.pack(value.getstate())}
        value = tf_variable(value)
        if isinstance(value, (np.ndarray, tf.Tensor, tf.Variable)) and value.dtype not in (object, tf.string):
            self.values.append(value)
            return {"kind": "array", "index": len(self.values) - 1}
        raise TypeError(describe(value))


def unpack(packed: Any, values: Sequence[np.ndarray], now: Any = None) -> Any:
    """Returns what `Packer.pack` was given; `now` is the object that is there, whose state is set where it has one."""
    if not isinstance(packed, dict):
        return packed
    kind = packed["kind"]
    if kind == "array":
        value = values[packed["index"]]
        if isinstance(tf_variable(now), tf.Variable):
            tf_variable(now).assign(value)
            return now
        return value
    if kind == "dict":
        return {unpack(key, values): unpack(item, values) for key, item in packed["items"]}
    if kind == "generator":
        generator = now if isinstance(now, np.random.Generator) else np.random.default_rng()
        generator.bit_generator.state = unpack(packed["state"], values)
        return generator
    if kind == "random":
        generator = now if isinstance(now, random.Random) else random.Random()
        generator.setstate(unpack(packed["state"], values))
        return generator
    items = [unpack(item, values) for item in packed["items"]]
    return {"list": list, "tuple": tuple, "set": set}[kind](items)


def host_random_state() -> list[Any]:
    """Returns the state of the global generators of Python and NumPy."""
    return [random.getstate(), np.random.get_state()]


def set_host_random_state(state: Sequence[Any]) -> None:
    """Sets the state of the global generators of Python and NumPy."""
    random.setstate(state[0])
    np.random.set_state(state[1])


class Memory:
    """Everything of a run that outlives its process, but for how far it has come.

    Args:
        driver: what takes the steps.
        owners: the loop and the callbacks.
        data: describes the batches, ready for JSON.
        unsaved: what of the data cannot be saved.
    """

    def __init__(self, driver: Driver, owners: Sequence[Any], data: Any, unsaved: Sequence[str]) -> None:
        self._driver = driver
        self._owners = owners
        self._data = data
        self._unsaved = list(unsaved)

    def take(self, progress: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """Returns the plain data and the arrays of a checkpoint.

        Args:
            progress: how far the run has come.
        """
        packer = Packer()
        groups = self._groups()
        state = {
            "format": _FORMAT,
            "tensorflow": tf.__version__,
            "identity": self._identity(groups),
            "loss": progress["loss"],
            "variables": packer.pack({name: [tf_variable(v) for v in group] for name, group in groups.items()}),
            "owners": [[type(o).__name__, packer.pack(self._attributes(o, packer))] for o in self._owners],
            "random": packer.pack(host_random_state()),
            "progress": packer.pack(progress),
        }
        return state, packer.values

    def unsaved(self) -> list[str]:
        """Returns what cannot be saved, in words."""
        found = list(self._unsaved)
        for owner in self._owners:
            names = [name for name in self._state_names(owner) if not self._is_plain(vars(owner)[name])]
            if names and not _is_of_keras(owner):
                found.append(f"{', '.join(names)} of {type(owner).__name__}")
        if isinstance(self._driver, CompiledDriver):
            drawing = sorted({kind for step in self._driver.steps for kind in op_types(step) & DRAWING})
            if drawing:
                found.append(
                    f"the state of {', '.join(drawing)} (draw with keras.random and a SeedGenerator, or a"
                    " tf.random.Generator)"
                )
        if not (self._driver.body.updater.slots() or _is_of_keras(self._driver.body.updater.optimizer)):
            found.append(f"the state of {describe(self._driver.body.updater.optimizer)}, which has no `variables`")
        return found

    def check(self, saved: Saved) -> None:
        """Raises unless a checkpoint is one of the same run; the sentence lists the differences."""
        here, there = self._identity(self._groups()), saved.state["identity"]
        if saved.state["tensorflow"] != tf.__version__:
            there = {**there, "objective": here["objective"]}  # another version may trace the same to other ops
        differences = [difference for name in here for difference in _differences(name, here[name], there.get(name))]
        if differences:
            raise ValueError(
                f"`resume_from` must hold a checkpoint of the same run, received {str(saved.path)!r}, which differs:"
                f" {'; '.join(differences)}."
            )

    def restore(self, saved: Saved) -> dict[str, Any]:
        """Puts back what `take` has saved, and returns how far the run had come."""
        self.check(saved)
        variables = unpack(saved.state["variables"], saved.values)
        for name, group in self._groups().items():
            for variable, value in zip(group, variables[name], strict=True):
                tf_variable(variable).assign(value)
        left = [[name, packed] for name, packed in saved.state["owners"]]
        for owner in self._owners:
            match = next((item for item in left if item[0] == type(owner).__name__), None)
            if match is not None:
                left.remove(match)
                self._set_attributes(owner, match[1], saved.values)
        set_host_random_state(unpack(saved.state["random"], saved.values))
        return unpack(saved.state["progress"], saved.values)

    def _groups(self) -> dict[str, list[Any]]:
        """Returns all variables of the run, each in one group."""
        body, driver = self._driver.body, self._driver
        step = [v for v in tf.nest.flatten(list(vars(body.step).values())) if isinstance(tf_variable(v), tf.Variable)]
        groups = {
            "variables": body.variables,
            "optimizer": body.updater.slots(),
            "model": body.objective.variables,
            "step": step,
            "best": [value for _, value in body.best],
            "others": _reachable(body.objective) if not isinstance(driver, CompiledDriver) else driver.written(),
            "global": _global_generators(),
        }
        seen: set[int] = set()
        unique: dict[str, list[Any]] = {}
        for name, group in groups.items():
            fresh = {id(tf_variable(v)): v for v in group if isinstance(tf_variable(v), tf.Variable)}
            unique[name] = [variable for key, variable in fresh.items() if key not in seen]
            seen |= fresh.keys()
        return unique

    def _identity(self, groups: dict[str, list[Any]]) -> dict[str, Any]:
        """Returns what makes a run the same one in another process, ready for JSON."""
        body = self._driver.body
        kinds = [type(body.updater.optimizer).__name__, type(body.step).__name__]
        specs = {f"{name} variable": [_spec(v) for v in group] for name, group in groups.items()}
        loss = getattr(self._driver, "_loss", None)
        return {
            "optimizer": kinds[0],
            "step strategy": kinds[1],
            **specs,
            "objective": None if loss is None else fingerprint(loss),
            "data": self._data,
        }

    def _state_names(self, owner: Any) -> list[str]:
        """Returns the attributes of the loop or a callback that are its state rather than its arguments."""
        given = _GIVEN | set(argument_names(type(owner))) | set(getattr(owner, "_not_state", ()))
        return [
            name for name, value in vars(owner).items() if name not in given and not isinstance(value, _NO_STATE)
        ]

    def _is_plain(self, value: Any) -> bool:
        try:
            Packer().pack(value)
        except TypeError:
            return False
        return True

    def _attributes(self, owner: Any, packer: Packer) -> dict[str, Any]:
        if hasattr(owner, "get_state"):
            return {"get_state": owner.get_state()}
        if isinstance(owner, keras.callbacks.CSVLogger):
            owner.csv_file.flush()
            return {"keys": owner.keys, "size": owner.csv_file.tell()}
        return {name: vars(owner)[name] for name in self._state_names(owner) if self._is_plain(vars(owner)[name])}

    def _set_attributes(self, owner: Any, packed: Any, values: Sequence[np.ndarray]) -> None:
        now = vars(owner)
        state = {
            unpack(name, values): (item, unpack(item, values, now.get(unpack(name, values))))
            for name, item in packed["items"]
        }
        if "get_state" in state:
            owner.set_state(state["get_state"][1])
            return
        if isinstance(owner, keras.callbacks.CSVLogger):
            owner.csv_file.truncate(state.pop("size")[1])
            owner.csv_file.seek(0, 2)
        for name, (_, value) in state.items():
            setattr(owner, name, value)


def _is_of_keras(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] in ("keras", "tapekit")


def _spec(variable: Any) -> list[Any]:
    return [variable_name(variable), list(variable.shape), tf.as_dtype(variable.dtype).name]


def _differences(name: str, here: Any, there: Any) -> list[str]:
    if here == there:
        return []
    if isinstance(here, list) and isinstance(there, list):
        if len(here) != len(there):
            return [f"{len(there)} {name}s were saved, here are {len(here)}"]
        # Names may be numbered on from one model to the next in a process, so they tell nothing by themselves.
        return [
            f"{name} {one[0]} has shape {tuple(one[1])} and dtype {one[2]}, saved was {other[0]} of shape"
            f" {tuple(other[1])} and dtype {other[2]}"
            for one, other in zip(here, there, strict=True)
            if one[1:] != other[1:]
        ]
    if name == "objective":
        return ["the objective computes something else"]
    return [f"the {name} is {here}, saved was {there}"]


def _global_generators() -> list[Any]:
    """Returns the states of the generators that Keras and TensorFlow use where none is given."""
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    return [tf.random.get_global_generator().state, *([] if generator is None else [generator.state])]


def _reachable(objective: Any) -> list[Any]:
    """Returns the variables that a function refers to by name, as far as Python tells; an eager run knows no more."""
    function = getattr(objective, "function", None)
    if not isinstance(function, types.FunctionType):
        return []
    names = inspect.getclosurevars(function)
    found: list[Any] = []
    for value in (*names.nonlocals.values(), *names.globals.values()):
        if isinstance(value, keras.Layer):
            found += value.variables
        elif isinstance(value, (keras.random.SeedGenerator, tf.random.Generator)):
            found.append(value.state)
        elif isinstance(tf_variable(value), tf.Variable):
            found.append(value)
    return found


def fingerprint(function: Any) -> str:
    """Returns a checksum of what a traced function computes, the same in every process."""
    graph = function.graph.as_graph_def()
    bodies = sorted(_digest(body.node_def) for body in graph.library.function)
    captured = [tensor for tensor, _ in function.graph.captures if tensor.dtype not in (tf.resource, tf.variant)]
    values = [hashlib.sha256(np.asarray(tensor).tobytes()).hexdigest() for tensor in captured]
    return hashlib.sha256("".join([_digest(graph.node), *bodies, *values]).encode()).hexdigest()


def _digest(nodes: Iterable[Any]) -> str:
    checksum = hashlib.sha256()
    for node in nodes:
        checksum.update(node.op.encode())
        if node.op == "Const":
            checksum.update(node.attr["value"].tensor.SerializeToString(deterministic=True))
    return checksum.hexdigest()
