"""Plugins: the example package is installed in an environment of its own, and used by name."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import tapekit as tk

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"

BY_NAME = """
import importlib.metadata, json, sys

loads, load = [], importlib.metadata.EntryPoint.load
def recorded(point):
    if point.group.startswith("tapekit."):
        loads.append(point.name)
    return load(point)
importlib.metadata.EntryPoint.load = recorded

import keras, tensorflow as tf, tapekit as tk

def now():
    return {"loads": list(loads), "imported": "tapekit_signs" in sys.modules}

def refused(get, *arguments):
    try:
        get(*arguments)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

out = {"after import": now()}
tk.OptimizationLoop("sgd", step="tape", stopping="non_finite", callbacks=["history", "terminate_on_nan"])
out["after tapekit's own names"] = now()
out["unknown step"] = refused(tk.steps.get, "sing")
out["unknown callback"] = refused(tk.callbacks.get, "milestone")
out["after unknown names"] = now()
out["step"] = type(tk.steps.get("sign")).__qualname__
out["after the first name"] = now()
out["missing"] = refused(tk.callbacks.get, "milestones")

x = tf.Variable(0.0, dtype=tf.float64)
loop = tk.OptimizationLoop(
    keras.optimizers.SGD(0.5),
    step={"class_name": "sign", "config": {"scale": 2.0}},
    callbacks={"class_name": "milestones", "config": {"losses": [1.0, 10.0]}},
    max_iterations=6,
    jit_compile=False,
)
result = loop.minimize(lambda: (x - 4.0) ** 2, [x])
out["losses"] = result.history["loss"].tolist()
out["config"] = keras.saving.serialize_keras_object(loop)
print(json.dumps(out))
"""

BY_CONFIGURATION = """
import json, sys
import tensorflow as tf, tapekit as tk

