"""Configurations: laid over each other, overridden, interpolated."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmaml_pl.__main__ import main
from dmaml_pl.cli.run import run
from dmaml_pl.strategies import DMAMLStrategy, TaskParallelStrategy
from dmaml_pl.strategies.strategy import WorkerStrategy


def resolved(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        run(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


ENVIRONMENTS = ["half_cheetah_dir", "half_cheetah_vel", "ant_dir"]


@pytest.mark.parametrize(
    "name", ["sinusoid", "glyphs", "omniglot", "image_folder", "tabular", "tabular_classes", *ENVIRONMENTS]
)
def test_every_shipped_config_is_whole(name: str, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(capsys, "--config", str(repository / "configs" / f"{name}.yaml"))
    assert config["trainer"]["logger"]["init_args"]["experiment_name"] == name
    assert config["trainer"]["strategy"]["class_path"] == "dmaml_pl.DMAMLStrategy"
    assert config["trainer"]["devices"] == 2
    network, data = config["model"]["init_args"]["network"]["init_args"], config["data"]["init_args"]
    ways = data.get("ways")
    assert network.get("ways", network.get("outputs") if ways else None) == ways


def test_the_page_of_settings_has_every_part_of_a_configuration(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (repository / "docs" / "settings.md").read_text()
    parts = re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (`\w+`(?:, `\w+`)*) \|", page)))
    assert sorted(parts) == sorted(resolved(capsys, "--config=sinusoid"))


def test_later_configs_and_single_settings_win(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = str(repository / "configs" / "sinusoid.yaml")
    second = write(tmp_path / "mine.yaml", "data: {init_args: {shots: 3, queries: 4}}\ntrainer: {max_steps: 7}\n")
    config = resolved(
        capsys, "--config", first, "--config", second, "--data.shots", "5", "--trainer.strategy.run_length=9"
    )
    data = config["data"]["init_args"]
    assert (data["shots"], data["queries"], config["trainer"]["max_steps"]) == (5, 4, 7)
    assert config["trainer"]["strategy"]["init_args"]["run_length"] == 9
    assert config["model"]["init_args"]["algorithm"]["init_args"]["inner_lr"] == 0.01


def test_interpolation_reaches_over_files_and_sees_the_command_line(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", "6")
    second = write(
        tmp_path / "mine.yaml",
        "data: {init_args: {queries: '${data.init_args.shots}', runs_per_epoch: '${oc.env:RUNS}'}}\n",
    )
    words = ["--config", str(repository / "configs" / "sinusoid.yaml"), "--config", second, "--data.shots=13"]
    data = resolved(capsys, *words)["data"]["init_args"]
    assert (data["queries"], data["runs_per_epoch"]) == (13, 6)


def test_a_network_of_the_users_own_is_found_in_the_current_folder(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    write(
        tmp_path / "nets_of_mine.py",
        "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self, width: int = 3):\n"
        "        super().__init__(1, width)\n",
    )
    config = str(repository / "configs" / "sinusoid.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config, "--model.network=nets_of_mine.Net", "--print_config"])
    assert stop.value.code == 0
    network = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]
    assert network == {"class_path": "nets_of_mine.Net", "init_args": {"width": 3}}


@pytest.mark.parametrize("strategy", [DMAMLStrategy, TaskParallelStrategy])
@pytest.mark.parametrize("words", [["--trainer.strategy={}"], ["--trainer.strategy", "{}"]])
def test_the_strategy_goes_by_its_name_keeps_what_the_configuration_sets_and_takes_settings(
    strategy: type[WorkerStrategy], words: list[str], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [word.format(strategy.strategy_name) for word in words]
    config = str(repository / "configs" / "navigation2d.yaml")
    found = resolved(capsys, "--config", config, *named, "--trainer.strategy.timeout=50")["trainer"]["strategy"]
    assert found["class_path"] == f"dmaml_pl.{strategy.__name__}"
    assert (found["init_args"]["run_length"], found["init_args"]["timeout"]) == (2, 50.0)


def told(caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    """The lines before a training that is refused, about settings kept from another class."""
    with caplog.at_level("INFO"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's call
        assert run(["fit", *words, "--trainer.max_steps=0"]) == 1
    return [line for line in caplog.messages if "keeps what was set" in line]


def test_settings_that_an_algorithm_has_from_that_of_the_config_are_told(caplog: pytest.LogCaptureFixture) -> None:
    words = ["--config=omniglot", "--model.algorithm=ANIL"]
    assert told(caplog, *words) == [
        "model.algorithm is ANIL, and keeps what was set for MAML: inner_lr 0.4, inner_steps 1."
    ]
    caplog.clear()
    assert told(caplog, *words, "--model.algorithm.inner_lr=0.1") == [
        "model.algorithm is ANIL, and keeps what was set for MAML: inner_steps 1."
    ]


def test_settings_kept_are_told_of_every_class_and_of_later_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    later = write(
        tmp_path / "later.yaml",
        "model: {init_args: {network: {init_args: {hidden: [8]}, class_path: dmaml_pl.ContextMLP},\n"
        "  meta_optimizer: {class_path: torch.optim.SGD}}}\n",
    )
    assert told(caplog, "--config=sinusoid", "--config", later) == [
        "model.network is ContextMLP, and keeps what was set for MLP: inputs 1, outputs 1.",
        "model.meta_optimizer is SGD, and keeps what was set for Adam: lr 0.005.",
    ]


def test_nothing_is_told_where_the_class_stays_or_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, "--config=omniglot") == []
    assert told(caplog, "--config=omniglot", "--model.algorithm=dmaml_pl.algorithms.MAML") == []
    assert told(caplog, "--config=omniglot", "--model.algorithm=ANIL", "--model.algorithm.inner_lr=1",
                "--model.algorithm.inner_steps=2") == []  # fmt: skip


def test_a_strategys_class_path_alone_is_that_class(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(repository / "configs" / "sinusoid.yaml"), "--trainer.strategy=dmaml"]
    config = resolved(capsys, *words, "--trainer.strategy=dmaml_pl.DMAMLStrategy")
    assert config["trainer"]["strategy"]["class_path"] == "dmaml_pl.DMAMLStrategy"
    assert config["trainer"]["strategy"]["init_args"]["elastic"] is False
