"""Configuration and plugins, Keras's way: `get_config`, `from_config`, and objects by name."""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import keras

from tapekit._describe import describe

T = TypeVar("T", bound="Configurable")


class Configurable:
    """Gives `get_config`, `from_config` and equality to a class that keeps its arguments.

    The configuration is what `__init__` takes, read from the attributes of the same names. A class
    whose attributes have other names overrides `get_config`. Every subclass is registered with
    Keras's serialization under its package and name, so that it survives
    `keras.saving.serialize_keras_object` and JSON.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        package = cls.__module__.partition(".")[0]
        keras.saving.register_keras_serializable(package=package, name=cls.__name__)(cls)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that make an equal object, ready for JSON."""
        return {name: _serialize(getattr(self, name)) for name in _argument_names(type(self))}

    @classmethod
    def from_config(cls: type[T], config: dict[str, Any]) -> T:
        """Returns the object that `config`, a result of `get_config`, describes."""
        return cls(**{name: _deserialize(value) for name, value in config.items()})

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self is other or self.get_config() == cast(Configurable, other).get_config()

    def __hash__(self) -> int:
        return hash(type(self))


def _argument_names(cls: type) -> list[str]:
    """The arguments of `__init__`, those that it hands on through `**kwargs` included."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        named = (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        names += [name for name in named if name not in names]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _serialize(value: Any) -> Any:
    return keras.saving.serialize_keras_object(list(value) if isinstance(value, tuple) else value)


def _deserialize(value: Any) -> Any:
    if isinstance(value, list):
        return [_deserialize(item) for item in value]
    if isinstance(value, dict) and "class_name" not in value:
        return {key: _deserialize(item) for key, item in value.items()}
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value


class Registry(Generic[T]):
    """The classes of one kind that can be asked for by name: tapekit's own and those of plugins.

    Args:
        argument: the argument that takes such an object, as error messages call it.
        base: the class that every one of them extends.
        group: the entry-point group by which other packages add theirs.
        suffix: what a short name leaves out, as in "tape" for `TapeStep`.
    """

    def __init__(self, argument: str, base: type[T], group: str, suffix: str = "") -> None:
        self._argument = argument
        self._base = base
        self._group = group
        self._suffix = suffix
        self._classes: dict[str, Callable[..., Any]] = {}

    def add(self, *classes: type) -> None:
        """Makes `classes` known under their snake-case names."""
        self._classes |= {_snake(cls.__name__).removesuffix(self._suffix): cls for cls in classes}

    def get(self, identifier: Any) -> Any:
        """Returns the object that a name, a configuration or an object itself stands for."""
        if isinstance(identifier, self._base):
            return identifier
        if isinstance(identifier, str):
            return self._make(identifier, {})
        if isinstance(identifier, dict) and "class_name" in identifier:
            if "registered_name" in identifier:
                return self.get(keras.saving.deserialize_keras_object(identifier))
            return self._make(identifier["class_name"], identifier.get("config") or {})
        hint = ""
        if inspect.isclass(identifier) and issubclass(identifier, self._base):
            hint = f": write {identifier.__name__}() to make an instance"
        raise TypeError(
            f"`{self._argument}` must be a {self._base.__name__}, its name or its configuration,"
            f" received {describe(identifier)}{hint}."
        )

    def _make(self, name: str, config: dict[str, Any]) -> Any:
        cls = self._find(name)
        try:
            inspect.signature(cls).bind(**config)
        except TypeError as error:
            raise TypeError(
                f"`{self._argument}` {name!r} needs other arguments ({error}): give"
                f' {{"class_name": {name!r}, "config": {{...}}}} for {cls.__name__}{inspect.signature(cls)}.'
            ) from None
        make = getattr(cls, "from_config", None)
        return make(config) if make else cls(**config)

    def _find(self, name: str) -> Any:
        key = _snake(name.rpartition(">")[2]).removesuffix(self._suffix)
        if key in self._classes:
            return self._classes[key]
        plugins = {point.name: point for point in importlib.metadata.entry_points(group=self._group)}
        for plugin in plugins.values():
            if _snake(plugin.name).removesuffix(self._suffix) == key:
                return plugin.load()
        known = sorted([*self._classes, *plugins])
        close = difflib.get_close_matches(key, known, n=1)
        raise ValueError(
            f"`{self._argument}` {name!r} is not known"
            + (f", the closest is {close[0]!r}" if close else "")
            + f"; the known names are {', '.join(known)}."
        )


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
