"""What benchmarks are made of: peers that do the same work in turn, and tables of how long they took."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

OURS = "tapekit"
TURN, MOST_IN_A_TURN = 0.05, 50
"""Seconds that a peer runs at least before it is the next one's turn, if so many short runs are enough for that."""
PACKAGES = (
    "tensorflow",
    "keras",
    "numpy",
    "tf_keras",
    "tensorflow-probability",
    "jax",
    "optax",
    "torch",
    "scikit-learn",
)


@dataclasses.dataclass(frozen=True)
class Peer:
    """One that does the work of a case.

    Attributes:
        name: who it is; that of tapekit is `OURS`.
        run: does the work once, and returns the loss that it came to; `None` where there is none to compare.
        steps: how many steps that are.
        reset: makes everything as it was before, so that each run does the same; not timed.
        is_compared: whether the loss must be that of the others.
    """

    name: str
    run: Callable[[], float | None]
    steps: int = 1
    reset: Callable[[], Any] = lambda: None
    is_compared: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """How long one peer took.

    Attributes:
        cold: seconds of the first run.
        warm: seconds of each of the others, less those that warm up.
        loss: the loss that it came to.
    """

    name: str
    steps: int
    cold: float
    warm: list[float]
    loss: float | None = None
    megabytes: float | None = None
    """The peak memory of the process."""

    @property
    def microseconds(self) -> float:
        """The median of the warm runs, per step."""
        return 1e6 * statistics.median(self.warm) / self.steps

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles of the warm runs, per step in microseconds."""
        if len(self.warm) < 2:
            return self.microseconds, self.microseconds
        low, _, high = statistics.quantiles(self.warm, n=4, method="inclusive")
        return 1e6 * low / self.steps, 1e6 * high / self.steps


@dataclasses.dataclass(frozen=True)
class Table:
    """One case: what was done, and by whom in what time."""

    title: str
    rows: list[Row]

    @property
    def ours(self) -> Row | None:
        """The row of tapekit beside its peers."""
        return next((row for row in self.rows if row.name == OURS), None)

    def ratio(self, row: Row) -> float | None:
        """How many times as long as tapekit somebody took; `None` where nobody is compared."""
        return row.microseconds / self.ours.microseconds if self.ours else None

    def markdown(self) -> str:
        """The table as Markdown, with the columns that have something in them."""
        columns: dict[str, list[str]] = {
            self.title: [row.name for row in self.rows],
            "first run, s": [f"{row.cold:.2f}" for row in self.rows],
            "us a step": [f"{row.microseconds:.4g}" for row in self.rows],
            "quartiles": ["{:.4g} to {:.4g}".format(*row.spread) for row in self.rows],
            "beside tapekit": [f"{ratio:.3g}" if (ratio := self.ratio(row)) else "" for row in self.rows],
            "peak memory, MB": [f"{row.megabytes:.0f}" if row.megabytes else "" for row in self.rows],
            "loss": ["" if row.loss is None else f"{row.loss:.7g}" for row in self.rows],
        }
        columns = {name: cells for name, cells in columns.items() if any(cells)}
        lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def as_json(self) -> dict[str, Any]:
        """The table with all of its times, ready for JSON."""
        return {"title": self.title, "rows": [dataclasses.asdict(row) for row in self.rows]}


class DifferentWorkError(AssertionError):
    """Peers that came to different losses have not done the same work, so that their times say nothing."""


def check_same(title: str, losses: dict[str, float], tolerance: float) -> None:
    """Raises if losses differ.

    Args:
        title: the case.
        losses: by the names of the peers.
        tolerance: how much they may differ, relative to tapekit's, or to the first one's where it does not take part.

    Raises:
        DifferentWorkError: one differs by more.
    """
    reference = OURS if OURS in losses else next(iter(losses), OURS)
    for name, loss in losses.items():
        right = losses[reference]
        if not math.isclose(loss, right, rel_tol=tolerance, abs_tol=1e-12):
            raise DifferentWorkError(
                f"{title}: the loss of {name} must be the {right:.9g} of {reference} to {tolerance:g},"
                f" received {loss:.9g}."
            )


def compare(title: str, peers: Sequence[Peer], rounds: int, tolerance: float) -> Table:
    """Lets peers do the same work in turn, A B C A B C, so that a change of the machine's speed meets all.

    Args:
        title: the case.
        peers: who takes part.
        rounds: how many turns each is timed, after the first run and, if there are several, one that warms up; a turn
            of short runs is their mean.
        tolerance: how much their losses may differ, relative to tapekit's.

    Returns:
        The table.

    Raises:
        DifferentWorkError: the losses of the first runs differ.
    """
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    losses: dict[str, float | None] = {}
    warm_up = min(1, rounds - 1)
    for turn in range(1 + warm_up + rounds):
        for peer in peers:
            # After the others a short run finds nothing in the caches, which is no longer being warm.
            last = times[peer.name][-1] if turn > warm_up else TURN
            repeats = max(1, min(MOST_IN_A_TURN, round(TURN / max(1e-9, last))))
            seconds = 0.0
            for _ in range(repeats):
                peer.reset()
                started = time.perf_counter()
                loss = peer.run()
                seconds += time.perf_counter() - started
            times[peer.name].append(seconds / repeats)
            losses.setdefault(peer.name, loss)
        if turn == 0:
            known = {peer.name: loss for peer in peers if peer.is_compared and (loss := losses[peer.name]) is not None}
            check_same(title, known, tolerance)
    rows = [
        Row(peer.name, peer.steps, times[peer.name][0], times[peer.name][1 + warm_up :], losses[peer.name])
        for peer in peers
    ]
    return Table(title, rows)


def in_new_processes(module: str, runs: Iterable[Sequence[object]], at_once: int) -> Iterator[dict[str, float]]:
    """Runs a module once with each list of arguments, in processes of their own.

    Args:
        module: the module.
        runs: its arguments in each run.
        at_once: how many processes run at a time: one, unless times do not matter.

    Yields:
        The JSON that each run prints in its last line, in the order of `runs`.
    """

    def run(arguments: Sequence[object]) -> dict[str, float]:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(run, runs)


def peak_megabytes() -> float:
    """Returns the most memory that this process has had, on Linux; elsewhere NaN."""
    if not os.path.exists("/proc/self/status"):
        return math.nan
    with open("/proc/self/status") as file:  # unlike getrusage it does not count what the parent had
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024.0


def installed(*packages: str) -> bool:
    """Returns whether all of some packages are installed."""
    return all(package in versions() for package in packages)


def versions() -> dict[str, str]:
    """Returns the versions of those packages that matter and are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Returns what is known of the machine and of Python."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
