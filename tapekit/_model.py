"""A Keras model as an objective, and the step that is its own `train_step`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import tree
from keras.src.trainers.trainer import model_supports_jit

from tapekit._describe import describe
from tapekit._optimizers import Updater
from tapekit._tensors import tf_variable, with_known_shape
from tapekit.callbacks._dispatch import KERAS_LOSS
from tapekit.steps import MinimizeStep, Problem, Step, TapeStep


def has_own_train_step(model: keras.Model) -> bool:
    """Returns whether somebody overrode `train_step`."""
    return _overrides(model, "train_step")


def _overrides(model: keras.Model, method: str) -> bool:
    return getattr(getattr(model, method), "__func__", None) is not getattr(keras.Model, method)


def check_model(model: Any, loss: Any, optimizer: Any) -> None:
    """Raises unless the loop can train the model with what it has been given."""
    for name, value in (("model", model), ("optimizer", optimizer)):
        if any(kind.__module__.partition(".")[0] == "tf_keras" for kind in type(value).__mro__):
            raise TypeError(
                f"`{name}` must be of Keras 3 for fit, received {describe(value)} of tf_keras; use minimize with a"
                " function that returns the loss, and the model's trainable_variables."
            )
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model, received {describe(model)}.")
    if model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            "`model` must be on one device, received one of a tf.distribute strategy with"
            f" {model.distribute_strategy.num_replicas_in_sync} replicas."
        )
    if model.compiled and loss is not None:
        raise ValueError(
            "`loss` must be None for a model that is compiled, which has one; compile it anew for another, received"
            f" {describe(loss)}."
        )
    computes = has_own_train_step(model) or _overrides(model, "compute_loss")
    if not model.compiled and loss is None and not computes:
        raise ValueError("`loss` must be given for a model that is not compiled, received None.")
    if optimizer is None and not model.compiled:
        raise ValueError("`optimizer` must be given to the loop for a model that is not compiled, received None.")


def compile_model(model: Any, optimizer: Any, loss: Any, metrics: Any) -> None:
    """Compiles a model that is not compiled."""
    if model.compiled and metrics is not None:
        raise ValueError(
            "`metrics` must be None for a model that is compiled, which has its own; compile it anew for others,"
            f" received {describe(metrics)}."
        )
    if not model.compiled:
        for item in tree.flatten(loss):
            keras.losses.get(item)  # which raises for a name that it does not know, as `compile` does not
        for item in tree.flatten(metrics):
            if item not in ("accuracy", "acc", "crossentropy", "ce"):
                keras.metrics.get(item)
        of_keras = isinstance(optimizer, keras.optimizers.Optimizer)  # which is all that compile takes
        model.compile(optimizer=optimizer if of_keras else None, loss=loss, metrics=metrics)


def needs_scaling(model: Any, optimizer: Any) -> bool:
    """Returns whether Keras would scale the loss, which it does under mixed_float16 unless it is told not to."""
    scales = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    scalable = isinstance(optimizer, keras.optimizers.Optimizer)
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    return model.dtype_policy.name == "mixed_float16" and scales and scalable and not scaled


def jit_compile_for(model: Any, jit_compile: bool | str) -> bool | str:
    """Returns whether to compile by XLA, where "auto" leaves it to the model.

    Keras does not keep whether `jit_compile=False` was chosen; where there is only a CPU it chooses that itself.
    """
    if jit_compile != "auto" or model.jit_compile:
        return bool(model.jit_compile) if jit_compile == "auto" else jit_compile
    return "auto" if model_supports_jit(model) and not model._resolve_auto_jit_compile() else False


def build_model(model: Any, optimizer: Any, spec: Any, eager: bool) -> None:
    """Makes the variables of a model and its metrics that are made at the first batch, outside of the compiled step."""
    if eager or (_is_built(model) and _has_state(model, optimizer)):
        return  # an eager step sees to that itself
    objective = ModelObjective(model)

    def step(batch: Any) -> None:
        objective.bind(batch)
        if has_own_train_step(model):
            with replaced(model, "optimizer", optimizer):
                model.train_step(objective.batch)
        else:
            objective()
            objective.conclude()

    tf.function(step, autograph=False).get_concrete_function(spec)


def _is_built(model: Any) -> bool:
    """Returns whether all layers have their variables; a model that only holds layers is never built itself."""
    return all(layer.built for layer in model._flatten_layers(include_self=_overrides(model, "call")))


def _has_state(model: Any, optimizer: Any) -> bool:
    """Returns whether the variables of metrics, and of optimizers that `train_step` builds itself, have been made."""
    metrics = model._compile_metrics
    if metrics is not None and not metrics.built:
        return False
    with replaced(model, "optimizer", optimizer):
        return not has_own_train_step(model) or any(item.built for item in _optimizers(model))


def check_step(step: Step, model: Any) -> None:
    """Raises if the strategy and the model's own `train_step` exclude each other."""
    plain = type(step) in (TapeStep, MinimizeStep) and "intermediates" not in step.provides
    if has_own_train_step(model) and not plain:
        raise ValueError(
            f"`step` must be left to a model that overrides train_step, as {type(model).__name__} does, received"
            f" {type(step).__name__}."
        )


