"""Networks that act: run at every step of many rollouts, each task's with the weights that it was adapted to.

A rollout asks a small network hundreds of times, and starting its operations takes longer than computing them. So it is
traced once to a graph of plain tensor operations, and what no input changes (transposed weights, a context that is
multiplied by weights) is computed once for all steps.

Legend: T tasks, B samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines.base import Tried
from dmaml_pl.engines.loop import NetworkTasks, at_once
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Samples, TaskBatch

_Halves = tuple[Callable[..., Any], Callable[..., Any]]
"""From all tensors but the inputs to what follows from them alone; from that and the inputs to the outputs."""


class Acting:
    """Runs networks on all tasks at once with weights that stay; keeps the graphs by the shape of the inputs.

    Args:
        objective: not asked; what an engine's tasks come with.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._graphs: Tried[dict[Any, _Halves]] = Tried()

    def with_weights(self, learner: MetaLearner, meta: Weights, fast: Weights) -> Callable[[Tensor], Any]:
        """The networks with each task's own weights: from inputs (T, B, ...) to outputs, without gradients."""
        network, graphs = learner.network, self._graphs.setdefault(learner, {})
        buffers = dict(network.named_buffers())
        tensors = [*buffers.values(), *meta.values(), *fast.values()]
        kept: dict[Any, tuple[Callable[..., Any], Any]] = {}

        def outputs(x: Tensor) -> Any:
            with torch.no_grad():
                key = (x.shape, x.dtype, x.device, network.training, tuple(fast), _autocast(x))
                if key not in kept:
                    if key not in graphs:
                        call = self._call(network, list(buffers), list(meta), list(fast))
                        graphs[key] = _halves(make_fx(call)(*tensors, x))
                    once, each_time = graphs[key]
                    kept[key] = each_time, once(*tensors)
                each_time, known = kept[key]
                return each_time(*known, x)

        return outputs

    def _call(self, network: nn.Module, *names: Sequence[str]) -> Callable[..., Any]:
        """The network as a function of buffers, meta-weights, each task's own weights, and inputs."""

        def call(*given: Tensor) -> Any:
            left = iter(given)
            buffers, meta, own = ({name: next(left) for name in some} for some in names)
            x = next(left)
            tasks = NetworkTasks(network, buffers, self._objective, TaskBatch((), Samples(x, x)), at_once)
            return tasks.run(meta, own, x)

        return call


def _autocast(x: Tensor) -> Any:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _halves(traced: GraphModule) -> _Halves:
    """A graph in two, whose second half alone depends on its last input, or draws at random."""
    nodes = list(traced.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"][-1]
    changing = {inputs}
    for node in nodes:
        if node.op == "output" or changing & set(node.all_input_nodes) or _draws(node):
            changing.add(node)
    known = [node for node in nodes if node not in changing and changing & set(node.users)]
    once, each_time = Graph(), Graph()
    first: dict[Node, Node] = {}
    for node in nodes:
        if node not in changing:
            first[node] = once.node_copy(node, first.__getitem__)
    # Products of many small matrices that are transposed in memory take longer.
    once.output(tuple(once.call_method("contiguous", (first[node],)) for node in known))
    second = {node: each_time.placeholder(node.name) for node in (*known, inputs)}
    for node in nodes:
        if node in changing and node is not inputs:
            second[node] = each_time.node_copy(node, second.__getitem__)
    return GraphModule(traced, once), GraphModule(traced, each_time)


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
