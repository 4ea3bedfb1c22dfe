"""A run over the batches of a Keras model, epoch by epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays
from keras.src.trainers.data_adapters.array_slicing import train_validation_split

from tapekit._data import Batches
from tapekit._describe import check_integer, check_real, describe
from tapekit._drivers import Advance, Driver, Pace
from tapekit._model import ModelObjective, has_own_train_step
from tapekit._result import OptimizationResult, StopReason
from tapekit._run import Run
from tapekit.callbacks import Callback, Progress
from tapekit.callbacks._dispatch import Dispatch, keras_logs, overridden


@dataclasses.dataclass(frozen=True)
class FitArguments:
    """The arguments of a fit that say what it runs over; their meaning stands at `OptimizationLoop.fit`."""

    x: Any
    y: Any
    batch_size: int | None
    epochs: int
    verbose: int | str
    validation_split: float
    validation_data: Any
    shuffle: bool | str
    class_weight: Any
    sample_weight: Any
    initial_epoch: int
    steps_per_epoch: int | None
    validation_steps: int | None
    validation_batch_size: int | None
    validation_freq: int | list[int]
    device_bytes: int

    def __post_init__(self) -> None:
        check_integer(self.epochs, "epochs", 1)
        check_integer(self.initial_epoch, "initial_epoch", 0)
        check_integer(self.device_bytes, "device_bytes", 0)
        for name in ("batch_size", "steps_per_epoch", "validation_steps", "validation_batch_size"):
            if getattr(self, name) is not None:
                check_integer(getattr(self, name), name, 1)
        if self.verbose not in ("auto", 0, 1, 2):
            raise ValueError(f'`verbose` must be 0, 1, 2 or "auto", received {describe(self.verbose)}.')
        if self.shuffle not in (True, False, "batch"):
            raise ValueError(f'`shuffle` must be True, False or "batch", received {describe(self.shuffle)}.')
        weights = self.class_weight
        if weights is not None and not (isinstance(weights, dict) and all(isinstance(k, Integral) for k in weights)):
            raise TypeError(
                f"`class_weight` must be a dict of weights by the numbers of classes, received {describe(weights)}."
            )
        if not 0.0 <= check_real(self.validation_split, "validation_split", 0.0) < 1.0:
            raise ValueError(f"`validation_split` must be below 1, received {self.validation_split}.")
        epochs: Any = tree.flatten(self.validation_freq)
        for epoch in epochs:
            check_integer(epoch, "validation_freq", 1)

    def data(self, model: Any, endless: bool) -> tuple[Batches, Validation | None]:
        """Returns the batches and what is evaluated between epochs.

        Args:
            model: the model.
            endless: whether something ends the run if the data does not.
        """
        x, y, sample_weight = self.x, self.y, self.sample_weight
        held_out = self.validation_data
        if self.validation_split and held_out is None:
            whole = x, y, sample_weight
            with _naming("`validation_split`"):
                split: Any = train_validation_split(whole, validation_split=self.validation_split)
            (x, y, sample_weight), held_out = split
        infinite = isinstance(x, tf.data.Dataset) and x.cardinality() == tf.data.INFINITE_CARDINALITY
        if infinite and not (self.steps_per_epoch or endless):
            raise ValueError(
                "`steps_per_epoch` or a criterion must end an epoch of data without end, received none of them."
            )
        if not [leaf for leaf in tree.flatten(x) if leaf is not None]:
            raise ValueError(f"`x` must be data that keras.Model.fit takes, received {describe(x)}.")
        with _naming("`x`, `y` and `sample_weight`"):
            batches = Batches(
                x,
                y,
                sample_weight,
                None if self.batch_size is None else int(self.batch_size),
                self.steps_per_epoch,
                self.shuffle,
                self.class_weight,
                self.device_bytes,
            )
        if batches.num_batches == 0:
            raise ValueError(f"`x` must hold at least one sample, received {describe(self.x)}.")
        if held_out is None:
            return batches, None
        batch_size = self.validation_batch_size or self.batch_size
        freq, steps = self.validation_freq, self.validation_steps
        with _naming("`validation_data`"):
            return batches, Validation(model, held_out, batch_size, steps, freq, self.device_bytes)


@contextlib.contextmanager
def _naming(arguments: str) -> Iterator[None]:
    """Puts what Keras says against data into one sentence that begins with the names of the arguments."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        if _raised_in(error) not in ("keras", "tensorflow", "numpy", "pandas", "optree", "tapekit"):
            raise  # by the user's own code that makes the first batch
        reason = re.sub(r"\.\s+(?=[A-Z])", "; ", " ".join(str(error).split())).rstrip(".")
        raise ValueError(
            f"{arguments} must be data that keras.Model.fit takes, of which Keras says: {reason}."
        ) from error


