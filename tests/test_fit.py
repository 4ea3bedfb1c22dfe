"""`loop.fit` gives the numbers of `keras.Model.fit`: over models, kinds of data and arguments."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from typing import Any

import keras
import models
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import tensorflow as tf
import tf_keras
from keras.src.trainers.epoch_iterator import EpochIterator

import tapekit as tk

EAGER: dict[str, Any] = {"run_eagerly": True}
ROUNDING = 1e-5
# Older versions of Keras lose batches, or count steps too many, where a pass over the data ends before its epoch does.
ENDS_OF_PASSES = hasattr(EpochIterator, "reset")


@dataclasses.dataclass
class Pair:
    """The same model, trained by Keras and by a loop."""

    by_keras: keras.Model
    by_loop: keras.Model
    history: dict
    result: tk.OptimizationResult
    loop: tk.OptimizationLoop
    warnings: list[list[str]]


def _fit_both(make, arguments, loop=None, times=1):
    """Trains two models that `make` gives, with what `arguments` gives anew for each, as often as `times` says."""
    loop, outcomes, outcome, heard = loop or tk.OptimizationLoop(), [], None, []
    for fit in (lambda model, **more: model.fit(**more).history, loop.fit):
        model = make()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                outcome = fit(model, **({"verbose": 0, "shuffle": False, "epochs": 2} | arguments()))
        heard.append([str(warning.message) for warning in caught if warning.category is UserWarning])
        outcomes += [model, outcome]
    by_keras, history, by_loop, result = outcomes
    return Pair(by_keras, by_loop, history, result, loop, heard)


def _value(variable):
    return np.array(variable.numpy())


def _values(model):
    """Every number that a fit may change."""
    return [_value(variable) for variable in [*model.variables, *model.metrics_variables, *model.optimizer.variables]]


def _rounding(values):
    """The difference that rounding may make, relative to the largest value; what should be 0 has one of its own."""
    return ROUNDING * np.max(np.abs(values), initial=0.01)


def _assert_equal(pair, exact=True):
    """Asserts that variables and logs are the same bit for bit, or to rounding relative to the largest of an array."""
    ours, theirs = _values(pair.by_loop), _values(pair.by_keras)
    assert [value.shape for value in ours] == [value.shape for value in theirs]
    assert pair.result.epoch_history.keys() == pair.history.keys()
    logs = [(pair.result.epoch_history[name], np.array(values)) for name, values in pair.history.items()]
    for our, their in [*zip(ours, theirs, strict=True), *logs]:
        assert our.shape == their.shape
        np.testing.assert_allclose(our, their, rtol=0.0, atol=0.0 if exact else _rounding(their))


# Models.


def _arguments_of(problem, **more):
    x, y = problem.data()
    return lambda: {"x": x, "y": y, "batch_size": problem.batch_size, **more}


@pytest.mark.parametrize("name", models.BY_NAME)
def test_an_eager_fit_of_a_model_is_bit_equal_to_that_of_keras(name):
    problem = models.BY_NAME[name]
    pair = _fit_both(lambda: problem.make(**EAGER), _arguments_of(problem, epochs=3, validation_split=0.2))
    _assert_equal(pair)
    assert len(pair.history["val_loss"]) == 3


# XLA takes seconds for each model, so that some are compiled to graphs alone, as Keras does by default.
BY_XLA_TOO = ("dense", "lstm", "embedding", "batch_norm", "two_in_two_out")
RANDOM = ("dropout", "subclassed", "unbuilt_preprocessing", "attention")
IN_GRAPHS = ("convolutional", "functional", "float64", "many_metrics")


@pytest.mark.parametrize("name", [*BY_XLA_TOO, *RANDOM, *IN_GRAPHS])
def test_a_compiled_fit_of_a_model_gives_the_numbers_of_keras(name):
    problem = models.BY_NAME[name]
    loop = tk.OptimizationLoop(jit_compile=False if name in IN_GRAPHS else "auto")
    pair = _fit_both(problem.make, _arguments_of(problem, epochs=3), loop)
    _assert_equal(pair, exact=False)
    assert pair.result.steps == pair.result.history["loss"].size


def test_a_model_compiled_by_xla_gives_the_numbers_of_keras():
    problem = models.BY_NAME["dropout"]
    pair = _fit_both(lambda: problem.make(jit_compile=True), _arguments_of(problem, epochs=2, batch_size=10))
    _assert_equal(pair, exact=False)


@pytest.mark.parametrize("settings", [EAGER, {}], ids=["eager", "compiled"])
def test_a_second_fit_goes_on_where_the_first_has_ended(settings):
    problem = models.BY_NAME["batch_norm"]
    loop = tk.OptimizationLoop(jit_compile=False)
    pair = _fit_both(lambda: problem.make(**settings), _arguments_of(problem, epochs=2), loop, times=2)
    _assert_equal(pair, exact=bool(settings))
    assert int(pair.by_loop.optimizer.iterations) == 16


@pytest.mark.parametrize("settings", [EAGER, {}], ids=["eager", "compiled"])
def test_keras_and_the_loop_may_take_turns_on_one_model(settings):
    problem = models.BY_NAME["batch_norm"]
    arguments = _arguments_of(problem, epochs=1, verbose=0, shuffle=False)
    loop, ours, theirs = tk.OptimizationLoop(jit_compile=False), problem.make(**settings), problem.make(**settings)
    for fit in (ours.fit, functools.partial(loop.fit, ours), ours.fit):
        fit(**arguments())
        history = theirs.fit(**arguments())
    for our, their in zip(_values(ours), _values(theirs), strict=True):
        np.testing.assert_allclose(our, their, rtol=0.0, atol=0.0 if settings else _rounding(their))
    assert ours.history.history.keys() == history.history.keys()


@pytest.mark.parametrize(
    ("steps", "driver"),
    [(2, EAGER), (2, {"jit_compile": False}), *[(50, {"jit_compile": False}) for _ in range(ENDS_OF_PASSES)]],
)
def test_steps_per_execution_of_the_model_change_no_number(steps, driver):
    problem = models.BY_NAME["functional"]
    settings = EAGER if driver is EAGER else {}
    pair = _fit_both(
        lambda: problem.make(steps_per_execution=steps, **settings),
        _arguments_of(problem),
        tk.OptimizationLoop(**driver),
    )
    _assert_equal(pair, exact=bool(settings))


def test_a_model_without_trainable_weights_is_run_as_keras_runs_it():
    def make():
        model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(center=False, scale=False)])
        model.compile("sgd", "mse", **EAGER)
        return model

    x = models.BY_NAME["dense"].data()[0]
    pair = _fit_both(make, lambda: {"x": x, "y": x})
    _assert_equal(pair)
    assert [text.lower() for text in pair.warnings[1]] == [text.lower() for text in pair.warnings[0]]
    assert np.ptp(_value(pair.by_loop.layers[0].moving_mean)) > 0


class CountsCalls(keras.Model):
    """A model that counts how often it is called, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.noise = keras.layers.GaussianNoise(0.1)
        self.head = keras.layers.Dense(1)

    def call(self, inputs):
        self.calls.assign_add(1)
        return self.head(self.noise(inputs, training=True))


