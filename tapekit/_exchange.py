"""Results in files, and in the forms of other packages."""

from __future__ import annotations

import contextlib
import html
import importlib
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

_FORMAT = "tapekit result 1"


def write(path: Any, fields: Mapping[str, Any]) -> None:
    """Writes the fields of a result to a file, aside first, so that there is never half of one.

    Args:
        path: the file.
        fields: numbers, strings, arrays, and lists, tuples and dicts of them.
    """
    path = pathlib.Path(path)
    arrays: list[np.ndarray] = []
    text = json.dumps({"format": _FORMAT, "fields": _pack(dict(fields), arrays)})
    aside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        with aside.open("wb") as file:
            np.savez(
                file, allow_pickle=False, json=np.asarray(text), **{str(n): array for n, array in enumerate(arrays)}
            )
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read(path: Any) -> dict[str, Any]:
    """Returns the fields that `write` has written.

    Raises:
        ValueError: the file is not one that `write` has written.
    """
    with contextlib.suppress(zipfile.BadZipFile, KeyError, ValueError, EOFError), np.load(path) as file:
        content = json.loads(str(file["json"]))
        if content.get("format") == _FORMAT:
            return _unpack(content["fields"], file)
    raise ValueError(f"`path` must be a file that OptimizationResult.save has written, received {os.fspath(path)!r}.")


def _pack(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, arrays)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_pack(item, arrays) for item in value]}
    if isinstance(value, (np.ndarray, np.generic)):
        array, dtype = np.asarray(value), None
        if array.dtype.hasobject:
            raise TypeError(f"`path` takes arrays of numbers, received one of dtype {array.dtype}.")
        if array.dtype.kind == "V":  # bfloat16, which npz does not know
            array, dtype = np.frombuffer(array.tobytes(), np.uint8), tf.as_dtype(array.dtype).name
        arrays.append(array)
        return {"array": len(arrays) - 1, "dtype": dtype, "shape": np.shape(value)}
    return value


def _unpack(packed: Any, file: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(packed, dict):
        return packed
    if "dict" in packed:
        return {key: _unpack(item, file) for key, item in packed["dict"]}
    if "array" in packed:
        array = file[str(packed["array"])]
        if packed["dtype"] is None:
            return array
        return np.frombuffer(array.tobytes(), tf.as_dtype(packed["dtype"]).as_numpy_dtype).reshape(packed["shape"])
    (kind, items), *_ = packed.items()
    return {"list": list, "tuple": tuple}[kind](_unpack(item, file) for item in items)


def columns(history: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a history as columns of scalars: entries of arrays are named like "x[0]" or "x[0, 1]"."""
    found: dict[str, np.ndarray] = {}
    for name, values in history.items():
        if values.ndim == 1:
            found[name] = values
        else:
            for place in np.ndindex(values.shape[1:]):
                found[f"{name}[{', '.join(map(str, place))}]"] = values[(slice(None), *place)]
    return found


def package(name: str, method: str, extra: str) -> Any:
    """Returns a package that is not installed with tapekit, or raises with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f'{method} needs {package}, which is not installed: pip install "tapekit[{extra}]".'
        ) from error


def as_html(title: str, rows: Mapping[str, str]) -> str:
    """Returns a table for a notebook."""
    lines = [
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left"><pre style="margin:0">{html.escape(text)}</pre></td></tr>'
        for name, text in rows.items()
    ]
    return f"<p>{html.escape(title)}</p><table>{''.join(lines)}</table>"
