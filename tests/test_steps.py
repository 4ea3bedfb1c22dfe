"""Step strategies of a user's own, gradient hooks, and gradients of embeddings, under every driver."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tapekit as tk

DRIVERS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": "auto"}}
MATRIX = np.array([[3.0, 1.0], [1.0, 2.0]])
START = np.array([2.0, -1.0])

every_driver = pytest.mark.parametrize("driver", DRIVERS)
every_strategy = pytest.mark.parametrize("step", ["tape", "minimize"])


def _bowl(start=START, kind=keras.Variable):
    """x' A x / 2, whose gradient is A x."""
    x = kind(start, dtype="float64")
    return x, lambda: 0.5 * tf.reduce_sum(x * tf.linalg.matvec(tf.constant(MATRIX), x))


def _bowl_value(x):
    return 0.5 * x @ MATRIX @ x


@every_driver
def test_a_step_with_too_few_gradients_is_told_so_and_changes_nothing(driver):
    class Forgetful(tk.Step):
        def take(self, problem):
            logs, gradients = problem.loss_and_gradients()
            problem.apply(gradients[:1])
            return logs

    x, loss = _bowl()
    y = keras.Variable(1.0, dtype="float64")
    loop = tk.OptimizationLoop("sgd", step=Forgetful(), max_iterations=3, **DRIVERS[driver])
    with pytest.raises(ValueError, match="`gradients` must be one for each of the 2 variables, received 1"):
        loop.minimize(lambda: loss() + y.value**2, [x, y])
    np.testing.assert_array_equal(x.numpy(), START)


class SAMStep(tk.Step):
    """Sharpness-aware minimization, as in the documentation of `tk.Step`."""

    def __init__(self, rho=0.05):
        self.rho = rho

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        scale = self.rho / (tf.linalg.global_norm(gradients) + 1e-12)
        for variable, gradient in zip(problem.variables, gradients, strict=True):
            variable.assign_add(scale * gradient)
        _, perturbed = problem.loss_and_gradients()
        for variable, gradient in zip(problem.variables, gradients, strict=True):
            variable.assign_sub(scale * gradient)
        problem.apply(perturbed)
        return logs


@every_driver
@pytest.mark.parametrize("kind", [tf.Variable, keras.Variable])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_may_evaluate_twice(scaled, kind, driver):
    optimizer = keras.optimizers.SGD(0.125)
    x, loss = _bowl(kind=kind)
    loop = tk.OptimizationLoop(
        keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer,
        step=SAMStep(rho=0.1),
        max_iterations=8,
        **DRIVERS[driver],
    )
    result = loop.minimize(loss, x)

    at, losses = START, []
    for _ in range(8):
        losses.append(_bowl_value(at))
        gradient = MATRIX @ at
        at = at - 0.125 * MATRIX @ (at + 0.1 * gradient / (np.linalg.norm(gradient) + 1e-12))
    np.testing.assert_allclose(result.x, at, rtol=1e-12)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-12)
    assert result.evaluations == 2 * 8 + 1


class HeavyBall(tk.Step):
    """Gradient descent with momentum, whose state is the step's own; it updates by itself."""

    built: list = []  # of the class, since a run may work on a copy of the step

    def __init__(self, rate=0.1, momentum=0.9):
        self.rate = rate
        self.momentum = momentum

    def build(self, variables):
        self.built.append((tf.executing_eagerly(), [variable.numpy() for variable in variables]))
        self.velocities = [tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in variables]

    def reset(self):
        for velocity in self.velocities:
            velocity.assign(tf.zeros_like(velocity))

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        gradients = problem.transform(gradients)
        for variable, velocity, gradient in zip(problem.variables, self.velocities, gradients, strict=True):
            velocity.assign(self.momentum * velocity - self.rate * gradient)
            variable.assign_add(velocity)
        return logs


def _heavy_ball_losses(start, steps, rate=0.1, momentum=0.9):
    at, velocity, losses = np.array(start), np.zeros(2), []
    for _ in range(steps):
        losses.append(_bowl_value(at))
        velocity = momentum * velocity - rate * MATRIX @ at
        at = at + velocity
    return losses


