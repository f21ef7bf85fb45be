"""A command keeps what it frees, so that the next tensors cost no page faults; unless the user has chosen."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from dmaml_pl.launching.memory import keep_freed
keep_freed()
for _ in range(10):  # small things come to lie between the first ones
    torch.ones(4_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(4_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PEAK = """
from dmaml_pl.modules.memory import PeakMemory
parts = [torch.ones(1_000_000) for _ in range(60)]
del parts
memory = PeakMemory(torch.device("cpu"))
parts = [torch.ones(1_000_000) for _ in range(30)]
del parts
print(memory.mib())
"""
PAGES = 10 * 16_000_000 // os.sysconf("SC_PAGE_SIZE")


def printed(program: str, **environment: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, check=True
    )
    return [*map(float, done.stdout.split())]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_tensors_are_made_where_others_were_freed_which_a_trainings_peak_knows_unless_the_user_set_the_allocator() -> (
    None
):
    faults, peak = printed(FAULTS + PEAK)
    assert faults < PAGES / 20
    assert peak == pytest.approx(30 * 4_000_000 / 2**20, rel=0.1)  # not of the higher one before it
    assert printed(FAULTS, MALLOC_MMAP_THRESHOLD_="1000000")[0] > PAGES / 2
