"""What a study is told wrongly: one line, before anything is trained or tracked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dmaml_pl.__main__ import main
from dmaml_pl.studies.settings_files import read_own
from tests.studied import study, words_of

# -- words and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["workers", "--workers", "0"], "--workers is 0, but must be a whole number of at least 1"),
        (["workers", "--workers", "2", "2"], "each number may be given once"),
        (["workers", "--seeds", "none"], "--seeds is none, but must be a whole number"),
        (["workers", "--network", "rack"], "--network is given, but is for simulated workers: give --simulate, too"),
        (
            ["workers", "--simulate", "--network", "ether"],
            "--network is ether, but must be machine, rack, internet, or",
        ),
        (["workers", "--trainer.devices", "2"], "--trainer.devices cannot be set in a study: --workers"),
        (["workers", "again"], "again is not a setting"),
        (["scaling", "--factor", "1"], "--factor is 1, but must be a whole number of at least 2"),
        (["sweep"], "Not set: --space"),
        (["workers", "--launcher", "condor"], "--launcher invalid choice: 'condor' (choose from"),
        (["workers", "--resources", "time=3"], "--resources time=3 is for --launcher slurm or ray: leave it out"),
        (
            ["workers", "--launcher", "slurm", "--resources", "long"],
            "--resources has long, but must be",
        ),
        (
            ["workers", "--simulate", "--trainer.strategy", "task_parallel"],
            "--trainer.strategy cannot be set in a study",
        ),
        (["sweep", "--space", "none.yaml"], "--space is none.yaml, which cannot be read"),
        (["sweep", "--space", "SPACE", "--target", "low"], "--target is low, but must be a number"),
        (["weather"], "invalid choice: 'weather'"),
    ],
)
def test_bad_words_are_told_in_one_line_at_once(
    words: list[str], told: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(repository / "configs/sinusoid.yaml")] if words[0] != "weather" else []
    assert main(["study", words[0], *config, *words[1:]]) == 1
    said = capsys.readouterr().err
    assert told in said
    assert said.startswith("dmaml: error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("a: 3", "a is 3, but must be {int: [LOW, HIGH]}"),
        ("a: {int: [5]}", "a is {'int': [5]}, but must be {int: [LOW, HIGH]}"),
        ("a: {int: [5, 1]}", "a is {'int': [5, 1]}, but must be {int: [LOW, HIGH]}"),
        ("a: {int: [1, 2.5]}", "both must be whole numbers"),
        ("a: {float: [1, .inf]}", "inf is no number"),
        ("a: {float: [low, high]}", "a is {'float': ['low', 'high']}, but must be {int: [LOW, HIGH]}"),
        ("a: {float: [0, 1], log: true}", "a is {'float': [0, 1], 'log': True}, but must be {int: [LOW, HIGH]}"),
        ("a: {float: [0, 1], log: 3}", "a is {'float': [0, 1], 'log': 3}, but must be {int: [LOW, HIGH]}"),
        ("a: {float: [0, 1], lgo: true}", "a is {'float': [0, 1], 'lgo': True}, but must be {int: [LOW, HIGH]}"),
        ("a: {choice: []}", "a is {'choice': []}, but must be {int: [LOW, HIGH]}"),
        ("trainer.devices: {int: [1, 2]}", "which a sweep sets itself"),
        ("- a", "holds no settings"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_space_that_makes_no_sense_is_told_in_one_line(
    entry: str, told: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.yaml").write_text(entry)
    config = ["--config", str(repository / "configs/sinusoid.yaml")]
    assert main(["study", "sweep", *config, "--space", "space.yaml"]) == 1
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3: {model.inner_lr: 1}", "has settings of 3 workers, but --workers asks for 1, 2"),
        ("a: {model.inner_lr: 1}", "has a: {'model.inner_lr': 1}, but lines of the form `W: {NAME: VALUE, ...}`"),
        ("2: 0.1", "has 2: 0.1, but lines of the form"),
        ("", "holds no settings"),
        ("2: {", "is not valid YAML"),
        ("2: {data.shots: 3}\n2: {}", "has 2 twice in one place, in lines 1 and 2"),
        ("2: {trainer.devices: 3}", "sets trainer.devices of 2 workers: leave it out"),
    ],
)
def test_own_settings_that_make_no_sense_are_told_in_one_line(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    assert main(words_of(repository, tmp_path, "workers", "--workers", "1", "2", "--own", str(own))) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "mlruns").exists()


def test_a_number_of_workers_without_settings_of_its_own_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("2: {model.meta_optimizer.init_args.lr: 0.1}")
    assert read_own(own, [1, 2, 4]) == {2: (("model.meta_optimizer.init_args.lr", "0.1"),)}
    assert capsys.readouterr().out == f"--own {own} has no settings of 1, 4 workers: the configuration's are taken.\n"
    read_own(own, [2])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        ("workers", ["--trainer.max_step=3"], "trainer.max_step is not a setting. Did you mean"),
        ("workers", ["--workers", "9", "--data.val_tasks=8"], "data.val_tasks is 8"),
        (
            "workers",
            ["--workers", "1", "--trainer.limit_val_batches", "0"],
            "trainer.limit_val_batches is 0, but must ",
        ),
        ("sweep", ["--workers", "1", "--space", "space.yaml"], "model.inner_rl"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_tracked(
    kind: str, words: list[str], told: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.yaml").write_text("model.inner_rl: {choice: [0.1]}")
    done = study(repository, tmp_path, capsys, kind, *words)
    assert done.code == 1
    assert told in done.printed
    assert done.printed.count("\n") == 1
    assert not (tmp_path / "mlruns").exists()


# -- the help ------------------------------------------------------------------------------------------------------


def test_the_help_loads_neither_pytorch_nor_mlflow() -> None:
    script = (
        "import sys; from dmaml_pl.__main__ import main\n"
        "try: main(['study', 'workers', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'mlflow', 'optuna', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "--seeds" in done.stdout
    assert done.stdout.endswith("[]\n")
