"""Views of an experiment for MLflow's UI: a table of its trainings, and their curves over runs, tasks or steps taken.

MLflow keeps a view that somebody shares as a tag of the experiment, and shows it at an address with the view's key. A
view of ours sets the horizontal axis of all charts, and shows the losses and the metric of validation first; clearing
the search above the charts shows all.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

ENV_STEPS = "train/env_steps"
"""What only trainings in environments have."""

VIEWS = {"by-run": "train/run", "by-tasks": "train/tasks_seen", "by-env-steps": ENV_STEPS}
"""Metric on the horizontal axis, by the view's key."""

TABLE = "table"
"""Key of the view of all trainings as a table, with what they came to and their main settings."""

_COLUMNS = {
    "metrics": [f"{stage}/{metric}" for metric in ("mse", "accuracy", "return") for stage in ("val", "test")],
    "params": [
        "model.algorithm",  # of a training from Python
        "model.algorithm.class_path",
        "model.algorithm.inner_lr",
        "model.algorithm.inner_steps",
        "data.shots",
        "data.meta_batch",
        "trainer.devices",
        "trainer.strategy.run_length",
        "trainer.max_steps",
    ],
}
"""Of these the UI shows what an experiment has."""

_TAG = "mlflow.sharedViewState."
_KIND = "mlflow.experimentKind"
_SHOWN = r"^(train/loss|val/(?!.*_(step_|ci95)).*)$"


def add_views(client: MlflowClient, experiment: Experiment) -> None:
    """Give an experiment the views that it lacks; a user may have changed one, which then stays.

    And say that it is one of trainings, or MLflow shows the pages of generative AI first.
    """
    if _KIND not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, _KIND, "custom_model_development")
    for key, metric in VIEWS.items():
        if _TAG + key not in experiment.tags:
            axis = {"xAxisKey": "metric", "selectedXAxisMetricKey": metric, "lineSmoothness": 0}
            state = json.dumps({"globalLineChartConfig": axis, "chartsSearchFilter": _SHOWN})
            client.set_experiment_tag(experiment.experiment_id, _TAG + key, state)
    if _TAG + TABLE not in experiment.tags:
        columns = [f"{kind}.`{name}`" for kind, names in _COLUMNS.items() for name in names]
        state = json.dumps({"selectedColumns": columns})
        client.set_experiment_tag(experiment.experiment_id, _TAG + TABLE, state)


def view_page(experiment_id: str, key: str) -> str:
    """Path of a view's curves below the address of the UI."""
    return f"{runs_page(experiment_id)}&compareRunsMode=CHART&viewStateShareKey={key}"


def table_page(experiment_id: str, tags: set[str]) -> str:
    """Path of the table of an experiment's trainings; without our columns where its tags have them not."""
    return runs_page(experiment_id) + f"&viewStateShareKey={TABLE}" * (_TAG + TABLE in tags)


def runs_page(experiment_id: str) -> str:
    """Path of an experiment's trainings."""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
