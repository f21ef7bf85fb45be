"""How workers train together. Importing this makes `dmaml` and `task_parallel` known to Lightning."""

from pytorch_lightning.strategies import StrategyRegistry

from dmaml_pl.strategies.average import MergedAverage
from dmaml_pl.strategies.dmaml import DMAMLStrategy
from dmaml_pl.strategies.merge import MeanMerge, MergeRule, TaskWeightedMerge, ValidationWeightedMerge
from dmaml_pl.strategies.outer import OuterOptimizerMerge
from dmaml_pl.strategies.strategy import WorkerStrategy
from dmaml_pl.strategies.task_parallel import TaskParallelStrategy

__all__ = [
    "DMAMLStrategy",
    "MeanMerge",
    "MergeRule",
    "MergedAverage",
    "OuterOptimizerMerge",
    "TaskParallelStrategy",
    "TaskWeightedMerge",
    "ValidationWeightedMerge",
    "WorkerStrategy",
]

for _strategy in (TaskParallelStrategy, DMAMLStrategy):
    StrategyRegistry.register(_strategy.strategy_name, _strategy, override=True)
