"""A directory of checkpoints, each whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
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
    values: list[np.ndarray]
    """Arrays, to which the plain data refers by position."""
    path: pathlib.Path


class DamagedError(Exception):
    """Raised inside for a checkpoint that is not whole; the text says what is wrong."""


class Store:
    """The checkpoints in a directory.

    Each is a directory of its own: `tensors.*`, which `tf.train.Checkpoint` writes, and `state.json`, which begins
    with the checksum of what follows and has those of the other files. It is written aside, read again, and renamed.

    Args:
        directory: where they are; made when the first is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = pathlib.Path(directory)
        self._losses: dict[str, float] = {}

    def paths(self) -> list[pathlib.Path]:
        """Returns the checkpoints, the newest first; they may be damaged."""
        found = self.directory.glob("checkpoint-*") if self.directory.is_dir() else ()
        named = [(match, path) for path in found if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named, key=lambda pair: int(pair[0][1]), reverse=True)]

    def write(self, step: int, state: dict[str, Any], values: Sequence[Any]) -> pathlib.Path:
        """Writes a checkpoint.

        Args:
            step: how many steps have been taken.
            state: plain data, ready for JSON; `"loss"` in it tells the best one.
            values: `tf.Variable`s and arrays.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        number = max((int(_NAME.fullmatch(path.name)[1]) for path in self.paths()), default=0) + 1  # pyright: ignore[reportOptionalSubscript]
        path = self.directory / f"checkpoint-{number:06d}-step-{step}"
        aside = self.directory / f"{_ASIDE}{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            variables = [v if isinstance(v, tf.Variable) else tf.Variable(v, trainable=False) for v in values]
            tf.train.Checkpoint(values=variables).write(str(aside / _TENSORS))
            content = {"state": state, "count": len(variables), "sums": _sums(aside)}
            text = json.dumps(content)
            (aside / _STATE).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
            for file in (*aside.iterdir(), aside):
                _flush(file)
            read(aside)
            os.replace(aside, path)
            _flush(self.directory)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._losses[path.name] = state["loss"]
        return path

    def prune(self, keep: int, best: bool) -> None:
        """Deletes all but the newest ones, and the one with the lowest loss if that is wanted."""
        paths = self.paths()
        kept = set(paths[:keep])
        if best:
            losses = {path: loss for path in paths if (loss := self._loss(path)) == loss}
            kept |= {min(losses, key=lambda path: losses[path])} if losses else set()
        leftovers = self.directory.glob(f"{_ASIDE}checkpoint-*")
        for path in [*(path for path in paths if path not in kept), *leftovers]:
            (path / _STATE).unlink(missing_ok=True)  # first, so that half of a checkpoint is never taken for a whole
            shutil.rmtree(path, ignore_errors=True)

    def _loss(self, path: pathlib.Path) -> float:
        if path.name not in self._losses:
            try:
                self._losses[path.name] = _content(path)["state"]["loss"]
            except DamagedError:
                self._losses[path.name] = float("nan")
        return self._losses[path.name]

    def newest(self) -> Saved | None:
        """Returns the newest checkpoint that is whole, or `None` if there has never been one.

        Raises:
            ValueError: there are some, and all are damaged.
        """
        reasons = []
        for path, reason, saved in self._readable():
            if saved is not None:
                return saved
            reasons.append(f"{path.name} ({reason})")
            logger.warning("the checkpoint %s is damaged (%s): trying the one before.", path, reason)
        if reasons:
            raise ValueError(
                f"`resume_from` must hold a whole checkpoint, received {str(self.directory)!r}, where all are damaged:"
                f" {', '.join(reasons)}."
            )
        return None

    def _readable(self) -> Iterator[tuple[pathlib.Path, str, Saved | None]]:
        for path in self.paths():
            try:
                yield path, "", read(path)
            except DamagedError as error:
                yield path, str(error), None


def read(path: pathlib.Path) -> Saved:
    """Returns a checkpoint, or raises `DamagedError` if it is not the one that was written."""
    content = _content(path)
    sums = _sums(path)
    wrong = [name for name, checksum in content["sums"].items() if sums.get(name) != checksum]
    if wrong:
        raise DamagedError(f"{wrong[0]} is not what was written")
    reader: Any = tf.train.load_checkpoint(str(path / _TENSORS))
    values = [reader.get_tensor(f"values/{n}/.ATTRIBUTES/VARIABLE_VALUE") for n in range(content["count"])]
    return Saved(content["state"], values, path)


def _content(path: pathlib.Path) -> dict[str, Any]:
    try:
        checksum, _, text = (path / _STATE).read_text().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{_STATE} cannot be read") from error
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        raise DamagedError(f"{_STATE} is not what was written")
    return json.loads(text)


def _sums(path: pathlib.Path) -> dict[str, str]:
    files = [file for file in sorted(path.iterdir()) if file.name != _STATE and file.is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _flush(path: pathlib.Path) -> None:
    """Makes sure that a file or directory is on the disk; Windows cannot open a directory for that."""
    if os.name == "nt" and path.is_dir():
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
