"""Measures tapekit beside its peers, interleaved in one run: `python -m tests.benchmarks`.

Needs the extra `benchmarks`; PyTorch takes part where it is installed. Times differ from machine to machine; the
ratios are what counts.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import datetime
import json
import time
from pathlib import Path

from tests.benchmarks import cold, functions, growth, hooks, limits, models, tape
from tests.benchmarks.chart import draw
from tests.benchmarks.harness import PACKAGES, Table, machine, versions

GROUPS = {
    "functions": functions.tables,
    "models": models.tables,
    "hooks": hooks.tables,
    "tape": tape.tables,
    "growth": growth.tables,
    "cold": cold.tables,
    "limits": limits.tables,
}

DRAWN = ("functions", "models", "tape", "cold")
"""Those with others to compare with."""


def main() -> None:
    """Measures, prints each table as it comes, and writes table.md, results.json and, if there are peers, chart.png."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little work, once: that everyone comes to the same loss")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="which groups")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="where to write (%(default)s)")
    arguments = parser.parse_args()

    started = time.perf_counter()
    about, found_versions = {"date": datetime.date.today().isoformat(), **machine()}, versions()
    print("missing:", ", ".join(package for package in PACKAGES if package not in found_versions) or "nothing")
    found: list[tuple[str, Table]] = []
    for group in arguments.only:
        for table in GROUPS[group](arguments.quick):
            print(f"\n{table.markdown()}", flush=True)
            found.append((group, table))
    tables = [table for _, table in found]
    print(f"\n{len(tables)} tables in {time.perf_counter() - started:.0f} s")

    arguments.output.mkdir(parents=True, exist_ok=True)
    heading = "; ".join(f"{name} {value}" for name, value in {**found_versions, **about}.items())
    text = "\n\n".join([heading, *(table.markdown() for table in tables)])
    (arguments.output / "table.md").write_text(f"{text}\n", encoding="utf-8")
    results = {**about, "versions": found_versions, "tables": [table.as_json() for table in tables]}
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    if drawn := [table for group, table in found if group in DRAWN]:
        draw(drawn, heading).savefig(arguments.output / "chart.png")


if __name__ == "__main__":
    main()
