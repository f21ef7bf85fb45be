"""The configurations that come with the package: listed, copied, and found by their names from any folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmaml_pl.__main__ import main
from dmaml_pl.cli import configs
from tests.trainings import dmaml, flags

SHORT = {
    "data.val_tasks": 4,
    "data.test_tasks": 4,
    "trainer.strategy.run_length": 4,
    "trainer.max_steps": 8,
    "trainer.val_check_interval": 1,
    "meta_test": "false",
}


def test_each_is_listed_with_what_its_first_line_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    assert told["sinusoid"] == "Sinusoid regression of the MAML paper, trained by two workers."
    assert len(told) == len([*configs.folder().rglob("*.yaml")])
    assert all(line.endswith(".") for line in told.values())


def test_who_has_seen_enough_of_the_list_ends_it_without_a_traceback() -> None:
    words = [sys.executable, "-m", "dmaml_pl", "configs"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as listing:
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.close()
        assert listing.stderr.read() == b""
    assert listing.returncode == 141


def test_a_copy_is_put_here_and_into_folders_and_never_over_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for words, file in ((["glyphs"], "glyphs.yaml"), (["glyphs", "a.yaml"], "a.yaml"), (["glyphs", "folder"], "")):
        assert main(["configs", "copy", *words]) == 0
        copied = Path(file or "folder/glyphs.yaml")
        assert copied.read_text() == (configs.folder() / "glyphs.yaml").read_text()
        assert capsys.readouterr().out == f"{copied}\n"
    Path("glyphs.yaml").write_text("mine")
    for words, message in (
        (["glyphs"], "glyphs.yaml is there already: name another, as in dmaml configs copy glyphs mine.yaml."),
        (["glyps"], "There is no config glyps. Did you mean glyphs? `dmaml configs` lists them."),
        (["glyphs", "none/a.yaml"], "none/a.yaml cannot be written: No such file or directory."),
    ):
        assert main(["configs", "copy", *words]) == 1
        assert capsys.readouterr().err == f"dmaml: error: {message}\n"
    assert Path("glyphs.yaml").read_text() == "mine"


def test_a_file_that_is_here_is_taken_before_one_of_the_package() -> None:
    shipped = configs.folder() / "sinusoid.yaml"
    assert configs.find("sinusoid") == configs.find("configs/sinusoid.yaml") == shipped
    assert configs.find("studies/moments") == configs.folder() / "studies/moments.yaml"
    assert configs.find("sinusoid.yaml") == Path("sinusoid.yaml")
    Path("configs").mkdir()
    assert configs.find("configs/sinusoid.yaml") == Path("configs/sinusoid.yaml")
    assert configs.find("sinusoid") == shipped
    shutil.copy(shipped, "sinusoid")
    assert configs.find("sinusoid") == Path("sinusoid")
    assert configs.with_files(["fit", "-c", "glyphs", "--config=glyphs", "--x=1", "-c"]) == [
        "fit",
        "-c",
        str(configs.folder() / "glyphs.yaml"),
        f"--config={configs.folder() / 'glyphs.yaml'}",
        "--x=1",
        "-c",
    ]


def test_workers_and_studies_find_them_and_commands_name_them_as_they_were_named(tmp_path: Path) -> None:
    trained = dmaml(tmp_path, "fit", "--config", "sinusoid", *flags(SHORT))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (
        " fit --config sinusoid --data" in json.loads(next(tmp_path.rglob("environment.json")).read_text())["command"]
    )
    settings = {name: value for name, value in SHORT.items() if name != "meta_test"}
    words = ["study", "workers", "--config", "sinusoid", "--workers", "2", "--seeds", "1", *flags(settings)]
    study = dmaml(tmp_path, *words)
    assert study.returncode == 0, study.stdout + study.stderr


@pytest.mark.parametrize(
    ("given", "near"),
    [("sinsoid", " Did you mean --config sinusoid?"), ("glyphs.yml", " Did you mean --config glyphs?"), ("nope", "")],
)
def test_what_is_no_file_and_none_of_them_is_told_with_the_nearest(
    given: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", given]) == 1
    told = f"--config is {given}, but there is no such file.{near} `dmaml configs` lists those that come with it."
    assert capsys.readouterr().err == f"dmaml: error: {told}\n"