@every_driver
def test_a_step_may_own_state_that_starts_anew_with_every_run(driver):
    x, loss = _bowl()
    loop = tk.OptimizationLoop("sgd", step=HeavyBall(), max_iterations=15, **DRIVERS[driver])
    for _ in range(2):
        x.assign(START)
        losses = loop.minimize(loss, x).history["loss"]
        np.testing.assert_allclose(losses, _heavy_ball_losses(START, 15), rtol=1e-12)
    assert loop.traces == (0 if driver == "eager" else 1)


@every_driver
def test_a_step_is_built_outside_of_graphs_before_the_variables_change(driver):
    HeavyBall.built.clear()
    x, loss = _bowl()
    loop = tk.OptimizationLoop("sgd", step=HeavyBall(), max_iterations=3, **DRIVERS[driver])
    loop.minimize(loss, x)
    ((eagerly, values),) = HeavyBall.built
    assert eagerly
    np.testing.assert_array_equal(values, [START])
    loop.minimize(loss, x)
    assert len(HeavyBall.built) == 1


@every_driver
def test_a_step_keeps_the_state_of_each_set_of_variables_apart(driver):
    (x, loss), (y, other) = _bowl(), _bowl([1.0, 1.0])
    both = lambda: loss() + other()  # noqa: E731
    loop = tk.OptimizationLoop("sgd", step=HeavyBall(), max_iterations=6, **DRIVERS[driver])
    one, two = (loss, [x], [START]), (both, [x, y], [START, [1.0, 1.0]])
    for function, variables, starts in [two, one, two]:
        for variable, start in zip(variables, starts, strict=True):
            variable.assign(start)
        expected = np.sum([_heavy_ball_losses(start, 6) for start in starts], axis=0)
        np.testing.assert_allclose(loop.minimize(function, variables).history["loss"], expected, rtol=1e-12)


@every_driver
def test_one_step_object_serves_two_loops_whose_steps_interleave(driver):
    step, (x, loss), (y, other) = HeavyBall(), _bowl(), _bowl([1.0, 1.0])
    first = tk.OptimizationLoop("sgd", step=step, max_iterations=5, **DRIVERS[driver]).steps(loss, x)
    second = tk.OptimizationLoop("sgd", step=step, max_iterations=5, **DRIVERS[driver]).steps(other, y)
    losses = [(a["loss"], b["loss"]) for (_, a), (_, b) in zip(first, second, strict=True)]
    expected = np.transpose([_heavy_ball_losses(START, 5), _heavy_ball_losses([1.0, 1.0], 5)])
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


class LineSearch(tk.Step):
    """Steepest descent with a backtracking line search (Armijo 1966), of as many evaluations as it takes."""

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        gradients = problem.transform(gradients)
        start = [tf.convert_to_tensor(variable) for variable in problem.variables]
        slope = tf.add_n([tf.reduce_sum(gradient**2) for gradient in gradients])

        def too_long(rate, loss, tried):
            return (loss > logs["loss"] - 0.5 * rate * slope) & (tried < 30)

        def shorter(rate, loss, tried):
            for variable, at, gradient in zip(problem.variables, start, gradients, strict=True):
                variable.assign(at - 0.5 * rate * gradient)
            return 0.5 * rate, problem.evaluate()["loss"], tried + 1

        two, worst = tf.constant(2.0, slope.dtype), tf.constant(np.inf, slope.dtype)
        rate, _, tried = tf.while_loop(too_long, shorter, (two, worst, tf.constant(0)))
        return {**logs, "rate": rate, "evaluations": 1 + tried}


def _line_search(steps):
    """The losses, step lengths and evaluations of `LineSearch`, one for each step."""
    at, rows = START, []
    for _ in range(steps):
        loss, gradient, rate, tried = _bowl_value(at), MATRIX @ at, 1.0, 1
        while _bowl_value(at - rate * gradient) > loss - 0.5 * rate * gradient @ gradient:
            rate, tried = 0.5 * rate, tried + 1
        at = at - rate * gradient
        rows.append((loss, rate, 1 + tried))
    return np.transpose(rows)