@pytest.mark.parametrize("settings", [EAGER, {}], ids=["eager", "compiled"])
def test_a_model_is_called_as_often_as_by_keras(settings):
    def make():
        keras.utils.set_random_seed(0)
        model = CountsCalls()
        model.compile("sgd", "mse", **settings)
        return model

    pair = _fit_both(make, _arguments_of(models.BY_NAME["dropout"]))
    _assert_equal(pair, exact=bool(settings))
    assert int(pair.by_loop.calls.numpy()) == pair.result.steps == 8


# Kinds of data.

X, Y = models.BY_NAME["dropout"].data()
WIDE = models.BY_NAME["two_in_two_out"].data()
POSITIVE = np.where(X > 0.0, X, 0.0)
WORDS = np.array([["a"], ["b"], ["c"], ["d"]] * 5)
LENGTHS = [1, 2, 3, 4] * 5
RAGGED = tf.RaggedTensor.from_row_lengths(np.resize(X, (sum(LENGTHS), 2)), LENGTHS)
SIGNATURE = tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1))
BATCH = 8


def _small(*first):
    """Returns what makes a small regression on the given first layers."""

    def make(**settings):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([*(layer() for layer in first), keras.layers.Dense(1)])
        model.compile("sgd", "mse", **settings)
        return model

    return make


def _two_lists(**settings):
    keras.utils.set_random_seed(0)
    a, b = keras.Input((4,)), keras.Input((2, 2))
    hidden = keras.layers.Concatenate()([a, keras.layers.Flatten()(b)])
    outputs = [keras.layers.Dense(1, name="p")(hidden), keras.layers.Dense(3, activation="softmax", name="q")(hidden)]
    model = keras.Model([a, b], outputs)
    model.compile("sgd", ["mse", "sparse_categorical_crossentropy"], metrics=[["mae"], ["accuracy"]], **settings)
    return model


class SumsOfRows(keras.Model):
    """A model of rows of any number of vectors."""

    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(1)

    def call(self, inputs):
        return self.head(tf.reduce_sum(inputs, axis=1))


def _of_rows(**settings):
    keras.utils.set_random_seed(0)
    model = SumsOfRows()
    model.compile("sgd", "mse", **settings)
    return model


def _convolved(**settings):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Conv1D(3, 3), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **settings)
    return model


def _input(*shape, **more):
    return lambda: keras.Input(shape, **more)


DENSE = _small(_input(4))
SPARSE = _small(_input(4, sparse=True))
INDEXED = _small(_input(4, dtype="int32"), lambda: keras.layers.Embedding(5, 3), keras.layers.Flatten)
LOOKED_UP = _small(
    _input(1, dtype="string"),
    lambda: keras.layers.StringLookup(vocabulary=["a", "b", "c"]),
    lambda: keras.layers.Embedding(5, 3),
    keras.layers.Flatten,
)
READ = _small(
    _input(1, dtype="string"),
    lambda: keras.layers.TextVectorization(vocabulary=["a", "b", "c"], output_sequence_length=3),
    lambda: keras.layers.Embedding(6, 3),
    keras.layers.Flatten,
)


class Rows(keras.utils.PyDataset):
    """The batches of X and Y; `moves` puts them in another order at the end of an epoch."""

    def __init__(self, moves=False, **more):
        super().__init__(**more)
        self.order = np.arange(len(X))
        self.moves = moves
        self.ends = 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        return X[rows], Y[rows]

    def on_epoch_end(self):
        self.ends += 1
        if self.moves:
            self.order = np.random.default_rng(self.ends).permutation(len(X))


def _batches(sizes=(8, 8, 4), times=1):
    for _ in range(times):
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            yield X[end - size : end], Y[end - size : end]


def _dataset(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays or (X, Y))


def _unknown(sizes=(8, 8, 4)):
    return tf.data.Dataset.from_generator(lambda: _batches(sizes), output_signature=SIGNATURE)


def _arrays(x, y=Y, **more):
    return lambda: {"x": x, "y": y, "batch_size": BATCH, **more}


