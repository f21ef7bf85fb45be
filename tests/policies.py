"""Small trainings in environments that tests share."""

from __future__ import annotations

from typing import Any

import torch

from data_modules import Navigation2D
from dmaml_pl import MAML, GaussianMLP, InnerScales, MetaLearning, PolicyGradient, TrustRegion


def small_navigation(**settings: Any) -> Navigation2D:
    """Goals too far to be reached within an episode, so that the number of steps is known."""
    given = {
        "half_width": 3.0,
        "rollouts": 4,
        "horizon": 10,
        "meta_batch": 3,
        "val_tasks": 4,
        "test_tasks": 4,
        "seed": 0,
    }
    return Navigation2D(**(given | settings))


def small_policy(**settings: Any) -> MetaLearning:
    """MAML-TRPO of a small policy."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "objective": PolicyGradient(),
        "meta_optimizer": lambda params: TrustRegion(params, max_kl=0.02),
        "evaluation_steps": 2,
        "run_length": 1,
        "compile": False,
    }
    algorithm = MAML(inner_lr=0.1, inner_optimizer=InnerScales([1.0, 0.5]))
    return MetaLearning(GaussianMLP(2, 2, hidden=[8]), algorithm, **(given | settings))
