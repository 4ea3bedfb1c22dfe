"""Ctrl-C and SIGTERM during a run, and variables that two threads must not change at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tapekit._describe import describe


class Interruptible(Protocol):
    """What can be asked to end."""

    interrupted: bool
    """Whether it has been asked; it looks between two chunks of steps."""
    may_be_left: bool
    """Whether nothing would be half done if an exception left it now."""


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_runs: list[Interruptible] = []
_before: dict[int, Any] = {}


@contextlib.contextmanager
def heard_by(run: Interruptible) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM ask a run to end rather than break it off; the second one breaks it off.

    Handlers are those of the process, so this needs the main thread, and leaves handlers of the user's own alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _runs:
        for number in _SIGNALS:
            if signal.getsignal(number) in _DEFAULTS:
                _before[number] = signal.signal(number, _hear)
    _runs.append(run)
    try:
        yield
    finally:
        _runs.remove(run)
        if not _runs:
            for number, handler in list(_before.items()):
                if signal.getsignal(number) is _hear:
                    signal.signal(number, handler)
            _before.clear()


def _hear(number: int, frame: Any) -> None:
    again = any(run.interrupted for run in _runs)
    for run in _runs:
        run.interrupted = True
    if again or not _runs or _runs[-1].may_be_left:
        raise KeyboardInterrupt


_threads: dict[int, list[int]] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def claimed(things: Sequence[Any]) -> Iterator[None]:
    """Keeps other threads from a run that changes one of the same variables or uses the same optimizer.

    A run inside a hook of another, in one thread, may.

    Raises:
        RuntimeError: another thread has one of them.
    """
    me = threading.get_ident()
    with _lock:
        taken = [thing for thing in things if any(thread != me for thread in _threads.get(id(thing), ()))]
        if taken:
            raise RuntimeError(
                f"a run in another thread is changing {describe(taken[0])}; let it end, or use another one."
            )
        for thing in things:
            _threads.setdefault(id(thing), []).append(me)
    try:
        yield
    finally:
        with _lock:
            for thing in things:
                _threads[id(thing)].remove(me)
                if not _threads[id(thing)]:
                    del _threads[id(thing)]
