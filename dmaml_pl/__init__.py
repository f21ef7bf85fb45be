"""Model-Agnostic Meta-Learning on PyTorch Lightning, trained by parallel workers (DMAML).

Public names are imported on first use, because PyTorch and Lightning take seconds to load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dmaml_pl.adapting.learner import AdaptedLearner, FewShotLearner
    from dmaml_pl.adapting.loading import load, load_adapted
    from dmaml_pl.algorithms import MAML, Algorithm
    from dmaml_pl.modules import MetaLearning
    from dmaml_pl.networks import MLP, Conv4
    from dmaml_pl.objectives import Objective
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

_HOMES = {
    "load": "dmaml_pl.adapting.loading",
    "load_adapted": "dmaml_pl.adapting.loading",
    "AdaptedLearner": "dmaml_pl.adapting.learner",
    "FewShotLearner": "dmaml_pl.adapting.learner",
    "Algorithm": "dmaml_pl.algorithms",
    "MAML": "dmaml_pl.algorithms",
    "MetaLearning": "dmaml_pl.modules",
    "Objective": "dmaml_pl.objectives",
    "MLP": "dmaml_pl.networks",
    "Conv4": "dmaml_pl.networks",
    "DMAMLStrategy": "dmaml_pl.strategies",
    "MeanMerge": "dmaml_pl.strategies",
    "MergedAverage": "dmaml_pl.strategies",
    "OuterOptimizerMerge": "dmaml_pl.strategies",
    "TaskParallelStrategy": "dmaml_pl.strategies",
    "TaskWeightedMerge": "dmaml_pl.strategies",
    "ValidationWeightedMerge": "dmaml_pl.strategies",
    "MLflowTracker": "dmaml_pl.tracking.tracker",
}

__all__ = [
    "MAML",
    "MLP",
    "AdaptedLearner",
    "Algorithm",
    "Conv4",
    "DMAMLStrategy",
    "FewShotLearner",
    "MLflowTracker",
    "MeanMerge",
    "MergedAverage",
    "MetaLearning",
    "Objective",
    "OuterOptimizerMerge",
    "TaskParallelStrategy",
    "TaskWeightedMerge",
    "ValidationWeightedMerge",
    "load",
    "load_adapted",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("dmaml_pl.strategies")  # makes the strategy known to Lightning by its name
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
