"""tapekit's hooks inside `keras.Model.fit`.

Keras calls callbacks around its compiled function, never inside it. So while a batch is taken, the model's
`train_function` is another one, which makes the steps by the same body and drivers as the loop does: the model's own
`train_step`, whose gradients the hooks see on their way to the optimizer. It is put there when everyone else has heard
that the batch begins, and gone as soon as it is called, so nothing is left behind whichever way `fit` ends.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tapekit._arguments import check_count
from tapekit._batches import Portion, Stream
from tapekit._body import StepBody
from tapekit._drivers import Advance, Driver, logger, make_driver
from tapekit._model import ModelObjective, TrainStep, build_model, updater_for
from tapekit._records import row
from tapekit._run import tell_stop_when
from tapekit.callbacks import Callback, CheckGradients, StopWhen, _base
from tapekit.callbacks._dispatch import KERAS_LOSS, Dispatch
from tapekit.steps import asks_for_intermediates
from tapekit.stopping import statuses

_TELLING = ("set_model", "set_params")


class Session(keras.callbacks.Callback):
    """The last callback of a `keras.Model.fit` that has tapekit's among its callbacks.

    To these it is what the loop is elsewhere, their `loop`.
    """

    of_model_fit = True  # by which a loop that is given the same list knows to leave it out

    def __init__(self, everyone: keras.callbacks.CallbackList) -> None:
        super().__init__()
        self.joined: list[Callback] = []
        """Tapekit's callbacks that know of a fit, those included that are inside of others."""
        self._everyone = everyone
        self._ours: list[Callback] = []
        self._dispatch: Any = None
        self._driver: Any = None
        self._driver_of: Any = None
        self._state: Any = None
        self._step = 0
        self._epoch = self._epoch_first = 0
        self._last: Any = None
        self._started = 0.0
        self._keras_function: Any = None
        self._keeps_batches = False
        self._stream: Stream | None = None
        self._batch: Any = None

    def greet(self, logs: Any = None) -> None:
        """Tells tapekit's callbacks who runs them, before `on_train_begin` of anyone."""
        ours = [callback for callback in self._everyone.callbacks if isinstance(callback, Callback)]
        self._ours = list({id(callback): callback for callback in (*ours, *self.joined)}.values())
        for callback in self._ours:
            callback.loop = self

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins to count steps."""
        if self._target.distribute_strategy.num_replicas_in_sync > 1:
            raise ValueError("tapekit's callbacks need a model on one device, not one of a tf.distribute strategy.")
        self._dispatch = Dispatch(self._ours, None, hooks=("on_step",))
        for hook in self._dispatch.gradient_hooks:
            if asks_for_intermediates(hook):
                owner = type(getattr(hook, "__self__", hook)).__name__
                raise ValueError(
                    f"on_gradient of {owner} must do without `intermediates` in keras.Model.fit, which does not take"
                    " them; use loop.fit."
                )
        self._keeps_batches = any(isinstance(callback, CheckGradients) for callback in self._ours)
        self._driver = self._driver_of = self._batch = None
        self._step = 0
        self._last = None
        self._started = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Puts our function in the place of Keras's, which calls it next."""
        self._put_back()
        self._keras_function = self._target.train_function
        self._target.train_function = self._train

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes which epoch it is, and where it begins."""
        self._epoch, self._epoch_first = epoch, self._step

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Puts back Keras's function, which a loop of the user's own may have left where it was."""
        self._put_back()

    def on_train_end(self, logs: Any = None) -> None:
        """Puts back Keras's function, which a loop of the user's own may have left where it was."""
        self._put_back()

    def _put_back(self) -> None:
        if self._target.train_function == self._train:
            self._target.train_function = self._keras_function

    @property
    def _target(self) -> Any:
        return self.model

    @property
    def optimizer(self) -> Any:
        """The optimizer of the model."""
        return self._target.optimizer

    def stop(self, reason: str = "a hook asked for it") -> None:
        """Ends the fit at this step, as far as the hook is live."""
        self._target.stop_training = True
        logger.info("stopped at step %d: %s", self._step, reason)

    def evaluate(self) -> float:
        """Returns the loss of the batch of this step, which is kept where `CheckGradients` is among the callbacks."""
        if self._batch is None:
            raise RuntimeError("evaluate needs the batch of the step, which keras.Model.fit drops; use loop.fit.")
        return self._driver.body.objective.loss_of(self._batch)

    def status(self) -> dict[str, Any]:
        """Returns where the fit stands; see `OptimizationLoop.status`."""
        criteria = []
        if self._last is not None:
            states = self._driver.read(self._state).criteria
            criteria = statuses(self._driver.body.criteria, states, self._criterion_logs())
        seconds = time.perf_counter() - self._started
        return {"seconds": seconds, "criteria": criteria, "epoch": self._epoch, "batch": self._step - self._epoch_first}

    def _criterion_logs(self) -> dict[str, Any]:
        counts = {"step": self._step, "evaluations": self._last.evaluations}
        return row(self._last.columns, self._last.taken - 1) | counts

    def _train(self, iterator: Any) -> dict[str, Any]:
        """Takes the batches that Keras asks for, `steps_per_execution` of them."""
        self._put_back()
        model, last, wanted = self._target, None, self._target.steps_per_execution
        asked, model.stop_training = model.stop_training, False
        try:
            while wanted and not model.stop_training:
                chunk = self._advance(iterator, wanted)
                last = chunk if chunk.taken else last
                wanted = 0 if chunk.exhausted else wanted - chunk.taken
        finally:
            model.stop_training |= asked
        if last is None:
            raise StopIteration
        logs = row(last.columns, last.taken - 1)
        return {name: logs[KERAS_LOSS if name == "loss" else name] for name in self._driver.body.objective.names}

    def _advance(self, iterator: Any, wanted: int) -> Advance:
        """Takes some of the batches, tells the hooks of the steps, and stops where a criterion wants it."""
        portion = self._portion(iterator)
        if portion is None:
            return Advance(self._state, 0, 0, 0, {}, None, exhausted=True)
        self._choose_driver(portion.spec)
        self._driver.prepare(self._dispatch.period(self._target.steps_per_execution), portion)
        ahead = self._dispatch.steps_to_edge(self._step, min(wanted, portion.length or wanted))
        limit, portion = min(ahead, self._driver.limit()), portion._replace(ahead=ahead)
        chunk = self._driver.advance(self._state, limit, time.perf_counter() - self._started, portion)
        self._state = chunk.state
        if chunk.taken:
            first, self._step = self._step + 1, self._step + chunk.taken
            self._last = chunk
            self._dispatch.after(first, chunk.taken, chunk.columns)
        if chunk.fired:
            self._target.stop_training = True
            state = self._driver.read(self._state)
            tell_stop_when(self._ours, self._driver.body.criteria, state.criteria, chunk.fired, self._criterion_logs())
        return chunk

    def _portion(self, iterator: Any) -> Portion | None:
        """Returns the batches to come, or the next one alone where that is kept or all there is."""
        spec = getattr(iterator, "element_spec", None)
        if spec is not None and not self._keeps_batches:
            if self._stream is None or self._stream.iterator is not iterator:
                self._stream = Stream(iterator)
            return self._stream.portion()
        batch = next(iterator, None)
        if batch is None:
            return None
        if spec is None:  # of train_on_batch, in a loop of the user's own
            batch = tree.map_structure(lambda leaf: leaf if leaf is None else tf.convert_to_tensor(leaf), batch)
            spec = tree.map_structure(lambda leaf: leaf if leaf is None else tf.type_spec_from_value(leaf), batch)
        self._batch = batch if self._keeps_batches else None
        return Portion(repr(spec), spec, 0, batch, 1, lambda feed, n: feed, lambda: batch)

    def _choose_driver(self, spec: Any) -> None:
        """Takes the driver for the present `train_function`, which is another one when the model is compiled anew."""
        if self._driver_of is self._keras_function and self._driver is not None:
            return
        before, self._driver, self._driver_of = self._driver, self._program(spec), self._keras_function
        if type(before) is not type(self._driver):
            self._state = self._driver.begin()

    def _program(self, spec: Any) -> Driver:
        """Returns the driver, that of the fit before if nothing has changed since."""
        model = self._target
        build_model(model, model.optimizer, spec, model.run_eagerly)
        hooks = self._dispatch.gradient_hooks
        criteria = check_count([callback.criterion for callback in self._ours if isinstance(callback, StopWhen)])
        key = self._keras_function, tuple(map(id, (*model.trainable_variables, *criteria))), tuple(hooks)
        kept = vars(self._ours[0]).get("_program_in_fit")
        if kept is None or kept[0] != key:
            objective, variables = ModelObjective(model), list(model.trainable_variables)
            updater = updater_for(model.optimizer, model)
            body = StepBody(objective, updater, variables, TrainStep(objective), criteria, {}, hooks, True)
            kept = key, make_driver(body, model.run_eagerly, bool(model.jit_compile), 1 << 62)
            vars(self._ours[0])["_program_in_fit"] = kept
        return kept[1]


