"""Tracking a training in MLflow."""
