"""Why a gradient is None: what can be known from a tape and, inside a `tf.function`, from the graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tapekit._describe import describe, variable_name
from tapekit._tensors import tf_variable as native

NATIVE = tf.Tensor, tf.Variable


class Seen(NamedTuple):
    """What a tape has seen: how it takes gradients, what it watches, and under which names.

    `automatic` says whether it watches variables when they are read.
    """

    gradient: Callable[[Any, Any], Any]
    watched: Sequence[Any]
    named: dict[str, Any]
    automatic: bool


def natives(name: str, structure: Any) -> Any:
    """Returns a structure of tensors and variables as TensorFlow takes them, or raises."""
    if isinstance(structure, NATIVE):
        return structure
    if type(structure) is list:  # the commonest, and tf.nest takes its time
        return [leaf if isinstance(leaf, NATIVE) else natives(name, leaf) for leaf in structure]

    def convert(leaf: Any) -> Any:
        if not tf.is_tensor(leaf):
            raise TypeError(f"{name} must be a tensor or variable, or hold them, received {describe(leaf)}.")
        return native(leaf)

    return tf.nest.map_structure(convert, structure)


def single(name: str, value: Any) -> Any:
    """Returns a tensor or variable as TensorFlow takes it, or raises."""
    if not tf.is_tensor(value):
        raise TypeError(f"`{name}` must be a tensor or a variable, received {describe(value)}.")
    return native(value)


def components(value: Any) -> list[Any]:
    """Returns the tensors and variables that gradients may flow through, of a structure or a ragged tensor."""
    found: list[Any] = []
    for leaf in map(native, tf.nest.flatten(value)):
        if isinstance(leaf, NATIVE):
            found.append(leaf)
        elif tf.is_tensor(leaf):
            found += filter(differentiable, tf.nest.flatten(leaf, expand_composites=True))
    return found


def explain(seen: Seen, target: Any, source: Any) -> str:
    """Returns why the gradient of `target` with respect to `source` is None, in a sentence."""
    targets = tf.nest.flatten(target)
    for leaf in targets:
        if isinstance(leaf, (np.ndarray, np.generic, int, float, complex)):
            return (
                f"the target is {describe(leaf)}: it passed through NumPy or Python, which a tape does not see; keep it"
                " a tensor"
            )
    for argument, leaf in (("source", source), *(("target", leaf) for leaf in targets)):
        single(argument, leaf)
    name = _name(seen, source)
    for what, leaf in ((name, source), *(("the target", leaf) for leaf in targets)):
        dtype = tf.as_dtype(leaf.dtype)
        if not differentiable(leaf):
            reason = "no gradient flows through integers" if dtype.is_integer else "that has no gradient"
            return (
                f"{what} is of {'integer ' if dtype.is_integer else ''}type {dtype.name}, and {reason}: make it a float"
            )
    if _connected(seen, targets, source):
        return f"the gradient is not None: the target depends on {name}"
    return _unwatched(seen, source, name) or _broken_path(seen, targets, source, name)


def _name(seen: Seen, source: Any) -> str:
    if isinstance(native(source), tf.Variable):
        return f"the variable {variable_name(source)!r}"
    for name, value in seen.named.items():
        if any(source is leaf for leaf in tf.nest.flatten(value)):
            return f"the intermediate {name!r}"
    return "the source"


def differentiable(value: Any) -> bool:
    dtype = tf.as_dtype(value.dtype)
    return dtype.is_floating or dtype.is_complex


def _connected(seen: Seen, targets: Any, sources: Any) -> bool:
    found: list[Any] = []

    def differentiate() -> None:
        found.extend(seen.gradient(components(targets), components(sources)))

    _aside(differentiate)
    return any(gradient is not None for gradient in found)


def _aside(function: Callable[[], None]) -> None:
    """Calls a function so that the ops that it makes are never run, and in no graph of the user's."""
    tf.function(function, autograph=False).get_concrete_function()


