"""Workers of this machine that come and go: started, and started again when they are lost.

The command itself does not train: it watches its workers, and so none of them is special. Where no lighthouse of
torchft's is given, by which workers of all machines find each other, it keeps one for those of this machine. Where all
of them were lost at once, those who are started again go on from the last checkpoint.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from multiprocessing.connection import wait
from typing import Any

from pytorch_lightning.utilities.exceptions import SIGTERMException

from dmaml_pl.launching import server
from dmaml_pl.launching.server import PATIENCE_S
from dmaml_pl.launching.variables import MEMORY

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
"""The variable with the lighthouse's address, which is torchft's own."""

_AGAIN = "DMAML_STARTED_AGAIN"
LEFT_BEHIND, NOBODY_LEFT = 75, 76
"""Exit codes of a worker that the others have gone on without: it is to be started again (sysexits.h: EX_TEMPFAIL); and
of one that was, and has found nobody."""

_ALL_LOST = "All workers were lost: they are started again, and go on from the last checkpoint, if there was one yet."

POLL_SECONDS = 0.2
HEARTBEAT_MS = 5000
"""A worker that was not heard of for so long is lost."""
AT_MOST, WITHIN_S = 5, 60.0
"""A worker that was lost so many times in so many seconds is not started again."""


def may_begin() -> bool:
    """Whether this worker may begin a training; not one that is started again, to join the others."""
    return _AGAIN not in os.environ


def supervise(workers: int, timeout: float) -> int:
    """Keep so many workers of this machine until the training has ended; returns the exit code.

    Args:
        workers: how many.
        timeout: seconds that they wait for one that lives and does not come.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the workers have ended.
        SIGTERMException: this process was asked to end; the same.
    """
    lighthouse = None if LIGHTHOUSE in os.environ else _own_lighthouse(timeout)
    address = os.environ[LIGHTHOUSE] if lighthouse is None else lighthouse[1]
    try:
        with tempfile.TemporaryDirectory() as folder:
            memory = os.path.join(folder, "memory")  # noqa: PTH118 - a variable of the environment
            codes = _keep(workers, os.environ | {LIGHTHOUSE: address, MEMORY: memory})
    finally:
        if lighthouse is not None:
            lighthouse[0].shutdown()
    if 0 in codes:
        return 0
    return max(code if code > 0 else 128 - code for code in codes)


def _keep(workers: int, environment: dict[str, str]) -> list[int]:
    """Start workers, again when they are lost, until none is left; returns their exit codes."""
    processes = {rank: _start(environment, rank) for rank in range(workers)}
    lost: dict[int, list[float]] = defaultdict(list)
    codes: list[int] = []
    alone: list[int] = []  # were started again, and have found nobody
    try:
        while processes:
            wait([process.sentinel for process in processes.values() if hasattr(process, "sentinel")], POLL_SECONDS)
            for rank, process in list(processes.items()):
                code = process.poll()
                if code is None:
                    continue
                del processes[rank]
                lost[rank] = [one for one in lost[rank] if time.monotonic() - one < WITHIN_S] + [time.monotonic()]
                comes_again = (code < 0 or code == LEFT_BEHIND) and 0 not in codes and len(lost[rank]) < AT_MOST
                if code == NOBODY_LEFT:
                    alone.append(rank)
                elif comes_again:
                    processes[rank] = _start(environment | {_AGAIN: "1"}, rank)
                    _tell(rank, process.pid, code)
                else:
                    codes.append(code)
            if alone and not processes and 0 not in codes:
                print(_ALL_LOST, file=sys.stderr, flush=True)
                processes, alone = {rank: _start(environment, rank) for rank in alone}, []
    except (KeyboardInterrupt, SIGTERMException):
        _end(list(processes.values()))
        raise
    return codes


def _own_lighthouse(timeout: float) -> tuple[Any, str]:
    from torchft.coordination import LighthouseServer  # noqa: PLC0415 - an extra

    lighthouse = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=1,
        join_timeout_ms=int(timeout * 1000),
        quorum_tick_ms=20,
        heartbeat_timeout_ms=HEARTBEAT_MS,
    )
    return lighthouse, f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}"


def _start(environment: dict[str, str], rank: int) -> Any:
    environment = environment | {"LOCAL_RANK": str(rank)}
    forking = server.own()
    if forking is not None:
        return forking.fork(environment)
    return subprocess.Popen([sys.executable, "-m", "dmaml_pl", *sys.argv[1:]], env=environment)  # noqa: S603 - as typed


def _tell(rank: int, pid: int, code: int) -> None:
    fate = f"was killed by {signal.Signals(-code).name}" if code < 0 else "was left behind by the others"
    print(f"Worker {rank} (process {pid}) {fate}, and is started again.", file=sys.stderr, flush=True)


def _end(processes: list[Any]) -> None:
    """Ask the workers to end, as this process was asked, and wait until they have."""
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            ended = process.wait(max(deadline - time.monotonic(), 0.1)) is not None
        except subprocess.TimeoutExpired:
            ended = False
        if not ended:
            process.kill()