ARRAYS = {
    "float32": (DENSE, _arrays(X)),
    "float64": (DENSE, _arrays(X.astype("float64"), Y.astype("float64"))),
    "float16": (DENSE, _arrays(X.astype("float16"), Y.astype("float16"))),
    "integers": (INDEXED, _arrays(np.abs(2 * X).astype("int64") % 5, np.round(Y).astype("int32"))),
    "integers for floats": (DENSE, _arrays((2 * X).astype("uint8"), np.round(Y).astype("int64"))),
    "bools": (DENSE, _arrays(X > 0.0)),
    "targets of rank 1": (DENSE, _arrays(X, Y[:, 0])),
    "not contiguous": (DENSE, _arrays(np.asfortranarray(X), np.repeat(Y, 2, 0)[::2])),
    "tensors": (DENSE, _arrays(tf.constant(X, tf.float64), tf.constant(Y))),
    "variables": (DENSE, _arrays(tf.Variable(X), keras.Variable(Y))),
    "lists": (_two_lists, _arrays(list(WIDE[0].values()), list(WIDE[1].values()))),
    "tuples": (_two_lists, _arrays(tuple(WIDE[0].values()), tuple(WIDE[1].values()))),
    "dicts": (models.BY_NAME["two_in_two_out"].make, _arrays(WIDE[0], dict(reversed(WIDE[1].items())))),
    "mixed kinds": (_two_lists, _arrays([pd.DataFrame(X), tf.constant(WIDE[0]["b"])], list(WIDE[1].values()))),
    "data frames": (DENSE, _arrays(pd.DataFrame(X, columns=list("abcd")), pd.DataFrame(Y))),
    "a series": (DENSE, _arrays(pd.DataFrame(X.astype("float64")), pd.Series(Y[:, 0], name="target"))),
    "a data frame of two dtypes": (DENSE, _arrays(pd.DataFrame(X).assign(n=np.arange(20)).iloc[:, 1:])),
    "strings": (LOOKED_UP, _arrays(tf.constant(WORDS))),
    "string objects": (LOOKED_UP, _arrays(WORDS[:, 0].astype(object))),
    "text": (READ, _arrays(tf.constant([["a b"], ["c c a"], ["d"], ["b a"]] * 5))),
    "ragged tensors": (_of_rows, _arrays(RAGGED)),
    "sparse tensors": (SPARSE, _arrays(tf.sparse.from_dense(POSITIVE))),
    "sparse arrays of scipy": (SPARSE, _arrays(scipy.sparse.csr_matrix(POSITIVE))),
}
STREAMS = {
    "a dataset": (DENSE, lambda: {"x": _dataset().batch(BATCH)}),
    "a dataset for an unbuilt model": (_small(), lambda: {"x": _dataset().batch(BATCH)}),
    "a dataset of full batches": (DENSE, lambda: {"x": _dataset().batch(BATCH, drop_remainder=True)}),
    "a dataset of dicts": (models.BY_NAME["two_in_two_out"].make, lambda: {"x": _dataset(*WIDE).batch(BATCH)}),
    "a dataset with weights": (DENSE, lambda: {"x": _dataset(X, Y, np.abs(Y[:, 0])).batch(BATCH)}),
    "a dataset that shuffles": (DENSE, lambda: {"x": _dataset().shuffle(20, seed=1).batch(BATCH), "epochs": 3}),
    "a dataset without end": (DENSE, lambda: {"x": _dataset().repeat().batch(BATCH), "steps_per_epoch": 4}),
    "a dataset of ragged tensors": (_of_rows, lambda: {"x": _dataset(RAGGED, Y).batch(BATCH)}),
    "a dataset of sparse tensors": (SPARSE, lambda: {"x": _dataset(tf.sparse.from_dense(POSITIVE), Y).batch(BATCH)}),
    "a dataset of strings": (LOOKED_UP, lambda: {"x": _dataset(WORDS, Y).batch(BATCH)}),
    "a PyDataset": (DENSE, lambda: {"x": Rows()}),
    "a PyDataset that moves": (DENSE, lambda: {"x": Rows(moves=True)}),
    "a PyDataset with workers": (DENSE, lambda: {"x": Rows(moves=True, workers=2)}),
    "a shuffled PyDataset": (DENSE, lambda: {"x": Rows(), "shuffle": True}),
    "parts of a PyDataset": (DENSE, lambda: {"x": Rows(), "steps_per_epoch": 2, "epochs": 2}),
    "a generator": (DENSE, lambda: {"x": _batches(times=4), "steps_per_epoch": 3}),
}
SEQUENCES = tf.TensorSpec((None, None, 4)), tf.TensorSpec((None, 1))


def _sequences():
    for length in (5, 4, 3):
        yield np.resize(X, (8, length, 4)), Y[:8]


if ENDS_OF_PASSES:
    STREAMS["parts of a dataset that shuffles"] = (
        DENSE,
        lambda: {"x": _dataset().shuffle(20, seed=1).batch(BATCH), "steps_per_epoch": 3, "epochs": 3},
    )
# Keras finds the end of these only by running into it.
OF_UNKNOWN_LENGTH = {
    "a dataset of unknown length": (DENSE, lambda: {"x": _unknown()}),
    "batches of many sizes": (DENSE, lambda: {"x": _unknown((7, 2, 11))}),
    "a dataset that filters": (DENSE, lambda: {"x": _dataset().filter(lambda *row: row[0][0] > 0.0).batch(4)}),
    "batches of unknown rank": (
        _small(),
        lambda: {"x": tf.data.Dataset.from_generator(_batches, output_types=(tf.float32, tf.float32))},
    ),
    "sequences of many lengths for an unbuilt model": (
        _convolved,
        lambda: {"x": tf.data.Dataset.from_generator(_sequences, output_signature=SEQUENCES)},
    ),
    "parts of a dataset of unknown length": (DENSE, lambda: {"x": _unknown(), "steps_per_epoch": 2}),
    "a generator that is short": (DENSE, lambda: {"x": _batches(), "steps_per_epoch": 2}),
}
KINDS = ARRAYS | STREAMS | OF_UNKNOWN_LENGTH


