"""How much work there is in a task, counted by running one: what engines, threads and compiling are chosen by.

It is the same at every start and on every machine, so that what is chosen, and with it the bits of a training, repeat.

Legend: T tasks.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dmaml_pl.engines.base import Tried
from dmaml_pl.engines.loop import NetworkTasks, evaluate, learned, one_by_one, walk
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.engines.trial import trial
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch

SMALL_PRODUCT = 3_000_000
"""Where matrix products take fewer floating-point operations each, on average, one thread computes on CPUs.

Threads would wait for each other longer than they compute, and far longer where other processes want the cores. With
1.3 million, two threads were as fast as one where nothing else ran.
"""


class Work(NamedTuple):
    """The meta-gradient of one task; in evaluation mode, its adaptation curve.

    Attributes:
        operations: operations that it takes, but for views.
        elements: that all of them give.
        size: elements that one of them gives: the root of the mean square, so that the large ones count.
        product: floating-point operations of a matrix product or convolution, on average.
        flops: floating-point operations of all of these.
    """

    operations: int
    elements: int
    size: float
    product: float
    flops: float = 0.0


_counted: Tried[dict[Any, Work | None]] = Tried()


def work_of(learner: MetaLearner, objective: Objective, batch: TaskBatch) -> Work | None:
    """The work in a task of a batch, counted once for tasks of its shape; None if the task cannot be run alone."""
    known = _counted.setdefault(learner, {})
    key = (objective, learner.network.training, *(tensor.shape[1:] for tensor in batch.tensors()))
    if key not in known:
        try:
            known[key] = _count(learner, objective, batch)
        except (RuntimeError, ValueError, TypeError):  # whoever executes it says so better
            known[key] = None
    return known[key]


def threads_for(learner: MetaLearner, objective: Objective, batch: TaskBatch, at_once: int = 1) -> int | None:
    """One, where the operations on so many tasks at once are small; None: all.

    Args:
        learner: network and algorithm.
        objective: the losses.
        batch: tasks, one of which is run to see what there is to do.
        at_once: tasks that an operation computes.
    """
    if any(p.device.type != "cpu" for p in learner.network.parameters()):
        return None
    work = work_of(learner, objective, batch)
    return 1 if work is not None and work.product * at_once < SMALL_PRODUCT else None


def _count(learner: MetaLearner, objective: Objective, batch: TaskBatch) -> Work:
    network, meta, counter = learner.network, learner.meta(), _Counter()
    with limited_threads(1), trial(network, batch) as task, counter:
        tasks = NetworkTasks(network, dict(network.named_buffers()), objective, task, one_by_one)
        if network.training:
            loss = evaluate(learner, meta, tasks).differentiate.sum()
            torch.autograd.grad(loss, [meta[name] for name in learned(meta)], allow_unused=True)
        else:
            walk(learner, meta, tasks, learner.algorithm.steps)
    sizes = counter.sizes
    mean_square = sum(size**2 for size in sizes) / max(len(sizes), 1)
    return Work(len(sizes), sum(sizes), math.sqrt(mean_square), counter.flops / max(counter.products, 1), counter.flops)


class _Counter(TorchDispatchMode):
    """Counts what PyTorch executes inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's to type
        self.sizes: list[int] = []
        self.products, self.flops = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            results = found if isinstance(found, tuple | list) else [found]
            self.sizes.append(sum(result.numel() for result in results if isinstance(result, Tensor)))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.products += 1
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        return found
