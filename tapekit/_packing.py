"""Packs the state of a run into two vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import tree


class Packing:
    """Packs scalars and arrays into two vectors, since each input and output of a compiled call costs microseconds."""

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self._slots: list[Slot] = []
        filled = {True: 0, False: 0}
        for leaf in tree.flatten(structure):
            is_float = leaf.dtype.kind == "f"
            end = filled[is_float] + leaf.size
            self._slots.append(Slot(is_float, slice(filled[is_float], end), leaf.shape, leaf.dtype))
            filled[is_float] = end
        self.initial = self.pack(tree.flatten(structure))

    def pack(self, leaves: Sequence[Any]) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the integers and bools of a flat structure in one vector, and its floats in another."""
        parts: dict[bool, list[Any]] = {True: [], False: []}
        for slot, leaf in zip(self._slots, leaves, strict=True):
            dtype = tf.float64 if slot.is_float else tf.int64
            parts[slot.is_float].append(tf.reshape(tf.cast(leaf, dtype), [-1]))
        return tf.concat(parts[False], 0), tf.concat(parts[True], 0)

    def unpack(self, integers: Any, floats: Any, restore: Callable[[Any, Slot], Any]) -> Any:
        """Returns the structure; `restore` gives each part its shape and dtype again."""
        leaves = [restore((floats if slot.is_float else integers)[slot.place], slot) for slot in self._slots]
        return tree.pack_sequence_as(self.structure, leaves)


class Slot(NamedTuple):
    """Where a leaf lies in its vector, and what it was."""

    is_float: bool
    place: slice
    shape: tuple[int, ...]
    dtype: np.dtype


def as_tensor(part: Any, slot: Slot) -> Any:
    """Returns a leaf inside a graph."""
    return tf.cast(tf.reshape(part, slot.shape), slot.dtype)


def as_numbers(part: Any, slot: Slot) -> Any:
    """Returns a leaf on the host, a Python number or an array."""
    return number(part.reshape(slot.shape).astype(slot.dtype))


def number(array: Any) -> Any:
    """Returns a scalar array as a Python number, and others as they are."""
    return array.item() if np.ndim(array) == 0 else array
