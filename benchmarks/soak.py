"""A soak: hundreds of merges of four workers under torchrun, some of which are killed at random moments.

    python benchmarks/soak.py --merges 500 --seed 0

Two trainings on sinusoid regression under `torchrun --max-restarts`, one undisturbed. In the other SIGKILL hits any
worker at any moment, and the training starts again from its last merge. It must lose no merged run: every run is logged
(one that was merged and logged, but not yet kept, is made again and logged again), and the weights at the end are, to
the bit, those of the undisturbed training. `benchmarks/elastic.py` does the like to workers that come and go.

In both the memory of the workers is watched: over the longest stretch that nobody disturbed it must not grow.
Exits non-zero if a promise was broken; prints a table, and writes it to `--output`.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from mlflow import MlflowClient

ROOT = Path(__file__).parents[1]
WORKERS = 4
RUN_LENGTH = 5
POLL_SECONDS = 0.1
GROWTH_LIMIT = 0.02
"""Of a worker's memory, in a stretch: a leak of a payload at each merge would be far above."""


@dataclass
class Watch:
    """What was seen of a training from outside.

    Attributes:
        kills: merges in the last checkpoint when a worker was killed.
        memory: seconds, process and bytes of resident memory.
        seconds: wall time of the training.
        code: its exit code.
    """

    kills: list[int] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: float = 0.0
    code: int = -1


def main() -> int:
    """Run both trainings; returns the exit code."""
    parser = argparse.ArgumentParser(description="Merges under random kills.")
    parser.add_argument("--merges", type=int, default=500, help="of each training (default: 500)")
    parser.add_argument("--kills", type=int, default=8, help="in the training with restarts (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims (default: 0)")
    parser.add_argument("--output", type=Path, help="Markdown file for the result")
    given = parser.parse_args()
    chance = random.Random(given.seed)  # noqa: S311 - no secrets here
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        undisturbed = train(folder / "undisturbed", given.merges, restarts=given.kills, kills=0, chance=chance)
        disturbed = train(folder / "restart", given.merges, restarts=given.kills, kills=given.kills, chance=chance)
        same = same_weights(folder / "undisturbed", folder / "restart")
        rows = [
            ("undisturbed", undisturbed, account(folder / "undisturbed"), "reference"),
            ("restart", disturbed, account(folder / "restart"), "yes" if same else "NO"),
        ]
    lines = [
        "| training | merges logged | logged again | MLflow status | killed after merge | s | same bits | growth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    broken = [] if same else ["the weights differ from those of the undisturbed training"]
    for name, watch, (merges, again, status), bits in rows:
        growth = growth_of(watch)
        lines.append(
            f"| {name} | {merges} | {again} | {status} | {', '.join(map(str, watch.kills)) or '-'} | "
            f"{watch.seconds:.0f} | {bits} | {growth:+.2%} |"
        )
        if merges != given.merges or again > len(watch.kills):
            broken.append(f"{name}: not every merge is logged, or more are logged again than workers were killed")
        if watch.code or status != "FINISHED":
            broken.append(f"{name}: ended with exit code {watch.code} and status {status}")
        if growth > GROWTH_LIMIT:
            broken.append(f"{name}: memory grew by {growth:.1%}")
    lines += ["", f"Seed {given.seed}. " + ("Broken: " + "; ".join(broken) if broken else "Every promise held.")]
    print("\n".join(lines))
    if given.output is not None:
        given.output.write_text("\n".join(lines) + "\n")
    return 1 if broken else 0


def train(folder: Path, merges: int, *, restarts: int, kills: int, chance: random.Random) -> Watch:
    """One training."""
    folder.mkdir()
    settings = [
        "--config",
        str(ROOT / "configs" / "sinusoid.yaml"),
        f"--trainer.strategy.run_length={RUN_LENGTH}",
        f"--trainer.max_steps={RUN_LENGTH * merges}",
        "--trainer.val_check_interval=25",
        "--trainer.log_every_n_steps=5",
        "--data.meta_batch=2",
        "--data.val_tasks=20",
        "--checkpoint.every_n_runs=1",
        "--meta_test=false",
        f"--trainer.devices={WORKERS}",
    ]
    launcher = [
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={WORKERS}",
        f"--max-restarts={restarts}",
    ]
    command = [sys.executable, "-m", *launcher, "-m", "dmaml_pl", "fit", *settings]
    watch, began = Watch(), time.monotonic()
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "60"}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)  # noqa: S603 - ours
        quiet_until, seen = 0, 0.0
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            workers = workers_of(process.pid)
            watch.memory += [(time.monotonic(), one.pid, size) for one in workers if (size := resident(one))]
            if len(watch.kills) >= kills or time.monotonic() < seen:
                continue
            done = merges_done(folder)
            # The last third is left alone, so that there is a long stretch in which to watch the memory.
            if done > quiet_until and done < 0.66 * merges and workers:
                victim = chance.choice(workers)
                victim.kill()
                watch.kills.append(done)
                quiet_until = done + chance.randint(1, max(int(1.1 * merges / (kills + 1)) - 1, 1)) if kills else 0
                seen = time.monotonic() + chance.random()
        watch.code = process.wait()
    watch.seconds = time.monotonic() - began
    if watch.code:
        print((folder / "log").read_text()[-2000:], file=sys.stderr)
    return watch


