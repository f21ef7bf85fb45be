"""`make benchmark`, or a part of it: `python -m benchmarks.speed --only sinusoid-1 conv4-1 loop start memory`.

Everyone's meta-gradient is compared with learn2learn's before anything is timed; whoever disagrees is not timed. Then
all are called in turn, and a ratio is that of two calls of the same round.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import machine, memory, startup, training
from benchmarks.speed.agreement import TOLERANCE, check
from benchmarks.speed.peers import FLOOR, PEERS, REFERENCE, UnavailableError
from benchmarks.speed.problems import Problem, conv, sinusoid
from benchmarks.speed.timing import Ratio, Times, in_turn

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "sinusoid-1": lambda: sinusoid(1),
    "sinusoid-5": lambda: sinusoid(5),
    "conv4-1": lambda: conv(1),
    "conv4-5": lambda: conv(5),
}
OTHERS = ("loop", "start", "memory")

ROUNDS, SLOT_SECONDS, BUDGET_SECONDS = 15, 0.1, 100.0
LOOP_RUNS = 40
PEAK = "peak: product of large matrices"

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables as they come, and write `table.md`, `table.csv` and `ratios.png`."""
    known = (*PROBLEMS, *OTHERS)
    parser = argparse.ArgumentParser("make benchmark", description="Speed, beside other libraries, in the same run.")
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="PART", help=", ".join(known))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    lines = [machine.description(given.device), ""]
    print(lines[0], flush=True)
    others: dict[str, Callable[[], tuple[str, list[Row]]]] = {
        "loop": loop,
        "start": start,
        "memory": partial(peak_memory, given.device),
    }
    rows: list[Row] = []
    for part in given.only:
        if part in PROBLEMS:
            title, found = meta_gradients(Problem(**(vars(PROBLEMS[part]()) | {"device": given.device})))
        else:
            title, found = others[part]()
        rows += found
        lines += ["", f"## {title}", "", *markdown(found)]
        print("\n".join(["", f"## {title}", "", *markdown(found)]), flush=True)
        (given.output / "table.md").write_text("\n".join([*lines, ""]))
        write_csv(given.output / "table.csv", rows)
    draw(rows, given.output / "ratios.png")
    print(f"\nWritten to {given.output}")


def meta_gradients(problem: Problem) -> tuple[str, list[Row]]:
    """One meta-gradient by everyone, the floor, and the machine's peak."""
    verdicts = check(problem, PEERS)
    calls: dict[str, Callable[[], object]] = {}
    for peer in (*PEERS, FLOOR):
        verdict = verdicts.get(peer.name, 0.0)
        if isinstance(verdict, float) and verdict <= TOLERANCE:
            try:
                compute = peer.make(problem).compute
                compute()
            except UnavailableError as reason:
                verdicts[peer.name] = str(reason)
            else:
                calls[peer.name] = compute
    work = {name: machine.operations(calls[name]) for name in (REFERENCE.name, FLOOR.name)}
    calls[PEAK], most = machine.peak(problem.device)
    times = in_turn(calls, rounds=ROUNDS, slot=SLOT_SECONDS, budget=BUDGET_SECONDS)
    at_peak = most / times[PEAK].median
    rows = []
    for name in (*(peer.name for peer in PEERS), FLOOR.name):
        row: Row = {"workload": problem.name, "peer": name}
        if name in times:
            needed = work[FLOOR.name if name == FLOOR.name else REFERENCE.name]
            row |= timed(times[REFERENCE.name], times[name])
            row["% of peak"] = f"{100 * needed / times[name].median / at_peak:.1f}"
            row["error"] = "" if name == FLOOR.name else f"{verdicts[name]:.0e}"
        else:
            verdict = verdicts[name]
            row["error"] = verdict if isinstance(verdict, str) else f"{verdict:.0e}: wrong, so not timed"
        rows.append(row)
    return problem.title, rows


def timed(reference: Times, own: Times) -> Row:
    """Milliseconds, and how many times as fast as the reference, with the lowest and the highest round."""
    ratio = Ratio.between(reference, own)
    return {
        "ms": f"{1000 * own.median:.3g}",
        "times as fast": f"{ratio.median:.2f}",
        "range": f"{ratio.lowest:.2f} to {ratio.highest:.2f}",
    }


def loop() -> tuple[str, list[Row]]:
    """The training loop beside bare meta-steps."""
    found = training.measure(LOOP_RUNS)
    minutes = found.seconds_of(70_000) / 60
    row = {
        "workload": "loop",
        "peer": "`dmaml fit`, sinusoid, 25 tasks, compiled",
        "ratio to bare meta-steps": f"{found.ratio:.2f}",
        "range": f"{min(found.ratios):.2f} to {max(found.ratios):.2f}",
        "minutes for 70,000 meta-iterations": f"{minutes:.2f}",
    }
    return "The training loop beside bare compiled meta-steps", [row]


def start() -> tuple[str, list[Row]]:
    """How long a user waits."""
    rows = [
        {"workload": "start", "peer": name, "seconds": f"{seconds:.2f}"} for name, seconds in startup.measure().items()
    ]
    return "Start, to the end of `--help` or of the first meta-iteration", rows


def peak_memory(device: str) -> tuple[str, list[Row]]:
    """The peak beside learn2learn's."""
    found = memory.measure(device)
    rows = [
        {
            "workload": "memory",
            "peer": name,
            "MiB": f"{size / 2**20:.0f}",
            "times learn2learn's": f"{size / found[REFERENCE.name]:.2f}",
        }
        for name, size in found.items()
    ]
    return f"Peak memory: Conv4, {memory.STEPS} inner steps, {memory.TASKS} tasks", rows


def markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of a table; the workload stands above it."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "workload"]
    cells = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows, with the columns of all workloads."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: Sequence[Row], path: Path) -> None:
    """How many times as fast as learn2learn everyone is: a panel for each meta-gradient."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows if "times as fast" in row))
    if not workloads:
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second

    figure = Figure(figsize=(4.2 * len(workloads) + 2, 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for panel, workload in zip(panels, workloads, strict=True):
        shown = [row for row in rows if row["workload"] == workload and "times as fast" in row]
        colours = ["#1f5fa8" if row["peer"].startswith("dmaml_pl") else "#9a9a9a" for row in shown]
        panel.barh([row["peer"] for row in shown], [float(row["times as fast"]) for row in shown], color=colours)
        panel.set_xscale("log")
        panel.axvline(1, color="#2b2b2b", linewidth=0.8)
        panel.set_title(workload)
        panel.set_xlabel("times as fast as learn2learn")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path)


if __name__ == "__main__":
    main()
