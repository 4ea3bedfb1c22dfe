"""Packs the state of a run into two vectors."""

from __future__ import annotations

from collections.abc import Sequence
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

    def unpack(self, integers: Any, floats: Any) -> Any:
        """Returns the structure inside a graph: its leaves have their shapes and dtypes again."""
        parts = [(floats if slot.is_float else integers)[slot.place] for slot in self._slots]
        pairs = zip(parts, self._slots, strict=True)
        return self._structured([tf.cast(tf.reshape(part, slot.shape), slot.dtype) for part, slot in pairs])

    def read(self, integers: np.ndarray, floats: np.ndarray) -> Any:
        """Returns the structure on the host: Python numbers, and arrays."""
        leaves: list[Any] = []
        for slot in self._slots:
            vector = floats if slot.is_float else integers
            if slot.shape:
                leaves.append(vector[slot.place].reshape(slot.shape).astype(slot.dtype))
            else:
                value = vector.item(slot.place.start)
                leaves.append(bool(value) if slot.dtype.kind == "b" else value)
        return self._structured(leaves)

    def _structured(self, leaves: list[Any]) -> Any:
        return tree.pack_sequence_as(self.structure, leaves)


class Slot(NamedTuple):
    """Where a leaf lies in its vector, and what it was."""

    is_float: bool
    place: slice
    shape: tuple[int, ...]
    dtype: np.dtype


def number(array: Any) -> Any:
    """Returns a scalar array as a Python number, and others as they are."""
    return array.item() if np.ndim(array) == 0 else array
