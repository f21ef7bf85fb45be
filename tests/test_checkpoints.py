"""Checkpoints that survive whatever ends a training, and from which it goes on as if nothing had been."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from dmaml_pl import DMAMLStrategy, TaskParallelStrategy
from dmaml_pl.checkpoints import RunCheckpoint, find_checkpoint
from dmaml_pl.checkpoints.files import remove_leftovers, write_whole
from dmaml_pl.checks import require_file
from dmaml_pl.cli import preflight
from dmaml_pl.errors import CheckpointError, ConfigError
from tests.recipes import same, small_data, small_maml, small_trainer, state_of
from tests.trainings import SETTINGS, Training, dmaml, fit, flags, of, same_weights
from tests.workers import in_workers

OLD: dict[str, Any] = {"global_step": 1, "weight": torch.zeros(1000)}
NEW: dict[str, Any] = {"global_step": 2, "weight": torch.ones(1000)}


# -- a file is whole or not there ----------------------------------------------------------------------------------


def _write_and_be_killed(path: Path) -> None:
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    write_whole(NEW, path)


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before_and_nothing_that_looks_like_one() -> None:
    folder = Path("checkpoints")
    path = folder / "last.ckpt"
    write_whole(OLD, path)
    writer = multiprocessing.get_context("fork").Process(target=_write_and_be_killed, args=(path,))
    writer.start()
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    assert torch.equal(torch.load(path)["weight"], OLD["weight"])
    assert find_checkpoint("last", folder) == path
    assert [file.suffix for file in folder.iterdir() if file != path] == [".partial"]
    remove_leftovers(folder)
    assert list(folder.iterdir()) == [path]


def test_something_else_than_a_file_is_not_replaced_by_one() -> None:
    os.mkfifo("device")
    with pytest.raises(CheckpointError, match="something else than a file is there"):
        write_whole(NEW, Path("device"))
    with pytest.raises(ConfigError, match=r"^--save is device, which is there, and no file: set it to another one.$"):
        require_file("--save", Path("device"))
    assert Path("device").is_fifo()


def test_a_file_that_a_living_process_is_writing_is_no_leftover() -> None:
    mine = Path(f".last.ckpt.{os.uname().nodename}.{os.getpid()}.partial")
    another = Path(".last.ckpt.another-machine.1.partial")
    for file in (mine, another):
        file.touch()
    remove_leftovers(Path())
    assert mine.exists()
    assert another.exists()


def _write_to_a_full_disk(path: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with pytest.raises(CheckpointError) as caught:
        write_whole(NEW, path)
    return str(caught.value)


def test_a_full_disk_is_one_clear_line_and_the_checkpoint_before_stays() -> None:
    path = Path("last.ckpt").absolute()
    write_whole(OLD, path)
    (message,) = in_workers(_write_to_a_full_disk, 1, path)
    assert f"{path} could not be written (File too large). The one before is kept." in message
    assert "\n" not in message
    assert torch.equal(torch.load(path)["weight"], OLD["weight"])
    assert list(Path().iterdir()) == [Path("last.ckpt")]


# -- the last merge in memory --------------------------------------------------------------------------------------


class _Stops(pl.Callback):
    """Has a worker hear a signal in the middle of the fourth run; keeps the weights and moments of every merge."""

    def __init__(self, worker: int, number: signal.Signals) -> None:
        self.worker, self.number = worker, number
        self.merged: list[tuple[Any, Any]] = []

    def on_meta_iteration_end(self, trainer: Any, module: Any, done: int, length: int, loss: float) -> None:
        if (trainer.global_rank, module.runs_done, done) == (self.worker, 3, 2):
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.merged.append((state_of(module), deepcopy(optimizer.state_dict()["state"])))


def _stopped_by_a_signal(strategy: Any, number: signal.Signals, devices: int) -> Any:
    stops = _Stops(devices - 1, number)
    settings = {"run_length": 5} | ({"moments": "keep"} if strategy is DMAMLStrategy else {})
    trainer = small_trainer(
        devices=devices,
        max_steps=100,
        strategy=strategy(**settings),
        enable_checkpointing=True,
        callbacks=[stops, RunCheckpoint(dirpath="kept", every_n_runs=1000)],
    )
    adam = small_maml(meta_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2))
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        trainer.fit(adam, small_data())
    except SystemExit as stop:
        return type(stop), type(stop.__context__), stops.merged
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    return None, None, stops.merged


@pytest.mark.parametrize(
    ("strategy", "number", "devices"),
    [
        (DMAMLStrategy, signal.SIGTERM, 2),
        (DMAMLStrategy, signal.SIGINT, 2),
        (DMAMLStrategy, signal.SIGHUP, 2),
        (TaskParallelStrategy, signal.SIGTERM, 2),
        (DMAMLStrategy, signal.SIGTERM, 1),
        (DMAMLStrategy, signal.SIGINT, 1),
    ],
)
def test_a_signal_to_one_worker_stops_all_and_leaves_the_last_merge_with_the_moments_of_every_worker(
    strategy: Any, number: signal.Signals, devices: int
) -> None:
    workers = in_workers(_stopped_by_a_signal, devices, strategy, number, devices)
    kept = torch.load("kept/last.ckpt", weights_only=True)
    for stopped, cause, merged in workers:
        assert stopped is SIGTERMException or cause is KeyboardInterrupt
        assert (cause is KeyboardInterrupt) is (number == signal.SIGINT)
        assert len(merged) == 3
        weights, _ = merged[-1]
        assert kept["global_step"] == 15
        assert same(kept["state_dict"], weights)
    states = kept["dmaml"]["optimizer_states"] if devices > 1 else [kept["optimizer_states"]]
    for (_, _, merged), state in zip(workers, states, strict=True):
        for mine, held in zip(merged[-1][1].values(), state[0]["state"].values(), strict=True):
            assert same(mine, held)


class _StopsValidation(pl.Callback):
    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)


def _stopped_in_a_validation() -> int:
    trainer = small_trainer(
        strategy=DMAMLStrategy(run_length=1),
        enable_checkpointing=True,
        limit_val_batches=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        callbacks=[RunCheckpoint(dirpath="kept", every_n_runs=1000), _StopsValidation()],
    )
    with pytest.raises(SIGTERMException):
        trainer.fit(small_maml(), small_data())
    return trainer.global_step


def test_a_signal_in_a_validation_ends_it_at_once_and_the_merge_before_it_is_kept() -> None:
    assert in_workers(_stopped_in_a_validation, 1) == [6]
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 6
    assert not Path("kept/best.ckpt").exists()


# -- when a training keeps them ------------------------------------------------------------------------------------


class _Kept(pl.Callback):
    """After each run, the meta-iterations behind `last.ckpt`."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        file = Path("kept/last.ckpt")
        self.steps.append(torch.load(file, weights_only=True)["global_step"] if file.exists() else 0)


