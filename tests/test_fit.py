"""`dmaml_pl.fit`: from Python what the command gives."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import dmaml_pl
from dmaml_pl import MLP, ConfigError, MetaLearning, MetaTestReport, RunCheckpoint, TrainingResult
from dmaml_pl.errors import WorkerLostError
from tests.recipes import small_data, small_maml
from tests.trainings import lay_store

SMALL: dict[str, Any] = {"accelerator": "cpu", "max_steps": 8, "logger": False}


def train(**settings: Any) -> TrainingResult:
    return dmaml_pl.fit(small_maml(run_length=4), small_data(), **(SMALL | settings))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_finished_training_has_its_metrics_table_and_files_and_says_each_thing_once(
    devices: int, capfd: pytest.CaptureFixture[str]
) -> None:
    training = train(devices=devices)
    out, err = capfd.readouterr()
    assert training.meta_test is not None
    assert training.metrics["test/mse"] == pytest.approx(training.table[1]["trained"])
    assert {"val/mse", "val/mse_ci95", "test/untrained_mse"} <= training.metrics.keys()
    files = (training.best, training.last, training.report, *training.figures)
    names = ["best.ckpt", "last.ckpt", "report.md", "adaptation_curve.png", "tasks.png"]
    assert [file.name for file in files if file is not None and file.is_file()] == names
    assert out.count("held-out tasks") == out.count("report.md") == 1
    begun, trained, *_, tested = [line for line in err.splitlines() if not line.startswith("Parameters: ")]
    assert (begun, tested) == ("Training with the vectorized engine ...", "Meta-test ...")
    assert trained.startswith("Trained 2 runs, 8 meta-iterations on each of ")
    assert "untrained" in str(training._repr_markdown_())


def test_several_workers_are_forked_and_the_process_is_left_as_it_was() -> None:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    environment, hook = dict(os.environ), sys.excepthook
    counted = [train(devices=devices, meta_test=False).module.tasks_seen for devices in (2, 1, 2)]
    assert counted == [64, 32, 64]
    assert not torch.distributed.is_initialized()
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == (threads, handler)
    assert (dict(os.environ), sys.excepthook) == (environment, hook)


def test_a_trained_network_adapts_to_samples_from_python() -> None:
    learner = train(max_steps=100, meta_test=False).learner
    x = torch.linspace(-5, 5, 40).unsqueeze(1)
    errors = [float((learner.adapt(x, x.sin(), steps).predict(x) - x.sin()).square().mean()) for steps in (1, 9)]
    assert errors[1] < errors[0]


def test_callbacks_of_ones_own_replace_ours(tmp_path: Path) -> None:
    own = [RunCheckpoint(dirpath=str(tmp_path / "kept")), MetaTestReport(folder=str(tmp_path / "told"), tasks=1)]
    made = train(callbacks=own)
    assert made.best == tmp_path / "kept" / "best.ckpt"
    assert made.report == tmp_path / "told" / "report.md"


def test_a_training_from_python_is_tracked_and_goes_on_in_its_mlflow_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    lay_store(Path())
    tracker = dmaml_pl.MLflowTracker("mine", system_metrics=False)
    first = train(logger=tracker, devices=2, meta_test=False)
    train(logger=dmaml_pl.MLflowTracker("mine", system_metrics=False), max_steps=12, ckpt_path=first.last)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    run = client.get_run(str(tracker.version))
    assert run.data.params["model.algorithm"] == "MAML"
    assert run.data.tags["dmaml.engine"] == "vectorized"
    assert run.info.status == "FINISHED"
    inputs: Any = run.inputs
    (logged,) = inputs.dataset_inputs
    assert (logged.dataset.name, '"shots": 10' in logged.dataset.profile) == ("Sinusoid", True)
    assert {point.step for point in client.get_metric_history(run.info.run_id, "val/mse")} == {4, 8, 12}
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"checkpoints", "report.md"}


def test_a_configuration_is_trained_with_settings_laid_over_it(sinusoid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's call
    settings = {
        "data": {"init_args": {"meta_batch": 4, "val_tasks": 4, "test_tasks": 8}},
        "trainer.logger": False,
        "trainer.devices": 2,
        "trainer.strategy.run_length": 4,
        "trainer.val_check_interval": 1,
        "trainer.max_steps": 8,
    }
    made = dmaml_pl.fit(sinusoid, settings)
    assert made.meta_test is not None
    assert made.meta_test.tasks == 8
    assert made.best is not None
    assert dmaml_pl.load(made.best).steps == 1
    assert f"fit --config {sinusoid}" in (made.report or Path()).read_text()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_steps": -1}, "max_steps"),
        ({"devices": "many"}, "trainer.devices"),
        ({"accumulate_grad_batches": 2}, "data.meta_batch"),
        ({"max_stps": 3}, "max_stps"),
        ({"ckpt_path": "nowhere.ckpt"}, "nowhere.ckpt"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_that_names_it(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(dmaml_pl.DmamlError, match=told) as refused:
        train(**settings)
    assert "\n" not in str(refused.value)
    assert refused.value._render_traceback_() == [f"{type(refused.value).__name__}: {refused.value}"]


def test_what_goes_with_a_configuration_is_told(sinusoid: str) -> None:
    with pytest.raises(ConfigError, match=r'"trainer\.max_steps": 5'):
        dmaml_pl.fit(sinusoid, max_steps=5)
    with pytest.raises(ConfigError, match=r"trainer\.max_stps is not a setting\. Did you mean trainer\.max_steps"):
        dmaml_pl.fit(sinusoid, {"trainer.max_stps": 5})
    with pytest.raises(ConfigError, match="data is None, but must be of type TaskDataModule"):
        dmaml_pl.fit(small_maml())


def test_a_process_that_has_used_a_gpu_is_told_why_it_cannot_have_several_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="restart it"):
        train(devices=2)


class Dies(pl.Callback):
    def __init__(self, sign: int, worker: int) -> None:
        self.sign, self.worker = sign, worker

    def on_meta_iteration_end(self, trainer: Any, pl_module: Any, done: int, length: float, loss: float) -> None:
        if trainer.global_rank == self.worker and trainer.global_step == 6:
            os.kill(os.getpid(), self.sign)


def test_a_forked_worker_that_dies_ends_the_training_with_one_clear_error() -> None:
    with pytest.raises(WorkerLostError, match=r"worker 1 .* was killed by SIGKILL"):
        train(devices=2, callbacks=[Dies(signal.SIGKILL, worker=1)], max_steps=400)
    assert train(devices=2, meta_test=False).metrics


@pytest.mark.parametrize("devices", [1, 2])
def test_a_stopped_training_says_how_to_go_on_and_ends_no_process(
    devices: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(devices=devices, callbacks=[Dies(signal.SIGINT, worker=0)], max_steps=400)
    said = capfd.readouterr().err
    assert "Stopped. The last merge is kept in" in said
    assert "fit(..., ckpt_path='" in said
    path = said.rpartition("ckpt_path='")[2].partition("'")[0]
    assert train(devices=devices, ckpt_path=path, meta_test=False).module.runs_done == 2


def test_all_names_that_a_user_needs_are_in_the_package() -> None:
    import data_modules
    from dmaml_pl import networks, optimizers, policies, strategies

    named = {*data_modules.__all__, *networks.__all__, *policies.__all__, *strategies.__all__}
    inside = {"WorkerStrategy"}
    assert named - inside <= set(dmaml_pl.__all__)
    assert {"TrustRegion", "Epochs"} <= {*optimizers.__all__} & {*dmaml_pl.__all__}
    assert all(hasattr(dmaml_pl, name) for name in dmaml_pl.__all__)
    assert MetaLearning(MLP()).network is not None
