"""The inner loops, one a file: what adapts to a task, and by which rule."""

from dmaml_pl.algorithms.base import Algorithm, Learner, Weights
from dmaml_pl.algorithms.maml import MAMLRule

__all__ = ["Algorithm", "Learner", "MAMLRule", "Weights"]
