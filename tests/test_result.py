"""The result of a run: its fields, SciPy's names, and what a person reads."""

from __future__ import annotations

import functools
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import BY_NAME, DRIVERS

import tapekit as tk
from tapekit import _run
from tapekit._drivers._chunk import WORTH_HANDING_OVER


def _minimize(**settings):
    x = tf.Variable([0.0, 1.0], dtype=tf.float64, name="x")
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), **settings)
    return loop, loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x]), x


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_loss_is_evaluated_once_more_at_the_variables_that_are_returned(driver):
    _, result, x = _minimize(max_iterations=3, **DRIVERS[driver])
    np.testing.assert_array_equal(result.variables[0], x.numpy())
    assert result.loss == pytest.approx(np.sum((result.variables[0] - 4.0) ** 2), rel=1e-12)
    assert result.loss < result.history["loss"][-1]
    assert result.evaluations == 4


@pytest.mark.parametrize("name", ["rosenbrock_100", "two_dtypes", "embedding"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_variables_of_a_result_are_what_the_variables_are(driver, name):
    variables, loss = BY_NAME[name].make()
    loop = tk.OptimizationLoop("adam", max_iterations=5, steps_per_execution=3, **DRIVERS[driver])
    for _ in range(2):
        result = loop.minimize(loss, variables)
        for found, variable in zip(result.variables, variables, strict=True):
            np.testing.assert_array_equal(found, np.asarray(variable))
            found[...] = 0.0  # an array of its own
        result = loop.minimize(loss, {"one": variables[0], "rest": variables[1:]})
        np.testing.assert_array_equal(result.variables["one"], np.asarray(variables[0]))


@pytest.mark.parametrize("size", [1, WORTH_HANDING_OVER, 100_000])
@pytest.mark.parametrize("driver", DRIVERS)
def test_small_variables_and_large_ones_are_returned_and_only_while_nobody_has_changed_them(driver, size):
    x, unused = tf.Variable(tf.zeros([size])), tf.Variable(7.0)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), max_iterations=2, **DRIVERS[driver])
    run = functools.partial(loop.minimize, lambda: tf.reduce_sum((x - 4.0) ** 2), [x, unused], allow_unused=True)
    for _ in range(2):
        result = run()
        np.testing.assert_array_equal(result.variables[0], x.numpy())
        assert result.variables[1] == 7.0
    assert x.numpy().min() == 3.75
    reset = keras.callbacks.LambdaCallback(on_train_end=lambda logs: x.assign(tf.ones([size])))
    assert set(run(callbacks=[reset]).variables[0]) == {1.0}


@pytest.mark.parametrize("driver", ["graph", "xla"])
def test_nobody_reads_variables_that_a_run_has_handed_over(driver, monkeypatch):
    def read(variable):
        reads.append(variable)
        return real(variable)

    real, reads = _run.read_variable, []
    monkeypatch.setattr(_run, "read_variable", read)
    _, result, x = _minimize(max_iterations=3, **DRIVERS[driver])
    assert (result.best_loss, reads) == (result.loss, []), "the last ones are the best ones"
    result.best_variables[0][...] = 0.0  # an array of its own
    np.testing.assert_array_equal(result.variables[0], x.numpy())

    loop = tk.OptimizationLoop(keras.optimizers.SGD(2.0), max_iterations=3, **DRIVERS[driver])
    result = loop.minimize(lambda: tf.reduce_sum((x - 4.0) ** 2), [x], restore_best=True)  # goes up
    assert (result.loss, reads != []) == (result.history["loss"][0], True)
    np.testing.assert_array_equal(result.variables[0], x.numpy())


def test_the_variables_are_right_where_xla_takes_their_values_for_constants():
    x = tf.Variable([1.0, 2.0, 3.0])
    inner = tf.function(lambda: (x * 1.0, tf.size(x)))

    def loss():
        y, size = inner()
        return tf.reduce_sum(y**2) + tf.reduce_sum(tf.zeros([size]))  # a size that XLA must know, out of a call

    loop = tk.OptimizationLoop("adam", max_iterations=5, jit_compile=True)
    for _ in range(2):
        np.testing.assert_array_equal(loop.minimize(loss, [x]).variables[0], x.numpy())


