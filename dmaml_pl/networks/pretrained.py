"""Weights from files of other trainings."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmaml_pl.errors import ConfigError

_WITHIN = ("state_dict", "model")
"""Under which of these, if any, a file keeps the tensors."""


def load_weights(network: nn.Module, file: str, setting: str) -> None:
    """Put the tensors of a file, by their names, into a network; what it has no name for is left out.

    Args:
        network: gets them.
        file: safetensors, or a state dict as `torch.save` writes it.
        setting: the name under which the user gave the file.

    Raises:
        ConfigError: the file is missing, cannot be read, or does not hold every weight of the network.
    """
    held = {name: value for name, value in _read(Path(file), setting).items() if isinstance(value, Tensor)}
    wanted = network.state_dict()
    fitting = {name: held[name] for name, own in wanted.items() if name in held and held[name].shape == own.shape}
    # Files of before PyTorch 0.4.1 lack it, and nothing here reads it.
    missing = [name for name in wanted if name not in fitting and not name.endswith("num_batches_tracked")]
    if missing:
        name = missing[0]
        have = f"of shape {tuple(held[name].shape)} there" if name in held else "not there"
        raise ConfigError(
            f"{setting} is {file}, which has {len(fitting)} of the {len(wanted)} tensors of "
            f"{type(network).__name__}: {name}, of shape {tuple(wanted[name].shape)}, is {have}. Give a file of the "
            "same model."
        )
    network.load_state_dict(fitting, strict=False)


def _read(path: Path, setting: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{setting} is {path}, but there is no such file: give one of weights, or 'pretrained'.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, setting)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise _unreadable(path, setting, "no file of torch.save, or it holds more than tensors") from error
    for name in _WITHIN:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise _unreadable(path, setting, "it holds no tensors by name")
    return content


def _read_safetensors(path: Path, setting: str) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError  # noqa: PLC0415 - an extra
        from safetensors.torch import load_file  # noqa: PLC0415 - rarely needed
    except ImportError as error:
        raise ConfigError(
            f"{setting} is {path}, but safetensors is not installed: pip install 'dmaml_pl[timm]'."
        ) from error
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, setting, str(error).splitlines()[0].rstrip(".")) from error


def _unreadable(path: Path, setting: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{setting} is {path}, which cannot be read ({reason}): give a file of safetensors or torch.save."
    )
