"""A group of workers of whom only one is there: PyTorch's own fake process group, whose collective calls are counted.

Its calls leave every tensor as it was, so that a sum over the workers is what this one has brought.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "gather", "reduce", "barrier", "all_gather_object")
META_ITERATION = "meta-iteration"


class Trace(pl.Callback):
    """What happened, in order: collective calls by name, meta-iterations, and the ends of runs.

    Attributes:
        events: names.
        sizes: of the tensors that were broadcast before the first meta-iteration.
        reports: of the runs.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.sizes: list[int] = []
        self.reports: list[Any] = []

    def on_meta_iteration_end(self, *args: Any) -> None:
        self.events.append(META_ITERATION)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.events.append("run")
        self.reports.append(outputs)


def mocked(strategy: type[Any], workers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[type[Any], Trace]:
    """A strategy that takes this process for worker 0 of so many, and what it does."""
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "GROUP_RANK": 0}
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "mocked"}
    for name, value in (told | addresses).items():
        monkeypatch.setenv(name, str(value))
    trace = Trace()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "broadcast" and META_ITERATION not in trace.events:
                trace.sizes.append(args[0].numel())
            trace.events.append(name)
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        monkeypatch.setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))

    class Mocked(strategy):  # type: ignore[misc]
        def setup_distributed(self) -> None:
            self.set_world_ranks()
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=workers)

    return Mocked, trace
