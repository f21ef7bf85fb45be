"""How workers train together. Importing this makes `--trainer.strategy dmaml` known to Lightning."""

from pytorch_lightning.strategies import StrategyRegistry

from dmaml_pl.strategies.dmaml import DMAMLStrategy
from dmaml_pl.strategies.merge import MeanMerge, MergeRule

__all__ = ["DMAMLStrategy", "MeanMerge", "MergeRule"]

if "dmaml" not in StrategyRegistry:
    StrategyRegistry.register("dmaml", DMAMLStrategy, "Workers make runs alone; their weights merge at each run's end.")