def _join(callback: Callback) -> None:
    """Adds a session to the list of callbacks that a callback is in, which is all that Keras lets it know of a fit."""
    if any(kind.__module__.partition(".")[0] == "tf_keras" for kind in type(callback.model).__mro__):
        raise TypeError("tapekit's callbacks need a model of Keras 3 in fit, received one of tf_keras; use minimize.")
    lists = _lists_around()
    if len(lists) > 1:
        raise ValueError(
            "tapekit's callbacks must be in the list that fit is given, received them in one inside of it."
        )
    if not lists or hasattr(lists[0], "of_a_loop"):
        return
    [everyone] = lists
    session = next((member for member in everyone.callbacks if isinstance(member, Session)), None)
    if session is None:
        session = Session(everyone)
        session.set_model(callback.model if everyone.model is None else everyone.model)
        greeting: Any = keras.callbacks.LambdaCallback(on_train_begin=session.greet)
        greeting.of_model_fit = True
        everyone.callbacks = [greeting, *everyone.callbacks, session]
    session.joined.append(callback)


def _lists_around() -> list[Any]:
    """Returns the list that is telling its callbacks of a fit, and those that it is in."""
    frame, lists = sys._getframe(3), []
    while frame is not None and (not lists or frame.f_code.co_name in _TELLING):
        teller = frame.f_locals.get("self") if frame.f_code.co_name in _TELLING else None
        lists += [teller] if isinstance(teller, keras.callbacks.CallbackList) else []
        frame = frame.f_back
    return lists


_base.joining.append(_join)
