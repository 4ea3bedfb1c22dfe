"""The chart of a benchmark: everyone beside tapekit."""

from __future__ import annotations

import textwrap

from matplotlib import colormaps
from matplotlib.figure import Figure

from tests.benchmarks.harness import OURS, Table


def draw(tables: list[Table], about: str) -> Figure:
    """Returns a figure of how many times as long as tapekit everyone took, a line for each case.

    Args:
        tables: of which those with peers are drawn.
        about: the versions and the machine.
    """
    cases = [table for table in tables if table.ours and len(table.rows) > 1]
    names = list(dict.fromkeys(row.name for table in cases for row in table.rows if row.name != OURS))
    figure = Figure(figsize=(9.0, 1.5 + 0.27 * max(1, len(cases))), dpi=100, layout="constrained")
    ax = figure.subplots()
    markers = "osD^v<>PXph8*dH"
    for number, name in enumerate(names):
        points = [
            (table.ratio(row), place) for place, table in enumerate(cases) for row in table.rows if row.name == name
        ]
        lighter, hue = divmod(number, 10)
        color = colormaps["tab20"](2 * hue + lighter)
        ax.plot(*zip(*points, strict=True), markers[number % len(markers)], color=color, label=name)
    ax.axvline(1.0, color="black", linewidth=1.0)
    ax.set(xscale="log", xlabel="time beside tapekit; to the left of 1 is faster", ylim=(len(cases) - 0.5, -0.5))
    ax.set_yticks(range(len(cases)), [table.title for table in cases])
    ax.grid(axis="both", alpha=0.3)
    figure.suptitle(textwrap.fill(about, 130), fontsize="x-small")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure
