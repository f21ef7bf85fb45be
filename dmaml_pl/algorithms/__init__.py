"""The inner loops, one a file: what adapts to a task, and by which rule."""

from dmaml_pl.algorithms.base import Algorithm, Outcome, Tasks, Weights, gradients
from dmaml_pl.algorithms.maml import MAML

__all__ = ["MAML", "Algorithm", "Outcome", "Tasks", "Weights", "gradients"]
