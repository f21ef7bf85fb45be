"""The LightningModule: judging under Lightning's inference settings, learning, and what it counts."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from data_modules import Glyphs
from dmaml_pl import MAML, Conv4, DMAMLStrategy, MetaLearning
from dmaml_pl.evaluation.curves import half_width
from dmaml_pl.networks import MLP
from tests.recipes import Recorder, maml_module, same, small_data, small_maml, small_trainer, state_of


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validation_adapts_under_both_of_lightnings_inference_settings(inference_mode: bool) -> None:
    module = small_maml(inner_lr=0.1)
    trainer = small_trainer(limit_val_batches=1.0, inference_mode=inference_mode)
    trainer.validate(module, small_data(), verbose=False)
    curve = [float(trainer.callback_metrics[f"val/mse_step_{step}"]) for step in range(3)]
    assert len(set(curve)) == 3
    batch = next(iter(small_data(val_tasks=8, meta_batch=8).val_dataloader()))
    expected = module.predictions_from(batch)
    for step in range(3):
        value = float((expected[:, step] - batch.query_y).square().mean())
        assert curve[step] == pytest.approx(value, rel=1e-5)


def test_validate_and_test_return_their_metrics_and_loggers_get_them_at_the_meta_iteration(tmp_path: Path) -> None:
    logger, module = CSVLogger(tmp_path), small_maml()
    trainer = small_trainer(limit_val_batches=1.0, logger=logger)
    trainer.fit(module, small_data())
    for found, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        (metrics,) = found(module, small_data(), verbose=False)
        assert {f"{stage}/loss", f"{stage}/mse", f"{stage}/mse_step_2", f"{stage}/mse_ci95"} <= metrics.keys()
        row = list(csv.DictReader(Path(logger.experiment.metrics_file_path).read_text().splitlines()))[-1]
        assert (row["step"], float(row[f"{stage}/mse"])) == ("10", metrics[f"{stage}/mse"])
    assert module.meta_test is not None
    assert metrics["test/untrained_mse"] == pytest.approx(module.meta_test.row(1)["untrained"])


def test_judging_in_the_middle_of_a_training_does_not_change_its_course() -> None:
    states = []
    for settings in ({}, {"limit_val_batches": 1.0, "val_check_interval": 1}):
        module = small_maml(run_length=3)
        small_trainer(**settings).fit(module, small_data())
        states.append(state_of(module))
    assert same(states[0], states[1])


def test_the_meta_test_judges_trained_and_untrained_weights_on_the_same_tasks() -> None:
    module, data = small_maml(meta_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2)), small_data()
    before = module.predictions_from
    trainer = small_trainer(max_steps=40)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    result = module.meta_test
    assert result is not None
    assert (result.tasks, result.steps) == (12, 2)
    assert float(result.trained[:, 1].mean()) < float(result.metrics["untrained"][:, 1].mean())
    tasks = next(iter(small_data(meta_batch=12).test_dataloader()))
    assert not torch.equal(before(tasks), module.predictions_from(tasks, untrained=True))


def test_the_confidence_interval_is_that_of_the_normal_distribution() -> None:
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert float(half_width(values)) == pytest.approx(1.959964 * 1.2909944 / 2, rel=1e-6)


def test_global_step_counts_meta_iterations_and_a_batch_is_a_run() -> None:
    recorder = Recorder()
    module = small_maml(run_length=7)
    trainer = small_trainer(max_steps=-1, max_epochs=2, callbacks=[recorder])
    trainer.fit(module, small_data(runs_per_epoch=3))
    assert trainer.global_step == 2 * 3 * 7
    assert module.runs_done == len(recorder.reports) == 6
    assert module.tasks_seen == 6 * 7 * 4


@pytest.mark.parametrize(
    ("strategy", "length"), [("auto", 5), ("dmaml", 5), (DMAMLStrategy(), 5), (DMAMLStrategy(run_length=2), 2)]
)
def test_the_run_length_is_the_strategys_or_else_the_modules(strategy: Any, length: int) -> None:
    recorder = Recorder()
    small_trainer(strategy=strategy, callbacks=[recorder]).fit(small_maml(run_length=5), small_data())
    assert len(recorder.reports[0]["series"]["loss"]) == length


def test_any_algorithm_trains_through_the_module() -> None:
    torch.manual_seed(0)
    by_rule = MetaLearning(MLP(hidden=[8, 8]), MAML(inner_lr=0.02, inner_steps=2), evaluation_steps=2)
    by_name = small_maml(inner_lr=0.02, inner_steps=2)
    for module in (by_rule, by_name):
        small_trainer().fit(module, small_data())
    assert same(state_of(by_rule), state_of(by_name))


def test_a_clipped_meta_gradient_moves_sgd_no_further_than_the_clip() -> None:
    module = small_maml(gradient_clip=1e-3, run_length=1, meta_optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    before = state_of(module)
    small_trainer(max_steps=1).fit(module, small_data())
    moved = torch.cat([(value - before[name]).flatten() for name, value in state_of(module).items()])
    assert 0 < float(moved.norm()) <= 1e-3 * 1.001


@pytest.fixture(scope="session")
def glyphs_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glyphs")


class Listener(pl.Callback):
    """Counts what Lightning tells of backwards and steps."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()

    def on_before_backward(self, *told: Any) -> None:
        self.heard["backward"] += 1

    def on_before_optimizer_step(self, *told: Any) -> None:
        self.heard["step"] += 1


@pytest.mark.parametrize("strategy", [lambda: "auto", DMAMLStrategy])
def test_callbacks_hear_of_backwards_and_steps_which_changes_nothing(strategy: Any) -> None:
    states, listener = [], Listener()
    for callbacks in ([listener], []):
        module = small_maml(
            engine="vectorized",
            gradient_clip=0.1,
            meta_schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        )
        trainer = small_trainer(callbacks=callbacks, strategy=strategy())
        trainer.fit(module, small_data())
        assert trainer.global_step == 10
        states.append(state_of(module))
    assert same(states[0], states[1])
    assert listener.heard == {"backward": 10, "step": 10}


def test_images_are_learned_to_be_learned(glyphs_cache: Path) -> None:
    pl.seed_everything(0)
    data = Glyphs(queries=3, meta_batch=4, test_tasks=40, cache_dir=str(glyphs_cache))
    module = maml_module(
        Conv4(ways=5, filters=8, pooling="stride"),
        objective="classification",
        inner_lr=0.4,
        evaluation_steps=3,
        meta_optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
    )
    trainer = small_trainer(max_steps=100)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    result = module.meta_test
    assert result is not None
    assert result.objective.metric == "accuracy"
    assert float(result.trained[:, 0].mean()) < 0.35
    assert float(result.trained[:, 3].mean()) > 0.45
    assert float(result.trained[:, 3].mean()) > float(result.metrics["untrained"][:, 3].mean()) + 0.1