def test_scipys_names_say_the_same():
    _, result, _ = _minimize(tolerance=1e-12, max_iterations=1000)
    assert (result.fun, result.nit, result.nfev) == (result.loss, result.steps, result.evaluations)
    assert result.success is result.converged is True
    assert result.status == 0
    np.testing.assert_array_equal(result.x, result.variables[0])
    _, limited, _ = _minimize(max_iterations=2)
    assert (limited.success, limited.status, limited.reason) == (False, 1, tk.StopReason.LIMIT)


def test_x_joins_all_variables_in_order_and_variables_keep_their_structure():
    a, b = tf.Variable(1.0), keras.Variable([[2.0, 3.0]])
    loop = tk.OptimizationLoop("sgd", max_iterations=1)
    result = loop.minimize(lambda: a**2 + tf.reduce_sum(b.value**2), {"pair": [b], "a": a})
    assert set(result.variables) == {"a", "pair"}
    np.testing.assert_array_equal(result.variables["pair"][0], b.numpy())
    np.testing.assert_array_equal(result.x, [a.numpy(), *b.numpy().ravel()])
    assert isinstance(result.variables["a"], np.ndarray)


def test_a_person_can_read_it():
    _, result, _ = _minimize(tolerance=1e-12, max_iterations=1000)
    lines = str(result).splitlines()
    assert lines[0] == result.message
    assert lines[0].startswith("LossChangeBelow: the loss changed by ")
    assert "converged: a convergence criterion was met" in lines[1]
    assert f"{result.steps}, with {result.steps + 1} evaluations" in str(result)
    assert repr(result).startswith("OptimizationResult(loss=")
    assert "\n" not in repr(result)


def test_a_run_that_nothing_would_end_is_refused():
    x = tf.Variable(0.0)
    with pytest.raises(ValueError, match="must end the run, received none of them"):
        tk.OptimizationLoop("sgd").minimize(lambda: (x - 4.0) ** 2, [x])
    assert float(x) == 0.0


def test_an_interrupt_leaves_a_result_and_goes_on_to_the_caller():
    x = tf.Variable(0.0)

    def interrupt(step, logs):
        if step == 5:
            raise KeyboardInterrupt

    loop = tk.OptimizationLoop("sgd", max_iterations=100)
    with pytest.raises(KeyboardInterrupt):
        loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks=[interrupt])
    assert loop.result is not None
    assert loop.result.reason is tk.StopReason.INTERRUPTED
    assert (loop.result.steps, loop.result.message) == (5, "interrupted after step 5")


def test_a_second_run_goes_on_from_where_the_variables_are_and_resets_the_criteria():
    x = tf.Variable(0.0, dtype=tf.float64)
    loop = tk.OptimizationLoop(
        keras.optimizers.SGD(0.1), stopping=tk.stopping.LossPlateau(3).after(1), max_iterations=10
    )
    loss = lambda: (x - 4.0) ** 2  # noqa: E731
    first, second = loop.minimize(loss, [x]), loop.minimize(loss, [x])
    assert (first.steps, second.steps) == (10, 10)
    assert second.history["loss"][0] == pytest.approx(first.loss)


def test_a_measure_takes_the_gradients_if_it_has_an_argument_without_a_default():
    x = tf.Variable([3.0, 4.0])
    measures = {
        "x": lambda v=x: v,
        "gradient": lambda gradients: gradients[0],
        "norm": tf.linalg.global_norm,
    }
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.5), max_iterations=1, measures=measures)
    history = loop.minimize(lambda: tf.reduce_sum(x**2) / 2.0, [x]).history
    np.testing.assert_allclose(history["x"], [[1.5, 2.0]])
    np.testing.assert_allclose(history["gradient"], [[3.0, 4.0]])
    np.testing.assert_allclose(history["norm"], [5.0])


@pytest.mark.parametrize("name", ["gradient_statistics", "capture_gradients", "iteration_table"])
def test_a_callback_that_only_looks_does_not_count_as_an_end(name):
    x = tf.Variable(0.0)
    with pytest.raises(ValueError, match="must end the run, received none of them"):
        tk.OptimizationLoop("sgd", callbacks=[name]).minimize(lambda: (x - 4.0) ** 2, [x])
    assert float(x) == 0.0


# Files, and the forms of other packages.


