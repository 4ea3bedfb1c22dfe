"""A directory of checkpoints, each whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

logger = logging.getLogger("tapekit")

_NAME = re.compile(r"checkpoint-(\d{6,})-step-(\d+)")
_ASIDE = "writing-"
_STATE, _TENSORS = "state.json", "tensors"


class Saved(NamedTuple):
    """What a checkpoint holds."""

    state: dict[str, Any]
    """Plain data."""
    tensors: dict[str, np.ndarray]
    """Arrays, to which the plain data refers by name."""
    path: pathlib.Path


class DamagedError(Exception):
    """Says what is wrong with a checkpoint that is not whole."""


class Store:
    """The checkpoints in a directory.

    Each is a directory of its own: `tensors.*`, which `tf.train.Checkpoint` writes, and `state.json`, which begins
    with the checksum of what follows and holds those of the other files. It is written aside, read again, and renamed.

    Args:
        directory: where they are; made when the first is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = pathlib.Path(directory)
        self._losses: dict[str, float] = {}
        self._variables: dict[str, tf.Variable] = {}

    def paths(self) -> list[pathlib.Path]:
        """Returns the checkpoints, the newest first; they may be damaged."""
        return [path for _, path in self._numbered()]

    def _numbered(self) -> list[tuple[int, pathlib.Path]]:
        found = self.directory.glob("checkpoint-*") if self.directory.is_dir() else ()
        return sorted(((int(match[1]), path) for path in found if (match := _NAME.fullmatch(path.name))), reverse=True)

    def write(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Writes a checkpoint.

        Args:
            step: how many steps have been taken.
            state: plain data, ready for JSON; `"loss"` in it tells the best one.
            tensors: `tf.Variable`s and arrays.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        number = max((number for number, _ in self._numbered()), default=0) + 1
        path = self.directory / f"checkpoint-{number:06d}-step-{step}"
        aside = self.directory / f"{_ASIDE}{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            values = {name: self._variable(name, value) for name, value in tensors.items()}
            tf.train.Checkpoint(values=values).write(str(aside / _TENSORS))
            text = json.dumps({"state": state, "names": list(values), "sums": _sums(aside)})
            (aside / _STATE).write_text(f"{_sum(text.encode())}\n{text}", encoding="utf-8")
            for file in (*aside.iterdir(), aside):
                _flush(file)
            _check(aside)
            os.replace(aside, path)
            _flush(self.directory)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._losses[path.name] = state["loss"]

    def _variable(self, name: str, value: Any) -> tf.Variable:
        """Returns a variable with a value, the same one each time, since a new one costs a millisecond."""
        if isinstance(value, tf.Variable):
            return value
        if name not in self._variables:
            self._variables[name] = tf.Variable(value, trainable=False, shape=[None, *value.shape[1:]])
        self._variables[name].assign(value)
        return self._variables[name]

    def prune(self, keep: int, best: bool) -> None:
        """Deletes all but the newest ones, and the one with the lowest loss if that is wanted."""
        paths = self.paths()
        kept = set(paths[:keep])
        if best:
            losses = {path: loss for path in paths if (loss := self._loss(path)) == loss}
            kept |= {min(losses, key=lambda path: losses[path])} if losses else set()
        for path in (*(path for path in paths if path not in kept), *self.directory.glob(f"{_ASIDE}checkpoint-*")):
            (path / _STATE).unlink(missing_ok=True)  # first, so that half of a checkpoint is never taken for a whole
            shutil.rmtree(path)

    def _loss(self, path: pathlib.Path) -> float:
        if path.name not in self._losses:
            try:
                self._losses[path.name] = _content(path)["state"]["loss"]
            except DamagedError:
                self._losses[path.name] = float("nan")
        return self._losses[path.name]

    def newest(self) -> Saved | None:
        """Returns the newest checkpoint that is whole, or `None` if there are none.

        Raises:
            ValueError: there are some, and all are damaged.
        """
        reasons = []
        for path in self.paths():
            try:
                return read(path)
            except DamagedError as error:
                reasons.append(f"{path.name}: {error}")
                logger.warning("the checkpoint %s is damaged (%s): trying the one before.", path, error)
        if reasons:
            raise ValueError(
                f"`resume_from` must hold a whole checkpoint, received {str(self.directory)!r}, where all are damaged"
                f" ({'; '.join(reasons)})."
            )
        return None


def read(path: pathlib.Path) -> Saved:
    """Returns a checkpoint, or raises `DamagedError` if it is not the one that was written."""
    content = _check(path)
    reader: Any = tf.train.load_checkpoint(str(path / _TENSORS))
    names = {name: f"values/{name}/.ATTRIBUTES/VARIABLE_VALUE" for name in content["names"]}
    return Saved(content["state"], {name: reader.get_tensor(key) for name, key in names.items()}, path)


def _check(path: pathlib.Path) -> dict[str, Any]:
    """Returns the plain data of a checkpoint, or raises `DamagedError` if a file is not the one that was written."""
    content, sums = _content(path), _sums(path)
    for name, checksum in content["sums"].items():
        if sums.get(name) != checksum:
            raise DamagedError(f"{name} is {'not what was written' if name in sums else 'missing'}")
    return content


def _content(path: pathlib.Path) -> dict[str, Any]:
    try:
        checksum, _, text = (path / _STATE).read_bytes().partition(b"\n")
    except OSError as error:
        raise DamagedError(f"{_STATE} cannot be read") from error
    if _sum(text) != checksum.decode(errors="replace"):
        raise DamagedError(f"{_STATE} is not what was written")
    return json.loads(text)


def _sums(path: pathlib.Path) -> dict[str, str]:
    """Returns the checksums of the files of a checkpoint, but for the one that holds them."""
    return {file.name: _sum(file.read_bytes()) for file in sorted(path.iterdir()) if file.name != _STATE}


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flush(path: pathlib.Path) -> None:
    """Makes sure that a file or directory is on the disk; Windows cannot open a directory for that."""
    if os.name == "nt" and path.is_dir():
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
