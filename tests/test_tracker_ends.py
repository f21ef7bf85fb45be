"""How a training ended, in MLflow: its status, its checkpoints, and what the UI shows of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from dmaml_pl.tracking.description import wrap
from dmaml_pl.tracking.tracker import MLflowTracker
from tests.tracked import client, files, make, read
from tests.trainings import empty_store

# Lightning speaks of workers and of few batches; the trainings here are a few batches on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


class Tiny(pl.LightningModule):
    """Four weights; `hook` runs before every training batch."""

    def __init__(self, hook: Callable[[int], None] = lambda _: None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.hook = hook

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.hook(batch_idx)
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss, on_step=True)
        return loss

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=1)


def trainer(tracker: MLflowTracker, **settings: Any) -> pl.Trainer:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **settings,
    }
    return pl.Trainer(logger=tracker, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a store as MLflow makes it: copying it is faster than making it."""
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    return tmp_path


# The end


def test_success_and_checkpoints(folder: Path) -> None:
    tracker = make(folder)
    best = ModelCheckpoint(monitor="train/loss", save_last=True, save_on_train_epoch_end=True)
    fitter = trainer(tracker, callbacks=[best])
    fitter.fit(Tiny(), loader())
    run = read(folder, tracker)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] >= 0
    assert Path(best.best_model_path).parent == folder / "checkpoints" / "dmaml" / run.info.run_id / "checkpoints"
    assert files(tracker)["checkpoints/best.ckpt"].read_bytes() == Path(best.best_model_path).read_bytes()
    assert files(tracker)["checkpoints/last.ckpt"].read_bytes() == Path(best.last_model_path).read_bytes()
    assert not files(tracker)["checkpoints/best.ckpt"].is_symlink()
    history = client(folder).get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [0, 1, 2, 3]

    seen = []
    model = Tiny()
    model.test_step = lambda *_: seen.append(read(folder, tracker).info.status)  # type: ignore[method-assign]
    fitter.test(model, loader(), verbose=False)
    assert set(seen) == {"RUNNING"}
    assert read(folder, tracker).info.status == "FINISHED"


def fail(batch_idx: int) -> None:
    if batch_idx == 2:
        raise ValueError("no luck with http://me:secret@host")


def press_ctrl_c(batch_idx: int) -> None:
    if batch_idx == 2:
        raise KeyboardInterrupt


def send_sigterm(batch_idx: int) -> None:
    if batch_idx == 2:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")  # on purpose: the second fit's
def test_failure(folder: Path) -> None:
    tracker = make(folder)
    checkpoint = ModelCheckpoint(every_n_train_steps=1)
    fitter = trainer(tracker, callbacks=[checkpoint])
    with pytest.raises(ValueError, match="no luck"):
        fitter.fit(Tiny(fail), loader())
    run = read(folder, tracker)
    assert run.info.status == "FAILED"
    assert run.data.tags["dmaml.error"] == "ValueError: no luck with http://***@host"
    assert "checkpoints/best.ckpt" in files(tracker)

    tracker.finalize("success")
    assert read(folder, tracker).info.status == "FAILED"
    fitter.fit(Tiny(), loader())
    run = read(folder, tracker)
    assert run.info.status == "FINISHED"
    assert "dmaml.error" not in run.data.tags


@pytest.mark.parametrize("stop", [press_ctrl_c, send_sigterm])
def test_interruption(folder: Path, stop: Callable[[int], None]) -> None:
    tracker = make(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit):
            trainer(tracker).fit(Tiny(stop), loader())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    run = read(folder, tracker)
    assert run.info.status == "KILLED"
    assert "dmaml.error" not in run.data.tags


def test_a_failure_that_turns_out_to_be_a_stop_from_outside_is_corrected(folder: Path) -> None:
    tracker = make(folder)
    tracker.open()
    fitter = trainer(tracker)
    with pytest.raises(ValueError, match="no luck"):
        fitter.fit(Tiny(fail), loader())
    assert "dmaml.error" in read(folder, tracker).data.tags
    tracker.was_stopped()
    assert read(folder, tracker).info.status == "KILLED"
    assert "dmaml.error" not in read(folder, tracker).data.tags


# What the UI shows


