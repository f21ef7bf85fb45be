"""What is called from Python with something else than it takes is one line that names the setting, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn

import dmaml_pl
from dmaml_pl import (
    MAML,
    MLP,
    MetaLearning,
    Sinusoid,
    TaskBatch,
    TaskDataModule,
    fit,
)
from dmaml_pl.cli.parts import check_parts, parts_of
from dmaml_pl.cli.preflight import check_before
from dmaml_pl.errors import ConfigError, DataError, DmamlError
from dmaml_pl.serving.export import export
from dmaml_pl.tasks import stack_tasks
from tests.bad_input import SINUSOID, Refusal, as_the_user_left_it, changed, make_refusal  # noqa: F401 - fixtures
from tests.recipes import small_data, small_maml, small_trainer

anything: Any = dmaml_pl
"""As somebody writes it who asks no type checker."""

FEW: dict[str, Any] = {"max_steps": 2, "logger": False, "enable_progress_bar": False, "meta_test": False}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: anything.MLP("1"), "model.network.inputs is '1', but must be a whole number."),
        (lambda: anything.MLP(1, 40), "model.network.hidden is 40, but must be a list of whole numbers."),
        (
            lambda: anything.ResNet12(widths=[1, 2, 3.5, 4]),
            "model.network.widths[2] is 3.5, but must be a whole number.",
        ),
        (lambda: anything.Backbone(18), "model.network.body is 18, but must be of type Module, such as 'torchvi"),
        (lambda: anything.LoRA(None), "model.network.network is None, but must be of type Module"),
        (lambda: anything.MAML(inner_lr="0.1"), "model.algorithm.inner_lr is '0.1', but must be a number."),
        (lambda: anything.MAML(inner_steps=2.5), "model.algorithm.inner_steps is 2.5, but must be a whole number."),
        (lambda: anything.Sinusoid(shots="5"), "data.shots is '5', but must be a whole number."),
        (
            lambda: anything.DMAMLStrategy(merge="mean"),
            "trainer.strategy.merge is 'mean', but must be of type MergeRule",
        ),
        (lambda: anything.DMAMLStrategy(timeout="60"), "trainer.strategy.timeout is '60', but must be a number."),
        (
            lambda: anything.MetaLearning(MLP(), MAML),
            "model.algorithm is <class 'dmaml_pl.algorithms.maml.MAML'>, but must ",
        ),
        (
            lambda: anything.MetaLearning(MLP(), freeze="layers.*"),
            "model.freeze is 'layers.*', but must be a list of patterns, ",
        ),
        (lambda: MetaLearning(nn.ReLU()), "model.network has no parameters, which leaves nothing to learn."),
        (lambda: anything.load(None), "The path of the checkpoint is None, but must be one, such as "),
        (lambda: anything.fit(MLP(), Sinusoid(), **FEW), "model is MLP("),
        (
            lambda: fit(small_maml(), small_data(), **FEW, callbacks=[pl.callbacks.EarlyStopping]),
            "trainer.callbacks is ",
        ),
        (
            lambda: fit(small_maml(), small_data(), **FEW | {"logger": "mlflow"}),
            "trainer.logger is 'mlflow', but must ",
        ),
        (
            lambda: fit(small_maml(), small_data(), **FEW | {"max_steps": "2"}),
            "trainer.max_steps is '2', but must be i",
        ),
    ],
)
def test_a_value_of_another_type_is_one_line_that_names_its_setting(call: Callable[[], Any], expected: str) -> None:
    with pytest.raises(DmamlError) as refused:
        call()
    assert str(refused.value).startswith(expected)


def test_what_fails_before_the_work_is_one_line_from_python_too(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Sinusoid):
        def prepare_data(self) -> None:
            raise KeyError("x")

    with pytest.raises(ConfigError, match=r"^data is Broken, which failed: KeyError in .*test_bad_python.py, line"):
        fit(small_maml(), Broken(), **FEW)
    assert "Traceback" not in capfd.readouterr().err


def test_an_optimizer_that_steps_other_weights_is_refused() -> None:
    other = MLP()
    module = MetaLearning(MLP(), meta_optimizer=lambda weights: torch.optim.Adam(other.parameters()))
    with pytest.raises(ConfigError, match=r"model\.meta_optimizer is Adam, which steps none of the weights"):
        module.configure_optimizers()


# ---- a user's own classes


X = torch.rand(3, 1)


class Drawn(TaskDataModule):
    """Draws from the generator that all share."""

    def sample_task(self, split: str, seed: int) -> TaskBatch:
        """Whatever the seed is."""
        return TaskBatch.of(*torch.rand(4, 5, 1))


def test_tasks_that_do_not_follow_from_their_seed_are_told_before_the_work() -> None:
    data = Drawn(shots=5, queries=5, meta_batch=2, val_tasks=2, test_tasks=2)
    with pytest.raises(ConfigError, match="data is Drawn, whose tasks differ though their seed is the same"):
        check_before("fit", small_trainer(), small_maml(), data, meta_test=False)


def test_a_task_made_without_its_way_to_be_made_is_told() -> None:
    with pytest.raises(DataError, match=r"sample_task gives a TaskBatch, but must give what TaskBatch\.of makes"):
        stack_tasks([TaskBatch(X, X, X, X)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("y", "given"),
    [
        (torch.tensor([1, 2, 3]), r"torch.int64, of shape \(3,\), from 1 to 3"),
        (torch.arange(3, dtype=torch.int32), r"torch.int32, of shape \(3,\), from 0 to 2"),
        (torch.arange(3)[:, None], r"torch.int64, of shape \(3, 1\), from 0 to 2"),
        (torch.eye(3), r"torch.float32, of shape \(3, 3\), from 0 to 1"),
    ],
)
def test_targets_that_are_no_classes_are_told_as_they_are(y: torch.Tensor, given: str) -> None:
    module = MetaLearning(MLP(1, [2], 3), MAML(), "classification")
    with pytest.raises(ConfigError, match=f"the data has targets of type {given}: make them one class a sample"):
        module.check_task(TaskBatch.of(X, y, X, y))


class Misnamed(pl.Callback):
    """Waits for what never comes."""

    def on_train_epoch_ends(self) -> None:
        """Of one letter more than Lightning's."""

    def on_something_else(self) -> None:
        """Nothing of Lightning's is near."""