@every_driver
def test_a_step_with_a_line_search_reports_as_many_evaluations_as_it_makes(driver):
    x, loss = _bowl()
    loop = tk.OptimizationLoop("sgd", step=LineSearch(), max_iterations=8, **DRIVERS[driver])
    result = loop.minimize(loss, x)
    losses, rates, evaluations = _line_search(8)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-12)
    np.testing.assert_array_equal(result.history["rate"], rates)
    assert result.history.keys() == {"loss", "rate"}
    assert len(set(rates)) > 1
    assert result.evaluations == evaluations.sum() + 1


def test_the_evaluations_that_a_line_search_reports_are_those_that_it_made():
    x, loss = _bowl()
    calls = []

    def counted():
        calls.append(1)
        return loss()

    loop = tk.OptimizationLoop("sgd", step=LineSearch(), max_iterations=8, run_eagerly=True)
    assert loop.minimize(counted, x).evaluations == len(calls)


@every_driver
def test_max_evaluations_counts_what_a_line_search_reports(driver):
    x, loss = _bowl()
    made = np.cumsum(_line_search(8)[2]).astype(int)
    limit = tk.stopping.MaxEvaluations(made[3] + 1)
    result = tk.OptimizationLoop("sgd", step=LineSearch(), stopping=limit, **DRIVERS[driver]).minimize(loss, x)
    assert (result.steps, result.evaluations) == (5, made[4] + 1)
    assert result.message.startswith(f"MaxEvaluations: {made[4]} evaluations of the loss at step 5 reached the limit")


class CompassSearch(tk.Step):
    """Tries both directions and halves the stride where neither is better; needs no gradient."""

    provides = frozenset()

    def build(self, variables):
        self.stride = tf.Variable(1.0, trainable=False)

    def reset(self):
        self.stride.assign(1.0)

    def take(self, problem):
        (x,) = problem.variables
        start, logs = tf.convert_to_tensor(x), problem.evaluate()
        best, at = logs["loss"], start
        for sign in (1.0, -1.0):
            x.assign(start + sign * self.stride)
            loss = problem.evaluate()["loss"]
            at = tf.where(loss < best, start + sign * self.stride, at)
            best = tf.minimum(best, loss)
        x.assign(at)
        self.stride.assign(tf.where(best < logs["loss"], self.stride, 0.5 * self.stride))
        return logs


@every_driver
def test_a_step_without_gradients_minimizes_what_has_none(driver):
    x = tf.Variable(2.75)
    loop = tk.OptimizationLoop("sgd", step=CompassSearch(), max_iterations=6, **DRIVERS[driver])
    result = loop.minimize(lambda: tf.round(tf.abs(x - 0.25) * 4.0), [x])
    assert result.history["loss"].tolist() == [10.0, 6.0, 2.0, 2.0, 0.0, 0.0]
    assert result.variables[0] == 0.25
    assert result.evaluations == 3 * 6 + 1


class Reporting(tk.Step):
    def __init__(self, report):
        self.report = report

    def take(self, problem):
        logs, gradients = problem.loss_and_gradients()
        problem.apply(gradients)
        return self.report(logs)


@every_driver
def test_a_step_may_log_numbers_and_variables_beside_the_loss(driver):
    rate = keras.Variable(0.5)
    step = Reporting(lambda logs: {**logs, "rho": 0.25, "count": 3, "rate": rate})
    x, loss = _bowl()
    history = tk.OptimizationLoop("sgd", step=step, max_iterations=2, **DRIVERS[driver]).minimize(loss, x).history
    assert {name: values.tolist() for name, values in history.items() if name != "loss"} == {
        "rho": [0.25, 0.25],
        "count": [3, 3],
        "rate": [0.5, 0.5],
    }


