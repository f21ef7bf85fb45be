"""Tracking a training in MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmaml_pl.tracking.tracker import MLflowTracker

__all__ = ["MLflowTracker"]


def __getattr__(name: str) -> type[MLflowTracker]:
    # The tracker needs PyTorch and Lightning, whose import takes seconds; the UI beside it must not wait for them.
    if name != "MLflowTracker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dmaml_pl.tracking.tracker import MLflowTracker  # noqa: PLC0415

    return MLflowTracker
