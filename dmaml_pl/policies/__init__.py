"""Policies of reinforcement learning: networks that give a distribution of actions, and what they are trained by."""

from dmaml_pl.policies.networks import CategoricalMLP, CategoricalPolicy, GaussianMLP, GaussianPolicy
from dmaml_pl.policies.objective import PolicyGradient

__all__ = ["CategoricalMLP", "CategoricalPolicy", "GaussianMLP", "GaussianPolicy", "PolicyGradient"]
