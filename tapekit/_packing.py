"""Packs the state of a run into a few tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import tree


class Packing:
    """Packs the state of a run, since each input and output of a compiled call costs microseconds.

    Its floats are one vector everywhere, since each number that goes round in a loop is a kernel to XLA. Its integers
    and bools are one vector outside of a loop, after some of the caller's own, and go round one by one: XLA makes one
    counter of all that count steps. In each vector all scalars come before all arrays, so that a few ops do for any
    number of them: each op takes a millisecond to trace.

    Args:
        structure: the state, of NumPy arrays.
        header: how many integers of the caller come before the others.
    """

    def __init__(self, structure: Any, header: int) -> None:
        self.structure = structure
        self._header = header
        leaves = tree.flatten(structure)
        self._slots: dict[int, Slot] = {}
        self._order: dict[str, list[int]] = {}
        for kind, end in (("i", header), ("f", 0)):
            of_kind = [n for n, leaf in enumerate(leaves) if (leaf.dtype.kind == "f") == (kind == "f")]
            self._order[kind] = sorted(of_kind, key=lambda n: leaves[n].ndim > 0)
            for n in self._order[kind]:
                start, end = end, end + leaves[n].size
                self._slots[n] = Slot(kind, slice(start, end), leaves[n].shape, leaves[n].dtype)
        self.initial = self.pack_numbers(structure)

    @property
    def specs(self) -> tuple[list[tf.TensorSpec], tf.TensorSpec]:
        """What `split` returns."""
        integers = [self._slots[n] for n in self._order["i"]]
        floats = tf.TensorSpec(self.initial[1].shape, tf.float64)
        return [tf.TensorSpec(slot.shape, slot.dtype) for slot in integers], floats

    def split(self, structure: Any) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Returns, inside a graph, the integers and bools of a structure, and its floats in one vector."""
        leaves = tree.flatten(structure)
        return [leaves[n] for n in self._order["i"]], self._join("f", [leaves[n] for n in self._order["f"]])

    def merge(self, integers: Sequence[Any], floats: Any) -> Any:
        """Returns the structure that was split, whose leaves have their shapes and dtypes again."""
        leaves = [*integers, *self._parts("f", floats, 0)]
        places = dict(zip(self._order["i"] + self._order["f"], leaves, strict=True))
        return _refilled(self.structure, iter([places[n] for n in range(len(places))]))

    def pack(self, integers: Sequence[Any]) -> tf.Tensor:
        """Returns, inside a graph, the vector of the caller's integers and those that `split` gives."""
        return self._join("i", integers)

    def unpack(self, integers: Any) -> list[tf.Tensor]:
        """Returns, inside a graph, the integers that `split` gave."""
        return self._parts("i", integers, self._header)

    def _join(self, kind: str, parts: Sequence[Any]) -> tf.Tensor:
        parts = [tf.cast(part, _KINDS[kind]) for part in parts]
        scalars = [part for part in parts if not part.shape.rank]
        vectors = [tf.reshape(part, [-1]) for part in parts[len(scalars) :]]
        head = tf.stack(scalars) if scalars else tf.zeros([0], _KINDS[kind])
        return tf.concat([head, *vectors], 0) if vectors else head

    def _parts(self, kind: str, vector: Any, header: int) -> list[tf.Tensor]:
        slots = [self._slots[n] for n in self._order[kind]]
        count = header + sum(not slot.shape for slot in slots)
        scalars = tf.unstack(vector[:count] if len(slots) > count - header else vector, count)[header:]
        arrays = [tf.reshape(vector[slot.place], slot.shape) for slot in slots[len(scalars) :]]
        return [_cast(part, slot.dtype) for part, slot in zip([*scalars, *arrays], slots, strict=True)]

    def pack_numbers(self, structure: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns both vectors of a structure on the host, with zeros for the caller's integers."""
        leaves = tree.flatten(structure)
        parts = {kind: [np.ravel(leaves[n]) for n in order] for kind, order in self._order.items()}
        integers, floats = [np.zeros(self._header, np.int64), *parts["i"]], [np.zeros(0), *parts["f"]]
        return tf.constant(np.concatenate(integers), tf.int64), tf.constant(np.concatenate(floats), tf.float64)

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
        return _refilled(self.structure, iter(leaves))


_KINDS = {"i": tf.int64, "f": tf.float64}
"""The dtype of each vector: the one of integers and bools, and the one of floats."""


class Slot(NamedTuple):
    """Where a leaf lies in its vector, and what it was."""

    kind: str
    place: slice
    shape: tuple[int, ...]
    dtype: np.dtype


def _cast(tensor: Any, dtype: np.dtype) -> Any:
    return tensor if tensor.dtype == dtype else tf.cast(tensor, dtype)


def _refilled(structure: Any, leaves: Iterator[Any]) -> Any:
    """Returns a structure with the next leaves, as `tree.pack_sequence_as` does, which a short run would notice."""
    if isinstance(structure, np.ndarray):
        return next(leaves)
    if isinstance(structure, (tuple, list)):
        parts = [_refilled(part, leaves) for part in structure]
        return type(structure)(*parts) if hasattr(structure, "_fields") else type(structure)(parts)
    return tree.pack_sequence_as(structure, [next(leaves) for _ in tree.flatten(structure)])


def number(array: Any) -> Any:
    """Returns a scalar array as a Python number, and others as they are."""
    return array.item() if np.ndim(array) == 0 else array