config = json.loads(sys.stdin.read())
out = {"before": "tapekit_signs" in sys.modules}
loop = tk.OptimizationLoop.from_config(config["config"])
out["step"] = [type(loop.step).__name__, loop.step.scale]
out["callbacks"] = [[type(callback).__name__, callback.losses] for callback in loop.callbacks]
x = tf.Variable(0.0, dtype=tf.float64)
out["losses"] = loop.minimize(lambda: (x - 4.0) ** 2, [x]).history["loss"].tolist()
print(json.dumps(out))
"""


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of a temporary environment that sees this one's packages, and the plugin installed in it."""
    folder = tmp_path_factory.mktemp("plugin")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONDONTWRITEBYTECODE": "1"}
    venv.create(folder / "env", symlinks=os.name != "nt")
    binaries = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    executable = str(next(path for path in binaries.iterdir() if path.stem == "python"))

    def run(*arguments, stdin=""):
        return subprocess.run(
            [executable, *arguments], input=stdin, capture_output=True, text=True, env=environment, cwd=folder
        )

    packages = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    seen.append(str(Path(tk.__file__).parents[1]))
    lines = [f"import site; site.addsitedir({path!r})" for path in seen]
    Path(packages, "parent.pth").write_text("\n".join(lines))

    before = files(PLUGIN)
    shutil.copytree(PLUGIN, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    installed = run("-m", "pip", "install", *flags, str(folder / "source"))
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert files(PLUGIN) == before
    return run


@pytest.fixture(scope="module")
def by_name(python):
    done = python("-c", BY_NAME)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return {"printed": printed, **json.loads(last)}


NOTHING = {"loads": [], "imported": False}
LOSSES = [16.0, 9.0, 4.0, 1.0, 0.0, 0.0]


def test_a_plugin_is_not_loaded_before_a_name_of_its_own_is_asked_for(by_name):
    assert by_name["after import"] == NOTHING
    assert by_name["after tapekit's own names"] == NOTHING
    assert by_name["after unknown names"] == NOTHING
    assert by_name["after the first name"] == {"loads": ["sign"], "imported": True}


def test_the_step_and_the_callback_of_a_plugin_are_used_by_name(by_name):
    assert by_name["step"] == "SignStep"
    assert by_name["losses"] == LOSSES
    assert by_name["printed"] == ["the loss fell to 10.0 at step 2", "the loss fell to 1.0 at step 4"]


def test_the_names_of_a_plugin_are_among_the_known_ones(by_name):
    assert by_name["unknown step"] == (
        "ValueError: `step` 'sing' is not known, the closest is 'sign'; the known names are minimize, sign, tape."
    )
    assert "the closest is 'milestones'; the known names are " in by_name["unknown callback"]
    assert by_name["missing"] == (
        "TypeError: `callbacks` 'milestones' needs other arguments (missing a required argument: 'losses'): give"
        ' {"class_name": "milestones", "config": {...}} for Milestones(losses).'
    )


def test_a_configuration_finds_the_plugin_that_its_objects_come_from(python, by_name):
    done = python("-c", BY_CONFIGURATION, stdin=json.dumps(by_name["config"]))
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    assert json.loads(last) == {
        "before": False,
        "step": ["SignStep", 2.0],
        "callbacks": [["Milestones", [1.0, 10.0]]],
        "losses": LOSSES,
    }
    assert printed == by_name["printed"]


# What a plugin can do wrong, with entry points of our own.


class Halving(tk.Step):
    provides = frozenset()

    def __init__(self, factor=0.5):
        self.factor = factor

    def take(self, problem):
        logs = problem.evaluate()
        for variable in problem.variables:
            variable.assign(self.factor * variable)
        return logs


def make_halving():
    return Halving(0.25)


def not_a_step():
    return 3


@pytest.fixture
def entry_points(monkeypatch):
    asked = []

    def entry_points(group):
        asked.append(group)
        targets = {
            "halving": "Halving",
            "quarter": "make_halving",
            "three": "not_a_step",
            "tape": "Halving",
            "gone": "Nobody",
        }
        points = {name: f"{__name__}:{target}" for name, target in targets.items()} | {"broken": "no_such_module:Step"}
        return [importlib.metadata.EntryPoint(name, value, group) for name, value in points.items()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return asked


def test_entry_points_are_looked_for_in_the_group_of_the_kind_and_only_for_names_that_are_not_known(entry_points):
    tk.steps.get("tape")
    tk.stopping.get({"class_name": "max_iterations", "config": {"n": 1}})
    tk.callbacks.get("history")
    keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(tk.OptimizationLoop("sgd")))
    assert entry_points == []
    with pytest.raises(ValueError, match="is not known"):
        tk.stopping.get("nothing")
    assert entry_points == ["tapekit.stopping"]


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("halving", Halving()),
        ("Halving", Halving()),
        ("halving_step", Halving()),
        ({"class_name": "halving", "config": {"factor": 0.125}}, Halving(0.125)),
        ("quarter", Halving(0.25)),  # an entry point may be a function that makes the object
        ("tape", tk.TapeStep()),  # a plugin does not take the names of tapekit
    ],
)
def test_an_entry_point_stands_for_an_object(entry_points, identifier, expected):
    assert tk.steps.get(identifier) == expected


def test_a_step_of_an_entry_point_runs(entry_points):
    x = tf.Variable(8.0)
    result = tk.OptimizationLoop("sgd", step="quarter", max_iterations=2, run_eagerly=True).minimize(lambda: x**2, [x])
    assert (x.numpy(), result.history["loss"].tolist()) == (0.5, [64.0, 4.0])


def test_an_entry_point_that_gives_something_else_is_refused(entry_points):
    with pytest.raises(TypeError) as caught:
        tk.steps.get("three")
    assert str(caught.value) == (
        "`step` must be a Step, its name or its configuration, received the int 3 by the name 'three'."
    )


@pytest.mark.parametrize(("name", "kind"), [("broken", ModuleNotFoundError), ("gone", AttributeError)])
def test_the_error_of_a_broken_plugin_reaches_the_user_and_hurts_no_other_name(entry_points, name, kind):
    with pytest.raises(kind, match=r"no_such_module|Nobody"):
        tk.steps.get(name)
    assert tk.steps.get("halving") == Halving()
