"""Configurations: laid over each other, overridden, interpolated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmaml_pl.__main__ import main
from dmaml_pl.cli.run import run


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


def test_the_strategy_goes_by_its_name(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(capsys, "--config", str(repository / "configs" / "sinusoid.yaml"), "--trainer.strategy=dmaml")
    assert config["trainer"]["strategy"] == "dmaml"