def _train(callback: RunCheckpoint, **settings: Any) -> list[int]:
    kept = _Kept()
    trainer = small_trainer(
        **(
            {"max_steps": 12, "strategy": DMAMLStrategy(run_length=2), "enable_checkpointing": True}
            | settings
            | {"callbacks": [callback, kept]}
        )
    )
    trainer.fit(small_maml(), small_data())
    return kept.steps


def test_last_is_renewed_after_every_so_many_merges() -> None:
    assert _train(RunCheckpoint(dirpath="kept", every_n_runs=2)) == [0, 0, 4, 4, 8, 8]
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 12


def test_by_default_last_is_renewed_as_often_as_it_costs_two_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = RunCheckpoint(dirpath="kept")
    expected = []
    for cost, seconds, due in [(0.0, 0.0, True), (0.02, 0.99, False), (0.02, 1.01, True), (2.0, 60.0, False)]:
        callback._cost, callback._seconds_since = cost, seconds
        expected.append(callback._due() is due)
    assert expected == [True] * 4


@pytest.mark.parametrize("value", [0, -1])
def test_every_n_runs_must_be_positive(value: int) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.every_n_runs is {value}, but must be greater than 0"):
        RunCheckpoint(every_n_runs=value)


class _Validations(pl.Callback):
    def __init__(self, stop_at: int | None) -> None:
        self.losses: dict[int, float] = {}
        self.stop_at = stop_at

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.stop_at:
            raise KeyError("killed in a validation")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


def _train_with_validations(folder: str, stop_at: int | None, resume: bool = False) -> Any:
    validations = _Validations(stop_at)
    module = small_maml()
    trainer = small_trainer(
        max_steps=12,
        strategy=DMAMLStrategy(run_length=1),
        enable_checkpointing=True,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[RunCheckpoint(dirpath=folder, every_n_runs=1), validations],
    )
    data = small_data(runs_per_epoch=4)
    if stop_at is None:
        trainer.fit(module, data, ckpt_path=f"{folder}/last.ckpt" if resume else None)
    else:
        with pytest.raises(KeyError):
            trainer.fit(module, data)
    return validations.losses, state_of(module)


