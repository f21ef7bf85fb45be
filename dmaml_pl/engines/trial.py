"""What is found out of a network by running it on one task, before it costs time or gives wrong numbers in silence.

Legend: S support samples.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines.loop import Each, NetworkTasks, aliases_of, evaluate, learned, named_everywhere, walk
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch

NOT_THE_SAME = 0.02
"""So far, as a share of its norm, a gradient may be from the network's own; rounding is far below it, faults above."""

WRONG_IN_PYTORCH = "WeightNormInterfaceBackward0"
"""PyTorch's own node whose second derivative is wrong: it takes the norms of the weights for constants."""

STEP = 1e-5
"""Of a finite difference in float64, as a share of a direction about as long as the weights."""

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
    functional_call(network, named_everywhere(after, aliases_of(network)), (task.support[0].x[0],), tie_weights=False)
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
                return lost_curvature(learner, objective, task)
            walk(learner, meta, tasks, learner.algorithm.steps)
    except Exception as error:  # a user's own network may raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        return lines[0].split(". ")[0].rstrip(".")
    return None


def lost_curvature(learner: MetaLearner, objective: Objective, task: TaskBatch) -> str | None:
    """Why second derivatives are not those of the loss, with weight_norm or a function of a user's own in the network.

    Autograd takes what such a function's backward computes for a constant where it is marked `once_differentiable`, or
    leaves autograd, and says nothing; PyTorch's weight_norm takes norms for constants. In float64 the change of the
    gradient along a direction is compared with what autograd says of it. A gradient that is not the loss's own on
    purpose, such as one straight through a rounding, is left alone.
    """
    network, support, aliases = learner.network, of_one_class(task).support[0], aliases_of(learner.network)
    if learner.algorithm.first_order or not isinstance(support.y, Tensor):
        return None
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}  # which it may write
    parameters = dict(network.named_parameters())

    def loss_of(tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(network, named_everywhere(dict(tensors), aliases), (x,), tie_weights=False)
        return objective.support_loss(output, y)

    if not _may_lose_curvature(loss_of(buffers | parameters, support.x[0], support.y[0])):
        return None
    x, y = (_exact(each[0]) for each in (support.x, support.y))
    fixed = {name: _exact(each) for name, each in (buffers | parameters).items()}
    weights = {name: fixed.pop(name) for name, p in parameters.items() if p.requires_grad}
    try:
        is_lost = _is_curvature_lost(lambda own: loss_of(fixed | own, x, y), weights)
    except Exception:  # it cannot be told: not everything is there in float64
        return None
    told = "its second derivative is not that of the loss, as of weight_norm, or of a once_differentiable Function"
    return told if is_lost else None


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _is_curvature_lost(loss_of: Callable[[Weights], Tensor], weights: Weights) -> bool:
    generator = torch.Generator().manual_seed(0)
    along = [_noise(weight, generator) for weight in weights.values()]

    def at(step: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        moved = [(w + step * each).requires_grad_() for w, each in zip(weights.values(), along, strict=True)]
        loss = loss_of(dict(zip(weights, moved, strict=True)))
        return loss.detach(), moved, _gradient(loss, moved, create_graph=step == 0)

    (_, here, gradient), (above, _, higher), (below, _, lower) = at(0), at(STEP), at(-STEP)
    slope = _dot(gradient, along)
    told = _gradient(slope, here) if slope.requires_grad else [torch.zeros_like(each) for each in here]
    measured = [(one - other) / (2 * STEP) for one, other in zip(higher, lower, strict=True)]
    size = float((_dot(gradient, gradient) * _dot(along, along)).detach()) ** 0.5
    if abs(float((above - below) / (2 * STEP) - slope.detach())) > 1e-3 * size:
        return False
    missing = [one - other for one, other in zip(measured, told, strict=True)]
    least = NOT_THE_SAME**2 * float(_dot(measured, measured)) + (1e-6 * size) ** 2
    return bool(float(_dot(missing, missing)) > least)


def _may_lose_curvature(loss: Tensor) -> bool:
    """Whether functions of a user's own, in Python or C++, or weight_norm are in the graph that leads to a loss."""
    seen, ahead = set[Any](), list[Any]([loss.grad_fn])
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        is_own = isinstance(node, torch.autograd.function.BackwardCFunction) or "CppNode" in node.name()
        if is_own or node.name() == WRONG_IN_PYTORCH:
            return True
        seen.add(node)
        ahead += [each for each, _ in node.next_functions]
    return False


def _dot(some: list[Tensor], others: list[Tensor]) -> Tensor:
    return torch.stack([(one * other).sum() for one, other in zip(some, others, strict=True)]).sum()


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

    device, kept = next(iter(values.values())).device.type if values else "cpu", list(map(torch.clone, values.values()))
    with torch.autocast(device, enabled=False):
        ours, draws = _watched(by_engine)
        if not all(map(torch.equal, kept, values.values())):
            return f"{type(network).__name__} writes its weights when it is run, as embeddings with a max_norm do"
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


def _gradient(loss: Tensor, of: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(loss, of, create_graph=create_graph, allow_unused=True)
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
