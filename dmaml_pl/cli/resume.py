"""Which checkpoint a command goes on with, and what a user types to go on with a training that was stopped."""

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from packaging.version import Version
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from dmaml_pl.checkpoints import check_fits, check_resumable, find_checkpoint, read_checkpoint
from dmaml_pl.checkpoints.lookup import was_changed
from dmaml_pl.cli.recorder import RUN_ID_KEY, trackers
from dmaml_pl.errors import CheckpointError, ConfigError, reason_of
from dmaml_pl.launching.restarts import Origin, current
from dmaml_pl.modules.trainer_options import check_steps
from dmaml_pl.provenance.commands import meta_test_command, resume_command
from dmaml_pl.runs import CHECKPOINT_KEY, IN_MIND
from dmaml_pl.strategies import WorkerStrategy

AUTO = "auto"
"""The `--ckpt_path` of a job that may be started again: `last` in `checkpoint.dirpath`, if there is one."""

RESOLVED_CHECKPOINT = "DMAML_RESOLVED_CHECKPOINT"
"""Environment variable by which worker 0 tells the workers that it starts which file `last` or `best` was."""


def find_origin(
    wanted: str | None,
    stage: str,
    trainer: pl.Trainer,
    model: pl.LightningModule,
    optimizer: torch.optim.Optimizer,
    *,
    joins: bool = False,
) -> Origin:
    """Find and check the checkpoint to go on with, or to evaluate, and the MLflow run that it belongs to.

    Args:
        wanted: `--ckpt_path`.
        stage: "fit", "validate", "test" or "predict".
        trainer: of the command.
        model: what is to get the weights.
        optimizer: one like that which is to go on, over copies of the parameters: a step is tried.
        joins: whether `wanted` is a training that others are making, and not one that is started again.

    Raises:
        CheckpointError: there is none, or it does not fit.
        ConfigError: the training has been made already.
    """
    restart = current() if stage == "fit" and not joins else None
    path = restart.checkpoint if restart is not None else None
    path = path or _find(wanted, stage, trainer)
    if path is None:
        return restart or Origin(None, None)
    os.environ[RESOLVED_CHECKPOINT] = str(path)
    checkpoint = read_checkpoint(path)
    check_fits(checkpoint, model, path)
    if stage == "fit":
        if restart is None and wanted != AUTO:  # a job that is started again may only have its meta-test left to make
            done, limit = int(checkpoint.get("global_step", 0)), trainer.max_steps
            if 0 <= limit <= done:
                raise ConfigError(
                    f"{path} has already made {done} meta-iterations, and trainer.max_steps is {limit}: set it higher "
                    "to train on."
                )
        with _told(path, "optimizer_states"):
            check_resumable(checkpoint, optimizer, path)
        _check_schedule(checkpoint, trainer.max_steps, path)
        _try_restoring(checkpoint, trainer, model, optimizer, path)
    if is_worker_zero():
        print(f"Using checkpoint {path}", file=sys.stderr)
    run_id = checkpoint.get(RUN_ID_KEY)
    return Origin(path, run_id if isinstance(run_id, str) else None, checkpoint.get(IN_MIND, ()))


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a part of a checkpoint that a training did not write leads to into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise was_changed(path, f"{what} cannot be restored ({reason_of(error)})") from error


def _try_restoring(checkpoint: dict[str, Any], trainer: Any, model: Any, optimizer: Any, path: Path) -> None:
    """Restore on trial what Lightning would in the workers only, when there is an MLflow run already."""
    with _told(path, "version"):
        Version(checkpoint["pytorch-lightning_version"])
    with _told(path, "runs and validations"):
        model.on_load_checkpoint(checkpoint)
        _compare(dict.fromkeys(("done", "tasks_seen", "env_steps"), 0), checkpoint.get("runs", {}))
    with _told(path, "optimizer_states"):
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer_states"][0]))
        check_steps(optimizer, None, 0)
        if checkpoint["global_step"] and optimizer.state and not checkpoint["optimizer_states"][0]["state"]:
            raise ValueError("they have no state")
    with _told(path, "callbacks"):
        for callback in trainer.callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if state and type(callback).__module__.startswith(("dmaml_pl.", "pytorch_lightning.")):
                copy.deepcopy(callback).load_state_dict(copy.deepcopy(state))
    with _told(path, "loops"):
        _compare(trainer.fit_loop.state_dict(), checkpoint["loops"]["fit_loop"])
    if isinstance(trainer.strategy, WorkerStrategy):
        with _told(path, CHECKPOINT_KEY):
            trainer.strategy.try_restoring(checkpoint.get(CHECKPOINT_KEY, {}))


