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

from tapekit._body import StepBody
from tapekit._data import Portion
from tapekit._drivers import Advance, Driver, logger, make_driver
from tapekit._model import ModelObjective, TrainStep, build_model
from tapekit._optimizers import Updater
from tapekit._records import row
from tapekit._run import tell_stop_when
from tapekit.callbacks import Callback, StopWhen, _base
from tapekit.callbacks._dispatch import Dispatch, keras_logs


class Session(keras.callbacks.Callback):
    """The last callback of a `keras.Model.fit` that has tapekit's among its callbacks.

    To these it is what the loop is elsewhere, their `loop`.
    """

    def __init__(self, callbacks: list[Any]) -> None:
        super().__init__()
        self._everyone = callbacks
        self._ours: list[Callback] = []
        self._dispatch: Any = None
        self._driver: Any = None
        self._state: Any = None
        self._step = 0
        self._started = 0.0
        self._keras_function: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins to count steps."""
        self._ours = [callback for callback in self._everyone if isinstance(callback, Callback)]
        for callback in self._ours:
            callback.loop = self
        if self._target.distribute_strategy.num_replicas_in_sync > 1:
            raise ValueError("tapekit's callbacks need a model on one device, not one of a tf.distribute strategy.")
        self._dispatch = Dispatch(self._ours, None, hooks=("on_step",))
        self._driver = None
        self._step = 0
        self._started = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Puts our function in the place of Keras's, which calls it next."""
        self._keras_function = self._target.train_function
        self._target.train_function = self._train

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
        """Raises: `keras.Model.fit` does not keep its batches."""
        raise RuntimeError("evaluate needs the batch of the step, which keras.Model.fit does not keep; use loop.fit.")

    def _train(self, iterator: Any) -> dict[str, Any]:
        """Takes the batches that Keras asks for, `steps_per_execution` of them."""
        self._target.train_function = self._keras_function
        spec = iterator.element_spec
        portion = Portion(repr(spec), spec, iterator, None, None, iterator.__next__)
        if self._driver is None:
            self._driver = self._program(spec)
            self._state = self._driver.begin()
        wanted = self._target.steps_per_execution
        self._driver.prepare(self._dispatch.period(wanted), portion)
        last: Advance | None = None
        while wanted and not (last and self._target.stop_training):
            limit = self._dispatch.steps_to_edge(self._step, wanted)
            chunk = self._driver.advance(self._state, limit, time.perf_counter() - self._started, portion)
            self._state = chunk.state
            if chunk.taken:
                last = chunk
                self._heed(chunk)
            wanted = 0 if chunk.exhausted else wanted - chunk.taken
        if last is None:
            raise StopIteration
        logs = keras_logs(row(last.columns, last.taken - 1))
        return {name: logs[name] for name in self._driver.body.objective.names if name in logs}

    def _heed(self, chunk: Advance) -> None:
        """Tells the hooks of the steps, and stops where a criterion wants it."""
        first, self._step = self._step + 1, self._step + chunk.taken
        self._dispatch.after(first, chunk.taken, chunk.columns)
        if chunk.fired:
            self._target.stop_training = True
            state = self._driver.read(self._state)
            logs = {**row(chunk.columns, chunk.taken - 1), "step": self._step, "evaluations": state.evaluations}
            tell_stop_when(self._ours, self._driver.body.criteria, state.criteria, chunk.fired, logs)

    def _program(self, spec: Any) -> Driver:
        """Returns the driver, that of the fit before if nothing has changed since."""
        model = self._target
        build_model(model, model.optimizer, spec, model.run_eagerly)
        hooks = self._dispatch.gradient_hooks
        criteria = [callback.criterion for callback in self._ours if isinstance(callback, StopWhen)]
        key = self._keras_function, tuple(map(id, (*model.trainable_variables, *criteria))), tuple(hooks)
        kept = vars(self._ours[0]).get("_program_in_fit")
        if kept is None or kept[0] != key:
            objective, variables = ModelObjective(model), list(model.trainable_variables)
            body = StepBody(
                objective, Updater(model.optimizer), variables, TrainStep(objective), criteria, {}, hooks, True
            )
            kept = key, make_driver(body, model.run_eagerly, bool(model.jit_compile), 1 << 62), criteria
            vars(self._ours[0])["_program_in_fit"] = kept
        return kept[1]


def _join(callback: Callback) -> None:
    """Adds a session to the list of callbacks that a callback is in, which is all that Keras lets it know of a fit."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "set_model":
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.callbacks.CallbackList):
            if not any(isinstance(member, Session) for member in owner.callbacks) and not hasattr(owner, "of_a_loop"):
                owner.callbacks.append(Session(owner.callbacks))
            return
        frame = frame.f_back


_base.joining.append(_join)
