"""`make benchmark`, or a part of it: `python -m benchmarks.speed --only sinusoid-1 conv4-1 auto loop sampling start`.

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

from benchmarks.speed import choice, frozen, machine, memory, rl, sampling, startup, training
from benchmarks.speed.agreement import TOLERANCE, check
from benchmarks.speed.peers import FLOOR, PEERS, REFERENCE, Peer, UnavailableError
from benchmarks.speed.problems import Problem, conv, mini_imagenet, omniglot, sinusoid
from benchmarks.speed.timing import Ratio, Times, clock, in_turn
from dmaml_pl.cli.quiet import quieten

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "sinusoid-1": lambda: sinusoid(1),
    "sinusoid-5": lambda: sinusoid(5),
    "conv4-1": lambda: conv(1),
    "conv4-5": lambda: conv(5),
    "omniglot-5": lambda: omniglot(ways=5, tasks=32, steps=1),
    "omniglot-20": lambda: omniglot(ways=20, tasks=16, steps=5),
    "mini-imagenet": mini_imagenet,
}
OTHERS = ("auto", "frozen", "loop", "sampling", "rl", "start", "memory")

ROUNDS, SLOT_SECONDS, BUDGET_SECONDS = 15, 0.1, 100.0
LOOP_RUNS = 100
"""Two of them are followed by a validation."""
PEAK = "peak: product of large matrices"

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables as they come, and write `table.md`, `table.csv` and `ratios.png`."""
    known = (*PROBLEMS, *OTHERS)
    parser = argparse.ArgumentParser("make benchmark", description="Speed, beside other libraries, in the same run.")
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="PART", help=", ".join(known))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--omniglot", type=Path, metavar="FOLDER", help="sample tasks of Omniglot, too, from data.root")
    parser.add_argument(
        "--peers", nargs="+", metavar="WORD", help="beside learn2learn, those with a word in their names"
    )
    given = parser.parse_args(arguments)
    chosen = [peer for peer in PEERS if given.peers is None or any(word in peer.name for word in given.peers)]
    peers = [REFERENCE, *(peer for peer in chosen if peer is not REFERENCE)]
    quieten()
    given.output.mkdir(parents=True, exist_ok=True)
    lines = [machine.description(given.device), ""]
    print(lines[0], flush=True)
    others: dict[str, Callable[[], tuple[str, list[Row]]]] = {
        "auto": auto,
        "frozen": frozen_bodies,
        "loop": loop,
        "sampling": partial(samplers, given.omniglot),
        "rl": reinforcement,
        "start": start,
        "memory": partial(peak_memory, given.device),
    }
    rows: list[Row] = []
    for part in given.only:
        if part in PROBLEMS:
            title, found = meta_gradients(Problem(**(vars(PROBLEMS[part]()) | {"device": given.device})), peers)
        else:
            title, found = others[part]()
        rows += found
        lines += ["", f"## {title}", "", *markdown(found)]
        print("\n".join(["", f"## {title}", "", *markdown(found)]), flush=True)
        (given.output / "table.md").write_text("\n".join([*lines, ""]))
        write_csv(given.output / "table.csv", rows)
    plot(rows, given.output / "ratios.png")
    print(f"\nWritten to {given.output}")


def meta_gradients(problem: Problem, peers: Sequence[Peer]) -> tuple[str, list[Row]]:
    """One meta-gradient by each peer, the reference first, the floor, and the machine's peak."""
    verdicts = check(problem, peers)
    calls: dict[str, Callable[[], object]] = {}
    for peer in (*peers, FLOOR):
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
    times = in_turn(calls, rounds=ROUNDS, slot=SLOT_SECONDS, budget=BUDGET_SECONDS, clock=clock())
    at_peak = most / times[PEAK].median
    rows = []
    for name in (*(peer.name for peer in peers), FLOOR.name):
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


def auto() -> tuple[str, list[Row]]:
    """What `auto` takes beside every engine; each case is shown as it comes."""
    rows: list[Row] = []
    for found in choice.measure():
        row: Row = {"workload": "auto", "meta-gradient": found.title}
        for name in (*choice.ENGINES, choice.COMPILED):
            row[f"{name}, ms"] = f"{1000 * found.seconds[name]:.3g}" if name in found.seconds else ""
        row |= {"short": found.short, "short / best": f"{found.short_ratio:.2f}"}
        rows.append(row | {"long": found.long, "long / best": f"{found.long_ratio:.2f}"})
        print(" | ".join(str(cell) for cell in rows[-1].values()), flush=True)
    title = "What `model.engine: auto` takes for a training too short to compile, and for 60,000 meta-iterations"
    return f"{title}; beside the fastest engine that compiles nothing, and the fastest of all", rows


