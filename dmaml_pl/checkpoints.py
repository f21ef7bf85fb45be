"""Checkpoints at the ends of runs, how to find them again, and the checks before one is used."""

from __future__ import annotations

import pickle
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from dmaml_pl.errors import CheckpointError, ConfigError


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best and the last merged weights: `best.ckpt` and `last.ckpt` of each training.

    Lightning renews its last checkpoint only when it saves a best one, and not at the end of a training; here the last
    one is renewed at every validation and at the end.

    Args:
        monitor: metric by which the best is chosen, such as "val/loss" or "val/accuracy".
        mode: whether the best is the smallest ("min") or the largest ("max").
        dirpath: folder of the checkpoints; by default one of its own for every training, below the logger's folder.
    """

    def __init__(
        self, monitor: str = "val/loss", mode: Literal["min", "max"] = "min", dirpath: str | None = None
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_last=True,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def check_writable(self) -> None:
        """Check that a folder that the user has chosen can be written, before there is anything to lose.

        Raises:
            ConfigError: it cannot.
        """
        if self.dirpath is None:
            return
        try:
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.dirpath):
                pass
        except OSError as error:
            raise ConfigError(
                f"checkpoint.dirpath is {self.dirpath}, which cannot be written ({error.strerror}): set it to a folder "
                "that can."
            ) from error

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """As Lightning's; a resumed training's folder is meant not to be empty."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty")  # the resumed training's own files
            super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Renew the best if it was beaten, and the last always."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep runs that were merged after the last validation."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def find_checkpoint(wanted: str, folder: Path) -> Path:
    """The file that `--ckpt_path` means.

    Args:
        wanted: "last" or "best" for those of the newest training under `folder`, else a file.
        folder: where the trainings of the experiment keep their checkpoints.

    Raises:
        CheckpointError: there is no such file.
    """
    if wanted not in ("last", "best"):
        path = Path(wanted)
        if not path.is_file():
            raise CheckpointError(f"--ckpt_path is {wanted}, but there is no such file: give best, last or a file.")
        return path
    trainings = sorted(
        [*folder.glob("last.ckpt"), *folder.glob("*/checkpoints/last.ckpt")], key=lambda path: path.stat().st_mtime
    )
    if not trainings:
        raise CheckpointError(
            f"--ckpt_path is {wanted}, but no training has left a checkpoint under {folder}: train first (dmaml fit), "
            "or give a file."
        )
    path = trainings[-1].with_name(f"{wanted}.ckpt")
    if not path.is_file():
        raise CheckpointError(f"--ckpt_path is {wanted}, but {path} is gone: give last or a file.")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint, without running code from it.

    Raises:
        CheckpointError: the file is damaged, or is no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"--ckpt_path {path} is truncated, damaged, or no checkpoint at all: give best, last or another file."
        ) from error
    # The version is what Lightning asks for first.
    if isinstance(checkpoint, dict) and {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        return checkpoint
    raise CheckpointError(
        f"--ckpt_path {path} is no checkpoint of a training, as it lacks state_dict or pytorch-lightning_version: give "
        "best, last or another file."
    )


def check_fits(checkpoint: dict[str, Any], module: nn.Module, path: Path) -> None:
    """Check that a checkpoint holds the weights of this very network.

    Raises:
        CheckpointError: names the first weight that does not fit.
    """
    held, wanted = checkpoint["state_dict"], module.state_dict()
    for name in [*wanted, *held]:
        have, need = (
            tuple(getattr(state[name], "shape", ())) if name in state else "missing" for state in (held, wanted)
        )
        if have != need:
            raise CheckpointError(
                f"--ckpt_path {path} was made for another network: {name} is {have} in the checkpoint and {need} in "
                "model.network. Use the config that it was trained with, or another checkpoint."
            )


def check_resumable(checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Check that a training with this meta-optimizer can go on from a checkpoint.

    Raises:
        CheckpointError: it holds no optimizer state, or that of another kind of optimizer.
    """
    states = checkpoint.get("optimizer_states")
    if not states or "loops" not in checkpoint:
        raise CheckpointError(
            f"--ckpt_path {path} holds weights only, from which no training can go on: give last or another file."
        )
    # A schedule adds its own entry.
    lacking = set(optimizer.param_groups[0]) - set(states[0]["param_groups"][0]) - {"initial_lr"}
    if lacking:
        raise CheckpointError(
            f"--ckpt_path {path} was made with another meta-optimizer: it has no {', '.join(sorted(lacking))}. Set "
            "model.meta_optimizer to the one that it was trained with, or give another checkpoint."
        )
