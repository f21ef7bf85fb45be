"""Small trainings that tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from data_modules import Sinusoid
from dmaml_pl import MAML, MLP, DMAMLStrategy, MetaLearning
from dmaml_pl.data import TrainingRuns
from dmaml_pl.engines import MetaOutcome
from dmaml_pl.errors import WorkerLostError
from dmaml_pl.runs import RunReport
from dmaml_pl.tasks import Act, TaskBatch


def small_data(**settings: Any) -> Sinusoid:
    return Sinusoid(**({"meta_batch": 4, "val_tasks": 8, "test_tasks": 12, "seed": 0} | settings))


def maml_module(network: nn.Module, **settings: Any) -> MetaLearning:
    """MAML, with its settings among those of the module."""
    own = {name: settings.pop(name) for name in ("inner_lr", "inner_steps", "first_order") if name in settings}
    return MetaLearning(network, MAML(**own), **settings)


def small_maml(network: nn.Module | None = None, **settings: Any) -> MetaLearning:
    torch.manual_seed(0)
    return maml_module(MLP(hidden=[8, 8]) if network is None else network, **({"evaluation_steps": 2} | settings))


def meta_gradient(
    module: MetaLearning, batch: TaskBatch, backward: Callable[[Tensor], object] = Tensor.backward
) -> MetaOutcome:
    """Adds the meta-gradient of a batch to the parameters' `.grad`."""
    return module.engine.for_training(module.learner, batch).meta_gradient(module.learner, batch, backward)


def small_trainer(**settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "max_steps": 10,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**(defaults | settings))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


class Recorder(pl.Callback):
    """Keeps the module's state after every merge, and each run's report."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.reports: list[RunReport] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.states.append(state_of(pl_module))
        self.reports.append(outputs)


def train_with_two(
    module: MetaLearning, folder: Path, steps: int, ckpt: Path | None = None
) -> tuple[pl.Trainer, Recorder]:
    """Train as one of two workers, in runs of 4 meta-iterations, and keep `kept.ckpt` in the folder."""
    recorder = Recorder()
    trainer = small_trainer(
        devices=2,
        strategy=DMAMLStrategy(run_length=4),
        max_steps=steps,
        callbacks=[recorder],
        default_root_dir=folder,
    )
    trainer.fit(module, small_data(), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "kept.ckpt")
    return trainer, recorder


T = TypeVar("T")


def straight_and_resumed(train: Callable[[Path, int, Path | None], T], folder: Path) -> tuple[T, T]:
    """What is trained by 12 meta-iterations, and by 8 and then 4 more from the checkpoint; see `train_with_two`."""
    torch.set_num_threads(1)
    straight = train(folder / "straight", 12, None)
    torch.distributed.destroy_process_group()
    train(folder / "stopped", 8, None)
    torch.distributed.destroy_process_group()
    return straight, train(folder / "resumed", 12, folder / "stopped" / "kept.ckpt")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class FreezingData:
    """Draws no further for one worker at one meta-iteration, until released."""

    def __init__(self, released: Any, worker: int, run: int, iteration: int) -> None:
        self.data = small_data()
        self.released = released
        self.place = (worker, run, iteration)
        self.seed = 0

    def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> Any:
        if (worker, run, iteration) == self.place:
            assert self.released.wait(100)
        return self.data.sample(worker=worker, run=run, iteration=iteration)


def train_with_a_frozen_worker(strategy: Any, data: FreezingData) -> str:
    """What a worker is told when worker 1 does not come; the frozen one is released when somebody has been told."""
    trainer = small_trainer(devices=2, strategy=strategy, max_steps=20)
    try:
        trainer.fit(small_maml(), TrainingRuns(data, 5), small_data().val_dataloader())
    except WorkerLostError as error:
        return str(error)
    finally:
        data.released.set()
    return "trained on"
