"""Shows a meta-test: a table on the terminal, a report to read and one for machines, and figures, in MLflow as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from dmaml_pl.checks import require_folder, unwritable
from dmaml_pl.console.tables import print_table
from dmaml_pl.errors import ConfigError
from dmaml_pl.evaluation.baseline import BaselineTraining
from dmaml_pl.evaluation.curves import MetaTest
from dmaml_pl.evaluation.facts import facts_of
from dmaml_pl.evaluation.figures import plot_meta_test
from dmaml_pl.evaluation.rendering import as_json, as_markdown, print_result
from dmaml_pl.runs import strategy_of_runs

SETTING = "report.folder"


class MetaTestReport(pl.Callback):
    """Reports what a meta-test found, beside a baseline that it trains for that.

    Writes `report.md`, `report.json` and figures in `figures/`, and logs the same to MLflow.

    Args:
        folder: where to write them; by default beside the training's checkpoints.
        tasks: tasks to plot.
        baseline_budget: samples that the baseline may see, as a share of those that the training saw; 0 leaves it out.
            A quarter costs about a tenth of the training's time; more did not help where it was measured
            (docs/evaluation.md).
        per_task: whether report.json holds the metric of every single task, too.

    Raises:
        ConfigError: a value out of its range.
    """

    def __init__(
        self, folder: str | None = None, tasks: int = 4, baseline_budget: float = 0.25, per_task: bool = False
    ) -> None:
        if tasks < 1:
            raise ConfigError(f"report.tasks is {tasks}, but must be greater than 0.")
        if not 0 <= baseline_budget < float("inf"):
            raise ConfigError(f"report.baseline_budget is {baseline_budget}, but must be 0 or greater, and finite.")
        self.folder = folder
        self.tasks = tasks
        self.baseline_budget = baseline_budget
        self.per_task = per_task
        self._about_baseline = ""

    def check_writable(self, trainer: pl.Trainer) -> None:
        """Check that the report can be written, before the work that it reports on.

        Raises:
            ConfigError: names the setting of the folder that cannot be written.
        """
        if self.folder is not None:
            require_folder(SETTING, Path(self.folder))
        elif getattr(trainer.checkpoint_callback, "dirpath", None) is None:  # else that has been checked
            for logger in trainer.loggers:
                if logger.save_dir is not None:
                    require_folder("trainer.logger.save_dir", Path(logger.save_dir))

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Train the baseline, all workers together; after the strategy has learned how to answer SIGTERM."""
        pl_module.baseline = None
        self._about_baseline = self._train_baseline(trainer, pl_module)

    def _train_baseline(self, trainer: pl.Trainer, module: Any) -> str:
        """Give the module its baseline; returns what it is, or why there is none."""
        if not self.baseline_budget:
            return "report.baseline_budget is 0"
        data: Any = getattr(trainer, "datamodule", None)
        training = BaselineTraining(module.untrained.network, module.objective, data, trainer.strategy)
        if training.refusal is not None:
            return training.refusal
        task = data.evaluation_task("val", 0)
        seen = module.tasks_seen * (len(task.support_x) + len(task.query_x))
        steps = training.steps_for(self.baseline_budget * seen)
        if steps < 1:
            return "the training has seen too few samples for it"
        module.baseline = training.make(steps, module.evaluation_steps, _told_of_steps(trainer, module, steps))
        about: str = module.baseline.about()
        return about

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Worker 0 reports; the others wait for nothing.

        Raises:
            ConfigError: the report cannot be written.
        """
        found: MetaTest | None = getattr(pl_module, "meta_test", None)
        if not trainer.is_global_zero or found is None:
            return
        result = replace(found, about_baseline=self._about_baseline)
        print_result(result)
        folder = self._folder(trainer)
        report, data = folder / "report.md", folder / "report.json"
        try:
            plots = plot_meta_test(result, pl_module, getattr(trainer, "datamodule", None), self.tasks, folder)
            facts = facts_of(trainer, pl_module)
            report.write_text(as_markdown(result, facts, plots), encoding="utf-8")
            data.write_text(as_json(result, facts, plots, per_task=self.per_task), encoding="utf-8")
        except OSError as error:
            raise unwritable(SETTING, folder, error) from error
        files = [report, data, *(folder / plot.file for plot in plots)]
        trackers = [logger for logger in trainer.loggers if hasattr(logger, "log_artifact")]
        for tracker in trackers:
            tracker.log_artifact(report)
            tracker.log_artifact(data)
            for plot in plots:
                tracker.log_artifact(folder / plot.file, "figures")
        where = "Report and figures, also in MLflow" if trackers else "Report and figures"
        print(f"\n{where}:", *(f"  {_shown(file)}" for file in files), sep="\n")
        for tracker in trackers:
            if hasattr(tracker, "ui_command"):
                print(f"\nSee this training in MLflow:\n  {tracker.ui_command()}\n", flush=True)

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
        if not checkpoints:
            return Path(trainer.default_root_dir)
        own = Path(checkpoints)
        return own.parent if own.name == "checkpoints" else own


def _told_of_steps(trainer: pl.Trainer, module: Any, steps: int) -> Callable[[int, float], None]:
    """Tells callbacks with `on_baseline_step` of each step, and ends at once where a worker is lost, or on SIGTERM."""
    listeners = [
        callback.on_baseline_step
        for callback in trainer.callbacks  # type: ignore[attr-defined]  # Lightning declares it nowhere
        if hasattr(callback, "on_baseline_step")
    ]
    strategy = strategy_of_runs(trainer)

    def tell(done: int, loss: float) -> None:
        module.answer_the_outside(strategy)
        for listener in listeners:
            listener(trainer, module, done, steps, loss)

    return tell


def print_metrics(metrics: Mapping[str, Tensor]) -> None:
    """Print metrics by name, such as those of a validation."""
    print_table([{"metric": name, "value": float(value)} for name, value in metrics.items()], "Validation")


def _shown(path: Path) -> str:
    """The path from here, where it lies below, so that it can be copied from the terminal."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
