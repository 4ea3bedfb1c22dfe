"""The harness of the benchmarks, on peers that take no time."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from tests.benchmarks import chart, harness
from tests.benchmarks.harness import OURS, DifferentWorkError, Peer, Row, Table, compare


@pytest.fixture
def clock(monkeypatch):
    """A clock that every look moves on by a second."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))


def peers(calls, losses=(2.0, 2.0)):
    def peer(name, loss):
        return Peer(name, lambda: calls.append(name) or loss, 10, lambda: calls.append(f"reset {name}"))

    return [peer(name, loss) for name, loss in zip((OURS, "other"), losses, strict=True)]


def test_peers_take_turns_and_are_reset_before_each_run(clock):
    calls = []
    compare("work", peers(calls), rounds=2, tolerance=0.0)
    assert calls == [f"reset {OURS}", OURS, "reset other", "other"] * 4  # the first, one to warm up, and two


def test_the_first_run_and_the_one_that_warms_up_are_apart(clock):
    table = compare("work", peers([]), rounds=3, tolerance=0.0)
    assert [(row.cold, row.warm) for row in table.rows] == [(1.0, [1.0] * 3)] * 2


def test_none_warms_up_for_a_single_turn(clock):
    calls = []
    table = compare("work", peers(calls), rounds=1, tolerance=0.0)
    assert calls.count(OURS) == 2
    assert [(row.cold, row.warm) for row in table.rows] == [(1.0, [1.0])] * 2


def test_a_turn_of_short_runs_is_their_mean(monkeypatch):
    calls, hundredths = [], itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.01 * next(hundredths))
    table = compare("work", peers(calls), rounds=3, tolerance=0.0)
    assert calls.count(OURS) == 2 + 3 * 5  # turns of 0.05 s
    assert [row.warm for row in table.rows] == [pytest.approx([0.01] * 3)] * 2


def test_peers_that_come_to_different_losses_are_refused_before_they_are_timed():
    calls = []
    sentence = "work: the loss of other must be the 2 of tapekit to 1e-06, received 2.1."
    with pytest.raises(DifferentWorkError, match=re.escape(sentence)):
        compare("work", peers(calls, (2.0, 2.1)), rounds=2, tolerance=1e-6)
    assert calls.count("other") == 1
    compare("work", peers(calls, (2.0, 2.1)), rounds=1, tolerance=0.1)
    with pytest.raises(DifferentWorkError):
        compare("work", peers(calls, (float("nan"), float("nan"))), rounds=1, tolerance=0.1)


def test_medians_quartiles_and_ratios():
    table = Table("work", [Row(OURS, 10, 9.0, [1e-5, 3e-5, 2e-5]), Row("other", 5, 8.0, [4e-5])])
    ours, other = table.rows
    assert ours.microseconds == pytest.approx(2.0)
    assert ours.spread == pytest.approx((1.5, 2.5))
    assert (other.microseconds, other.spread) == (pytest.approx(8.0), pytest.approx((8.0, 8.0)))
    assert (table.ratio(ours), table.ratio(other)) == (pytest.approx(1.0), pytest.approx(4.0))
    assert Table("growth", [Row("10 steps", 10, 1.0, [1.0])]).ratio(ours) is None


def test_a_table_has_the_columns_that_are_known():
    table = Table("work", [Row(OURS, 10, 9.0, [1e-5], loss=0.5), Row("other", 10, 8.0, [4e-5])])
    assert table.markdown().splitlines() == [
        "| work | first run, s | us a step | quartiles | beside tapekit | loss |",
        "| --- | --- | --- | --- | --- | --- |",
        "| tapekit | 9.00 | 1 | 1 to 1 | 1 | 0.5 |",
        "| other | 8.00 | 4 | 4 to 4 | 4 |  |",
    ]
    heading = Table("growth", [Row("10 steps", 10, 9.0, [1e-5], megabytes=100.0)]).markdown().splitlines()[0]
    assert heading == "| growth | first run, s | us a step | quartiles | peak memory, MB |"


def test_the_chart_shows_everyone_beside_tapekit_with_versions_and_machine(tmp_path):
    tables = [
        Table("work", [Row(OURS, 10, 9.0, [1e-5]), Row("other", 10, 8.0, [4e-5])]),
        Table("growth", [Row("10 steps", 10, 9.0, [1e-5])]),
    ]
    figure = chart.draw(tables, "keras 3; cores 2")
    (ax,) = figure.axes
    shown = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]
    assert shown[0] == ("other", [pytest.approx(4.0)], [0])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["work"]
    assert figure.get_suptitle() == "keras 3; cores 2"
    figure.savefig(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_processes_print_comes_in_the_order_of_their_arguments(tmp_path, at_once):
    runs = [("--compact", tmp_path / f"{n}.json") for n in range(3)]
    for n, (_, path) in enumerate(runs):
        path.write_text(f'{{"n": {n}}}', encoding="utf-8")
    assert list(harness.in_new_processes("json.tool", runs, at_once)) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_the_machine_and_the_versions_are_known():
    assert {"processor", "cores", "system", "python"} == set(harness.machine())
    assert {"tensorflow", "keras", "numpy"} <= set(harness.versions())
    assert not harness.installed("tensorflow", "a-package-that-nobody-has")
