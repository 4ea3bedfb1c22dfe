"""The batches of a fit: arrays on the device that are cut inside the graph, or a stream from a pipeline."""

from __future__ import annotations

import collections
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree
from keras.src.trainers.data_adapters import array_slicing, get_data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter
from keras.src.trainers.epoch_iterator import EpochIterator

from tapekit._batches import Portion, Stream
from tapekit._random_state import host_random_state, set_host_random_state
from tapekit._tensors import aligned, lent


class _DevicePass:
    """One pass over arrays on the device."""

    def __init__(self, arrays: Any, batch_size: int, order: np.ndarray | None) -> None:
        self._arrays = arrays
        self._batch_size = batch_size
        self._full, self._rest = divmod(_samples(arrays), batch_size)
        self._order = None if order is None else tf.constant(order, tf.int32)
        self._next = 0
        self._specs: dict[int, tuple[str, Any]] = {}

    def portion(self) -> Portion:
        """Returns the batches of full size that are left, or the smaller one at the end."""
        is_full = self._next < self._full
        size = self._batch_size if is_full else self._rest
        feed = self._arrays, self._order, tf.constant(self._next * self._batch_size, tf.int32)

        def batch(feed: Any, n: Any) -> Any:
            arrays, order, first = feed
            rows = first + n * size + tf.range(size)  # a slice would be compiled anew for every `first`
            if order is not None:
                rows = tf.gather(order, rows)
            return _each(lambda array: tf.gather(array, rows), arrays)

        if size not in self._specs:
            # Where batches differ in size Keras does not know it while it traces, which its losses of outputs show.
            known = None if self._rest else size
            spec = _each(lambda array: tf.TensorSpec([known, *array.shape[1:]], array.dtype), self._arrays)
            self._specs[size] = repr(spec), spec
        return Portion(
            *self._specs[size], size, feed, self._full - self._next if is_full else 1, batch, lambda: batch(feed, 0)
        )

    def advance(self, count: int) -> None:
        """Notes that `count` batches were taken."""
        self._next += count

    skip = advance

    def close(self) -> None:
        """Leaves the arrays, which the next pass takes too."""


class _StreamPass:
    """One pass over a `tf.data.Dataset`."""

    def __init__(self, dataset: Any) -> None:
        self._stream = Stream(iter(dataset))

    def portion(self) -> Portion:
        """Returns the batches that are left."""
        return self._stream.portion()

    def advance(self, count: int) -> None:
        """The stream knows where it is."""

    def close(self) -> None:
        """Lets go of the pipeline."""
        self._stream.close()

    def skip(self, count: int) -> None:
        """Takes `count` batches that nobody needs."""
        for _ in range(count):
            self._stream.take()


