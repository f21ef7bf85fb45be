"""A trained network as it is handed on: weights as safetensors, which no reader has to trust, and how it is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmaml_pl.errors import CheckpointError, ConfigError

WEIGHTS = "model.safetensors"
"""The file in the folder of an exported network."""

_ABOUT = "dmaml_pl"
_KEPT = ("config", "shapes", "scaling")
"""Of a checkpoint, beside the weights; the rest is for going on with the training."""


def require_own(folder: Path) -> None:
    """Check that a folder is not there, is empty, or holds an exported network.

    Raises:
        ConfigError: it holds something else.
    """
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / WEIGHTS).is_file())):
        raise ConfigError(f"{folder} is there, and holds something else than an exported network: give another FOLDER.")


def write_weights(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Write what a checkpoint holds of its network, without what only a training needs.

    Paths in the configuration are cut to their names: they are of this machine.

    Raises:
        ConfigError: safetensors is not installed.
    """
    tensors = {name: value.detach().clone().contiguous() for name, value in checkpoint["state_dict"].items()}
    about = {name: _without_folders(checkpoint.get(name)) for name in _KEPT}
    _, library = _libraries()
    library.save_file(tensors, file, metadata={"format": "pt", _ABOUT: json.dumps(about)})


def read_weights(file: Path) -> dict[str, Any]:
    """What `write_weights` has written, as a checkpoint holds it.

    Raises:
        ConfigError: safetensors is not installed.
        CheckpointError: the file is damaged, or is of something else.
    """
    library, _ = _libraries()
    try:
        with library.safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get(_ABOUT, "null"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, library.SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated, damaged, or holds no safetensors: export it again.") from error
    if not isinstance(about, dict):
        raise CheckpointError(f"{file} was not written by dmaml export, and does not say what network it is of.")
    return about | {"state_dict": weights}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _libraries() -> tuple[Any, Any]:
    """safetensors, and its part for PyTorch."""
    try:
        import safetensors.torch  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError("This needs safetensors, which is not installed: pip install 'dmaml_pl[hub]'.") from error
    return safetensors, safetensors.torch
