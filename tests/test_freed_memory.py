"""A command keeps what it frees, so that the next tensors cost no page faults; unless the user has chosen."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS_OF_TENSORS = """
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
PAGES = 10 * 16_000_000 // os.sysconf("SC_PAGE_SIZE")


def faults(**environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_TENSORS], env=os.environ | environment, capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_tensors_of_megabytes_are_made_where_others_were_freed_unless_the_user_has_set_the_allocator() -> None:
    assert faults() < PAGES / 20
    assert faults(MALLOC_MMAP_THRESHOLD_="1000000") > PAGES / 2


PEAK_AFTER_A_HIGHER_ONE = """
import torch
from dmaml_pl.launching.memory import keep_freed
from dmaml_pl.modules.memory import PeakMemory
keep_freed()
parts = [torch.ones(1_000_000) for _ in range(60)]
del parts
memory = PeakMemory(torch.device("cpu"))
parts = [torch.ones(1_000_000) for _ in range(30)]
del parts
print(memory.mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_peak_of_a_training_counts_what_it_takes_of_memory_that_was_freed_before_it() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK_AFTER_A_HIGHER_ONE], capture_output=True, check=True)
    assert float(done.stdout) == pytest.approx(30 * 4_000_000 / 2**20, rel=0.1)
