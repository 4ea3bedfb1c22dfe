"""One run: where it stands, and what becomes of it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tensorflow as tf

from tapekit._drivers import Advance, Driver, State
from tapekit._objective import keras_variable, tf_variable
from tapekit._records import Records, row
from tapekit._result import OptimizationResult, StopReason
from tapekit.callbacks import Callback, Dispatch, VariablesModel, scalars


class Run:
    """The state of a run on the host.

    Args:
        driver: what takes the steps.
        dispatch: what calls the hooks.
        callbacks: those that are told of the loop and the model.
        structure: the variables as the caller gave them.
        steps_per_epoch: the number of steps of an epoch.
        live: whether the caller sees every step, so that no chunk may be longer.
    """

    def __init__(
        self,
        driver: Driver,
        dispatch: Dispatch,
        callbacks: list[Any],
        structure: Any,
        steps_per_epoch: int,
        live: bool,
    ) -> None:
        self.dispatch = dispatch
        self.live = live
        self.step = 0
        self.explanation: tuple[StopReason, str] | None = None
        self._driver = driver
        self._callbacks = callbacks
        self._structure = structure
        self._steps_per_epoch = steps_per_epoch
        self._records = Records()
        self._state: State = driver.body.initial()
        self._last: Advance | None = None
        self._loss: float | None = None
        self._model: Any = None
        self._started = time.perf_counter()

    def begin(self, loop: Any) -> None:
        """Tells the callbacks of the loop and of a model that owns the variables, and calls `on_train_begin`."""
        if self._callbacks:
            variables = [keras_variable(variable) for variable in tf.nest.flatten(self._structure)]
            self._model = VariablesModel(variables, loop.optimizer)
        for callback in self._callbacks:
            if isinstance(callback, Callback):
                callback.loop = loop
            callback.set_params({"epochs": None, "steps": self._steps_per_epoch, "verbose": 0})
            callback.set_model(self._model)
        self.dispatch.train("on_train_begin")

    def steps_to_next_edge(self) -> int:
        """Returns how many steps may be taken before somebody needs the host."""
        return self.dispatch.steps_to_edge(self.step, 1 if self.live else self._driver.limit())

    def advance(self, limit: int) -> Advance:
        """Takes up to `limit` steps and keeps their records."""
        chunk = self._driver.advance(self._state, limit, time.perf_counter() - self._started)
        self._state = chunk.state
        self._records.extend(chunk.columns, chunk.taken)
        self.step += chunk.taken
        self._last = chunk
        return chunk

    @property
    def logs(self) -> dict[str, Any]:
        """What is known of the last step."""
        return {} if self._last is None else row(self._last.columns, self._last.taken - 1)

    @property
    def model_stopped(self) -> bool:
        """Whether a Keras callback has set `model.stop_training`."""
        return self._model is not None and self._model.stop_training

    def explain(self) -> None:
        """Asks the criterion which of its parts has ended the run."""
        state = tf.nest.map_structure(_number, self._state.criterion)
        logs = {**self.logs, "step": self.step, "evaluations": int(self._state.evaluations)}
        self.explanation = self._driver.body.criterion.explain(state, logs)

    def stopped(self, why: str) -> None:
        """Notes that a hook or the caller has ended the run, unless it has ended already."""
        self.explanation = self.explanation or (StopReason.STOPPED, f"stopped at step {self.step}: {why}")

    def evaluate(self) -> None:
        """Evaluates the loss at the variables that the run returns."""
        self._loss = self._driver.evaluate()

    def result(self) -> OptimizationResult:
        """Returns everything that is known now."""
        assert self.explanation is not None
        reason, message = self.explanation
        loss = self.logs.get("loss", float("nan")) if self._loss is None else self._loss
        return OptimizationResult(
            loss=loss,
            variables=tf.nest.map_structure(lambda v: np.asarray(tf_variable(v).numpy()), self._structure),
            steps=self.step,
            evaluations=int(self._state.evaluations) + (self._loss is not None),
            seconds=time.perf_counter() - self._started,
            reason=reason,
            message=message,
            history=self._records.arrays(),
        )

    def end(self) -> None:
        """Ends an epoch that was cut short and calls `on_train_end`."""
        logs = self.logs
        if self.explanation and self.explanation[0] is not StopReason.ERROR:
            self.dispatch.finish_epoch(self.step, logs)
        self.dispatch.train("on_train_end", scalars(logs))


def _number(value: Any) -> Any:
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array