class _Source:
    """A function that makes an iterator in Python, whose exception is kept."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.error: Exception | None = None

    def __call__(self) -> Iterator[Any]:
        try:
            yield from self._function()
        except Exception as error:
            self.error = error
            raise


def _watch(adapter: Any) -> _Source | None:
    """Puts a `_Source` in the place of the Python code that makes the batches of an adapter, if there is some."""
    for name in ("generator", "_get_iterator"):
        if hasattr(adapter, name):
            setattr(adapter, name, _Source(getattr(adapter, name)))
            return getattr(adapter, name)
    return None


class Batches:
    """The batches of all epochs, where the arguments mean what they mean to `keras.Model.fit`.

    Args:
        x: inputs, or a dataset that has everything.
        y: targets.
        sample_weight: a weight for each sample.
        batch_size: samples a batch.
        steps_per_epoch: batches an epoch; `None` is a whole pass over the data.
        shuffle: True, False or "batch".
        class_weight: a weight for each class.
        device_bytes: arrays of at most so many bytes in all are put on the device once.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        shuffle: Any = False,
        class_weight: Any = None,
        device_bytes: int = 0,
    ) -> None:
        self._adapter: Any = get_data_adapter(
            x, y, sample_weight, batch_size, steps_per_epoch, shuffle=shuffle, class_weight=class_weight
        )
        self._source = _watch(self._adapter)
        self._steps_per_epoch = steps_per_epoch
        self._shuffle = shuffle
        self._arrays = _device_arrays(self._adapter, device_bytes)
        self._ordered = bool(shuffle) and isinstance(self._adapter, ArrayDataAdapter)
        self._stream_order: Any = None
        self._dataset: Any = None
        if self._arrays is None:
            self._dataset = self._ordered_stream() if self._ordered else self._adapter.get_tf_dataset()
        self._known = self._adapter.num_batches
        self._seed = random.getrandbits(64) if self._ordered else 0
        self._passes = self._iterators = 0
        self._host: Any = None
        """The state of the random generators of Python and NumPy when the pass began, if Python makes the batches."""
        self._pass: Any = None
        self._seen = 0
        self._left: int | None = None
        self._over = True
        self._adapter.on_epoch_end()  # as Keras does before the first epoch, so that a PyDataset shuffles

    @property
    def may_raise(self) -> bool:
        """Whether Python code makes the batches, whose error in a later one must lose nothing of an earlier one."""
        return self._arrays is None and not isinstance(self._adapter, (ArrayDataAdapter, TFDatasetAdapter))

    @property
    def error(self) -> Exception | None:
        """What the Python code that makes the batches has raised, which TensorFlow turns into an error of its own."""
        return self._source and self._source.error

    @property
    def on_device(self) -> bool:
        """Whether the batches are cut inside the graph."""
        return self._arrays is not None

    @property
    def sample(self) -> Portion:
        """The first batches of a pass, for their shape alone; none is taken."""
        if self._arrays is None:
            spec = self._dataset.element_spec
            return Portion(repr(spec), spec, 0, None, None, None)
        return _DevicePass(self._arrays, self._adapter.batch_size, None).portion()

    @property
    def num_batches(self) -> int | None:
        """How many batches an epoch has, if that is known."""
        return self._steps_per_epoch or self._known

    def identity(self) -> dict[str, Any]:
        """Returns what tells the data from others in another process, in plain data."""
        arrays = self._adapter._inputs if isinstance(self._adapter, ArrayDataAdapter) else ()
        dense = [leaf for leaf in tree.flatten(arrays) if isinstance(leaf, (np.ndarray, tf.Tensor))]
        return {
            "data": repr(self.sample.spec),
            "batches an epoch": self.num_batches,
            "shuffle": self._shuffle,
            "checksum of the data": [_checksum(leaf) for leaf in dense],
        }

    def unsaved(self) -> list[str]:
        """Returns what of the place in the data and its order cannot be saved, in words."""
        if self._arrays is not None or self._ordered:
            return []
        if isinstance(self._adapter, TFDatasetAdapter):
            return _unrepeatable(self._adapter._dataset)
        source = getattr(self._adapter, "py_dataset", None)
        hooks = [name for name in ("on_epoch_begin", "on_epoch_end") if _overrides_hook(source, name)]
        return [f"what {' and '.join(hooks)} of {type(source).__name__} have changed"] if hooks else []

    def state(self) -> dict[str, Any]:
        """Returns the place in the data, in plain data."""
        return {
            "seed": self._seed,
            "passes": self._passes,
            "iterators": self._iterators,
            "seen": self._seen,
            "left": self._left,
            "over": self._over,
            "known": self._known,
            "passing": self._pass is not None,
            "host": self._host,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes to a place in the data of another process. A stream is taken up to it again, batch by batch."""
        self._seed, self._passes, self._known = state["seed"], state["passes"], state["known"]
        if self._arrays is None:
            self._iterators = state["iterators"] - state["passing"]
            for _ in range(self._iterators):
                iterator = iter(self._dataset)  # which moves the seeds of a shuffle on
                if isinstance(self._adapter, GeneratorDataAdapter):
                    collections.deque(iterator, maxlen=0)
        if state["passing"]:
            self._passes -= 1
            self._host = state["host"]
            if self._host:
                set_host_random_state(self._host)
            self._adapter.on_epoch_begin()
            self._begin_pass()
            self._pass.skip(state["seen"])
        self._seen, self._left, self._over = state["seen"], state["left"], state["over"]

    def reset(self) -> None:
        """Ends the pass over the data, if there is one; the next epoch begins with a new one."""
        if self._pass is not None:
            self._pass.close()
        self._pass = None

    def begin_epoch(self) -> None:
        """Begins an epoch, with a new pass over the data unless an epoch is only a part of one."""
        begins = self._pass is None or self._steps_per_epoch is None
        if begins and self.may_raise:
            self._host = host_random_state()
        self._adapter.on_epoch_begin()
        if begins:
            self._begin_pass()
        self._left = self.num_batches
        self._over = False

    def portion(self) -> Portion | None:
        """Returns the next batches of the epoch that have one shape; `None` at its end."""
        if self._left == 0 or (self._known and self._seen >= self._known and not self._over):
            if self._left:
                self._warn()
            self._end_epoch()
        if self._over:
            return None
        portion = self._pass.portion()
        lengths = [length for length in (portion.length, self._left) if length is not None]
        return portion._replace(length=min(lengths) if lengths else None)

    def advance(self, taken: int, exhausted: bool) -> None:
        """Notes that `taken` batches were taken, and whether there were no more."""
        self._pass.advance(taken)
        self._seen += taken
        if self._left is not None:
            self._left -= taken
        if exhausted and not self._over:
            self._known = self._known or self._seen
            if self._left:
                self._warn()
            self.reset()
            self._end_epoch()

    def _begin_pass(self) -> None:
        self.reset()
        self._seen = 0
        self._passes += 1
        if self._arrays is None:
            if self._ordered:
                self._stream_order.assign(self._order())
            self._iterators += 1
            self._pass = _StreamPass(self._dataset)
        else:
            self._pass = _DevicePass(self._arrays, self._adapter.batch_size, self._order())

    def _order(self) -> np.ndarray | None:
        """Returns the order of the samples in this pass, which depends on the seed and the pass alone."""
        if not self._shuffle:
            return None
        samples, size = _samples(self._adapter._inputs), self._adapter.batch_size
        generator = np.random.default_rng((self._seed, self._passes))
        if self._shuffle != "batch":
            return generator.permutation(samples)
        starts = range(0, samples, size)
        return np.concatenate([start + generator.permutation(min(size, samples - start)) for start in starts])

    def _ordered_stream(self) -> tf.data.Dataset:
        """Returns the batches of arrays as a pipeline, in the order that a variable holds when a pass begins."""
        samples, size = _samples(self._adapter._inputs), self._adapter.batch_size
        start: Any = np.arange(samples)
        self._stream_order = tf.Variable(start, trainable=False)

        def rows(n: Any) -> Any:
            found = self._stream_order[n * size : (n + 1) * size]
            return found if samples % size else tf.ensure_shape(found, [size])

        sliceable = array_slicing.convert_to_sliceable(self._adapter._inputs, target_backend="tensorflow")
        arrays = tf.data.Dataset.from_tensors(tree.lists_to_tuples(sliceable)).repeat()
        order = tf.data.Dataset.range(-(-samples // size)).map(rows)
        gathered = tf.data.Dataset.zip((order, arrays)).map(_gather, num_parallel_calls=tf.data.AUTOTUNE)
        return gathered.prefetch(tf.data.AUTOTUNE)

    def _end_epoch(self) -> None:
        self._over = True
        if self._known and self._seen >= self._known:
            self.reset()
            if self._arrays is None and self._steps_per_epoch is None and hasattr(EpochIterator, "reset"):
                self._iterators += 1
                iter(self._dataset)  # as newer versions of Keras do, so that a dataset shuffles as it does there
        self._adapter.on_epoch_end()

    def _warn(self) -> None:
        warnings.warn(
            f"the data ended {self._left} batches before the {self.num_batches} of an epoch; `steps_per_epoch` times"
            " `epochs` batches are needed, for which a tf.data.Dataset may be repeated.",
            stacklevel=2,
        )


def _checksum(leaf: Any) -> int:
    array: Any = np.ascontiguousarray(leaf)
    return zlib.crc32(array.view(np.uint8)) if array.size else 0


def _unrepeatable(dataset: Any) -> list[str]:
    """Returns which parts of a pipeline do not give the same again in another process, in words."""
    found = []
    if dataset.options().deterministic is False:
        found.append("the order of a tf.data.Dataset with options().deterministic = False")
    waiting = [dataset]
    while waiting:
        part = waiting.pop()
        waiting += part._inputs()
        seeds = [getattr(part, name, None) for name in ("_seed", "_seed2")]
        if "Shuffle" in type(part).__name__ and not any(seed is None or int(seed) for seed in seeds):
            found.append("the order of Dataset.shuffle without a seed (give one, or call keras.utils.set_random_seed)")
    return found


def _overrides_hook(source: Any, name: str) -> bool:
    return source is not None and getattr(type(source), name) is not getattr(keras.utils.PyDataset, name)


def _gather(rows: Any, arrays: Any) -> Any:
    def gather(leaf: Any) -> Any:
        if isinstance(leaf, array_slicing.TensorflowSparseWrapper):
            return array_slicing.slice_tensorflow_sparse_wrapper(leaf, rows)
        return None if isinstance(leaf, (list, tuple, dict)) else tf.gather(leaf, rows)

    return tree.traverse(gather, arrays)


def _device_arrays(adapter: Any, most_bytes: int) -> Any:
    """Returns the arrays of an adapter as tensors, or `None` if they are not dense or too large."""
    if not isinstance(adapter, ArrayDataAdapter):
        return None
    arrays = tree.lists_to_tuples(array_slicing.convert_to_sliceable(adapter._inputs, target_backend="tensorflow"))
    leaves = [leaf for leaf in tree.flatten(arrays) if leaf is not None]
    if not all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in leaves):
        return None
    if sum(_bytes(leaf) for leaf in leaves) > most_bytes:
        return None
    return _each(_tensor, arrays)


def _tensor(leaf: Any) -> tf.Tensor:
    if not (isinstance(leaf, np.ndarray) and leaf.nbytes > _SMALL and leaf.dtype.kind in "biuf"):
        return tf.convert_to_tensor(leaf)
    own = aligned(leaf.shape, leaf.dtype)
    np.copyto(own, leaf)
    return lent(own)


_SMALL = 1 << 16


def _each(function: Callable[[Any], Any], arrays: Any) -> Any:
    return tree.map_structure(lambda leaf: None if leaf is None else function(leaf), arrays)


def _samples(arrays: Any) -> int:
    return next(leaf.shape[0] for leaf in tree.flatten(arrays) if leaf is not None)


def _bytes(array: Any) -> int:
    return array.nbytes if isinstance(array, np.ndarray) else array.dtype.size * array.shape.num_elements()
