"""What can be checked before a training is checked here, so that nothing long starts in vain."""

import os
import re
from collections.abc import Iterable
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities import rank_zero_info

from data_modules import TaskDataModule
from dmaml_pl.checkpoints import RunCheckpoint
from dmaml_pl.checks import require_folder
from dmaml_pl.cli.parts import check_parts, parts_of
from dmaml_pl.cli.recorder import trackers
from dmaml_pl.cli.resume import checkpoint_folder, is_worker_zero
from dmaml_pl.errors import ConfigError, DmamlError, reason_of
from dmaml_pl.evaluation.predictions import PredictionWriter
from dmaml_pl.evaluation.report import MetaTestReport
from dmaml_pl.modules import MetaLearning
from dmaml_pl.serving.register import ModelRegistrar
from dmaml_pl.strategies import WorkerStrategy
from dmaml_pl.strategies.loopback import listening
from dmaml_pl.tasks import ActingSource, TaskBatch, check_tasks


def check_before(
    stage: str, trainer: pl.Trainer, module: MetaLearning, data: TaskDataModule, *, meta_test: bool
) -> None:
    """Make every check that needs no worker.

    Args:
        stage: "fit", "validate", "test" or "predict".
        trainer: with its callbacks.
        module: to train or evaluate.
        data: its tasks, which are loaded here.
        meta_test: whether it ends in one.

    Raises:
        DmamlError: names the setting that cannot work.
    """
    split: Literal["val", "test"] = "val" if stage in ("fit", "validate") else "test"
    if stage == "predict" and isinstance(data, ActingSource):
        raise ConfigError(
            f"dmaml predict writes predictions of query samples, but data is {type(data).__name__}, which has "
            "environments: dmaml test tells the returns there, and dmaml adapt those in a task of yours."
        )
    check_parts(parts_of(trainer, module, data), writes=stage == "fit")
    module.check_workers_can_merge(trainer)
    module.check_trainer(trainer, data)
    if stage == "fit":
        _check_trainer(trainer, data)
    data.prepare_data()
    data.setup(stage)
    _try_sampling(stage, module, data, meta_test=meta_test)
    module.check_data(data, split)
    if stage == "fit":
        module.check_outer_steps(max(trainer.max_steps, 0))
        _check_strategy(trainer, module, data)
        _check_checkpoints(trainer, module)
    # Every worker must have tasks to evaluate.
    data.trainer = trainer
    for needed, name in ((stage == "fit", "train"), (split == "val", "val"), (split == "test" or meta_test, "test")):
        if needed and not isinstance(loader := getattr(data, f"{name}_dataloader")(), Iterable):
            raise ConfigError(f"data is {type(data).__name__}, whose {name}_dataloader gives {loader!r}, not batches.")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning declares it nowhere
        if isinstance(callback, ModelRegistrar) and stage == "fit":
            callback.check(trainer, data)
        writes = (MetaTestReport,) * meta_test + (PredictionWriter,) * (stage == "predict")
        if isinstance(callback, writes):
            callback.check_writable()


def _check_tasks(data: TaskDataModule, tasks: TaskBatch) -> None:
    try:
        check_tasks(tasks)
    except DmamlError:
        raise
    except Exception as error:  # of tensors with which nothing can be computed, such as sparse ones
        raise ConfigError(f"data is {type(data).__name__}, whose tasks cannot be used ({reason_of(error)}).") from error


def _axes(tasks: TaskBatch) -> list[tuple[int, ...]]:
    """Of samples."""
    return [tuple(samples.x.shape[2:]) for samples in (*tasks.support, tasks.query)]


def _try_sampling(stage: str, module: MetaLearning, data: TaskDataModule, *, meta_test: bool) -> None:
    """Sample what is first trained on, and one task of the meta-test, which would fail only after the training."""
    if stage == "fit" and not isinstance(data, ActingSource):
        tasks = data.sample(worker=0, run=0, iteration=0)
        _check_tasks(data, tasks)
        if not type(data).__module__.startswith(("data_modules.", "dmaml_pl.")):
            _check_repeats(data)
        if meta_test:
            tasks = data.evaluation_tasks("test", [0])
            _check_tasks(data, tasks)
            if _axes(tasks) != _axes(data.evaluation_tasks("val", [0])):
                module.check_data(data, "test")


def _check_repeats(data: TaskDataModule) -> None:
    """Check that a user's own data gives the same task for the same seed, on which the same bits of a training rest."""
    first, again = (data.evaluation_task("val", 0).tensors() for _ in range(2))
    if any(
        a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, again, strict=True)
    ):
        raise ConfigError(
            f"data is {type(data).__name__}, whose tasks differ though their seed is the same: draw all that is random "
            "from generators made of it, such as torch.Generator().manual_seed(seed)."
        )


def _tell_of_gpu(trainer: Any) -> None:
    if isinstance(trainer.accelerator, CPUAccelerator) and CUDAAccelerator.is_available():
        rank_zero_info("A GPU is there, and not used: trainer.accelerator is cpu, which suits small networks.")