def _raised_in(error: BaseException) -> str:
    """Returns the package of the code that has raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").partition(".")[0]


def keras_defaults(callbacks: Sequence[Any], verbose: Any) -> list[Any]:
    """Returns the callbacks that Keras adds to a fit, unless they are there."""
    bars = (keras.callbacks.ProgbarLogger, Progress)
    wanted = [(keras.callbacks.History,), *([bars] if verbose else [])]
    return [kinds[0]() for kinds in wanted if not any(isinstance(callback, kinds) for callback in callbacks)]


class LoopCallbackList(keras.callbacks.CallbackList):
    """The callbacks of a fit as `keras.Model.evaluate` takes them; the other hooks are called by the loop."""

    of_a_loop = True

    def __init__(self, callbacks: Sequence[Any], model: Any, **params: Any) -> None:
        super().__init__(list(callbacks), model=model, **params)
        self._async_test = False


class Validation:
    """The evaluation of a model between epochs.

    Args:
        model: the model.
        data: `(x, y)` or `(x, y, sample_weight)`, or a dataset.
        batch_size: samples a batch.
        steps: how many batches, or `None` for all.
        freq: after how many epochs, or a list of epochs, which count from 1.
        device_bytes: arrays of at most so many bytes in all are put on the device once.
    """

    def __init__(
        self, model: Any, data: Any, batch_size: int | None, steps: int | None, freq: Any, device_bytes: int
    ) -> None:
        self._model = model
        self._freq = freq
        self._steps = steps
        self._batch_size = batch_size
        self._data = keras.utils.unpack_x_y_sample_weight(data)
        # Only arrays, since whoever looks at a generator takes a batch from it.
        self._batches: Batches | None = None
        if not hasattr(self._data[0], "__iter__") and not isinstance(self._data[0], keras.utils.PyDataset):
            raise TypeError(f"they are {describe(data)}")
        if can_convert_arrays(self._data):
            batches = Batches(*self._data, batch_size, steps, device_bytes=device_bytes)
            self._batches = batches if batches.on_device else None
        self._iterator: Any = None

    def due(self, epoch: int) -> bool:
        """Returns whether an evaluation follows an epoch, from 0."""
        return (epoch + 1) in self._freq if isinstance(self._freq, list) else (epoch + 1) % self._freq == 0

    def logs(self, callbacks: Any, functions: dict[Any, Any]) -> dict[str, Any]:
        """Evaluates, and returns the logs under Keras's names.

        Args:
            callbacks: those of the fit.
            functions: where compiled functions are kept from one fit to the next.
        """
        watched = any(_watches_batches(callback) for callback in callbacks.callbacks)
        if self._batches is None or watched or self._model.run_eagerly:
            logs = self._by_keras(callbacks)
        else:
            logs = self._on_device(self._batches, callbacks, functions)
        return {f"val_{name}": value for name, value in logs.items()}

    def _on_device(self, batches: Batches, callbacks: Any, functions: dict[Any, Any]) -> dict[str, Any]:
        """Does what `evaluate` of Keras does, with the batches cut inside the graph."""
        model = self._model
        callbacks.on_test_begin()
        model.reset_metrics()
        batches.reset()
        batches.begin_epoch()
        logs: dict[str, Any] = {}
        pace = Pace()
        while portion := batches.portion():
            assert portion.length
            assert portion.batch
            key = (
                portion.key,
                portion.size,
                tuple(leaf.shape for leaf in tree.flatten(portion.feed) if leaf is not None),
            )
            if key not in functions:
                test = tf.function(model.test_step, autograph=False).get_concrete_function(portion.spec)
                functions[key] = tf.function(functools.partial(_test, test, portion.batch), autograph=False)
            count, started = min(portion.length, pace.limit()), time.perf_counter()
            logs = functions[key](tf.constant(count), portion.feed)
            pace.observe(count, time.perf_counter() - started)
            batches.advance(count, False)
        logs = _numbers(model._get_metrics_result_or_logs(logs))
        callbacks.on_test_end(logs)
        return logs

    def _by_keras(self, callbacks: Any) -> dict[str, Any]:
        x, y, sample_weight = self._data
        model = self._model
        if self._iterator is None:
            self._iterator = TFEpochIterator(
                x=x,
                y=y,
                sample_weight=sample_weight,
                batch_size=self._batch_size,
                distribute_strategy=model.distribute_strategy,
                steps_per_execution=model.steps_per_execution,
                steps_per_epoch=self._steps,
                shuffle=False,
            )
        model._eval_epoch_iterator = self._iterator  # where `evaluate` looks for it when `fit` of Keras calls it
        try:
            return model.evaluate(callbacks=callbacks, return_dict=True, _use_cached_eval_dataset=True)
        finally:
            del model._eval_epoch_iterator


def _watches_batches(callback: Any) -> bool:
    """Returns whether a callback sees the batches of evaluations; the progress bar of a fit does not show them."""
    hooks = ("on_test_batch_begin", "on_test_batch_end")
    return not isinstance(callback, keras.callbacks.ProgbarLogger) and any(overridden(callback, hook) for hook in hooks)


def _test(test_step: Callable[[Any], Any], batch_of: Callable[[Any, Any], Any], count: Any, feed: Any) -> Any:
    """Evaluates a model on the first `count` batches; returns the logs of the last."""

    def proceed(done: Any) -> Any:
        return done < count - 1

    def test(done: Any) -> Any:
        test_step(batch_of(feed, done))
        return (done + 1,)

    tf.while_loop(proceed, test, (tf.constant(0),), parallel_iterations=1)
    return test_step(batch_of(feed, count - 1))


class FitRun(Run):
    """The state of a fit on the host.

    Args:
        driver: what takes the steps.
        dispatch: what calls the hooks.
        callbacks: the callbacks, those that Keras adds included.
        batches: the data.
        validation: what is evaluated between epochs, or `None`.
        arguments: those of `fit`.
        on_nonfinite: what to do at a step that is not finite.
        restore_best: whether to end with the best weights.
    """

    def __init__(
        self,
        driver: Driver,
        dispatch: Dispatch,
        callbacks: list[Any],
        batches: Batches,
        validation: Validation | None,
        arguments: FitArguments,
        on_nonfinite: Any,
        restore_best: bool,
    ) -> None:
        structure = driver.body.variables
        super().__init__(driver, dispatch, callbacks, structure, 1, 1 << 62, False, on_nonfinite, restore_best)
        self._objective: ModelObjective = driver.body.objective
        self._model: Any = self._objective.model
        self._compiled_optimizer: Any = self._model.optimizer
        self._batches = batches
        self._validation = validation
        self._arguments = arguments
        self._epoch = self._epoch_first = 0
        self._portion: Any = None
        self._shape: Any = None
        self._inside = False
        """Whether an epoch has begun and not ended."""
        self._last_batch: Callable[[], Any] | None = None
        self._epoch_logs: dict[str, Any] = {}
        self._epoch_history: dict[str, list[Any]] = {}
        self._epoch_steps: dict[str, list[int]] = {}

    def begin(self, loop: Any) -> None:
        """Tells the callbacks of the loop and the model, and gets everyone ready."""
        self._started = time.perf_counter()
        for callback in self._callbacks:
            if isinstance(callback, Callback):
                callback.loop = loop
        self._model.optimizer = self._driver.body.updater.optimizer
        epochs, verbose = self._arguments.epochs, self._arguments.verbose
        params = {"verbose": verbose, "epochs": epochs, "steps": self._batches.num_batches}
        self._callback_list = LoopCallbackList(self._callbacks, self._model, **params)
        self._model.stop_training = False
        self._driver.expected += epochs * (self._batches.num_batches or math.inf)
        self._begin_training()
        self._epoch = self._model._initial_epoch or self._arguments.initial_epoch
        if self._saved:
            self._resume(self._saved)

    def epochs(self) -> Iterator[int]:
        """Begins one epoch after the other, until something ends the run."""
        while self._epoch < self._arguments.epochs and not self.explanation:
            if not self._inside:
                self._epoch_first = self.step
                self._begin_epoch()
                self._batches.begin_epoch()
                self._inside = True
            self._portion = self._batches.portion()
            yield self._epoch
            self._inside = False
            self._epoch += 1
        self.explanation = self.explanation or (
            StopReason.LIMIT,
            f"the last of {self._arguments.epochs} epochs ended at step {self.step}",
        )

    def _begin_epoch(self) -> None:
        self._model.reset_metrics()
        self.dispatch.begin_epoch(self._epoch, self._epoch_first + 1)

    def _data(self) -> tuple[dict[str, Any], list[str]]:
        return self._batches.identity(), self._batches.unsaved()

    def _ending(self) -> list[str]:
        return [*super()._ending(), f"{self._arguments.epochs} epochs"]

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {
            "epoch": self._epoch,
            "inside": self._inside,
            "epoch_first": self._epoch_first,
            "epoch_logs": self._epoch_logs,
            "epoch_history": self._epoch_history,
            "epoch_steps": self._epoch_steps,
            "names": self._objective.names,
            "batches": self._batches.state(),
        }

    def _reenter(self, progress: dict[str, Any]) -> None:
        self._epoch, self._inside = progress["epoch"], progress["inside"]
        self._epoch_first = progress["epoch_first"]
        self._epoch_logs, self._epoch_history = progress["epoch_logs"], progress["epoch_history"]
        self._epoch_steps = progress["epoch_steps"]
        self._objective.names = progress["names"]
        if self._inside:
            self._begin_epoch()
        self._driver.prepare(self._period, self._batches.sample)
        self._batches.resume(progress["batches"])

    @property
    def in_epoch(self) -> bool:
        """Whether the run and the epoch go on."""
        return self.explanation is None and self._portion is not None

    def steps_to_next_edge(self) -> int:
        """Returns how many steps may be taken before somebody needs the host, or the batches change their shape."""
        if (self._portion.key, self._portion.size) != self._shape:
            self._shape = self._portion.key, self._portion.size
            self._driver.prepare(self.dispatch.period(self._batches.num_batches or 1 << 30), self._portion)
        at_most = 1 if self._batches.may_raise else self._portion.length or 1 << 62
        self._portion = self._portion._replace(ahead=self.dispatch.steps_to_edge(self.step, at_most))
        return min(self._portion.ahead, self._driver.limit())

    def advance(self, limit: int) -> Advance:
        """Takes up to `limit` steps and keeps their records."""
        chunk = self._driver.advance(self._state, limit, time.perf_counter() - self._started, self._portion)
        self._keep(chunk)
        if chunk.taken and (batch := self._portion.batch):
            self._last_batch = functools.partial(batch, self._portion.feed, chunk.taken - 1)
        self._batches.advance(chunk.taken, chunk.exhausted)
        self._portion = self._batches.portion()
        return chunk._replace(error=self._batches.error) if chunk.error and self._batches.error else chunk

    def end_epoch(self) -> None:
        """Ends an epoch as Keras does: with the results of the metrics, and an evaluation where one is due."""
        self.dispatch.end_batches(self.step, self.logs)
        last = keras_logs(self.logs)
        logs = dict(self._model._get_metrics_result_or_logs({name: last.get(name) for name in self._objective.names}))
        if self._validation and self._validation.due(self._epoch):
            self.may_be_left = True  # since it changes nothing, Ctrl-C need not wait for its end
            logs |= self._validation.logs(self._callback_list, self._objective.tests)
            self.may_be_left = False
        self._epoch_logs = _numbers(logs)
        for name, value in self._epoch_logs.items():
            self._epoch_history.setdefault(name, []).append(value)
            self._epoch_steps.setdefault(name, []).append(self.step)
        self.dispatch.end_epoch(self._epoch, self._epoch_logs)

    def end(self) -> None:
        """Lets the optimizer finish, as Keras does, and calls `on_train_end`."""
        self._save_at_end()
        if self.step and isinstance(self._model.optimizer, keras.optimizers.Optimizer):
            self._model.optimizer.finalize_variable_values(self._model.trainable_weights)
        self._close(self._epoch_logs)
        self._batches.reset()
        self._ended = True

    def status(self) -> dict[str, Any]:
        """Returns where the run stands; epochs count from 0, as they do in hooks."""
        batch = self.step - self._epoch_first
        has_ended = batch > 0 and not self._inside
        return super().status() | {"epoch": self._epoch - has_ended, "batch": batch}

    def evaluate(self) -> float:
        """Returns the loss of the batch of the last step at the present variables."""
        if self._last_batch is None:
            raise RuntimeError("evaluate needs a step before it, of arrays on the device, whose batches stay at hand.")
        return self._objective.loss_of(self._last_batch())

    def conclude(self) -> OptimizationResult:
        """Makes the result from everything that is known now."""
        result = super().conclude()
        losses = result.history.get("loss", [])[self._epoch_first :]
        if "loss" in self._epoch_logs and not has_own_train_step(self._model):
            result = dataclasses.replace(result, loss=self._epoch_logs["loss"])
        elif len(losses):  # what a train_step returns as a loss may be anything
            result = dataclasses.replace(result, loss=float(np.mean(losses)))
        history = {name: np.asarray(values) for name, values in self._epoch_history.items()}
        steps = {name: np.asarray(values) for name, values in self._epoch_steps.items()}
        self._result = dataclasses.replace(result, epoch_history=history, epoch_steps=steps)
        self._model.optimizer = self._compiled_optimizer
        return self._result


def _numbers(logs: dict[str, Any]) -> dict[str, Any]:
    """Returns logs of tensors as Keras gives them to callbacks: in order of their names, scalars as Python floats."""
    values = {name: np.asarray(logs[name]) for name in sorted(logs)}
    return {name: float(value) if value.ndim == 0 else value for name, value in values.items()}
