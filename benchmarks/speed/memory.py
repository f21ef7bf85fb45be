"""The peak memory of a meta-gradient, each in a process of its own.

python -m benchmarks.speed.memory learn2learn cpu
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import psutil
import torch

from benchmarks.speed.alone import alone
from benchmarks.speed.peers import REFERENCE, Peer, our_engine
from benchmarks.speed.problems import Problem, conv

MEASURED = (
    REFERENCE,
    *(
        Peer(
            f"dmaml_pl, {name}{', task_chunk 1' if chunk else ''}",
            partial(our_engine, name=name, compiled=False, task_chunk=chunk),
            ours=True,
        )
        for name in ("auto", "vectorized")
        for chunk in (1, None)
    ),
)
"""learn2learn has one task in memory at a time; ours as many, and as many as they take by default."""

TASKS, STEPS = 32, 5


def problem(device: str) -> Problem:
    """What is measured: so much that it matters."""
    return Problem(**(vars(conv(steps=STEPS, tasks=TASKS)) | {"device": device}))


def measure(device: str) -> dict[str, float]:
    """Bytes that a meta-gradient needs at its peak beyond what there was before, by peer."""
    return {known.name: float(alone("benchmarks.speed.memory", known.name, device)) for known in MEASURED}


def main(peer: str, device: str) -> None:
    """Print the bytes of one peer."""
    (make,) = (known.make for known in MEASURED if known.name == peer)
    measured = make(problem(device))
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        measured.compute()
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = psutil.Process().memory_info().rss
    measured.compute()
    print(_peak() - before)


def _peak() -> int:
    """The most that this process has had in memory, in bytes."""
    # getrusage's figure is inherited: it begins with the peak of the process that has started this one.
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("Peak memory on CPUs is measured on Linux only.")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
