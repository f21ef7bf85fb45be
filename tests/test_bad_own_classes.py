"""What a user's own class does wrong is one line with its place, before the work where that can be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from dmaml_pl import MAML, MetaLearning
from dmaml_pl.cli.run import run
from dmaml_pl.errors import ConfigError, reason_of, tell
from tests.bad_input import (  # noqa: F401 - two are fixtures
    MODEL,
    SINUSOID,
    STRATEGY,
    Refusal,
    as_the_user_left_it,
    changed,
    make_refusal,
)
from tests.recipes import small_data
from tests.trainings import lay_store

DATA = """\
import torch
from dmaml_pl import TaskBatch, TaskDataModule


class Data(TaskDataModule):
    def __init__(self, **settings):
        super().__init__(shots=5, queries=5, **settings)

    def sample_task(self, split, seed):
        x = torch.zeros(5, 1)
"""
OBJECTIVE = "from dmaml_pl import Objective, Regression\n\n\n"
MERGE = "from dmaml_pl import MeanMerge, MergeRule\n\n\n"


@pytest.fixture(name="here", autouse=True)
def import_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m` does."""
    monkeypatch.syspath_prepend(Path.cwd())


def test_a_class_of_the_users_that_ends_the_command_is_no_success(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("ends_all.py").write_text("import sys\nsys.exit(0)\n")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.network": {"class_path": "ends_all.Net"}}))
    assert text.startswith("ends_all has ended the command, by sys.exit or the like: let it raise an error instead.")
    Path("raises_one.py").write_text("raise RuntimeError('two\\nlines')\n")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.network": {"class_path": "raises_one.Net"}}))
    assert text.startswith(
        f"model.network cannot be raises_one.Net: RuntimeError in {Path.cwd()}/raises_one.py, line 1: two lines."
    )


def test_what_a_class_of_the_users_raises_before_the_work_is_one_line_with_its_place(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("my_classes.py").write_text(
        "from data_modules import Sinusoid\nfrom dmaml_pl import MLP\n\n\nclass Data(Sinusoid):\n"
        "    def sample_task(self, split, seed):\n        return {}['sample']\n\n\nclass Net(MLP):\n"
        "    def __init__(self):\n        raise KeyError\n"
    )
    text = refusal(config=changed(SINUSOID, {"data.class_path": "my_classes.Data"}))
    assert text.startswith(f"KeyError in {Path.cwd()}/my_classes.py, line 7: 'sample'. PYTHONDEVMODE=1 shows ")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.network": {"class_path": "my_classes.Net"}}))
    assert text == f"model.network is Net, which cannot be made: KeyError in {Path.cwd()}/my_classes.py, line 12."


class InPlace(torch.nn.Linear):
    """Changes the samples that it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(2.0))


class NoNumber(torch.nn.Linear):
    """Gives what no training can mend."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float("nan")


class Broken(torch.nn.Linear):
    """Gives what PyTorch cannot differentiate."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x).exp()
        return y.mul_(2.0) if torch.is_grad_enabled() else y


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (InPlace(1, 1), "model.network is InPlace, which changes the samples that it is given: "),
        (
            NoNumber(1, 1),
            "model.network is NoNumber, which gives values that are not finite numbers before any trainin",
        ),
        (Broken(1, 1), "No engine can run model.network with model.algorithm: Broken cannot be adapted ("),
    ],
)
def test_a_users_network_that_cannot_be_trained_is_told(network: torch.nn.Module, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        MetaLearning(network, MAML()).check_task(small_data().evaluation_task("val", 0))
    assert str(refused.value).startswith(expected)


# ---- what is found before the work


@pytest.mark.parametrize(
    ("number", "code", "expected"),
    [
        (0, "return None", "sample_task gives a NoneType, but must give what TaskBatch.of makes."),
        (1, "return TaskBatch.of(x[seed % 4 :], x, x, x)", "sample_task gives tasks whose tensors differ in shape "),
        (
            2,
            "return TaskBatch.of(x, x, x, x) if split != 'test' else 1 / 0",
            "ZeroDivisionError in {folder}/data2.py, line 11: division by zero. PYTHONDEVMODE=1 shows the way there.",
        ),
        (
            3,
            "return TaskBatch.of(x, x, x, x * float('nan'))",
            "query_y holds values that are not finite numbers, of which no loss can be made.",
        ),
    ],
)
def test_tasks_that_are_none_are_told_before_the_work(number: int, code: str, expected: str, refusal: Refusal) -> None:
    Path(f"data{number}.py").write_text(f"{DATA}        {code}\n")
    text = refusal(config=changed(SINUSOID, {"data.class_path": f"data{number}.Data", "meta_test": True}))
    assert text.startswith(expected.format(folder=Path.cwd()))


@pytest.mark.parametrize(
    ("number", "code", "expected"),
    [
        (
            0,
            "class Own(Regression):\n    def support_loss(self, output, y):\n        return (output - y) ** 2",
            "model.objective is Own, whose support_loss gives a tensor (shape: (10, 1)), but must give one number for ",
        ),
        (
            5,
            "class Own(Regression):\n    def measure(self, output, y):\n        return 'good'",
            "model.objective is Own, whose measure gives 'good', but must give one number for all samples of a task",
        ),
        (
            1,
            "class Own(Regression):\n    def query_loss(self, output, y):\n        return None",
            "model.objective is Own, whose query_loss gives None, but must give one number for all samples of a task",
        ),
        (2, "class Own(Regression):\n    better = 'up'", "model.objective.better is up, but must be min or max."),
        (
            3,
            "class Own(Objective):\n    pass",
            "model.objective cannot be objective3.Own: it is abstract, and needs measure, support_loss.",
        ),
        (
            4,
            "class Own(Regression):\n    def support_loss(self, output, y):\n        return [][0]",
            "IndexError in {folder}/objective4.py, line 6: list index out of range. PYTHONDEVMODE=1 shows the way ",
        ),
    ],
)
def test_an_objective_that_is_none_is_told_before_the_work(
    number: int, code: str, expected: str, refusal: Refusal
) -> None:
    Path(f"objective{number}.py").write_text(f"{OBJECTIVE}{code}\n")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.objective": {"class_path": f"objective{number}.Own"}}))
    assert text.startswith(expected.format(folder=Path.cwd()))


@pytest.mark.parametrize(
    ("number", "code", "expected"),
    [
        (0, "class Own(MergeRule):\n    def merge(self, start, mean):\n        return None", "'NoneType' object has "),
        (1, "class Own(MergeRule):\n    def merge(self, start, mean):\n        return mean[:3]", "it gives [0.001"),
        (2, "class Own(MeanMerge):\n    def weight(self, report):\n        return -1.0", "a run counts -1.0"),
        (3, "class Own(MeanMerge):\n    def state_dict(self):\n        return {'f': lambda: 3}", "an't pickle"),
        (
            4,
            "class Own(MeanMerge):\n    def weight(self, report):\n        return report['nope']",
            "KeyError in {folder}/merge4.py, line 6: 'nope'",
        ),
    ],
)
def test_a_merge_rule_that_cannot_merge_is_told_before_the_work(
    number: int, code: str, expected: str, refusal: Refusal
) -> None:
    Path(f"merge{number}.py").write_text(f"{MERGE}{code}\n")
    text = refusal(config=changed(SINUSOID, {f"{STRATEGY}.merge": {"class_path": f"merge{number}.Own"}}))
    assert text.startswith("trainer.strategy.merge is Own, which cannot merge (")
    assert expected.format(folder=Path.cwd()) in text


def test_an_outer_optimizer_that_asks_for_more_than_a_gradient_is_told_before_the_work(refusal: Refusal) -> None:
    merge = {"class_path": "dmaml_pl.OuterOptimizerMerge", "init_args": {"optimizer": "torch.optim.LBFGS"}}
    text = refusal(config=changed(SINUSOID, {f"{STRATEGY}.merge": merge}))
    assert text.startswith("trainer.strategy.merge is OuterOptimizerMerge, which cannot merge (LBFGS.step() missing 1 ")


def test_an_error_of_a_users_own_that_is_no_exception_is_one_line(refusal: Refusal) -> None:
    Path("own_error.py").write_text("class Own(BaseException):\n    pass\n\n\nraise Own('x')\n")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.network": {"class_path": "own_error.Net"}}))
    assert text == f"Own in {Path.cwd()}/own_error.py, line 5: x. PYTHONDEVMODE=1 shows the way there."


# ---- what comes while it works


@pytest.mark.parametrize(
    ("number", "error", "expected"),
    [
        (0, "1 / 0", "ZeroDivisionError in {folder}/callback0.py, line 6: division by zero. PYTHONDEVMODE=1 shows "),
        (1, "open('/nope/x')", "FileNotFoundError in {folder}/callback1.py, line 6: [Errno 2] No such file or "),
    ],
)
def test_an_error_in_a_users_own_callback_is_one_line_while_it_trains_too(
    number: int, error: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(f"callback{number}.py").write_text(
        "from pytorch_lightning import Callback\n\n\nclass Own(Callback):\n"
        f"    def on_train_start(self, trainer, module):\n        {error}\n"
    )
    callbacks = [{"class_path": f"callback{number}.Own"}]
    Path("a.yaml").write_text(yaml.safe_dump(changed(SINUSOID, {"trainer.callbacks": callbacks})))
    lay_store(Path.cwd())
    assert run(["fit", "--config", "a.yaml"]) == 1
    told = capfd.readouterr().err.splitlines()
    assert told[-1].startswith(f"dmaml: error: {expected.format(folder=Path.cwd())}")
    assert sum("error" in line for line in told) == 1


def test_a_logger_that_cannot_write_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "a.yaml"}}
    Path("a.yaml").write_text(yaml.safe_dump(changed(SINUSOID, {"trainer.logger": logger})))
    assert run(["fit", "--config", "a.yaml"]) == 1
    told = capfd.readouterr().err.splitlines()
    assert told[-1] == f"dmaml: error: {Path.cwd()}/a.yaml/lightning_logs cannot be used: Not a directory."


# ---- how it is told


def test_what_is_told_is_one_line_of_bounded_words_that_no_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    tell(ConfigError(f"{'a' * 5000} is\n\x1b[31mred"))
    assert capsys.readouterr().err == f"dmaml: error: {'a' * 400}... is \\x1b[31mred\n"


def test_the_words_of_an_error_are_bounded_and_a_key_alone_is_called_one() -> None:
    assert reason_of(RuntimeError("too long " * 1000)) == ("too long " * 1000)[:600].rstrip()
    assert reason_of(KeyError("x")) == "KeyError: 'x'"