@every_driver
@pytest.mark.parametrize("report", [lambda logs: None, lambda logs: {"los": logs["loss"]}])
def test_a_step_that_returns_no_loss_is_told_so(report, driver):
    x, loss = _bowl()
    loop = tk.OptimizationLoop("sgd", step=Reporting(report), max_iterations=2, **DRIVERS[driver])
    with pytest.raises((TypeError, ValueError), match='`take` of Reporting must return logs with "loss", received'):
        loop.minimize(loss, x)


class _Hooked(tk.OptimizationLoop):
    def on_gradient(self, gradients, variables):
        return gradients


class _HookedCallback(tk.Callback):
    def on_gradient(self, gradients, variables):
        return gradients


@pytest.mark.parametrize(
    ("wanting", "make"),
    [
        ("GradientNormBelow", lambda: tk.OptimizationLoop("sgd", CompassSearch(), tk.stopping.GradientNormBelow(1e-3))),
        (
            "GradientNormBelow",
            lambda: tk.OptimizationLoop(
                "sgd", CompassSearch(), (tk.stopping.GradientNormBelow(1.0, np.inf) & tk.stopping.LossBelow(1)).after(2)
            ),
        ),
        ("_HookedCallback", lambda: tk.OptimizationLoop("sgd", CompassSearch(), callbacks=[_HookedCallback()])),
        ("_Hooked", lambda: _Hooked("sgd", CompassSearch(), max_iterations=1)),
        ("measure 'norm'", lambda: tk.OptimizationLoop("sgd", CompassSearch(), measures={"norm": lambda g: g[0]})),
    ],
)
def test_what_needs_gradients_is_refused_with_a_step_that_provides_none(wanting, make):
    with pytest.raises(ValueError, match=f"`step` must provide gradients for {wanting}, received CompassSearch, which"):
        make()


def test_a_hook_of_one_run_is_refused_with_a_step_that_provides_no_gradients():
    x = tf.Variable(2.0)
    loop = tk.OptimizationLoop("sgd", CompassSearch(), max_iterations=1)
    with pytest.raises(ValueError, match="`step` must provide gradients for _HookedCallback, received CompassSearch"):
        loop.minimize(lambda: x**2, [x], callbacks=[_HookedCallback()])
    assert x.numpy() == 2.0


