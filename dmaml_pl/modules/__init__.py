"""The LightningModule of meta-learning."""

from dmaml_pl.modules.meta_learning import MetaLearning

__all__ = ["MetaLearning"]