def _made(**changes):
    fields = {
        "loss": 0.5,
        "variables": {"a": np.float32(1.0), "pair": (np.arange(3.0), [np.ones((2, 1), "int32")])},
        "steps": 2,
        "evaluations": 3,
        "seconds": 0.25,
        "reason": tk.StopReason.LIMIT,
        "message": "enough",
        "history": {"loss": np.array([2.0, np.nan]), "x": np.arange(12.0).reshape(2, 2, 3)},
        "epoch_history": {},
        "best_loss": float("nan"),
        "best_variables": None,
    }
    return tk.OptimizationResult(**fields | changes)


def _leaves(value):
    if isinstance(value, dict):
        return [(key, leaf) for key in value for leaf in _leaves(value[key])]
    if isinstance(value, (list, tuple)):
        return [type(value), *(leaf for item in value for leaf in _leaves(item))]
    return [(str(np.asarray(value).dtype), np.shape(value), np.asarray(value).tobytes())]


@pytest.mark.parametrize(
    "result",
    [
        _made(),
        _made(variables=[tf.constant([1.0, 3.0], tf.bfloat16).numpy()], best_loss=None),
        _made(history={}, variables=[], epoch_history={"loss": np.ones(3)}, reason=tk.StopReason.ERROR),
        _made(history={"flag": np.array([True, False]), "half": np.ones(2, "float16"), "z": np.ones(2, "complex64")}),
    ],
)
def test_a_result_comes_back_from_its_file_bit_for_bit(result, tmp_path):
    result.save(tmp_path / "run.npz")
    loaded = tk.OptimizationResult.load(tmp_path / "run.npz")
    assert loaded.reason is result.reason
    assert _leaves(vars(loaded) | {"reason": 0}) == _leaves(vars(result) | {"reason": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]


def test_a_run_is_saved_and_its_file_holds_no_pickle(tmp_path):
    _, result, _ = _minimize(max_iterations=5)
    result.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file)
    np.testing.assert_array_equal(tk.OptimizationResult.load(tmp_path / "run.npz").x, result.x)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, a=np.ones(3)) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^`path` must be a file that OptimizationResult\.save has written"):
        tk.OptimizationResult.load(path)
    with pytest.raises(FileNotFoundError):
        tk.OptimizationResult.load(tmp_path / "none.npz")


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "run.npz"
    _made().save(path)
    with pytest.raises(TypeError):
        _made(variables=[object()]).save(path)
    assert tk.OptimizationResult.load(path).message == "enough"
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]


def test_a_history_as_a_data_frame():
    frame = _made(history={"loss": np.array([2.0, 1.0]), "x": np.arange(8.0).reshape(2, 2, 2)}).to_dataframe()
    assert list(frame.columns) == ["loss", "x[0, 0]", "x[0, 1]", "x[1, 0]", "x[1, 1]"]
    assert (frame.index.name, list(frame.index)) == ("step", [1, 2])
    np.testing.assert_array_equal(frame["x[1, 0]"], [2.0, 6.0])
    assert _made(history={}).to_dataframe().empty


def test_a_result_as_one_of_scipy():
    _, result, _ = _minimize(tolerance=1e-12, max_iterations=1000)
    theirs = result.to_scipy()
    assert type(theirs).__name__ == "OptimizeResult"
    assert (theirs.fun, theirs.nit, theirs.success, theirs.message) == (result.fun, result.nit, True, result.message)
    np.testing.assert_array_equal(theirs.x, result.x)


@pytest.mark.parametrize(("method", "package"), [("to_dataframe", "pandas"), ("to_scipy", "scipy")])
def test_a_missing_package_is_one_sentence_with_the_command(method, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    sentence = f'{method} needs {package}, which is not installed: pip install "tapekit[{package}]".'
    with pytest.raises(ImportError, match=re.escape(sentence)):
        getattr(_made(), method)()


def test_a_summary_is_printed_and_a_notebook_shows_a_table(capsys):
    result = _made(message="1 < 2", variables=[np.arange(2.0)])
    result.summary()
    assert capsys.readouterr().out == f"{result}\n"
    table = result._repr_html_()
    assert table.startswith("<p>1 &lt; 2</p><table><tr>")
    assert table.count("<tr>") == table.count("</tr>") == 5
