"""What is measured on: its kind, the versions, and how much it can compute."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices by whose product the peak is measured, by device."""

PACKAGES = ("torch", "learn2learn", "higher", "torchopt", "jax", "pytorch-lightning")


def description(device: str) -> str:
    """The machine's kind, PyTorch's threads, and versions, in one line."""
    versions = ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    kind = f"{os.cpu_count()} cores of {_processor()}, {torch.get_num_threads()} threads of PyTorch"
    if device == "cuda":
        kind = f"{torch.cuda.get_device_name()} ({kind})"
    return f"{kind}; Python {platform.python_version()}, {versions}"


def peak(device: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], None], float]:
    """A product of large matrices, and its floating-point operations."""
    side = SIDE[device]
    left, right = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    def compute() -> None:
        torch.mm(left, right, out=out)
        if device == "cuda":
            torch.cuda.synchronize()

    return compute, 2.0 * side**3


def operations(compute: Callable[[], object]) -> float:
    """Floating-point operations of matrix products and convolutions in a computation."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return float(counter.get_total_flops())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
