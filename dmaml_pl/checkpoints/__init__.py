"""Checkpoints at the ends of runs: written whole or not at all, found again, and checked before they are used."""

from dmaml_pl.checkpoints.callback import RunCheckpoint
from dmaml_pl.checkpoints.lookup import CONFIG_KEY, check_fits, check_resumable, find_checkpoint, read_checkpoint

__all__ = ["CONFIG_KEY", "RunCheckpoint", "check_fits", "check_resumable", "find_checkpoint", "read_checkpoint"]
