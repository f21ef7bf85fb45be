"""How many tasks a meta-batch needs before more of them stop helping: the gradient noise scale along a training.

    python benchmarks/noise_scale.py

McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1: with G the mean meta-gradient and S the covariance of single
tasks' meta-gradients, B = tr(S) / |G|^2 tasks is where averaging more tasks begins to bring little. Workers that make
runs alone and are then averaged live from the same noise: far below B they pay, at B and above they do not.

Legend: N tasks, P parameters.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from data_modules import Glyphs, Sinusoid, TaskDataModule
from dmaml_pl import MAML, MLP, Conv4, MetaLearning
from dmaml_pl.tasks import TaskBatch


def main() -> None:
    """Train both problems a while, and print the noise scale at some meta-iterations."""
    parser = argparse.ArgumentParser(description="The gradient noise scale along a training, in tasks.")
    parser.add_argument("--tasks", type=int, default=2000, help="tasks per measurement (default: 2000)")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sinusoid = MetaLearning(MLP(), MAML(inner_lr=0.01))
    small = Sinusoid(shots=10, queries=10, meta_batch=10, seed=0)
    print("| problem | meta-iteration | loss | noise scale (tasks) |\n|---|---:|---:|---:|")
    follow("sinusoid", sinusoid, small, torch.optim.Adam(sinusoid.parameters(), lr=3e-3), (0, 500, 2000), given.tasks)
    glyphs = MetaLearning(Conv4(filters=8), MAML(inner_lr=0.4), objective="classification")
    letters = Glyphs(ways=5, shots=1, queries=1, meta_batch=8, seed=0)
    letters.prepare_data()
    letters.setup("fit")
    optimizer = torch.optim.Adam(glyphs.parameters(), lr=3e-3)
    follow("glyphs, 8 filters, 1 query", glyphs, letters, optimizer, (0, 200, 600), given.tasks)


def follow(
    name: str,
    module: MetaLearning,
    data: TaskDataModule,
    optimizer: torch.optim.Optimizer,
    stops: tuple[int, ...],
    tasks: int,
) -> None:
    """Train up to the last stop, and measure at each.

    Args:
        name: of the problem.
        module: what is trained.
        data: where its tasks come from.
        optimizer: of the module's parameters.
        stops: meta-iterations after which to measure.
        tasks: N.
    """
    for iteration in range(stops[-1] + 1):
        if iteration in stops:
            loss, scale = measure(module, data, tasks)
            print(f"| {name} | {iteration} | {loss:.3f} | {scale:.1f} |", flush=True)
        meta_gradient(module, data.sample(worker=0, run=0, iteration=iteration), optimizer)
        optimizer.step()


def measure(module: MetaLearning, data: TaskDataModule, tasks: int) -> tuple[float, float]:
    """Mean loss, and tr(S) / |G|^2 without bias, from N tasks that training does not draw."""
    total: Tensor | float = 0.0
    squares, losses = 0.0, 0.0
    for number in range(tasks):
        batch = data.sample(worker=1, run=number, iteration=0)
        one = batch.map(lambda tensor: tensor[:1])
        losses += meta_gradient(module, one)
        own = torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None]).double()
        total = total + own
        squares += float(own.square().sum())
    assert isinstance(total, Tensor)  # noqa: S101 - there is at least one task
    of_mean = float((total / tasks).square().sum())
    trace = (squares / tasks - of_mean) * tasks / (tasks - 1)
    return losses / tasks, trace / max(of_mean - trace / tasks, 1e-12)


def meta_gradient(module: MetaLearning, batch: TaskBatch, optimizer: torch.optim.Optimizer | None = None) -> float:
    """Put the meta-gradient into the parameters; returns the loss."""
    (optimizer or module).zero_grad()
    engine = module.engine.for_training(module.learner, batch)
    return float(engine.meta_gradient(module.learner, batch).loss)


if __name__ == "__main__":
    main()
