"""What a training writes down: one place that names the metrics.

Training figures come a run at a time and are averaged over `trainer.log_every_n_steps` meta-iterations, so that a long
run is a few rows and not H; each worker's own are averaged over the run. Every step is a number of meta-iterations.
`module` is the `MetaLearning` that trains or is evaluated.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dmaml_pl.evaluation.curves import TaskScores, half_width, join
from dmaml_pl.runs import ENV_STEPS, SAMPLING_SECONDS, RunReport, strategy_of_runs

COUNTED = {ENV_STEPS, SAMPLING_SECONDS}
"""What is logged for a whole run."""

STEP = "step"
"""By this name Lightning finds the step at which loggers are to show what is logged with it."""


def log_run(module: Any, report: RunReport) -> None:
    """Log a merged run: `train/...` per meta-iteration, each worker's own mean, and the merge; a call for each step."""
    trainer = module.trainer
    end = report.get("end", trainer.global_step)
    rows: dict[int, dict[str, float]] = {}
    for name, values in report["series"].items():
        if name in COUNTED:
            continue
        for step, mean in _windows(module, values, end):
            rows.setdefault(step, {})[f"train/{name}"] = mean
    last = rows.setdefault(end, {})
    for name in report["series"].keys() - COUNTED:
        for worker, own in enumerate(report.get("workers", {}).get(name, ())):
            last[f"train/{name}_worker_{worker}"] = float(own.nanmean())
    last |= {
        "train/run": module.runs_done,
        "train/tasks_seen": module.tasks_seen,
        "train/tasks_per_second": report["tasks"] / max(report["seconds"], 1e-9),
        "train/run_seconds": report["seconds"],
        "train/run_cpu_seconds": report["cpu_seconds"],
        "train/meta_lr": _learning_rate(module),
        **report.get("merge", {}),
    }
    if ENV_STEPS in report["series"]:
        last["train/env_steps"] = module.env_steps
        last["train/env_steps_per_second"] = env_steps_of(report) / max(report["seconds"], 1e-9)
        sampling = float(report["series"][SAMPLING_SECONDS].nansum())
        last["train/sampling_share"] = sampling / max(report["seconds"], 1e-9)
    strategy = strategy_of_runs(trainer)
    logs_its_own = strategy is None or not strategy.workers_may_change  # else all log the same
    if logs_its_own and (peak := module.memory.mib()) is not None:
        last["train/peak_memory_mib"] = peak
    for step, metrics in rows.items():
        _log(module, metrics, step)


def env_steps_of(report: RunReport) -> int:
    """Steps in environments that all workers made in a run; 0 in supervised learning."""
    if ENV_STEPS not in report["series"]:
        return 0
    values = report.get("workers", report["series"])[ENV_STEPS]
    return round(float(values.double().nansum()))


def log_evaluation(module: Any, stage: str, scores: list[TaskScores], whose: str = "") -> None:
    """Log validation or test: the mean after each adaptation step, for loggers, callbacks and the Trainer's caller.

    Args:
        module: that was evaluated.
        stage: "val" or "test".
        scores: of one network, from all workers.
        whose: put before the names of the metrics of a network other than the trained one.
    """
    loss, metric = join(scores)
    steps, name = module.algorithm.steps, module.objective.metric
    name = f"{whose}{name}"
    summary = {f"{stage}/{whose}loss": loss[:, steps].mean(), f"{stage}/{name}": metric[:, steps].mean()}
    curve = {f"{stage}/{name}_step_{step}": value for step, value in enumerate(metric.mean(dim=0))}
    widths = {f"{stage}/{name}_ci95": half_width(metric)[steps]}
    # Lightning hands loggers this name as the step; its own count is of runs.
    module.log_dict(summary | curve | widths | {STEP: float(module.meta_iterations)}, sync_dist=True)


def _windows(module: Any, values: Tensor, end: int) -> Iterator[tuple[int, float]]:
    """Last steps and means of windows of a run's (H,) figures; they lie on multiples of `log_every_n_steps`."""
    every = max(int(module.trainer.log_every_n_steps), 1)
    first = start = end - len(values)
    for stop in (*range(first - first % every + every, end, every), end):
        yield stop, float(values[start - first : stop - first].mean())
        start = stop


def _learning_rate(module: Any) -> float:
    return float(module.trainer.optimizers[0].param_groups[0]["lr"])


def _log(module: Any, metrics: dict[str, float], step: int) -> None:
    for logger in module.loggers:
        # Where worker 0 may be lost, every worker keeps in mind what may not have been sent.
        if module.trainer.is_global_zero or getattr(logger, "relay", None) is not None:
            logger.log_metrics(metrics, step=step)
