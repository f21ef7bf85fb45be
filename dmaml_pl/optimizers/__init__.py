"""Meta-optimizers that ask more of a meta-iteration than a gradient."""

from dmaml_pl.optimizers.epochs import Epochs
from dmaml_pl.optimizers.problem import AskingOptimizer, Problem
from dmaml_pl.optimizers.trust_region import TrustRegion

__all__ = ["AskingOptimizer", "Epochs", "Problem", "TrustRegion"]