def frozen_bodies() -> tuple[str, list[Row]]:
    """A meta-gradient of the head alone, beside its parts."""
    rows: list[Row] = []
    for body, found in frozen.measure().items():
        ratio = found.ratio
        for part, times in found.times.items():
            row: Row = {"workload": "frozen", "body": body, "peer": part, "ms": f"{1000 * times.median:.3g}"}
            if part == frozen.OURS:
                row["times body and head"] = f"{ratio.median:.2f}"
                row["range"] = f"{ratio.lowest:.2f} to {ratio.highest:.2f}"
            rows.append(row)
    title = f"A frozen body, {frozen.TASKS} tasks, {frozen.WAYS}-way {frozen.SHOTS}-shot, {frozen.QUERIES} queries, "
    return f"{title}{frozen.SIZE}x{frozen.SIZE}, {frozen.STEPS} inner steps of the head: CPU time of one thread", rows


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


def samplers(omniglot: Path | None) -> tuple[str, list[Row]]:
    """Meta-batches of image tasks, by everyone's own means."""
    rows: list[Row] = []
    for batch, turns in sampling.measure(omniglot).items():
        row, one = turns["in a row"], turns["one"]
        rows += [
            {
                "workload": "sampling",
                "meta-batch": batch,
                "peer": peer,
                "ms": f"{1000 * row[peer]:.3g}",
                "times as fast": f"{row[sampling.REFERENCE] / row[peer]:.2f}",
                "ms, one at a time": f"{1000 * one[peer]:.3g}",
                "times as fast, one at a time": f"{one[sampling.REFERENCE] / one[peer]:.2f}",
            }
            for peer in row
        ]
    return "Sampling a meta-batch of images, 5-way 1-shot, 15 queries: CPU time of one thread, best turn", rows


def reinforcement() -> tuple[str, list[Row]]:
    """Sampling and meta-iterations of policies, beside learn2learn's and beside the environments alone."""
    rows: list[Row] = []

    def add(found: rl.Found, what: str, beside: str, bar: str, own: str, reference: str, *, fast: bool) -> None:
        """A row; the ratio is how many times as fast, or else how many times as long."""
        row: Row = {"workload": "rl", "what": what}
        if found.skipped:
            rows.append(row | {"beside": found.skipped})
            return
        ratio = found.ratio(reference, own) if fast else found.ratio(own, reference)
        row |= {"CPU s": f"{found.median(own):.3g}"}
        if own == "sampling":
            row["µs an env step"] = f"{found.microseconds(own):.2f}"
        row |= {
            "beside": beside,
            "its CPU s": f"{found.median(reference):.3g}",
            "ratio": f"{ratio.median:.3g} times {'as fast' if fast else 'as long'}",
            "range": f"{ratio.lowest:.3g} to {ratio.highest:.3g}",
            "bar": bar,
        }
        if own in found.tries:
            row["line search"] = ", ".join(str(tries) for tries in found.tries[own])
        rows.append(row)

    found = rl.measure("navigation")
    once = f"learn2learn, {rl.REFERENCE_TASKS} task measured, times {rl.TASKS // rl.REFERENCE_TASKS}"
    title = "2D navigation, "
    add(found, f"{title}sampling", once, "2.5 µs, 100", "sampling", "reference sampling", fast=True)
    for kind, name, bar in (
        ("default", "meta-iteration", "20"),
        ("first order", "meta-iteration, first order", ""),
        ("exact", "meta-iteration, exact metric on every step", "8"),
    ):
        add(found, title + name, f"{once}, 1 try", bar, kind, "reference", fast=True)
    found = rl.measure("cheetah")
    title = f"HalfCheetahDirection, {rl.CHEETAH_TASKS} tasks, "
    add(found, f"{title}sampling", "the physics alone", "1.4", "sampling", "floor", fast=False)
    add(found, f"{title}meta-iteration", "the physics alone", "1.7", "default", "floor", fast=False)
    found = rl.measure("own")
    count = rl.OWN_TASKS * rl.ROLLOUTS
    add(found, f"a gymnasium.Env, {count} of them, sampling", "its steps alone", "", "sampling", "floor", fast=False)
    if not found.skipped:
        above = found.microseconds("sampling") - found.microseconds("floor")
        rows[-1]["bar"] = f"30 µs above it; found: {above:.1f}"
    settings = f"{rl.TASKS} tasks, {rl.ROLLOUTS} rollouts, {rl.HORIZON} steps, MLP {list(rl.HIDDEN)}, 1 inner step"
    return f"Reinforcement learning: MAML with a trust region, {settings}: CPU time of one thread", rows


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


def plot(rows: Sequence[Row], path: Path) -> None:
    """How many times as fast as learn2learn everyone is: a panel for each meta-gradient and each kind of meta-batch."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if "times as fast" in row:
            panels.setdefault(str(row.get("meta-batch") or row["workload"]), []).append(row)
    if not panels:
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(6.5 * across, 0.3 + 3.4 * down), dpi=110, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, (title, shown) in zip(axes, panels.items(), strict=False):
        names = [row["peer"].replace("`", "") for row in shown]
        colours = ["#1f5fa8" if name.startswith("dmaml_pl") else "#9a9a9a" for name in names]
        axis.barh(names, [float(row["times as fast"]) for row in shown], color=colours)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.axvline(1, color="#2b2b2b", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel("times as fast as learn2learn")
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
