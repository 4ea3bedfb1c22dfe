"""The layers of the package: imports point downwards only."""

from __future__ import annotations

import ast
import pathlib

import tapekit

PACKAGE = pathlib.Path(tapekit.__file__).parent
LAYERS = [
    {
        "_describe",
        "_tensors",
        "_config",
        "_convolutions",
        "_drawing",
        "_exchange",
        "_packing",
        "_records",
        "_result",
        "_nonfinite",
        "_interrupts",
        "_version",
        "_xla",
        "plots",
        "_random_state",
        "_store",
    },
    {"_explain", "_nonfinite", "_interrupts"},
    {"stopping"},
    {"callbacks", "_tape"},
    {"_objective", "_optimizers", "steps", "_batches", "_data", "_model", "_arguments"},
    {"_body"},
    {"_drivers"},
    {"_memory"},
    {"_run", "_fit", "_loop", "_session"},
    {"__init__"},
]
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("tapekit."):
                yield node.module.split(".")[1]
            elif node.module == "tapekit":
                yield from (alias.name for alias in node.names)


def _modules():
    """The files of each module; a package counts as one."""
    files = {path.stem: [path] for path in PACKAGE.glob("*.py")}
    return files | {path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")}


def test_every_module_has_a_layer_and_imports_nothing_from_above():
    modules = _modules()
    assert set(modules) == set(LAYER)
    upward = [
        (name, target)
        for name, paths in modules.items()
        for path in paths
        for target in _imports(path)
        if target != name and (LAYER[target] > LAYER[name] or (LAYER[target] == LAYER[name] and LAYER[name] in (3, 5)))
    ]
    assert upward == []
