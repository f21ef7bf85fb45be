"""Shows a meta-test: a table on the terminal, and figures as PNG files and MLflow artifacts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dmaml_pl.evaluation.curves import MetaTest
from dmaml_pl.evaluation.figures import draw_adaptation_curve, draw_image_tasks, draw_regression_tasks


class MetaTestReport(pl.Callback):
    """Prints and draws what `dmaml test` found.

    Args:
        folder: where the figures go; by default `figures` beside the training's checkpoints.
        tasks: tasks to draw.
    """

    def __init__(self, folder: str | None = None, tasks: int = 4) -> None:
        self.folder = folder
        self.tasks = tasks

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Worker 0 reports; the others wait for nothing."""
        result = getattr(pl_module, "meta_test", None)
        if not trainer.is_global_zero or result is None:
            return
        print_table(result)
        folder = self._folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "adaptation_curve.png", folder / "meta_test.json"]
        draw_adaptation_curve(result, files[0])
        rows = [result.row(step) for step in range(result.steps + 1)]
        files[1].write_text(
            json.dumps({"metric": result.objective.metric, "tasks": result.tasks, "steps": rows}, indent=1) + "\n"
        )
        files += self._draw_tasks(trainer, pl_module, result, folder)
        for logger in trainer.loggers:
            log_artifact = getattr(logger, "log_artifact", None)
            if log_artifact is not None:
                for file in files:
                    log_artifact(file, "figures")
        print("\nFigures, also in MLflow:", *(f"  {_shown(file)}" for file in files if file.suffix == ".png"), sep="\n")
        for logger in trainer.loggers:
            command = getattr(logger, "ui_command", None)
            if command is not None:
                print(f"\nSee this training in MLflow:\n  {command()}\n", flush=True)

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        checkpoint = getattr(trainer.checkpoint_callback, "dirpath", None)
        return Path(checkpoint).parent / "figures" if checkpoint else Path(trainer.default_root_dir) / "figures"

    def _draw_tasks(self, trainer: pl.Trainer, module: Any, result: MetaTest, folder: Path) -> list[Path]:
        tasks_to_draw = getattr(getattr(trainer, "datamodule", None), "figure_tasks", None)
        if tasks_to_draw is None:
            return []
        tasks = tasks_to_draw(self.tasks)
        predictions = module.predictions_from(tasks).cpu()
        path = folder / "tasks.png"
        if result.objective.name == "regression":
            shown = tuple(sorted({0, min(1, result.steps), result.steps}))
            draw_regression_tasks(tasks, predictions, shown, path)
        else:
            draw_image_tasks(tasks, predictions, result.steps, path)
        return [path]


def print_table(result: MetaTest) -> None:
    """Print the metric after some adaptation steps, with 95 % confidence intervals over the tasks."""
    table = Table()
    table.add_column("adaptation steps", justify="right")
    table.add_column("trained", justify="right")
    table.add_column("untrained", justify="right")
    for step in result.table_steps():
        row = result.row(step)
        table.add_row(
            str(step),
            f"{row['trained']:.4f} ± {row['trained_ci95']:.4f}",
            f"{row['untrained']:.4f} ± {row['untrained_ci95']:.4f}",
        )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    console.print(f"\n{result.objective.title.capitalize()} on the query sets of {result.tasks} held-out tasks")
    console.print(table)
    console.print("mean ± half width of the 95 % confidence interval over the tasks", style="dim")


def print_metrics(metrics: Mapping[str, Tensor]) -> None:
    """Print metrics by name, such as those of a validation."""
    table = Table(title="Validation")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{float(value):.4f}")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100).print(table)


def _shown(path: Path) -> str:
    """The path from here, where it lies below, so that it can be copied from the terminal."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
