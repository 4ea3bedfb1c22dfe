"""The table of problems: right gradients, minima reached, strategies and drivers in agreement."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import BY_NAME, DRIVERS, PROBLEMS

import tapekit as tk

OPTIMIZERS = {
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.5),
    "adam": lambda rate: keras.optimizers.Adam(rate),
}


def _value(variable):
    return getattr(variable, "value", variable) if isinstance(variable, keras.Variable) else variable


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_gradients_agree_with_finite_differences(problem):
    variables, loss = problem.make()
    variables = [_value(variable) for variable in variables]
    with tf.GradientTape() as tape:
        value = loss()
    gradients = [tf.convert_to_tensor(gradient).numpy() for gradient in tape.gradient(value, variables)]
    for variable, gradient in zip(variables, gradients, strict=True):
        start = variable.numpy()
        step = 1e-3 if variable.dtype == tf.float32 else 1e-6
        for index in list(np.ndindex(start.shape))[:12]:
            ends = []
            for sign in (1, -1):
                moved = np.array(start)
                moved[index] += sign * step
                variable.assign(moved)
                ends.append(float(loss()))
            variable.assign(start)
            difference = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(gradient[index], difference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_gradient_descent_reaches_the_known_minimum(problem):
    variables, loss = problem.make()
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(problem.learning_rate),
        stopping=tk.stopping.GradientNormBelow(1e-6),
        max_iterations=300_000,
    )
    result = loop.minimize(loss, variables)
    assert result.loss == pytest.approx(problem.minimum, abs=3e-7)
    if problem.minimizer is not None:
        for found, known in zip(result.variables, problem.minimizer, strict=True):
            np.testing.assert_allclose(found, known, atol=2e-3)


def _run(problem, optimizer, step, driver, steps=12):
    variables, loss = problem.make()
    optimizer = OPTIMIZERS[optimizer](problem.learning_rate)
    result = tk.OptimizationLoop(optimizer, step=step, max_iterations=steps, **driver).minimize(loss, variables)
    slots = [np.asarray(variable) for variable in optimizer.variables]
    return [*result.variables, *slots, result.history["loss"], np.asarray(result.loss)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_strategies_agree_bit_for_bit_and_drivers_to_rounding(problem, optimizer):
    runs = {
        (step, name): _run(problem, optimizer, step, driver)
        for step in ("tape", "minimize")
        for name, driver in DRIVERS.items()
    }
    for name in DRIVERS:
        for by_tape, by_minimize in zip(runs["tape", name], runs["minimize", name], strict=True):
            assert by_tape.dtype == by_minimize.dtype
            np.testing.assert_array_equal(by_tape, by_minimize)
    for name in ("graph", "xla"):
        for eager, compiled in zip(runs["tape", "eager"], runs["tape", name], strict=True):
            rtol = 1e-5 if problem.name == "two_dtypes" or eager.dtype == np.float32 else 1e-12
            np.testing.assert_allclose(compiled, eager, rtol=rtol, atol=rtol * 1e-2)


def test_the_table_names_each_problem_once_and_says_where_it_comes_from():
    assert len(BY_NAME) == len(PROBLEMS) >= 12
    assert all(problem.source for problem in PROBLEMS)
