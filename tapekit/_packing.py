"""Packs the state of a run into two vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import tree


class Packing:
    """Packs scalars and arrays into two vectors, since each input and output of a compiled call costs microseconds.

    In each vector all scalars come before all arrays, so that a few ops do for any number of them: each op takes
    a millisecond to trace.
    """

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        leaves = tree.flatten(structure)
        self._scalars = {kind: [n for n, leaf in enumerate(leaves) if _is(leaf, kind, True)] for kind in _KINDS}
        self._arrays = {kind: [n for n, leaf in enumerate(leaves) if _is(leaf, kind, False)] for kind in _KINDS}
        self._slots: dict[int, Slot] = {}
        for kind in _KINDS:
            end = 0
            for n in self._scalars[kind] + self._arrays[kind]:
                start, end = end, end + leaves[n].size
                self._slots[n] = Slot(kind, slice(start, end), leaves[n].shape, leaves[n].dtype)
        self.initial = self.pack_numbers(structure)

    def pack(self, leaves: Sequence[Any]) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns, inside a graph, the integers and bools of a flat structure in one vector, its floats in another."""
        packed = []
        for kind, dtype in _KINDS.items():
            scalars = [tf.cast(leaves[n], dtype) for n in self._scalars[kind]]
            arrays = [tf.reshape(tf.cast(leaves[n], dtype), [-1]) for n in self._arrays[kind]]
            parts = [tf.stack(scalars) if scalars else tf.zeros([0], dtype), *arrays]
            packed.append(tf.concat(parts, 0) if arrays else parts[0])
        return packed[0], packed[1]

    def pack_numbers(self, structure: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the same of a structure on the host."""
        leaves, packed = tree.flatten(structure), []
        for kind, dtype in _KINDS.items():
            parts = [np.ravel(leaves[n]) for n in self._scalars[kind] + self._arrays[kind]]
            packed.append(tf.constant(np.concatenate(parts) if parts else [], dtype))
        return packed[0], packed[1]

    def unpack(self, integers: Any, floats: Any) -> Any:
        """Returns the structure inside a graph: its leaves have their shapes and dtypes again."""
        leaves: dict[int, Any] = {}
        for kind, vector in zip(_KINDS, (integers, floats), strict=True):
            scalars = self._scalars[kind]
            parts = tf.unstack(vector[: len(scalars)] if self._arrays[kind] else vector, len(scalars))
            leaves |= {n: _cast(part, self._slots[n]) for n, part in zip(scalars, parts, strict=True)}
            for n in self._arrays[kind]:
                slot = self._slots[n]
                leaves[n] = _cast(tf.reshape(vector[slot.place], slot.shape), slot)
        return self._structured([leaves[n] for n in range(len(leaves))])

    def read(self, integers: np.ndarray, floats: np.ndarray) -> Any:
        """Returns the structure on the host: Python numbers, and arrays."""
        leaves: list[Any] = []
        for n in range(len(self._slots)):
            slot = self._slots[n]
            vector = floats if slot.kind == "f" else integers
            if slot.shape:
                leaves.append(vector[slot.place].reshape(slot.shape).astype(slot.dtype))
            else:
                value = vector.item(slot.place.start)
                leaves.append(bool(value) if slot.dtype.kind == "b" else value)
        return self._structured(leaves)

    def _structured(self, leaves: list[Any]) -> Any:
        return tree.pack_sequence_as(self.structure, leaves)


_KINDS = {"i": tf.int64, "f": tf.float64}
"""The dtype of each vector: the one of integers and bools, and the one of floats."""


class Slot(NamedTuple):
    """Where a leaf lies in its vector, and what it was."""

    kind: str
    place: slice
    shape: tuple[int, ...]
    dtype: np.dtype


def _is(leaf: np.ndarray, kind: str, is_scalar: bool) -> bool:
    return ("f" if leaf.dtype.kind == "f" else "i") == kind and (not leaf.shape) == is_scalar


def _cast(tensor: Any, slot: Slot) -> Any:
    return tensor if tensor.dtype == slot.dtype else tf.cast(tensor, slot.dtype)


def number(array: Any) -> Any:
    """Returns a scalar array as a Python number, and others as they are."""
    return array.item() if np.ndim(array) == 0 else array
