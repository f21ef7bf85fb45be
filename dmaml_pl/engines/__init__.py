"""How a meta-batch is executed."""

from dmaml_pl.engines.base import AdaptationCurve, Backward, Engine, EngineName, MetaOutcome
from dmaml_pl.engines.choose import CompileSetting, EngineChoice
from dmaml_pl.engines.learn2learn import Learn2LearnEngine
from dmaml_pl.engines.native import NativeEngine
from dmaml_pl.engines.per_task import PerTaskEngine
from dmaml_pl.engines.vectorized import VectorizedEngine

__all__ = [
    "AdaptationCurve",
    "Backward",
    "CompileSetting",
    "Engine",
    "EngineChoice",
    "EngineName",
    "Learn2LearnEngine",
    "MetaOutcome",
    "NativeEngine",
    "PerTaskEngine",
    "VectorizedEngine",
]
