"""What a run is made of, as plain data and tensors, and how another process gets it back."""

from __future__ import annotations

import collections
import hashlib
import inspect
import json
import random
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from tapekit._config import argument_names
from tapekit._describe import describe, variable_name
from tapekit._drivers import CompiledDriver, Driver
from tapekit._random_state import random_state, set_random_state
from tapekit._result import StopReason
from tapekit._store import Saved
from tapekit._tensors import tf_variable
from tapekit._xla import DRAWING, op_types
from tapekit.callbacks import JSONLinesLogger

# What a run gives to callbacks, and gives them again.
_GIVEN = {"model", "_model", "params", "_params", "loop", "validation_data"}
_REFERENCES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type, np.ufunc)
_SAVED_ELSEWHERE = (keras.Layer, keras.optimizers.Optimizer, keras.Loss, keras.callbacks.Callback)
_PLAIN = (bool, int, float, str, type(None))
_SEQUENCES: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, set, collections.deque)}


class Packer:
    """Makes values ready for JSON, and keeps the arrays and variables among them apart."""

    def __init__(self) -> None:
        self._variables: dict[int, tf.Variable] = {}
        self._bytes = bytearray()

    @property
    def tensors(self) -> dict[str, Any]:
        """The variables by number, and all arrays in one, since each tensor of a checkpoint costs time."""
        variables = {f"variable_{number}": variable for number, variable in enumerate(self._variables.values())}
        return variables | {"arrays": np.frombuffer(self._bytes, np.uint8)}

    def pack(self, value: Any) -> Any:
        """Returns what stands for a value; raises `TypeError` for one that is not plain data."""
        if isinstance(value, np.generic):
            value = value.item() if value.dtype.kind in "biuf" else np.asarray(value)
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            return value
        if type(value) in _SEQUENCES.values():
            items = [self.pack(item) for item in cast(Iterable[Any], value)]
            return {"kind": type(value).__name__, "items": items, "length": getattr(value, "maxlen", None)}
        if isinstance(value, dict):
            return {"kind": "dict", "items": [[self.pack(key), self.pack(item)] for key, item in value.items()]}
        if isinstance(value, StopReason):
            return {"kind": "reason", "name": value.name}
        if isinstance(value, np.random.Generator):
            return {"kind": "generator", "state": self.pack(value.bit_generator.state)}
        if isinstance(value, random.Random):
            return {"kind": "random", "state": self.pack(value.getstate())}
        value = tf_variable(value)
        if isinstance(value, tf.Variable):
            self._variables[id(value)] = value
            return {"kind": "variable", "name": f"variable_{list(self._variables).index(id(value))}"}
        if isinstance(value, (np.ndarray, tf.Tensor)) and _is_number(value.dtype):
            array, start = np.asarray(value), len(self._bytes)
            self._bytes += array.tobytes()
            place = {"start": start, "end": len(self._bytes)}
            return {"kind": "array", "dtype": tf.as_dtype(array.dtype).name, "shape": list(array.shape), **place}
        raise TypeError(describe(value))


def _is_number(dtype: Any) -> bool:
    try:
        dtype = tf.as_dtype(dtype)
    except TypeError:
        return False
    return dtype.is_numpy_compatible and dtype not in (tf.string, tf.resource, tf.variant)


def unpack(packed: Any, tensors: Mapping[str, np.ndarray], now: Any = None) -> Any:
    """Returns what `Packer.pack` was given.

    Args:
        packed: what stands for the value.
        tensors: the values of `Packer.tensors`.
        now: the value that is there; a container or generator gets the contents of the packed one, so that
            whoever else holds it sees them too.
    """
    if not isinstance(packed, dict):
        return packed
    kind = packed["kind"]
    if kind == "variable":
        tf_variable(now).assign(tensors[packed["name"]])
        return now
    if kind == "array":
        part = tensors["arrays"][packed["start"] : packed["end"]].tobytes()  # aligned, unlike the part itself
        return np.frombuffer(bytearray(part), tf.as_dtype(packed["dtype"]).as_numpy_dtype).reshape(packed["shape"])
    if kind == "reason":
        return StopReason[packed["name"]]
    if kind == "generator":
        generator = now if isinstance(now, np.random.Generator) else np.random.default_rng()
        generator.bit_generator.state = unpack(packed["state"], tensors)
        return generator
    if kind == "random":
        generator = now if isinstance(now, random.Random) else random.Random()
        generator.setstate(unpack(packed["state"], tensors))
        return generator
    if kind == "dict":
        place: Any = now if isinstance(now, dict) else {}
        pairs = [(unpack(key, tensors), item) for key, item in packed["items"]]
        items: Any = {key: unpack(item, tensors, place.get(key)) for key, item in pairs}
    else:
        like = list(now) if type(now).__name__ == kind else []
        like += [None] * len(packed["items"])
        items = [unpack(item, tensors, other) for item, other in zip(packed["items"], like, strict=False)]
        if kind == "tuple":
            return tuple(items)
        make = _SEQUENCES[kind]
        place = now if type(now) is make else make() if kind != "deque" else make(maxlen=packed["length"])
    place.clear()
    (place.update if kind in ("dict", "set") else place.extend)(items)
    return place


