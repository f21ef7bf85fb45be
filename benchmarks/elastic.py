"""Workers that come and go under a seeded schedule of faults, on two "machines" that are network namespaces.

    python benchmarks/elastic.py --merges 500 --faults 20

Four workers make trainings of so many merges: some with the plain strategy, for the spread of their final metric; one
with workers that may come and go, to which nothing happens; and one in which workers are killed (the first time worker
0), a machine is cut off, killed and started again, or leaves and joins later. Prints what was lost, logged twice, or
differed, and what each fault cost. Needs the extra `dmaml_pl[elastic]`, and the right to make network namespaces.
`elastic_cost.py` has what it costs without faults.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
ADDRESSES = ("10.214.77.1", "10.214.77.2")
CABLE, PORT = "dmaml-elastic", 29510
CUT_S = 8.0
JOIN_AFTER = 10  # merges, of a machine that has left
KINDS = ("kill", "cut", "restart", "leave and join")
END_S = 600.0  # in which a machine that has come back when the others ended makes the meta-test again

PROBE = '''
"""Writes down who holds which weights after each merge."""

import hashlib, json, os, time

import psutil
import pytorch_lightning as pl
import torch


def seconds_of_a_core():
    """Of all processes of this command."""
    total = 0.0
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == os.getsid(0):
                total += sum(process.cpu_times()[:2])
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return total


class Probe(pl.Callback):
    def on_run_end(self, trainer, module, report):
        weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
        line = {
            "merge": module.runs_done,
            "rank": trainer.global_rank,
            "size": trainer.world_size,
            "pid": os.getpid(),
            "machine": os.environ.get("MACHINE", "0"),
            "time": time.time(),
            "digest": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
        }
        line["bytes"] = sum(psutil.net_io_counters(pernic=True).get("CABLE", (0, 0))[:2])
        if trainer.global_rank == 0 and module.runs_done % int(os.environ.get("EVERY", "1000000")) == 0:
            line["core"] = seconds_of_a_core()
        with open("merges.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")
        time.sleep(float(os.environ.get("PACE", "0")))
'''


def settings(merges: int, *, workers: int, elastic: bool, seed: int, run_length: int = 5) -> list[str]:
    """The words of a training."""
    given: dict[str, Any] = {
        "seed_everything": seed,
        "trainer.devices": workers,
        "trainer.strategy.run_length": run_length,
        "trainer.strategy.elastic": str(elastic).lower(),
        "trainer.strategy.moments": "average",
        "trainer.strategy.timeout": 300,
        "trainer.max_steps": run_length * merges,
        "trainer.val_check_interval": 25,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": json.dumps([{"class_path": "elastic_probe.Probe"}]),
        "model.compile": "false",
        "data.val_tasks": 100,
        "data.test_tasks": 600,
        "report.baseline_budget": 0,
    }
    config = str(ROOT / "configs" / "sinusoid.yaml")
    return ["-m", "dmaml_pl", "fit", "--config", config, *(f"--{name}={value}" for name, value in given.items())]


class Training:
    """A training and what it leaves in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "elastic_probe.py").write_text(PROBE.replace("CABLE", CABLE))

    def start(self, words: list[str], machine: int | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command, on a machine of its own if one is given."""
        where = [] if machine is None else ["ip", "netns", "exec", name_of(machine)]
        with (self.folder / f"log-{machine}").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - the words are ours
                [*where, sys.executable, *words],
                cwd=self.folder,
                env=os.environ | {"MACHINE": str(machine)} | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What the probes have written, whole lines only."""
        file = self.folder / "merges.jsonl"
        whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def moments(self) -> dict[int, float]:
        """When each merge was first seen."""
        first: dict[int, float] = {}
        for line in self.lines:
            first[line["merge"]] = min(line["time"], first.get(line["merge"], line["time"]))
        return dict(sorted(first.items()))

    def seconds_a_merge(self) -> float:
        """Median time from a merge to the next."""
        times = list(self.moments.values())
        return statistics.median(b - a for a, b in itertools.pairwise(times))

    def query(self, text: str) -> list[Any]:
        """Ask the tracking store."""
        with sqlite3.connect(f"file:{self.folder}/mlruns/mlflow.db?mode=ro", uri=True) as store:
            return store.execute(text).fetchall()

    def logged(self) -> tuple[int, int, list[Any], float]:
        """Runs in the store, values of a step that are there more than once, MLflow runs, and the final metric."""
        ((runs,),) = self.query("SELECT count(DISTINCT step) FROM metrics WHERE key = 'train/run'")
        (((more,),),) = (
            self.query(
                "SELECT coalesce(sum(n - 1), 0) FROM (SELECT count(*) AS n FROM metrics WHERE key NOT LIKE 'system/%' "
                "GROUP BY run_uuid, key, step)"
            ),
        )
        ((metric,),) = self.query("SELECT value FROM latest_metrics WHERE key = 'test/loss'")
        return runs, more, self.query("SELECT status FROM runs"), metric

    def weights(self) -> dict[str, Any]:
        """Of the last checkpoint."""
        (file,) = self.folder.glob("mlruns/checkpoints/sinusoid/*/checkpoints/last.ckpt")
        weights: dict[str, Any] = torch.load(file, weights_only=True)["state_dict"]
        return weights


def name_of(machine: int) -> str:
    """Of a machine's namespace."""
    return f"dmaml-elastic-{os.getpid()}-{machine}"


def ip(*words: str) -> None:
    """Change the network."""
    subprocess.run(["ip", *words], check=True)  # noqa: S603, S607 - the system's own


@contextmanager
def machines() -> Iterator[None]:
    """Two namespaces that reach each other, and nothing else."""
    names = [name_of(0), name_of(1)]
    try:
        for name in names:
            ip("netns", "add", name)
        _join(*names)
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)  # noqa: S603, S607 - the system's own


