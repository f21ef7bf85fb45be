"""How much memory a training takes."""

import contextlib
import ctypes
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory that this process has needed since this was made, beyond what it needed then.

    On a GPU that is what tensors take; on a CPU what the process has in memory, told by Linux alone. `getrusage` would
    not do: its figure begins with the peak of the process that a worker was forked from.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) / 2**20
        elif _STATUS.exists():
            with contextlib.suppress(AttributeError):  # glibc's alone; what a trial before left would be there to use
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):  # then an earlier, higher peak counts
                _RESET.write_text("5")  # forgets the peak
            self._before = _mib("VmRSS")

    def mib(self) -> float | None:
        """MiB; None where nobody tells."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20 - self._before
        return max(_mib("VmHWM") - self._before, 0.0) if _STATUS.exists() else None


def _mib(what: str) -> float:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) / 1024