class Memory:
    """Everything of a run that outlives its process, but for how far it has come.

    Args:
        driver: what takes the steps.
        owners: the loop and the callbacks.
        data: describes the batches, ready for JSON.
        unsaved: what of the data cannot be saved, in words.
    """

    def __init__(self, driver: Driver, owners: Sequence[Any], data: Mapping[str, Any], unsaved: Sequence[str]) -> None:
        self._driver = driver
        self._owners = [_Owner(owner) for owner in owners]
        self._data = data
        self._unsaved = unsaved

    def take(self, progress: Mapping[str, Any], loss: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the plain data and the tensors of a checkpoint.

        Args:
            progress: how far the run has come.
            loss: by which the best checkpoint is told.
        """
        packer, groups = Packer(), self._groups()
        state = {
            "versions": _versions(),
            "identity": self._identity(groups),
            "loss": loss,
            "variables": packer.pack({name: list(group) for name, group in groups.items()}),
            "owners": [[owner.name, owner.pack(packer)] for owner in self._owners],
            "random": packer.pack(random_state()),
            "progress": packer.pack(progress),
        }
        return state, packer.tensors

    def unsaved(self) -> list[str]:
        """Returns what cannot be saved, in words."""
        body = self._driver.body
        found = [*self._unsaved, *(words for owner in self._owners for words in owner.unsaved())]
        drawing = {kind for step in self._driver.steps for kind in op_types(step) & DRAWING}
        if drawing:
            found.append(
                f"the state of {', '.join(sorted(drawing))} (draw with keras.random, or a tf.random.Generator)"
            )
        if not (body.updater.slots() or isinstance(body.updater.optimizer, keras.optimizers.Optimizer)):
            found.append(f"the state of {describe(body.updater.optimizer)}, which has no `variables`")
        return found

    def check(self, saved: Saved) -> None:
        """Raises unless a checkpoint is one of the same run; the sentence lists the differences."""
        here, there = self._identity(self._groups()), dict(saved.state["identity"])
        if saved.state["versions"] != _versions():
            there["objective"] = here["objective"]  # which another version may trace to other ops
        if not self._driver.steps:
            there["other variable"] = here["other variable"]  # which are known when the step has been traced
        names = [name for name in here if name == "optimizer" or not name.startswith("optimizer ")]
        if here["optimizer"] == there["optimizer"]:
            names = list(here)
        differences = [words for name in names for words in _differences(name, here[name], there.get(name))]
        if differences:
            raise ValueError(
                f"`resume_from` must hold a checkpoint of the same run, received {str(saved.path)!r}, which differs:"
                f" {'; '.join(differences)}."
            )

    def progress(self, saved: Saved) -> dict[str, Any]:
        """Returns how far the run had come."""
        return unpack(saved.state["progress"], saved.tensors)

    def before_begin(self, saved: Saved) -> None:
        """Tells the callbacks that write files that they go on with one."""
        for owner, _ in self._matches(saved):
            owner.before_begin()

    def restore(self, saved: Saved) -> None:
        """Puts back everything that `take` has saved."""
        self.check(saved)
        unpack(saved.state["variables"], saved.tensors, {name: list(group) for name, group in self._groups().items()})
        for owner, packed in self._matches(saved):
            owner.restore(packed, saved.tensors)
        set_random_state(unpack(saved.state["random"], saved.tensors))

    def _matches(self, saved: Saved) -> Iterable[tuple[_Owner, Any]]:
        left = list(saved.state["owners"])
        for owner in self._owners:
            match = next((item for item in left if item[0] == owner.name), None)
            if match:
                left.remove(match)
                yield owner, match[1]

    def _groups(self) -> dict[str, list[tf.Variable]]:
        """Returns all variables of the run, each in one group."""
        body, driver = self._driver.body, self._driver
        eager = not isinstance(driver, CompiledDriver)
        candidates = {
            "variable": body.variables,
            "optimizer variable": body.updater.slots(),
            "model variable": body.objective.variables,
            "variable of the step strategy": tf.nest.flatten(list(vars(body.step).values())),
            "best variable": [value for _, value in body.best],
            "other variable": _named_in(body.objective) if eager else driver.written,
        }
        groups: dict[str, list[tf.Variable]] = {}
        seen: set[int] = set()
        for name, group in candidates.items():
            fresh = {id(v): v for v in map(tf_variable, group) if isinstance(v, tf.Variable) and id(v) not in seen}
            groups[name] = list(fresh.values())
            seen |= fresh.keys()
        return groups

    def _identity(self, groups: Mapping[str, Sequence[tf.Variable]]) -> dict[str, Any]:
        """Returns what makes a run the same one in another process, ready for JSON."""
        body = self._driver.body
        loss = self._driver.traced_loss
        identity = {
            "optimizer": type(body.updater.optimizer).__name__,
            **{f"optimizer {name}": value for name, value in _settings(body.updater.optimizer).items()},
            **{name: [_spec(variable) for variable in group] for name, group in groups.items()},
            "objective": None if loss is None else fingerprint(loss),
            **(body.objective.identity() if body.objective.needs_batch else {}),
            **self._data,
        }
        # Objects that have no configuration are told by their kind alone.
        return _lasting(json.loads(json.dumps(identity, default=lambda thing: type(thing).__name__, skipkeys=True)))


class _Owner:
    """The loop or a callback, with attributes of which some are its state.

    Its state is what it has, but for its arguments; an argument that the run has changed is state too.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self.name = type(owner).__name__
        self._arguments = {
            name: _digest_of(vars(owner)[name]) for name in argument_names(type(owner)) if name in vars(owner)
        }

    def _state(self) -> dict[str, Any]:
        owner = self._owner
        given = _GIVEN | set(getattr(owner, "_not_state", ()))
        attributes = {name: value for name, value in vars(owner).items() if name not in given}
        return {
            name: value
            for name, value in attributes.items()
            if not isinstance(value, (*_REFERENCES, *_SAVED_ELSEWHERE))
            and not (name in self._arguments and self._arguments[name] == _digest_of(value))
        }

    def unsaved(self) -> list[str]:
        """Returns what cannot be saved, in words."""
        if type(self._owner).__module__.partition(".")[0] in ("keras", "tapekit") or hasattr(self._owner, "get_state"):
            return []
        names = [name for name, value in self._state().items() if _digest_of(value) is None]
        return [f"{', '.join(names)} of {self.name}"] if names else []

    def pack(self, packer: Packer) -> Any:
        """Returns the state, ready for JSON."""
        owner = self._owner
        if hasattr(owner, "get_state"):
            return packer.pack({"get_state": owner.get_state()})
        state = {name: value for name, value in self._state().items() if _digest_of(value) is not None}
        if isinstance(owner, keras.callbacks.CSVLogger):
            file: Any = owner.csv_file
            file.flush()
            state["size"] = file.tell()
        return packer.pack(state)

    def before_begin(self) -> None:
        """Lets a file that the run goes on with not be emptied."""
        if isinstance(self._owner, (keras.callbacks.CSVLogger, JSONLinesLogger)):
            self._owner.append = True

    def restore(self, packed: Any, tensors: Mapping[str, np.ndarray]) -> None:
        """Sets the state."""
        owner = self._owner
        if hasattr(owner, "set_state"):
            owner.set_state(unpack(packed, tensors)["get_state"])
            return
        now = dict(vars(owner))
        state = unpack(packed, tensors, now)
        if isinstance(owner, keras.callbacks.CSVLogger):
            file: Any = owner.csv_file
            file.truncate(state["size"])
            file.seek(0, 2)
            state["append_header"] = not state.pop("size")
        for name, value in state.items():
            setattr(owner, name, value)


def _digest_of(value: Any) -> str | None:
    """Returns a checksum of plain data, or `None` for what is not."""
    packer = Packer()
    try:
        text = json.dumps(packer.pack(value))
    except TypeError:
        return None
    parts = [np.asarray(tensor).tobytes() for tensor in packer.tensors.values()]
    return hashlib.sha256(b"".join([text.encode(), *parts])).hexdigest()


def _versions() -> list[str]:
    return [tf.__version__, keras.__version__]


def _spec(variable: tf.Variable) -> list[Any]:
    return [variable_name(variable), list(variable.shape), tf.as_dtype(variable.dtype).name]


def _settings(optimizer: Any) -> dict[str, Any]:
    """Returns the settings of an optimizer that are not in its variables."""
    return _lasting(optimizer.get_config()) if isinstance(optimizer, keras.optimizers.Optimizer) else {}


def _lasting(config: Any) -> Any:
    """Returns a configuration without what may differ from one process, or one step, to the next."""
    if isinstance(config, list):
        return [_lasting(item) for item in config]
    if not isinstance(config, dict):
        return config
    varies = {"name"} | ({"learning_rate"} if isinstance(config.get("learning_rate"), (int, float)) else set())
    return {name: _lasting(value) for name, value in config.items() if name not in varies}


def _differences(name: str, here: Any, there: Any) -> list[str]:
    if here == there:
        return []
    if name == "objective":
        return ["the loss computes something else"]
    if not name.endswith(("variable", "strategy")) or there is None:
        return [f"{name} is {here}, saved was {there}"]
    if len(here) != len(there):
        return [f"there are {len(here)} of {name}, saved were {len(there)}"]
    # Names may be numbered on from one model to the next in a process, so they tell nothing by themselves.
    return [
        f"{name} {one[0]} has shape {tuple(one[1])} and dtype {one[2]}, saved was {other[0]} of shape"
        f" {tuple(other[1])} and dtype {other[2]}"
        for one, other in zip(here, there, strict=True)
        if one[1:] != other[1:]
    ]


def _named_in(objective: Any) -> list[Any]:
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
        else:
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
