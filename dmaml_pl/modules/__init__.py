"""LightningModules: supervised few-shot learning."""

from dmaml_pl.modules.maml import MAML
from dmaml_pl.modules.meta_learning import FewShotModule

__all__ = ["MAML", "FewShotModule"]
