"""What is found out of a network by running it on one task, before it costs time or gives wrong numbers in silence.

Legend: S support samples.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmaml_pl.engines.loop import Each, NetworkTasks, evaluate, learned, walk
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch

NOT_THE_SAME = 0.02
"""So far, as a share of its norm, a gradient may be from the network's own; rounding is far below it, faults above."""

_STRANGE = (
    "the gradients of {kind} are not those of the weights it is run with, as where it recomputes activations "
    "(torch.utils.checkpoint, memory_efficient of torchvision's DenseNet), which must be turned off"
)


@contextmanager
def trial(network: nn.Module, batch: TaskBatch, tasks: int = 1) -> Iterator[TaskBatch]:
    """Gradients on, random generators as they were afterwards; gives so many tasks of `batch`, one again and again.

    What goes wrong with tasks at once may do so from the second on.
    """
    accelerators = list({p.device for p in network.parameters() if p.device.type != "cpu"})
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(accelerators):
        yield batch.map(lambda tensor: tensor[[number % len(tensor) for number in range(tasks)]].clone())


def written_buffer(network: nn.Module, task: TaskBatch) -> str | None:
    """A buffer that the network writes when it is run, if there is one; no task has buffers of its own."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    after = {name: buffer.clone() for name, buffer in before.items()}
    functional_call(network, after, (task.support[0].x[0],))
    return next((name for name, buffer in before.items() if not torch.equal(after[name], buffer)), None)


def failure(learner: MetaLearner, objective: Objective, task: TaskBatch, each: Each) -> str | None:
    """Why a task cannot be adapted to and differentiated, in the words of what failed; None if it can."""
    network, meta = learner.network, learner.meta()
    tasks = NetworkTasks(network, dict(network.named_buffers()), objective, task, each)
    try:
        with warnings.catch_warnings():
            # What vmap cannot do it does one after another, slowly: another engine is better at that.
            warnings.filterwarnings("error", "There is a performance drop", UserWarning)
            if network.training:
                loss = evaluate(learner, meta, tasks).differentiate.sum()
                torch.autograd.grad(loss, [meta[name] for name in learned(meta)], allow_unused=True)
            else:
                walk(learner, meta, tasks, learner.algorithm.steps)
    except Exception as error:  # a user's own network may raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        return lines[0].split(". ")[0].rstrip(".")
    return None


def strangeness(network: nn.Module, objective: Objective, task: TaskBatch, each: Each) -> str | None:
    """Why the network, run as a function, is not itself; None where its gradients are those of its own weights.

    It is run at weights other than those it holds, once by the engine, once with the weights in its place. Whatever
    goes round the weights that it is given (recomputed activations, a rule of PyTorch's that leaves something out)
    shows, unless it draws at random.
    """
    task = of_one_class(task)
    support = task.support[0]
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if any(p.dtype not in (torch.float32, torch.float64) for p in parameters.values()):
        return None  # rounding is too coarse to tell
    generator = torch.Generator().manual_seed(0)
    values = {name: p.detach() + _noise(p, generator) for name, p in parameters.items()}

    def by_engine() -> list[Tensor]:
        meta = {name: weight.requires_grad_() for name, weight in values.items()}
        frozen = {name: p for name, p in network.named_parameters() if name not in meta}
        tasks = NetworkTasks(network, dict(network.named_buffers()), objective, task, each)
        fast = {name: tasks.expand(weight) for name, weight in meta.items()}
        return _gradient(tasks.support_loss(frozen | meta, fast, 0).sum(), list(meta.values()))

    def by_itself() -> list[Tensor]:
        with _holding(parameters, values):
            samples = [support.map(lambda tensor, n=n: tensor[n]) for n in range(task.tasks)]  # type: ignore[misc]
            losses = [objective.support_loss(network(x), y) for x, y in samples]
            return _gradient(torch.stack(losses).sum(), list(parameters.values()))

    device = next(iter(values.values())).device.type if values else "cpu"
    with torch.autocast(device, enabled=False):
        ours, draws = _watched(by_engine)
        own, _ = _watched(by_itself)
    if draws or not all(bool(torch.isfinite(gradient).all()) for gradient in own):
        return None
    # Where batch norm follows, a bias has no gradient but rounding errors.
    least = 1e-3 * max((float(gradient.norm()) for gradient in own), default=0.0)
    for one, other in zip(ours, own, strict=True):
        if float((one - other).norm()) > NOT_THE_SAME * max(float(other.norm()), least):
            return _STRANGE.format(kind=type(network).__name__)
    return None


def of_one_class(task: TaskBatch) -> TaskBatch:
    """The same support samples, all of class 0 where they have classes.

    A network may have fewer outputs than an algorithm tells classes apart.
    """
    first = task.support[0]
    if not isinstance(first.y, Tensor) or first.y.is_floating_point():
        return task
    return task._replace(support=(first._replace(y=torch.zeros_like(first.y)), *task.support[1:]))


def draws_at_random(network: nn.Module, task: TaskBatch) -> bool:
    """Whether the network's outputs depend on a random generator."""
    return _watched(lambda: functional_call(network, {}, (task.support[0].x[0],)))[1]


def _watched(call: Callable[[], Any]) -> tuple[Any, bool]:
    """What a call gives, and whether it has drawn at random."""
    before = torch.get_rng_state()
    return call(), not torch.equal(torch.get_rng_state(), before)


def _noise(p: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
    return noise * (0.5 * p.detach().abs().mean() + 0.01)


def _gradient(loss: Tensor, of: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, of, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(of, found, strict=True)]


@contextmanager
def _holding(parameters: dict[str, Any], values: dict[str, Tensor]) -> Iterator[None]:
    """The parameters hold other values inside, and their own, to the bit, afterwards."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(values[name])
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