def _join(first: str, second: str) -> None:
    ip("-n", first, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", second)
    for name, address in zip((first, second), ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
        ip("-n", name, "link", "set", CABLE, "up")
        ip("-n", name, "link", "set", "lo", "up")


@contextmanager
def lighthouse() -> Iterator[str]:
    """One on the first machine; yields its address."""
    binary = str(Path(sys.executable).with_name("torchft_lighthouse"))
    options = ["--bind", f"[::]:{PORT}", "--min_replicas", "1", "--join_timeout_ms", "300000"]
    process = subprocess.Popen(  # noqa: S603 - ours
        ["ip", "netns", "exec", name_of(0), binary, *options],  # noqa: S607 - the system's own
        env=os.environ | {"RUST_LOG": "error"},
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://{ADDRESSES[0]}:{PORT}"
    finally:
        process.kill()


class Chaos:
    """A training of two machines, and the faults that it is to survive."""

    def __init__(self, training: Training, lighthouse: str, merges: int, faults: int, seed: int, pace: float) -> None:
        self.lighthouse, self.pace = lighthouse, pace
        self.training, self.merges = training, merges
        self.random = random.Random(seed)  # noqa: S311 - a schedule
        places = sorted(
            self.random.sample(range(max(merges // 25, 2), min(int(merges * 0.85), merges - 2 * JOIN_AFTER)), faults)
        )
        kinds = [KINDS[number % len(KINDS)] for number in range(faults)]
        self.random.shuffle(kinds)
        if "kill" in kinds:  # of worker 0, first
            kinds.remove("kill")
            kinds.insert(0, "kill")
        self.schedule = list(zip(places, kinds, strict=True))
        self.commands: dict[int, subprocess.Popen[bytes]] = {}
        self.comes_back: dict[int, int] = {}
        self.done: list[tuple[str, int, float]] = []

    def start(self, machine: int) -> None:
        """Start the command on a machine, or start it again."""
        words = [*settings(self.merges, workers=2, elastic=True, seed=0), "--trainer.num_nodes=2"]
        words += ["--checkpoint.dirpath=kept", "--ckpt_path=auto"]
        environment = {"TORCHFT_LIGHTHOUSE": self.lighthouse, "PACE": str(self.pace)}
        self.commands[machine] = self.training.start(words, machine, **environment)

    def run(self) -> int:
        """Make the training, and what happens to it; returns the exit code of the last command."""
        try:
            for machine in (0, 1):
                self.start(machine)
            while not any(command.poll() == 0 for command in self.commands.values()):
                time.sleep(0.2)
                self._look()
            for command in self.commands.values():
                command.wait(END_S)
            return min(command.returncode for command in self.commands.values())
        finally:
            for command in self.commands.values():
                kill_all(command)

    def _look(self) -> None:
        lines = self.training.lines[-16:]
        merge = max((line["merge"] for line in lines), default=0)
        for machine in [machine for machine, when in self.comes_back.items() if merge >= when]:
            del self.comes_back[machine]
            self.start(machine)
        if self.schedule and merge >= self.schedule[0][0]:
            since = max(merge - 1, self.done[-1][1] + 2 if self.done else 0)
            if len({line["machine"] for line in lines if line["merge"] >= since}) == 2:  # else it would end all
                self._hurt(self.schedule.pop(0)[1], lines, merge)

    def _hurt(self, kind: str, lines: list[dict[str, Any]], merge: int) -> None:
        machine = self.random.randrange(2)
        worker = self.random.choice(lines)["pid"]
        if not self.done:
            worker = next(line["pid"] for line in reversed(lines) if line["rank"] == 0)
        self.done.append((kind, merge, time.time()))
        print(f"  merge {merge}: {kind}", flush=True)
        if kind == "kill":
            if psutil.pid_exists(worker):
                os.kill(worker, signal.SIGKILL)
        elif kind == "cut":
            ip("-n", name_of(1), "link", "set", CABLE, "down")
            time.sleep(CUT_S)
            ip("-n", name_of(1), "link", "set", CABLE, "up")
        elif kind == "restart":
            kill_all(self.commands[machine])
            self.start(machine)
        else:
            self.commands[machine].send_signal(signal.SIGTERM)
            self.commands[machine].wait(60)
            self.comes_back[machine] = merge + JOIN_AFTER

    def cost(self) -> dict[str, list[float]]:
        """Seconds that each fault has cost, by kind: the longest time between two merges after it, less the usual."""
        usual, times = self.training.seconds_a_merge(), list(self.training.moments.values())
        ends = [when for _, _, when in self.done[1:]] + [float("inf")][: len(self.done)]
        cost: dict[str, list[float]] = defaultdict(list)
        for (kind, _, when), end in zip(self.done, ends, strict=True):
            gaps = [b - a for a, b in itertools.pairwise(times) if b > when and a < end]
            cost[kind].append(max(gaps, default=usual) - usual)
        return cost


def kill_all(command: subprocess.Popen[bytes]) -> None:
    """End a command and all that it has started, as when a machine loses its power."""
    try:
        processes = [*psutil.Process(command.pid).children(recursive=True), psutil.Process(command.pid)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    command.wait()


def differing(training: Training) -> int:
    """Merges after which not all members held the same weights."""
    digests = defaultdict(set)
    for line in training.lines:
        digests[line["merge"]].add(line["digest"])
    return sum(len(found) > 1 for found in digests.values())


def main() -> int:
    """Make the trainings, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--merges", type=int, default=500)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--undisturbed", type=int, default=3, help="trainings of the plain strategy")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--pace", type=float, default=1.5, help="seconds that each run takes longer, under faults")
    parser.add_argument("--folder", type=Path, default=Path("elastic-benchmark"))
    arguments = parser.parse_args()
    folder, merges = arguments.folder.absolute(), arguments.merges
    plain = []
    for seed in range(arguments.undisturbed):
        training = Training(folder / f"plain-{seed}")
        training.start(settings(merges, workers=4, elastic=False, seed=seed)).wait()
        plain.append(training)
        print(f"plain, seed {seed}: {training.seconds_a_merge():.3f} s a merge, final loss {training.logged()[3]:.4f}")
    if plain:
        quiet = Training(folder / "quiet")
        quiet.start(settings(merges, workers=4, elastic=True, seed=0)).wait()
        same = all(torch.equal(value, plain[0].weights()[name]) for name, value in quiet.weights().items())
        print(f"elastic, no faults: {quiet.seconds_a_merge():.3f} s a merge, same bits: {same}", flush=True)
    return disturb(arguments) if arguments.faults else 0


def disturb(arguments: argparse.Namespace) -> int:
    """Make the training with faults, and print what came of it; returns 1 where a promise was broken."""
    folder, merges = arguments.folder.absolute(), arguments.merges
    with machines(), lighthouse() as address:
        chaos = Chaos(Training(folder / "faults"), address, merges, arguments.faults, arguments.seed, arguments.pace)
        print(f"elastic, {arguments.faults} faults on two machines:", flush=True)
        code = chaos.run()
    runs, more, states, metric = chaos.training.logged()
    print(f"exit code {code}; MLflow runs and their states: {states}; final loss {metric:.4f}")
    print(f"faults made: {len(chaos.done)}; merged runs lost: {merges - runs}; values logged twice: {more}")
    print(f"merges after which members differed: {differing(chaos.training)}")
    for kind, seconds in chaos.cost().items():
        print(f"{kind}: {len(seconds)} times, {statistics.mean(seconds):.1f} s on average, at most {max(seconds):.1f}")
    return int(code != 0 or runs != merges or more > 0 or differing(chaos.training) > 0)


if __name__ == "__main__":
    sys.exit(main())
