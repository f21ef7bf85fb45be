"""Spares: guessed without parsing, and gone without a word when nobody needs them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dmaml_pl.launching import prestarted


@pytest.fixture
def config() -> str:
    Path("a.yaml").write_text("trainer:\n  devices: 3 # workers\n")
    return "a.yaml"


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        ([], 1),
        (["fit"], 1),
        (["fit", "--config", "a.yaml"], 3),
        (["fit", "-c", "a.yaml"], 3),
        (["fit", "--config=a.yaml"], 3),
        (["test", "--config", "a.yaml"], 3),
        (["fit", "--config", "a.yaml", "--trainer.devices", "2"], 2),
        (["fit", "--trainer.devices=2", "--config", "a.yaml"], 2),
        (["fit", "--config", "a.yaml", "--trainer.devices", "1"], 1),
        (["fit", "--config", "a.yaml", "--trainer.devices", "auto"], 3),
        (["fit", "--config", "nope.yaml"], 1),
        (["fit", "--config"], 1),
        (["fit", "--config", "a.yaml", "--print_config"], 1),
        (["fit", "--config", "a.yaml", "--help"], 1),
        (["ui"], 1),
        (["fitt", "--config", "a.yaml"], 1),
    ],
)
def test_the_number_of_workers_is_guessed_from_the_command_line(words: list[str], workers: int, config: str) -> None:
    assert prestarted.guess_workers(words) == workers


def test_the_last_file_that_says_how_many_workers_counts(config: str) -> None:
    Path("b.yaml").write_text("trainer: {}\n")
    Path("c.yaml").write_text("trainer:\n  devices: 2\n")
    assert prestarted.guess_workers(["fit", "--config", "a.yaml", "--config", "b.yaml"]) == 3
    assert prestarted.guess_workers(["fit", "--config", "a.yaml", "--config", "c.yaml"]) == 2


def test_a_file_that_is_not_text_gives_no_guess_and_no_error() -> None:
    Path("a.yaml").write_bytes(bytes(range(256)))
    assert prestarted.guess_workers(["fit", "--config", "a.yaml"]) == 1


@pytest.mark.parametrize("name", prestarted.LAUNCHED)
def test_a_process_that_somebody_started_as_a_worker_starts_no_spares(
    name: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setenv(name, "0")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    prestarted.start(["fit", "--config", "a.yaml"])


def test_a_rank_without_a_spare_gets_none() -> None:
    assert prestarted.turn_into_worker(7, {}) is None


def test_a_process_that_is_no_spare_does_not_wait_for_orders() -> None:
    prestarted.await_orders()


def _start_one(config: str, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    prestarted.start(["fit", "--config", config, "--trainer.devices", "2"])
    return prestarted._spares.pop(1)


def test_a_spare_that_nobody_needs_ends_by_itself_and_says_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("good.yaml").write_text(
        "data: data_modules.Sinusoid\nmodel: {class_path: dmaml_pl.MAML, init_args: {network: dmaml_pl.MLP}}\n"
    )
    Path("bad.yaml").write_text("data: data_modules.Nobody\n")
    started = [_start_one(config, monkeypatch) for config in ("good.yaml", "bad.yaml")]
    for spare in started:
        assert spare.stdin is not None
        spare.stdin.close()  # as when the process that started it ends
    codes = [spare.wait(timeout=60) for spare in started]
    assert codes == [0, 1]  # the second found what is wrong, and left it to the first process to say so
    assert capfd.readouterr() == ("", "")
    assert not Path("mlruns").exists()
