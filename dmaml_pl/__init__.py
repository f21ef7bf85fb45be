"""Model-Agnostic Meta-Learning on PyTorch Lightning, trained by parallel workers (DMAML).

Public names are imported on first use, because PyTorch and Lightning take seconds to load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dmaml_pl.adapting.adapted import AdaptedLearner
    from dmaml_pl.adapting.learner import FewShotLearner
    from dmaml_pl.adapting.loading import load, load_adapted
    from dmaml_pl.adapting.policy import AdaptedPolicy
    from dmaml_pl.algorithms import (
        ALFA,
        ANIL,
        BOIL,
        CAVIA,
        IMAML,
        KFO,
        LSLR,
        MAML,
        PMF,
        Algorithm,
        InnerAdam,
        InnerMomentum,
        InnerScales,
        MAMLPlusPlus,
        MetaCurvature,
        MetaSGD,
        ProtoMAML,
        ProtoNet,
        Reptile,
    )
    from dmaml_pl.modules import MetaLearning
    from dmaml_pl.networks import MLP, Backbone, ContextConv4, ContextMLP, Conv4, LoRA, ResNet12
    from dmaml_pl.objectives import Objective
    from dmaml_pl.optimizers import Epochs, TrustRegion
    from dmaml_pl.policies import CategoricalMLP, CategoricalPolicy, GaussianMLP, GaussianPolicy, PolicyGradient
    from dmaml_pl.strategies import (
        DMAMLStrategy,
        MeanMerge,
        MergedAverage,
        OuterOptimizerMerge,
        TaskParallelStrategy,
        TaskWeightedMerge,
        ValidationWeightedMerge,
    )
    from dmaml_pl.tracking.tracker import MLflowTracker

_NAMES = {
    "dmaml_pl.adapting.adapted": ("AdaptedLearner",),
    "dmaml_pl.adapting.learner": ("FewShotLearner",),
    "dmaml_pl.adapting.loading": ("load", "load_adapted"),
    "dmaml_pl.adapting.policy": ("AdaptedPolicy",),
    "dmaml_pl.algorithms": (
        "ALFA",
        "ANIL",
        "Algorithm",
        "BOIL",
        "CAVIA",
        "IMAML",
        "InnerAdam",
        "InnerMomentum",
        "InnerScales",
        "KFO",
        "LSLR",
        "MAML",
        "MAMLPlusPlus",
        "MetaCurvature",
        "MetaSGD",
        "PMF",
        "ProtoMAML",
        "ProtoNet",
        "Reptile",
    ),
    "dmaml_pl.modules": ("MetaLearning",),
    "dmaml_pl.networks": ("Backbone", "ContextConv4", "ContextMLP", "Conv4", "LoRA", "MLP", "ResNet12"),
    "dmaml_pl.objectives": ("Objective",),
    "dmaml_pl.optimizers": ("Epochs", "TrustRegion"),
    "dmaml_pl.policies": ("CategoricalMLP", "CategoricalPolicy", "GaussianMLP", "GaussianPolicy", "PolicyGradient"),
    "dmaml_pl.tracking.tracker": ("MLflowTracker",),
}

__all__ = [
    "ALFA",
    "ANIL",
    "BOIL",
    "CAVIA",
    "IMAML",
    "KFO",
    "LSLR",
    "MAML",
    "MLP",
    "PMF",
    "AdaptedLearner",
    "AdaptedPolicy",
    "Algorithm",
    "Backbone",
    "CategoricalMLP",
    "CategoricalPolicy",
    "ContextConv4",
    "ContextMLP",
    "Conv4",
    "DMAMLStrategy",
    "Epochs",
    "FewShotLearner",
    "GaussianMLP",
    "GaussianPolicy",
    "InnerAdam",
    "InnerMomentum",
    "InnerScales",
    "LoRA",
    "MAMLPlusPlus",
    "MLflowTracker",
    "MeanMerge",
    "MergedAverage",
    "MetaCurvature",
    "MetaLearning",
    "MetaSGD",
    "Objective",
    "OuterOptimizerMerge",
    "PolicyGradient",
    "ProtoMAML",
    "ProtoNet",
    "Reptile",
    "ResNet12",
    "TaskParallelStrategy",
    "TaskWeightedMerge",
    "TrustRegion",
    "ValidationWeightedMerge",
    "load",
    "load_adapted",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    strategies = importlib.import_module("dmaml_pl.strategies")  # always: Lightning then knows them by their names
    home = next((home for home, names in _NAMES.items() if name in names), None)
    return getattr(importlib.import_module(home) if home else strategies, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
