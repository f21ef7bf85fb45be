"""A store, a port, a device or a variable that cannot be used is one line, before anything is trained."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning_fabric.plugins.environments import SLURMEnvironment
from mlflow import MlflowClient

import dmaml_pl
from dmaml_pl.__main__ import main
from dmaml_pl.cli.preflight import check_before
from dmaml_pl.cli.run import run
from dmaml_pl.cli.training import DmamlCLI
from dmaml_pl.errors import ConfigError
from tests.bad_input import (  # noqa: F401 - two are fixtures
    LOGGER,
    SINUSOID,
    Refusal,
    as_the_user_left_it,
    changed,
    make_refusal,
)
from tests.recipes import small_data, small_maml, small_trainer
from tests.trainings import lay_store

LSF = {
    "LSB_JOBID": "1",
    "LSB_DJOB_RANKFILE": "/nope",
    "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_SIZE": "1",
}


def test_a_tracking_server_that_does_not_answer_is_named(refusal: Refusal) -> None:
    text = refusal(config=changed(SINUSOID, {f"{LOGGER}.tracking_uri": "http://127.0.0.1:9"}))
    assert text.startswith("No MLflow server can be used at http://127.0.0.1:9: Connection refused.")
    assert "set trainer.logger.init_args.tracking_uri" in text


@pytest.mark.parametrize("folder", ["mlruns", "/proc/nope"])
def test_a_tracking_store_that_cannot_be_written_is_named(folder: str, refusal: Refusal) -> None:
    Path("mlruns").write_text("not a folder")
    text = refusal(config=changed(SINUSOID, {f"{LOGGER}.save_dir": folder}))
    assert text.startswith("The tracking store ")
    assert text.endswith("Set trainer.logger.init_args.save_dir to a folder that can be written.")


def _statuses() -> list[str]:
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlruns/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dmaml"]
    return [found.info.status for found in client.search_runs([experiment.experiment_id])]


def test_a_tracker_that_cannot_be_opened_leaves_no_other_one_running(refusal: Refusal) -> None:
    lay_store(Path.cwd())
    good = SINUSOID["trainer"]["logger"]
    bad = changed(good, {"init_args.tracking_uri": "http://127.0.0.1:9"})
    refusal(config=changed(SINUSOID, {"trainer.logger": [good, bad]}))
    assert _statuses() == ["FAILED"]


def test_an_error_after_the_training_does_not_leave_its_mlflow_run_finished(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DmamlCLI) -> None:
        raise ConfigError("too late")

    monkeypatch.setattr(DmamlCLI, "after_fit", fail)
    lay_store(Path.cwd())
    Path("a.yaml").write_text(yaml.safe_dump(changed(SINUSOID, {"trainer.limit_val_batches": 0})))
    assert run(["fit", "--config", "a.yaml"]) == 1
    assert capfd.readouterr().err.endswith("dmaml: error: too late\n")
    assert _statuses() == ["FAILED"]


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (
            0,
            {"accelerator": "cuda"},
            "trainer.accelerator is 'cuda', but must be auto, cpu, or one that this machine has: ",
        ),
        (1, {"accelerator": "cuda", "devices": 4}, "trainer.devices is 4, which cannot be had: "),
        (0, {"devices": 0}, "trainer.devices is 0, which cannot be had: "),
        (
            0,
            {"strategy": "ddp", "devices": 2},
            "trainer.strategy is DDPStrategy, which does not know about runs: with ",
        ),
    ],
)
def test_devices_and_strategies_that_cannot_be_had_are_refused(
    gpus: int, settings: dict[str, Any], expected: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = changed(SINUSOID, {f"trainer.{name}": value for name, value in settings.items()})
    assert refusal(config=config).startswith(expected)


def test_a_port_in_use_is_told_before_workers_start(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        text = refusal(config=changed(SINUSOID, {"trainer.devices": 2}))
    assert text.startswith(f"MASTER_PORT is {port}, which cannot be used here (Address already in use): set it to anot")


def test_a_variable_that_names_what_is_not_there_is_told(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LSF.items():
        monkeypatch.setenv(name, value)
    text = refusal(config=SINUSOID)
    assert text == "trainer: [Errno 2] No such file or directory: '/nope' (LSB_DJOB_RANKFILE)"


def test_windows_is_told_where_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["fit", "--config", "sinusoid"]) == 1
    told = "dmaml forks its workers, which Windows cannot: run it in WSL, Windows' own Linux."
    assert capsys.readouterr().err == f"dmaml: error: {told}\n"
    with pytest.raises(ConfigError, match=f"^{told}$"):
        dmaml_pl.fit  # noqa: B018 - as `from dmaml_pl import fit`


def test_a_port_that_is_none_is_told_with_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--port", "99999"]) == 1
    told = "--port is 99999, but must be a whole number from 0 to 65535. dmaml ui --help lists all."
    assert capsys.readouterr().err == f"dmaml: error: {told}\n"


def test_where_a_folder_is_to_be_made_something_else_is_found_before_the_work(refusal: Refusal) -> None:
    Path("mlruns").mkdir()
    Path("mlruns/checkpoints").write_text("no folder")
    assert refusal(config=SINUSOID).startswith(
        "checkpoint.dirpath is mlruns/checkpoints/dmaml, which cannot be written (Not a directory): set it to another "
    )
    Path("loop").symlink_to("loop")
    text = refusal(config=changed(SINUSOID, {"checkpoint.dirpath": "loop/below"}))
    assert text.startswith("checkpoint.dirpath is ")
    assert "loop/below, which cannot be written (Too many levels of symbolic links)" in text


def test_where_nothing_can_be_kept_no_mlflow_run_is_left(refusal: Refusal) -> None:
    lay_store(Path.cwd())
    Path("mlruns/artifacts").write_text("no folder")
    assert " did not take the environment: " in refusal(config=SINUSOID)
    assert _statuses() == []


def test_a_launcher_that_has_started_others_than_the_trainer_reckons_with_is_told_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    trainer: Any = small_trainer()
    trainer.strategy.cluster_environment = SLURMEnvironment(auto_requeue=False)
    with pytest.raises(ConfigError, match=r"^trainer.devices is 1 and trainer.num_nodes 1, which does not fit what "):
        check_before("fit", trainer, small_maml(), small_data(), meta_test=False)


def test_a_machine_beyond_those_of_the_training_is_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "5")
    assert refusal(config=SINUSOID).startswith("NODE_RANK is 5, but must be less than trainer.num_nodes, which is 1: ")


def test_a_library_that_cannot_be_loaded_as_a_variable_of_its_is_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.yaml").write_text(yaml.safe_dump(SINUSOID))
    monkeypatch.setitem(sys.modules, "dmaml_pl.cli.run", None)
    assert main(["fit", "--config", "a.yaml"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("dmaml: error: ModuleNotFoundError in ")
    assert told.count("\n") == 1
