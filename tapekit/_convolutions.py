"""Gradients of convolutions and poolings in forms that XLA on a CPU runs fast inside a loop.

XLA hands a convolution to a fast routine only where samples come first and channels last. In the gradients of one they
have changed places, and XLA puts them back only outside of loops; inside, it sums up number by number. So here they are
put back before. And XLA looks for the largest of a window anew where its gradient goes; here that is a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

FAST = (tf.float32, tf.float16, tf.bfloat16)
"""The dtypes that XLA has a fast routine for."""


class Window(NamedTuple):
    """How a convolution or a pooling moves along one axis of images, of shape (samples, height, width, channels)."""

    axis: int
    images: int
    """How long they are there."""
    size: int
    outputs: int
    """How many windows there are."""
    stride: int
    dilation: int
    before: int = 0
    """How much is padded before the images."""

    @property
    def reach(self) -> int:
        """The distance from the first number in a window to the last one."""
        return (self.size - 1) * self.dilation

    @property
    def seen(self) -> int:
        """The length that all windows together see, from the padding on."""
        return (self.outputs - 1) * self.stride + self.reach + 1

    def places(self, n: int) -> slice:
        """Returns where the n-th number of each window is, from the padding on."""
        return slice(n, n + (self.outputs - 1) * self.stride + 1, self.stride)


def with_fast_gradients(step: Any) -> Any:
    """Returns a traced function that does the same with other ops; the same one if there is nothing to replace.

    Args:
        step: the traced function.
    """
    ops = [op for op in step.graph.get_operations() if op.type in _GRADIENTS and op.outputs[0].dtype in FAST]
    gradients = {op: gradient for op in ops if (gradient := _GRADIENTS[op.type](op))}
    if not gradients:
        return step
    definition = step.graph.as_graph_def()
    nodes = {node.name: node for node in definition.node}
    for op, gradient in gradients.items():
        definition.node.extend(_replace(nodes[op.name], op, gradient))

    def run(*arguments: Any) -> Any:
        given = tf.nest.flatten(arguments, expand_composites=True) + step.captured_inputs
        inputs = {own.name: tf.convert_to_tensor(other) for own, other in zip(step.inputs, given, strict=True)}
        outputs = [tensor.name for tensor in step.outputs]
        found = tf.graph_util.import_graph_def(definition, inputs, outputs, name="")
        return tf.nest.pack_sequence_as(step.structured_outputs, found, expand_composites=True)

    return tf.function(run, autograph=False).get_concrete_function(*step.structured_input_signature[0])


def _replace(node: Any, op: Any, function: Callable[..., Any]) -> list[Any]:
    """Makes the node of an op give what a function of the op's inputs returns, and returns the nodes that it needs."""
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in op.inputs]
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    given = dict(zip((tensor.op.name for tensor in graph.inputs), node.input, strict=False))

    def place(name: str) -> str:
        return given.get(name) or f"{op.name}/{name}"

    added = [part for part in graph.as_graph_def().node if part.name not in given]
    for part in added:
        part.name, part.input[:] = place(part.name), map(place, part.input)
    node.op, node.input[:] = "Identity", [place(graph.outputs[0].op.name)]
    node.attr.clear()
    node.attr["T"].type = op.outputs[0].dtype.as_datatype_enum
    return added


def _of_kernel(op: Any) -> Callable[..., Any] | None:
    """Returns the gradient with respect to a kernel: images convolved with what comes from above."""
    kernel = op.outputs[0].shape
    windows = _windows(op, op.inputs[0].shape, kernel[:2], op.inputs[2].shape)
    if windows is None or op.inputs[0].shape[3] != kernel[2]:  # in groups of channels
        return None

    def gradient(images: Any, kernel_shape: Any, above: Any) -> Any:
        for window in windows:
            images = _cut(images, window.axis, -window.before, window.seen)
        images, above = tf.transpose(images, (3, 1, 2, 0)), tf.transpose(above, (1, 2, 0, 3))
        strides, dilations = [window.dilation for window in windows], [window.stride for window in windows]
        return tf.transpose(tf.nn.conv2d(images, above, strides, "VALID", dilations=dilations), (1, 2, 0, 3))

    return gradient


