"""The optimization loop: a run from its first check to its result."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tapekit import callbacks as _callbacks
from tapekit import steps as _steps
from tapekit import stopping as _stopping
from tapekit._arguments import callback_list, check_count, check_measures, identity
from tapekit._body import StepBody
from tapekit._config import Configurable
from tapekit._describe import check_integer, check_real, describe
from tapekit._drivers import Driver, make_driver
from tapekit._fit import FitArguments, FitRun, keras_defaults
from tapekit._interrupts import claimed, heard_by
from tapekit._model import (
    ModelObjective,
    build_model,
    check_model,
    check_step,
    compile_model,
    jit_compile_for,
    needs_scaling,
    step_for,
    updater_for,
)
from tapekit._nonfinite import Rollback, check_on_nonfinite
from tapekit._objective import Objective, check_variables, required_arguments
from tapekit._optimizers import Updater
from tapekit._result import NonFiniteError, OptimizationResult, StopReason
from tapekit._run import Run, saved_run
from tapekit._tensors import KerasVariable
from tapekit.callbacks._at_steps import with_inner
from tapekit.callbacks._base import Hooks
from tapekit.callbacks._dispatch import Dispatch, overridden
from tapekit.callbacks._variables_model import check_callbacks

_REMEMBERED_PROGRAMS = 8
_RUNNING = "this loop is running already; make another OptimizationLoop for a run inside a run."


class OptimizationLoop(Hooks, Configurable):
    """A loop of optimization steps with hooks, criteria and a result that says why it stopped.

    It is used as it is, with callbacks, or subclassed: it has the hooks of a callback (`on_step`,
    `on_gradient`, `on_train_begin`, ...), which run before those of the callbacks.

    Args:
        optimizer: a `keras.optimizers.Optimizer`, its name or configuration; a `tf_keras` one; or any
            object with `apply_gradients`. `None` leaves it to the models that are compiled with one.
        step: the step strategy, its name or configuration: `TapeStep()` or `MinimizeStep()`, which give
            the same numbers bit for bit, or a `Step` of your own.
        stopping: a criterion, or a list of which any one stops.
        callbacks: tapekit's and Keras's callbacks, mixed, by name too, and functions `f(step, logs)`.
        tolerance: short for `stopping.LossChangeBelow(tolerance)`; in units of the loss.
        max_iterations: short for `stopping.MaxIterations(max_iterations)`.
        measures: what to record at every step inside the graph: a dict of functions of no arguments, or
            of the list of gradients, that return a tensor of any fixed shape. They see the variables
            after the update.
        run_eagerly: run every op from Python, for debugging.
        jit_compile: `True` for XLA, `False` for graphs; `"auto"` for XLA, or a graph where XLA cannot
            compile the step, would change its numbers, or is slower: the logger `tapekit` says so.
        steps_per_execution: the largest number of steps between two looks of the host; `"auto"` lets the
            host look about twenty times a second, or after up to four steps that are slow.
        on_nonfinite: what happens at a step whose loss or gradient is NaN or infinite, which never changes
            variables or slots: "stop" ends the run; "raise" ends it and raises `NonFiniteError`; "skip" goes
            on and records how many there were as "nonfinite"; "rollback", or a `Rollback`, goes back to the
            best variables with a smaller learning rate, a few times.
        keep_best: whether to keep the variables with the lowest finite loss, for `result.best_variables`;
            `None` means True in `minimize` and `steps`, and False in `fit`, whose losses are of batches.
        interrupt: what follows Ctrl-C or SIGTERM, which end the run after the steps in flight: "raise"
            lets `KeyboardInterrupt` go on to the caller, "return" returns the result. A second one leaves at once.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument has a wrong value, or the step does not provide what is asked of it.

    Example:
        >>> import keras, tapekit as tk, tensorflow as tf
        >>> x = tf.Variable(0.0)
        >>> loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), tolerance=1e-6, max_iterations=100)
        >>> result = loop.minimize(lambda: (x - 4.0) ** 2, [x])
        >>> result.converged, result.steps, round(result.variables[0].item(), 3)
        (True, 14, 4.0)
        >>> result.message
        'LossChangeBelow: the loss changed by 7.15e-07 at step 14, at most the tolerance 1e-06 (atol=1e-06, rtol=0)'
    """

    result: OptimizationResult | None
    """The result of the last run; `None` before the first and during a run."""

    def __init__(
        self,
        optimizer: Any = None,
        step: Any = "tape",
        stopping: Any = None,
        callbacks: Any = None,
        tolerance: float | None = None,
        max_iterations: int | None = None,
        measures: Mapping[str, Callable[..., Any]] | None = None,
        run_eagerly: bool = False,
        jit_compile: bool | str = "auto",
        steps_per_execution: int | str = "auto",
        on_nonfinite: Any = "stop",
        keep_best: bool | None = None,
        interrupt: str = "raise",
    ) -> None:
        self._updater = None if optimizer is None else Updater(optimizer)
        self.optimizer = None if self._updater is None else self._updater.optimizer
        self._scaled: Any = None
        self.step = _steps.get(step)
        self.stopping = None if stopping is None else _stopping.get(stopping)
        self.callbacks = callback_list(callbacks)
        self.tolerance = None if tolerance is None else check_real(tolerance, "tolerance", 0)
        self.max_iterations = None if max_iterations is None else check_integer(max_iterations, "max_iterations", 1)
        self.measures = check_measures(measures)
        if not isinstance(run_eagerly, bool):
            raise TypeError(f"`run_eagerly` must be True or False, received {describe(run_eagerly)}.")
        self.run_eagerly = run_eagerly
        if jit_compile not in (True, False, "auto"):
            raise ValueError(f'`jit_compile` must be True, False or "auto", received {describe(jit_compile)}.')
        self.jit_compile = jit_compile
        if steps_per_execution != "auto":
            check_integer(steps_per_execution, "steps_per_execution", 1)
        self.steps_per_execution = steps_per_execution
        self.on_nonfinite = check_on_nonfinite(on_nonfinite)
        if keep_best not in (True, False, None):
            raise TypeError(f"`keep_best` must be True, False or None, received {describe(keep_best)}.")
        if keep_best is False and isinstance(self.on_nonfinite, Rollback):
            raise ValueError('`keep_best` must not be False with on_nonfinite="rollback", which goes back to the best.')
        self.keep_best = keep_best
        if interrupt not in ("raise", "return"):
            raise ValueError(f'`interrupt` must be "raise" or "return", received {describe(interrupt)}.')
        self.interrupt = interrupt
        self.result = None
        self._criteria = self._all_criteria()
        self._check_step_provides(self.callbacks)
        self._programs: dict[Any, Driver] = {}
        self._lock = threading.Lock()
        self._stop_message: str | None = None
        self._current: Run | None = None
        self._not_state = frozenset({*vars(self), "_not_state"})

    def minimize(
        self,
        loss: Callable[[], Any],
        variables: Any = None,
        callbacks: Any = None,
        steps_per_epoch: int = 1,
        *,
        allow_unused: bool = False,
        restore_best: bool = False,
        resume_from: Any = None,
        verbose: int | str = "auto",
    ) -> OptimizationResult:
        """Minimizes a function over variables.

        Args:
            loss: a function of no arguments that returns a scalar tensor of any float dtype, or
                `(scalar, {"name": scalar})`, whose extra values go to the logs and the history.
            variables: `tf.Variable` and `keras.Variable` of any float dtypes, mixed, in lists or dicts;
                `None` means those that the loss reads.
            callbacks: callbacks for this run, called after those of the loop.
            steps_per_epoch: how many steps Keras callbacks see as an epoch.
            allow_unused: let variables pass on which the loss does not depend; they stay as they are.
            restore_best: end with the variables of the lowest finite loss rather than the last ones,
                whichever way the run ends.
            resume_from: the directory of a `callbacks.Checkpoint`, from whose newest whole checkpoint the run goes
                on; the result is that of the whole run. Where there is none yet, the run begins anew if one of
                its callbacks saves there. A run that had ended is not gone on with unless its criteria have changed.
            verbose: 1 for a line that lives and 2 for plain lines by `callbacks.Progress`, 0 for silence of that and
                of Keras's `ProgbarLogger`; "auto" leaves it to the callbacks.

        Returns:
            The `OptimizationResult`, which is `self.result` too.

        Raises:
            NonFiniteError: a loss or gradient is not finite, and `on_nonfinite` is "raise".
            TypeError: `loss`, a variable or a callback is of the wrong kind.
            ValueError: the loss is not a scalar or does not depend on a variable, nothing would end the run, or
                `resume_from` holds nothing, or checkpoints that are damaged or of another run.
            RuntimeError: the loop runs already, or is called inside a `tf.function`.

        Example:
            >>> import keras, tapekit as tk, tensorflow as tf
            >>> x, y = tf.Variable(1.0), keras.Variable([1.0, 2.0])
            >>> loop = tk.OptimizationLoop("adam", max_iterations=10)
            >>> loop.minimize(lambda: x**2 + tf.reduce_sum(y**2), {"x": x, "y": y}).variables["y"].shape
            (2,)
        """
        if verbose not in (0, 1, 2, "auto"):
            raise ValueError(f'`verbose` must be 0, 1, 2 or "auto", received {describe(verbose)}.')
        shown = callback_list(callbacks)
        if verbose in (1, 2) and not any(isinstance(c, _callbacks.Progress) for c in (*self.callbacks, *shown)):
            shown = [*shown, _callbacks.Progress()]
        run = self._prepare(loss, variables, shown, steps_per_epoch, allow_unused, restore_best, resume_from)
        run.verbose = 1 if verbose == "auto" else int(verbose)
        with self._running(run):
            while run.explanation is None:
                self._advance(run)
        return self._outcome(run)

    def steps(
        self,
        loss: Callable[[], Any],
        variables: Any = None,
        callbacks: Any = None,
        steps_per_epoch: int = 1,
        *,
        allow_unused: bool = False,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Gives the steps of the same run one by one, with the control in the caller's hands.

        `break` ends the run cleanly. Afterwards `loop.result` holds the rest.

        Args:
            loss: see `minimize`.
            variables: see `minimize`.
            callbacks: see `minimize`.
            steps_per_epoch: see `minimize`.
            allow_unused: see `minimize`.

        Yields:
            The step, from 1, and its logs. The variables are those of that step.

        Raises:
            TypeError: see `minimize`.
            ValueError: see `minimize`.
            RuntimeError: see `minimize`.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x = tf.Variable(0.0)
            >>> loop = tk.OptimizationLoop("sgd")
            >>> for step, logs in loop.steps(lambda: (x - 4.0) ** 2, [x]):
            ...     if logs["loss"] < 15.0:
            ...         break
            >>> loop.result.steps, loop.result.message
            (3, 'stopped at step 3: the caller left the loop')
        """
        return self._iterate(self._prepare(loss, variables, callbacks, steps_per_epoch, allow_unused, live=True))

    def _iterate(self, run: Run) -> Iterator[tuple[int, dict[str, Any]]]:
        with self._running(run):
            while run.explanation is None:
                before = run.step
                self._advance(run)
                if run.step > before:
                    run.may_be_left = True
                    yield run.step, run.logs
                    run.may_be_left = False
        self._outcome(run)

    def fit(
        self,
        model: Any,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool | str = True,
        class_weight: Any = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | list[int] = 1,
        *,
        loss: Any = None,
        metrics: Any = None,
        device_bytes: int = 1 << 30,
        restore_best: bool = False,
        resume_from: Any = None,
    ) -> OptimizationResult:
        """Trains a Keras model as its own `fit` does, with the criteria, hooks and speed of this loop.

        The arguments up to `validation_freq` are those of `keras.Model.fit`, and so are the numbers: the
        same weights and epoch logs with `shuffle=False`. What the model was compiled with is honoured; an
        optimizer that this loop was given, `run_eagerly`, `jit_compile` and `steps_per_execution` come
        first. Arrays are put on the device once and cut into batches inside the compiled steps; all else
        is streamed. A model that overrides `train_step` is run through it.

        Args:
            model: a `keras.Model`.
            x: inputs: arrays, tensors or pandas objects of shape (samples, ...), dicts or lists of them, a
                `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator of batches.
            y: targets of shape (samples, ...), or dicts or lists of them, if `x` does not bring them.
            batch_size: samples a batch; 32 if it is `None`.
            epochs: the number of the last epoch.
            verbose: 0 for silence, 1 for a progress bar, 2 for a line an epoch, "auto" for 1.
            callbacks: callbacks for this run, called after those of the loop.
            validation_split: the share of the samples at the end that is used for validation.
            validation_data: `(x, y)`, `(x, y, sample_weight)` or a dataset, evaluated after epochs; not shuffled.
            shuffle: whether arrays are shuffled before each epoch; "batch" does so within batches.
            class_weight: a dict of the weights of classes in the loss, by their integers.
            sample_weight: the weight of each sample in the loss, of shape (samples,), or one for each output.
            initial_epoch: how many epochs came before.
            steps_per_epoch: batches an epoch; `None` for a whole pass over the data.
            validation_steps: batches a validation; `None` for all.
            validation_batch_size: samples a batch of the validation; `None` for `batch_size`.
            validation_freq: after how many epochs, or a list of the epochs (from 1) after which, to validate.
            loss: the loss with which a model that is not compiled is compiled.
            metrics: the metrics with which a model that is not compiled is compiled.
            device_bytes: arrays of more bytes in all are streamed rather than put on the device.
            restore_best: end with the weights before the batch of the lowest finite loss rather than the last ones.
            resume_from: see `minimize`; the run goes on in the middle of its epoch, with the batches that were left.

        Returns:
            The `OptimizationResult`: `history` has a row a step with the loss of that very batch,
            `epoch_history` a row an epoch with Keras's names and values. `variables` are the trainable ones.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: an argument has a wrong value, the model is not compiled and no `loss` is given, the
                step strategy and the model's own `train_step` exclude each other, or `resume_from` holds nothing, or
                checkpoints that are damaged or of another run.
            RuntimeError: the loop runs already, or is called inside a `tf.function`.
            NonFiniteError: a loss or gradient is not finite, and `on_nonfinite` is "raise".

        Example:
            >>> import keras, numpy as np, tapekit as tk
            >>> x = np.linspace(-1.0, 1.0, 64, dtype="float32")[:, None]
            >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
            >>> model.compile(keras.optimizers.SGD(0.2), "mse")
            >>> loop = tk.OptimizationLoop(stopping=tk.stopping.LossBelow(1e-4))
            >>> result = loop.fit(model, x, 3.0 * x + 1.0, epochs=100, verbose=0)
            >>> result.converged, result.history["loss"].shape == (result.steps,)
            (True, True)
        """
        run = self._prepare_fit(
            model,
            callbacks,
            FitArguments(
                x=x,
                y=y,
                batch_size=batch_size,
                epochs=epochs,
                verbose=verbose,
                validation_split=validation_split,
                validation_data=validation_data,
                shuffle=shuffle,
                class_weight=class_weight,
                sample_weight=sample_weight,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_batch_size=validation_batch_size,
                validation_freq=validation_freq,
                device_bytes=device_bytes,
            ),
            loss,
            metrics,
            restore_best,
            resume_from,
        )
        with self._running(run):
            for _ in run.epochs():
                while run.in_epoch:
                    self._advance(run)
                run.end_epoch()
                self._heed_stop(run)
        return self._outcome(run)

    def stop(self, reason: str = "a hook asked for it") -> None:
        """Ends the run, from any hook; one that is live stops it at that very step.

        Args:
            reason: what the result's message says.

        Raises:
            RuntimeError: the loop is not running.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x, loop = tf.Variable(0.0), tk.OptimizationLoop("sgd", max_iterations=100)
            >>> stop_at_5 = tk.callbacks.FunctionCallback(lambda step, logs: loop.stop("enough"), every=5)
            >>> loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[stop_at_5]).message
            'stopped at step 5: enough'
        """
        if not self._lock.locked():
            raise RuntimeError("stop must be called from a hook of a running loop; this loop is not running.")
        self._stop_message = str(reason)

    def evaluate(self) -> float:
        """Evaluates the loss at the present variables, from a hook of a running loop. It is not counted.

        Returns:
            The loss.

        Raises:
            RuntimeError: the loop is not running.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x, loop = tf.Variable(0.0), tk.OptimizationLoop("sgd", max_iterations=1)
            >>> after = []
            >>> callback = tk.callbacks.FunctionCallback(lambda step, logs: after.append(loop.evaluate()))
            >>> loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[callback]).loss == after[0]
            True
        """
        if self._current is None:
            raise RuntimeError("evaluate must be called from a hook of a running loop; this loop is not running.")
        return self._current.evaluate()

    def status(self) -> dict[str, Any]:
        """Returns where the running loop stands, for hooks that show it.

        Returns:
            A dict: `"seconds"` since the run began; `"criteria"`, a list of `stopping.Status`; in a `fit` the numbers
            of the `"epoch"` and of the `"batch"` in it, else `None`.

        Raises:
            RuntimeError: the loop is not running.

        Example:
            >>> import tapekit as tk, tensorflow as tf
            >>> x, loop = tf.Variable(0.0), tk.OptimizationLoop("sgd", max_iterations=4)
            >>> show = tk.callbacks.FunctionCallback(lambda step, logs: print(loop.status()["criteria"][0].share))
            >>> result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[show])
            0.25
            0.5
            0.75
            1.0
        """
        if self._current is None:
            raise RuntimeError("status must be called from a hook of a running loop; this loop is not running.")
        return self._current.status()

    def _outcome(self, run: Run) -> OptimizationResult:
        """Returns the result of a run, or raises if it ended at a number that is not finite and that is wanted."""
        if self.on_nonfinite == "raise" and run.result.reason is StopReason.NOT_FINITE:
            raise NonFiniteError(run.result)
        return run.result

    def _advance(self, run: Run) -> None:
        """Takes the steps up to the next one at which somebody needs the host."""
        run.heed_interrupt()
        if self._heed_stop(run):
            return
        run.dispatch.before(run.step + 1)
        if self._heed_stop(run):
            return
        chunk = run.advance(run.steps_to_next_edge())
        if chunk.taken:
            run.dispatch.after(run.step - chunk.taken + 1, chunk.taken, chunk.columns)
        if chunk.error:
            raise chunk.error
        if fired := run.judge(chunk):
            run.explain(fired)
        self._heed_stop(run)
        run.save_if_due()

    def _heed_stop(self, run: Run) -> bool:
        """Ends the run if a hook has asked for it, unless it has ended already."""
        asked = self._stop_message is not None or run.model_stopped
        if asked:
            run.stopped(self._stop_message or "a callback set model.stop_training")
        return asked

    @contextlib.contextmanager
    def _running(self, run: Run) -> Iterator[None]:
        """Begins and ends a run. Whichever way it is left, everyone hears of the end and `result` is set."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(_RUNNING)
        try:
            with claimed(run.changes()):
                yield from self._watch(run)
        finally:
            self._lock.release()

    def _watch(self, run: Run) -> Iterator[None]:
        self._stop_message = None
        self.result = None
        self._current = run
        try:
            with heard_by(run):
                run.begin(self)
                yield
                run.end()
                run.heed_interrupt()
        except GeneratorExit:
            run.stopped("the caller left the loop")
            run.end()
            raise
        except KeyboardInterrupt:
            run.break_off()
            if self.interrupt == "raise":
                raise
        except BaseException as error:
            run.fail(error)
            raise
        finally:
            self._current = None
            self.result = run.conclude()

    def _check_can_run(self) -> None:
        if not tf.executing_eagerly():
            raise RuntimeError("a loop must be run from Python, outside of any tf.function, which it compiles itself.")
        if self._lock.locked():
            raise RuntimeError(_RUNNING)

    def _prepare(
        self,
        loss: Any,
        variables: Any,
        callbacks: Any,
        steps_per_epoch: int,
        allow_unused: bool,
        restore_best: bool = False,
        resume_from: Any = None,
        live: bool = False,
    ) -> Run:
        self._check_can_run()
        if self._updater is None:
            raise ValueError("`optimizer` must be given to the loop for a function to be minimized, received None.")
        objective = Objective(loss)
        given = None if variables is None else check_variables(variables)
        extra = callback_list(callbacks)
        self._check_step_provides(extra)
        owners = [*self.callbacks, *extra]
        check_callbacks(with_inner(owners), self.optimizer)
        saved = saved_run(resume_from, owners)
        dispatch = Dispatch([self, *owners], check_integer(steps_per_epoch, "steps_per_epoch", 1))
        if not (live or self._criteria_of(owners)[1:] or dispatch.can_stop):
            raise ValueError(
                "`max_iterations`, `tolerance`, `stopping` or a callback must end the run, received none of them."
            )
        self._check_on_nonfinite(self._updater, self._criteria_of(owners), live or dispatch.can_stop)
        keeps_best = self._keeps_best(True, restore_best)
        names = None if given is None else tuple(id(variable) for variable in given)
        driver = self._program(
            (objective.function, given),
            (identity(objective.function), names, allow_unused),
            dispatch,
            self._criteria_of(owners),
            lambda: (objective, self._updater, given or [], self.step, allow_unused),
            self.run_eagerly,
            self.jit_compile,
            keeps_best,
        )
        limits = [part.n for part in driver.body.criteria if isinstance(part, _stopping.MaxIterations)]
        period = 1 if live else dispatch.period(min(limits, default=1 << 62))
        structure = list(driver.body.variables) if variables is None else variables
        if isinstance(structure, (tf.Variable, KerasVariable)):
            structure = [structure]
        run = Run(driver, dispatch, owners, structure, steps_per_epoch, period, live, self.on_nonfinite, restore_best)
        run.remember(self, saved)
        return run

    def _keeps_best(self, default: bool, restore_best: bool) -> bool:
        """Returns whether a run keeps the best variables."""
        if not isinstance(restore_best, bool):
            raise TypeError(f"`restore_best` must be True or False, received {describe(restore_best)}.")
        if restore_best and self.keep_best is False:
            raise ValueError("`restore_best` must be False in a loop with keep_best=False, received True.")
        return restore_best or (default if self.keep_best is None else self.keep_best)

    def _check_on_nonfinite(self, updater: Updater, criteria: list[_stopping.Criterion], can_stop: bool) -> None:
        """Raises if a run could never end, or could not be rolled back."""
        if isinstance(self.on_nonfinite, Rollback) and not hasattr(updater.learning_rate, "assign"):
            raise ValueError(
                '`optimizer` must have a learning_rate that can be set, not a schedule, for on_nonfinite="rollback",'
                f" received {describe(updater.optimizer)}."
            )
        parts = [part for criterion in criteria[1:] for part in criterion.parts()]
        limits = [part for part in parts if part.reason is not StopReason.CONVERGED]
        if self.on_nonfinite == "skip" and not (limits or can_stop):
            raise ValueError(
                '`max_iterations` or another limit must be given with on_nonfinite="skip", since a loss that stays NaN'
                " never converges, received none."
            )

    def _criteria_of(self, callbacks: list[Any]) -> list[_stopping.Criterion]:
        """Returns the criteria of a run: those of the loop, and of `StopWhen` among its callbacks."""
        more = [callback.criterion for callback in callbacks if isinstance(callback, _callbacks.StopWhen)]
        return check_count([*self._criteria, *more])

    def _prepare_fit(
        self,
        model: Any,
        callbacks: Any,
        arguments: FitArguments,
        loss: Any,
        metrics: Any,
        restore_best: bool,
        resume_from: Any,
    ) -> FitRun:
        self._check_can_run()
        check_model(model, loss, self.optimizer)
        check_step(self.step, model)
        extra = callback_list(callbacks)
        self._check_step_provides(extra)
        owners = [*self.callbacks, *extra]
        criteria = self._criteria_of(owners)
        keeps_best = self._keeps_best(False, restore_best)
        saved = saved_run(resume_from, owners)
        batches, validation = arguments.data(model, endless=len(criteria) > 1)
        compile_model(model, self.optimizer, loss, metrics)
        owners += keras_defaults(owners, arguments.verbose)
        dispatch = Dispatch([self, *owners], None, model.steps_per_execution)
        eager = self.run_eagerly or model.run_eagerly
        optimizer = self._fit_optimizer(model)
        build_model(model, optimizer, batches.sample.spec, eager and not saved)
        self._check_on_nonfinite(Updater(optimizer), criteria, can_stop=True)
        objective, variables = ModelObjective(model), list(model.trainable_variables)
        kept = (model, optimizer, model._loss_tracker, *variables)
        driver = self._program(
            kept,
            tuple(map(id, kept)),
            dispatch,
            criteria,
            lambda: (objective, updater_for(optimizer, model), variables, step_for(self.step, objective), True),
            eager,
            jit_compile_for(model, self.jit_compile),
            keeps_best,
        )
        run = FitRun(driver, dispatch, owners, batches, validation, arguments, self.on_nonfinite, restore_best)
        run.remember(self, saved)
        return run

    def _fit_optimizer(self, model: Any) -> Any:
        """Returns the optimizer of a fit: the loop's, which scales the loss if Keras would have it do so."""
        if self.optimizer is None or self.optimizer in (
            model.optimizer,
            getattr(model.optimizer, "inner_optimizer", 0),
        ):
            return model.optimizer
        if not needs_scaling(model, self.optimizer):
            return self.optimizer
        self._scaled = self._scaled or keras.optimizers.LossScaleOptimizer(self.optimizer)
        return self._scaled

    def _program(self, kept, key, dispatch: Dispatch, criteria, parts, eager: bool, jit, keeps_best: bool) -> Driver:
        """Returns the driver for an objective, the same one for the same question.

        Args:
            kept: what must live as long as the program, so that ids in the key stay theirs.
            key: what tells objectives apart.
            dispatch: the hooks.
            criteria: of which any one stops.
            parts: makes the objective, the updater, the variables, the step, and whether some may be unused.
            eager: whether to run eagerly.
            jit: whether to compile by XLA.
            keeps_best: whether to keep the best variables.
        """
        functions = (*self.measures.values(), *dispatch.gradient_hooks)
        key = (*key, eager, jit, keeps_best, *map(id, criteria), *(identity(function) for function in functions))
        if key not in self._programs:
            objective, updater, variables, step, allow_unused = parts()
            hooks = dispatch.gradient_hooks
            measures, policy = self.measures, self.on_nonfinite
            body = StepBody(
                objective, updater, variables, step, criteria, measures, hooks, allow_unused, policy, keeps_best
            )
            longest = 1 << 62 if self.steps_per_execution == "auto" else int(self.steps_per_execution)
            driver = make_driver(body, eager, jit, longest)
            driver.kept_alive = kept, functions, criteria
            while len(self._programs) >= _REMEMBERED_PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = driver
        return self._programs[key]

    @property
    def traces(self) -> int:
        """How often the code of a step has been traced, over all runs that are remembered."""
        return sum(driver.traces for driver in self._programs.values())

    def _all_criteria(self) -> list[_stopping.Criterion]:
        criteria: list[_stopping.Criterion] = [_stopping.NonFinite()]
        if self.stopping is not None:
            criteria += self.stopping.criteria if isinstance(self.stopping, _stopping.AnyOf) else [self.stopping]
        if self.tolerance is not None:
            criteria.append(_stopping.LossChangeBelow(self.tolerance))
        if self.max_iterations is not None:
            criteria.append(_stopping.MaxIterations(self.max_iterations))
        return check_count(criteria)

    def _check_step_provides(self, callbacks: list[Any]) -> None:
        parts = [part for criterion in self._criteria_of(callbacks) for part in criterion.parts()]
        norms = [type(part).__name__ for part in parts if {"gradient_norm", "gradient_norm_inf"} & part.needs]
        hooks = {type(o).__name__: hook for o in (self, *callbacks) if (hook := overridden(o, "on_gradient"))}
        measures = {f"measure {name!r}": call for name, call in self.measures.items() if required_arguments(call)}
        functions = hooks | measures
        inner = [name for name, function in functions.items() if _steps.asks_for_intermediates(function)]
        for what, wanting in (("gradients", norms + list(functions)), ("intermediates", inner)):
            if wanting and what not in self.step.provides:
                hint = "; use TapeStep(intermediates=True)" if what == "intermediates" else ""
                raise ValueError(
                    f"`step` must provide {what} for {', '.join(wanting)}, received {type(self.step).__name__}, which"
                    f" does not{hint}."
                )
