"""What long work shows while it goes on, with a terminal and without, and what Ctrl-C in a terminal leaves."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dmaml_pl import DMAMLStrategy
from dmaml_pl.console.meter import PLAIN_SECONDS, Meter, brief, counted
from dmaml_pl.console.progress import RunProgress
from dmaml_pl.evaluation.report import MetaTestReport
from dmaml_pl.studies.study import last_line
from tests.policies import small_navigation, small_policy
from tests.recipes import small_data, small_maml, small_trainer
from tests.terminal import CTRL_C, Terminal
from tests.trainings import SMALL, flags


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines for everything, not only once a minute."""
    monkeypatch.setenv(PLAIN_SECONDS, "0")


# -- without a terminal --------------------------------------------------------------------------------------------


def test_a_plain_line_tells_what_is_under_way_how_fast_and_what_is_left(
    at_once: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("dmaml_pl.console.meter.time.monotonic", lambda: now[0])
    meter = Meter("training", 1000, done=100, unit="meta-iteration")
    now[0] += 10
    meter.show(200, "run 2 (50/100), loss 0.500", count=1000)
    now[0] += 10
    meter.show(300, "run 3 (50/100), loss 0.400", count=3000)
    now[0] += 100
    meter.show(950, "run 9 (50/100), loss 0.300", count=3300)
    assert capsys.readouterr().err.splitlines() == [
        "Training ...",
        "run 2 (50/100), loss 0.500, meta-iteration 200/1000, 100 tasks/s, about 1 min left",
        "run 3 (50/100), loss 0.400, meta-iteration 300/1000, 150 tasks/s, about 1 min left",
        "run 9 (50/100), loss 0.300, meta-iteration 950/1000, 3.0 tasks/s, less than a minute left",
    ]


def test_a_plain_line_comes_once_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dmaml_pl.console.meter.time.monotonic", lambda: now[0])
    meter = Meter("work", 300)
    for second in range(1, 200):
        now[0] = float(second)
        meter.show(second, f"second {second}")
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()[1:]] == [
        "second 60",
        "second 120",
        "second 180",
    ]


def test_training_validation_baseline_and_meta_test_tell_run_metric_rate_and_time_left(
    at_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    module, data = small_maml(), small_data(meta_batch=1, val_tasks=300, test_tasks=300)
    trainer = small_trainer(
        max_steps=12,
        strategy=DMAMLStrategy(run_length=4),
        limit_val_batches=1.0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        enable_progress_bar=True,
        callbacks=[MetaTestReport(folder="r", baseline_budget=50.0), RunProgress()],
    )
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data, return_predictions=False)
    lines = capsys.readouterr().err.splitlines()
    rate, left, figure = r"[\d.]+ tasks/s", "less than a minute left", r"\d+\.\d{3}"
    for expected in (
        rf"run 1 \(2/4\), loss {figure}, meta-iteration 2/12, {rate}, {left}",
        rf"run 2 \(2/4\), loss {figure}, val/mse {figure}, meta-iteration 6/12, {rate}, {left}",
        rf"run 2, validation \(2/3\), val/mse {figure}, meta-iteration 8/12, {rate}, {left}",
        r"Training the baseline \.\.\.",
        rf"training the baseline, loss {figure}, step 2/\d+, {left}",
        rf"validation, mse {figure}, task 100/300, {rate}, {left}",
        rf"meta-test, mse {figure}, task 100/300, {rate}, {left}",
        rf"prediction, task 100/300, {rate}, {left}",
    ):
        assert any(re.fullmatch(expected, line) for line in lines), (expected, lines)


