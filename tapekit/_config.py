"""Configuration and plugins, Keras's way: `get_config`, `from_config`, and objects by name."""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

import keras
import numpy as np

from tapekit._describe import describe

T = TypeVar("T", bound="Configurable")


class Configurable:
    """Gives `get_config`, `from_config` and equality to a class that keeps its arguments.

    The configuration is what `__init__` takes, read from the attributes of the same names. A class
    whose attributes have other names overrides `get_config`. Every subclass is registered with
    Keras's serialization under its module and name, so that it survives
    `keras.saving.serialize_keras_object` and JSON.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        top = cls.__module__.partition(".")[0]
        package = top if top == __package__ else cls.__module__  # two modules may use one name, tapekit does not
        keras.saving.register_keras_serializable(package=package, name=cls.__name__)(cls)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that make an equal object, ready for JSON.

        Raises:
            TypeError: an argument is not kept as an attribute of its name.

        Example:
            >>> import tapekit as tk
            >>> tk.callbacks.ClipGradients(norm=2.0).get_config()
            {'value': None, 'norm': 2.0, 'global_norm': None, 'log': 'unclipped_norm'}
        """
        return {name: _serialize(value) for name, value in self._arguments().items()}

    @classmethod
    def from_config(cls: type[T], config: dict[str, Any]) -> T:
        """Returns the object that a configuration describes.

        Args:
            config: a result of `get_config`, or what JSON has made of it.

        Raises:
            TypeError: `config` has other names than the class has arguments, or a value of the wrong kind.
            ValueError: a value is wrong.

        Example:
            >>> import tapekit as tk
            >>> clip = tk.callbacks.ClipGradients(norm=2.0)
            >>> tk.callbacks.ClipGradients.from_config(clip.get_config()) == clip
            True
        """
        return cls(**{name: _deserialize(value) for name, value in config.items()})

    def _arguments(self) -> dict[str, Any]:
        names = argument_names(type(self))
        for name in names:
            if not hasattr(self, name):
                raise TypeError(
                    f"{type(self).__name__} must keep its argument `{name}` as an attribute of that name"
                    " or override get_config, to be configured and compared."
                )
        return {name: getattr(self, name) for name in names}

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other):
            return NotImplemented
        same = cast(Configurable, other)
        if type(self).get_config is Configurable.get_config:
            return _equal(self._arguments(), same._arguments())
        return _equal(self.get_config(), same.get_config())

    def __hash__(self) -> int:
        return hash(type(self))


def argument_names(cls: type) -> list[str]:
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


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):  # JSON gives lists for tuples
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Configurable):
        return one == other
    if type(one) is type(other) and hasattr(one, "get_config"):  # Keras's objects have no equality of their own
        return one is other or _equal(one.get_config(), other.get_config())
    return one is other or bool(np.array_equal(cast(Any, one), other))


def _serialize(value: Any) -> Any:
    return keras.saving.serialize_keras_object(list(value) if isinstance(value, tuple) else value)


def _deserialize(value: Any) -> Any:
    if isinstance(value, list):
        return [_deserialize(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_name" not in value:
        return {key: _deserialize(item) for key, item in value.items()}
    if "module" not in value and not str(value["class_name"]).startswith("__"):
        return value  # written by hand: the `get` of its kind knows it
    _registered(value.get("registered_name"), value.get("module"))
    structure = keras.tree.map_structure(lambda leaf: leaf, value)  # a copy, since some Keras classes empty theirs
    return keras.saving.deserialize_keras_object(structure)


_groups: list[str] = []


def _registered(name: str | None, module: str | None) -> Any:
    """Returns what Keras knows under a registered name, after a look at the plugin that `module` belongs to."""
    if not name:
        return None
    if module and keras.saving.get_registered_object(name) is None:
        for point in (point for group in _groups for point in importlib.metadata.entry_points(group=group)):
            if point.module.partition(".")[0] == module.partition(".")[0]:
                point.load()
    return keras.saving.get_registered_object(name)


class Registry:
    """The classes of one kind that can be asked for by name: tapekit's own and those of plugins.

    Args:
        argument: the argument that takes such an object, as error messages call it.
        base: the class that every one of them extends.
        group: the entry-point group by which other packages add theirs.
        suffix: what a short name leaves out, as in "tape" for `TapeStep`.
    """

    def __init__(self, argument: str, base: type, group: str, suffix: str = "") -> None:
        self._argument = argument
        self._right = f"`{argument}` must be a {base.__name__}, its name or its configuration"
        self._base = base
        self._group = group
        self._suffix = suffix
        self._classes: dict[str, Callable[..., Any]] = {}
        _groups.append(group)

    def add(self, *classes: type) -> None:
        """Makes `classes` known under their snake-case names."""
        self._classes |= {_snake(cls.__name__).removesuffix(self._suffix): cls for cls in classes}

    def get(self, identifier: Any) -> Any:
        """Returns the object that a name, a configuration or an object itself stands for."""
        if isinstance(identifier, self._base):
            return identifier
        if isinstance(identifier, str):
            identifier = {"class_name": identifier}
        if isinstance(identifier, dict) and isinstance(name := identifier.get("class_name"), str):
            cls = _registered(identifier.get("registered_name") or name, identifier.get("module")) or self._find(name)
            made = self._make(cls, name, identifier.get("config") or {})
            if isinstance(made, self._base):
                return made
            raise TypeError(f"{self._right}, received {describe(made)} by the name {name!r}.")
        hint = ""
        if inspect.isclass(identifier) and issubclass(identifier, self._base):
            hint = f": write {identifier.__name__}(...) to make an instance"
        raise TypeError(f"{self._right}, received {describe(identifier)}{hint}.")

    def _make(self, cls: Any, name: str, config: Any) -> Any:
        make = getattr(cls, "from_config", None)
        if getattr(make, "__func__", None) in (None, Configurable.from_config.__func__):
            signature = inspect.signature(cls)
            try:
                signature.bind(**config)
            except TypeError as error:
                shown = signature.replace(
                    parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
                    return_annotation=signature.empty,
                )
                raise TypeError(
                    f"`{self._argument}` {name!r} needs other arguments ({error}): give"
                    f' {{"class_name": "{name}", "config": {{...}}}} for {cls.__name__}{shown}.'
                ) from None
        return make(config) if make else cls(**config)

    def _find(self, name: str) -> Any:
        key = _snake(name).removesuffix(self._suffix)
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
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][A-Za-z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
