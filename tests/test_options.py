"""Lightning's and PyTorch's own lists, one by one: each option works, or is refused in one line before the training."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks, loggers
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.cli import ReduceLROnPlateau
from torch.optim import Optimizer, lr_scheduler

from dmaml_pl import DMAMLStrategy, Epochs, MergedAverage, MetaLearning
from dmaml_pl.cli.preflight import check_before
from dmaml_pl.cli.training import Making
from dmaml_pl.errors import ConfigError
from dmaml_pl.modules.trainer_options import check_steps
from tests.recipes import small_data, small_maml, small_trainer

STEPS = 4
PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


def outcome(module: MetaLearning | None = None, **settings: Any) -> str:
    """How a short training with validations ends: "works", or the line that refuses it."""
    settings = {"max_steps": STEPS, "strategy": DMAMLStrategy(run_length=2), "limit_val_batches": None} | settings
    trainer = small_trainer(val_check_interval=1, check_val_every_n_epoch=None, **settings)
    module, data = small_maml() if module is None else module, small_data()
    try:
        check_before("fit", trainer, module, data, meta_test=False)
    except ConfigError as error:
        return str(error)
    trainer.fit(module, data)
    assert trainer.global_step == STEPS
    return "works"


def on_the_page(name: str, end: str) -> None:
    """The table of the docs says of an option what was seen."""
    rows = [[cell.strip() for cell in line.split("|")] for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    (said,) = [row[2] for row in rows if f"`{name}`" in row[1]]
    assert said.startswith("works") == (end == "works"), said


# -- precision


@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'.`:UserWarning")
@pytest.mark.parametrize("name", ["64-true", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"])
def test_every_precision_works_or_is_refused(name: str) -> None:
    end = outcome(precision=name)
    on_the_page(name, end)
    assert end == "works" or end.startswith(f"trainer.precision is {name}, but must be one of 32-true, bf16-mixed")


def test_a_gpu_that_is_there_and_not_used_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = small_trainer()
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    with caplog.at_level("INFO"):
        check_before("fit", trainer, small_maml(), small_data(), meta_test=False)
    assert "A GPU is there, and not used: trainer.accelerator is cpu, which suits small networks." in caplog.messages


# -- meta-optimizers and their schedules


OPTIMIZERS = [each for each in vars(torch.optim).values() if inspect.isclass(each) and issubclass(each, Optimizer)]


@pytest.mark.parametrize("kind", [each for each in OPTIMIZERS if each is not Optimizer])
def test_every_optimizer_works_or_is_refused(kind: Any) -> None:
    end = outcome(small_maml(meta_optimizer=lambda parameters: kind(parameters, lr=1e-3)))
    on_the_page(kind.__name__, end)
    assert end == "works" or end.startswith("model.meta_optimizer")


SCHEDULES: dict[str, Any] = {
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": STEPS},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-3, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 1e-3, "total_steps": STEPS},
}
BASES = (lr_scheduler.LRScheduler, lr_scheduler._LRScheduler)
KINDS = [each for each in vars(lr_scheduler).values() if inspect.isclass(each)]
KINDS = [each for each in KINDS if issubclass(each, BASES) and each not in BASES]


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_works_or_is_refused(kind: Any) -> None:
    def schedule(optimizer: Optimizer) -> Any:
        if kind is lr_scheduler.SequentialLR:
            return kind(optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.LinearLR(optimizer)], [2])
        if kind is lr_scheduler.ChainedScheduler:
            return kind([lr_scheduler.ConstantLR(optimizer), lr_scheduler.LinearLR(optimizer)])
        return kind(optimizer, **SCHEDULES.get(kind.__name__, {}))

    end = outcome(small_maml(meta_schedule=schedule))
    on_the_page(kind.__name__, end)
    assert end == "works" or end.startswith(f"model.meta_schedule is {kind.__name__}")


def test_lightnings_own_plateau_is_refused_as_torchs_is() -> None:
    assert "which waits for a metric" in outcome(
        small_maml(meta_schedule=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss"))
    )


def test_a_schedule_that_ends_before_the_training_is_refused() -> None:
    module = small_maml(meta_schedule=lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=STEPS - 1))

    assert outcome(module) == (
        "model.meta_schedule.total_steps is 3, but the training makes more meta-iterations: set it to 4 or more."
    )


def test_a_users_own_optimizer_that_raises_is_one_line() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise LookupError("nothing here")

    end = outcome(small_maml(meta_optimizer=lambda parameters: Own(parameters, lr=1e-3)))
    assert end.startswith(
        f"model.meta_optimizer is Own, which cannot make a step and be kept (LookupError in {__file__}, line "
    )
    assert end.endswith(": nothing here).")


def test_a_learning_rate_that_is_no_number_is_the_schedules() -> None:
    class Own(lr_scheduler.LRScheduler):
        def get_lr(self) -> Any:
            return ["fast"]

    end = outcome(small_maml(meta_schedule=Own))
    assert end.startswith("model.meta_schedule is Own, which cannot make a step and be kept (could not convert string ")


def test_an_optimizer_within_another_is_tried_too() -> None:
    epochs = Epochs(torch.nn.Linear(1, 1).parameters(), torch.optim.LBFGS)
    with pytest.raises(ConfigError, match=r"^model.meta_optimizer is Epochs, which cannot make a .*LBFGS.step\(\)"):
        check_steps(epochs, None, 0)


# -- callbacks


CALLBACKS: dict[str, Any] = {
    "BackboneFinetuning": {},
    "BasePredictionWriter": {"write_interval": "batch"},
    "EarlyStopping": {"monitor": "val/loss", "patience": 9},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "ModelCheckpoint": {"dirpath": "kept"},
    "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.5},
    "OnExceptionCheckpoint": {"dirpath": "kept"},
    "StochasticWeightAveraging": {"swa_lrs": 0.01, "swa_epoch_start": 1},
    "ThroughputMonitor": {"batch_size_fn": lambda _: 1, "window_size": 2},
    "Timer": {"duration": {"hours": 1}},
}
NEEDS = {
    "LearningRateMonitor": {"logger": True},
    "DeviceStatsMonitor": {"logger": True},
    "ThroughputMonitor": {"logger": True},
    "ModelCheckpoint": {"enable_checkpointing": True},
    "OnExceptionCheckpoint": {"enable_checkpointing": True},
    "Checkpoint": {"enable_checkpointing": True},
}


@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`:UserWarning")
@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_callback_works_or_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = getattr(callbacks, name)
    needs: dict[str, Any] = dict(NEEDS.get(name, {}))
    if "logger" in needs:
        needs["logger"] = loggers.CSVLogger(".")
    if issubclass(kind, callbacks.ProgressBar):
        needs["enable_progress_bar"] = True
    if issubclass(kind, callbacks.ModelSummary):
        needs["enable_model_summary"] = True
    end = outcome(callbacks=[kind(**CALLBACKS.get(name, {}))], **needs)
    on_the_page(name, end)
    assert end == "works" or end.startswith(f"trainer.callbacks has {name}, which cannot work here: ")


def test_what_a_callback_of_ones_own_logs_may_be_monitored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Own(callbacks.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log("own/metric", 1.0, sync_dist=True)

    assert outcome(callbacks=[Own(), callbacks.EarlyStopping("own/metric")]) == "works"


def test_what_is_advised_in_place_of_lightnings_averages_works() -> None:
    assert outcome(callbacks=[MergedAverage()]) == "works"


# -- loggers


@pytest.mark.parametrize("name", [each for each in loggers.__all__ if each != "Logger"])
def test_every_logger_works_or_says_what_it_needs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"save_dir": "."} if name in ("CSVLogger", "TensorBoardLogger") else {}
    end = "works"
    making = Making({"trainer": {"logger": [{"class_path": f"pytorch_lightning.loggers.{name}", "init_args": {}}]}})
    try:
        logger = making(getattr(loggers, name), **settings)  # as the command line makes it
    except ModuleNotFoundError:
        told = str(making.refused)  # the line that the user is told
        assert told.startswith(f"trainer.logger is {name}, which cannot be made: ")
        assert told.count("pip install") <= 1
        assert "\n" not in told
    except ConfigError as error:
        end = str(error)
    else:
        end = outcome(logger=logger)
    on_the_page(name, end)
    if name == "MLFlowLogger":
        assert end == "trainer.logger is Lightning's MLFlowLogger: take dmaml_pl.MLflowTracker, which keeps more."


@pytest.mark.parametrize(
    ("kind", "settings", "rate"),
    [
        (lr_scheduler.ExponentialLR, {"gamma": -0.5}, "-0.0005"),
        (lr_scheduler.ExponentialLR, {"gamma": float("nan")}, "nan"),
        (lr_scheduler.CosineAnnealingLR, {"T_max": STEPS, "eta_min": -1.0}, "-"),
    ],
)
def test_a_schedule_that_leads_to_a_learning_rate_that_is_none_is_refused(
    kind: Any, settings: dict[str, float], rate: str
) -> None:
    end = outcome(small_maml(meta_schedule=lambda optimizer: kind(optimizer, **settings)))
    assert end.startswith(
        f"model.meta_schedule is {kind.__name__}, which cannot make a step and be kept (it leads to a learning "
    )
    assert f"rate of {rate}" in end


def test_a_meta_optimizer_whose_step_is_beyond_all_numbers_is_refused() -> None:
    end = outcome(small_maml(meta_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=float("inf"))))
    assert end.startswith("model.meta_optimizer")