@pytest.mark.parametrize("kind", KINDS)
def test_an_eager_fit_to_data_of_any_kind_is_bit_equal_to_that_of_keras(kind):
    make, arguments = KINDS[kind]
    pair = _fit_both(lambda: make(**EAGER), arguments)
    _assert_equal(pair)
    assert pair.result.steps > 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("a dataset", {}),
        ("a dataset of ragged tensors", {}),
        ("a dataset of sparse tensors", {}),
        ("sparse tensors", {}),
        ("a dataset for an unbuilt model", {"jit_compile": False}),
        ("a dataset of dicts", {"jit_compile": False}),
        ("a dataset that shuffles", {"jit_compile": False}),
        *[("parts of a dataset that shuffles", {"jit_compile": False}) for _ in range(ENDS_OF_PASSES)],
        ("a dataset without end", {"jit_compile": False}),
        ("a dataset of strings", {"jit_compile": False}),
        ("a PyDataset with workers", {"jit_compile": False}),
        ("a generator", {"jit_compile": False}),
    ],
)
def test_a_compiled_fit_to_data_gives_the_numbers_of_keras(kind, settings):
    make, arguments = KINDS[kind]
    _assert_equal(_fit_both(make, arguments, tk.OptimizationLoop(**settings)), exact=False)


@pytest.mark.parametrize("kind", ["a dataset of unknown length", "parts of a dataset of unknown length"])
def test_a_compiled_fit_to_data_of_unknown_length_gives_the_numbers_of_keras(kind):
    make, arguments = KINDS[kind]
    # A graph of Keras counts one iteration more at the end of such data, which a model that runs eagerly does not.
    settings = iter([EAGER, {}])
    loop = tk.OptimizationLoop(jit_compile=False)
    _assert_equal(_fit_both(lambda: make(**next(settings)), arguments, loop), exact=False)


@pytest.mark.parametrize("op", [lambda x: tf.numpy_function(np.sign, [x], tf.float32), tf.RaggedTensor.from_tensor])
def test_a_batch_that_xla_refuses_is_not_lost(op):
    class Refused(keras.layers.Layer):
        def call(self, inputs):
            return inputs + tf.reduce_sum(op(inputs))

    pair = _fit_both(_small(_input(4), Refused), lambda: {"x": _dataset().batch(BATCH)})
    assert pair.result.steps == 6
    _assert_equal(pair, exact=False)


@pytest.mark.parametrize("moves", [False, True])
def test_a_py_dataset_hears_of_epochs_as_from_keras(moves):
    datasets = [Rows(moves), Rows(moves)]
    given = iter(datasets)
    _fit_both(lambda: DENSE(**EAGER), lambda: {"x": next(given)})
    assert datasets[0].ends == datasets[1].ends == 3


@pytest.mark.parametrize(("kind", "settings"), [("float32", EAGER), ("integers", EAGER), ("mixed kinds", {})])
def test_arrays_that_are_streamed_give_the_same_numbers(kind, settings):
    make, arguments = KINDS[kind]
    results, values = [], []
    for most in (1 << 30, 0):
        model = make(**settings)
        results.append(
            tk.OptimizationLoop(jit_compile=False).fit(
                model, **arguments(), epochs=2, shuffle=False, verbose=0, device_bytes=most
            )
        )
        values.append(_values(model))
    for one, other in zip(*values, strict=True):
        np.testing.assert_allclose(other, one, rtol=0.0, atol=0.0 if settings else _rounding(one))
    losses = [result.history["loss"] for result in results]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.0 if settings else ROUNDING)


# Arguments.


def _both_eager(make=DENSE, loop=None, **arguments):
    return _fit_both(lambda: make(**EAGER), lambda: {"x": X, "y": Y, **arguments}, loop)


LABELS = (Y > 0.0).astype("float32")
WEIGHTS = np.abs(X[:, 0])
HELD_OUT = X[::-1] + 0.1, Y[::-1]


ARGUMENTS = {
    "batch_size": {"batch_size": 7},
    "no batch_size": {},
    "a batch of everything": {"batch_size": 64},
    "batch_size as a NumPy integer": {"batch_size": np.int64(8), "epochs": np.int32(2)},
    "initial_epoch": {"initial_epoch": 1, "epochs": 3},
    "a divisor of the batches": {"batch_size": 5, "steps_per_epoch": 2},
    "not a divisor of the batches": {"batch_size": 8, "steps_per_epoch": 2},
    "more than there are": {"batch_size": 8, "steps_per_epoch": 5},
    "class_weight": {"y": LABELS, "class_weight": {0: 1.0, 1: 3.0}},
    "class_weight of one class": {"y": LABELS[:, 0], "class_weight": {1: 3.0}},
    "class_weight of one-hot classes": {"y": np.hstack([LABELS, 1 - LABELS])[:, :1], "class_weight": {0: 0.5}},
    "sample_weight": {"sample_weight": WEIGHTS, "batch_size": 8},
    "sample_weight in a column": {"sample_weight": WEIGHTS[:, None]},
    "sample_weight in a series": {"sample_weight": pd.Series(WEIGHTS)},
    "validation_data": {"validation_data": HELD_OUT, "batch_size": 8},
    "validation_data with weights": {"validation_data": (*HELD_OUT, WEIGHTS)},
    "validation_data as a dataset": {"validation_data": _dataset(*HELD_OUT).batch(3)},
    "validation_data as a PyDataset": {"validation_data": Rows()},
    "validation_split": {"validation_split": 0.25, "batch_size": 4},
    "validation_split with weights": {"validation_split": 0.25, "sample_weight": WEIGHTS},
    "validation_split is second to validation_data": {"validation_split": 0.5, "validation_data": HELD_OUT},
    "validation_steps": {"validation_data": HELD_OUT, "validation_steps": 2, "batch_size": 4},
    "validation_steps of a dataset": {
        "validation_data": _dataset(*HELD_OUT).batch(3).repeat(),
        "validation_steps": 4,
    },
    "validation_batch_size": {"validation_data": HELD_OUT, "validation_batch_size": 3},
    "validation_freq": {"validation_data": HELD_OUT, "validation_freq": 2, "epochs": 4},
    "validation_freq as a list": {"validation_data": HELD_OUT, "validation_freq": [1, 4], "epochs": 4},
}
if ENDS_OF_PASSES:
    ARGUMENTS["as many as there are"] = {"batch_size": 8, "steps_per_epoch": 3}
    ARGUMENTS["steps_per_epoch without batch_size"] = {"steps_per_epoch": 3}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_means_what_it_means_to_keras(name):
    pair = _both_eager(**ARGUMENTS[name])
    _assert_equal(pair)
    assert len(pair.warnings[1]) == len(pair.warnings[0])
    assert all("data" in text and "steps_per_epoch" in text for text in pair.warnings[1])


