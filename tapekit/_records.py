"""The records of a run: one row a step, kept in blocks of NumPy arrays rather than Python lists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_FIRST_ROWS, _TAIL_BYTES = 1 << 5, 1 << 16


class Records:
    """Columns of equal length to which rows are added, a chunk of steps at a time."""

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}
        self.count = 0

    def extend(self, rows: Mapping[str, np.ndarray], count: int) -> None:
        """Adds the first `count` rows of each column."""
        for name, values in rows.items():
            if name not in self._columns:
                self._columns[name] = _Column(values.shape[1:], values.dtype)
            self._columns[name].extend(values, count)
        self.count += count

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns each column as one array of shape `(count, ...)`."""
        return {name: column.array() for name, column in self._columns.items()}


class _Column:
    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        row_bytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        self._most = max(1, _TAIL_BYTES // row_bytes)
        self._blocks: list[np.ndarray] = []
        self._tail = np.empty((min(_FIRST_ROWS, self._most), *shape), dtype)
        self._filled = 0

    def extend(self, values: np.ndarray, count: int) -> None:
        if count > min(len(self._tail) // 2, len(self._tail) - self._filled):
            self._flush()
            self._grow()
        if count > len(self._tail) // 2:
            block = values[:count]
            self._blocks.append(block if 4 * count > 3 * len(values) else block.copy())
        else:
            self._tail[self._filled : self._filled + count] = values[:count]
            self._filled += count

    def _flush(self) -> None:
        if self._filled:
            self._blocks.append(self._tail[: self._filled].copy())
            self._filled = 0

    def _grow(self) -> None:
        """Makes room for more rows together, as the run is a longer one."""
        if len(self._tail) < self._most:
            self._tail = np.empty((min(2 * len(self._tail), self._most), *self._tail.shape[1:]), self._tail.dtype)

    def array(self) -> np.ndarray:
        self._flush()
        if len(self._blocks) != 1:
            self._blocks = [np.concatenate([self._tail[:0], *self._blocks])]
        return self._blocks[0]


def row(columns: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the logs of one step: Python numbers for scalars, arrays for the rest."""
    return {name: value.item() if (value := values[index]).ndim == 0 else value for name, values in columns.items()}