def _of_images(op: Any) -> Callable[..., Any] | None:
    """Returns the gradient with respect to images: what comes from above, convolved with the kernel turned round."""
    images, kernel = op.outputs[0].shape, op.inputs[1].shape
    windows = _windows(op, images, kernel[:2], op.inputs[2].shape)
    if windows is None or images[3] != kernel[2]:
        return None

    def gradient(images_shape: Any, kernel: Any, above: Any) -> Any:
        for window in windows:
            above = _spread([above], window.axis, window.stride)
            above = _cut(above, window.axis, window.before - window.reach, window.images + window.reach)
        turned = tf.transpose(tf.reverse(kernel, (0, 1)), (0, 1, 3, 2))
        return tf.nn.conv2d(above, turned, 1, "VALID", dilations=[window.dilation for window in windows])

    return gradient


def _of_max_pooling(op: Any) -> Callable[..., Any] | None:
    """Returns the gradient of the largest of each window, which goes to the first one that is as large."""
    _, *sizes, depth = op.get_attr("ksize")
    windows = _windows(op, op.inputs[0].shape, sizes, op.inputs[2].shape)
    if windows is None or depth != 1:
        return None
    down, across = windows

    def gradient(images: Any, largest: Any, above: Any) -> Any:
        for window in windows:
            images = _cut(images, window.axis, -window.before, window.seen, images.dtype.min)
        found = tf.zeros_like(largest, tf.bool)
        rows = []
        for row in range(down.size):
            columns = []
            for column in range(across.size):
                is_it = (images[:, down.places(row), across.places(column)] == largest) & ~found
                found |= is_it
                columns.append(tf.where(is_it, above, tf.zeros_like(above)))
            rows.append(_cut(_spread(columns, 2, across.stride), 2, across.before, across.images))
        return _cut(_spread(rows, 1, down.stride), 1, down.before, down.images)

    return gradient


_GRADIENTS = {
    "Conv2DBackpropFilter": _of_kernel,
    "Conv2DBackpropInput": _of_images,
    "MaxPoolGrad": _of_max_pooling,
}


def _windows(op: Any, images: Any, sizes: Sequence[Any], above: Any) -> list[Window] | None:
    """Returns how windows move along each axis; `None` if that is not known, or the channels do not come last."""
    if op.get_attr("data_format") != b"NHWC" or None in (images.rank, above.rank):
        return None
    if None in (*images[1:3], *sizes, *above[1:3]):
        return None
    dilations = op.get_attr("dilations") if op.type != "MaxPoolGrad" else (1, 1, 1, 1)
    windows = []
    for axis, size in zip((1, 2), sizes, strict=True):
        window = Window(axis, images[axis], size, above[axis], op.get_attr("strides")[axis], dilations[axis])
        before = 0
        if op.get_attr("padding") == b"SAME":
            before = max(0, window.seen - window.images) // 2
        elif op.get_attr("padding") == b"EXPLICIT":
            before = op.get_attr("explicit_paddings")[2 * axis]
        windows.append(window._replace(before=before))
    return windows


def _cut(images: Any, axis: int, first: int, length: int, value: float = 0.0) -> Any:
    """Returns images from `first` on along an axis, which may lie before them, with a value where they are not."""
    size = images.shape[axis]
    start, end = (min(max(place, 0), size) for place in (first, first + length))
    before = min(max(-first, 0), length)
    after = length - before - (end - start)
    if (start, end) != (0, size):
        images = images[:, start:end] if axis == 1 else images[:, :, start:end]
    if not (before or after):
        return images
    paddings = [(before, after) if n == axis else (0, 0) for n in range(4)]
    return tf.pad(images, paddings, constant_values=tf.constant(value, images.dtype))


def _spread(parts: Sequence[Any], axis: int, stride: int) -> Any:
    """Returns the sum of parts along an axis, each with zeros between its numbers and a place behind the one before."""
    later = (len(parts) - 1) // stride  # by so many numbers of its own is the last one moved
    length = parts[0].shape[axis] + later
    sums = []
    for first in range(stride):
        moved = [_cut(part, axis, -by, length) for by, part in enumerate(parts[first::stride])]
        sums.append(tf.add_n(moved) if moved else tf.zeros_like(sums[0]))
    shape = sums[0].shape.as_list()
    shape[axis] *= stride
    return tf.reshape(tf.stack(sums, axis + 1), (-1, *shape[1:]))
