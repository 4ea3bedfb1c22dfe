"""Batches on their way to a driver: portions of one shape, and streams of which some are stacked for a chunk."""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tapekit._tensors import aligned, lent, to_array


class Portion(NamedTuple):
    """Batches of one shape that follow each other.

    Attributes:
        key: tells batches of one shape from those of another.
        spec: the `tf.TypeSpec`s of a batch.
        size: tells how many samples a batch has, as a number or as shapes; 0 if that may differ.
        feed: what a compiled chunk is given to find its batches in, a structure of tensors; `None` for a stream, whose
            iterator it is given.
        length: how many batches there are at most; `None` if that is not known.
        batch: inside a graph, `batch(feed, n)` is the n-th batch of the portion; `None` for a stream, whose
            batches come one after the other.
        take: `take()` is the next batch, a structure of tensors; raises `StopIteration` when there is none.
        stream: where the batches come from, if they are not all at hand.
        ahead: how many batches of a stream may be read before somebody looks.
    """

    key: str = ""
    spec: Any = ()
    size: Any = 0
    feed: Any = ()
    length: int | None = None
    batch: Callable[[Any, Any], Any] | None = lambda feed, n: ()
    take: Callable[[], Any] = lambda: ()
    stream: Stream | None = None
    ahead: int = 0


NO_DATA = Portion()
"""What an objective gets that is a function of no arguments."""


