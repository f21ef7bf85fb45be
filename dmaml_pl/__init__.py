"""Model-Agnostic Meta-Learning on PyTorch Lightning, trained by parallel workers (DMAML).

Public names are imported on first use, because PyTorch and Lightning take seconds to load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dmaml_pl.checks import require_platform
from dmaml_pl.launching import lean_imports

__version__ = "0.1.0"

lean_imports.install()

if TYPE_CHECKING:
    from data_modules import (
        CIFARFS,
        FC100,
        AntDirection,
        Glyphs,
        GymnasiumTasks,
        HalfCheetahDirection,
        HalfCheetahVelocity,
        ImageFolder,
        MiniImageNet,
        Navigation2D,
        Omniglot,
        Sinusoid,
        Tabular,
        TabularClasses,
        TaskDataModule,
        TieredImageNet,
    )
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
    from dmaml_pl.checkpoints import RunCheckpoint
    from dmaml_pl.cli.fitting import fit
    from dmaml_pl.cli.result import TrainingResult
    from dmaml_pl.console.progress import RunProgress
    from dmaml_pl.errors import CheckpointError, ConfigError, DataError, DmamlError
    from dmaml_pl.evaluation.predictions import PredictionWriter
    from dmaml_pl.evaluation.report import MetaTestReport
    from dmaml_pl.modules import MetaLearning
    from dmaml_pl.networks import MLP, Backbone, ContextConv4, ContextMLP, Conv4, LoRA, ResNet12
    from dmaml_pl.objectives import Classification, Objective, Regression
    from dmaml_pl.optimizers import Epochs, TrustRegion
    from dmaml_pl.policies import CategoricalMLP, CategoricalPolicy, GaussianMLP, GaussianPolicy, PolicyGradient
    from dmaml_pl.rollouts.data import EnvironmentDataModule
    from dmaml_pl.rollouts.environments import Environments
    from dmaml_pl.simulation.strategy import SimulatedStrategy
    from dmaml_pl.strategies import (
        DMAMLStrategy,
        MeanMerge,
        MergedAverage,
        MergeRule,
        OuterOptimizerMerge,
        TaskParallelStrategy,
        TaskWeightedMerge,
        ValidationWeightedMerge,
    )
    from dmaml_pl.tasks import Samples, TaskBatch
    from dmaml_pl.tracking.tracker import MLflowTracker

_NAMES: dict[str, tuple[str, ...]] = {
    "data_modules": (
        "AntDirection",
        "CIFARFS",
        "FC100",
        "Glyphs",
        "GymnasiumTasks",
        "HalfCheetahDirection",
        "HalfCheetahVelocity",
        "ImageFolder",
        "MiniImageNet",
        "Navigation2D",
        "Omniglot",
        "Sinusoid",
        "Tabular",
        "TabularClasses",
        "TaskDataModule",
        "TieredImageNet",
    ),
    "dmaml_pl.checkpoints": ("RunCheckpoint",),
    "dmaml_pl.console.progress": ("RunProgress",),
    "dmaml_pl.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DmamlError",
    ),
    "dmaml_pl.evaluation.predictions": ("PredictionWriter",),
    "dmaml_pl.evaluation.report": ("MetaTestReport",),
    "dmaml_pl.rollouts.data": ("EnvironmentDataModule",),
    "dmaml_pl.rollouts.environments": ("Environments",),
    "dmaml_pl.tasks": (
        "Samples",
        "TaskBatch",
    ),
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
    "dmaml_pl.cli.fitting": ("fit",),
    "dmaml_pl.cli.result": ("TrainingResult",),
    "dmaml_pl.modules": ("MetaLearning",),
    "dmaml_pl.networks": ("Backbone", "ContextConv4", "ContextMLP", "Conv4", "LoRA", "MLP", "ResNet12"),
    "dmaml_pl.objectives": ("Classification", "Objective", "Regression"),
    "dmaml_pl.optimizers": ("Epochs", "TrustRegion"),
    "dmaml_pl.policies": ("CategoricalMLP", "CategoricalPolicy", "GaussianMLP", "GaussianPolicy", "PolicyGradient"),
    "dmaml_pl.simulation.strategy": ("SimulatedStrategy",),
    "dmaml_pl.tracking.tracker": ("MLflowTracker",),
}

__all__ = [
    "ALFA",
    "ANIL",
    "BOIL",
    "CAVIA",
    "CIFARFS",
    "FC100",
    "IMAML",
    "KFO",
    "LSLR",
    "MAML",
    "MLP",
    "PMF",
    "AdaptedLearner",
    "AdaptedPolicy",
    "Algorithm",
    "AntDirection",
    "Backbone",
    "CategoricalMLP",
    "CategoricalPolicy",
    "CheckpointError",
    "Classification",
    "ConfigError",
    "ContextConv4",
    "ContextMLP",
    "Conv4",
    "DMAMLStrategy",
    "DataError",
    "DmamlError",
    "EnvironmentDataModule",
    "Environments",
    "Epochs",
    "FewShotLearner",
    "GaussianMLP",
    "GaussianPolicy",
    "Glyphs",
    "GymnasiumTasks",
    "HalfCheetahDirection",
    "HalfCheetahVelocity",
    "ImageFolder",
    "InnerAdam",
    "InnerMomentum",
    "InnerScales",
    "LoRA",
    "MAMLPlusPlus",
    "MLflowTracker",
    "MeanMerge",
    "MergeRule",
    "MergedAverage",
    "MetaCurvature",
    "MetaLearning",
    "MetaSGD",
    "MetaTestReport",
    "MiniImageNet",
    "Navigation2D",
    "Objective",
    "Omniglot",
    "OuterOptimizerMerge",
    "PolicyGradient",
    "PredictionWriter",
    "ProtoMAML",
    "ProtoNet",
    "Regression",
    "Reptile",
    "ResNet12",
    "RunCheckpoint",
    "RunProgress",
    "Samples",
    "SimulatedStrategy",
    "Sinusoid",
    "Tabular",
    "TabularClasses",
    "TaskBatch",
    "TaskDataModule",
    "TaskParallelStrategy",
    "TaskWeightedMerge",
    "TieredImageNet",
    "TrainingResult",
    "TrustRegion",
    "ValidationWeightedMerge",
    "fit",
    "load",
    "load_adapted",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_platform()
    strategies = importlib.import_module("dmaml_pl.strategies")  # always: Lightning then knows them by their names
    home = next((home for home, names in _NAMES.items() if name in names), None)
    return getattr(importlib.import_module(home) if home else strategies, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
