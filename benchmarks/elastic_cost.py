"""What workers that come and go cost where nothing happens: time by the clock and of a core, and bytes.

    python -m benchmarks.elastic_cost --pairs 5

Short trainings of two workers, with the plain strategy and with workers that may come and go, in turn. The time of a
core is that of all processes of the command, lighthouse included, which other load changes little; of several trainings
the median counts. Then two workers on a "machine" each, network namespaces both (see `elastic.py`): what crosses the
cable between them from one merge to the next. Needs the extra `dmaml_pl[elastic]`, and the right to make network
namespaces.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

from benchmarks.elastic import ADDRESSES, CABLE, PORT, Training, kill_all, lighthouse, machines, settings

EVERY = 10  # merges between two looks at the time of a core
PAYLOAD = "model.network.hidden=[300, 300]"


def measure(folder: Path, *, elastic: bool, merges: int, run_length: int) -> tuple[float, float]:
    """Train; returns the seconds of a run with its merge, by the clock (median) and of a core (mean)."""
    training = Training(folder)
    words = settings(merges, workers=2, elastic=elastic, seed=0, run_length=run_length)
    training.start([*words, "--trainer.limit_val_batches=0", "--meta_test=false"], EVERY=str(EVERY)).wait()
    looks = [(line["merge"], line["core"]) for line in training.lines if "core" in line]
    (first, before), (last, after) = looks[0], looks[-1]
    return training.seconds_a_merge(), (after - before) / (last - first)


def compare(folder: Path, pairs: int, merges: int, run_length: int) -> None:
    """Make trainings of both kinds in turn, and print what a run and its merge took."""
    took: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for number in range(pairs):
        for elastic, row in took.items():
            where = folder / f"{run_length}-{number}-{'elastic' if elastic else 'plain'}"
            row.append(measure(where, elastic=elastic, merges=merges, run_length=run_length))
    print(f"a run of {run_length} meta-iterations and its merge, median of {pairs} trainings of two workers:")
    for place, unit in enumerate(("s by the clock", "s of a core, of all processes")):
        plain, others = [row[place] for row in took[False]], [row[place] for row in took[True]]
        more = sorted(b / a - 1 for a, b in zip(plain, others, strict=True))
        spread = f"{statistics.median(more):+.1%}, from {more[0]:+.1%} to {more[-1]:+.1%}"
        print(f"  {unit}: plain {statistics.median(plain):.4f}, elastic {statistics.median(others):.4f} ({spread})")


def count_bytes(folder: Path, merges: int) -> None:
    """Print what crosses the cable between two machines from one merge to the next, both ways."""
    for elastic, kind in itertools.product((False, True), ("float32", "bfloat16")):
        training = Training(folder / f"{'elastic' if elastic else 'plain'}-{kind}")
        words = [*settings(merges, workers=1, elastic=elastic, seed=0, run_length=100), "--trainer.num_nodes=2"]
        words += [f"--trainer.strategy.transfer_dtype={kind}", "--trainer.limit_val_batches=0", "--meta_test=false"]
        words += [f"--{PAYLOAD}", "--trainer.strategy.moments=keep", "--trainer.enable_checkpointing=false"]
        with machines(), lighthouse() as address:
            met = (
                {"TORCHFT_LIGHTHOUSE": address}
                if elastic
                else {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT + 1)}
            )
            commands = [
                training.start(
                    words, machine, NODE_RANK=str(machine), GLOO_SOCKET_IFNAME=CABLE, OMP_NUM_THREADS="1", **met
                )
                for machine in (0, 1)
            ]
            try:
                for command in commands:
                    command.wait()
            finally:
                for command in commands:
                    kill_all(command)
        seen = [line["bytes"] for line in training.lines if line["rank"] == 0]
        crossed = statistics.median(b - a for a, b in itertools.pairwise(seen))
        ((payload,),) = training.query("SELECT value FROM latest_metrics WHERE key = 'merge/bytes'")
        name = "elastic" if elastic else "plain"
        print(f"{name}, {kind}: {crossed:,.0f} bytes from merge to merge, of a payload of {payload:,.0f}", flush=True)


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=5, help="trainings of each kind")
    parser.add_argument("--merges", type=int, default=40, help="of each training")
    parser.add_argument("--run-length", type=int, nargs="*", default=[100, 1000], help="meta-iterations of a run")
    parser.add_argument("--no-bytes", action="store_true", help="leave the bytes between two machines out")
    parser.add_argument("--folder", type=Path, default=Path("elastic-benchmark"))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if not arguments.no_bytes:
        count_bytes(folder, 12)
    for run_length in arguments.run_length:
        compare(folder, arguments.pairs, arguments.merges, run_length)


if __name__ == "__main__":
    main()
