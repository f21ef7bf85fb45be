"""The inner loops, one a file: what adapts to a task, and by which rule."""

from dmaml_pl.algorithms.alfa import ALFA
from dmaml_pl.algorithms.anil import ANIL, BOIL
from dmaml_pl.algorithms.base import Algorithm, Outcome, Tasks, Weights, gradients
from dmaml_pl.algorithms.cavia import CAVIA
from dmaml_pl.algorithms.gradient_transform import GradientTransform
from dmaml_pl.algorithms.imaml import IMAML
from dmaml_pl.algorithms.inner_optimizers import InnerAdam, InnerMomentum, InnerOptimizer, InnerScales
from dmaml_pl.algorithms.kfo import KFO
from dmaml_pl.algorithms.learned_step import LearnedStep
from dmaml_pl.algorithms.lslr import LSLR
from dmaml_pl.algorithms.maml import MAML
from dmaml_pl.algorithms.maml_plus_plus import MAMLPlusPlus
from dmaml_pl.algorithms.meta_curvature import MetaCurvature
from dmaml_pl.algorithms.meta_sgd import MetaSGD
from dmaml_pl.algorithms.pmf import PMF
from dmaml_pl.algorithms.proto import ProtoMAML, ProtoNet
from dmaml_pl.algorithms.reptile import Reptile

__all__ = [
    "ALFA",
    "ANIL",
    "BOIL",
    "CAVIA",
    "IMAML",
    "KFO",
    "LSLR",
    "MAML",
    "PMF",
    "Algorithm",
    "GradientTransform",
    "InnerAdam",
    "InnerMomentum",
    "InnerOptimizer",
    "InnerScales",
    "LearnedStep",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaSGD",
    "Outcome",
    "ProtoMAML",
    "ProtoNet",
    "Reptile",
    "Tasks",
    "Weights",
    "gradients",
]
