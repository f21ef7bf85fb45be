"""The meta-gradient of the vectorized engine as one compiled function.

`torch.compile` alone cannot: AOTAutograd has no double backward. So the whole meta-gradient, its derivatives included,
is traced once to a graph of plain tensor operations (`make_fx`), whose matrix products are merged (`products.py`), and
TorchInductor compiles that graph. The traced graph has no control flow left: what a network decides in Python is
decided when it is traced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines.base import Backward
from dmaml_pl.engines.products import merge_products
from dmaml_pl.tasks import TaskBatch

MAX_GRAPHS = 2
"""Graphs compiled for a network: one, and one for another shape of tasks. Further shapes are executed without."""

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Outcome = Callable[[Weights, Weights, TaskBatch], tuple[Tensor, Tensor]]
"""Of parameters, buffers and a meta-batch: mean query loss, differentiable, and mean metric."""


class MetaGradient(NamedTuple):
    """The mean query loss and metric, and the parameters that the loss depends on with its gradients by them."""

    loss: Tensor
    metric: Tensor
    parameters: list[Tensor]
    gradients: list[Tensor]


class _Graph(NamedTuple):
    run: Callable[..., Any]
    learned: list[int]


class Compiler:
    """Compiles meta-gradients, and keeps them by what they were compiled for; also on disk, for the next training."""

    def __init__(self) -> None:
        self._graphs: WeakKeyDictionary[nn.Module, dict[Any, _Graph | None]] = WeakKeyDictionary()

    def meta_gradient(self, network: nn.Module, batch: TaskBatch, outcome: Outcome) -> MetaGradient | None:
        """The meta-gradient, by a compiled graph; None where there is none and none can be made, which is said once.

        Args:
            network: the network, whose parameters and buffers are read.
            batch: the meta-batch.
            outcome: what is differentiated, the same at every call.
        """
        parameters = list(network.parameters())
        values = [*parameters, *network.buffers(), batch.support_x, batch.support_y, batch.query_x, batch.query_y]
        # All that the compiled graph takes for granted; nothing checks it again.
        device = values[0].device.type
        lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (
            lower,
            *((v.shape, v.stride(), v.dtype, v.device, v.requires_grad) for v in values),
            *(module.training for module in network.modules()),
        )
        graphs = self._graphs.setdefault(network, {})
        if key not in graphs:
            full = len(graphs) >= MAX_GRAPHS
            graphs[key] = None if full else _compile(network, values, outcome)
        graph = graphs[key]
        if graph is None:
            return None
        # The conversions of autocast are in the graph already.
        with torch.no_grad(), nullcontext() if lower is None else torch.autocast(device, enabled=False):
            loss, metric, *gradients = graph.run(*values)
        return MetaGradient(loss, metric, [parameters[number] for number in graph.learned], gradients)


def _compile(network: nn.Module, values: list[Tensor], outcome: Outcome) -> _Graph | None:
    """A graph from the values of parameters, buffers and tasks to loss, metric and gradients; None if that failed."""
    parameters, buffers = (list(dict(named)) for named in (network.named_parameters(), network.named_buffers()))
    learned = [number for number in range(len(parameters)) if values[number].requires_grad]
    used: list[int] = []

    def meta_gradient(*values: Tensor) -> tuple[Tensor, ...]:
        weights = {
            name: value.detach().requires_grad_(number in learned)
            for number, (name, value) in enumerate(zip(parameters, values, strict=False))
        }
        constants = dict(zip(buffers, values[len(weights) :], strict=False))
        loss, metric = outcome(weights, constants, TaskBatch(*values[len(weights) + len(buffers) :]))
        found = torch.autograd.grad(loss, [weights[parameters[number]] for number in learned], allow_unused=True)
        gradients = {number: gradient for number, gradient in zip(learned, found, strict=True) if gradient is not None}
        used[:] = gradients
        return loss.detach(), metric, *gradients.values()

    rank_zero_info("Compiling the meta-gradient ...")
    _keep_on_disk()
    examples: list[Any] = [value.detach() for value in values]
    try:
        with torch.enable_grad():
            traced = make_fx(meta_gradient)(*examples)
        merge_products(traced.graph)
        traced.recompile()
        with torch.no_grad(), torch.autocast(values[0].device.type, enabled=False):
            # Not torch.compile, which checks at every call what `key` has checked, in a fifth of a meta-iteration.
            run = torch._inductor.compile(traced, examples)  # noqa: SLF001 - the compiler of a traced graph
            run(*examples)
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


def hand_out(found: MetaGradient, backward: Backward) -> None:
    """Add gradients that are known already to the parameters' `.grad`, as differentiating the loss would have done.

    Args:
        found: the gradients, and their parameters.
        backward: differentiates the loss, and may scale it.
    """
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in found.parameters):  # noqa: SLF001
        backward(_GivenGradient.apply(found.loss, found.gradients, *found.parameters))
        return
    # Autograd through the parameters would take longer than all else that surrounds the compiled graph.
    loss = found.loss.detach().requires_grad_()
    backward(loss)
    assert loss.grad is not None, "it is a leaf"  # noqa: S101
    scaled = torch._foreach_mul(found.gradients, loss.grad)  # noqa: SLF001 - public in all but name
    for parameter, gradient in zip(found.parameters, scaled, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class _GivenGradient(torch.autograd.Function):
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
