"""A trained network in a user's hands: adapted to samples of their own, asked, kept, served and exported.

Names are imported on first use: the help of `dmaml adapt` must not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmaml_pl.adapting.learner import AdaptedLearner, FewShotLearner
    from dmaml_pl.adapting.loading import load, load_adapted

_HOMES = {
    "AdaptedLearner": "dmaml_pl.adapting.learner",
    "FewShotLearner": "dmaml_pl.adapting.learner",
    "load": "dmaml_pl.adapting.loading",
    "load_adapted": "dmaml_pl.adapting.loading",
}

__all__ = ["AdaptedLearner", "FewShotLearner", "load", "load_adapted"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
