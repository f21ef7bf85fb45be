"""Every hook of an algorithm at once: what it promises holds for whatever an algorithm overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmaml_pl import MLP
from dmaml_pl.algorithms import Algorithm, Outcome, Tasks, Weights
from dmaml_pl.engines.loop import NetworkTasks, at_once, one_by_one
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import TaskBatch
from tests.algorithm_promises import TIGHT, AlgorithmPromises


class Hooked(Algorithm):
    """The head alone adapts, its bias from zero; a learned scale of each step; the losses after all steps count."""

    meta_lr = 0.02

    def __init__(self, *, first_order: bool = False) -> None:
        super().__init__(2)
        self.first_order = first_order

    def attach(self, network: nn.Module) -> None:
        self.adapts = [name for name, _ in network.named_parameters() if name.startswith("layers.2.")]
        self.scales = nn.Parameter(torch.tensor([1.0, 0.9, 1.1], dtype=torch.float64))
        self.register_buffer("importance", torch.tensor([0.25, 0.75], dtype=torch.float64))

    def start(self, meta: Weights, tasks: Tasks) -> Weights:
        bias, weight = meta["layers.2.bias"], meta["layers.2.weight"]
        return {"layers.2.weight": tasks.expand(weight), "layers.2.bias": tasks.expand(torch.zeros_like(bias))}

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        return {name: fast[name] - 0.05 * gradient for name, gradient in gradients.items()}

    def place(self, meta: Weights, fast: Weights, number: int) -> Weights:
        scale = meta["algorithm.scales"][min(number, 2)]
        return fast | {"layers.2.weight": fast["layers.2.weight"] * scale}

    def outer(self, meta: Weights, path: list[Weights], tasks: Tasks) -> Outcome:
        after = [tasks.query(meta, self.place(meta, fast, number)) for number, fast in enumerate(path) if number]
        weighted = [weight * loss for weight, (loss, _) in zip(meta["algorithm.importance"], after, strict=True)]
        return Outcome(weighted[0] + weighted[1], after[-1][0].detach(), after[-1][1])


class TestEveryHook(AlgorithmPromises):
    """The body is learned from the losses after all steps, and used, unadapted, by all tasks."""

    learning_steps = 250

    def algorithm(self, *, first_order: bool = False) -> Hooked:
        return Hooked(first_order=first_order)

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return MLP(hidden=[40]).double()

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        weight, bias = meta["layers.2.weight"], torch.zeros(1, dtype=torch.float64, requires_grad=True)
        scales, importance = meta["algorithm.scales"], (0.25, 0.75)
        second_order, total = not learner.algorithm.first_order, torch.zeros((), dtype=torch.float64)

        def at(weight: Tensor, bias: Tensor, scale: Tensor) -> Weights:
            return meta | {"layers.2.weight": weight * scale, "layers.2.bias": bias}

        for number in range(2):
            used = at(weight, bias, scales[number] if second_order else scales[number].detach())
            used = (
                used if second_order else used | {n: w.detach() for n, w in meta.items() if n.startswith("layers.0.")}
            )
            support = loss(used, task.support_x, task.support_y)
            gradients = torch.autograd.grad(support, [weight, bias], create_graph=second_order)
            weight, bias = weight - 0.05 * gradients[0], bias - 0.05 * gradients[1]
            query = loss(at(weight, bias, scales[number + 1]), task.query_x, task.query_y)
            total = total + importance[number] * query
        return total

    def test_its_own_parameters_have_their_own_learning_rate(self) -> None:
        network, own = self.learner().param_groups()
        assert own["lr"] == 0.02
        assert [p.shape for p in own["params"]] == [(3,)]
        assert len(network["params"]) == 4


@pytest.mark.parametrize("each", [at_once, one_by_one])
def test_a_part_of_a_network_is_run_with_the_tasks_own_weights(each: Any) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(1, 4), nn.Linear(4, 1)

        def features(self, x: Tensor) -> Tensor:
            return torch.tanh(self.body(x))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.features(x))
            return out

    torch.manual_seed(0)
    network, x = Parts(), torch.rand(1, 5, 1)
    meta = {name: p.detach() for name, p in network.named_parameters()}
    fast = {"body.weight": torch.rand(1, 4, 1)}
    tasks = NetworkTasks(network, {}, objective_of("regression"), TaskBatch.of(x, x, x, x), each)
    features = torch.tanh(F.linear(x[0], fast["body.weight"][0], meta["body.bias"]))
    torch.testing.assert_close(tasks.run(meta, fast, x, part="features")[0], features, **TIGHT)
    torch.testing.assert_close(tasks.run(meta, fast, x)[0], F.linear(features, meta["head.weight"], meta["head.bias"]))
