"""The meta-gradient of the vectorized engine as one compiled function.

`torch.compile` alone cannot: AOTAutograd has no double backward. So the whole meta-gradient, its derivatives included,
is traced once to a graph of plain tensor operations (`recording.py`), whose matrix products are merged (`products.py`),
and TorchInductor compiles that graph. The traced graph has no control flow left: what a network decides in Python is
decided when it is traced.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines.base import Backward, Held, Tried
from dmaml_pl.engines.loop import Evaluated, learned
from dmaml_pl.engines.products import merge_products
from dmaml_pl.engines.recording import trace
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.engines.work import SMALL_PRODUCT
from dmaml_pl.learner import MetaLearner
from dmaml_pl.tasks import TaskBatch

MAX_GRAPHS = 2
"""Graphs compiled for a network in a phase of its algorithm: one, and one for another shape of tasks; no more."""

CALLS_TO_A_REPLAY = 3
"""The first call of a CUDA graph warms up, the second records, the third replays."""

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Evaluate = Callable[[MetaLearner, Weights, Weights, TaskBatch], Evaluated]
"""Of a learner, meta-weights, buffers and a meta-batch: what became of each task."""


class MetaGradient(NamedTuple):
    """A meta-gradient that is known already.

    Attributes:
        loss: mean query loss.
        metric: mean metric.
        parameters: those that the loss depends on.
        gradients: of the loss, by these parameters.
        apart: no two gradients share memory with each other or with anything else.
    """

    loss: Tensor
    metric: Tensor
    parameters: list[Tensor]
    gradients: list[Tensor]
    apart: bool


class _Graph(NamedTuple):
    """A compiled meta-gradient.

    Attributes:
        run: from the values of meta-weights, buffers and tasks to loss, metric and gradients.
        learned: numbers of the parameters that these are of.
        apart: as of `MetaGradient`.
        is_small: it has so little to do that one thread is enough.
    """

    run: Callable[..., Any]
    learned: list[int]
    apart: bool
    is_small: bool


class Compiler:
    """Compiles meta-gradients, and keeps them by what they were compiled for; also on disk, for the next training."""

    def __init__(self) -> None:
        self._held = Held()
        self._graphs: Tried[dict[Hashable, dict[Any, _Graph | None]]] = Tried()

    def meta_gradient(self, learner: MetaLearner, batch: TaskBatch, evaluate: Evaluate) -> MetaGradient | None:
        """The meta-gradient, by a compiled graph; None where there is none and none can be made, which is said once.

        Args:
            learner: whose meta-weights and buffers are read.
            batch: the meta-batch.
            evaluate: what is differentiated, the same at every call.
        """
        values, lower, graph = self._find(learner, batch, evaluate)
        if graph is None:
            return None
        # The conversions of autocast are in the graph already.
        with (
            torch.no_grad(),
            limited_threads(1 if graph.is_small else None),
            nullcontext() if lower is None else torch.autocast(values[0].device.type, enabled=False),
        ):
            loss, metric, *gradients = graph.run(*values)
        return MetaGradient(loss, metric, [values[number] for number in graph.learned], gradients, graph.apart)

    def is_small(self, learner: MetaLearner, batch: TaskBatch, evaluate: Evaluate) -> bool:
        """Whether there is a graph, and one thread is enough for it and what surrounds it; compiles."""
        graph = self._find(learner, batch, evaluate)[2]
        return graph is not None and graph.is_small

    def _find(
        self, learner: MetaLearner, batch: TaskBatch, evaluate: Evaluate
    ) -> tuple[list[Tensor], torch.dtype | None, _Graph | None]:
        """The values that a graph takes, the type of autocast if it is on, and the graph; compiled where it is new."""
        tasks = batch if batch.numbers is None else batch._replace(numbers=None)
        graphs = self._graphs.setdefault(learner, {}).setdefault(learner.algorithm.phase, {})
        values = [*self._held.tensors(learner), *tasks.tensors()]
        # All that the compiled graph takes for granted; nothing checks it again.
        device = values[0].device.type
        lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = ((v.shape, v.stride(), v.dtype, v.device, v.requires_grad) for v in values)
        key = (lower, tasks.ways, *shapes, *self._held.settings(learner))
        if key not in graphs:
            full = len(graphs) >= MAX_GRAPHS
            graphs[key] = None if full else _compile(learner, values, tasks, evaluate)
        return values, lower, graphs[key]


def _compile(learner: MetaLearner, values: list[Tensor], tasks: TaskBatch, evaluate: Evaluate) -> _Graph | None:
    """A graph from the values of meta-weights, buffers and tasks to loss, metric, gradients; None if that failed."""
    names, buffers = list(learner.meta()), [name for name, _ in learner.network.named_buffers()]
    wanted = learned(learner.meta())
    used: list[int] = []

    def meta_gradient(*values: Tensor) -> tuple[Tensor, ...]:
        meta = {name: value.detach().requires_grad_(name in wanted) for name, value in zip(names, values, strict=False)}
        constants = dict(zip(buffers, values[len(names) :], strict=False))
        outcome = evaluate(learner, meta, constants, tasks.with_tensors(values[len(names) + len(buffers) :]))
        found = torch.autograd.grad(outcome.differentiate.mean(), [meta[name] for name in wanted], allow_unused=True)
        gradients = {
            names.index(name): gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None
        }
        used[:] = gradients
        return outcome.loss.mean().detach(), outcome.metric.mean(), *gradients.values()

    rank_zero_info("Compiling the meta-gradient ...")
    _keep_on_disk()
    examples: list[Any] = [value.detach() for value in values]
    try:
        with torch.enable_grad():
            graph, constants, _ = trace(meta_gradient, examples, examples[0].device)
        merge_products(graph)
        traced = GraphModule(constants, graph)
        with torch.no_grad(), torch.autocast(values[0].device.type, enabled=False):
            is_small = values[0].device.type == "cpu" and _operations(traced, examples) < SMALL_PRODUCT
            with limited_threads(1 if is_small else None):
                run = machine_code(traced, examples)
                places = [value.untyped_storage().data_ptr() for value in (*examples, *run(*examples))]
    except Exception as error:  # compilers fail in many ways, and all can be done without
        lines = str(error).splitlines() or [type(error).__name__]
        rank_zero_info(f"model.compile has no effect: compiling failed ({lines[0]}).")
        return None
    gradients = places[len(examples) + 2 :]
    return _Graph(run, used, all(places.count(place) == 1 for place in gradients), is_small)


def machine_code(graph: GraphModule, examples: list[Any]) -> Callable[..., Any]:
    """A traced graph compiled by TorchInductor for values of the same shapes, or found on disk where it was before.

    On a GPU it is recorded as a CUDA graph, so that its many small kernels are started at once.

    Not by `torch.compile`, which checks at every call what the compiler's key has checked already, in a fifth of a
    meta-iteration.
    """
    # These take a second to load, so only those wait who compile.
    from torch._guards import TracingContext, tracing  # noqa: PLC0415
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415
    from torch._subclasses import FakeTensorMode  # noqa: PLC0415
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415

    on_gpu = any(value.is_cuda for value in examples)
    # Without a place to note symbolic shapes Inductor keeps no graph on disk, though here no shape is symbolic.
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        patches: dict[str, Any] = {"triton.cudagraphs": on_gpu}
        run: Any = compile_fx(graph, examples, config_patches=patches, ignore_shape_env=True)
    if not on_gpu:
        compiled: Callable[..., Any] = run
        return compiled

    def replay(*values: Tensor) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return [value.clone() for value in run(*values)]  # the next replay writes into the same memory

    for _ in range(CALLS_TO_A_REPLAY):
        replay(*examples)
    return replay


def _operations(graph: GraphModule, examples: list[Any]) -> float:
    """Floating-point operations of a graph's matrix products and convolutions, on average."""
    products = sum(getattr(node.target, "overloadpacket", None) in flop_registry for node in graph.graph.nodes)
    with FlopCounterMode(display=False) as counter:
        graph(*examples)
    return float(counter.get_total_flops()) / max(products, 1)


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
    scaled: Sequence[Tensor]
    if backward is Tensor.backward and found.apart:
        scaled = found.gradients
    else:
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
