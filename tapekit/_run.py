"""One run: where it stands, and what becomes of it."""

from __future__ import annotations

import math
import os
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from tapekit._body import State
from tapekit._drivers import Advance, CompiledDriver, Driver, logger
from tapekit._memory import Memory
from tapekit._nonfinite import Rollback
from tapekit._objective import keras_variable
from tapekit._records import Records, row
from tapekit._result import OptimizationResult, StopReason
from tapekit._store import Saved, Store
from tapekit._tensors import read_variable, tf_variable, to_array
from tapekit.callbacks import Callback, Checkpoint, StopWhen
from tapekit.callbacks._at_steps import with_inner
from tapekit.callbacks._checkpoint import check_directory
from tapekit.callbacks._dispatch import Dispatch, keras_logs, without_keras_loss
from tapekit.callbacks._variables_model import VariablesModel
from tapekit.stopping import MaxIterations, NonFinite, either, statuses


class Run:
    """The state of a run on the host.

    Args:
        driver: what takes the steps.
        dispatch: what calls the hooks.
        callbacks: those that are told of the loop and the model.
        structure: the variables as the caller gave them.
        steps_per_epoch: the number of steps of an epoch.
        period: after how many steps somebody needs the host at the latest.
        live: whether the caller sees every step, so that no chunk may be longer.
        on_nonfinite: what to do at a step that is not finite.
        restore_best: whether to end with the best variables.
    """

    def __init__(
        self,
        driver: Driver,
        dispatch: Dispatch,
        callbacks: list[Any],
        structure: Any,
        steps_per_epoch: int,
        period: int,
        live: bool,
        on_nonfinite: Any,
        restore_best: bool,
    ) -> None:
        self.interrupted = False
        self.may_be_left = False
        self.verbose = 1
        self._on_nonfinite = on_nonfinite
        self._restore_best = restore_best
        self._rollbacks = 0
        self.dispatch = dispatch
        self.live = live
        self.step = 0
        self._first = 0
        self.explanation: tuple[StopReason, str] | None = None
        self._driver = driver
        self._callbacks = callbacks
        self._structure = structure
        self._steps_per_epoch = steps_per_epoch
        self._period = period
        self._records = Records()
        self._state = driver.begin()
        self._last: Advance | None = None
        self._values: Sequence[Any] = ()
        self._loss: float | None = None
        self._closed = False
        self._ended = False
        self._checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        self._memory: Any = None
        self._saved: Saved | None = None
        self._told_unsaved = False
        self._was_explained: Any = None
        self._model: Any = None
        self._started = time.perf_counter()
        self._result: OptimizationResult | None = None

    def remember(self, loop: Any, saved: Saved | None) -> None:
        """Gets ready to save checkpoints, or to go on from one.

        Args:
            loop: the loop.
            saved: what to go on from.

        Raises:
            ValueError: it is of another run.
        """
        if self._checkpoints or saved:
            self._memory = Memory(self._driver, [loop, *with_inner(self._callbacks)], *self._data())
        if saved:
            self._driver.build()
            self._memory.check(saved)
            self._saved = saved

    def _data(self) -> tuple[dict[str, Any], list[str]]:
        """Returns what describes the data, and what of it cannot be saved."""
        return {}, []

    def begin(self, loop: Any) -> None:
        """Tells the callbacks of the loop and of a model that owns the variables, and gets everyone ready."""
        self._started = time.perf_counter()
        if self._callbacks:
            variables = [keras_variable(variable) for variable in tree.flatten(self._structure)]
            self._model = VariablesModel(variables, loop.optimizer)
        for callback in self._callbacks:
            if isinstance(callback, Callback):
                callback.loop = loop
            callback.set_model(self._model)
            callback.set_params({"epochs": self._epochs, "steps": self._steps_per_epoch, "verbose": self.verbose})
        self._begin_training()
        if self._model is not None and self._model._initial_epoch:
            self._go_on(self._model._initial_epoch * self._steps_per_epoch)
        self._driver.prepare(self._period)
        if self._saved:
            self._resume(self._saved)

    def _begin_training(self) -> None:
        if self._saved:
            self._memory.before_begin(self._saved)
        self._driver.body.step.reset()
        self.dispatch.train("on_train_begin")

    @property
    def _limits(self) -> list[MaxIterations]:
        return [criterion for criterion in self._driver.body.criteria if isinstance(criterion, MaxIterations)]

    @property
    def _epochs(self) -> float:
        """The number of the last epoch, as far as it is known before."""
        return min((-(-limit.n // self._steps_per_epoch) for limit in self._limits), default=math.inf)

    def _go_on(self, step: int) -> None:
        """Counts on from the last step of a run that was broken off."""
        self.step = self._first = step
        self._state = self._driver.begin(self._driver.body.initial._replace(step=np.asarray(step)))
        self._check_limits()

    def _check_limits(self) -> None:
        """Ends the run at once if it has come as far as it may."""
        for limit in self._limits:
            if self.step >= limit.n:
                self.explanation = limit.explain(None, {"step": self.step})

    def _resume(self, saved: Saved) -> None:
        """Goes on from a checkpoint."""
        progress = self._memory.progress(saved)
        if isinstance(self._driver, CompiledDriver):
            self._driver.jit = progress["jit"]
        self._reenter(progress)
        self._memory.restore(saved)
        self.step, self._first = progress["step"], progress["first"]
        self._started = time.perf_counter() - progress["seconds"]
        self._rollbacks = progress["rollbacks"]
        step, evaluations, nonfinite, best = progress["state"]
        criteria = restored(self._driver.body.initial.criteria, self._driver.body.criteria, progress["criteria"])
        state = State(step, evaluations, nonfinite, best, criteria)
        self._state = self._driver.begin(tree.map_structure(_like, self._driver.body.initial, state))
        self._records.extend(progress["history"], self.step - self._first)
        if progress["last"] is not None:
            columns = {name: np.asarray(value)[None] for name, value in progress["last"].items()}
            self._last = Advance(self._state, 1, 0, evaluations, columns, progress["loss"])
        ended = progress["ended"]
        if ended and ended["criteria"] == self._ending():
            self.explanation = self._was_explained = StopReason[ended["reason"]], ended["message"]
        else:
            self._check_limits()
        logger.info("goes on after step %d, from %s.", self.step, saved.path)

    def _reenter(self, progress: dict[str, Any]) -> None:
        """Calls the hooks that come before the middle of an epoch."""
        self.dispatch.reenter(progress["step"])

    def _progress(self) -> dict[str, Any]:
        """Returns how far the run has come, in plain data and arrays."""
        state, last = self._driver.read(self._state), self._last
        ended = None
        if self.explanation and not self.live:
            ended = {"reason": self.explanation[0].name, "message": self.explanation[1], "criteria": self._ending()}
        return {
            "step": self.step,
            "first": self._first,
            "seconds": time.perf_counter() - self._started,
            "rollbacks": self._rollbacks,
            "jit": isinstance(self._driver, CompiledDriver) and self._driver.jit,
            "state": list(state[:-1]),
            "criteria": [
                [type(criterion).__name__, tree.flatten(leaves)]
                for criterion, leaves in zip(self._driver.body.criteria, state.criteria, strict=True)
            ],
            "history": self._records.arrays(),
            "last": last and {name: values[last.taken - 1] for name, values in last.columns.items()},
            "loss": last and last.loss,
            "ended": ended,
        }

    def _ending(self) -> list[str]:
        """Returns what ends the run, in words: one that had ended goes on if that has changed."""
        return [repr(criterion) for criterion in self._driver.body.criteria]

    def save_if_due(self) -> None:
        """Makes the checkpoints that are due; called when all hooks of the last step have run."""
        if self.explanation is None:
            self._save([checkpoint for checkpoint in self._checkpoints if checkpoint.due])

    def _save(self, checkpoints: list[Checkpoint]) -> None:
        for checkpoint in checkpoints:
            checkpoint.save(self.step, lambda: self._memory.take(self._progress(), self.logs.get("loss", math.nan)))
        if checkpoints and not self._told_unsaved:
            self._told_unsaved = True
            if unsaved := self._memory.unsaved():
                logger.warning("a run that goes on from these checkpoints may differ in %s.", "; ".join(unsaved))

    def steps_to_next_edge(self) -> int:
        """Returns how many steps may be taken before somebody needs the host."""
        return self.dispatch.steps_to_edge(self.step, 1 if self.live else self._driver.limit())

    def advance(self, limit: int) -> Advance:
        """Takes up to `limit` steps and keeps their records."""
        self._values = ()  # which these steps change, also if they are broken off
        chunk = self._driver.advance(self._state, limit, time.perf_counter() - self._started)
        self._keep(chunk)
        return chunk

    def _keep(self, chunk: Advance) -> None:
        self._state, self._values = chunk.state, chunk.values
        if chunk.taken:
            self._records.extend(without_keras_loss(chunk.columns), chunk.taken)
            self.step += chunk.taken
            self._last = chunk

    def changes(self) -> list[Any]:
        """Returns what no other run may change meanwhile: the variables and the optimizer."""
        variables = [tf_variable(variable) for variable in self._driver.body.variables]
        return [self._driver.body.updater.optimizer, *variables]

    def heed_interrupt(self) -> None:
        """Raises `KeyboardInterrupt` if Ctrl-C or SIGTERM has asked for it."""
        if self.interrupted:
            if not self._ended:
                self._save(self._checkpoints)
            raise KeyboardInterrupt

    def judge(self, chunk: Advance) -> int:
        """Returns the criteria that end the run after a chunk, a bit each; rolls back where that goes before."""
        if chunk.finite:
            return chunk.fired
        best = self._driver.read(chunk.state).best
        policy = self._on_nonfinite
        if isinstance(policy, Rollback) and self._rollbacks < policy.times and math.isfinite(best):
            self._roll_back(policy, best, chunk)
            return chunk.fired & ~1
        if policy == "skip" and self._driver.read(chunk.state).nonfinite == 1:
            logger.warning("step %d was not finite (%s): skipped, as all like it.", self.step, self._last_words())
        return chunk.fired

    def _last_words(self) -> str:
        """Returns what was not finite in the last step."""
        return NonFinite().message((), self._criterion_logs())

    def _criterion_logs(self) -> dict[str, Any]:
        assert self._last is not None
        state = self._driver.read(self._last.state)
        known = {"step": self.step, "evaluations": state.evaluations, "culprits": _listed(self._last.culprits)}
        return without_keras_loss(self.logs) | known

    def _roll_back(self, policy: Rollback, best: float, chunk: Advance) -> None:
        self._rollbacks += 1
        rate = self._driver.body.updater.learning_rate
        smaller = rate * policy.factor  # of the present one, since that of the best may have failed before
        for variable, value in self._driver.body.best:
            variable.assign(value)
        rate.assign(smaller)
        logger.warning(
            "step %d was not finite (%s): rolled back to the best loss %.6g, learning rate now %.3g (%d of %d times).",
            *(self.step, self._last_words(), best, float(rate), self._rollbacks, policy.times),
        )

    def evaluate(self) -> float:
        """Returns the loss at the present variables."""
        return self._driver.evaluate()

    @property
    def logs(self) -> dict[str, Any]:
        """What is known of the last step."""
        return {} if self._last is None else row(self._last.columns, self._last.taken - 1)

    @property
    def model_stopped(self) -> bool:
        """Whether a Keras callback has set `model.stop_training`."""
        return self._model is not None and self._model.stop_training

    def explain(self, fired: int) -> None:
        """Asks the criteria that have ended the run, a bit each, for the reason."""
        assert self._last is not None
        state = self._driver.read(self._last.state)
        logs = self._criterion_logs()
        pairs = enumerate(zip(self._driver.body.criteria, state.criteria, strict=True))
        tell_stop_when(self._callbacks, self._driver.body.criteria, state.criteria, fired, logs)
        self.explanation = either([criterion.explain(s, logs) for bit, (criterion, s) in pairs if fired >> bit & 1])

    def status(self) -> dict[str, Any]:
        """Returns where the run stands; see `OptimizationLoop.status`."""
        criteria = []
        if self._last is not None:
            states = self._driver.read(self._state).criteria
            criteria = statuses(self._driver.body.criteria, states, self._criterion_logs())
        seconds = time.perf_counter() - self._started
        return {"seconds": seconds, "criteria": criteria, "epoch": None, "batch": None}

    def stopped(self, why: str) -> None:
        """Notes that a hook or the caller has ended the run, unless it has ended already."""
        self.explanation = self.explanation or (StopReason.STOPPED, f"stopped at step {self.step}: {why}")

    @property
    def result(self) -> OptimizationResult:
        """What `conclude` has returned."""
        assert self._result is not None
        return self._result

    def conclude(self) -> OptimizationResult:
        """Makes the result from everything that is known now."""
        assert self.explanation is not None
        reason, message = self.explanation
        state = self._driver.read(self._state)
        if state.nonfinite and self._on_nonfinite == "skip":
            message += f"; {state.nonfinite} steps that were not finite were skipped"
        if self._rollbacks:
            message += f"; rolled back {self._rollbacks} times"
        loss = self.logs.get("loss", float("nan")) if self._loss is None else self._loss
        best_loss = best_variables = None
        if self._driver.body.keeps_best:
            best_loss, best_variables = self._best(state.best)
            if self._restore_best and math.isfinite(best_loss):
                loss = best_loss
        self._result = OptimizationResult(
            loss=loss,
            variables=self._variables(),
            best_loss=best_loss,
            best_variables=best_variables,
            steps=self.step - self._first,
            evaluations=(0 if self._last is None else self._last.evaluations) + (self._loss is not None),
            seconds=time.perf_counter() - self._started,
            reason=reason,
            message=message,
            history=self._records.arrays(),
        )
        logger.info("%d steps in %.3g s: %s", self._result.steps, self._result.seconds, message)
        return self._result

    def _variables(self) -> Any:
        """Returns what the variables are now, in the structure in which they were given."""
        if not self._values or self._may_have_changed:
            return _arrays(self._structure)
        ids = [id(tf_variable(variable)) for variable in self._driver.body.variables]
        return _arrays(self._structure, dict(zip(ids, self._values, strict=True)))

    def _best(self, lowest: float) -> tuple[float, Any]:
        """Returns the lowest finite loss and the variables that have it, which get them if that is wanted."""
        last = math.nan if self._loss is None else self._loss
        if math.isfinite(last) and last < lowest:
            return last, self._variables()
        if not math.isfinite(lowest):
            return math.nan, self._variables()
        best = {id(variable): value for variable, value in self._driver.body.best}
        if self._restore_best:
            self._values = ()
            for variable, value in self._driver.body.best:
                variable.assign(value)
        return lowest, _arrays(tree.map_structure(lambda v: best.get(id(tf_variable(v)), v), self._structure))

    def break_off(self) -> None:
        """Ends a run that Ctrl-C or SIGTERM has asked to end, unless it had ended by itself."""
        if self._ended:
            return
        self.explanation = StopReason.INTERRUPTED, f"interrupted after step {self.step}"
        if not self._closed:
            self.end()

    def end(self) -> None:
        """Ends an epoch that was cut short, calls `on_train_end`, and evaluates the loss of the result."""
        logs = self.logs
        self._save_at_end()
        self.dispatch.finish_epoch(self.step, logs)
        self._close(logs)
        known = None if self._last is None or self._may_have_changed else self._last.loss
        self._loss = self._driver.evaluate() if known is None else known
        self._ended = True

    @property
    def _may_have_changed(self) -> bool:
        """Whether a hook, or the caller between two steps, may have changed the variables since the last step."""
        return self.live or self.dispatch.can_change

    def _save_at_end(self) -> None:
        assert self.explanation is not None
        if self.step and self.explanation[0] is not StopReason.INTERRUPTED and self.explanation != self._was_explained:
            self._save(self._checkpoints)

    def fail(self, error: BaseException) -> None:
        """Notes the exception that has ended the run, and lets everyone close what is open."""
        self.explanation = StopReason.ERROR, f"{type(error).__name__} after step {self.step}: {error}"
        if not self._closed:
            try:
                self._close(self.logs)
            except Exception:  # the first error is the one that the user must see
                logger.exception("on_train_end has raised too, after the error that ended the run:")

    def _close(self, logs: dict[str, Any]) -> None:
        self._closed = True
        broken_off = self.explanation is not None and self.explanation[0] in (StopReason.ERROR, StopReason.INTERRUPTED)
        self.dispatch.train("on_train_end", keras_logs(logs), broken_off)


def saved_run(resume_from: Any, callbacks: Sequence[Any]) -> Saved | None:
    """Returns what a run goes on from; `None` if it begins anew.

    Args:
        resume_from: a directory of checkpoints, or `None`.
        callbacks: those of the run, of which one may save there.
    """
    if resume_from is None:
        return None
    directory = check_directory(resume_from, "resume_from")
    if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
        raise ValueError(
            "`resume_from` must be None beside BackupAndRestore, which goes on by itself; use one of them."
        )
    saved = Store(directory).newest()
    places = [os.path.realpath(callback.directory) for callback in callbacks if isinstance(callback, Checkpoint)]
    if not saved and os.path.realpath(directory) not in places:
        raise ValueError(
            f"`resume_from` must be a directory with checkpoints, or one where a Checkpoint of this run saves them,"
            f" received {directory!r}, which has none."
        )
    return saved


def restored(initial: Sequence[Any], criteria: Sequence[Any], saved: Sequence[Any]) -> list[Any]:
    """Returns the states of criteria from those that were saved, matched by kind; others begin anew.

    Args:
        initial: the states at the beginning.
        criteria: the criteria.
        saved: pairs of the name of a kind and the leaves of a state.
    """
    left, states = list(saved), []
    for start, criterion in zip(initial, criteria, strict=True):
        count = len(tree.flatten(start))
        match = next((item for item in left if item[0] == type(criterion).__name__ and len(item[1]) == count), None)
        if match:
            left.remove(match)
        states.append(tree.pack_sequence_as(start, match[1]) if match else start)
    return states


def _like(start: Any, value: Any) -> np.ndarray:
    return np.asarray(value, start.dtype)


def _listed(culprits: dict[str, str]) -> str:
    """Returns which gradients were not finite, in words."""
    first = ", ".join(f"{name} ({count} entries)" for name, count in list(culprits.items())[:_LISTED])
    rest = len(culprits) - _LISTED
    return first + (f" and {rest} more" if rest > 0 else "")


_LISTED = 5


def _arrays(structure: Any, values: Mapping[int, Any] = types.MappingProxyType({})) -> Any:
    """Returns the arrays of variables, whose `values` may be known already, by their ids."""
    if type(structure) is list:  # as nearly always, and far sooner done than by what knows all structures
        return [_arrays(part, values) for part in structure]

    def array(variable: Any) -> np.ndarray:
        value = values.get(id(tf_variable(variable)))
        return to_array(read_variable(tf_variable(variable)) if value is None else value).copy()

    return tree.map_structure(array, structure)


def tell_stop_when(callbacks: Any, criteria: Any, states: Any, fired: int, logs: dict[str, Any]) -> None:
    """Leaves the reason and the sentence on the `StopWhen` callbacks whose criteria have fired, a bit each."""
    for bit, (criterion, state) in enumerate(zip(criteria, states, strict=True)):
        for callback in callbacks:
            if fired >> bit & 1 and isinstance(callback, StopWhen) and callback.criterion is criterion:
                callback.reason, callback.message = criterion.explain(state, logs)