WEIGHTS_OF_EACH = {"value": WEIGHTS, "kind": WEIGHTS[::-1].copy()}


@pytest.mark.parametrize(
    ("weights", "settings"),
    [(WEIGHTS, EAGER), (WEIGHTS_OF_EACH, EAGER), (WEIGHTS_OF_EACH, {})],
    ids=["one", "each", "each compiled"],
)
def test_outputs_are_weighted_as_by_keras(weights, settings):
    problem = models.BY_NAME["two_in_two_out"]
    arguments = _arguments_of(problem, sample_weight=weights, validation_split=0.2)
    pair = _fit_both(lambda: problem.make(**settings), arguments, tk.OptimizationLoop(jit_compile=False))
    _assert_equal(pair, exact=bool(settings))
    assert {"value_mae", "val_value_mse", "kind_accuracy", "value_loss"} <= pair.history.keys()


@pytest.mark.parametrize(
    "arguments",
    [
        *[{"batch_size": 4, "validation_steps": 2} for _ in range(ENDS_OF_PASSES)],
        {"validation_batch_size": 3, "validation_freq": 2, "epochs": 4},
    ],
)
def test_a_validation_means_the_same_in_a_compiled_fit(arguments):
    weighted = {"x": X, "y": Y, "validation_data": (*HELD_OUT, WEIGHTS), **arguments}
    _assert_equal(_fit_both(DENSE, lambda: weighted, tk.OptimizationLoop(jit_compile=False)), exact=False)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_part_of_a_pass_is_an_epoch_in_a_compiled_fit_too(steps):
    settings = iter([EAGER, {}])  # since older graphs of Keras count a step more where the data end
    arguments = {"x": X, "y": Y, "epochs": 4, "batch_size": 8, "steps_per_epoch": steps}
    loop = tk.OptimizationLoop(jit_compile=False)
    _assert_equal(_fit_both(lambda: DENSE(**next(settings)), lambda: arguments, loop), exact=False)


@pytest.mark.parametrize("first", [3, 5])
def test_no_epoch_is_run_if_none_is_left(first):
    pair = _both_eager(initial_epoch=first, epochs=3)
    assert pair.result.epoch_history == pair.history == {}
    assert (pair.result.steps, pair.result.message) == (0, "the last of 3 epochs ended at step 0")
    for our, their in zip(pair.by_loop.get_weights(), pair.by_keras.get_weights(), strict=True):
        np.testing.assert_array_equal(our, their)


