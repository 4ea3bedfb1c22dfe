"""The documentation is whole, and what it shows runs and prints what it says."""

import configparser
import contextlib
import doctest
import enum
import importlib
import inspect
import io
import re
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
DOCS = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", *(f"docs/{page}" for page in DOCS)]
PUBLIC = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module in ("tapekit", "tapekit.steps", "tapekit.stopping", "tapekit.callbacks", "tapekit.plots")
    for name in importlib.import_module(module).__all__
}
ENTRIES = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
ENTRIES_WITH_METHODS = re.findall(r"^::: (\S+)\n(?! +options:\n +members: false)", REFERENCE, re.MULTILINE)
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


def text_of(thing):
    return inspect.cleandoc((vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or "")


def section(name, docstring):
    found = re.search(rf"^{name}:\n((?: {{4}}.*(?:\n|$)|\n)+)", docstring, re.MULTILINE)
    return found[1] if found else ""


def named_arguments(docstring):
    return set(re.findall(r"^ {4}\*{0,2}(\w+): ", section("Args", docstring) + section("Attributes", docstring), re.M))


def arguments(thing):
    """The arguments of a function, or of what makes an instance of a class."""
    makers = [thing.__init__, thing.__new__] if inspect.isclass(thing) else [thing]
    function = next(filter(inspect.isfunction, makers), None)
    if function is None or (inspect.isclass(thing) and issubclass(thing, enum.Enum)):
        return []
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [name for name in named if name not in ("self", "cls", "_cls")]


def methods():
    """The public methods of the public classes that are tapekit's own, each with those that it overrides."""
    for path in CLASSES_AND_FUNCTIONS:
        own = [base for base in getattr(PUBLIC[path], "__mro__", ()) if base.__module__.startswith("tapekit")]
        for name in sorted({name for base in own for name in vars(base) if not name.startswith("_")}):
            members = [vars(base)[name] for base in PUBLIC[path].__mro__ if name in vars(base)]
            functions = [getattr(member, "__func__", getattr(member, "fget", member)) for member in members]
            if inspect.isfunction(functions[0]):
                yield path, name, [function for function in functions if inspect.isfunction(function)]


METHODS = [pytest.param(*found[1:], id=".".join(found[:2])) for found in methods()]
FOR_EXAMPLES = [
    pytest.param(path, name, id=f"{path}.{name}")
    for path, name, _ in methods()
    if path in ENTRIES_WITH_METHODS
    and not isinstance(inspect.getattr_static(PUBLIC[path], name), property)
    and not name.startswith(("on_", "set_model"))  # which others call
]


@pytest.mark.parametrize("path", CLASSES_AND_FUNCTIONS)
def test_every_argument_of_a_public_name_is_described(path):
    assert set(arguments(PUBLIC[path])) <= named_arguments(text_of(PUBLIC[path]))


@pytest.mark.parametrize(("name", "functions"), METHODS)
def test_every_public_method_is_described_with_its_arguments(name, functions):
    docstrings = [text_of(function) for function in functions if text_of(function)]
    assert docstrings
    assert all(docstring.partition("\n")[0].endswith(".") for docstring in docstrings)
    assert set(arguments(functions[0])) <= set().union(*map(named_arguments, docstrings))


@pytest.mark.parametrize(("path", "name"), FOR_EXAMPLES)
def test_every_method_in_the_reference_is_in_an_example(path, name):
    own = [base for base in PUBLIC[path].__mro__ if base.__module__.startswith("tapekit")]
    members = [getattr(member, "__func__", member) for base in own for member in vars(base).values()]
    texts = [text_of(thing) for thing in (*own, *filter(inspect.isfunction, members))]
    code = "".join(example.source for text in texts for example in doctest.DocTestParser().get_examples(text))
    assert re.search(rf"\b{name}\(", code)


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page):
    for file, test in re.findall(r"`(\w+\.py)::(\w+)`", (ROOT / page).read_text(encoding="utf-8")):
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation_once():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == DOCS


def test_every_example_is_in_the_gallery_with_its_picture():
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    sections = dict(zip(*[iter(re.split(r"^## (\w+)\n", gallery, flags=re.MULTILINE)[1:])] * 2, strict=True))
    pictures = {path.stem for path in (ROOT / "docs" / "images").glob("*.png")}
    examples = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    assert sorted(sections) == examples
    for name in examples:
        assert f"](../examples/{name}.py)" in sections[name]
        assert (f"](images/{name}.png)" in sections[name]) == (name in pictures)


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
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the page leaves a run open"


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
