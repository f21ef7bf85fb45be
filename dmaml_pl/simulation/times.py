"""Measures what a time model starts from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from dmaml_pl.runs import RunClock


class MetaIterationTimes(pl.Callback):
    """Writes the seconds that worker 0's meta-iterations took into a file (NumPy); not the first, which may compile.

    Seconds on a core, as `RunClock` counts them: what else this machine does is not in them.

    Args:
        file: where.
    """

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        self._seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A run begins."""
        self._clock, self._last = RunClock(), 0.0

    def on_meta_iteration_end(self, *_: Any) -> None:
        """One more."""
        now = self._clock.cpu_seconds()
        self._seconds.append(now - self._last)
        self._last = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write them."""
        if trainer.is_global_zero:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            np.save(self._file, np.array(self._seconds[1:] or self._seconds))
