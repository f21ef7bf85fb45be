"""Spare processes: workers that import PyTorch while this process does, because the import takes seconds.

The front door starts them from a guess at the number of workers, before anything heavy is loaded here; the strategy's
launcher turns them into workers when it knows. A spare that is not needed ends by itself, so that a wrong guess costs
time only.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("fit", "validate", "test", "predict")
LAUNCHED = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "WORLD_SIZE")
"""Environment variables of a process that somebody else has started as a worker."""

_spares: dict[int, subprocess.Popen[bytes]] = {}
_outputs: dict[int, int] = {}
"""In a spare: the real standard output and error, by the numbers that they take again when it becomes a worker."""


def guess_workers(words: list[str]) -> int:
    """The number of workers that a command line seems to ask for, read without parsing it properly; 1 if unclear."""
    if not words or words[0] not in COMMANDS or {"-h", "--help", "--print_config"} & set(words):
        return 1
    guess = 1
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        value = value or following
        if name == "--trainer.devices" and value.isdigit():
            return int(value)
        if name in ("-c", "--config") and Path(value).is_file():
            found = re.findall(r"^\s*devices:\s*(\d+)\b", Path(value).read_text(errors="replace"), re.MULTILINE)
            guess = int(found[-1]) if found else guess
    return guess


def start(words: list[str]) -> None:
    """Start spares for the workers that the command line seems to ask for, no more than there are idle cores."""
    if any(name in os.environ for name in LAUNCHED):
        return
    for rank in range(1, min(guess_workers(words), os.cpu_count() or 1)):
        _spares[rank] = subprocess.Popen(  # noqa: S603 - this very program
            [
                sys.executable,
                "-c",
                "from dmaml_pl.launching import prestarted; raise SystemExit(prestarted.stand_by())",
                *words,
            ],
            env={**os.environ, "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
        )
    atexit.register(_dismiss)


def turn_into_worker(rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes] | None:
    """Make the spare of that rank a worker; None if there is no spare.

    Args:
        rank: the worker's local rank.
        environment: all of the worker's environment.
    """
    spare = _spares.pop(rank, None)
    if spare is None or spare.poll() is not None or spare.stdin is None:
        return None
    try:
        spare.stdin.write(json.dumps(environment).encode() + b"\n")
        spare.stdin.close()
    except OSError:
        return None
    return spare


def await_orders() -> None:
    """Called when the command line has been parsed: a spare waits here to be needed, any other process goes on."""
    if not _outputs:
        return
    line = sys.stdin.readline()
    if not line:
        os._exit(0)  # nobody needs this process, and nobody may hear of it
    os.environ.clear()
    os.environ.update(json.loads(line))
    for number, output in _outputs.items():
        os.dup2(output, number)
        os.close(output)
    _outputs.clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _dismiss() -> None:
    for spare in _spares.values():
        spare.kill()
        spare.wait()


def stand_by() -> int:
    """Do what the main process does up to `await_orders`, unseen: it tells the user of anything that is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that the user started
    with Path(os.devnull).open("w") as nowhere:
        for number in (1, 2):
            _outputs[number] = os.dup(number)
            os.dup2(nowhere.fileno(), number)
    from dmaml_pl import _learn2learn  # noqa: PLC0415 - importing is what a spare is for
    from dmaml_pl.cli.run import run  # noqa: PLC0415 - the same

    _learn2learn.load()
    return run(sys.argv[1:])
