"""The gradients of convolutions and poolings that XLA compiles are those of TensorFlow."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit._convolutions import with_fast_gradients
from tapekit._xla import op_types
from tests import models

SLOW = {"Conv2DBackpropFilter", "Conv2DBackpropInput", "MaxPoolGrad"}
PADDINGS = ("SAME", "VALID", [(0, 0), (2, 1), (0, 3), (0, 0)])
CONVOLUTIONS = [
    *((size, stride, (1, 1)) for size, stride in itertools.product([(1, 1), (2, 3), (3, 3)], [(1, 1), (2, 2), (3, 1)])),
    *((size, (1, 1), dilation) for size, dilation in itertools.product([(2, 3), (3, 3)], [(2, 2), (1, 3)])),
]


def _random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _traced(function, *inputs, samples=None):
    """A function's gradients with respect to its inputs, no two of whose outputs count alike."""

    def gradients(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
            weights = tf.reshape(tf.cos(1.7 * tf.cast(tf.range(tf.size(outputs)), tf.float32)), tf.shape(outputs))
            total = tf.reduce_sum(tf.cast(weights, outputs.dtype) * outputs)
        return tape.gradient(total, inputs)

    images, *others = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs]
    images = tf.TensorSpec([samples, *images.shape[1:]], images.dtype)
    return tf.function(gradients, autograph=False).get_concrete_function(images, *others)


def _assert_same(function, *inputs, samples=3, by_xla=False):
    slow = _traced(function, *inputs, samples=samples)
    fast = with_fast_gradients(slow)
    assert SLOW & op_types(slow)
    assert not SLOW & op_types(fast)
    expected = (tf.function(slow, jit_compile=True) if by_xla else slow)(*inputs)
    for found in (fast(*inputs), tf.function(fast, jit_compile=True)(*inputs)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize(("size", "stride", "dilation"), CONVOLUTIONS)
def test_the_gradients_of_convolutions_are_those_of_tensorflow(size, stride, dilation, padding):
    def convolved(images, kernel):
        return tf.nn.conv2d(images, kernel, stride, padding, dilations=dilation)

    # TensorFlow has no dilated gradients on a CPU. For a 1x1 kernel and some strides that differ it crashes, soon or
    # late, on a processor with AVX-512, where oneDNN writes past the end of what it was given.
    by_xla = dilation != (1, 1) or (size == (1, 1) and stride == (3, 1))
    inputs = tf.constant(_random(3, 9, 8, 2)), tf.constant(_random(*size, 2, 5))
    _assert_same(convolved, *inputs, by_xla=by_xla)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 3), (4, 1)])
def test_the_gradients_of_the_largest_go_where_tensorflow_has_them(size, stride, padding):
    images = tf.constant(np.round(2.0 * _random(3, 9, 8, 2)))  # many are alike
    _assert_same(lambda images: tf.nn.max_pool2d(images, size, stride, padding), images)


def test_a_convolution_that_is_a_gradient_itself_has_the_gradients_of_tensorflow():
    def spread(images, kernel):
        return tf.nn.conv2d_transpose(images, kernel, (3, 10, 12, 7), 2, "SAME")

    _assert_same(spread, tf.constant(_random(3, 5, 6, 4)), tf.constant(_random(3, 3, 7, 4)))


def test_the_number_of_samples_need_not_be_known():
    def pooled(images, kernel):
        return tf.nn.max_pool2d(tf.nn.conv2d(images, kernel, 1, "SAME"), 2, 2, "SAME")

    _assert_same(pooled, tf.constant(_random(3, 9, 8, 2)), tf.constant(_random(3, 3, 2, 5)), samples=None)


@pytest.mark.parametrize(
    ("images", "kernel"),
    [
        (tf.TensorSpec((3, None, 8, 2)), tf.TensorSpec((3, 3, 2, 5))),
        (tf.TensorSpec((3, 9, 8, 4)), tf.TensorSpec((3, 3, 2, 6))),
        (tf.TensorSpec((3, 9, 8, 2), tf.float64), tf.TensorSpec((3, 3, 2, 5), tf.float64)),
    ],
    ids=["of unknown height", "in groups of channels", "of float64"],
)
def test_other_convolutions_are_left_alone(images, kernel):
    slow = _traced(lambda images, kernel: tf.nn.conv2d(images, kernel, 1, "SAME"), images, kernel, samples=3)
    assert with_fast_gradients(slow) is slow


def test_a_function_without_convolutions_is_left_alone():
    slow = _traced(lambda images: tf.reduce_sum(images**2), tf.constant(_random(3, 4)))
    assert with_fast_gradients(slow) is slow


def test_what_a_function_changes_and_captures_stays_the_same():
    kernel, count, images = tf.Variable(_random(3, 3, 1, 2)), tf.Variable(0), tf.constant(_random(2, 5, 5, 1))

    def step(scale):
        with tf.GradientTape() as tape:
            loss = scale * tf.reduce_sum(tf.nn.conv2d(images, kernel, 1, "SAME") ** 2)
        kernel.assign_sub(0.01 * tape.gradient(loss, kernel))
        count.assign_add(1)
        return {"loss": loss, "count": count.read_value()}

    slow = tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec([]))
    fast = tf.function(with_fast_gradients(slow), jit_compile=True)
    expected = slow(tf.constant(0.5))
    changed, start = kernel.numpy(), kernel.assign(_random(3, 3, 1, 2))
    found = fast(tf.constant(0.5))
    assert (float(found["loss"]), int(found["count"])) == (pytest.approx(float(expected["loss"]), rel=1e-5), 2)
    np.testing.assert_allclose(start, changed, rtol=1e-5)


def test_a_convolutional_model_is_compiled_by_xla_without_the_slow_ops_and_trains_as_by_keras():
    problem = models.BY_NAME["convolutional"]
    by_keras, ours = problem.make(), problem.make()
    settings = {"epochs": 3, "shuffle": False, "verbose": 0}
    history = by_keras.fit(*problem.data(), **settings).history["loss"]
    loop = tk.OptimizationLoop()
    result = loop.fit(ours, *problem.data(), **settings)
    np.testing.assert_allclose(result.epoch_history["loss"], history, rtol=1e-5)
    (driver,) = loop._programs.values()
    assert driver.jit
    assert [SLOW & op_types(program.for_xla) for program in driver._programs.values()] == [set()]
