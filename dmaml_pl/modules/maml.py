"""MAML as a LightningModule with flat settings."""

from __future__ import annotations

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from dmaml_pl.algorithms.maml import MAMLRule
from dmaml_pl.engines import EngineName
from dmaml_pl.modules.meta_learning import FewShotModule
from dmaml_pl.objectives import ObjectiveName


class MAML(FewShotModule):
    """Model-Agnostic Meta-Learning (Finn, Abbeel and Levine 2017) of any network, second or first order.

    Args:
        network: any network from samples (B, ...) to predictions (B, D) or logits (B, N). Its batch norms use the
            statistics of the samples at hand, always: transductive, as in the paper.
        objective: "regression" (mean squared error) or "classification" (cross-entropy, judged by accuracy).
        inner_lr: step size of the inner loop; 0.01 in the paper's sinusoid regression.
        inner_steps: steps of the inner loop in training.
        first_order: leave out the second derivatives (FOMAML).
        evaluation_steps: adaptation steps up to which validation and test judge; 10 as in the paper.
        meta_optimizer: from parameters to the meta-optimizer; the paper's Adam with lr 1e-3 by default.
        meta_schedule: from the meta-optimizer to a learning-rate schedule, stepped once a meta-iteration.
        gradient_clip: largest norm of the meta-gradient; None leaves it as it is.
        run_length: H, meta-iterations of a run where the strategy does not set it.
        engine: "learn2learn" adapts to one task after another, "per_task" as well, on all threads and faster for
            convolutions on CPUs, "vectorized" to all of a meta-batch at once; "auto" takes the fastest one that can run
            the network where it is.
        compile: compile the meta-gradient of the vectorized engine. Takes a while once, and pays in long trainings of
            small networks. What the network decides in Python is decided at the first meta-iteration.
        task_chunk: tasks that are in memory at a time, at most; the meta-gradients of chunks are added up. By default
            all where they are executed at once, and as many as there are threads where one after another.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: ObjectiveName = "regression",
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        evaluation_steps: int = 10,
        meta_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        meta_schedule: LRSchedulerCallable | None = None,
        gradient_clip: float | None = None,
        run_length: int = 100,
        engine: EngineName = "auto",
        compile: bool = False,  # noqa: A002 - the name of the setting
        task_chunk: int | None = None,
    ) -> None:
        super().__init__(
            network=network,
            algorithm=MAMLRule(inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order),
            objective=objective,
            evaluation_steps=evaluation_steps,
            meta_optimizer=meta_optimizer,
            meta_schedule=meta_schedule,
            gradient_clip=gradient_clip,
            run_length=run_length,
            engine=engine,
            compile=compile,
            task_chunk=task_chunk,
        )
        self.save_hyperparameters(ignore=["network", "meta_optimizer", "meta_schedule"])