def test_a_hook_that_nothing_calls_is_told_with_the_one_that_is_near() -> None:
    told = "trainer.callbacks has Misnamed, whose on_train_epoch_ends nothing calls. Did you mean on_train_epoch_end?"
    with pytest.raises(ConfigError) as refused:
        check_parts([("trainer.callbacks", Misnamed())], writes=False)
    assert str(refused.value) == told


def test_the_logger_of_a_first_try_is_not_taken_for_one_that_writes() -> None:
    trainer = small_trainer(fast_dev_run=1, logger=CSVLogger("."))
    check_parts(parts_of(trainer, small_maml(), small_data()), writes=True)


# ---- configurations


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 5}, "max_steps is not a setting. Did you mean trainer.max_steps?"),
        ({"trainer.run_length": 5}, "trainer.run_length is not a setting. Did you mean trainer.strategy.run_length?"),
        ({"lr": 0.1}, "lr is not a setting. Did you mean model.meta_optimizer.lr?"),
        ({"report": "yes"}, "report is yes, but must be settings by name: leave it out for its defaults."),
        (
            {"model.init_args.network": "mlp"},
            "model.network is 'mlp', but must be the class path of a Module. Did you m",
        ),
        (
            {
                "trainer.callbacks": [
                    {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "mode": "max"}}
                ]
            },
            "trainer.callbacks has EarlyStopping, whose mode is max, but must be min for val/loss.",
        ),
    ],
)
def test_a_setting_elsewhere_or_of_another_kind_is_told_with_what_is_meant(
    settings: dict[str, Any], expected: str, refusal: Refusal
) -> None:
    assert refusal(config=changed(SINUSOID, settings)).startswith(expected)


def test_settings_that_an_option_gives_together_are_looked_at_one_by_one(refusal: Refusal) -> None:
    text = refusal("--trainer={max_step: 2}", config=SINUSOID)
    assert text.startswith("trainer.max_step is not a setting. Did you mean trainer.max_steps?")


def test_a_folder_that_is_called_as_another_format_is_not_made() -> None:
    with pytest.raises(ConfigError, match=r"FOLDER is out\.onnx, but must be a folder: dmaml adapt --onnx FILE"):
        export(Path("best.ckpt"), Path("out.onnx"))


def test_what_has_neither_a_type_nor_a_default_must_be_given(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("untyped_net.py").write_text(
        "from dmaml_pl import MLP\n\n\nclass Net(MLP):\n    def __init__(self, width):\n        super().__init__()\n"
    )
    text = refusal(config=changed(SINUSOID, {"model.init_args.network": "untyped_net.Net"}))
    assert text == "Not set: model.network.width, which Net needs."


def test_a_module_of_python_that_hides_a_users_own_is_told(refusal: Refusal) -> None:
    Path("random.py").write_text("class Net: pass\n")
    text = refusal(config=changed(SINUSOID, {"model.init_args.network": {"class_path": "random.Net"}}))
    assert text.partition("random.py ")[2].startswith("hides random.py, which needs another name.")


def test_callbacks_may_watch_whatever_a_validation_logs(tmp_path: Path) -> None:
    watched = ["val/loss", "val/mse", "val/mse_step_0", "val/mse_ci95", "train/loss"]
    callbacks = [pl.callbacks.EarlyStopping(name, patience=9) for name in watched]
    fit(small_maml(), small_data(), callbacks=callbacks, default_root_dir=tmp_path, val_check_interval=1, **FEW)
