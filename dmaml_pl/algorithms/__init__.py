"""The inner loops, one a file: what adapts to a task, and by which rule."""

from dmaml_pl.algorithms.anil import ANIL, BOIL
from dmaml_pl.algorithms.base import Algorithm, Outcome, Tasks, Weights, gradients
from dmaml_pl.algorithms.inner_optimizers import InnerAdam, InnerMomentum, InnerOptimizer
from dmaml_pl.algorithms.maml import MAML

__all__ = [
    "ANIL",
    "BOIL",
    "MAML",
    "Algorithm",
    "InnerAdam",
    "InnerMomentum",
    "InnerOptimizer",
    "Outcome",
    "Tasks",
    "Weights",
    "gradients",
]
