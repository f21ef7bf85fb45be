"""LightningModules: supervised few-shot learning."""

from dmaml_pl.modules.few_shot import FewShotModule
from dmaml_pl.modules.maml import MAML

__all__ = ["MAML", "FewShotModule"]