def _unwatched(seen: Seen, source: Any, name: str) -> str | None:
    """Says why the tape does not watch the source, if it does not."""
    parts = components(source)
    if any(part is other for part in parts for other in seen.watched):
        return None
    variable = native(source)
    if isinstance(variable, tf.Variable):
        if not variable.trainable:
            return (
                f"{name} was made as not trainable, so no tape watches it by itself: call tape.watch on it before use"
            )
        if not seen.automatic:
            return f"{name} is not watched, as watch_accessed_variables=False: call tape.watch on it before its use"
        return None
    if seen.watched and _connected(seen, source, seen.watched):
        return None
    return (
        f"{name} is a constant to the tape, which does not watch it: it was made before the block, or while recording"
        " was stopped, or from nothing that is watched (tf.stop_gradient, NumPy and integers cut that off, too); call"
        " tape.watch on it before its use"
    )


def _broken_path(seen: Seen, targets: list[Any], source: Any, name: str) -> str:
    for target in map(native, targets):
        if isinstance(target, tf.Variable):
            return f"the target is the variable {variable_name(target)!r} itself, which is not computed from {name}"
    unread = None
    if isinstance(native(source), tf.Variable) and not any(native(source) is other for other in seen.watched):
        unread = f"{name} was not read inside the block while the tape recorded: compute the target from it there"
    if not tf.executing_eagerly():
        seen_there = _broken_in_graph(seen, components(targets), components(source), name)
        return seen_there or unread or f"the target does not use {name}, though perhaps a copy of it"
    if unread:
        return f"{unread} (nor does the tape record what tf.stop_gradient reads)"
    depends = "other values that are watched" if _connected(seen, targets, seen.watched) else "nothing that is watched"
    return (
        f"the target depends on {depends}, as far as the tape saw, which cannot tell the causes apart: the target does"
        f" not use {name}, or uses a copy of it; or it was computed before the block, before the source was watched, or"
        " while recording was stopped; or the path passes tf.stop_gradient, NumPy or Python, integers, the assignment"
        " of a variable, or an op without a gradient; or both are outputs of one tf.function, which computes the target"
        " from a copy inside"
    )


_CUTS = {
    "StopGradient": "tf.stop_gradient",
    "PyFunc": "tf.numpy_function, that is NumPy",
    "PyFuncStateless": "tf.numpy_function, that is NumPy",
}


def _broken_in_graph(seen: Seen, targets: list[Any], sources: list[Any], name: str) -> str | None:
    """Says what the graph of a tf.function shows between a source and a target, where the gradient is None."""
    graph = targets[0].graph
    starts = [(inner, source) for source in sources if (inner := _inner(graph, source)) is not None]
    needed = _ancestors(targets)
    causes = _where_it_ends(seen, starts, needed)
    if causes:
        return f"the gradient ends on the way from {name} to the target, in {' and in '.join(causes)}"
    for tensor in _descendants(inner for inner, _ in starts).values():
        for op in tensor.consumers():
            if op.type.startswith("Assign") and id(op.inputs[0]) in needed:
                return f"{name} reaches the target by the assignment of a variable, through which no gradient flows"
    for inner, _ in starts:
        if _bodies(inner.op) and any(tensor.op is inner.op for tensor in needed.values()):
            return (
                f"{name} and the target are outputs of the same {_called(inner.op)}, which computes the target from a"
                " copy inside: take the gradient inside"
            )
    return None


def _inner(graph: Any, outer: Any) -> Any:
    """Returns the tensor of a graph that stands for a tensor or variable, which may be from outside of it."""
    known = outer.handle if isinstance(outer, tf.Variable) else outer
    if getattr(known, "graph", None) is graph:
        return known
    return next((inner for captured, inner in graph.captures if captured is known), None)


def _ancestors(tensors: Iterable[Any]) -> dict[int, Any]:
    """Returns tensors and all that they are computed from, by their identity."""
    return _closure(tensors, lambda tensor: tensor.op.inputs)