def _compare(wanted: dict[str, Any], kept: dict[str, Any]) -> None:
    """Check that counts are counts, and groups of them groups, as far as they are there: other versions have others."""
    for name in wanted.keys() & kept.keys():
        if isinstance(wanted[name], dict):
            _compare(wanted[name], dict(kept[name]))
        elif isinstance(wanted[name], int) and (not isinstance(kept[name], int) or kept[name] < 0):
            raise ValueError(f"{name} is {kept[name]!r}")


def _check_schedule(checkpoint: dict[str, Any], limit: int, path: Path) -> None:
    """Check that a schedule which knows its end, and goes on as it was kept, reaches as far as the training."""
    for kept in checkpoint.get("lr_schedulers") or ():
        with _told(path, "lr_schedulers"):
            total = kept.get("total_steps")
        if total is not None and not 0 <= limit <= total:
            raise CheckpointError(
                f"{path} goes on with a model.meta_schedule of {total} steps, and trainer.max_steps is {limit}: "
                f"set it to {total} at most, or train anew."
            )


def _find(wanted: str | None, stage: str, trainer: Any) -> Path | None:
    folder = checkpoint_folder(trainer)
    if wanted == AUTO:
        if stage != "fit" or getattr(trainer.checkpoint_callback, "dirpath", None) is None:
            raise CheckpointError(
                "--ckpt_path auto goes on with a training that was stopped, if there is one: it is for dmaml fit, "
                "and needs checkpoint.dirpath, a folder for this training alone."
            )
        return folder / "last.ckpt" if (folder / "last.ckpt").is_file() else None
    if wanted is None:
        if stage in ("test", "predict"):
            raise CheckpointError(f"dmaml {stage} needs --ckpt_path: give best, last or a file.")
        return None
    found = None if is_worker_zero() else os.environ.get(RESOLVED_CHECKPOINT)
    return Path(found or find_checkpoint(str(wanted), folder))


def checkpoint_folder(trainer: Any) -> Path:
    """Where trainings of this configuration keep their checkpoints."""
    chosen = getattr(trainer.checkpoint_callback, "dirpath", None)
    if chosen is not None:
        return Path(chosen)
    for tracker in trackers(trainer):
        return Path(tracker.save_dir or ".") / str(tracker.name)
    return Path(trainer.default_root_dir) / "checkpoints"


def how_to_go_on(trainer: Any, folder: Path, *, launched: bool) -> str:
    """What a user types after `dmaml fit` was stopped, with the words that were given.

    Args:
        trainer: that was stopped.
        folder: where trainings of this configuration keep their checkpoints.
        launched: whether something else starts the workers, whose words nobody knows here.
    """
    words = sys.argv[1:]
    callback = trainer.checkpoint_callback
    own = getattr(callback, "dirpath", None)
    kept = None if own is None else Path(own) / "last.ckpt"
    if trainer.state.fn == "test":
        best = getattr(callback, "best_model_path", "") or kept
        again = None if launched else meta_test_command(words, str(best))
        if not is_command(words):
            return f"Stopped in the meta-test; the training is finished. Its best checkpoint is {best}."
        return "Stopped in the meta-test; the training is finished." + (
            f" The meta-test alone:\n  {again}" if again else " dmaml test --ckpt_path best makes it alone."
        )
    if kept is None or not kept.is_file():
        return "Stopped before anything was kept. The same command begins again."
    shown = os.path.relpath(kept) if kept.resolve().is_relative_to(Path.cwd()) else str(kept)
    where = f"Stopped. The last merge is kept in {shown}."
    if launched:
        return f"{where} The same command with --ckpt_path last goes on from it."
    if not is_command(words):
        return f"{where} To go on: fit(..., ckpt_path={shown!r})"
    with suppress(CheckpointError):
        if find_checkpoint("last", folder).samefile(kept):
            shown = "last"
    return f"{where} To go on:\n  {resume_command(words, shown)}"


def is_command(words: list[str]) -> bool:
    """Whether these are words of the command, and not those of a program that calls `dmaml_pl.fit`."""
    return bool(words) and words[0] in LightningCLI.subcommands()


def is_worker_zero() -> bool:
    """Known from the environment before there is a process group."""
    return not getattr(rank_zero_only, "rank", 0)
