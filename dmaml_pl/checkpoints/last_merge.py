"""The last merge, held in memory between two checkpoints, and brought to the disk when the training is asked to stop.

A checkpoint after every merge would cost a training with short runs more than the runs themselves. So most merges are
copied in memory only, which takes a millisecond. When a signal asks this process to end, the system tells a thread of
its own at once, even if the main thread is waiting for another worker inside PyTorch: each worker puts down its own
optimizer moments in a file beside the checkpoint, and worker 0 makes the checkpoint of them and of the merged weights.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from dmaml_pl.checkpoints.files import WholeFileIO, write_whole
from dmaml_pl.errors import CheckpointError
from dmaml_pl.runs import CHECKPOINT_KEY

WAIT_SECONDS = 10.0
"""So long worker 0 waits for the others' moments: well within the 30 s that clusters give a process to end."""

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


@dataclass
class Held:
    """A merge in memory.

    Attributes:
        step: meta-iterations of each worker behind it.
        worker: rank of this worker.
        workers: how many there were.
        moments: states of this worker's optimizers.
        checkpoint: all but the workers' moments; None off worker 0.
        strategy_state: what the strategy keeps of itself.
    """

    step: int
    worker: int
    workers: int
    moments: list[Any]
    checkpoint: dict[str, Any] | None
    strategy_state: dict[str, Any]


class LastMerge:
    """Holds the last two merges; the one before serves where a worker was stopped before it saw the last.

    Args:
        path: of the checkpoint.
        files: by which it is written.
        forward: tells the workers that this process has started that they are to stop; gets the signal's number.

    Attributes:
        asked_to_stop: whether a signal has come.
        processes: machine and process of every worker, by which worker 0 knows that one will hand nothing over.
    """

    def __init__(self, path: Path, files: WholeFileIO, forward: Callable[[int], None]) -> None:
        self.path = path
        self.asked_to_stop = False
        self.processes: list[tuple[str, int]] = []
        self._files = files
        self._forward = forward
        self._held: list[Held] = []
        self._busy = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        self._before = -1
        self._settled = -1

    def hold(self, held: Held) -> None:
        """Take a merge; its tensors are copied."""
        self._held = [
            *self._held[-1:],
            Held(
                held.step,
                held.worker,
                held.workers,
                _copied(held.moments),
                _copied(held.checkpoint),
                _copied(held.strategy_state),
            ),
        ]

    def watch(self) -> None:
        """Listen for the signals that ask a process to end; only the main thread can."""
        if threading.current_thread() is not threading.main_thread() or self._pipe is not None:
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), daemon=True, name="last-merge").start()

    def unwatch(self) -> None:
        """Listen no longer."""
        if self._pipe is not None:
            signal.set_wakeup_fd(self._before)
            os.close(self._pipe[1])  # ends the thread, which closes the other end
            self._pipe = None

    def bring_to_disk(self) -> None:
        """Make the last merge the checkpoint, together with the other workers; does nothing if it is there already.

        Never raises: the process is ending already, and a reason that stands in the way is told in one line.
        """
        with self._busy:
            held = self._held
            if not held or held[-1].step <= max(self._files.written(self.path), self._settled):
                return
            try:
                if held[-1].worker == 0:
                    self._collect(held)
                else:
                    write_whole({one.step: one.moments for one in held}, self._part(held[-1].worker))
                    self._settled = held[-1].step
            except CheckpointError as error:
                print(f"dmaml: {error}", file=sys.stderr, flush=True)

    def _listen(self, ears: int) -> None:
        while heard := os.read(ears, 64):
            if stops := STOP_SIGNALS & set(heard):
                self.asked_to_stop = True
                self._forward(max(stops))
                self.bring_to_disk()
        os.close(ears)

    def _collect(self, held: list[Held]) -> None:
        newest = held[-1]
        parts = {worker: self._part(worker) for worker in range(1, newest.workers)}
        deadline = time.monotonic() + WAIT_SECONDS
        moments = _moments(newest, parts)
        while moments is None and time.monotonic() < deadline and not self._any_dead(parts):
            time.sleep(0.02)
            moments = _moments(newest, parts)
        if moments is None and len(held) > 1:
            newest = held[0]
            moments = _moments(newest, parts)
        if moments is None:
            self._settled = held[-1].step
            if self._any_dead(parts):  # which is told elsewhere
                return
            print(
                f"dmaml: the last merge, at meta-iteration {newest.step}, is not in {self.path}, which stays as it was:"
                f" not every worker has put its optimizer moments beside it within {WAIT_SECONDS:g} s. Workers on "
                "several machines need checkpoint.dirpath (or mlruns) on a disk that all of them share.",
                file=sys.stderr,
                flush=True,
            )
            return
        assert newest.checkpoint is not None  # noqa: S101 - worker 0 holds it
        kept: dict[str, Any] = {"workers": newest.workers}
        if newest.workers > 1:
            kept["optimizer_states"] = moments
        self._files.save_newer({**newest.checkpoint, CHECKPOINT_KEY: kept | newest.strategy_state}, self.path)
        for part in parts.values():
            part.unlink(missing_ok=True)

    def _any_dead(self, parts: dict[int, Path]) -> bool:
        """Whether a worker on this machine has died without handing over its moments."""
        return any(
            len(self.processes) > worker
            and self.processes[worker][0] == socket.gethostname()
            and not _is_running(self.processes[worker][1])
            and not part.exists()
            for worker, part in parts.items()
        )

    def _part(self, worker: int) -> Path:
        return self.path.with_name(f".{self.path.name}.worker-{worker}")

    def clear(self) -> None:
        """Remove what workers of an earlier training have put beside the checkpoint."""
        for part in self.path.parent.glob(f".{self.path.name}.worker-*"):
            if not part.name.endswith(".partial"):
                part.unlink(missing_ok=True)


def _copied(value: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU and nobody else's."""
    return apply_to_collection(value, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))


def _is_running(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _moments(held: Held, parts: dict[int, Path]) -> list[Any] | None:
    """Every worker's moments at a merge; None as long as one is missing."""
    if not all(part.exists() for part in parts.values()):
        return None
    found = [torch.load(part, map_location="cpu", weights_only=True) for part in parts.values()]
    if not all(held.step in part for part in found):
        return None
    return [held.moments, *(part[held.step] for part in found)]
