"""Finding a checkpoint again, and the checks before it is used."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmaml_pl.checks import or_last
from dmaml_pl.errors import CheckpointError
from dmaml_pl.runs import CHECKPOINT_KEY

CONFIG_KEY = "config"
"""Where a checkpoint holds the configuration of its model and data, from which they are built again."""

_KINDS: dict[str, type] = {
    "state_dict": dict,
    "pytorch-lightning_version": str,
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "runs": dict,
    "validations": list,
    CHECKPOINT_KEY: dict,
}
"""What a checkpoint may hold; counts are not negative."""


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
            instead = or_last(path, "give best, last or a file")
            raise CheckpointError(f"--ckpt_path is {wanted}, but there is no such file: {instead}.")
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
        raise CheckpointError(
            f"--ckpt_path is {wanted}, but {path} is not there, as where a training had no validation: give last or a "
            "file."
        )
    return path


def read_plain(path: Path, complaint: str) -> Any:
    """Load a file of `torch.save` that holds tensors and plain types only, on the CPU; code in it is not run.

    Args:
        path: the file.
        complaint: what to tell the user where it cannot be read.

    Raises:
        CheckpointError: the complaint.
    """
    try:
        with warnings.catch_warnings():
            for message in ("Detected pickle protocol", "Validating sparse tensor"):  # of a foreign file
                warnings.filterwarnings("ignore", message=message)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can lead to any
        raise CheckpointError(complaint) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint, without running code from it.

    Raises:
        CheckpointError: the file is damaged, or is no checkpoint.
    """
    checkpoint = read_plain(
        path, f"--ckpt_path {path} is truncated, damaged, or no checkpoint at all: give best, last or another file."
    )
    # The version is what Lightning asks for first.
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        raise CheckpointError(
            f"--ckpt_path {path} is no checkpoint of a training, as it lacks state_dict or pytorch-lightning_version: "
            "give best, last or another file."
        )
    for name in _KINDS.keys() & checkpoint.keys():
        kept = checkpoint[name]
        if not isinstance(kept, _KINDS[name]) or (isinstance(kept, int) and not 0 <= kept < 2**63):
            raise was_changed(path, f"{name} is {str(kept)[:40]!r}")
    return checkpoint


def was_changed(path: Path, what: str) -> CheckpointError:
    """The error for a checkpoint that holds what no training has written.

    Args:
        path: the file.
        what: is wrong with it.
    """
    what = " ".join(what.split())
    return CheckpointError(
        f"--ckpt_path {path} was changed or is damaged, as its {what}: give best, last or another file."
    )


def check_fits(checkpoint: dict[str, Any], module: nn.Module, path: Path, option: str = "--ckpt_path ") -> None:
    """Check that a checkpoint holds the weights of this very network.

    Args:
        checkpoint: what the file holds.
        module: what is to get the weights.
        path: the file.
        option: what stands before the file where the user named it.

    Raises:
        CheckpointError: names the first weight that does not fit.
    """
    # In checkpoints of version 0.1 the network stood inside learn2learn's wrapper; they load as they are.
    held = {
        str(name).replace("learner.module.", "learner.network."): kept
        for name, kept in checkpoint["state_dict"].items()
    }
    wanted = module.state_dict()
    for name in [*wanted, *held]:
        have, need = (
            tuple(getattr(state[name], "shape", ())) if name in state else "missing" for state in (held, wanted)
        )
        if have != need:
            raise CheckpointError(
                f"{option}{path} was made for another network: {name} is {have} in the checkpoint and {need} in "
                "model.network. Use the config that it was trained with, or another checkpoint."
            )
        kept = held[name]
        if not (
            isinstance(kept, Tensor)
            and kept.layout is torch.strided
            and not kept.is_meta
            and bool(torch.isfinite(kept).all())
        ):
            raise CheckpointError(f"{option}{path} is of no use: not all values of {name} are finite numbers.")
        if kept.is_floating_point() != wanted[name].is_floating_point():
            raise CheckpointError(f"{option}{path} is of no use: {name} is of type {kept.dtype}.")


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
    kept, there = (
        [len(group["params"]) for group in groups] for groups in (states[0]["param_groups"], optimizer.param_groups)
    )
    if kept != there:
        raise CheckpointError(
            f"--ckpt_path {path} has the moments of {sum(kept)} weights, but {sum(there)} learn now: set model.freeze, "
            "model.network and model.algorithm to those that it was trained with, or give another checkpoint."
        )
    # A schedule adds its own entry.
    lacking = set(optimizer.param_groups[0]) - set(states[0]["param_groups"][0]) - {"initial_lr"}
    if lacking:
        raise CheckpointError(
            f"--ckpt_path {path} was made with another meta-optimizer: it has no {', '.join(sorted(lacking))}. Set "
            "model.meta_optimizer to the one that it was trained with, or give another checkpoint."
        )
