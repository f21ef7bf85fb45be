"""Evaluating an average of the merged weights instead of the last ones.

Legend: P floating-point values of the network.
"""

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from dmaml_pl.errors import ConfigError


class MergedAverage(WeightAveraging):
    """Validates, tests and keeps an exponential moving average of the merged weights; training goes on from the last.

    After each merge a = a + (1 - decay) * (w - a), with w the merged weights, beginning with the first merge's
    (Polyak and Juditsky 1992, in the form of Tarvainen and Valpola 2017, arXiv:1703.01780). The average is what
    validation evaluates and what `best.ckpt` and `last.ckpt` hold as the network; the weights that training goes on
    from are beside it in the file. A callback of Lightning's does the work; a Lightning batch is a run here.

    Args:
        decay: how much of the average stays at each merge, from 0 to below 1; it looks back about 1 / (1 - decay) runs.

    Raises:
        ConfigError: `decay` is out of its range.

    Examples:
        >>> trainer = pl.Trainer(callbacks=[MergedAverage(decay=0.8)], logger=False, max_steps=100)
        >>> trainer.max_steps
        100
    """

    def __init__(self, decay: float = 0.8) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"MergedAverage's decay is {decay}, but must be at least 0 and below 1.")
        super().__init__(avg_fn=partial(_towards, share=1 - decay))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the last weights where they are until the last checkpoint, which comes after this, has them."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End with the average as the network."""
        super().on_train_end(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take both sets of weights back when training goes on; a test needs the average only, which is the network."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep both sets of weights."""
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)


def _towards(average: Tensor, merged: Tensor, _: Any, *, share: float) -> Tensor:
    """The average, moved by a share of the way; where both are equal, as of frozen weights, it keeps its bits."""
    return torch.lerp(average, merged, share) if merged.is_floating_point() else merged
