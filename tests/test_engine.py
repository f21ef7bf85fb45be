"""The learn2learn engine: equals the formula's meta-gradient, deterministic, converges, keeps properties."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from data_modules import Glyphs, Sinusoid
from dmaml_pl import _learn2learn
from dmaml_pl.algorithms import MAML
from dmaml_pl.engines import EngineChoice, Learn2LearnEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import MLP, Conv4
from dmaml_pl.networks.batch_norm import use_batch_statistics
from dmaml_pl.objectives import ObjectiveName, objective_of
from dmaml_pl.tasks import TaskBatch, stack_tasks
from tests.recipes import same, state_of
from tests.trainings import environment

Weights = dict[str, Tensor]


def written_out(network: nn.Module, batch: TaskBatch, rule: MAML, loss: Any) -> tuple[Tensor, Weights]:
    """The mean query loss after adaptation and its gradient, from the formula alone, without learn2learn."""
    meta = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    losses = []
    for number in range(batch.tasks):
        task, weights = batch.task(number), dict(meta)
        for _ in range(rule.steps):
            support = loss(functional_call(network, weights, task.support_x), task.support_y)
            gradients = torch.autograd.grad(support, list(weights.values()), create_graph=not rule.first_order)
            weights = {name: w - rule.inner_lr * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
        losses.append(loss(functional_call(network, weights, task.query_x), task.query_y))
    mean = torch.stack(losses).mean()
    gradients = torch.autograd.grad(mean, list(meta.values()))
    return mean.detach(), dict(zip(meta, gradients, strict=True))


def by_engine(network: nn.Module, batch: TaskBatch, rule: MAML, objective: ObjectiveName) -> tuple[Tensor, Weights]:
    network.zero_grad()
    learner = MetaLearner(network, rule)
    outcome = Learn2LearnEngine(objective_of(objective)).meta_gradient(learner, batch)
    return outcome.loss, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def image_batch(tasks: int = 2, ways: int = 3) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def images(samples: int) -> Tensor:
        return torch.rand(tasks, samples, 1, 16, 16, generator=generator, dtype=torch.float64)

    labels = torch.arange(ways).repeat(tasks, 2)
    return TaskBatch.of(images(2 * ways), labels, images(2 * ways), labels)


def problem(kind: str) -> tuple[nn.Module, TaskBatch, ObjectiveName, Any]:
    torch.manual_seed(0)
    if kind == "sinusoid":
        batch = Sinusoid(meta_batch=3, seed=0).sample(worker=0, run=0, iteration=0)
        return MLP(hidden=[16, 16]).double(), batch.map(Tensor.double), "regression", F.mse_loss
    network = Conv4(ways=3, image_size=16, filters=4, normalization="batch" if kind == "batch norm" else "group")
    return network.double(), image_batch(), "classification", F.cross_entropy


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["sinusoid", "batch norm", "group norm"])
def test_the_meta_gradient_equals_the_formula(kind: str, steps: int, first_order: bool) -> None:
    network, batch, objective, loss = problem(kind)
    rule = MAML(inner_lr=0.05, inner_steps=steps, first_order=first_order)
    expected_loss, expected = written_out(network, batch, rule, loss)
    found_loss, found = by_engine(network, batch, rule, objective)
    assert torch.allclose(found_loss, expected_loss, rtol=1e-12)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12), name


def test_the_same_input_gives_the_same_meta_gradient() -> None:
    network, batch, objective, _ = problem("batch norm")
    rule = MAML(inner_lr=0.05, inner_steps=2)
    assert same(by_engine(network, batch, rule, objective)[1], by_engine(network, batch, rule, objective)[1])


def test_second_order_differs_from_first_order() -> None:
    network, batch, objective, _ = problem("sinusoid")
    second = by_engine(network, batch, MAML(inner_lr=0.05), objective)[1]
    first = by_engine(network, batch, MAML(inner_lr=0.05, first_order=True), objective)[1]
    assert not same(first, second)


def test_the_meta_gradient_is_the_mean_over_the_tasks_whatever_their_order() -> None:
    network, batch, objective, _ = problem("batch norm")
    rule = MAML(inner_lr=0.05)
    forwards = by_engine(network, batch, rule, objective)[1]
    backwards = by_engine(network, batch.map(lambda tensor: tensor.flip(0)), rule, objective)[1]
    single = [by_engine(network, stack_tasks([batch.task(n)]), rule, objective)[1] for n in range(2)]
    for name in forwards:
        assert torch.allclose(forwards[name], backwards[name], rtol=1e-12, atol=1e-15)
        assert torch.allclose(forwards[name], (single[0][name] + single[1][name]) / 2, rtol=1e-12, atol=1e-15)


def test_batch_norm_with_running_statistics_neither_writes_nor_reads_them() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)).double()
    assert use_batch_statistics(network) == ["1"]
    assert list(network.buffers()) == []
    before = state_of(network)
    images = torch.rand(6, 1, 16, 16, dtype=torch.float64)
    training = network.train()(images)
    assert torch.equal(training, network.eval()(images))
    assert same(before, state_of(network))


def test_judging_tasks_leaves_weights_and_gradients_alone() -> None:
    network, batch, objective, _ = problem("sinusoid")
    rule = MAML(inner_lr=0.05)
    before = state_of(network)
    learner = MetaLearner(network, rule)
    curve = Learn2LearnEngine(objective_of(objective)).adaptation_curve(learner, batch, steps=4)
    assert curve.loss.shape == curve.metric.shape == (3, 5)
    assert same(before, state_of(network))
    assert all(p.grad is None for p in network.parameters())


def test_a_frozen_weight_stays_and_the_others_learn() -> None:
    network, batch, objective, _ = problem("sinusoid")
    frozen = next(network.parameters()).requires_grad_(False)
    gradients = by_engine(network, batch, MAML(inner_lr=0.05), objective)[1]
    assert frozen.grad is None
    assert len(gradients) == len(list(network.parameters())) - 1


def test_meta_gradient_descent_lowers_the_query_loss_after_adaptation() -> None:
    network, batch, objective, _ = problem("sinusoid")
    rule = MAML(inner_lr=0.02)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(300):
        loss, _ = by_engine(network, batch, rule, objective)
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 5


WITHOUT = """
import importlib.metadata, sys

