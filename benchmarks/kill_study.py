"""Kills a study of many trainings at random moments, starts it again until it ends, and counts what was made twice.

    python benchmarks/kill_study.py --trainings 24 --kills 12

Every kill is a SIGKILL of the whole process group: the study, its server, and the trainings under way; of three kills
one comes at a random moment after the start, and two after the first training has begun. In the end each training must
have finished exactly once, and no more may have been begun in vain than were under way at the kills.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mlflow import MlflowClient

TINY = """\
data: {init_args: {meta_batch: 2, val_tasks: 4}}
model: {init_args: {compile: false, network: {init_args: {hidden: [4]}}}}
trainer: {max_steps: 60, strategy: {init_args: {run_length: 2}}}
"""


def main() -> None:
    """Measure, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=24)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--longest", type=float, default=30.0, help="seconds before a kill, at most (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments = random.Random(given.seed)  # noqa: S311 - no secret
    with tempfile.TemporaryDirectory(prefix="dmaml-kill-") as name:
        folder = Path(name)
        (folder / "tiny.yaml").write_text(TINY)
        words = ["study", "workers", "--config", "sinusoid", "--config", "tiny.yaml", "--workers", "1"]
        words += ["--seeds", str(given.trainings), "--jobs", str(given.jobs)]
        killed = 0
        while True:
            seconds = moments.uniform(0, given.longest) if killed < given.kills else None
            if (code := _study(words, folder, seconds, begun=killed % 3 > 0)) == 0:
                break
            if code != -signal.SIGKILL:
                sys.exit(f"The study ended with exit code {code}: {(folder / 'said').read_text()[-2000:]}")
            killed += 1
            print(f"kill {killed}: {_counts(folder)[0]} trainings have finished", flush=True)
        finished, begun, twice = _counts(folder)
    print(
        f"{killed} kills, {finished} of {given.trainings} trainings finished, {twice} of them more than once; "
        f"{begun - finished} were begun in vain, where {killed * given.jobs} may have been under way at kills."
    )
    if finished != given.trainings or twice or begun - finished > killed * given.jobs:
        sys.exit("Some were made again, or are missing.")


def _study(words: list[str], folder: Path, seconds: float | None, *, begun: bool) -> int:
    """Begin the study, and kill all of it some seconds after its start, or after that of its first training."""
    start = time.time()
    with (folder / "said").open("wb") as said:
        study = subprocess.Popen(  # noqa: S603 - our own words
            [sys.executable, "-m", "dmaml_pl", *words], cwd=folder, stdout=said, stderr=said, start_new_session=True
        )
    logs = folder / "mlruns" / "studies" / "workers-sinusoid" / "logs"
    while begun and study.poll() is None and not any(log.stat().st_mtime > start for log in logs.glob("*")):
        time.sleep(0.1)
    try:
        return study.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(study.pid, signal.SIGKILL)
        code = study.wait()
        time.sleep(0.5)  # the others of its group take as long to be gone
        return code


def _counts(folder: Path) -> tuple[int, int, int]:
    """How many trainings have finished, how many were begun, and how many have finished more than once."""
    file = folder / "mlruns" / "mlflow.db"
    if not file.exists():
        return 0, 0, 0
    client = MlflowClient(f"sqlite:///{file}")
    wanted = "tags.`dmaml.study.role` = 'training'"
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, wanted, max_results=5000)
    times = Counter(run.data.tags["dmaml.study.digest"] for run in runs if run.info.status == "FINISHED")
    return len(times), len(runs), sum(count > 1 for count in times.values())


if __name__ == "__main__":
    main()