def workers_of(launcher: int) -> list[psutil.Process]:
    """The worker processes that a launcher has started and that are alive."""
    try:
        children = psutil.Process(launcher).children()
        alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []
    return sorted(alive, key=lambda child: child.pid)[:WORKERS]


def resident(process: psutil.Process) -> int:
    """Resident memory of a process in bytes; 0 if it is gone."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def merges_done(folder: Path) -> int:
    """Merges in the last checkpoint; 0 if there is none yet."""
    (file,) = [*folder.glob("mlruns/checkpoints/*/*/checkpoints/last.ckpt"), None][:1]
    return 0 if file is None else int(torch.load(file, weights_only=True)["runs"]["done"])


def same_weights(first: Path, second: Path) -> bool:
    """Whether two trainings have ended with the same bits."""
    one, other = (
        torch.load(next(folder.glob("mlruns/checkpoints/*/*/checkpoints/last.ckpt")), weights_only=True)["state_dict"]
        for folder in (first, second)
    )
    return bool(one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one))


def account(folder: Path) -> tuple[int, int, str]:
    """Runs that MLflow tells of, how many it tells of again, and the status."""
    client = MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "sinusoid"]
    (run,) = client.search_runs([experiment.experiment_id])
    history: list[Any] = client.get_metric_history(run.info.run_id, "train/run")
    told = [int(point.value) for point in history]
    return len(set(told)), len(told) - len(set(told)), str(run.info.status)


def growth_of(watch: Watch) -> float:
    """The largest growth of a worker's memory over the last quarter of its life; before, libraries settle.

    From the median of the quarter's first tenth to the median of its last: a single sample says little, as the memory
    of a process can jump by a tenth while the interpreter shuts down, after the last line of Python has run. Workers
    that lived less than half as long as the longest-lived tell nothing.
    """
    lives: dict[int, list[tuple[float, int]]] = {}
    for moment, process, size in watch.memory:
        lives.setdefault(process, []).append((moment, size))
    lengths = {process: life[-1][0] - life[0][0] for process, life in lives.items()}
    growths = []
    for process, life in lives.items():
        if lengths[process] < max(lengths.values()) / 2:
            continue
        last = [size for _, size in life[3 * len(life) // 4 :]]
        tenth = max(len(last) // 10, 1)
        first, final = statistics.median(last[:tenth]), statistics.median(last[-tenth:])
        growths.append((final - first) / first)
    return max(growths)


if __name__ == "__main__":
    sys.exit(main())
