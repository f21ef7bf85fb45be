"""What a user's own class does wrong is one line with its place, before the work where that can be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger

from dmaml_pl import (
    MAML,
    DMAMLStrategy,
    MeanMerge,
    MergeRule,
    MetaLearning,
    OuterOptimizerMerge,
    Regression,
    TaskBatch,
    TaskDataModule,
)
from dmaml_pl.cli.parts import blame, check_parts
from dmaml_pl.cli.preflight import check_before
from dmaml_pl.cli.run import run
from dmaml_pl.errors import ConfigError, DmamlError, in_one_line, reason_of, tell
from tests.bad_input import (  # noqa: F401 - two are fixtures
    MODEL,
    SINUSOID,
    Refusal,
    as_the_user_left_it,
    changed,
    make_refusal,
)
from tests.recipes import small_data, small_maml, small_trainer

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
    assert text.startswith(
        f"data is Data, which failed: KeyError in {Path.cwd()}/my_classes.py, line 7: 'sample'. The way there "
    )
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


class Unique(torch.nn.Linear):
    """Cannot be copied, as the meta-test's untrained network is."""

    def __deepcopy__(self, memo: object) -> Unique:
        raise TypeError("there is one of it")


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
        (Unique(1, 1), f"model.network cannot be copied and kept (TypeError in {__file__}, line "),
        (Broken(1, 1), "No engine can run model.network with model.algorithm: Broken cannot be adapted ("),
    ],
)
def test_a_users_network_that_cannot_be_trained_is_told(network: torch.nn.Module, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        MetaLearning(network, MAML()).check_task(small_data().evaluation_task("val", 0))
    assert str(refused.value).startswith(expected)


# ---- what is found before the work


X = torch.zeros(5, 1)


class Tasks(TaskDataModule):
    """Gives whatever `gives` makes of the seed."""

    def __init__(self, gives: Any) -> None:
        super().__init__(shots=5, queries=5, meta_batch=2, val_tasks=2, test_tasks=2)
        self.gives = gives

    def sample_task(self, split: str, seed: int) -> TaskBatch:
        made: TaskBatch = self.gives(seed)
        return made


@pytest.mark.parametrize(
    ("gives", "expected"),
    [
        (lambda seed: None, "sample_task gives a NoneType, but must give what TaskBatch.of makes."),
        (lambda seed: TaskBatch.of(X[seed % 4 :], X, X, X), "sample_task gives tasks whose tensors differ in shape "),
        (lambda seed: TaskBatch.of(X, X, X, X * float("nan")), "query_y holds values that are not finite numbers, of "),
        (lambda seed: TaskBatch.of(X.clone().requires_grad_(), X, X, X), "support_x requires a gradient, but samples "),
        (lambda seed: TaskBatch.of(X, X, torch.zeros(5, 2), X), "data gives query samples of shape (2,), but support "),
        (lambda seed: TaskBatch.of(*[X.to("meta")] * 4), "data is Tasks, whose tasks cannot be used (Tensor.item() "),
    ],
)
def test_tasks_that_are_none_are_told_before_the_work(gives: Any, expected: str) -> None:
    with pytest.raises(DmamlError) as refused:
        check_before("fit", small_trainer(), small_maml(), Tasks(gives), meta_test=False)
    assert str(refused.value).startswith(expected)


def test_tasks_of_the_meta_test_are_tried_before_the_training(refusal: Refusal) -> None:
    Path("test_data.py").write_text(f"{DATA}        return TaskBatch.of(x, x, x, x) if split != 'test' else 1 / 0\n")
    text = refusal(config=changed(SINUSOID, {"data.class_path": "test_data.Data", "meta_test": True}))
    place = f"{Path.cwd()}/test_data.py, line 11"
    assert text.startswith(
        f"data is Data, which failed: ZeroDivisionError in {place}: division by zero. The way there "
    )


MUST = "but must give one number for all samples of a task"


@pytest.mark.parametrize(
    ("method", "gives", "expected"),
    [
        ("support_loss", lambda output, y: (output - y) ** 2, f"gives a tensor (shape: (5, 1)), {MUST}"),
        ("query_loss", lambda output, y: None, f"gives None, {MUST}"),
        ("measure", lambda output, y: "good", f"gives 'good', {MUST}"),
        ("query_loss", lambda output, y: output.detach().sum(), "does not depend on the network's output, so that "),
        ("query_loss", lambda output, y: output.softmax(1).sum(), "does not depend on the network's output, so that "),
        ("query_loss", lambda output, y: output.mean() * float("nan"), "gives nan for finite numbers."),
    ],
)
def test_an_objective_that_gives_no_loss_is_told_before_the_work(method: str, gives: Any, expected: str) -> None:
    own = type("Own", (Regression,), {method: staticmethod(gives)})()
    module = MetaLearning(torch.nn.Linear(1, 1), MAML(), own)
    with pytest.raises(ConfigError) as refused:
        module.check_task(small_data(shots=5, queries=5).evaluation_task("val", 0))
    assert str(refused.value).startswith(f"model.objective is Own, whose {method} {expected}")


def test_an_objective_that_cannot_tell_better_from_worse_is_refused() -> None:
    for name, value, expected in (
        ("better", "up", "up, but must be min or max."),
        ("metric", "", "'', but must be a name of its own"),
        ("metric", "loss", "'loss', but must be a name of its own"),
    ):
        with pytest.raises(ConfigError) as refused:
            MetaLearning(torch.nn.Linear(1, 1), MAML(), type("Own", (Regression,), {name: value})())
        assert str(refused.value).startswith(f"model.objective.{name} is {expected}")


@pytest.mark.parametrize(
    ("number", "code", "expected"),
    [
        (
            3,
            "class Own(Objective):\n    pass",
            "model.objective cannot be objective3.Own: it is abstract, and needs measure, support_loss.",
        ),
        (
            4,
            "class Own(Regression):\n    def support_loss(self, output, y):\n        return [][0]",
            "model.objective is Own, which failed: IndexError in {folder}/objective4.py, line 6: list index out of ra",
        ),
    ],
)
def test_an_objective_that_is_none_is_told_before_the_work(
    number: int, code: str, expected: str, refusal: Refusal
) -> None:
    Path(f"objective{number}.py").write_text(f"{OBJECTIVE}{code}\n")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.objective": {"class_path": f"objective{number}.Own"}}))
    assert text.startswith(expected.format(folder=Path.cwd()))


class NoMerge(MeanMerge):
    """Gives nothing."""

    def merge(self, start: torch.Tensor, mean: torch.Tensor) -> Any:
        return None


class ShortMerge(MeanMerge):
    """Gives a part."""

    def merge(self, start: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return mean[:3]


class LessThanNothing(MeanMerge):
    """Weighs what no run can weigh."""

    def weight(self, report: Any) -> float:
        return -1.0


class Unkept(MeanMerge):
    """Has a state that no file holds."""

    def state_dict(self) -> dict[str, Any]:
        return {"f": lambda: 3}


class Asks(MeanMerge):
    """Wants to know what no report tells."""

    def weight(self, report: Any) -> float:
        return float(report["nope"])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (NoMerge(), "'NoneType' object has "),
        (ShortMerge(), "it gives [0.001"),
        (LessThanNothing(), "a run counts -1.0"),
        (Unkept(), "an't pickle"),
        (Asks(), f"KeyError in {__file__}, line "),
        (OuterOptimizerMerge(torch.optim.LBFGS), "LBFGS.step() missing 1 "),
    ],
)
def test_a_merge_rule_that_cannot_merge_is_told_before_the_work(rule: MergeRule, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_before(
            "fit", small_trainer(strategy=DMAMLStrategy(merge=rule)), small_maml(), small_data(), meta_test=False
        )
    assert str(refused.value).startswith(f"trainer.strategy.merge is {type(rule).__name__}, which cannot merge (")
    assert expected in str(refused.value)


def test_an_error_of_a_users_own_that_is_no_exception_is_one_line(refusal: Refusal) -> None:
    Path("own_error.py").write_text("class Own(BaseException):\n    pass\n\n\nraise Own('x')\n")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.network": {"class_path": "own_error.Net"}}))
    assert text.startswith(f"Own in {Path.cwd()}/own_error.py, line 5: x. The way there stands in {Path.cwd()}/dmaml-")
    assert "raise Own('x')" in Path(text.removesuffix(".").rpartition(" ")[2]).read_text()


# ---- what comes while it works


def test_an_error_in_a_users_own_callback_is_one_line_while_it_trains_too(capfd: pytest.CaptureFixture[str]) -> None:
    Path("own_callback.py").write_text(
        "from pytorch_lightning import Callback\n\n\nclass Own(Callback):\n"
        "    def on_train_start(self, trainer, module):\n        open('/nope/x')\n"
    )
    callbacks = [{"class_path": "own_callback.Own"}]
    config = changed(SINUSOID, {"trainer.callbacks": callbacks, "trainer.logger": False})
    Path("a.yaml").write_text(yaml.safe_dump(config))
    assert run(["fit", "--config", "a.yaml"]) == 1
    told = capfd.readouterr().err.splitlines()
    place = f"{Path.cwd()}/own_callback.py, line 6"
    assert told[-1].startswith(
        f"dmaml: error: trainer.callbacks has Own, which failed: FileNotFoundError in {place}: [Errno 2] No such file "
    )
    assert sum("error" in line for line in told) == 1


def test_an_error_of_a_library_names_the_setting_whose_object_it_is_of() -> None:
    stopping, network = pl.callbacks.EarlyStopping("val/loss"), torch.nn.Linear(2, 1)
    parts = [("trainer.callbacks", stopping), ("model.network", network)]
    for call, expected in (
        (lambda: stopping.load_state_dict({}), "trainer.callbacks has EarlyStopping, which failed"),
        (lambda: network(torch.zeros(3)), "model.network is Linear, which failed"),
    ):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is
            call()
        blame(raised.value, parts)
        assert raised.value.__notes__ == [expected]
        with pytest.raises(ConfigError, match=f"^{expected}: .*Error in .* The way there stands in "), in_one_line():
            raise raised.value


class Listening(pl.Callback):
    """Takes what hooks of this package give, in another number."""

    def on_run_end(self, report: object) -> None:
        """Too few."""

    def of_its_own(self, something: object) -> None:
        """Nobody else calls it."""


class Called(pl.Callback):
    """Is called with what it does not take."""

    @classmethod
    def on_fit_start(cls) -> None:  # type: ignore[override]
        """Too few."""


class Adapts(MAML):
    """Takes less than a step gets."""

    def step(self, fast: object) -> object:  # type: ignore[override]
        """Too few."""
        return fast


@pytest.mark.parametrize(
    ("setting", "made", "expected"),
    [
        (
            "trainer.callbacks",
            Listening(),
            "has Listening, whose on_run_end cannot be called (too many positional arguments): it gets (trainer, ",
        ),
        ("trainer.callbacks", Called(), "has Called, whose on_fit_start cannot be called (too many positional argum"),
        (
            "model.algorithm",
            Adapts(),
            "is Adapts, whose step cannot be called (too many positional arguments): it ",
        ),
        (
            "trainer.logger",
            CSVLogger("/proc/x"),
            "is CSVLogger, whose save_dir is /proc/x, which cannot be written (No such file or directory): set it",
        ),
        (
            "trainer.callbacks",
            pl.callbacks.ModelCheckpoint(filename="{nope:.2x}"),
            "has ModelCheckpoint, whose filename is '{nope:.2x}', of which no name can be made (",
        ),
    ],
)
def test_what_a_part_of_a_training_is_asked_before_it(setting: str, made: object, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_parts([(setting, made)], writes=True)
    assert str(refused.value).startswith(f"{setting} {expected}")


# ---- how it is told


def test_what_is_told_is_one_line_of_bounded_words_that_no_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    tell(ConfigError(f"{'a' * 5000} is\n\x1b[31mred"))
    assert capsys.readouterr().err == f"dmaml: error: {'a' * 400}... is \\x1b[31mred\n"


def test_the_words_of_an_error_are_bounded_and_a_key_alone_is_called_one() -> None:
    assert reason_of(RuntimeError("too long " * 1000)) == ("too long " * 1000)[:600].rstrip()
    assert reason_of(KeyError("x")) == "KeyError: 'x'"
