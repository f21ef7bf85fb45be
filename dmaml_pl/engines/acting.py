"""Networks that act: run at every step of many rollouts, each task's with the weights that it was adapted to.

A rollout asks a small network hundreds of times, and starting its operations takes longer than computing them. So what
it does is recorded once and done again without the network. What no input changes (transposed weights, a context that
is multiplied by weights) is computed once for all steps.

Legend: T tasks, B samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines.base import Tried
from dmaml_pl.engines.loop import NetworkTasks, at_once
from dmaml_pl.engines.recording import Record, record
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Samples, TaskBatch


class Acting:
    """Runs networks on all tasks at once with weights that stay; keeps what they do by the shape of the inputs.

    Args:
        objective: not asked; what an engine's tasks come with.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._records: Tried[dict[Any, Record]] = Tried()

    def with_weights(self, learner: MetaLearner, meta: Weights, fast: Weights) -> Callable[[Tensor], Any]:
        """The networks with each task's own weights: from inputs (T, B, ...) to outputs, without gradients."""
        network, records = learner.network, self._records.setdefault(learner, {})
        buffers = dict(network.named_buffers())
        tensors = [*buffers.values(), *meta.values(), *fast.values()]
        ready: dict[Any, Callable[[Tensor], Any]] = {}
        adapting = tuple(fast)

        def outputs(x: Tensor) -> Any:
            with torch.no_grad():
                key = (x.shape, x.dtype, x.device, network.training, adapting, _autocast(x))
                if key not in ready:
                    if key not in records:
                        call = self._call(network, list(buffers), list(meta), list(fast))
                        records[key] = record(call, tensors, [x], x.device)
                    ready[key] = _with_constants(records[key], tensors)
                return ready[key](x)

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


def _with_constants(known: Record, tensors: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """What was recorded, with these weights and buffers, as a function of inputs."""
    # Products of many small matrices that are transposed in memory take longer.
    kept = [tensor.contiguous() for tensor in known.once(*tensors)]
    return lambda x: tree_unflatten(known.each.forward(*kept, x), known.form)
