"""Shows a meta-test: a table on the terminal, a report to read and one for machines, and figures, in MLflow as well."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dmaml_pl.checks import (
    require_at_most,
    require_counts,
    require_file,
    require_folder,
    require_not_negative,
    unwritable,
)
from dmaml_pl.console.notebook import show_pictures
from dmaml_pl.console.tables import print_table
from dmaml_pl.evaluation.baseline import BaselineTraining
from dmaml_pl.evaluation.curves import MetaTest
from dmaml_pl.evaluation.facts import facts_of
from dmaml_pl.evaluation.figures import plot_meta_test
from dmaml_pl.evaluation.policy_baseline import PolicyBaselineTraining
from dmaml_pl.evaluation.policy_figures import film_policies
from dmaml_pl.evaluation.rendering import as_json, as_markdown, print_result
from dmaml_pl.runs import strategy_of_runs
from dmaml_pl.tasks import ActingSource

SETTING = "report.folder"

MOST_PLOTTED = 100
"""Tasks in one figure, a panel each."""


class MetaTestReport(pl.Callback):
    """Reports what a meta-test found, beside a baseline that it trains for that.

    Writes `report.md`, `report.json` and figures in `figures/`, and logs them to MLflow, shows figures in notebooks.

    Args:
        folder: where to write them; by default beside the training's checkpoints.
        tasks: tasks to plot, 100 at most.
        baseline_budget: samples (environments: steps in them) that the baseline may see, as a share of those that the
            training saw; 0 leaves it out. A quarter costs about a tenth of the training's time; more did not help where
            it was measured.
        per_task: whether report.json holds the metric of every single task, too.
        clips: tasks in environments to film, each a GIF of the adapted policy; a picture takes about 50 ms.

    Attributes:
        files: what the last meta-test has written.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> trainer = pl.Trainer(callbacks=[MetaTestReport(folder="reports", tasks=8)], logger=False, max_steps=100)
        >>> trainer.max_steps
        100
    """

    def __init__(
        self,
        folder: str | None = None,
        tasks: int = 4,
        baseline_budget: float = 0.25,
        per_task: bool = False,
        clips: int = 0,
    ) -> None:
        require_counts(**{"report.tasks": tasks})
        require_at_most(MOST_PLOTTED, **{"report.tasks": tasks})
        require_not_negative(**{"report.clips": clips, "report.baseline_budget": baseline_budget})
        self.folder = folder
        self.tasks = tasks
        self.baseline_budget = baseline_budget
        self.per_task = per_task
        self.clips = clips
        self.files: list[Path] = []
        self._about_baseline = ""

    def check_writable(self) -> None:
        """Check that the report can be written, before the work that it reports on.

        Raises:
            ConfigError: names the setting of the folder that cannot be written.
        """
        if self.folder is not None:
            require_folder(SETTING, Path(self.folder))
            require_folder(SETTING, Path(self.folder) / "figures")
            for name in ("report.md", "report.json"):
                require_file(SETTING, Path(self.folder) / name)

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Train the baseline, all workers together; after the strategy has learned how to answer SIGTERM."""
        pl_module.baseline = None
        self._about_baseline = self._train_baseline(trainer, pl_module)

    def _train_baseline(self, trainer: Any, module: Any) -> str:
        """Give the module its baseline; returns what it is, or why there is none."""
        if not self.baseline_budget:
            return "report.baseline_budget is 0"
        if not module.evaluation_steps:
            return f"{type(module.algorithm).__name__} makes no adaptation steps, and it would be fine-tuned by as many"
        data, seen = getattr(trainer, "datamodule", None), module.tasks_seen
        training: BaselineTraining | PolicyBaselineTraining
        if isinstance(data, ActingSource):
            training, seen = PolicyBaselineTraining(module, data, trainer.strategy), module.env_steps
        else:
            training = BaselineTraining(module.untrained.network, module.objective, data, trainer.strategy)
        if training.refusal is not None:
            return training.refusal
        steps = training.steps_for(self.baseline_budget * seen)
        if steps < 1:
            return "the training has seen too few samples for it"
        strategy = strategy_of_runs(trainer)
        listeners = [each for each in trainer.callbacks if hasattr(each, "on_baseline_step")]

        def tell(done: int, value: float) -> None:
            module.answer_the_outside(strategy)
            for listener in listeners:
                listener.on_baseline_step(trainer, module, done, steps, value)

        module.baseline = training.make(steps, module.evaluation_steps, tell)
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
            tasks = getattr(trainer, "datamodule", None)
            plots = plot_meta_test(result, pl_module, tasks, self.tasks, folder)
            if self.clips:
                plots |= film_policies(pl_module, tasks, min(self.clips, result.tasks), folder)
            facts = facts_of(trainer, pl_module)
            report.write_text(as_markdown(result, facts, plots), encoding="utf-8")
            data.write_text(as_json(result, facts, plots, per_task=self.per_task), encoding="utf-8")
        except OSError as error:
            raise unwritable(SETTING, folder, error) from error
        files = [report, data, *(folder / file for file in plots)]
        self.files = files
        show_pictures(files)
        trackers = [logger for logger in trainer.loggers if hasattr(logger, "log_artifact")]
        for tracker in trackers:
            for file in files:
                tracker.log_artifact(file, "" if file.parent == folder else file.parent.name)
        where = "Report and figures, also in MLflow" if trackers else "Report and figures"
        print(f"\n{where}:", *(f"  {from_here(file)}" for file in files), sep="\n")
        for tracker in trackers:
            if hasattr(tracker, "ui_command"):
                print(f"\nSee this training in MLflow:\n  {tracker.ui_command()}\n", flush=True)

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        checkpoints = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir)
        return checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints


def from_here(file: Path) -> str:
    """A path from the current folder, where the file lies below it, so that it can be copied from the terminal."""
    return str(file.resolve()).removeprefix(f"{Path.cwd()}{os.sep}")


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print those metrics by name that a validation found."""
    found = {name: value for name, value in metrics.items() if name.startswith("val/")}
    print_table([{"metric": name, "value": value} for name, value in found.items()], "Validation")
