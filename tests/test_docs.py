"""The documentation is whole, and what it shows runs and prints what it says."""

import configparser
import contextlib
import doctest
import importlib
import inspect
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
PAGES = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PUBLIC = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module in ("tapekit", "tapekit.steps", "tapekit.stopping", "tapekit.callbacks", "tapekit.plots")
    for name in importlib.import_module(module).__all__
}
ENTRIES = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
CLASSES_AND_FUNCTIONS = [path for path, thing in PUBLIC.items() if inspect.isclass(thing) or inspect.isroutine(thing)]


@pytest.mark.parametrize("path", PUBLIC)
def test_public_name_is_in_the_reference(path):
    names_of_the_same = {other for other, thing in PUBLIC.items() if thing is PUBLIC[path]}
    assert len(names_of_the_same & set(ENTRIES)) == 1


def test_reference_has_public_names_alone_and_each_once():
    assert set(ENTRIES) <= set(PUBLIC)
    assert len(ENTRIES) == len(set(ENTRIES))


@pytest.mark.parametrize("path", CLASSES_AND_FUNCTIONS)
def test_public_name_has_a_docstring_with_a_runnable_example(path):
    docstring = inspect.cleandoc(
        vars(PUBLIC[path])["__doc__"] if inspect.isclass(PUBLIC[path]) else PUBLIC[path].__doc__
    )
    first_line, _, rest = docstring.partition("\n")
    assert first_line.endswith(".")
    example = re.search(r"^Example:\n((?: {4}.*\n?|\n)+)", rest, re.MULTILINE)
    assert example
    assert doctest.DocTestParser().get_examples(example[1])


def blocks(page):
    """The code blocks of a page in order: their language, their text and the line where they begin."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield found[1], found[2], text[: found.start(2)].count("\n") + 1


def run_page(page):
    """Runs the Python blocks of a page in one namespace; yields what they print and what the page says of it."""
    namespace = {"__name__": "page"}
    printed = ""
    for language, text, line in blocks(page):
        if language == "python":
            code = compile("\n" * (line - 1) + text, ROOT / page, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(code, namespace)
            printed = stdout.getvalue()
        elif language == "text":
            yield printed, text


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs_and_prints_what_the_page_shows(page):
    for printed, shown in run_page(page):
        assert [line.split() for line in printed.splitlines()] == [line.split() for line in shown.splitlines()]


def test_readme_gives_commands_of_one_line_that_need_no_more_than_python_and_pip():
    commands = [text.strip() for language, text, _ in blocks("README.md") if language == "sh"]
    assert len(commands) == 2
    ends = (".venv/bin/python examples/quickstart.py", ".venv/bin/python -m pytest")
    for command, end in zip(commands, ends, strict=True):
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert command.endswith(end)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_page_names_the_lower_bounds_that_the_package_asks_for(page):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    asked = dict(line.split(">=") for line in setup["options"]["install_requires"].split())
    asked["python"] = setup["options"]["python_requires"].removeprefix(">=")

    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"(TensorFlow|Keras|NumPy|Python) ([\d.]+) (?:to|or newer)", text)
    assert {name.lower(): version for name, version in named} == asked
