"""Tracking a training in MLflow."""

from dmaml_pl.tracking.tracker import MLflowTracker

__all__ = ["MLflowTracker"]
