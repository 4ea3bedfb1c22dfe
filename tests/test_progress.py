"""What a person sees of a run while it goes on: `Progress`, `status` and `verbose`."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import sys
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapekit as tk
from tapekit.callbacks._dispatch import Dispatch
from tapekit.stopping import Status


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


class ScriptedLoop:
    """What `Progress` asks of a loop."""

    def __init__(self, clock, criteria=(), epoch=None):
        self._clock, self._criteria, self._epoch = clock, criteria, epoch
        self._started = clock.seconds
        self.step = 0

    def status(self):
        seconds = self._clock.seconds - self._started
        criteria = [status for make in self._criteria for status in make(self.step, seconds)]
        batch = None if self._epoch is None else self.step - 10 * self._epoch
        return {"seconds": seconds, "criteria": criteria, "epoch": self._epoch, "batch": batch}


def steps_until(n):
    return lambda step, seconds: tk.stopping.MaxIterations(n).status((), {"step": step})


def play(progress, loop, clock, steps, seconds_a_step, logs=lambda step: {"loss": 1.0 / step}):
    """Calls the hooks as a run does whose host looks after each of some steps."""
    progress.loop = loop
    progress.on_train_begin()
    for step in steps:
        clock.seconds += (step - loop.step) * seconds_a_step
        loop.step = step
        progress.on_step(step, logs(step))
    progress.on_train_end()


def minimize(callbacks=(), max_iterations=50, verbose="auto", **settings):
    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop("sgd", max_iterations=max_iterations, **settings)
    return loop.minimize(lambda: (x - 4.0) ** 2, [x], list(callbacks), verbose=verbose)


def small_model():
    inputs = np.linspace(-1.0, 1.0, 64, dtype="float32")[:, None]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model, inputs, 3.0 * inputs


# How far a run is


LOSS, CHANGE, WAIT = 0.5, 0.25, 3
STATUSES = {
    "MaxIterations": (tk.stopping.MaxIterations(20), (), ("step", 8, 20, True), 0.4),
    "MaxEvaluations": (tk.stopping.MaxEvaluations(20), (), ("evaluations", 16, 20, True), 0.8),
    "WallTime": (tk.stopping.WallTime(10.0), 2.5, ("seconds", 2.5, 10.0, True), 0.25),
    "LossBelow": (tk.stopping.LossBelow(0.1), (), ("loss", 0.5, 0.1, False), 0.2),
    "LossBelow, negative": (tk.stopping.LossBelow(-1.0), (), ("loss", 0.5, -1.0, False), 0.0),
    "LossChangeBelow": (
        tk.stopping.LossChangeBelow(0.1, rtol=0.2),
        {"loss": 0.5, "change": 0.8},
        ("change of the loss", 0.8, 0.2, False),
        0.25,
    ),
    "GradientNormBelow": (tk.stopping.GradientNormBelow(0.5), (), ("gradient norm", 2.0, 0.5, False), 0.25),
    "LossPlateau": (
        tk.stopping.LossPlateau(12),
        {"wait": 3, "best": 0.5},
        ("steps without a better loss", 3, 12, True),
        0.25,
    ),
    "VariablesChangeBelow": (
        tk.stopping.VariablesChangeBelow(0.1),
        {"change": 0.2, "threshold": 0.1},
        ("change of the variables", 0.2, 0.1, False),
        0.5,
    ),
}


@pytest.mark.parametrize("case", STATUSES)
def test_a_criterion_says_how_far_it_is(case):
    criterion, state, (quantity, value, threshold, rising), share = STATUSES[case]
    logs = {"step": 8, "evaluations": 16, "loss": 0.5, "gradient_norm": 2.0}
    (status,) = criterion.status(state, logs)
    assert status.criterion == type(criterion).__name__
    assert status[1:] == (quantity, pytest.approx(value), pytest.approx(threshold), rising)
    assert status.share == pytest.approx(share)
    assert not status.is_met


def test_there_is_no_change_of_the_loss_at_the_first_step():
    (status,) = tk.stopping.LossChangeBelow(0.1).status({"loss": 0.5, "change": 0.0}, {"step": 1})
    assert math.isinf(status.value)
    assert status.share == 0.0


@pytest.mark.parametrize(
    ("value", "threshold", "rising", "share", "is_met"),
    [
        (1.0, 2.0, True, 0.5, False),
        (3.0, 2.0, True, 1.0, True),
        (2.0, 2.0, False, 1.0, True),
        (4.0, 1.0, False, 0.25, False),
        (1.0, 0.0, False, 0.0, False),
        (0.0, 0.0, False, 1.0, True),
        (-2.0, -1.0, False, 1.0, True),
        (-1.0, -2.0, False, 0.0, False),
        (math.nan, 1.0, False, 0.0, False),
        (math.inf, 1.0, False, 0.0, False),
    ],
)
def test_the_share_of_a_status(value, threshold, rising, share, is_met):
    status = Status("", "", value, threshold, rising)
    assert (status.share, status.is_met) == (share, is_met)


@pytest.mark.parametrize("driver", [{}, {"jit_compile": False}, {"run_eagerly": True}], ids=["xla", "graph", "eager"])
def test_the_status_of_a_loop_has_each_part_of_its_criteria(driver):
    seen = []
    inner = tk.stopping.LossBelow(1.0) & tk.stopping.LossChangeBelow(1e-3).for_steps(3).after(2)

    def look(step, logs):
        seen.append((step, logs["loss"], loop.status()))

    x = tf.Variable(0.0)
    loop = tk.OptimizationLoop(keras.optimizers.SGD(0.25), stopping=inner, max_iterations=5, **driver)
    loop.minimize(lambda: (x - 4.0) ** 2, [x], [look])
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5]
    for step, loss, status in seen:
        assert [part[:2] for part in status["criteria"]] == [
            ("LossBelow", "loss"),
            ("LossChangeBelow", "change of the loss"),
            ("MaxIterations", "step"),
        ]
        assert [part.value for part in status["criteria"]] == [
            loss,
            pytest.approx(3.0 * loss, rel=1e-5) if step > 1 else math.inf,
            step,
        ]
        assert (status["epoch"], status["batch"]) == (None, None)
        assert status["seconds"] > 0.0


def test_the_status_of_a_loop_that_does_not_run_is_refused():
    with pytest.raises(RuntimeError, match="status must be called from a hook of a running loop"):
        tk.OptimizationLoop("sgd").status()


def test_the_status_of_a_fit_has_the_epoch_and_the_batch():
    model, x, y = small_model()
    seen = []

    class Look(tk.Callback):
        def on_step(self, step, logs):
            seen.append((self.loop.status()["epoch"], self.loop.status()["batch"]))

    expected = [(0, 1), (0, 2), (1, 1), (1, 2)]
    tk.OptimizationLoop().fit(model, x, y, batch_size=32, epochs=2, verbose=0, callbacks=[Look()])
    assert seen == expected
    seen.clear()
    model.fit(x, y, batch_size=32, epochs=2, verbose=0, callbacks=[Look()])
    assert seen == expected


# Lines for a file


def test_lines_have_step_times_rate_values_and_the_nearest_criterion(clock, capsys):
    criteria = [
        steps_until(4000),
        lambda step, seconds: tk.stopping.WallTime(1000.0).status(seconds, {}),
        lambda step, seconds: tk.stopping.LossBelow(1e-9).status((), {"loss": 1.0 / step}),
        lambda step, seconds: tk.stopping.LossPlateau(8).status({"wait": 2, "best": 0.0}, {}),
    ]
    play(tk.callbacks.Progress(), ScriptedLoop(clock, criteria), clock, range(100, 4001, 100), 0.01)
    assert capsys.readouterr().out.splitlines() == [
        "step 1,000/4,000, 0:10 gone, 0:30 left, loss 0.001, steps_without_a_better_loss 2<8, 100 steps/s",
        "step 2,000/4,000, 0:20 gone, 0:20 left, loss 0.0005, steps_without_a_better_loss 2<8, 100 steps/s",
        "step 3,000/4,000, 0:30 gone, 0:10 left, loss 0.0003333, steps_without_a_better_loss 2<8, 100 steps/s",
        "step 4,000/4,000, 0:40 gone, loss 0.00025, steps_without_a_better_loss 2<8, 100 steps/s",
    ]


def test_the_time_left_is_that_to_the_nearest_limit(clock, capsys):
    criteria = [steps_until(10**6), lambda step, seconds: tk.stopping.WallTime(12.0).status(seconds, {})]
    play(tk.callbacks.Progress(), ScriptedLoop(clock, criteria), clock, (1000, 1100), 0.01)
    assert capsys.readouterr().out.splitlines()[0] == "step 1,000/1,000,000, 0:10 gone, 0:02 left, loss 0.001"


def test_metrics_that_are_asked_for_and_gradient_norms_are_shown(clock, capsys):
    logs = {"loss": 0.5, "gradient_norm": 0.25, "x": np.array([1.0, 2.0]), "other": 3.0}
    loop = ScriptedLoop(clock)
    play(tk.callbacks.Progress(["x", "missing"]), loop, clock, [1], 1.0, lambda step: logs)
    assert capsys.readouterr().out == "step 1, 0:01 gone, loss 0.5, gradient_norm 0.25, x [1. 2.]\n"


def test_hours_and_large_rates_can_be_read(clock, capsys):
    play(tk.callbacks.Progress(), ScriptedLoop(clock, [steps_until(10**10)]), clock, (10**9, 2 * 10**9), 5e-6)
    assert capsys.readouterr().out.splitlines() == [
        "step 1,000,000,000/10,000,000,000, 1:23:20 gone, loss 1e-09",
        "step 2,000,000,000/10,000,000,000, 2:46:40 gone, 11:06:40 left, loss 5e-10, 200k steps/s",
    ]


def test_drawing_takes_a_hundredth_of_the_time_at_most(clock, monkeypatch):
    drawn = []
    progress = tk.callbacks.Progress(interval=0.2, verbose=1, file=io.StringIO())

    class Slow:
        is_live = True

        def show(self, view):
            drawn.append(view.step)
            clock.seconds += 1.0

        def close(self):
            pass

    monkeypatch.setattr("tapekit.callbacks._progress._display", lambda file, verbose: Slow())
    play(progress, ScriptedLoop(clock), clock, range(1, 1001), 0.25)
    assert drawn == [1, 397, 793, 1000]  # each second of drawing is followed by 99 of steps


def test_in_a_run_the_last_line_is_that_of_its_end_and_has_no_control_codes(capsys):
    result = minimize([tk.callbacks.Progress()], tolerance=1e-3, max_iterations=1000)
    (line,) = capsys.readouterr().out.splitlines()
    known = rf"step {result.steps}/1,000, 0:0\d gone, loss 0\.0\d+, change_of_the_loss 0\.000\d+<=0\.001"
    assert re.fullmatch(known + r", [\d.]+[kM]? steps/s", line)


def test_a_run_without_a_step_shows_nothing(capsys):
    x = tf.Variable(0.0)

    class Leave(tk.Callback):
        def on_train_begin(self, logs=None):
            self.loop.stop("before the first step")

    result = tk.OptimizationLoop("sgd", max_iterations=9).minimize(
        lambda: x**2, [x], [Leave(), tk.callbacks.Progress()]
    )
    assert result.steps == 0
    assert capsys.readouterr().out == ""


# The line that lives


def lines_of(text):
    """What was drawn one after the other on the line of a terminal."""
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_in_a_terminal_one_line_is_drawn_again(clock, terminal):
    progress = tk.callbacks.Progress(file=terminal)
    play(progress, ScriptedLoop(clock, [steps_until(400)]), clock, range(100, 401, 100), 0.01)
    lines = [re.sub(r"^[━╸╺ ]+", "", line).rstrip() for line in lines_of(terminal.getvalue())]
    assert lines[0] == "the first steps are being prepared"
    assert lines[1] == "25% 100/400  0:01  loss 0.01"
    assert lines[2] == "50% 200/400  0:02<0:02  loss 0.005  100 steps/s"
    assert lines[-1] == "100% 400/400  0:04  loss 0.0025  100 steps/s"
    assert "\x1b[2K" in terminal.getvalue()  # the line before is erased
    assert terminal.getvalue().count("\n") == 1


def test_a_narrow_terminal_has_no_bar(clock, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    play(tk.callbacks.Progress(file=terminal), ScriptedLoop(clock, [steps_until(4)]), clock, [1, 4], 0.5)
    assert "━" not in terminal.getvalue()
    assert max(map(len, lines_of(terminal.getvalue()))) <= 60


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_honoured(clock, terminal, monkeypatch, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    play(tk.callbacks.Progress(file=terminal), ScriptedLoop(clock, [steps_until(4)]), clock, [1, 2, 4], 0.5)
    colours = re.findall(r"\x1b\[[\d;]*38;[\d;]*m|\x1b\[3[0-7]m", terminal.getvalue())
    assert bool(colours) is not no_color


def test_a_terminal_that_knows_no_control_codes_gets_lines(clock, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    play(tk.callbacks.Progress(file=terminal), ScriptedLoop(clock), clock, [1, 2], 0.5)
    assert terminal.getvalue() == "step 2, 0:01 gone, loss 0.5, 2 steps/s\n"


def test_the_cursor_is_back_after_an_error(terminal):
    def fail(step, logs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        minimize([tk.callbacks.Progress(file=terminal), fail])
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_without_rich_it_is_the_bar_of_keras_in_a_terminal_and_lines_elsewhere(clock, terminal, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    criteria = [steps_until(8), lambda step, seconds: tk.stopping.LossBelow(0.1).status((), {"loss": 1.0 / step})]
    play(tk.callbacks.Progress(), ScriptedLoop(clock, criteria), clock, [2, 8], 0.5)
    assert capsys.readouterr().out == "step 8/8, 0:04 gone, loss 0.125>0.1, 2 steps/s\n"

    monkeypatch.setattr(sys, "stdout", terminal)
    play(tk.callbacks.Progress(), ScriptedLoop(clock, criteria), clock, [2, 8], 0.5)
    assert "8/8" in lines_of(terminal.getvalue())[-1]
    assert "loss: 0.1250" in lines_of(terminal.getvalue())[-1]
    assert terminal.getvalue().endswith("\n")

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", plain := Terminal())
    play(tk.callbacks.Progress(), ScriptedLoop(clock, criteria), clock, [2, 8], 0.5)
    assert plain.getvalue() == "step 8/8, 0:04 gone, loss 0.125>0.1, 2 steps/s\n"


def test_in_a_notebook_an_output_changes(clock, monkeypatch):
    shown = []

    class Handle:
        def update(self, output, raw):
            shown.append(output)

    def display(output, raw, display_id):
        assert raw
        assert display_id is True
        shown.append(output)
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    criteria = [steps_until(8), lambda step, seconds: tk.stopping.LossBelow(0.1).status((), {"loss": 1.0 / step})]
    play(tk.callbacks.Progress(), ScriptedLoop(clock, criteria), clock, [2, 8], 0.5)
    assert [output["text/plain"] for output in shown] == [
        "the first steps are being prepared",
        "25% 2/8  0:01  loss 0.5>0.1",
        *["100% 8/8  0:04  loss 0.125>0.1  2 steps/s"] * 2,
    ]
    assert shown[1]["text/html"] == (
        '<div><progress value="0.2500"></progress> <code>25% 2/8  0:01  loss 0.5&gt;0.1</code></div>'
    )


# What switches it


@pytest.mark.parametrize(("verbose", "lines"), [("auto", 0), (0, 0), (1, 1), (2, 1)])
def test_verbose_of_minimize_shows_a_run(verbose, lines, capsys):
    minimize(verbose=verbose)
    assert len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.parametrize(("verbose", "lines"), [("auto", 1), (0, 0), (1, 1), (2, 1)])
def test_verbose_of_minimize_switches_the_one_that_is_there(verbose, lines, capsys):
    minimize([tk.callbacks.Progress()], verbose=verbose)
    assert len(capsys.readouterr().out.splitlines()) == lines


def test_its_own_verbose_comes_first(capsys):
    minimize([tk.callbacks.Progress(verbose=0)], verbose=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("verbose", [3, "loud", None])
def test_a_verbose_that_is_nothing_is_refused(verbose):
    x = tf.Variable(0.0)
    with pytest.raises(ValueError, match=r"`verbose` must be 0, 1, 2 or \"auto\", received"):
        tk.OptimizationLoop("sgd", max_iterations=1).minimize(lambda: x**2 - x, [x], verbose=verbose)
    assert x.numpy() == 0.0


def test_in_a_fit_it_takes_the_place_of_the_bar_of_keras(capsys):
    model, x, y = small_model()
    tk.OptimizationLoop().fit(model, x, y, epochs=2, callbacks=[tk.callbacks.Progress(["mae"])])
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 2/2, batch 2/2, 0:0\d gone, loss \S+, mae \S+, [\d.]+k? steps/s", line)


@pytest.mark.parametrize("fit", ["loop.fit", "Model.fit"])
def test_verbose_2_is_a_line_an_epoch_with_its_results(fit, capsys):
    model, x, y = small_model()
    settings = {"epochs": 3, "validation_split": 0.5, "callbacks": [tk.callbacks.Progress(["val_mae"], verbose=2)]}
    if fit == "loop.fit":
        tk.OptimizationLoop().fit(model, x, y, batch_size=8, **settings)
    else:
        model.fit(x, y, batch_size=8, verbose=0, **settings)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[:2] for line in lines] == [[f"epoch {n}/3", " batch 4/4"] for n in (1, 2, 3)]
    assert all("val_mae" in line for line in lines)


# What it must not cost or change


def test_it_makes_no_chunk_shorter():
    dispatch = Dispatch([tk.callbacks.Progress()], epoch_length=1)
    assert dispatch.steps_to_edge(0, 1000) == 1000
    assert dispatch.period(1000) == 1000
    dispatch = Dispatch([tk.callbacks.Progress()], epoch_length=None)
    assert dispatch.steps_to_edge(0, 1000) == 1000


def test_it_changes_no_bit_and_traces_nothing_more(capsys):
    runs = []
    for callbacks in ([], [tk.callbacks.Progress()]):
        x = tf.Variable(0.0)
        loop = tk.OptimizationLoop("adam", max_iterations=100)
        result = loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks)
        runs.append((result.history["loss"].tobytes(), x.numpy().tobytes(), loop.traces))
    assert runs[0] == runs[1]
    assert capsys.readouterr().out.startswith("step 100/100, ")


def test_a_run_that_goes_on_from_a_checkpoint_shows_its_own_time(tmp_path, clock, capsys):
    def run(n, resume_from=None):
        x = tf.Variable(0.0, name="x")
        loop = tk.OptimizationLoop("sgd", max_iterations=n)
        callbacks = [tk.callbacks.Progress(), tk.callbacks.Checkpoint(tmp_path)]
        return loop.minimize(lambda: (x - 4.0) ** 2, [x], callbacks, resume_from=resume_from)

    run(10)
    clock.seconds = 0.0  # another process has another clock
    assert run(20, resume_from=tmp_path).steps == 20
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["step 10/10", "step 20/20"]


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metrics": "mae"}, TypeError, r"`metrics` must be a list of names of logs, received 'mae'; write \['mae'\]"),
        ({"verbose": 3}, ValueError, "`verbose` must be 0, 1, 2 or None, received the int 3"),
        ({"interval": -1.0}, ValueError, "`interval` must be .*, received -1"),
        ({"interval": "often"}, TypeError, "`interval` must be .*, received 'often'"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tk.callbacks.Progress(**arguments)
