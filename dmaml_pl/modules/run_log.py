"""What a training writes down: one place that names the metrics.

Training figures come a run at a time and are averaged over `trainer.log_every_n_steps` meta-iterations, so that a long
run is a few rows and not H. Every step is a number of meta-iterations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmaml_pl.evaluation.curves import TaskScores, half_width, join
from dmaml_pl.runs import RunReport

if TYPE_CHECKING:
    from dmaml_pl.modules.few_shot import FewShotModule


def log_run(module: FewShotModule, report: RunReport) -> None:
    """Log a merged run: `train/...` per meta-iteration, each worker's own loss, and the merge."""
    trainer = module.trainer
    end = report.get("end", trainer.global_step)
    for name, values in report["series"].items():
        _log_windows(module, f"train/{name}", values, end)
        for worker, own in enumerate(report.get("workers", {}).get(name, ())):
            _log_windows(module, f"train/{name}_worker_{worker}", own, end)
    metrics = {
        "train/run": module.runs_done,
        "train/tasks_seen": module.tasks_seen,
        "train/tasks_per_second": report["tasks"] / max(report["seconds"], 1e-9),
        "train/run_seconds": report["seconds"],
        "train/run_cpu_seconds": report["cpu_seconds"],
        "train/meta_lr": _learning_rate(module),
        **report.get("merge", {}),
    }
    _log(module, metrics, end)


def log_evaluation(module: FewShotModule, stage: str, scores: list[TaskScores]) -> None:
    """Log validation or test: the mean after each adaptation step, and after the steps of training for callbacks."""
    loss, metric = join(scores)
    steps, name = module.algorithm.steps, module.objective.metric
    summary = {f"{stage}/loss": loss[:, steps].mean(), f"{stage}/{name}": metric[:, steps].mean()}
    curve = {f"{stage}/{name}_step_{step}": value for step, value in enumerate(metric.mean(dim=0))}
    module.log_dict(summary | curve, logger=False, sync_dist=True)
    widths = {f"{stage}/{name}_ci95": half_width(metric)[steps]}
    _log(module, {key: float(value) for key, value in (summary | curve | widths).items()}, module.meta_iterations)


def _log_windows(module: FewShotModule, name: str, values: Tensor, end: int) -> None:
    """Log means over windows of a run's (H,) figures; the windows lie on multiples of `log_every_n_steps`."""
    every = max(int(module.trainer.log_every_n_steps), 1)  # type: ignore[attr-defined]
    steps = torch.arange(end - len(values) + 1, end + 1)
    windows = (steps - 1) // every
    for window in windows.unique():
        inside = windows == window
        _log(module, {name: float(values[inside].mean())}, int(steps[inside][-1]))


def _learning_rate(module: FewShotModule) -> float:
    return float(module.trainer.optimizers[0].param_groups[0]["lr"])


def _log(module: FewShotModule, metrics: dict[str, float], step: int) -> None:
    if module.trainer.is_global_zero:
        for logger in module.loggers:
            logger.log_metrics(metrics, step=step)