class Hook(tk.Callback):
    """Makes an `on_gradient` of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_gradient(self, gradients, variables):
        return self.function(gradients, variables)


def _descend(step, driver, hooks=(), steps=5, **settings):
    x, loss = _bowl()
    optimizer = keras.optimizers.SGD(0.125)
    loop = tk.OptimizationLoop(optimizer, step=step, max_iterations=steps, **settings, **DRIVERS[driver])
    return loop.minimize(loss, x, callbacks=[Hook(hook) for hook in hooks])


@every_driver
@every_strategy
def test_the_gradients_that_a_hook_returns_are_applied(step, driver):
    result = _descend(step, driver, [lambda gradients, variables: [0.5 * gradient for gradient in gradients]])
    expected = np.linalg.matrix_power(np.eye(2) - 0.0625 * MATRIX, 5) @ START
    np.testing.assert_allclose(result.x, expected, rtol=1e-12)


@every_driver
@every_strategy
@pytest.mark.parametrize(
    "returned", [(START,), [START.tolist()], [tf.constant(START)]], ids=["array", "list", "tensor"]
)
def test_a_hook_may_return_whatever_becomes_tensors(returned, step, driver):
    result = _descend(step, driver, [lambda gradients, variables: returned], steps=1)
    np.testing.assert_array_equal(result.x, START - 0.125 * START)


@every_driver
@every_strategy
def test_a_hook_that_returns_none_changes_no_bit(step, driver):
    def tamper(gradients, variables):
        gradients.clear()  # lists of its own
        variables.clear()

    plain, hooked = _descend(step, driver), _descend(step, driver, [tamper])
    np.testing.assert_array_equal(plain.x, hooked.x)
    np.testing.assert_array_equal(plain.history["loss"], hooked.history["loss"])


@every_driver
@every_strategy
def test_hooks_run_in_order_the_loops_own_first_and_each_sees_what_the_one_before_returned(step, driver):
    class Loop(tk.OptimizationLoop):
        def on_gradient(self, gradients, variables):
            return [gradient + 1.0 for gradient in gradients]

    x = tf.Variable(0.0)
    callbacks = [Hook(lambda gradients, variables: [2.0 * gradients[0]])]
    loop = Loop(keras.optimizers.SGD(1.0), step=step, max_iterations=1, callbacks=callbacks, **DRIVERS[driver])
    of_the_run = [Hook(lambda gradients, variables: None), Hook(lambda gradients, variables: [gradients[0] - 3.0])]
    loop.minimize(lambda: 10.0 * x, [x], callbacks=of_the_run)
    assert x.numpy() == -((10.0 + 1.0) * 2.0 - 3.0)


@every_driver
@every_strategy
def test_a_hook_gets_the_variables_as_they_were_given(step, driver):
    x, y = tf.Variable(1.0), keras.Variable([1.0, 2.0])
    seen = []
    hook = Hook(lambda gradients, variables: seen.append(variables))
    loop = tk.OptimizationLoop("sgd", step=step, max_iterations=1, callbacks=[hook], **DRIVERS[driver])
    loop.minimize(lambda: x**2 + tf.reduce_sum(y**2), {"b": y, "a": x})
    assert seen[0][0] is x
    assert seen[0][1] is y


@every_driver
@every_strategy
def test_criteria_and_measures_see_the_gradients_of_the_loss_whatever_hooks_make_of_them(step, driver):
    result = _descend(
        step,
        driver,
        [lambda gradients, variables: [tf.zeros_like(gradient) for gradient in gradients]],
        stopping=tk.stopping.GradientNormBelow(1e-6),
        measures={"gradient": lambda gradients: gradients[0]},
    )
    assert result.steps == 5
    np.testing.assert_allclose(result.history["gradient_norm"], np.full(5, np.linalg.norm(MATRIX @ START)), rtol=1e-12)
    np.testing.assert_allclose(result.history["gradient"], np.tile(MATRIX @ START, (5, 1)), rtol=1e-12)


RIGHT = "`on_gradient` must return None or a list of 1 gradients"
OF_SHAPE = f"{RIGHT} of the shapes and dtypes of the variables; gradient 0 must be of shape \\(2,\\) and dtype float64"


@pytest.mark.parametrize("driver", ["eager", "xla"])
@every_strategy
@pytest.mark.parametrize(
    ("error", "sentence", "hook"),
    [
        (TypeError, f"{RIGHT}, received a tf.Tensor of shape \\(2,\\) and dtype float64", lambda g: g[0]),
        (TypeError, f"{RIGHT}, received True", lambda g: True),
        (
            ValueError,
            "`on_gradient` must return gradients under the names of the variables \\(.*\\), received other",
            lambda g: {"other": g[0]},
        ),
        (ValueError, f"{RIGHT}, received 0", lambda g: []),
        (ValueError, f"{RIGHT}, received 2", lambda g: [g[0], g[0]]),
        (TypeError, f"{RIGHT}, received None as gradient 0", lambda g: [None]),
        (TypeError, f"{RIGHT}, received an object of type object as gradient 0", lambda g: [object()]),
        (ValueError, f"{OF_SHAPE}, received shape \\(2, 1\\) and dtype float64", lambda g: [g[0][:, None]]),
        (ValueError, f"{OF_SHAPE}, received shape \\(\\) and dtype float64", lambda g: [0.0]),
        (ValueError, f"{OF_SHAPE}, received shape \\(2,\\) and dtype float32", lambda g: [tf.cast(g[0], tf.float32)]),
        (ValueError, f"{OF_SHAPE}, received shape \\(\\) and dtype string", lambda g: ["gradient"]),
    ],
)
def test_what_a_hook_must_not_return_is_refused_in_a_sentence_before_the_update(error, sentence, hook, step, driver):
    x, loss = _bowl()
    optimizer = keras.optimizers.Adam()
    loop = tk.OptimizationLoop(optimizer, step=step, max_iterations=1, **DRIVERS[driver])
    with pytest.raises(error, match=f"^{sentence}\\.$"):
        loop.minimize(loss, x, callbacks=[Hook(lambda gradients, variables: hook(gradients))])
    np.testing.assert_array_equal(x.numpy(), START)
    assert optimizer.iterations.numpy() == 0


IDS = [2, 0, 2, 2]
LOOKUPS = {
    "tf.gather": lambda table: tf.gather(table, IDS),
    "tf.nn.embedding_lookup": lambda table: tf.nn.embedding_lookup(table, IDS),
    "dense": lambda table: tf.one_hot(IDS, 4, dtype=tf.float64) @ table,
}


def _embedding(lookup):
    table = tf.Variable(np.arange(12.0).reshape(4, 3) / 10.0)
    weights = tf.constant([[1.0], [2.0], [3.0], [-1.0]], tf.float64)
    return table, lambda: tf.reduce_sum(weights * LOOKUPS[lookup](table) ** 2)


def _embedding_run(lookup, step, driver, hook=None, optimizer=None, **settings):
    table, loss = _embedding(lookup)
    loop = tk.OptimizationLoop(
        optimizer or keras.optimizers.SGD(0.1, momentum=0.9), step=step, max_iterations=4, **settings, **DRIVERS[driver]
    )
    return loop.minimize(loss, [table], callbacks=[Hook(hook)] if hook else [])


@every_driver
@every_strategy
@pytest.mark.parametrize("order", [2, np.inf])
def test_the_norm_of_an_embeddings_gradient_is_that_of_the_dense_one(order, step, driver):
    stopping = tk.stopping.GradientNormBelow(1e-9, order)
    name = "gradient_norm" if order == 2 else "gradient_norm_inf"
    dense = _embedding_run("dense", "tape", "eager", stopping=stopping)
    for lookup in ("tf.gather", "tf.nn.embedding_lookup"):
        sparse = _embedding_run(lookup, step, driver, stopping=stopping)
        np.testing.assert_allclose(sparse.history[name], dense.history[name], rtol=1e-12)
        np.testing.assert_allclose(sparse.x, dense.x, rtol=1e-12)


@every_driver
@every_strategy
@pytest.mark.parametrize("scaled", [False, True])
def test_hooks_see_indexed_slices_and_may_return_them_or_dense_gradients(scaled, step, driver):
    seen = []

    def run(hook):
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
        return _embedding_run("tf.gather", step, driver, hook, optimizer)

    def halve(gradients, variables):
        seen.extend(gradients)
        return [tf.IndexedSlices(0.5 * g.values, g.indices, g.dense_shape) for g in gradients]

    def halve_dense(gradients, variables):
        return [0.5 * tf.convert_to_tensor(gradient) for gradient in gradients]

    plain, sparse, dense = run(None), run(halve), run(halve_dense)
    assert all(isinstance(gradient, tf.IndexedSlices) for gradient in seen)
    np.testing.assert_allclose(sparse.history["loss"], dense.history["loss"], rtol=1e-12)
    assert sparse.history["loss"][0] == plain.history["loss"][0]
    assert not np.array_equal(sparse.x, plain.x)


@every_strategy
@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam, tf_keras.optimizers.Adam])
def test_an_embedding_is_trained_as_in_a_loop_written_by_hand(optimizer, step):
    """Adam of Keras 3 squares the slices of a row before it adds them up, so that it is not the dense one."""
    result = _embedding_run("tf.gather", step, "eager", optimizer=optimizer(0.1))
    table, loss = _embedding("tf.gather")
    by_hand = optimizer(0.1)
    for _ in range(4):
        with tf.GradientTape() as tape:
            value = loss()
        by_hand.apply_gradients([(tape.gradient(value, table), table)])
    np.testing.assert_array_equal(result.variables[0], table.numpy())