@pytest.mark.parametrize("stop_at", [6, 8])  # in the middle of an epoch of four runs, and at its end
def test_a_training_killed_in_a_validation_makes_it_when_it_goes_on(stop_at: int) -> None:
    losses, weights = _train_with_validations("straight", None)
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    before, _ = _train_with_validations("killed", stop_at)
    assert torch.load("killed/last.ckpt", weights_only=True)["global_step"] == stop_at
    after, resumed = _train_with_validations("killed", None, resume=True)
    assert before | after == losses
    assert next(iter(after)) == stop_at
    assert same(resumed, weights)
    best, expected = (torch.load(f"{folder}/best.ckpt", weights_only=True) for folder in ("killed", "straight"))
    assert best["global_step"] == expected["global_step"]


def _train_with(workers: int, max_steps: int, ckpt: str | None) -> Any:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addHandler(handler)
    start = Weights()
    trainer = small_trainer(
        devices=workers, max_steps=max_steps, strategy=DMAMLStrategy(run_length=2), callbacks=[start]
    )
    trainer.fit(small_maml(), small_data(), ckpt_path=ckpt)
    if ckpt is None:
        trainer.save_checkpoint("kept.ckpt")
    return start.weights, state_of(trainer.lightning_module), said


class Weights(pl.Callback):
    """Keeps the weights that a training starts from."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = state_of(pl_module)


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_another_number_of_workers_goes_on_from_the_merged_weights_and_says_so(before: int, now: int) -> None:
    _, merged, _ = in_workers(_train_with, before, before, 4, None)[0]
    start, end, said = in_workers(_train_with, now, now, 8, "kept.ckpt")[0]
    assert same(start, merged)
    assert not same(end, merged)
    assert any(f"moments of {before} worker(s), and there are {now} now" in line for line in said)


# -- real trainings, ended at any moment ---------------------------------------------------------------------------


def goes_on_to_the_bit(folder: Path, sinusoid: str, undisturbed: Training, *words: str) -> None:
    result = fit(folder, sinusoid, *(words or ("--ckpt_path=last",)))
    assert result.returncode == 0, result.stderr
    training = of(folder)
    for name in ("last", "best"):
        assert same_weights(training.checkpoint(name), undisturbed.checkpoint(name))
    assert training.run.info.status == "FINISHED"
    for name in ("train/loss", "train/tasks_seen", "val/mse_step_1"):
        assert training.history(name) == undisturbed.history(name)


@pytest.mark.parametrize("when_others_wait", [False, True])
def test_sigterm_in_the_middle_of_a_run_leaves_the_last_merge_and_resumes_to_the_bit(
    undisturbed: Training, tmp_path: Path, sinusoid: str, when_others_wait: bool
) -> None:
    disturb = {"at": [1, 6, 4], "send": "SIGTERM", "to": "main", "when_others_wait": when_others_wait}
    # Without signals, the merge after the validation would be the last one kept.
    result = fit(tmp_path, sinusoid, "--checkpoint.every_n_runs=1000", disturb=disturb)
    assert result.returncode == 143, result.stderr
    assert "Traceback" not in result.stderr
    training = of(tmp_path)
    assert training.run.info.status == "KILLED"
    assert training.checkpoint("last")["global_step"] == 50
    (folder,) = tmp_path.glob("mlruns/checkpoints/sinusoid/*/checkpoints")
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    if not when_others_wait:
        goes_on_to_the_bit(tmp_path, sinusoid, undisturbed)


def test_sigterm_before_there_is_anything_to_keep_ends_the_mlflow_run_as_well(tmp_path: Path, sinusoid: str) -> None:
    result = fit(tmp_path, sinusoid, "--trainer.devices=1", "--trainer.callbacks=probe.Early")
    assert result.returncode == 143, result.stderr
    assert "Traceback" not in result.stderr
    assert of(tmp_path).run.info.status == "KILLED"


def test_a_training_killed_outright_in_the_middle_of_a_run_resumes_to_the_bit(
    undisturbed: Training, tmp_path: Path, sinusoid: str
) -> None:
    disturb = {"at": [1, 6, 4], "send": "SIGKILL", "to": "all"}
    own = tmp_path / "mlruns/checkpoints/sinusoid/own/checkpoints"
    words = ["--checkpoint.every_n_runs=1", f"--checkpoint.dirpath={own}", "--ckpt_path=auto"]  # a job's, every time
    result = fit(tmp_path, sinusoid, *words, disturb=disturb)
    assert result.returncode == -signal.SIGKILL
    assert of(tmp_path).checkpoint("last")["global_step"] == 50
    goes_on_to_the_bit(tmp_path, sinusoid, undisturbed, *words)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], check=False)  # noqa: S607
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)  # noqa: S607


def test_a_disk_that_fills_up_ends_the_training_in_one_line_and_keeps_the_last_good_checkpoint(
    small_disk: Path, tmp_path: Path, sinusoid: str
) -> None:
    filler = (
        "import pathlib,pytorch_lightning as pl\nclass Filler(pl.Callback):\n"
        "    def on_run_end(self, trainer, module, report):\n"
        "        if module.runs_done == 3 and trainer.is_global_zero:\n"
        "            try:\n"
        f"                pathlib.Path({str(small_disk / 'full')!r}).write_bytes(bytes(400_000))\n"
        "            except OSError:\n"
        "                pass\n"
    )
    (tmp_path / "filler.py").write_text(filler)
    words = ["--checkpoint.every_n_runs=1", f"--checkpoint.dirpath={small_disk}", "--trainer.callbacks=filler.Filler"]
    result = fit(tmp_path, sinusoid, *words)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert "No space left on device" in line
    assert "checkpoint.dirpath" in line
    assert "Traceback" not in result.stderr
    assert torch.load(small_disk / "last.ckpt", weights_only=True)["global_step"] in (20, 30)
    assert of(tmp_path).run.info.status == "FAILED"


# -- beside a user's own ModelCheckpoint -----------------------------------------------------------------------------


def _own_callbacks(*others: str, **settings: Any) -> str:
    own = {"monitor": "val/mse_step_0", "mode": "max", "filename": "worst"} | settings
    kept = {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": own}
    return "--trainer.callbacks=" + json.dumps([kept, *({"class_path": other} for other in others)])


TESTED = (
    "import pathlib, pytorch_lightning as pl\nclass Tested(pl.Callback):\n"
    "    def on_test_start(self, trainer, module):\n"
    "        pathlib.Path('tested').write_text(trainer.ckpt_path)\n"
)


def test_a_users_own_checkpoints_are_kept_and_ours_decide_what_best_and_last_are(tmp_path: Path, sinusoid: str) -> None:
    (tmp_path / "tested.py").write_text(TESTED)
    words = [
        "--trainer.devices=1",
        "--trainer.max_steps=20",
        "--data.test_tasks=4",
        "--report.baseline_budget=0",
        _own_callbacks("tested.Tested", dirpath="extra"),
    ]
    result = fit(tmp_path, sinusoid, "--meta_test=true", "--trainer.val_check_interval=1", *words)
    assert result.returncode == 0, result.stderr
    (ours,) = tmp_path.glob("mlruns/checkpoints/sinusoid/*/checkpoints")
    assert (tmp_path / "tested").read_text() == str((ours / "best.ckpt").relative_to(tmp_path))
    assert [path.name for path in (tmp_path / "extra").iterdir()] == ["worst.ckpt"]
    for name in ("best", "last"):
        artifact = torch.load(of(tmp_path).artifact(f"checkpoints/{name}.ckpt"), weights_only=True)
        assert same_weights(artifact, of(tmp_path).checkpoint(name))
    again = dmaml(tmp_path, "predict", "--config", sinusoid, *flags(SETTINGS), *words, "--ckpt_path=last")
    assert again.returncode == 0, again.stderr
    assert f"Using checkpoint {(ours / 'last.ckpt').relative_to(tmp_path)}" in again.stderr


@pytest.mark.parametrize("taken", [{"filename": "best"}, {"filename": "last"}, {"save_last": True}])
def test_a_users_own_checkpoint_that_would_take_the_place_of_ours_is_refused_in_one_line(taken: dict[str, Any]) -> None:
    callbacks = [RunCheckpoint(), ModelCheckpoint(**taken)]
    trainer = small_trainer(callbacks=callbacks, enable_checkpointing=True)
    name = taken.get("filename", "last")
    with pytest.raises(ConfigError, match=f"trainer.callbacks has a ModelCheckpoint that would write {name}.ckpt"):
        preflight._check_checkpoints(trainer, small_maml())


def test_a_users_own_checkpoint_in_a_folder_of_its_own_may_be_called_as_it_likes() -> None:
    callbacks = [RunCheckpoint(), ModelCheckpoint("extra", filename="best", save_last=True)]
    preflight._check_checkpoints(small_trainer(callbacks=callbacks, enable_checkpointing=True), small_maml())
