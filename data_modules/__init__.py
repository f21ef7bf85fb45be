"""Where tasks come from: one LightningDataModule a file, all yielding the same `TaskBatch`."""

from data_modules.ant import AntDirection
from data_modules.cifar100 import CIFARFS, FC100
from data_modules.glyphs import Glyphs
from data_modules.gymnasium_tasks import GymnasiumTasks
from data_modules.half_cheetah import HalfCheetahDirection, HalfCheetahVelocity
from data_modules.image_folder import ImageFolder
from data_modules.mini_imagenet import MiniImageNet
from data_modules.navigation2d import Navigation2D
from data_modules.omniglot import Omniglot
from data_modules.sinusoid import Sinusoid
from data_modules.tabular import Tabular
from data_modules.tabular_classes import TabularClasses
from data_modules.tiered_imagenet import TieredImageNet
from dmaml_pl.data import TaskDataModule

__all__ = [
    "CIFARFS",
    "FC100",
    "AntDirection",
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
]
