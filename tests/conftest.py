from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dmaml_pl import _learn2learn
from dmaml_pl.cli import quiet

# PyTorch is not loaded here: pytest-xdist's own process, which runs no test, loads this file, too.


def pytest_configure() -> None:
    """Signals as in a terminal, which a script's background (`make test &`, nohup) ignores, and tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collectstart() -> None:
    """One thread, before a test's file is loaded: tests fork workers, and OpenMP's threads do not survive a fork."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when it is loaded; else threads spin on others' cores
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # else Lightning sets those of this process, also in a fixture of many tests
    torch.set_num_threads(1)


if not _learn2learn.installed():  # as where there was no C compiler: what asks for it is skipped

    def _skip() -> NoReturn:
        pytest.skip(_learn2learn.MISSING, allow_module_level=True)

    _learn2learn.load = _skip
    _learn2learn.installed = lambda: True


LONG = (
    "test_end_to_end",
    "test_bad_input",
    "test_compiled",
    "test_studies",
    "test_checkpoints",
    "test_merge_options",
    "test_all_algorithms",
    "test_rl_training",
    "test_own_classes",
    "test_readme",
    "test_own_algorithm",
    "test_task_parallel",
    "test_dmaml",
    "test_docs",
    "test_watch",
    "test_classic_benchmarks",
    "test_rl_adapt",
    "test_rl_meta_test",
    "test_gymnasium_tasks",
    "test_module",
    "test_meta_test",
    "test_precision",
    "test_ui",
    "test_study_failures",
)
"""Files that take longest, the first of them most."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: with a file a process, one that is begun last would keep the other processes waiting."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts in an empty folder, without the seed or the rank of another, and leaves its variables behind.

    Trainings of several workers set those of a launcher (NODE_RANK, MASTER_ADDR, MASTER_PORT) in their own process.
    """
    before = dict(os.environ)
    for name in (
        "PL_GLOBAL_SEED",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MLFLOW_TRACKING_URI",
        "DMAML_RESOLVED_CHECKPOINT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    quiet.quieten()
    yield
    import torch
    from lightning_utilities.core.rank_zero import rank_zero_only

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    monkeypatch.undo()
    vars(rank_zero_only)["rank"] = 0  # a launcher's, which Lightning keeps also after a training is refused
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `dmaml adapt`, which must refuse; returns the message, which is all that the user hears."""

    from dmaml_pl.__main__ import main

    def refuse(*words: str | Path) -> str:
        assert main(["adapt", *map(str, words)]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("dmaml: error: ")
        assert err.count("\n") == 1
        assert not Path("predictions.csv").exists()
        return err.removeprefix("dmaml: error: ").strip()

    return refuse


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch has two threads, and then as many as before."""
    from dmaml_pl.engines.threads import limited_threads

    with limited_threads(2):
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def sinusoid(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of the sinusoid, away from the repository."""
    return str(shutil.copy(repository / "configs" / "sinusoid.yaml", tmp_path_factory.mktemp("configs")))


@pytest.fixture(scope="session")
def sines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a tiny regression, registered in MLflow as `sines`."""
    from tests.adapting import SINES, train

    return train(tmp_path_factory.mktemp("sines"), SINES, "--register=sines")


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a tiny classification of letters."""
    from tests.adapting import LETTERS_SEEN, train

    return train(tmp_path_factory.mktemp("letters"), LETTERS_SEEN, "--trainer.logger=false")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sinusoid: str) -> Any:
    """A training of two workers that nothing happened to."""
    from tests.trainings import fit, of

    folder = tmp_path_factory.mktemp("undisturbed")
    result = fit(folder, sinusoid)
    assert result.returncode == 0, result.stderr
    return of(folder)
