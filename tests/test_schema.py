"""What an editor and a shell are told of the settings."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.validators import validator_for

from dmaml_pl.__main__ import main
from dmaml_pl.cli import completion, configs
from dmaml_pl.cli.schema import config_schema


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return config_schema()


@pytest.fixture(scope="module")
def mistakes(schema: dict[str, Any]) -> Callable[[Any], list[str]]:
    kind = validator_for(schema)
    kind.check_schema(schema)
    return lambda settings: [f"{error.json_path}: {error.message}" for error in kind(schema).iter_errors(settings)]


def test_every_shipped_configuration_keeps_to_the_schema(mistakes: Callable[[Any], list[str]]) -> None:
    files = [file for file in configs.folder().rglob("*.yaml") if file.parent.name != "studies"]
    assert len(files) > 15
    for file in files:
        assert mistakes(yaml.safe_load(file.read_text())) == [], file


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"modle": {}}, "'modle'"),
        ({"trainer": {"max_step": 5}}, "'max_step'"),
        ({"trainer": {"max_steps": "five"}}, "'five'"),
        ({"model": {"class_path": "dmaml_pl.MetaLearning", "init_args": {"engin": "auto"}}}, "'engin'"),
        ({"data": {"class_path": "Sinusoid", "init_args": {"shot": 5}}}, "'shot'"),
        ({"data": {"class_path": "data_modules.Sinusoid", "shots": 5}}, "'shots'"),
        ({"trainer": {"strategy": {"class_path": "dmaml_pl.DMAMLStrategy", "init_args": {"moments": "kept"}}}}, "kept"),
    ],
)
def test_a_mistake_in_a_setting_is_against_the_schema(
    mistakes: Callable[[Any], list[str]], wrong: Any, place: str
) -> None:
    found = mistakes(wrong)
    assert found
    assert all(place in each for each in found)


def test_parts_references_and_classes_of_ones_own_keep_to_the_schema(mistakes: Callable[[Any], list[str]]) -> None:
    network = {"class_path": "mine.Network", "init_args": {"width": 5}}
    data = {"init_args": {"shots": "${model.init_args.evaluation_steps}", "ways": 5}}
    model = {"class_path": "MetaLearning", "init_args": {"network": network, "objective": "mine.Objective"}}
    assert mistakes({"model": model, "data": data, "trainer": {"devices": "${oc.env:WORKERS}"}}) == []


TYPED = {
    "dmaml ad": "adapt",
    "dmaml fit --config navigation2d_": "navigation2d_parallel",
    "dmaml fit -c mine.y": "mine.yaml",
    "dmaml fit --config sinusoid --model.algorithm.inner_l": "--model.algorithm.inner_lr",
    "dmaml fit --trainer.strategy.merge.optimizer.nest": "--trainer.strategy.merge.optimizer.nesterov",
    "dmaml test --data.test_wa": "--data.test_ways",
    "dmaml fit --model.engine le": "learn2learn",
    "dmaml fit --model.algorithm dmaml_pl.AL": "dmaml_pl.ALFA",
    "dmaml adapt --supp": "--support",
    "dmaml study scaling --fac": "--factor",
    "dmaml study scaling --trainer.max_st": "--trainer.max_steps",
    "dmaml study sweep --space studies/mo": "studies/moments",
    "dmaml configs copy gly": "glyphs",
    "dmaml completion z": "zsh",
}

PRESS_TAB = """
source ./script
set -- $(complete -p dmaml)
while [ $# -gt 0 ] && [ "$1" != -F ]; do shift; done
while read -ra COMP_WORDS; do
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); "$2"; echo "${COMPREPLY[@]}"
done
"""


def test_bash_completes_commands_configurations_files_settings_and_values(schema: dict[str, Any]) -> None:
    Path("mine.yaml").touch()
    Path("script").write_text(completion.script("bash", schema))
    done = subprocess.run(
        ["/bin/bash", "-c", PRESS_TAB],
        input="\n".join([*TYPED, ""]),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert dict(zip(TYPED, done.stdout.splitlines(), strict=True)) == TYPED


def test_zsh_takes_its_script(schema: dict[str, Any]) -> None:
    script = completion.script("zsh", schema)
    assert script.startswith("#compdef dmaml")
    assert "--model.algorithm.inner_lr" in script
    if zsh := shutil.which("zsh"):
        assert subprocess.run([zsh, "-n"], input=script, capture_output=True, text=True, check=False).stderr == ""


def test_a_shell_that_has_no_script_is_told_those_that_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("dmaml: error: shell invalid choice: 'fish'")
    assert "bash" in told
    assert "zsh" in told
