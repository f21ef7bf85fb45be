"""Workers on one machine share its cores, unless the user says how many threads each takes."""

from __future__ import annotations

import os

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import _suggested_max_num_threads

from dmaml_pl import DMAMLStrategy
from tests.recipes import small_data, small_maml, small_trainer
from tests.workers import in_workers

VARIABLE = "OMP_NUM_THREADS"


class Threads(pl.Callback):
    """Notes with how many threads a worker trains."""

    def __init__(self) -> None:
        self.seen = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.seen = torch.get_num_threads()
        torch.set_num_threads(1)  # what is forked from a process that had several waits for them for ever


def _threads_of_training(own: str | None) -> int:
    os.environ.pop(VARIABLE, None)
    if own is not None:
        os.environ[VARIABLE] = own  # which PyTorch reads as it is loaded
    torch.set_num_threads(3)
    watch = Threads()
    trainer = small_trainer(devices=2, strategy=DMAMLStrategy(run_length=2), max_steps=2, callbacks=[watch])
    trainer.fit(small_maml(), small_data())
    return watch.seen


@pytest.mark.parametrize("own", [None, "3"])
def test_two_workers_take_half_the_cores_each_unless_the_user_sets_their_threads(own: str | None) -> None:
    half = _suggested_max_num_threads(2)
    assert half <= max(1, (os.cpu_count() or 1) // 2)
    assert in_workers(_threads_of_training, 2, own) == [half if own is None else 3] * 2
