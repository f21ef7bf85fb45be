"""A frozen body under a head that adapts, beside no more than the body's forward pass and the head's inner loop.

Bodies have weights at random, and batch norms their running statistics.

Legend: T tasks, B samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from benchmarks.speed.timing import Ratio, Times, in_turn
from dmaml_pl import MAML, Backbone, MetaLearning
from dmaml_pl.engines import EngineChoice
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import Samples, TaskBatch

TASKS, WAYS, SHOTS, QUERIES, STEPS, SIZE = 4, 5, 5, 15, 5, 32
ROUNDS, SLOT_SECONDS, BUDGET_SECONDS = 9, 0.1, 60.0
BODIES: dict[str, Callable[[], str | nn.Module]] = {
    "ResNet-18": lambda: "torchvision:resnet18",
    "ViT, 6 layers of 192": lambda: VisionTransformer(
        image_size=SIZE, patch_size=8, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768
    ),
}

BODY, HEAD, OURS, ALL = "the body's forward pass", "the head's inner loop", "dmaml_pl", "the body at every step"


@dataclass(frozen=True)
class Found:
    """CPU time of one meta-iteration, by part, and how many times our own is that of body and head."""

    times: dict[str, Times]

    @property
    def ratio(self) -> Ratio:
        """Round by round."""
        parts = (self.times[part].seconds for part in (BODY, HEAD))
        least = Times([body + head for body, head in zip(*parts, strict=True)])
        return Ratio.between(self.times[OURS], least)


class _Whole(nn.Module):
    """The same network, which does not say what its embedding is: all of it is run at every step."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


def images() -> TaskBatch:
    """Meta-batch of images at random."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(TASKS, WAYS * (SHOTS + QUERIES), 3, SIZE, SIZE, generator=generator)
    y = torch.arange(WAYS).repeat(TASKS, SHOTS + QUERIES)
    split = WAYS * SHOTS
    return TaskBatch((Samples(x[:, :split], y[:, :split]),), Samples(x[:, split:], y[:, split:]), ways=WAYS)


def measure() -> dict[str, Found]:
    """One thread's CPU time of a meta-gradient, its parts in turn."""
    with limited_threads(1):
        return {name: _measure(body()) for name, body in BODIES.items()}


def _measure(body: str | nn.Module) -> Found:
    torch.manual_seed(0)
    network, batch, objective = Backbone(body, ways=WAYS), images(), objective_of("classification")
    algorithm = MAML(inner_lr=0.1, inner_steps=STEPS)
    module = MetaLearning(network, algorithm, "classification", freeze=["body.*"], batch_norm="frozen")
    sets = [set_of_task for x in (batch.support_x, batch.query_x) for set_of_task in x]
    with torch.no_grad():
        features = batch.map_inputs(lambda x: torch.stack([network.embed(each) for each in x]))
    head = MetaLearner(network.head, MAML(inner_lr=0.1, inner_steps=STEPS))
    whole = MetaLearner(_Whole(network), MAML(inner_lr=0.1, inner_steps=STEPS))

    def forward() -> None:
        with torch.no_grad():
            for x in sets:
                network.embed(x)

    def meta_gradient(learner: MetaLearner, tasks: TaskBatch) -> Callable[[], object]:
        engine = EngineChoice("auto", objective).for_training(learner, tasks)
        return lambda: engine.meta_gradient(learner, tasks)

    calls: dict[str, Callable[[], object]] = {
        BODY: forward,
        HEAD: meta_gradient(head, features),
        OURS: meta_gradient(module.learner, batch),
        ALL: meta_gradient(whole, batch),
    }
    return Found(in_turn(calls, rounds=ROUNDS, slot=SLOT_SECONDS, budget=BUDGET_SECONDS, clock=time.process_time))