def step_for(step: Step, objective: ModelObjective) -> Step:
    """Returns the strategy, or the model's own `train_step` if it has one."""
    if has_own_train_step(objective.model):
        return TrainStep(objective)
    return step if objective.model.trainable_variables or not _is_built(objective.model) else NoStep()


def updater_for(optimizer: Any, model: Any) -> Updater:
    """Returns what talks to the optimizer."""
    return TrainStepUpdater(optimizer) if has_own_train_step(model) else Updater(optimizer)


class ModelObjective:
    """The loss of a compiled `keras.Model` on the batch that it is bound to."""

    needs_batch = True

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.batch: Any = None
        self.tests: dict[Any, Any] = {}
        """The compiled functions of evaluations, kept from one fit to the next."""
        self.names: list[str] = []
        """What Keras finds in the logs of a batch."""
        self._metrics: Any = None
        self._logs: dict[str, Any] = {}

    def bind(self, batch: Any) -> None:
        """Takes the batch of the step that begins."""
        self.batch = tree.map_structure(_without_optional, batch)
        self._metrics = None
        self._logs = {}

    def build(self) -> list[Any]:
        """Makes the variables of a model that makes them at its first batch; returns the trainable ones.

        Some layers draw random numbers in every call, so what there was before is put back.
        """
        if not (has_own_train_step(self.model) or _is_built(self.model)):
            before = [(variable, tf.identity(tf_variable(variable))) for variable in self.model.variables]
            self.model(keras.utils.unpack_x_y_sample_weight(self.batch)[0])
            for variable, value in before:
                variable.assign(value)
        return list(self.model.trainable_variables)

    def __call__(self) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Evaluates the loss as `train_step` of Keras does; metrics see the first evaluation of a step alone."""
        model: Any = self.model
        if self._metrics is not None:
            trackers = [v for metric in model.metrics for v in metric.variables]
            before = [tf.identity(v) for v in trackers]
            loss, _ = self._evaluate()
            for variable, value in zip(trackers, before, strict=True):
                variable.assign(value)
            return _scalar(loss), {}
        loss, self._metrics = self._evaluate()
        x = self._metrics[0]
        samples = tf.shape(next(leaf for leaf in tree.flatten(x) if leaf is not None))[0]
        model._loss_tracker.update_state(loss, sample_weight=samples)
        return _scalar(loss), {}

    def _evaluate(self) -> tuple[tf.Tensor, tuple[Any, ...]]:
        model: Any = self.model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(self.batch)
        y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
        loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        return loss, (x, y, y_pred, sample_weight)

    def loss_of(self, batch: Any) -> float:
        """Returns the loss of a batch in training; whatever an evaluation changes is put back."""
        is_own = has_own_train_step(self.model)
        variables = [*self.variables, *(self.model.trainable_variables if is_own else [])]
        before = [(variable, tf.identity(tf_variable(variable))) for variable in variables]
        self.bind(batch)
        try:
            return float(_loss_of_train_step(self) if is_own else _scalar(self._evaluate()[0]))
        finally:
            for variable, value in before:
                variable.assign(value)

    def given(self, logs: dict[str, Any]) -> None:
        """Takes the logs that the model's own `train_step` has returned."""
        self._logs = _flat(logs)

    def conclude(self) -> dict[str, Any]:
        """Updates the metrics and returns what the step records for Keras."""
        if self._metrics is not None:
            x, y, y_pred, sample_weight = self._metrics
            self._logs = _flat(self.model.compute_metrics(x, y, y_pred, sample_weight=sample_weight))
        self.names = list(self._logs)
        return {KERAS_LOSS if name == "loss" else name: value for name, value in self._logs.items()}

    def identity(self) -> dict[str, Any]:
        """Returns what tells the model and its loss from others in another process, in plain data."""
        losses = tree.flatten(self.model.loss)
        layers = self.model._flatten_layers(include_self=False)
        return {
            "model": type(self.model).__name__,
            "layers": [[type(layer).__name__, _settings(layer)] for layer in layers],
            "loss": [loss.get_config() if isinstance(loss, keras.Loss) else describe(loss) for loss in losses],
        }

    @property
    def evaluated(self) -> list[Any]:
        """What an evaluation changes, but for random states: statistics of the batches, and the metrics."""
        return [*self.model.non_trainable_weights, *self.model.metrics_variables]

    @property
    def variables(self) -> list[Any]:
        """What a step changes beside the trainable variables and the slots of the loop's optimizer."""
        optimizers = _optimizers(self.model) if has_own_train_step(self.model) else []
        slots = [variable for optimizer in optimizers for variable in optimizer.variables]
        return [*self.model.non_trainable_variables, *self.model.metrics_variables, *slots]


