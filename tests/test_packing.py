"""The state of a run in a few tensors: the same bits come out, on the host and in a graph."""

from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from keras import tree

from tapekit._packing import Packing

LARGE = (1 << 62) + 1  # a number that no float64 holds
STATE = {
    "window": np.array([[0.1, -2.0], [np.inf, 3.0]], np.float32),
    "count": np.asarray(LARGE),
    "seen": np.array([LARGE, 3]),
    "best": np.asarray(np.nextafter(1.0, 2.0)),
    "patience": np.asarray(7, np.int32),
    "waits": np.asarray(True),
    "nothing": np.zeros((0, 2)),
}


def check(found):
    tree.assert_same_structure(found, STATE)
    for name, value in STATE.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


@pytest.mark.parametrize("header", [0, 3])
def test_numbers_of_the_host_are_packed_and_read_again(header):
    packing = Packing(STATE, header)
    integers, floats = packing.pack_numbers(STATE)
    assert integers.numpy()[:header].tolist() == [0] * header
    check(packing.read(integers.numpy(), floats.numpy()))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_graph_unpacks_and_packs_the_same(jit_compile):
    packing, header = Packing(STATE, header=2), [11, 12]

    @tf.function(jit_compile=jit_compile)
    def through(integers, floats):
        state = packing.merge(packing.unpack(integers), floats)
        for name, value in STATE.items():
            assert state[name].dtype == value.dtype
            assert state[name].shape == value.shape
        whole, floats = packing.split(state)
        specs, spec = packing.specs
        assert [(part.shape, part.dtype) for part in whole] == [(part.shape, part.dtype) for part in specs]
        assert (floats.shape, floats.dtype) == (spec.shape, spec.dtype)
        return packing.pack([*map(tf.constant, header), *whole]), floats

    integers, floats = through(*packing.initial)
    assert integers.numpy()[:2].tolist() == header
    check(packing.read(integers.numpy(), floats.numpy()))


class Pair(NamedTuple):
    one: object
    other: object


def test_a_nested_state_comes_back_in_its_structure():
    structure = [(), Pair(np.asarray(1), [np.asarray(0.5), {"b": np.asarray(2), "a": (np.asarray(False),)}]), ((),)]
    packing = Packing(structure, header=1)
    found = packing.read(*(part.numpy() for part in packing.initial))
    assert found == [(), Pair(1, [0.5, {"b": 2, "a": (False,)}]), ((),)]
    assert type(found[1]) is Pair
