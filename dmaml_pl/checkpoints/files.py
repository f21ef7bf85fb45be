"""Files that are there whole or not at all, whenever the process that writes them is killed.

Lightning writes to a file in the system's folder for temporary files and moves it, which is a copy where that folder
lies on another disk; a process that is killed in the middle of the copy leaves half a checkpoint, and no whole one.
"""

import contextlib
import errno
import io
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning_fabric.plugins.io import TorchCheckpointIO
from lightning_fabric.utilities.types import _PATH

from dmaml_pl.errors import CheckpointError

PARTIAL = ".partial"
"""Ending of a file that is being written, which no search for checkpoints takes for one."""

REMEDY = "Make room, or set checkpoint.dirpath to a folder that can be written, and go on with --ckpt_path last."
"""What to do where a training's checkpoint cannot be written."""


def write_whole(content: Any, path: Path, remedy: str = REMEDY) -> None:
    """Save `content` with `torch.save`; what stood at `path` before stays until the new file is safe on the disk.

    Args:
        content: tensors and plain types.
        path: the file.
        remedy: what the user can do where that fails.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written; what stood there before is intact.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    try:
        if path.exists() and not path.is_file():  # a device, which would be one no more
            raise FileExistsError(errno.EEXIST, "something else than a file is there")
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        with contextlib.suppress(OSError):  # a rename then survives a loss of power, where the system knows how
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error.strerror}). The one before is kept. {remedy}"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine have left half-written in a folder."""
    for partial in folder.glob(f".*{PARTIAL}"):
        host, _, process = partial.name.removesuffix(PARTIAL).rpartition(".")
        if host.endswith(socket.gethostname()) and process.isdigit() and not psutil.pid_exists(int(process)):
            partial.unlink(missing_ok=True)


class WholeFileIO(TorchCheckpointIO):
    """Lightning's way to write checkpoints, but whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: it could not be written; the one before is intact.
        """
        if storage_options is not None or "://" in str(path):  # not a disk
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(checkpoint, Path(path))