def test_the_description_tells_how_it_ended_its_figures_and_what_repeats_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/dmaml", "fit", "--config", "mine.yaml"])
    tracker = make(folder)
    tracker.open()
    tracker.log_metrics({"train/run": 3, "train/tasks_seen": 12_000, "train/loss": 0.5, "train/loss_worker_0": 9.0}, 30)
    tracker.log_metrics({"val/mse": 0.25, "val/mse_ci95": 0.0123, "val/mse_step_1": 7.0}, 30)
    with pytest.raises(ValueError, match="no luck"):
        trainer(tracker).fit(Tiny(fail), loader())
    note = read(folder, tracker).data.tags["mlflow.note.content"]
    assert note.startswith(
        "**Failed** after 3 runs and 12 000 tasks seen\n\n`ValueError: no luck with http://***@host`\n"
    )
    assert "\n\nval/mse **0.25 ± 0.012** · train/loss **" in note
    assert "\n```\ndmaml fit --config mine.yaml\n```\n" in note
    assert "worker_0" not in note
    assert "step_1" not in note

    monkeypatch.setattr(sys, "argv", ["/somewhere/dmaml", "fit", "--config", "mine.yaml", "--ckpt_path", "last"])
    resumed = make(folder, run_id=tracker.version)
    resumed.open()
    resumed.log_metrics({"test/mse": 0.125}, 30)
    resumed.finalize("success")
    note = read(folder, tracker).data.tags["mlflow.note.content"]
    assert note.startswith(
        "**Finished** after 3 runs and 12 000 tasks seen\n\ntest/mse **0.125** · val/mse **0.25 ± 0.012**"
    )
    assert "ckpt_path" not in note


def test_a_long_command_is_broken_where_a_shell_joins_it_again() -> None:
    words = ["printf", "%s.", "--run_name=a 'b", *(f"--setting.number.{index}={index}" for index in range(20))]
    command = shlex.join(words)
    broken = wrap(command)
    assert max(map(len, broken.splitlines())) <= 82
    said = [
        subprocess.run(["/bin/sh", "-c", text], capture_output=True, check=True).stdout for text in (command, broken)
    ]
    assert said[0] == said[1]


def test_a_description_that_a_person_wrote_stays(folder: Path) -> None:
    by_setting = make(folder, tags={"mlflow.note.content": "my own"})
    by_setting.open()
    by_setting.finalize("success")
    assert read(folder, by_setting).data.tags["mlflow.note.content"] == "my own"

    tracker = make(folder)
    tracker.open()
    tracker.finalize("success")
    client(folder).set_tag(str(tracker.version), "mlflow.note.content", "written in the UI")
    resumed = make(folder, run_id=tracker.version)
    resumed.open()
    resumed.finalize("success")
    assert read(folder, tracker).data.tags["mlflow.note.content"] == "written in the UI"


def test_an_experiment_has_views_over_runs_and_tasks_seen_which_a_user_may_change(folder: Path) -> None:
    make(folder).open()
    store = client(folder)
    experiment = store.get_experiment_by_name("dmaml")
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development", "else the UI opens on other pages"
    axes = {}
    for view in ("by-run", "by-tasks", "by-env-steps"):
        axis = json.loads(experiment.tags[f"mlflow.sharedViewState.{view}"])["globalLineChartConfig"]
        axes[view] = (axis["xAxisKey"], axis["selectedXAxisMetricKey"])
    assert axes == {
        "by-run": ("metric", "train/run"),
        "by-tasks": ("metric", "train/tasks_seen"),
        "by-env-steps": ("metric", "train/env_steps"),
    }
    store.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.by-run", "{}")
    make(folder).open()
    changed = store.get_experiment_by_name("dmaml")
    assert changed is not None
    assert changed.tags["mlflow.sharedViewState.by-run"] == "{}"


def test_the_ui_command_shows_this_run_and_finds_dmaml_where_the_path_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert MLflowTracker().ui_command() == ".venv/bin/dmaml ui"
    assert MLflowTracker(save_dir="my runs").ui_command() == ".venv/bin/dmaml ui --save_dir 'my runs'"
    assert MLflowTracker(tracking_uri="http://host:5000").ui_command() == "http://host:5000"
    other = MLflowTracker(tracking_uri=f"sqlite:///{tmp_path}/other.db").ui_command()
    assert other == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/other.db"
    tracker = MLflowTracker(save_dir="mlruns", system_metrics=False)
    tracker.open()
    assert tracker.ui_command() == f".venv/bin/dmaml ui --run {tracker.version}"
