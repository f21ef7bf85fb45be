"""How workers train together. Importing this makes `--trainer.strategy dmaml` known to Lightning."""

from pytorch_lightning.strategies import StrategyRegistry

from dmaml_pl.strategies.dmaml import DMAMLStrategy
from dmaml_pl.strategies.merge import MeanMerge, MergeRule, TaskWeightedMerge
from dmaml_pl.strategies.outer import OuterOptimizerMerge

__all__ = ["DMAMLStrategy", "MeanMerge", "MergeRule", "OuterOptimizerMerge", "TaskWeightedMerge"]

if "dmaml" not in StrategyRegistry:
    StrategyRegistry.register("dmaml", DMAMLStrategy, "Workers make runs alone; their weights merge at each run's end.")