HIDDEN, known = {"learn2learn", "mlflow", "optuna", "matplotlib", "pyarrow", "pandas"}, importlib.metadata.distribution

def distribution(name):  # by which libraries ask whether another one is there
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

importlib.metadata.distribution = distribution
sys.modules.update(dict.fromkeys(HIDDEN))  # importing them fails

import torch, dmaml_pl
from data_modules import Glyphs, Sinusoid
from dmaml_pl import _learn2learn
from dmaml_pl import MLP, Conv4, MetaLearning
from dmaml_pl.tasks import TaskBatch
import pytorch_lightning as pl

settings = dict(accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False, enable_checkpointing=False)
module, data = MetaLearning(MLP(hidden=[8]), run_length=2), Sinusoid(meta_batch=2, val_tasks=2, test_tasks=2)
trainer = pl.Trainer(**settings)
trainer.fit(module, data)
trainer.test(module, data, verbose=False)
x = torch.linspace(-1, 1, 5).unsqueeze(1)
assert dmaml_pl.FewShotLearner(module).adapt(x, x).predict(x).shape == (5, 1)
images, y = torch.rand(2, 6, 1, 16, 16), torch.tensor([0, 1, 2] * 2).repeat(2, 1)
pictures = MetaLearning(Conv4(ways=3, image_size=16, filters=4), objective="classification")
batch = TaskBatch.of(images, y, images, y)
assert pictures.engine.for_training(pictures.learner, batch).meta_gradient(pictures.learner, batch).loss > 0
optimizer = torch.optim.Adam(pictures.learner.parameters())  # a loop of one's own
for _ in range(2):
    optimizer.zero_grad()
    pictures.engine.for_training(pictures.learner, batch).meta_gradient(pictures.learner, batch)
    optimizer.step()
print(module.engine_in_use, pictures.engine_in_use)
"""


def test_training_evaluating_adapting_and_loops_of_ones_own_need_no_learn2learn_mlflow_optuna_or_matplotlib(
    tmp_path: Path,
) -> None:
    words = [sys.executable, "-W", "ignore", "-c", WITHOUT]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["vectorized", "vectorized"]


def test_what_needs_learn2learn_says_how_to_get_it_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_learn2learn, "installed", lambda: False)
    network, batch, objective, _ = problem("sinusoid")
    how = r"learn2learn is not installed \(pip install 'dmaml_pl\[learn2learn\]' && pip install --no-deps .*==0.2.0\)"
    with pytest.raises(ConfigError, match=rf"^model.engine is learn2learn, but {how}: set model.engine to auto\.$"):
        EngineChoice("learn2learn", objective_of(objective)).for_training(MetaLearner(network, MAML()), batch)
    with pytest.raises(ConfigError, match=rf"^data.sampler is learn2learn, but {how}: set it to batched\.$"):
        Glyphs(sampler="learn2learn", meta_batch=1).setup("fit")