def _check_trainer(trainer: Any, data: TaskDataModule) -> None:
    """Check what Lightning would find in the workers only, or take in another sense than ours."""
    _tell_of_gpu(trainer)
    _check_length(trainer)
    _check_machines(trainer)
    if trainer.overfit_batches:
        raise ConfigError(
            f"trainer.overfit_batches is {trainer.overfit_batches}, but must be 0: every run draws tasks of its own. "
            "To see whether a network can learn, give the data fewer classes or rows."
        )
    for name in ("log_every_n_steps", "check_val_every_n_epoch"):
        if (every := getattr(trainer, name)) is not None and every < 1:
            raise ConfigError(f"trainer.{name} is {every}, but must be at least 1.")
    if trainer.gradient_clip_val is not None:
        raise ConfigError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, but a run clips its own meta-gradients: "
            "set model.gradient_clip instead."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but must be 1: for a larger "
            "meta-batch set data.meta_batch."
        )
    every, limit = getattr(trainer, "val_check_interval", None), trainer.limit_train_batches
    if every is None:
        raise ConfigError("trainer.val_check_interval is a time, but must be a number of runs, or a share of an epoch.")
    if isinstance(every, int) and every < 1:
        raise ConfigError(f"trainer.val_check_interval is {every}, but must be at least 1 (runs).")
    runs = data.runs_per_epoch
    runs = int(runs * limit) if isinstance(limit, float) else min(runs, limit or 0)
    if runs < 1:
        raise ConfigError(
            f"trainer.limit_train_batches is {limit:g}, which leaves no run of the {data.runs_per_epoch} of an epoch: "
            "set it higher, to a number of runs or a share of them."
        )
    by_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches
    if isinstance(every, int) and by_epoch and every > runs:
        raise ConfigError(
            f"trainer.val_check_interval is {every}, but an epoch has {runs} runs: set it to 1 to {runs}, "
            "data.runs_per_epoch higher, or trainer.check_val_every_n_epoch to null."
        )


def _check_length(trainer: Any) -> None:
    if trainer.max_steps == 0:
        raise ConfigError("trainer.max_steps is 0, but must be at least 1 (meta-iterations of each worker), or -1.")
    if trainer.max_epochs == 0:
        raise ConfigError(
            "trainer.max_epochs is 0, but must be at least 1, or -1 (as many as trainer.max_steps takes)."
        )
    if 0 < trainer.max_steps < (trainer.min_steps or 0):
        raise ConfigError(
            f"trainer.min_steps is {trainer.min_steps}, but must be at most trainer.max_steps, {trainer.max_steps}."
        )
    for timer in (callback for callback in trainer.callbacks if isinstance(callback, Timer)):
        left = timer.time_remaining()
        if left is not None and left <= 0:
            raise ConfigError(f"trainer.max_time is {left:g} s, but must be greater than 0.")


def _check_strategy(trainer: pl.Trainer, module: MetaLearning, data: TaskDataModule) -> None:
    if isinstance(trainer.strategy, WorkerStrategy):
        trainer.strategy.check(trainer, module, data)


def _check_machines(trainer: Any) -> None:
    """Check that workers whom no launcher has told of each other can meet."""
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None:
        try:
            environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        except Exception as error:
            launcher = type(environment).__name__.removesuffix("Environment")
            raise ConfigError(
                f"trainer.devices is {trainer.num_devices} and trainer.num_nodes {trainer.num_nodes}, which does not "
                f"fit what {launcher} has started ({reason_of(error)})."
            ) from error
    alone = isinstance(environment, LightningEnvironment)
    number = int(os.environ.get("NODE_RANK", "0"))
    if alone and number >= trainer.num_nodes:
        raise ConfigError(
            f"NODE_RANK is {number}, but must be less than trainer.num_nodes, which is {trainer.num_nodes}: set that "
            "to the number of machines, or unset NODE_RANK."
        )
    if trainer.num_nodes > 1 and alone and missing and not getattr(trainer.strategy, "elastic", False):
        raise ConfigError(
            f"trainer.num_nodes is {trainer.num_nodes}, but must be 1 where dmaml alone starts the workers: for more "
            f"machines start it with torchrun or srun on each, or set {', '.join(missing)} there."
        )
    if alone and trainer.num_nodes == 1 < trainer.num_devices and "MASTER_PORT" in os.environ and is_worker_zero():
        listening(int(os.environ["MASTER_PORT"])).close()


def _check_checkpoints(trainer: pl.Trainer, module: MetaLearning) -> None:
    """Check what would be found at the first validation only."""
    objective = module.objective
    better = {"val/loss": "min", "train/loss": "min", f"val/{objective.metric}": objective.better}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # as above
    # A user's module or callback may log what it likes.
    ours = all(type(each).__module__.startswith(("dmaml_pl.", "pytorch_lightning.")) for each in (module, *callbacks))
    for callback in callbacks:
        name, own = getattr(callback, "monitor", None), isinstance(callback, RunCheckpoint)
        said = "checkpoint." if own else f"trainer.callbacks has {type(callback).__name__}, whose "
        of_step = re.match(rf"val/{objective.metric}_step_\d", str(name))
        mode = objective.better if of_step else better.get(str(name))
        is_width = not own and name == f"val/{objective.metric}_ci95"
        if ours and (own or name) and mode is None and not is_width:
            raise ConfigError(f"{said}monitor is {name}, but must be one of {', '.join(better)}.")
        may_keep_the_worst = isinstance(callback, ModelCheckpoint) and not own
        if not may_keep_the_worst and mode not in (None, getattr(callback, "mode", mode)):
            raise ConfigError(f"{said}mode is {callback.mode}, but must be {mode} for {name}.")
    ours_keeps = trainer.checkpoint_callback
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, RunCheckpoint):
            if isinstance(callback, ModelCheckpoint) and isinstance(ours_keeps, RunCheckpoint):
                ours_keeps.check_beside(callback)
            continue
        folder = checkpoint_folder(trainer)
        # By default it is made in the tracker's, beside the store, of which is told elsewhere; or is another logger's.
        if callback.dirpath is not None or (trackers(trainer) and os.path.lexists(folder.parent)):
            require_folder("checkpoint.dirpath", folder)
        if callback.dirpath is not None and (taken := [each for each in folder.glob("*.ckpt") if not each.is_file()]):
            raise ConfigError(f"checkpoint.dirpath is {folder}, where {taken[0].name} is no file: take that away.")