class Stream:
    """The batches of an iterator over a `tf.data.Dataset`, each of which is read once.

    Args:
        iterator: where they come from.
    """

    MOST, BYTES = 64, 1 << 24
    """How many batches are stacked at most, and how many bytes; two may have more."""
    FEW = 4
    """How many batches nothing runs without, so that the pipeline and the steps soon run side by side."""

    def __init__(self, iterator: Any) -> None:
        self.iterator: Any = iterator
        self._spec = iterator.element_spec
        self._key = repr(self._spec)
        leaves = tf.nest.flatten(self._spec)
        self._is_dense = all(isinstance(leaf, tf.TensorSpec) for leaf in leaves)
        self._is_numeric = self._is_dense and all(_is_numeric(leaf.dtype) for leaf in leaves)
        self._is_static = self._is_dense and all(leaf.shape.is_fully_defined() for leaf in leaves)
        self._resource: Any = getattr(iterator, "_iterator_resource", None) if self._is_dense else None
        self._signature: dict[str, Any] = {}
        if self._resource is not None:
            self._signature = {"output_types": [leaf.dtype for leaf in leaves], "output_shapes": _shapes(leaves)}
        self._waiting: collections.deque[Any] = collections.deque()
        self._end: Exception | None = None
        self._room = 1
        self._places: list[np.ndarray] = []
        """Where batches are stacked."""
        self._tasks: Any = None
        """What the thread that reads on is to do, once there is one; `None` ends it."""

    def portion(self) -> Portion:
        """Returns the batches that are left."""
        return Portion(self._key, self._spec, 0, None, None, None, self.take, self)

    @property
    def waiting(self) -> bool:
        """Whether batches have been read that were not taken."""
        return bool(self._waiting)

    def take(self) -> Any:
        """Returns the next batch; raises `StopIteration` when there is none."""
        return tf.nest.pack_sequence_as(self._spec, self._waiting.popleft() if self._waiting else self._read())

    def stacked(self, most: int, period: int) -> Portion:
        """Returns the next batches of one shape, which stay the next ones until they are dropped.

        Args:
            most: how many, at most.
            period: how many are ever asked for, at most, so that a compiled chunk needs no room for more.

        Raises:
            StopIteration: there are no more.
            tf.errors.OpError: the pipeline has raised instead of giving the next one.
        """
        if not self._waiting:
            self._waiting.append(self._read())
        first = self._waiting[0]
        room = 1
        if self._is_numeric:  # at least 2, since XLA rounds otherwise where there is nothing to choose from
            room = max(2, min(period, self.MOST, self.BYTES // max(1, _bytes(first))))
        batches = [first]
        while len(batches) < min(most, room):
            if len(batches) == len(self._waiting) and (len(batches) >= self.FEW or not self._read_one_more()):
                break
            following = self._waiting[len(batches)]
            if not self._is_static and _shapes(following) != _shapes(first):
                break
            batches.append(following)
        self._room = room
        feed = self._stack(batches, room) if room > 1 else first
        return Portion(self._key, self._spec, tuple(_shapes(first)), feed, len(batches), _nth_of(self._spec, room))

    def _stack(self, batches: list[Any], room: int) -> list[tf.Tensor]:
        """Copies batches to memory with room for more, since each number would be compiled apart.

        It is the same memory each time; what steps take from there they copy.
        """
        if [place.shape for place in self._places] != [(room, *leaf.shape) for leaf in batches[0]]:
            self._places = [aligned((room, *leaf.shape), leaf.dtype.as_numpy_dtype) for leaf in batches[0]]
            batches = batches + batches[-1:] * (room - len(batches))  # numbers everywhere, in case somebody tries
        for n, batch in enumerate(batches):
            for place, leaf in zip(self._places, batch, strict=True):
                place[n] = to_array(leaf)
        return [lent(place) for place in self._places]

    @contextlib.contextmanager
    def reading(self, most: int) -> Iterator[None]:
        """Reads on in another thread while a chunk runs, so that the pipeline does not wait for it.

        Args:
            most: how many batches may be waiting at most, those included that were stacked.
        """
        most = min(most, 2 * self._room)
        if len(self._waiting) >= most:
            yield
            return
        if self._tasks is None:
            self._tasks = queue.SimpleQueue()
            weakref.finalize(self, self._tasks.put, None)
            # Python does not wait for its end at exit, if somebody has left a pipeline that gives nothing.
            threading.Thread(target=_work, args=[self._tasks], name="tapekit reads batches", daemon=True).start()
        left, done = threading.Event(), threading.Event()

        def read() -> None:
            try:
                while len(self._waiting) < most and not left.is_set() and self._read_one_more():
                    pass
            finally:
                done.set()

        self._tasks.put(read)
        try:
            yield
        finally:
            left.set()
            done.wait()

    def drop(self, count: int) -> None:
        """Lets go of the next `count` batches, which were stacked."""
        for _ in range(count):
            self._waiting.popleft()

    def close(self) -> None:
        """Lets go of the iterator, in another thread.

        Whoever does so waits for the thread in which TensorFlow tunes the pipeline. That is woken before it can see
        that it is to end, and if it looks at once it sleeps on: for as long as the iterator has been read, or a minute.
        """
        held = [self.iterator, self._resource]
        self.iterator = self._resource = None
        threading.Thread(target=held.clear, name="tapekit lets go of an iterator").start()
        if self._tasks is not None:
            self._tasks.put(None)

    def _read_one_more(self) -> bool:
        """Lets one more batch wait; returns whether there was one. If not, why is kept until those before are taken."""
        try:
            self._waiting.append(self._read())
        except Exception as end:  # raised by the next `_read`
            self._end = end
        return self._end is None

    def _read(self) -> list[Any]:
        if self._end:
            end, self._end = self._end, None
            raise end
        if self._resource is None:
            return tf.nest.flatten(next(self.iterator))
        try:  # what `next` does, but for 100 us in Python
            return tf.raw_ops.IteratorGetNext(iterator=self._resource, **self._signature)
        except tf.errors.OutOfRangeError:
            raise StopIteration from None


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """Does one task after the other, until there is none."""
    while task := tasks.get():
        task()
        del task  # which holds its stream


def _nth_of(spec: Any, room: int) -> Callable[[Any, Any], Any]:
    """Returns what takes the n-th of stacked batches, the last of which follows itself."""

    def batch(feed: Any, n: Any) -> Any:
        leaves = [tf.gather(leaf, tf.minimum(n, room - 1)) for leaf in feed] if room > 1 else feed
        return tf.nest.pack_sequence_as(spec, leaves)

    return batch


def _is_numeric(dtype: tf.DType) -> bool:
    return dtype.is_floating or dtype.is_integer or dtype.is_complex or dtype.is_bool


def _shapes(leaves: list[Any]) -> list[Any]:
    return [leaf.shape for leaf in leaves]


def _bytes(leaves: list[Any]) -> int:
    return sum(leaf.dtype.size * leaf.shape.num_elements() for leaf in leaves)
