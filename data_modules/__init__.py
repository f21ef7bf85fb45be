"""Where tasks come from: one LightningDataModule a file, all yielding the same `TaskBatch`."""

from data_modules.base import TaskDataModule
from data_modules.glyphs import Glyphs
from data_modules.omniglot import Omniglot
from data_modules.sinusoid import Sinusoid

__all__ = ["Glyphs", "Omniglot", "Sinusoid", "TaskDataModule"]
