"""PersistentTape: its values, what it shares with tf.GradientTape, when it lets go, and how it explains a None."""

import gc
import inspect
import os
import re
import subprocess
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.platform import tf_logging

import tapekit as tk

MODES = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": tf.function(jit_compile=True),
}
KINDS = {"tf.Variable": tf.Variable, "keras.Variable": keras.Variable, "tensor": tf.constant}
every_mode = pytest.mark.parametrize("mode", MODES)


def _numpy(structure):
    return tf.nest.map_structure(lambda leaf: tf.convert_to_tensor(leaf).numpy(), structure)


def _assert_close(found, expected, **tolerance):
    tf.nest.assert_same_structure(found, expected)
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


# Values -----------------------------------------------------------------------------------------------------------

A = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def _cast(tensor):
    """In double precision, which a float16 and a float32 meet in."""
    return tf.cast(tensor, tf.complex128 if tensor.dtype.is_complex else tf.float64)


# Each: the target as a function of the sources, their values, and the gradients by hand.
CASES = {
    "scalar": (lambda x: (x - 4.0) ** 2, np.float32(1.0), lambda x: 2 * (x - 4)),
    "vector": (lambda x: tf.reduce_sum(tf.sin(x) * x), A[0], lambda x: np.cos(x) * x + np.sin(x)),
    "matrix": (
        lambda x: tf.reduce_sum(tf.exp(x[0]) * x[1]),
        A,
        lambda x: np.stack([np.exp(x[0]) * x[1], np.exp(x[0])]),
    ),
    "dict of lists": (
        lambda s: s["a"][0] ** 2 * tf.reduce_sum(s["b"] * s["a"][1]),
        {"a": [np.float64(3.0), A[0]], "b": A[1]},
        lambda s: {
            "a": [2 * s["a"][0] * np.sum(s["b"] * s["a"][1]), s["a"][0] ** 2 * s["b"]],
            "b": s["a"][0] ** 2 * s["a"][1],
        },
    ),
    "float16": (lambda x: tf.reduce_sum(x**3), A[0].astype(np.float16), lambda x: 3 * x**2),
    "mixed precision": (
        lambda s: tf.reduce_sum(_cast(s[0]) * _cast(s[1]) * _cast(s[2])),
        (A[0].astype(np.float16), A[1].astype(np.float32), A[0] + A[1]),
        lambda s: (s[1] * s[2], s[0] * s[2], s[0] * s[1]),
    ),
    "lookup": (  # of which the gradient is tf.IndexedSlices; row 1 is read twice and row 2 never
        lambda x: tf.reduce_sum(tf.gather(x, [0, 1, 1]) ** 2),
        np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        lambda x: 2 * x * [[1], [2], [0]],
    ),
}