def test_in_environments_returns_and_steps_in_them_are_told(at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    module, data = small_policy(), small_navigation(val_tasks=60, test_tasks=60)
    trainer = small_trainer(
        max_steps=8,
        strategy=DMAMLStrategy(run_length=4),
        limit_val_batches=1.0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        enable_progress_bar=True,
        callbacks=[MetaTestReport(folder="r", baseline_budget=0.5), RunProgress()],
    )
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    lines = capsys.readouterr().err.splitlines()
    rate, left, figure = r"[\d,]+ a second", "less than a minute left", r"-\d+\.\d+"
    now = rf"return {figure} \(before {figure}\)"
    for expected in (
        rf"run 1 \(2/4\), {now}, meta-iteration 2/8, 480 env steps, {rate}, {left}",
        rf"run 2, validation \(2/3\), val/return {figure}, meta-iteration 8/8, [\d.]+ tasks/s, {left}",
        rf"run 2 \(2/4\), {now}, val/return {figure}, meta-iteration 6/8, 1,440 env steps, {rate}, {left}",
        r"Trained 2 runs, 8 meta-iterations on each of 1 worker, 24 tasks, 1,920 env steps, in \d+ s\.",
        rf"training the baseline, return {figure}, env step 240/960, {left}",
        rf"meta-test, return {figure}, task 20/60, [\d.]+ tasks/s, {left}",
    ):
        assert any(re.fullmatch(expected, line) for line in lines), (expected, lines)


def test_one_thing_is_not_told_as_several() -> None:
    assert [counted(count, "run") for count in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]


def test_a_large_count_is_told_in_few_words() -> None:
    assert [brief(count) for count in (999, 45_000, 1_234_567, 2e9)] == ["999", "45,000", "1.2 M", "2.0 G"]


def test_a_study_shows_the_last_line_that_a_training_has_said(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.touch()
    assert last_line(log) == ""
    log.write_text("first\n" + "x" * 10_000 + "\nrun 3 (1/10), loss 0.5\n")
    assert last_line(log) == "run 3 (1/10), loss 0.5"


def test_a_study_shows_no_line_that_is_still_being_written(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("The learning rate is 0.")
    assert last_line(log) == ""
    log.write_text("run 3 (1/10), loss 0.5\nrun 4 (2/10), loss 0.")
    assert last_line(log) == "run 3 (1/10), loss 0.5"


# -- in a terminal -------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(tmp_path, *words))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_a_terminal_shows_a_bar_and_ctrl_c_keeps_the_last_merge_and_says_the_command_that_goes_on(
    terminal: Callable[..., Terminal], sinusoid: str, tmp_path: Path
) -> None:
    words = ["fit", "--config", sinusoid, *flags(SMALL | {"trainer.max_steps": 1_000_000})]
    training = terminal(*words)
    bar = r"run \d+ \(\d+/10\), loss \d+\.\d{3}, val/mse \d+\.\d{3} .* \d+/1000000 \d+ tasks/s \S+ left \S+"
    training.wait_until(lambda text: re.search(bar, text))
    training.type(CTRL_C)
    assert training.end() == 130
    assert "Traceback" not in training.text
    kept = r"Stopped\. The last merge is kept in (\S+)\. To go on:\s+(python -m dmaml_pl .*) *\n"
    ((file, command),) = re.findall(kept, training.text)
    assert (tmp_path / file).is_file()
    assert shlex.split(command) == ["python", "-m", "dmaml_pl", *words, "--ckpt_path", "last"]


def test_a_terminal_that_is_closed_ends_the_training_and_the_last_merge_is_kept(
    terminal: Callable[..., Terminal], sinusoid: str, tmp_path: Path
) -> None:
    training = terminal("fit", "--config", sinusoid, *flags(SMALL | {"trainer.max_steps": 1_000_000}))
    training.wait_until(lambda text: re.search(r"run (?!1 )\d+ \(\d+/10\), loss ", text))
    assert training.hang_up() == 143
    assert len([*tmp_path.glob("mlruns/checkpoints/**/last.ckpt")]) == 1
    assert [run.info.status for run in MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db").search_runs(["1"])] == [
        "KILLED"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "shown", "told"),
    [
        ({"data.test_tasks": 1_000_000}, r"meta-test, mse \d", r"The meta-test alone:\s+python -m dmaml_pl test .*"),
        ({"report.baseline_budget": 1e6}, r"the baseline, loss \d", r"The meta-test alone:\s+python -m dmaml_pl test"),
        (
            {"data.val_tasks": 1_000_000, "trainer.val_check_interval": 1, "checkpoint.every_n_runs": 1},
            r"run 1, validation \(\d",
            r"Stopped\. The last merge is kept in \S+\. To go on:\s+python -m dmaml_pl fit .*--ckpt_path last",
        ),
    ],
)
def test_ctrl_c_elsewhere_in_a_training_says_what_is_left_to_do(
    terminal: Callable[..., Terminal], sinusoid: str, setting: dict[str, Any], shown: str, told: str
) -> None:
    training = terminal("fit", "--config", sinusoid, *flags(SMALL | setting))
    training.wait_until(lambda text: re.search(shown, text))
    training.type(CTRL_C)
    assert training.end() == 130
    assert "Traceback" not in training.text
    assert re.search(told, training.text), training.text


@pytest.mark.slow
def test_ctrl_c_in_a_study_ends_its_trainings_and_says_that_the_same_command_goes_on(
    terminal: Callable[..., Terminal], sinusoid: str
) -> None:
    settings = flags({"trainer.max_steps": 1_000_000, "model.compile": "false", "data.val_tasks": 10})
    study = terminal("study", "workers", "--config", sinusoid, "--workers", "1", "--seeds", "1", *settings)
    study.wait_until(lambda text: re.search(r"1 worker, seed 0: run \d+ .*tasks/s", text))
    study.type(CTRL_C)
    assert study.end() == 130
    assert "Traceback" not in study.text
    assert "The same command goes on" in study.text
