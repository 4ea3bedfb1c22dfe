"""The records of a run: one row a step, kept in blocks of NumPy arrays rather than Python lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_TAIL_BYTES = 1 << 16


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
        row_bytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self._blocks: list[np.ndarray] = []
        self._tail = np.empty((max(1, _TAIL_BYTES // row_bytes), *shape), dtype)
        self._filled = 0

    def extend(self, values: np.ndarray, count: int) -> None:
        large = count > len(self._tail) // 2
        if large or count > len(self._tail) - self._filled:
            self._flush()
        if large:
            block = values[:count]
            self._blocks.append(block if 4 * count > 3 * len(values) else block.copy())
        else:
            self._tail[self._filled : self._filled + count] = values[:count]
            self._filled += count

    def _flush(self) -> None:
        if self._filled:
            self._blocks.append(self._tail[: self._filled].copy())
            self._filled = 0

    def array(self) -> np.ndarray:
        self._flush()
        if len(self._blocks) != 1:
            self._blocks = [np.concatenate([self._tail[:0], *self._blocks])]
        return self._blocks[0]


def row(columns: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the logs of one step: Python numbers for scalars, arrays for the rest."""
    return {name: value.item() if (value := values[index]).ndim == 0 else value for name, values in columns.items()}