def _differences(function, values):
    """Central differences of a function of a structure of arrays, in double precision."""
    leaves = [np.asarray(leaf, np.float64) for leaf in tf.nest.flatten(values)]

    def at(leaves):
        return float(function(tf.nest.pack_sequence_as(values, [tf.constant(leaf) for leaf in leaves])))

    found = []
    for number, leaf in enumerate(leaves):
        gradient = np.empty_like(leaf)
        for index in np.ndindex(leaf.shape):
            step = np.zeros_like(leaf)
            step[index] = 1e-5
            shifted = [[*leaves[:number], leaf + sign * step, *leaves[number + 1 :]] for sign in (1, -1)]
            gradient[index] = (at(shifted[0]) - at(shifted[1])) / 2e-5
        found.append(gradient)
    return tf.nest.pack_sequence_as(values, found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_by_hand_of_tensorflows_tape_and_of_finite_differences(case, kind):
    function, values, by_hand = CASES[case]
    sources = tf.nest.map_structure(KINDS[kind], values)
    native = tf.nest.map_structure(lambda s: s.value if isinstance(s, keras.Variable) else s, sources)
    with tk.PersistentTape() as tape:
        tape.watch(sources)
        target = function(native)
        first, again = tape.gradient(target, sources), tape.gradient(target, sources)
    with tf.GradientTape(persistent=True) as theirs:
        theirs.watch(native)
        expected = theirs.gradient(function(native), native)

    assert [type(g) for g in tf.nest.flatten(first)] == [type(g) for g in tf.nest.flatten(expected)]
    assert [g.dtype for g in tf.nest.flatten(first)] == [g.dtype for g in tf.nest.flatten(expected)]
    _assert_close(_numpy(first), _numpy(expected), rtol=0)
    _assert_close(_numpy(again), _numpy(expected), rtol=0)
    rough = any(np.asarray(leaf).dtype == np.float16 for leaf in tf.nest.flatten(values))
    _assert_close(_numpy(first), by_hand(values), rtol=1e-2 if rough else 1e-6)
    _assert_close(_numpy(first), _differences(function, values), rtol=1e-2 if rough else 1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_gradient_of_a_complex_value_points_along_its_real_and_imaginary_part(dtype):
    value = np.array([1 + 2j, -3 + 0.5j], dtype)
    x = tf.Variable(value)
    with tk.PersistentTape() as tape:
        z = tape.intermediate("z", x * (2 - 1j))
        target = tf.reduce_sum(tf.math.real(z * tf.math.conj(z)))
        found = tape.gradients(target)
    with tf.GradientTape() as theirs:
        expected = theirs.gradient(tf.reduce_sum(tf.abs(x * (2 - 1j)) ** 2), x)
    np.testing.assert_allclose(found["z"], 2 * value * (2 - 1j), rtol=1e-6)
    np.testing.assert_allclose(found["Variable"], 10 * value, rtol=1e-6)
    np.testing.assert_allclose(found["Variable"], expected, rtol=1e-5)


def test_ragged_tensors_are_sources_targets_and_intermediates(caplog):
    x = tf.ragged.constant([[1.0, 2.0], [], [3.0]])
    with tk.PersistentTape() as tape:
        tape.watch(x)
        z = tape.intermediate("z", x * 2.0)
        y = z * z
        found = {"x": tape.gradient(y, x), **tape.gradients(y)}
        with pytest.raises(ValueError, match="the target depends on other values that are watched"):
            tape.gradient(z, [tape.intermediate("y", y * 1.0)], unconnected="raise")
    assert {name: ragged.to_list() for name, ragged in found.items()} == {
        "x": [[8.0, 16.0], [], [24.0]],
        "z": [[4.0, 8.0], [], [12.0]],
    }
    assert not caplog.records, "the row splits of a ragged tensor are integers that nobody wants to differentiate"


@every_mode
def test_gradients_are_the_same_in_a_traced_and_in_a_compiled_function(mode):
    x, w = tf.Variable([1.0, 2.0], name="x"), keras.Variable([0.5, -1.0], name="w")

    @MODES[mode]
    def run():
        with tk.PersistentTape() as tape:
            z = tk.intermediate("z", x * w)
            y = tf.reduce_sum(tape.intermediate("pair", (z**2, tf.exp(z)))[0])
            return tape.gradients(y), tape.gradient(y, [w, {"x": x}])

    everything, (dw, others) = run()
    np.testing.assert_allclose(everything["x"], [0.5, 4.0], rtol=1e-6)
    np.testing.assert_allclose(everything["w"], [1.0, -8.0], rtol=1e-6)
    np.testing.assert_allclose(everything["z"], [1.0, -4.0], rtol=1e-6)
    np.testing.assert_allclose(everything["pair"][0], [1.0, 1.0])
    assert everything["pair"][1] is None
    np.testing.assert_array_equal(dw, everything["w"])
    np.testing.assert_array_equal(others["x"], everything["x"])
    assert sorted(everything) == ["pair", "w", "x", "z"]


def test_gradients_name_variables_by_their_paths_and_tell_equal_names_apart():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")], name="net")
    first, second = tf.Variable(1.0, name="w"), tf.Variable(2.0, name="w")
    with tk.PersistentTape() as tape:
        y = tf.reduce_sum(model(tf.ones([1, 2]))) * first * second
        found = tape.gradients(y)
        assert tape.watched_variables()[-2:] == (first, second)
        tape.intermediate("w", y)
        with pytest.raises(ValueError, match=r"`name` of an intermediate must differ .* received 'w'\.$"):
            tape.gradients(y)
    assert sorted(found) == ["net/out/bias", "net/out/kernel", "w", "w_1"]
    assert float(found["w"]) == 2 * float(found["w_1"])


# What it shares with tf.GradientTape ---------------------------------------------------------------------------------


PUBLIC = [name for name, member in vars(tf.GradientTape).items() if callable(member) and not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_method_has_the_name_and_signature_of_tensorflows(name):
    theirs = inspect.signature(getattr(tf.GradientTape, name)).parameters.values()
    ours = list(inspect.signature(getattr(tk.PersistentTape, name)).parameters.values())
    shared = [(p.name, p.kind, p.default) for p in ours[: len(theirs)]]
    assert shared == [(p.name, p.kind, p.default) for p in theirs]
    assert {p.kind for p in ours[len(theirs) :]} <= {inspect.Parameter.KEYWORD_ONLY}


def test_tensorflows_tape_has_the_methods_that_are_known_here():
    assert {"watch", "watched_variables", "gradient", "jacobian", "batch_jacobian", "stop_recording", "reset"} == {
        *PUBLIC
    }
    assert inspect.signature(tk.PersistentTape).parameters["watch_accessed_variables"].default is True


MATRIX = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
CALLS = {
    "output_gradients": lambda tape, x, y: tape.gradient(y, x, output_gradients=tf.constant(MATRIX)),
    "output_gradients of two targets": lambda tape, x, y: tape.gradient([y, x], x, [MATRIX, 2.0 * MATRIX]),
    "zeros for what is unconnected": lambda tape, x, y: tape.gradient(x[0], y, None, tf.UnconnectedGradients.ZERO),
    "zeros by name": lambda tape, x, y: tape.gradient(x[0], y, unconnected_gradients="zero"),
    "jacobian": lambda tape, x, y: tape.jacobian(y, {"x": x})["x"],
    "jacobian without pfor": lambda tape, x, y: tape.jacobian(y, x, tf.UnconnectedGradients.NONE, 2, False),
    "batch_jacobian": lambda tape, x, y: tape.batch_jacobian(y, x),
    "batch_jacobian without pfor": lambda tape, x, y: tape.batch_jacobian(y, x, experimental_use_pfor=False),
    "target is source": lambda tape, x, y: tape.gradient(x, x),
}


@pytest.mark.parametrize("call", CALLS)
def test_call_gives_what_tensorflows_tape_gives(call):
    found = []
    for make in (tk.PersistentTape, lambda: tf.GradientTape(persistent=True)):
        x = tf.constant(MATRIX)
        with make() as tape:
            tape.watch(x)
            y = tf.sin(x) * x**2
            found.append(CALLS[call](tape, x, y))
    np.testing.assert_array_equal(*found)


def test_keras_variables_stand_wherever_variables_do():
    x, factor = keras.Variable(MATRIX, dtype="float64"), keras.Variable(2 * MATRIX, dtype="float64")
    unseen = keras.Variable(1.0, trainable=False)
    with tk.PersistentTape(watch_accessed_variables=False) as tape:
        tape.watch({"a": [x, unseen]})
        y = x.value**2 * unseen.value.dtype.as_numpy_dtype(1)
        assert {*map(id, tape.watched_variables())} == {id(x.value), id(unseen.value)}
        found = tape.gradient([y, x], x, output_gradients=[factor, x])
        rows = tape.batch_jacobian(y, x)
        all_rows = tape.jacobian(x, [x])[0]
    np.testing.assert_allclose(found, 4 * MATRIX**2 + MATRIX)
    np.testing.assert_allclose(rows, [np.diag(2 * row) for row in MATRIX])
    np.testing.assert_allclose(all_rows, np.eye(6).reshape(2, 3, 2, 3))


def test_only_watched_variables_are_recorded_if_access_does_not_watch():
    x, w = tf.Variable(3.0), tf.Variable(2.0)
    with tk.PersistentTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        y = x * w
        assert float(tape.gradient(y, x)) == 2.0
        assert tape.gradient(y, w) is None
        assert tape.watched_variables() == (x,)


def test_nothing_is_recorded_while_recording_is_stopped_and_gradients_can_be_taken_there():
    x = tf.Variable([3.0])
    with tk.PersistentTape() as tape:
        y = tf.reduce_sum(x**3)
        with tape.stop_recording():
            unseen = x**2
            inside = float(tape.gradient(y, x)[0])
            jacobian, hessian = tape.jacobian(y, x), tape.hessian(y, x)
        again = x**2
        assert tape.gradient(unseen, x) is None
        assert float(tape.gradient(again, x)[0]) == 6.0
    assert (inside, float(jacobian[0]), float(hessian[0, 0])) == (27.0, 27.0, 18.0)


def test_reset_forgets_what_was_recorded_watched_and_named():
    x, c = tf.Variable(3.0), tf.constant(2.0)
    with tk.PersistentTape() as tape:
        tape.watch(c)
        y = tape.intermediate("y", x**2 * c)
        tape.reset()
        assert tape.watched_variables() == ()
        assert tape.gradient(y, [x, c]) == [None, None]
        assert "does not watch it" in tape.explain(y, c)
        y = tape.intermediate("y", x**3)
        assert {name: float(gradient) for name, gradient in tape.gradients(y).items()} == {"y": 1.0, "Variable": 27.0}


def test_no_sources_give_no_gradients_as_with_tensorflows_tape():
    with tk.PersistentTape() as tape:
        y = tf.constant(2.0) ** 2
        assert tape.gradient(y, []) == []
        assert tape.gradients(y) == {}


# Second derivatives ---------------------------------------------------------------------------------------------------


def _rosenbrock(x):
    return tf.reduce_sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def _rosenbrock_hessian(x):
    """By hand, from the SciPy manual's formula."""
    hessian = np.diag(-400 * x[:-1], 1) - np.diag(400 * x[:-1], -1)
    diagonal = np.full_like(x, 202.0)
    diagonal[0], diagonal[-1] = 1200 * x[0] ** 2 - 400 * x[1] + 2, 200
    diagonal[1:-1] += 1200 * x[1:-1] ** 2 - 400 * x[2:]
    return hessian + np.diag(diagonal)


POINT, VECTOR = np.array([-1.2, 1.0, 0.3, 2.0]), np.array([1.0, -2.0, 0.5, 3.0])


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@every_mode
def test_hessian_and_its_products_are_those_by_hand_and_agree(mode, make):
    x = make(POINT, dtype="float64")

    @MODES[mode]
    def run(vector):
        with tk.PersistentTape() as tape:
            tape.watch(x)
            y = _rosenbrock(x.value if isinstance(x, keras.Variable) else x)
            return tape.hessian(y, x), tape.hessian_vector_product(y, x, vector), tape.gradient(y, x)

    hessian, product, gradient = run(VECTOR)
    np.testing.assert_allclose(hessian, _rosenbrock_hessian(POINT), rtol=1e-12)
    np.testing.assert_allclose(product, hessian.numpy() @ VECTOR, rtol=1e-12)
    np.testing.assert_allclose(gradient, _differences(_rosenbrock, POINT), rtol=1e-6)


@every_mode
def test_nested_tapes_give_second_derivatives(mode):
    x = tf.Variable(POINT)

    @MODES[mode]
    def run():
        with tk.PersistentTape() as outer:
            with tk.PersistentTape() as inner:
                y = _rosenbrock(x)
                first = inner.gradient(y, x)
            return outer.jacobian(first, x), outer.gradient(first, x, VECTOR), outer.gradient(y, x), first

    hessian, product, by_outer, first = run()
    np.testing.assert_allclose(hessian, _rosenbrock_hessian(POINT), rtol=1e-12)
    np.testing.assert_allclose(product, _rosenbrock_hessian(POINT) @ VECTOR, rtol=1e-12)
    np.testing.assert_array_equal(by_outer, first)


def test_hessian_vector_product_takes_structures_and_sparse_gradients():
    sources = {"table": tf.Variable([[1.0], [2.0], [3.0]]), "scale": keras.Variable(2.0)}
    vector = {"table": tf.constant([[1.0], [0.0], [-1.0]]), "scale": keras.Variable(0.5)}
    with tk.PersistentTape() as tape:
        y = tf.reduce_sum(tf.gather(sources["table"], [0, 2]) ** 3) * sources["scale"].value
        product = tape.hessian_vector_product(y, sources, vector)
        hessian = tape.hessian(y, sources["table"])
    # H has 6 s t on the diagonal of the rows that are read, and 3 t**2 between those and s.
    _assert_close(_numpy(product), {"table": np.array([[13.5], [0.0], [-22.5]]), "scale": -24.0}, rtol=1e-6)
    np.testing.assert_allclose(hessian[:, 0, :, 0], np.diag([12.0, 0.0, 36.0]), rtol=1e-6)


def test_second_derivatives_of_a_linear_target_are_zero():
    x = tf.Variable([1.0, 2.0])
    with tk.PersistentTape() as tape:
        y = tf.reduce_sum(3.0 * x)
        np.testing.assert_array_equal(tape.hessian(y, x), np.zeros((2, 2)))
        np.testing.assert_array_equal(tape.hessian_vector_product(y, x, [1.0, 1.0]), np.zeros(2))


# Nothing more is recorded, and everything is released -----------------------------------------------------------------


class _Held:
    """Something that the records of a tape hold, and so lives as long as they."""


def _held():
    """An op that is the identity, and a weak reference that lives as long as what a tape has recorded of it."""
    held = _Held()

    @tf.custom_gradient
    def op(x):
        def gradient(upstream, held=held):
            return upstream

        return tf.identity(x), gradient

    return op, weakref.ref(held)


def _resident():
    """The resident memory of this process in MB."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) / 1e3


def test_gradient_inside_the_block_brings_no_advice_against_recording(monkeypatch):
    said = []
    monkeypatch.setattr(tf_logging, "log_first_n", lambda level, message, *rest: said.append(message))
    x = tf.Variable([1.0, 2.0])
    with tk.PersistentTape() as tape:
        y = tf.reduce_sum(x**3)
        tape.gradient(y, x)
        tape.gradients(y)
        tape.jacobian(y, x)
        tape.hessian(y, x)
        tape.hessian_vector_product(y, x, [1.0, 0.0])
        tape.explain(y, tf.constant(1.0))
    assert said == []
    with tf.GradientTape(persistent=True) as theirs:
        theirs.gradient(x**2, x)
    assert len(said) == 1, "TensorFlow's own tape does say it"


def test_gradient_inside_the_block_records_nothing():
    x = tf.Variable(2.0)
    references = []

    @tf.custom_gradient
    def square(x):
        def gradient(upstream):
            op, reference = _held()
            references.append(reference)
            return op(2.0 * x) * upstream

        return x**2, gradient

    with tk.PersistentTape() as tape, tf.GradientTape(persistent=True) as theirs:
        y = square(tf.identity(x))
        with theirs.stop_recording():
            first = tape.gradient(y, x)
        assert references[0]() is None
        again = theirs.gradient(y, x)
        assert references[1]() is not None, "TensorFlow's own tape, and one around it, do record"
        assert tape.gradient(first, x) is None
        assert float(tape.gradient(again, x)) == 2.0


# Tensors of 40 MB, whose memory TensorFlow uses again but does not give back: what counts is that it does not grow.
LARGE = [10_000_000]


def _growth(function, times):
    """By how many MB the resident memory grows when a function is called again and its results are kept."""
    gc.collect()
    ballast, before = [], 0.0
    while len(ballast) < 2 or _resident() - before < 35.0:  # until no memory is left over from what ran before
        before = _resident()
        ballast.append(tf.fill(LARGE, 1.0))
    kept = [function()]
    before = _resident()
    kept += [function() for _ in range(times)]
    return _resident() - before


def test_memory_is_flat_over_many_gradients_in_one_block():
    x = tf.Variable(tf.ones(LARGE))
    growth = {}
    for make in (tk.PersistentTape, lambda: tf.GradientTape(persistent=True)):
        with make() as tape:
            y = tf.reduce_sum(x**3)
            growth[type(tape)] = _growth(lambda: tf.reduce_sum(tape.gradient(y, x)), times=4)
    assert growth[tk.PersistentTape] < 40.0
    assert growth[tf.GradientTape] > 120.0, "TensorFlow's own tape records its gradients"


class _Left(Exception):
    pass


def _by_its_end(tape, y, x):
    return tape.gradient(y, x)


def _by_an_exception(tape, y, x):
    tape.gradient(y, x)
    raise _Left


def _by_an_exception_in_a_gradient(tape, y, x):
    @tf.custom_gradient
    def fails(x):
        def gradient(upstream):
            raise _Left

        return tf.identity(x), gradient

    return tape.gradient(fails(y), x)


LEAVES = [_by_its_end, _by_an_exception, _by_an_exception_in_a_gradient]


def _leave(leave, x):
    """Leaves a block by a return or an exception, and gives the tape and weak references to what was inside."""
    op, held = _held()
    try:
        with tk.PersistentTape() as tape:
            y = op(tk.intermediate("z", x * 2.0)) ** 2
            del op
            references = weakref.ref(tape._tape), held, weakref.ref(tape._intermediates)
            assert all(reference() is not None for reference in references)
            return leave(tape, y, x), tape, references
    except _Left:
        return None, tape, references


@pytest.mark.parametrize("leave", LEAVES)
def test_underlying_tape_and_its_records_are_gone_after_the_block(leave):
    gc.disable()  # no cycle has to be found first
    gradient, tape, references = _leave(leave, tf.Variable(3.0))
    assert [reference() for reference in references] == [None, None, None]
    assert (gradient is not None) == (leave is _by_its_end)
    with pytest.raises(tk.TapeReleasedError):
        tape.reset()
    tk.intermediate("z", 3.0)  # would be refused if the tape still collected


@pytest.mark.parametrize("leave", LEAVES[1:])
def test_exception_leaves_the_block_unchanged(leave):
    x = tf.Variable(3.0)
    with pytest.raises(_Left), tk.PersistentTape() as tape:
        leave(tape, x**2, x)


def test_kept_exception_keeps_no_records():
    op, held = _held()
    x = tf.Variable(3.0)
    try:
        with tk.PersistentTape() as tape:
            y = op(x) ** 2
            del op
            tape.gradient(y, x, output_gradients=object())
    except ValueError as error:
        kept = error
    assert kept.__traceback__ is not None
    assert held() is None


def test_kept_inner_tape_keeps_nothing_of_the_outer_one():
    with tk.PersistentTape() as outer:
        with tk.PersistentTape() as inner:
            pass
        reference = weakref.ref(outer._intermediates)
    del outer
    assert reference() is None
    with pytest.raises(tk.TapeReleasedError):
        inner.reset()


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_underlying_tape_is_gone_while_the_function_is_still_traced(mode):
    x, references = tf.Variable(3.0), []

    def block():
        with tk.PersistentTape() as tape:
            y = tk.intermediate("z", x * 2.0) ** 2
            references.append(weakref.ref(tape._tape))
            return tape.gradient(y, x)

    @MODES[mode]
    def run():
        gradient = block()
        assert references[-1]() is None
        return gradient

    assert float(run()) == 24.0
    assert references


def test_memory_of_large_recorded_tensors_is_back_though_the_tape_is_kept():
    x = tf.Variable(tf.ones(LARGE))

    def block(make):
        with make() as tape:
            y = tf.reduce_sum(tf.sin(tf.sin(tf.sin(x))))
        return tape, y  # without the target, any tape would let go

    assert _growth(lambda: block(tk.PersistentTape), times=3) < 40.0
    assert _growth(lambda: block(lambda: tf.GradientTape(persistent=True)), times=3) > 120.0, (
        "TensorFlow's own keeps it"
    )


def test_ten_thousand_blocks_leave_resident_memory_flat():
    x = tf.Variable(tf.ones([10_000]))

    def blocks(number):
        for _ in range(number):
            with tk.PersistentTape() as tape:
                tape.gradient(tk.intermediate("z", tf.sin(x)), x)

    blocks(200)
    before = _resident()
    blocks(10_000)
    assert _resident() - before < 20.0, "10,000 tapes of 40 kB kept would be 400"


def test_gradients_stay_valid_after_the_block():
    x = tf.Variable([1.0, 2.0])
    with tk.PersistentTape() as tape:
        gradient = tape.gradient(tf.reduce_sum(x**2), x)
    del tape
    gc.collect()
    x.assign([5.0, 6.0])
    np.testing.assert_array_equal(gradient, [2.0, 4.0])


USES = {
    "watch": lambda tape, y, x: tape.watch(x),
    "watched_variables": lambda tape, y, x: tape.watched_variables(),
    "intermediate": lambda tape, y, x: tape.intermediate("z", y),
    "gradient": lambda tape, y, x: tape.gradient(y, x),
    "gradient, or raise": lambda tape, y, x: tape.gradient(y, x, unconnected="raise"),
    "gradients": lambda tape, y, x: tape.gradients(y),
    "jacobian": lambda tape, y, x: tape.jacobian(y, x),
    "batch_jacobian": lambda tape, y, x: tape.batch_jacobian(x, x),
    "hessian": lambda tape, y, x: tape.hessian(y, x),
    "hessian_vector_product": lambda tape, y, x: tape.hessian_vector_product(y, x, y),
    "stop_recording": lambda tape, y, x: tape.stop_recording(),
    "reset": lambda tape, y, x: tape.reset(),
    "explain": lambda tape, y, x: tape.explain(y, x),
}


def test_every_public_method_is_tried_outside_of_its_block():
    public = {name for name in vars(tk.PersistentTape) if not name.startswith("_")}
    assert public == {name.split(",")[0] for name in USES}


@pytest.mark.parametrize("use", USES)
def test_use_outside_of_the_block_is_refused_with_what_to_do(use):
    x = tf.Variable([[1.0]])
    tape = tk.PersistentTape()
    with pytest.raises(RuntimeError, match=r"write `with PersistentTape\(\) as tape:`\.$"):
        USES[use](tape, tf.constant(1.0), x)
    with tape:
        y = tf.reduce_sum(x)
    with pytest.raises(tk.TapeReleasedError, match=r"take gradients inside the block and keep them\.$"):
        USES[use](tape, y, x)


def test_use_after_release_is_the_same_error_in_a_traced_function():
    x = tf.Variable(1.0)

    @tf.function
    def run():
        with tk.PersistentTape() as tape:
            y = x**2
        return tape.gradient(y, x)

    with pytest.raises(tk.TapeReleasedError, match="take gradients inside the block and keep them"):
        run()


def test_tape_is_entered_once():
    tape = tk.PersistentTape()
    sentence = r"^a PersistentTape is entered once; make a new one for another block\.$"
    with tape, pytest.raises(RuntimeError, match=sentence):
        tape.__enter__()
    with pytest.raises(RuntimeError, match=sentence), tape:
        pass


# Cost -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_graph_has_the_ops_of_tensorflows_tape_and_no_more(make):
    x = make([1.0, 2.0])
    native = x.value if isinstance(x, keras.Variable) else x

    def ours():
        with tk.PersistentTape() as tape:
            tape.watch(x)
            z = tk.intermediate("z", native - 4.0)
            y = tf.reduce_sum(z**2)
            return tape.gradient(y, z), tape.gradient(y, [x], unconnected="raise"), tape.jacobian(z, x)

    def theirs():
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(native)
            z = native - 4.0
            y = tf.reduce_sum(z**2)
        return tape.gradient(y, z), tape.gradient(y, [native]), tape.jacobian(z, native)

    ops = [[op.type for op in tf.function(f).get_concrete_function().graph.get_operations()] for f in (ours, theirs)]
    assert ops[0] == ops[1]


# Names ----------------------------------------------------------------------------------------------------------------


def test_name_goes_to_the_innermost_tape_and_to_nobody_outside_of_all():
    x = tf.Variable(2.0, name="x")
    with tk.PersistentTape() as outer:
        outside = tk.intermediate("z", x * 1.0)
        with tk.PersistentTape() as inner:
            y = tk.intermediate("z", outside**2)
            found = inner.gradients(y)
        again = tk.intermediate("again", y * 1.0)
        assert {name: float(g) for name, g in outer.gradients(again).items()} == {"z": 4.0, "again": 1.0, "x": 4.0}
    assert {name: float(g) for name, g in found.items() if g is not None} == {"z": 1.0}
    value = object()
    assert tk.intermediate("z", value) is value


def test_intermediate_is_returned_unchanged_and_may_be_a_structure():
    x = keras.Variable([1.0, 2.0])
    with tk.PersistentTape() as tape:
        given = {"a": [x.value * 2.0, tf.constant([1, 2])], "b": x}
        assert tape.intermediate("z", given) is given
        y = tf.reduce_sum(given["a"][0] ** 2 + given["b"].value)
        found = tape.gradient(y, given)
        assert tape.gradients(y)["z"]["a"][1] is None
    np.testing.assert_array_equal(found["a"][0], [4.0, 8.0])
    np.testing.assert_array_equal(found["b"], [9.0, 17.0])


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda x: tf.function(lambda: tk.intermediate("z", x * 2.0))(), "eager"),
        (lambda x: tf.function(lambda: tk.intermediate("z", x * 2.0))(), "graph"),
        (lambda x: tf.cond(x > 0.0, lambda: tk.intermediate("z", x * 2.0), lambda: x), "graph"),
    ],
)
def test_name_given_where_the_tape_cannot_see_is_refused_every_time(make, where):
    x = tf.Variable(1.0)

    @MODES[where]
    def run():
        with tk.PersistentTape():
            make(x)

    for _ in range(2):
        with pytest.raises(ValueError, match="`value` of 'z' must not be named inside"):
            run()


# Bad input ------------------------------------------------------------------------------------------------------------

BAD = {
    "a name twice": (
        lambda tape, y, x: [tape.intermediate("z", y) for _ in range(2)],
        ValueError,
        "`name` must be new in an evaluation, received 'z' for the second time.",
    ),
    "no name": (lambda tape, y, x: tape.intermediate(1, y), TypeError, "`name` must be a string, received the int 1."),
    "a number as an intermediate": (
        lambda tape, y, x: tape.intermediate("z", [y, 3.0]),
        TypeError,
        "`value` of 'z' must be a tensor or variable, or hold them, received the float 3.0.",
    ),
    "a number to watch": (
        lambda tape, y, x: tape.watch(3.0),
        TypeError,
        "`tensor` must be a tensor or variable, or hold them, received the float 3.0.",
    ),
    "an empty list of targets": (
        lambda tape, y, x: tape.gradient([], x),
        ValueError,
        "`target` must hold at least one tensor, received an empty list.",
    ),
    "an empty nest of targets": (
        lambda tape, y, x: tape.gradient({"a": []}, x),
        ValueError,
        "`target` must hold at least one tensor, received a dict of 1.",
    ),
    "no target": (
        lambda tape, y, x: tape.gradient(None, x),
        TypeError,
        "`target` must be a tensor or variable, or hold them, received None.",
    ),
    "a NumPy target": (
        lambda tape, y, x: tape.gradient(y.numpy(), x),
        TypeError,
        "`target` must be a tensor or variable, or hold them, received the float32 5.0.",
    ),
    "a NumPy source": (
        lambda tape, y, x: tape.gradient(y, [x, np.ones(2)]),
        TypeError,
        "`sources` must be a tensor or variable, or hold them, received a NumPy array of shape (2,) and dtype float64.",
    ),
    "an output gradient that is None": (
        lambda tape, y, x: tape.gradient([y, y], x, [tf.constant(1.0), None]),
        TypeError,
        "`output_gradients` must hold a tensor for each target, received None.",
    ),
    "an unknown way to be unconnected": (
        lambda tape, y, x: tape.gradient(y, x, unconnected="zero"),
        ValueError,
        "`unconnected` must be None or \"raise\", received 'zero'.",
    ),
    "a jacobian of a list": (
        lambda tape, y, x: tape.jacobian([y], x),
        TypeError,
        "`target` must be a tensor or a variable, received a list of 1.",
    ),
    "a batch_jacobian of a scalar": (
        lambda tape, y, x: tape.batch_jacobian(y, x),
        ValueError,
        "`target` and `source` must be of shape [batch, ...], received a tf.Tensor of shape () and dtype float32.",
    ),
    "a hessian of a vector": (
        lambda tape, y, x: tape.hessian(x * 2.0, x),
        ValueError,
        "`target` must be a scalar tensor, received a tf.Tensor of shape (2,) and dtype float32.",
    ),
    "a hessian for a list": (
        lambda tape, y, x: tape.hessian(y, [x]),
        TypeError,
        "`source` must be a tensor or a variable, received a list of 1.",
    ),
    "a hessian for what is not watched": (
        lambda tape, y, x: tape.hessian(y, tf.constant(1.0)),
        ValueError,
        "the source is a constant to the tape, ",
    ),
    "a vector of another shape": (
        lambda tape, y, x: tape.hessian_vector_product(y, x, [1.0, 2.0, 3.0]),
        ValueError,
        "`vector` must be of shape (2,) and dtype float32, received a tf.Tensor of shape (3,) and dtype float32.",
    ),
    "a vector of another dtype": (
        lambda tape, y, x: tape.hessian_vector_product(y, x, tf.ones([2], tf.float64)),
        TypeError,
        "`vector` must be of dtype float32, received a tf.Tensor of shape (2,) and dtype float64.",
    ),
    "a vector of another structure": (
        lambda tape, y, x: tape.hessian_vector_product(y, {"x": x}, [tf.ones([2])]),
        ValueError,
        "`vector` must have the structure of `source`, received a list of 1.",
    ),
    "to explain a list": (
        lambda tape, y, x: tape.explain(y, [x]),
        TypeError,
        "`source` must be a tensor or a variable, received a list of 1.",
    ),
    "to explain no target": (
        lambda tape, y, x: tape.explain(None, x),
        TypeError,
        "`target` must be a tensor or a variable, received None.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_a_sentence_and_the_tape_goes_on(case):
    call, kind, sentence = BAD[case]
    x = tf.Variable([1.0, 2.0])
    with tk.PersistentTape() as tape:
        y = tf.reduce_sum(x**2)
        with pytest.raises(kind, match="^" + re.escape(sentence)):
            call(tape, y, x)
        np.testing.assert_array_equal(tape.gradient(y, x), [2.0, 4.0])
        np.testing.assert_array_equal(tape.gradient(x**2, x), [2.0, 4.0])


# Why a gradient is None -----------------------------------------------------------------------------------------------

x = tf.Variable([2.0, 3.0], name="x")
w = tf.Variable([0.0, 0.0], name="w")
before = x * 3.0
constant = tf.constant([1.0, 2.0])


@tf.function
def _square_of_difference(x):
    z = x - 4.0
    return z, z**2


@tf.function
def _cut_inside(x):
    return 2.0 * tf.stop_gradient(x)


@tf.function
def _cut_deeper(x):
    return 3.0 + _cut_inside(x)


@tf.function
def _reads_w():
    return w * 2.0


@tf.custom_gradient
def _returns_none(x):
    return x * 3.0 + 1.0, lambda upstream: None


@tf.custom_gradient
def _triples(x):
    return x * 3.0, lambda upstream: upstream * 3.0


def _assigned(tape):
    w.assign(x * 2.0)
    return w * 3.0, x


def _watched_late(tape):
    y = constant * 2.0
    tape.watch(constant)
    return y, constant


def _while_stopped(tape):
    a = tf.identity(x)
    with tape.stop_recording():
        y = a * 2.0
    return y, x


def _both_outputs(tape):
    z, y = _square_of_difference(x)
    return y * 2.0, z


def _read_while_stopped(tape):
    with tape.stop_recording():
        y = x * 2.0
    return y, x


def _two_ways(tape):
    a = tf.identity(x)
    return tf.floor(a) + tf.stop_gradient(a), x


def _beside_a_loop(tape):
    steps = tf.cast(tf.reduce_sum(x), tf.int32)
    return tf.while_loop(lambda i, y: i < steps, lambda i, y: (i + 1, y * 2.0), (0, tf.constant(1.0)))[1], x


INT = "integer type int32, and no gradient flows through integers: make it a float"
ENDS = "the gradient ends on the way from the variable 'x' to the target, in "
NOT_WATCHED = "is a constant to the tape, which does not watch it: it was made before the block, "
# Causes that are known wherever they occur.
KNOWN = {
    "a NumPy target": (
        lambda tape: (np.ones(2), x),
        "the target is a NumPy array of shape (2,) and dtype float64: it passed through NumPy or Python, which a tape"
        " does not see; keep it a tensor",
    ),
    "a Python target": (lambda tape: (3.0, x), "the target is the float 3.0: it passed through NumPy or Python, "),
    "an integer source": (lambda tape: (x * 2.0, tf.constant([1, 2])), f"the source is of {INT}"),
    "an integer target": (lambda tape: (tf.argmax(x, output_type=tf.int32), x), f"the target is of {INT}"),
    "a bool target": (
        lambda tape: (x > 1.0, x),
        "the target is of type bool, and that has no gradient: make it a float",
    ),
    "a constant": (lambda tape: (x * constant, constant), f"the source {NOT_WATCHED}"),
    "made before the block": (lambda tape: (x + before, before), f"the source {NOT_WATCHED}"),
    "made in the block from nothing watched": (
        lambda tape: (lambda z: (x * z, z))(tf.stop_gradient(x)),
        "or from nothing that is watched (tf.stop_gradient, NumPy and integers cut that off, too); call tape.watch on",
    ),
    "a variable that is not trainable": (
        lambda tape: (lambda v: (x * v, v))(frozen),
        "the variable 'frozen' was made as not trainable, so no tape watches it by itself: call tape.watch on it",
    ),
    "a Keras variable that is not trainable": (
        lambda tape: (lambda v: (x * v.value, v))(keras_frozen),
        "the variable 'keras_frozen' was made as not trainable, ",
    ),
    "a variable that is not read": (
        lambda tape: (x * 2.0, w),
        "the variable 'w' was not read inside the block while the tape recorded: compute the target from it there",
    ),
    "a variable read before the block": (
        lambda tape: (before * 2.0, x),
        "the variable 'x' was not read inside the block",
    ),
    "a variable as the target": (
        lambda tape: (x * 2.0, (w, x))[1],
        "the target is the variable 'w' itself, which is not computed from the variable 'x'",
    ),
    "no None at all": (lambda tape: (x * 2.0, x), "the gradient is not None: the target depends on the variable 'x'"),
    "a variable that a called function reads": (
        lambda tape: (_reads_w(), w),
        "the gradient is not None: the target depends on the variable 'w'",
    ),
    "a py_function": (
        lambda tape: (tf.py_function(lambda a: a**2, [x], tf.float32), x),
        "the gradient is not None: the target depends on the variable 'x'",
    ),
}
frozen = tf.Variable([1.0, 1.0], trainable=False, name="frozen")
keras_frozen = keras.Variable([1.0, 1.0], trainable=False, name="keras_frozen")

# Causes that the graph of a tf.function shows and a tape alone does not.
IN_GRAPH = {
    "does not use it": (
        lambda tape: (x * 2.0, tape.intermediate("z", x * 3.0)),
        "the target does not use the intermediate 'z', though perhaps a copy of it",
    ),
    "tf.stop_gradient": (lambda tape: (tf.stop_gradient(x * 2.0), x), ENDS + "tf.stop_gradient"),
    "NumPy": (
        lambda tape: (tf.ensure_shape(tf.numpy_function(np.sin, [x], tf.float32), [2]) * 2.0, x),
        ENDS + "tf.numpy_function, that is NumPy",
    ),
    "integers": (
        lambda tape: (tf.cast(tf.cast(x, tf.int32), tf.float32), x),
        ENDS + "int32 values, made by the op 'Cast",
    ),
    "the integers among several outputs": (
        lambda tape: (tf.cast(tf.math.top_k(x, 1).indices, tf.float32), x),
        ENDS + "int32 values, made by the op 'TopKV2",
    ),
    "a comparison": (
        lambda tape: (tf.where(x > 1.0, constant, 2.0 * constant), x),
        ENDS + "bool values, made by the op 'Greater",
    ),
    "an op without a gradient": (lambda tape: (tf.floor(x) * 2.0, x), r"as Floor has no gradient"),
    "two ways, both cut": (_two_ways, "as Floor has no gradient and in tf.stop_gradient"),
    "a way that is no end, and the end behind it": (
        lambda tape: (tf.stop_gradient(x * tf.stop_gradient(x)), x),
        ENDS + "tf.stop_gradient",
    ),
    "inside a called tf.function": (
        lambda tape: (_cut_inside(x) + 1.0, x),
        ENDS + "the tf.function '_cut_inside', inside of which is tf.stop_gradient",
    ),
    "deep inside a called tf.function": (
        lambda tape: (_cut_deeper(x), x),
        ENDS + "the tf.function '_cut_deeper', inside of which is tf.stop_gradient",
    ),
    "inside a branch": (
        lambda tape: (tf.cond(constant[0] > 0.0, lambda: tf.stop_gradient(x), lambda: w), x * 2.0, x)[::2],
        ENDS + "the branch or loop 'cond', inside of which is tf.stop_gradient",
    ),
    "both are outputs of one tf.function": (
        _both_outputs,
        "the source and the target are outputs of the same tf.function '_square_of_difference', which computes the"
        " target from a copy inside: take the gradient inside",
    ),
    "tf.custom_gradient": (
        lambda tape: (_returns_none(x * 2.0) + 1.0, x),
        ENDS + "a tf.custom_gradient, which returns None",
    ),
    "behind a tf.custom_gradient that passes": (
        lambda tape: (tf.stop_gradient(_triples(x)), x),
        ENDS + "tf.stop_gradient",
    ),
    "the assignment of a variable": (
        _assigned,
        "the variable 'x' reaches the target by the assignment of a variable, through which no gradient flows",
    ),
    "watched after its use": (_watched_late, "which ran before the block, before the source was watched or while rec"),
    "while recording was stopped": (
        _while_stopped,
        "which ran before the block, before the source was watched or while",
    ),
    "a loop beside it": (
        lambda tape: _beside_a_loop(tape),
        ENDS + "int32 values, made by the op 'Cast",
    ),
}
UNTOLD = "which cannot tell the causes apart: the target does not use "


def _explained(make, graph):
    def run():
        with tk.PersistentTape() as tape:
            target, source = make(tape)
            number = len(target.graph.get_operations()) if graph and hasattr(target, "op") else None
            sentences.append(tape.explain(target, source))
            if number is not None:
                assert len(target.graph.get_operations()) == number, "an explanation leaves nothing in the graph"

    sentences = []
    if graph:
        tf.function(run).get_concrete_function()
    else:
        run()
    return sentences[0]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("cause", KNOWN)
def test_known_cause_is_explained_everywhere(cause, graph):
    make, sentence = KNOWN[cause]
    assert sentence in _explained(make, graph)


@pytest.mark.parametrize("cause", IN_GRAPH)
def test_cause_that_the_graph_shows_is_named_in_a_traced_function(cause):
    make, sentence = IN_GRAPH[cause]
    found = _explained(make, graph=True)
    assert sentence in found
    assert (" and in " in found) == (cause == "two ways, both cut")


@pytest.mark.parametrize("cause", IN_GRAPH)
def test_cause_that_a_tape_cannot_tell_is_not_guessed_eagerly(cause):
    make, _ = IN_GRAPH[cause]
    sentence = _explained(make, graph=False)
    assert UNTOLD in sentence
    uses_something = cause in {"does not use it", "both are outputs of one tf.function", "the assignment of a variable"}
    depends = "other values that are watched" if uses_something else "nothing that is watched"
    assert sentence.startswith(f"the target depends on {depends}, as far as the tape saw, ")


@pytest.mark.parametrize(
    ("make", "in_graph"),
    [
        (
            lambda tape: (tf.stop_gradient(x) * 2.0, x),
            "which ran before the block, before the source was watched or while",
        ),
        (
            _read_while_stopped,
            "which ran before the block, before the source was watched or while recording was stopped",
        ),
    ],
)
def test_variable_that_is_read_where_the_tape_does_not_look_is_said_to_be_unread(make, in_graph):
    assert in_graph in _explained(make, graph=True)
    assert _explained(make, graph=False) == (
        "the variable 'x' was not read inside the block while the tape recorded: compute the target from it there"
        " (nor does the tape record what tf.stop_gradient reads)"
    )


def test_value_that_went_through_python_is_among_the_causes_eagerly():
    sentence = _explained(lambda tape: (tf.constant(x.numpy() * 2.0) + w, x), graph=False)
    assert sentence.startswith(f"the target depends on other values that are watched, as far as the tape saw, {UNTOLD}")
    assert "NumPy or Python" in sentence


def test_variable_is_said_to_be_unwatched_where_access_does_not_watch():
    with tk.PersistentTape(watch_accessed_variables=False) as tape:
        sentence = tape.explain(x * 2.0, x)
    assert sentence == (
        "the variable 'x' is not watched, as watch_accessed_variables=False: call tape.watch on it before its use"
    )


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_explanation_leaves_the_one_gradient_of_a_py_function_to_be_taken(graph):
    def run():
        with tk.PersistentTape() as tape:
            y = tf.py_function(lambda a: a**2, [x], tf.float32)
            tape.explain(y, x)
            tape.explain(tf.stop_gradient(y), x)
            return tape.gradient(y, x)

    np.testing.assert_array_equal((tf.function(run) if graph else run)(), [4.0, 6.0])


@every_mode
def test_unconnected_gradient_raises_the_sentence_of_explain_if_asked_to(mode):
    sentences = []

    @MODES[mode]
    def run():
        with tk.PersistentTape() as tape:
            y = tf.reduce_sum(x**2)
            sentences.append(tape.explain(y, constant))
            return tape.gradient(y, {"a": x, "b": [constant]}, None, "zero", unconnected="raise")

    with pytest.raises(ValueError, match=re.escape("the source is a constant to the tape")) as raised:
        run()
    assert sentences[0] in str(raised.value)


def test_connected_gradients_are_returned_if_asked_to_raise():
    with tk.PersistentTape() as tape:
        found = tape.gradient(tf.reduce_sum(x**2), [x], unconnected="raise")
    np.testing.assert_array_equal(found[0], [4.0, 6.0])