def _settings(layer: Any) -> dict[str, Any]:
    """Returns the configuration of a layer, if it has one and is not made of others."""
    if isinstance(layer, keras.Model):
        return {}
    try:
        return layer.get_config()
    except NotImplementedError:  # a layer of the user's own that cannot be saved by Keras either
        return {}


def _without_optional(leaf: Any) -> Any:
    return None if isinstance(leaf, tf.experimental.Optional) else leaf


def _scalar(loss: Any) -> Any:
    """Returns what is minimized, which is the sum where a loss has several values."""
    loss = tf.convert_to_tensor(tf_variable(loss))
    return loss if loss.shape.rank == 0 else tf.reduce_sum(loss)


def _flat(logs: dict[str, Any]) -> dict[str, Any]:
    """Returns logs without the dicts inside that some metrics give, as Keras flattens them for its callbacks."""
    flat: dict[str, Any] = {}
    for name, value in logs.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _optimizers(model: Any) -> list[Any]:
    """Returns the optimizers that are attributes of a model, or in a list or dict that is one, the outermost alone."""
    found: dict[int, Any] = {}
    for value in vars(model).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found |= {id(item): item for item in inside if isinstance(item, keras.optimizers.Optimizer)}
    inner = {id(getattr(optimizer, "inner_optimizer", None)) for optimizer in found.values()}
    return [optimizer for key, optimizer in found.items() if key not in inner]


class NoStep(Step):
    """Evaluates the loss and updates nothing, as Keras does with a model of which nothing is trainable."""

    def take(self, problem: Problem) -> dict[str, Any]:
        """Evaluates."""
        warnings.warn("the model does not have any trainable weights.", stacklevel=2)
        problem.gradients = []
        return problem.evaluate()


class TrainStepUpdater(Updater):
    """The optimizer of a model whose `train_step` decides for itself what to build it on, and whether to use it."""

    def check(self, variables: Sequence[Any]) -> None:
        """Lets everything pass."""

    def build(self, variables: Sequence[Any]) -> None:
        """Leaves that to `train_step`."""


class TrainStep(Step):
    """Makes the step by the model's own `train_step`, whose gradients the hooks see on their way to the optimizer.

    Args:
        objective: the model with its batch.
    """

    def __init__(self, objective: ModelObjective) -> None:
        self.objective = objective
        self._updaters: dict[int, Updater] = {}

    def take(self, problem: Problem) -> dict[str, Any]:
        """Makes one step."""
        model: Any = self.objective.model
        losses = _Losses(model)
        with contextlib.ExitStack() as stack:
            for optimizer in _optimizers(model):
                stack.enter_context(replaced(optimizer, "apply", self._apply(problem, optimizer, losses)))
            stack.enter_context(losses.watched())
            logs = model.train_step(self.objective.batch)
        if not isinstance(logs, dict):
            raise TypeError(f"`train_step` must return a dict of logs, received {describe(logs)}.")
        self.objective.given(logs)
        problem.evaluations = 1
        if problem.gradients is None:
            if problem.gradients_wanted:
                raise ValueError(
                    "`train_step` must give its gradients to a Keras optimizer that is an attribute of the model, for"
                    " hooks, criteria and measures to see them, received none."
                )
            problem.gradients = []
        return {"loss": _scalar(losses.true(logs))}

    def _apply(self, problem: Problem, optimizer: Any, losses: _Losses) -> Callable[..., Any]:
        original = optimizer.apply
        updater = self._updaters.setdefault(id(optimizer), Updater(optimizer))

        def apply(grads: Any, trainable_variables: Any = None, **kwargs: Any) -> Any:
            variables = list(optimizer._trainable_variables if trainable_variables is None else trainable_variables)
            pairs = zip(grads, variables, strict=True)
            gradients = [with_known_shape(gradient, tf_variable(variable)) for gradient, variable in pairs]
            present = [position for position, gradient in enumerate(gradients) if gradient is not None]
            true = updater.true([gradients[position] for position in present])
            targets = [variables[position] for position in present]
            replaced = problem.transform(true, targets)
            if problem.has_hooks:
                for position, gradient in zip(present, updater.scaled(replaced), strict=True):
                    gradients[position] = gradient
            problem.loss = losses.computed
            problem.update(lambda: original(gradients, variables, **kwargs), replaced, targets)
            return optimizer.iterations

        return apply


