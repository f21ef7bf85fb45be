"""The meta-gradient of the vectorized engine as one compiled function.

`torch.compile` alone cannot: AOTAutograd has no double backward. So the whole meta-gradient, its derivatives included,
is traced once to a graph of plain tensor operations (`make_fx`), and TorchInductor compiles that graph. The traced
graph has no control flow left: what a network decides in Python is decided when it is traced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.tasks import TaskBatch

MAX_GRAPHS = 2
"""Graphs compiled for a network: one, and one for another shape of tasks. Further shapes are executed without."""

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Outcome = Callable[[Weights, Weights, TaskBatch], tuple[Tensor, Tensor]]
"""Of parameters, buffers and a meta-batch: mean query loss, differentiable, and mean metric."""


class MetaGradient(NamedTuple):
    """The mean query loss and metric, and the gradients of the loss by the parameters that it depends on."""

    loss: Tensor
    metric: Tensor
    gradients: dict[str, Tensor]


class _Graph(NamedTuple):
    run: Callable[..., Any]
    names: list[str]


class Compiler:
    """Compiles meta-gradients, and keeps them by what they were compiled for; also on disk, for the next training.

    Args:
        backend: a compiler that `torch.compile` knows.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._graphs: WeakKeyDictionary[nn.Module, dict[Any, _Graph | None]] = WeakKeyDictionary()

    def meta_gradient(self, network: nn.Module, batch: TaskBatch, outcome: Outcome) -> MetaGradient | None:
        """The meta-gradient, by a compiled graph; None where there is none and none can be made, which is said once.

        Args:
            network: the network, whose parameters and buffers are read.
            batch: the meta-batch.
            outcome: what is differentiated, the same at every call.
        """
        parameters: Weights = dict(network.named_parameters())
        buffers: Weights = dict(network.named_buffers())
        tasks = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        key = (
            *((tensor.shape, tensor.dtype, tensor.device) for tensor in tasks),
            *((p.requires_grad, p.dtype) for p in parameters.values()),
            *(module.training for module in network.modules()),
        )
        graphs = self._graphs.setdefault(network, {})
        values = [tensor.detach() for tensor in (*parameters.values(), *buffers.values(), *tasks)]
        if key not in graphs:
            full = len(graphs) >= MAX_GRAPHS
            graphs[key] = None if full else self._compile(parameters, list(buffers), outcome, values)
        graph = graphs[key]
        if graph is None:
            return None
        with torch.no_grad():
            loss, metric, *gradients = graph.run(*values)
        return MetaGradient(loss, metric, dict(zip(graph.names, gradients, strict=True)))

    def _compile(
        self, parameters: Weights, buffers: list[str], outcome: Outcome, values: list[Tensor]
    ) -> _Graph | None:
        learned = [name for name, p in parameters.items() if p.requires_grad]
        used: list[str] = []

        def meta_gradient(*values: Tensor) -> tuple[Tensor, ...]:
            weights = {
                name: v.detach().requires_grad_(name in learned) for name, v in zip(parameters, values, strict=False)
            }
            constants = dict(zip(buffers, values[len(weights) :], strict=False))
            loss, metric = outcome(weights, constants, TaskBatch(*values[len(weights) + len(buffers) :]))
            found = torch.autograd.grad(loss, [weights[name] for name in learned], allow_unused=True)
            gradients = {name: gradient for name, gradient in zip(learned, found, strict=True) if gradient is not None}
            used[:] = gradients
            return loss.detach(), metric, *gradients.values()

        rank_zero_info("Compiling the meta-gradient ...")
        _keep_on_disk()
        try:
            with torch.enable_grad():
                traced = make_fx(meta_gradient)(*values)
            with torch.no_grad():
                run = torch.compile(traced, backend=self._backend, fullgraph=True, dynamic=False)
                run(*values)
        except Exception as error:  # compilers fail in many ways, and all can be done without
            lines = str(error).splitlines() or [type(error).__name__]
            rank_zero_info(f"model.compile has no effect: compiling failed ({lines[0]}).")
            return None
        return _Graph(run, used)


def _keep_on_disk() -> None:
    """Inductor's own choice is the folder for temporary files, which is emptied at a restart."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home folder
        return
    os.environ.setdefault(CACHE_VARIABLE, str(home / "dmaml_pl" / "inductor"))


class GivenGradient(torch.autograd.Function):
    """The loss unchanged; its backward hands out gradients that are known already, scaled as the caller asks."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """The loss, as if it were computed from the parameters."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *scales: Any) -> Any:
        """The gradients times the gradient of the loss."""
        (scale,) = scales
        return None, None, *(gradient * scale for gradient in ctx.gradients)