def _descendants(tensors: Iterable[Any]) -> dict[int, Any]:
    """Returns tensors and all that is computed from them, by their identity."""
    return _closure(tensors, lambda tensor: [output for op in tensor.consumers() for output in op.outputs])


def _closure(tensors: Iterable[Any], neighbours: Callable[[Any], Iterable[Any]]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        if id(tensor) not in found:
            found[id(tensor)] = tensor
            waiting += neighbours(tensor)
    return found


def _where_it_ends(seen: Seen, starts: list[tuple[Any, Any]], needed: dict[int, Any]) -> list[str]:
    """Follows the gradient forwards from the source as far as it flows, and says what is behind."""
    outside = {id(inner): source for inner, source in starts}
    reached = [inner for inner, _ in starts if id(inner) in needed]
    ends: dict[Any, tuple[Any, Any]] = {}
    causes: dict[str, None] = {}

    def follow() -> None:
        known = set(outside)
        for tensor in reached:
            for op in tensor.consumers():
                inputs = [outside.get(id(i), i) for i in op.inputs]  # all of them, so that it looks no further back
                for output in op.outputs:
                    if id(output) in needed and id(output) not in known:
                        if _flows(output) and any(found is not None for found in seen.gradient(output, inputs)):
                            known.add(id(output))
                            reached.append(output)
                        else:
                            ends[op] = tensor, output
        # An end is one only if nothing behind it is reached by another way.
        beyond = [tensor for tensor in reached if id(tensor) not in outside]
        passed = {tensor.op for tensor in _ancestors(beyond).values()}
        causes.update((_cause(op, *end), None) for op, end in ends.items() if op not in passed)

    _aside(follow)
    return list(causes)


def _cause(op: Any, tensor: Any, output: Any) -> str:
    if op.type in _CUTS:
        return _CUTS[op.type]
    if _is_custom(op):
        return "a tf.custom_gradient, which returns None"
    if _bodies(op):
        cuts = sorted({_CUTS[kind] for kind in _kinds_inside(op) if kind in _CUTS})
        return f"the {_called(op)}" + (f", inside of which is {' and '.join(cuts)}" if cuts else "")
    if not _flows(output):
        return f"{output.dtype.name} values, made by the op {op.name!r}"
    if tf.gradients(output, tensor)[0] is None:
        return f"the op {op.name!r}, as {op.type} has no gradient"
    return (
        f"the op {op.name!r}, which ran before the block, before the source was watched or while recording was stopped"
    )


def _flows(tensor: Any) -> bool:
    return differentiable(tensor) or tensor.dtype in (tf.resource, tf.variant)  # lists of tensors are variants


def _is_custom(op: Any) -> bool:
    return "_gradient_op_type" in op.node_def.attr


def _called(op: Any) -> str:
    name = re.sub(r"^__[a-z]+_(.*)_[0-9]+$", r"\1", _bodies(op)[0])
    if "PartitionedCall" not in op.type:
        return f"branch or loop {op.name!r}"
    if name == "cflow_gradient_wrapper":  # around a branch or loop when a tape watches
        return f"branch or loop {op.name.rpartition('/')[0]!r}"
    return f"tf.function {name!r}"


def _bodies(op: Any) -> list[str]:
    """Returns the names of the functions that an op calls."""
    attributes = op.node_def.attr.values()
    functions = [function for value in attributes for function in (value.func, *value.list.func)]
    return [function.name for function in functions if function.name]


def _kinds_inside(op: Any) -> set[str]:
    library = {body.signature.name: body for body in op.graph.as_graph_def().library.function}
    kinds: set[str] = set()
    waiting, met = _bodies(op), set()
    while waiting:
        name = waiting.pop()
        if name in library and name not in met:
            met.add(name)
            kinds |= {node.op for node in library[name].node_def}
            waiting += [value.func.name for node in library[name].node_def for value in node.attr.values()]
    return kinds