def _loss_of_train_step(objective: ModelObjective) -> Any:
    """Returns the loss of the batch by the model's own `train_step`, with optimizers that update nothing."""
    model: Any = objective.model
    losses = _Losses(model)
    with contextlib.ExitStack() as stack:
        for optimizer in _optimizers(model):
            stack.enter_context(replaced(optimizer, "apply", lambda *args, **kwargs: None))
        stack.enter_context(losses.watched())
        return _scalar(losses.true(model.train_step(objective.batch)))


class _Losses:
    """Finds the loss of the batch where `train_step` returns running means."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._computed: list[Any] = []
        self._last: dict[int, Any] = {}
        self._results: dict[int, tuple[Any, Any]] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watches `compute_loss` and every mean among the metrics."""
        model, compute_loss = self._model, self._model.compute_loss

        def compute(*args: Any, **kwargs: Any) -> Any:
            self._computed.append(compute_loss(*args, **kwargs))
            return self._computed[-1]

        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(model, "compute_loss", compute))
            for metric in {id(metric): metric for metric in [*model.metrics, *model._metrics]}.values():
                if type(metric) is keras.metrics.Mean:
                    stack.enter_context(replaced(metric, "update_state", self._update(metric)))
                    stack.enter_context(replaced(metric, "result", self._result(metric)))
            yield

    def _update(self, metric: Any) -> Callable[..., Any]:
        original = metric.update_state

        def update_state(values: Any, *args: Any, **kwargs: Any) -> Any:
            self._last[id(metric)] = values
            return original(values, *args, **kwargs)

        return update_state

    def _result(self, metric: Any) -> Callable[..., Any]:
        original = metric.result

        def result() -> Any:
            value = original()
            self._results[id(value)] = value, self._last.get(id(metric))
            return value

        return result

    @property
    def computed(self) -> Any:
        """What `compute_loss` gave, or `None`."""
        return _scalar(self._computed[0]) if self._computed else None

    def true(self, logs: dict[str, Any]) -> Any:
        """Returns what the mean under "loss" got last, what `compute_loss` gave, what is named "loss", or the sum."""
        if "loss" in logs and self._of_batch(logs["loss"]) is not logs["loss"]:
            return self._of_batch(logs["loss"])
        if self._computed:
            return self._computed[0]
        if "loss" in logs:
            return logs["loss"]
        losses = [self._of_batch(value) for name, value in logs.items() if name.endswith("loss")]
        if not losses:
            raise ValueError(
                '`train_step` must call compute_loss or return a loss, a value whose name ends in "loss", received'
                f" {', '.join(logs) or 'nothing'}."
            )
        return tf.add_n([tf.cast(loss, tf.float32) for loss in losses]) if len(losses) > 1 else losses[0]

    def _of_batch(self, value: Any) -> Any:
        _, last = self._results.get(id(value), (None, None))
        return value if last is None else tf.reduce_mean(tf.convert_to_tensor(tf_variable(last)))


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Puts a function in the place of a method of one object, for the time of the block."""
    attributes = vars(owner)
    is_own, before = name in attributes, attributes.get(name)
    attributes[name] = function
    try:
        yield
    finally:
        if not is_own:
            del attributes[name]
        else:
            attributes[name] = before
