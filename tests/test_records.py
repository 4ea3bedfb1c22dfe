"""The records of a run: exact values, exact dtypes, and eight bytes a scalar."""

import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit._records import Records, row

COLUMNS = {
    "loss": ((), np.float64),
    "single": ((), np.float32),
    "half": ((), np.float16),
    "count": ((), np.int64),
    "flag": ((), np.bool_),
    "vector": ((3,), np.float64),
    "matrix": ((2, 2), np.float32),
    "nothing": ((0,), np.float64),
}


def column(name, first, count):
    """Rows whose every entry says which one it is, over the range of the dtype."""
    shape, dtype = COLUMNS[name]
    size = int(np.prod(shape))
    entries = np.arange(first * size, (first + count) * size) * np.float64(1.1)
    if dtype is np.bool_:
        return (entries.astype(int) % 3 == 0).reshape(count, *shape)
    return np.remainder(entries, 60_000 if dtype is np.float16 else 1 << 62).astype(dtype).reshape(count, *shape)


def record(chunks):
    """Records chunks of the given sizes; a chunk has room for more rows than are taken of it."""
    records = Records()
    for count, room in chunks:
        rows = {name: column(name, records.count, count) for name in COLUMNS}
        unused = {name: np.ones((room - count, *shape), dtype) for name, (shape, dtype) in COLUMNS.items()}
        records.extend({name: np.concatenate([rows[name], unused[name]]) for name in COLUMNS}, count)
    return records


CHUNKS = {
    "none": [(0, 7)],
    "none of the rows of a chunk": [(0, 7), (3, 7)],
    "ones": [(1, 1)] * 300,
    "ones with room for more": [(1, 256)] * 300,
    "sevens": [(7, 7)] * 1300,
    "more than half of what is kept back, on a part of it": [(7, 7), (5000, 5000), (1, 1)],
    "larger and larger": [(1, 1), (7, 7), (5000, 5000), (131_072, 131_072)],
    "smaller and smaller": [(131_072, 131_072), (5000, 5000), (7, 7), (1, 1)],
    "mixed": [(1, 256), (5000, 5120), (7, 256), (7, 7), (131_072, 131_072), (1, 1), (5000, 131_072), (1, 256)] * 2,
    "around the edge": [(4095, 4096), (4096, 4096), (4097, 4097), (1, 1), (8191, 8192), (8192, 8192), (8193, 8193)],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_records_keep_exact_values_and_dtypes_in_order_over_chunks_of_any_size(chunks):
    total = sum(count for count, _ in chunks)
    records = record(chunks)
    arrays = records.arrays()
    assert records.count == total
    assert arrays.keys() == COLUMNS.keys()
    for name, (_, dtype) in COLUMNS.items():
        assert arrays[name].dtype == dtype
        np.testing.assert_array_equal(arrays[name], column(name, 0, total), strict=True)


def test_chunks_of_random_sizes_are_kept_in_order():
    sizes = np.random.default_rng(0).choice([1, 7, 300, 5000, 9000], 200)
    records = Records()
    for size in sizes:
        records.extend({"n": np.arange(records.count, records.count + size)}, size)
    np.testing.assert_array_equal(records.arrays()["n"], np.arange(sizes.sum()))


@pytest.mark.parametrize("size", [1, 7, 5000, 131_072])
def test_records_go_on_after_they_have_been_read(size):
    records = record([(size, size)])
    first = records.arrays()["loss"].copy()
    for _ in range(2):
        records.extend({name: column(name, records.count, 7) for name in COLUMNS}, 7)
        records.arrays()
    np.testing.assert_array_equal(records.arrays()["loss"], column("loss", 0, size + 14))
    np.testing.assert_array_equal(first, column("loss", 0, size))


def test_values_that_are_not_finite_are_kept():
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324])
    records = Records()
    records.extend({"loss": values}, 5)
    assert records.arrays()["loss"].tobytes() == values.tobytes()


def test_rows_that_are_large_are_kept_one_by_one():
    records = Records()
    images = np.random.default_rng(0).normal(size=(5, 100, 200))
    for image in images:
        records.extend({"image": image[None]}, 1)
    np.testing.assert_array_equal(records.arrays()["image"], images)


def test_small_chunks_do_not_change_with_the_array_that_they_came_in():
    records, buffer = Records(), np.zeros(1)
    for value in range(3):
        buffer[:] = value
        records.extend({"loss": buffer}, 1)
    assert records.arrays()["loss"].tolist() == [0.0, 1.0, 2.0]


def test_no_records_are_no_arrays():
    assert Records().arrays() == {}


def allocated(action):
    tracemalloc.start()
    try:
        kept = action()
        return kept, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("size", "room", "rows"), [(1, 256, 50_000), (7, 256, 200_000), (5000, 131_072, 1_000_000)])
def test_a_recorded_scalar_costs_eight_bytes(size, room, rows):
    """A Python list would cost four times as much; a view would keep the room of the whole chunk."""
    values = np.arange(float(room))

    def fill():
        records = Records()
        while records.count < rows:
            records.extend({"loss": values.copy()}, size)
        return records

    records, cost = allocated(fill)
    assert cost < 8 * records.count + 200_000
    assert records.arrays()["loss"].nbytes == 8 * records.count


def test_the_history_of_a_million_steps_costs_eight_bytes_a_scalar():
    x = tf.Variable([0.0, 0.0], dtype=tf.float64)
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(1e-6), max_iterations=1_000_000, measures={"x": lambda: x}, jit_compile=True
    )
    result, cost = allocated(lambda: loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x]))
    assert {name: (values.shape, values.dtype, values.nbytes) for name, values in result.history.items()} == {
        "loss": ((1_000_000,), np.float64, 8_000_000),
        "x": ((1_000_000, 2), np.float64, 16_000_000),
    }
    assert cost < 24_000_000 + 8_000_000
    assert result.history["loss"][0] == 32.0
    np.testing.assert_array_equal(result.history["x"][-1], x.numpy())
    distance = ((result.history["x"][:-1] - 4) ** 2).sum(1)
    np.testing.assert_allclose(result.history["loss"][1:], distance, rtol=1e-12)


def test_a_row_is_python_numbers_for_scalars_and_arrays_for_the_rest():
    logs = row({name: column(name, 0, 5) for name in COLUMNS}, 3)
    kinds = {"loss": float, "single": float, "half": float, "count": int, "flag": bool}
    assert {name: type(logs[name]) for name in kinds} == kinds
    assert logs["loss"] == column("loss", 3, 1)[0]
    np.testing.assert_array_equal(logs["matrix"], column("matrix", 3, 1)[0], strict=True)