class Recorder(keras.Model):
    """Records in a variable how often it has seen each of 20 samples, and in which order."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.seen = self.add_weight(shape=(80,), initializer="zeros", trainable=False)
        self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def call(self, inputs, training=False):
        if training:
            places = self.count + tf.range(tf.shape(inputs)[0])
            self.seen.assign(tf.tensor_scatter_nd_update(self.seen, places[:, None], inputs[:, 0]))
            self.count.assign_add(tf.shape(inputs)[0])
        return inputs * self.scale


def _orders(shuffle, settings, **more):
    keras.utils.set_random_seed(3)
    model = Recorder()
    model.compile("sgd", "mse", **settings)
    x = np.arange(20.0)[:, None]
    tk.OptimizationLoop().fit(model, x, x, batch_size=8, epochs=4, verbose=0, shuffle=shuffle, **more)
    return _value(model.seen).reshape(4, 20)


@pytest.mark.parametrize(
    ("settings", "device_bytes"), [(EAGER, 1 << 30), (EAGER, 0), ({"jit_compile": False}, 1 << 30)]
)
def test_every_sample_comes_once_an_epoch_in_an_order_of_its_own(settings, device_bytes):
    orders = _orders(True, settings, device_bytes=device_bytes)
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(20.0), (4, 1)))
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(orders, _orders(True, settings, device_bytes=device_bytes))


def test_the_order_depends_on_the_seed_and_not_on_the_driver():
    first = _orders(True, EAGER)
    np.testing.assert_array_equal(first, _orders(True, {"jit_compile": False}))
    keras.utils.set_random_seed(4)
    model = Recorder()
    model.compile("sgd", "mse", **EAGER)
    x = np.arange(20.0)[:, None]
    tk.OptimizationLoop().fit(model, x, x, epochs=4, verbose=0)
    assert not np.array_equal(first, _value(model.seen).reshape(4, 20))


@pytest.mark.parametrize("device_bytes", [1 << 30, 0])
def test_samples_are_shuffled_within_batches_alone_if_asked(device_bytes):
    orders = _orders("batch", EAGER, device_bytes=device_bytes)
    for start in (0, 8, 16):
        batch = orders[:, start : start + 8]
        np.testing.assert_array_equal(np.sort(batch), np.tile(np.arange(20.0)[start : start + 8], (4, 1)))
        assert len({tuple(row) for row in batch}) > 1


def test_samples_are_not_shuffled_if_not_asked():
    np.testing.assert_array_equal(_orders(False, EAGER), np.tile(np.arange(20.0), (4, 1)))


def _without_times(text):
    """Returns the last state of each line of the output, without times and the width of the bar."""
    lines = re.split(r"[\n\r\b]+", re.sub(r"\x1b\[[0-9;]*m|\x08", "\n", text))
    lines = [re.sub(r"\s*\d+(us|ms|s)(/step|/epoch)?\b", " T", line).strip() for line in lines]
    return [line for line in lines if re.match(r"(Epoch )?\d+/\d+|- | - |.*loss", line) and "ETA" not in line]


@pytest.mark.parametrize(
    ("verbose", "held_out"), [(0, HELD_OUT), (1, None), (1, HELD_OUT), (2, None), (2, HELD_OUT), ("auto", HELD_OUT)]
)
def test_what_is_printed_looks_like_what_keras_prints(verbose, held_out, capsys):
    texts = []
    for fit in (lambda model, *args, **more: model.fit(*args, **more), tk.OptimizationLoop().fit):
        fit(DENSE(**EAGER), X, Y, epochs=2, verbose=verbose, shuffle=False, validation_data=held_out)
        texts.append(_without_times(capsys.readouterr().out))
    # Between the epochs' ends a progress bar shows as many states as time allows.
    ends = [[line for line in text if line.startswith(("Epoch", "1/1")) or verbose == 2] for text in texts]
    assert ends[0] == ends[1]
    assert bool(ends[1]) == (verbose != 0)
    assert not capsys.readouterr().err


# What is refused.


def _arrays_of_a_model(model):
    return [_value(variable) for variable in [*model.variables, *model.optimizer.variables]]


def _assert_refused(model, arguments, error, words, **settings):
    """Asserts one sentence with these words, and a model that is as it was."""
    loop = tk.OptimizationLoop(**settings)
    before, attributes = _arrays_of_a_model(model), {**vars(model)}
    with pytest.raises(error) as caught:
        loop.fit(model, **({"x": X, "y": Y, "epochs": 1, "verbose": 0} | arguments))
    message = str(caught.value)
    assert type(caught.value) is error
    for word in words:
        assert word in message
    assert message.endswith(".")
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message)
    for old, new in zip(before, _arrays_of_a_model(model), strict=True):
        np.testing.assert_array_equal(new, old)
    for name in ("optimizer", "compiled", "stop_training", "train_function", "_loss_tracker", "history"):
        assert getattr(model, name, None) is attributes.get(name, attributes.get(f"_{name}"))
    assert loop.result is None


INTEGER, NUMBER = "must be an integer of at least 1", "must be a number of at least 0"
REFUSED = {
    "epochs of 0": ({"epochs": 0}, ValueError, ["`epochs`", INTEGER, "received 0"]),
    "epochs as text": ({"epochs": "3"}, TypeError, ["`epochs`", INTEGER, "'3'"]),
    "epochs as a float": ({"epochs": 2.0}, TypeError, ["`epochs`", INTEGER, "float 2.0"]),
    "epochs as a bool": ({"epochs": True}, TypeError, ["`epochs`", INTEGER, "True"]),
    "batch_size of 0": ({"batch_size": 0}, ValueError, ["`batch_size`", INTEGER]),
    "batch_size as text": ({"batch_size": "8"}, TypeError, ["`batch_size`", INTEGER]),
    "batch_size as a float": ({"batch_size": 8.0}, TypeError, ["`batch_size`", INTEGER]),
    "initial_epoch below 0": ({"initial_epoch": -1}, ValueError, ["`initial_epoch`", "at least 0", "-1"]),
    "initial_epoch of None": ({"initial_epoch": None}, TypeError, ["`initial_epoch`", "None"]),
    "steps_per_epoch of 0": ({"steps_per_epoch": 0}, ValueError, ["`steps_per_epoch`", INTEGER]),
    "steps_per_epoch as a float": ({"steps_per_epoch": 1.5}, TypeError, ["`steps_per_epoch`", INTEGER]),
    "validation_steps of 0": (
        {"validation_data": HELD_OUT, "validation_steps": 0},
        *(ValueError, ["`validation_steps`", INTEGER]),
    ),
    "validation_batch_size of 0": ({"validation_batch_size": 0}, ValueError, ["`validation_batch_size`", INTEGER]),
    "validation_freq of 0": ({"validation_freq": 0}, ValueError, ["`validation_freq`", INTEGER]),
    "validation_freq as text": ({"validation_freq": "2"}, TypeError, ["`validation_freq`", INTEGER]),
    "validation_freq with a 0": ({"validation_freq": [1, 0]}, ValueError, ["`validation_freq`", INTEGER]),
    "validation_split of 1": ({"validation_split": 1.0}, ValueError, ["`validation_split`", "below 1"]),
    "validation_split below 0": ({"validation_split": -0.1}, ValueError, ["`validation_split`", NUMBER]),
    "validation_split as text": ({"validation_split": "a"}, TypeError, ["`validation_split`", NUMBER]),
    "validation_split that is not a number": ({"validation_split": np.nan}, ValueError, ["`validation_split`", NUMBER]),
    "validation_split that leaves nothing": ({"validation_split": 0.99}, ValueError, ["`validation_split`", "20"]),
    "validation_split of a dataset": (
        {"x": _dataset().batch(BATCH), "y": None, "validation_split": 0.5},
        *(ValueError, ["`validation_split`"]),
    ),
    "validation_data as a number": ({"validation_data": 3}, ValueError, ["`validation_data`"]),
    "validation_data of two sizes": ({"validation_data": (X, Y[:7])}, ValueError, ["`validation_data`", "20", "7"]),
    "verbose as text": ({"verbose": "loud"}, ValueError, ["`verbose`", '0, 1, 2 or "auto"', "'loud'"]),
    "verbose of 3": ({"verbose": 3}, ValueError, ["`verbose`", "int 3"]),
    "shuffle as text": ({"shuffle": "yes"}, ValueError, ["`shuffle`", 'True, False or "batch"', "'yes'"]),
    "shuffle of None": ({"shuffle": None}, ValueError, ["`shuffle`", "None"]),
    "class_weight as a list": ({"y": LABELS, "class_weight": [1.0, 2.0]}, TypeError, ["`class_weight`", "a dict"]),
    "class_weight of words": ({"y": LABELS, "class_weight": {"a": 1.0}}, TypeError, ["`class_weight`"]),
    "class_weight with sample_weight": (
        {"y": LABELS, "class_weight": {0: 1.0}, "sample_weight": WEIGHTS},
        *(ValueError, ["`class_weight`", "`sample_weight`"]),
    ),
    "sample_weight of another size": ({"sample_weight": WEIGHTS[:7]}, ValueError, ["`sample_weight`", "7"]),
    "y of another size": ({"y": Y[:7]}, ValueError, ["`y`", "20", "7"]),
    "y beside a dataset": ({"x": _dataset().batch(BATCH)}, ValueError, ["`y`", "Dataset"]),
    "x of None": ({"x": None, "y": None}, ValueError, ["`x`", "None"]),
    "x as text": ({"x": "data.csv"}, ValueError, ["`x`", "data.csv"]),
    "x as a number": ({"x": 3.0}, ValueError, ["`x`", "3.0"]),
    "x of no samples": ({"x": X[:0], "y": Y[:0]}, ValueError, ["`x`"]),
    "data without end": (
        {"x": _dataset().repeat().batch(BATCH), "y": None},
        *(ValueError, ["`steps_per_epoch`", "without end"]),
    ),
    "a PyDataset of no batch": (
        {"x": type("Empty", (Rows,), {"__len__": lambda self: 0})(), "y": None},
        ValueError,
        ["`x`"],
    ),
    "device_bytes below 0": ({"device_bytes": -1}, ValueError, ["`device_bytes`", "at least 0"]),
    "device_bytes as text": ({"device_bytes": "1 GB"}, TypeError, ["`device_bytes`", "1 GB"]),
    "callbacks as a number": ({"callbacks": 3}, TypeError, ["`callbacks`", "int 3"]),
    "a loss beside that of the model": ({"loss": "mae"}, ValueError, ["`loss`", "compiled", "'mae'"]),
    "metrics beside those of the model": ({"metrics": ["mse"]}, ValueError, ["`metrics`", "compiled"]),
}


@functools.cache
def _model_to_refuse_with(eager):
    return DENSE(run_eagerly=eager)


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("settings", [EAGER, {}], ids=["eager", "compiled"])
def test_a_bad_argument_is_refused_in_one_sentence_and_nothing_has_changed(what, settings):
    _assert_refused(_model_to_refuse_with(bool(settings)), *REFUSED[what])


@pytest.mark.parametrize("settings", [EAGER, {}], ids=["eager", "compiled"])
def test_an_error_of_the_model_reaches_the_caller_and_no_weight_has_changed(settings):
    model = DENSE(**settings)
    before = model.get_weights()
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 4"):
        tk.OptimizationLoop().fit(model, X[:, :3], Y, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize("make", [lambda: 3.0, lambda: keras.Model, lambda: lambda x: x, lambda: keras.layers.Dense(1)])
def test_what_is_no_model_is_refused(make):
    with pytest.raises(TypeError, match=r"^`model` must be a keras\.Model, received [^.]+( 3\.0)?\.$"):
        tk.OptimizationLoop("sgd").fit(make(), X, Y)


def test_a_model_of_tf_keras_is_refused_with_what_to_use():
    model = tf_keras.Sequential([tf_keras.layers.Dense(1)])
    with pytest.raises(
        TypeError, match=r"^`model` must be of Keras 3 for fit, received .*tf_keras; use minimize .*\.$"
    ):
        tk.OptimizationLoop("sgd").fit(model, X, Y)
    with pytest.raises(TypeError, match=r"^`optimizer` must be of Keras 3 for fit, received .*tf_keras; .*\.$"):
        tk.OptimizationLoop(tf_keras.optimizers.SGD()).fit(DENSE(**EAGER), X, Y)


def _plain() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


@pytest.mark.parametrize(
    ("optimizer", "arguments", "word"),
    [
        ("sgd", {}, "`loss`"),
        (None, {"loss": "mse"}, "`optimizer`"),
        ("sgd", {"loss": "no such loss"}, "no such loss"),
        ("sgd", {"loss": "mse", "metrics": ["no such metric"]}, "no such metric"),
        ("sgd", {"loss": "mse", "epochs": 0}, "`epochs`"),
    ],
)
@pytest.mark.parametrize("eager", [True, False])
def test_a_model_that_was_not_compiled_is_not_after_a_refusal(optimizer, arguments, word, eager):
    model = _plain()
    before = model.get_weights()
    loop = tk.OptimizationLoop(optimizer, run_eagerly=eager)
    with pytest.raises((ValueError, TypeError)) as caught:
        loop.fit(model, **({"x": X, "y": Y, "verbose": 0} | arguments))
    assert word in str(caught.value)
    assert not model.compiled
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_model_that_is_not_compiled_is_trained_with_the_optimizer_and_loss_that_are_given():
    model, twin = _plain(), _plain()
    result = tk.OptimizationLoop(keras.optimizers.SGD(0.1), run_eagerly=True).fit(
        model, X, Y, epochs=2, verbose=0, shuffle=False, loss="mse", metrics=["mae"]
    )
    twin.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"], **EAGER)
    history = twin.fit(X, Y, epochs=2, verbose=0, shuffle=False)
    for our, their in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(our, their)
    assert {name: list(values) for name, values in result.epoch_history.items()} == history.history


# Losses, traces, the result.


def _by_hand(x, y, weights, rate, batch_size, epochs):
    """Gradient descent on the squared error of a linear model: the loss of each batch, and the last weights."""
    kernel, bias = (np.asarray(weight, np.float64) for weight in weights)
    losses = []
    for _ in range(epochs):
        for start in range(0, len(x), batch_size):
            batch, target = x[start : start + batch_size], y[start : start + batch_size]
            errors = batch @ kernel + bias - target
            losses.append(np.mean(errors**2))
            kernel = kernel - rate * 2.0 * batch.T @ errors / len(batch)
            bias = bias - rate * 2.0 * errors.mean(0)
    return np.array(losses), kernel, bias


@pytest.mark.parametrize(
    ("step", "driver"),
    [
        ("tape", EAGER),
        ("minimize", EAGER),
        ("tape", {"jit_compile": False}),
        ("minimize", {"jit_compile": False}),
        ("tape", {}),
    ],
    ids=["tape eager", "minimize eager", "tape graph", "minimize graph", "default"],
)
def test_history_holds_the_loss_of_each_batch_and_epoch_history_the_mean_of_keras(step, driver):
    model = _plain()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses, kernel, bias = _by_hand(X, Y, model.get_weights(), 0.1, 8, 3)
    result = tk.OptimizationLoop(step=step, **driver).fit(model, X, Y, 8, epochs=3, verbose=0, shuffle=False)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=ROUNDING)
    np.testing.assert_allclose(result.variables[0], kernel, rtol=ROUNDING, atol=1e-6)
    np.testing.assert_allclose(result.variables[1], bias, rtol=ROUNDING, atol=1e-6)
    means = np.average(losses.reshape(3, 3), axis=1, weights=[8, 8, 4])
    np.testing.assert_allclose(result.epoch_history["loss"], means, rtol=ROUNDING)


def test_a_step_is_traced_once_for_each_shape_of_batches_and_never_again():
    model = _plain()
    model.compile("sgd", "mse")
    loop, traced = tk.OptimizationLoop(jit_compile=False), []
    for batch_size in (10, 8, 8, 10):
        loop.fit(model, X, Y, batch_size, epochs=2, verbose=0)
        traced.append(loop.traces)
    assert traced[0] == 1
    assert traced[1] <= 3  # the last batch is smaller
    assert traced[2:] == [traced[1]] * 2


@pytest.mark.parametrize("name", ["batch_norm", "two_in_two_out", "subclassed"])
def test_a_second_fit_of_a_model_traces_nothing(name):
    problem = models.BY_NAME[name]
    model, loop, traced = problem.make(), tk.OptimizationLoop(jit_compile=False), []
    for _ in range(2):
        loop.fit(model, **_arguments_of(problem, verbose=0)())
        traced.append(loop.traces)
    assert traced[1] == traced[0] <= 2


def test_a_stream_is_traced_once_whatever_its_batches():
    model = _plain()
    model.compile("sgd", "mse")
    loop = tk.OptimizationLoop(jit_compile=False)
    for _ in range(2):
        loop.fit(model, _unknown(), epochs=3, verbose=0, shuffle=False)
    assert loop.traces == 1


def test_the_history_of_the_model_is_that_of_keras():
    pair = _both_eager(validation_data=HELD_OUT, epochs=4, initial_epoch=1, validation_freq=2)
    ours, theirs = pair.by_loop.history, pair.by_keras.history
    assert isinstance(ours, keras.callbacks.History)
    assert (ours.history, ours.epoch, ours.params) == (theirs.history, theirs.epoch, theirs.params)
    assert ours.model is pair.by_loop


def test_a_history_that_is_given_is_the_one_that_is_kept():
    given, model = keras.callbacks.History(), DENSE(**EAGER)
    tk.OptimizationLoop().fit(model, X, Y, verbose=0, callbacks=[given])
    assert model.history is given
    assert list(given.history) == ["loss"]


def test_a_result_of_a_fit_reads_well():
    result = _both_eager(validation_data=HELD_OUT, batch_size=8, epochs=3).result
    loss = result.epoch_history["loss"][-1]
    message = "the last of 3 epochs ended at step 9"
    assert repr(result) == f"OptimizationResult(loss={loss:.6g}, steps=9, reason=LIMIT, message='{message}')"
    assert str(result).splitlines() == [
        message,
        "  reason     limit: a limit was reached",
        f"  loss       {loss:.6g}",
        "  variables  2 arrays, 5 numbers",
        f"  steps      9, with 9 evaluations in {result.seconds:.3g} s",
        f"  history    {', '.join(result.history)}",
        "  epochs     loss, val_loss",
    ]
    assert {name: values.shape for name, values in result.history.items()} == {"loss": (9,)}
