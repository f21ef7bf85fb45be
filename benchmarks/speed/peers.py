"""Who computes the meta-gradient: our engines, the other libraries, each in the form that its own examples show.

A library that is not installed, or cannot do a problem, is reported as such.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.speed.problems import Problem
from dmaml_pl import _learn2learn
from dmaml_pl.engines import EngineChoice, EngineName
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.learner import MetaLearner

LONG = 60_000
"""Meta-iterations of the training that a meta-gradient is taken to be of, by which `auto` compiles."""


class Measured(NamedTuple):
    """A meta-gradient, ready to be computed again and again.

    Attributes:
        compute: computes it, and waits until it is there.
        gradients: of what `compute` gave, by the names of the network's parameters, in PyTorch's shapes.
    """

    compute: Callable[[], Any]
    gradients: Callable[[Any], Mapping[str, Tensor]]


class Peer(NamedTuple):
    """A way to compute meta-gradients.

    Attributes:
        name: as in the table.
        make: prepares a problem's.
        package: the library that must be installed beside ours.
        ours: whether it is this project's.
    """

    name: str
    make: Callable[[Problem], Measured]
    package: str | None = None
    ours: bool = False


class UnavailableError(Exception):
    """A peer cannot be measured here; says why."""


def library(name: str) -> Any:
    """An installed library; what it says while it is imported is not for us to mend.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # By the door that takes gym's advertisement out.
            return _learn2learn.load() if name == "learn2learn" else importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"not installed ({error})") from error


def _from_grad(problem: Problem, network: nn.Module, accumulate: Callable[[], object]) -> Measured:
    """A meta-gradient that ends up in the parameters' `.grad`."""

    def compute() -> None:
        network.zero_grad()
        accumulate()
        wait(problem)

    def gradients(_: Any) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    return Measured(compute, gradients)


def wait(problem: Problem) -> None:
    """Wait for the GPU, if there is one at work."""
    if problem.device == "cuda":
        torch.cuda.synchronize()


def our_engine(problem: Problem, *, name: EngineName, compiled: bool, task_chunk: int | None = None) -> Measured:
    """One of our engines, with so many tasks in memory at a time.

    Raises:
        UnavailableError: it takes too long to be made.
    """
    if compiled and name == "vectorized" and problem.has_convolutions and problem.device == "cpu":
        raise UnavailableError("was not compiled for a CPU in three minutes")
    network, batch = problem.made(), problem.batch()
    learner = MetaLearner(network, problem.rule)
    choice = EngineChoice(name, problem.objective, compiled=compiled, task_chunk=task_chunk)
    choice.meta_iterations = LONG
    engine = choice.for_training(learner, batch)

    def accumulate() -> None:
        with limited_threads(engine.threads(learner, batch)):  # as in a training
            engine.meta_gradient(learner, batch)

    return _from_grad(problem, network, accumulate)


def learn2learn(problem: Problem) -> Measured:
    """learn2learn's MAML wrapper, task after task, as in its examples."""
    network, batch, loss = problem.made(), problem.batch(), problem.objective.query_loss
    maml = library("learn2learn").algorithms.MAML(network, lr=problem.inner_lr, first_order=False)

    def accumulate() -> None:
        for number in range(problem.tasks):
            task, learner = batch.task(number), maml.clone()
            for _ in range(problem.steps):
                learner.adapt(loss(learner(task.support_x), task.support_y))
            (loss(learner(task.query_x), task.query_y) / problem.tasks).backward()

    return _from_grad(problem, network, accumulate)


def higher(problem: Problem) -> Measured:
    """Higher's differentiable optimizer, task after task, as in its example of MAML."""
    network, batch, loss = problem.made(), problem.batch(), problem.objective.query_loss
    optimizer = torch.optim.SGD(network.parameters(), lr=problem.inner_lr)
    context = library("higher").innerloop_ctx

    def accumulate() -> None:
        for number in range(problem.tasks):
            task = batch.task(number)
            with context(network, optimizer, copy_initial_weights=False) as (adapted, inner):
                for _ in range(problem.steps):
                    inner.step(loss(adapted(task.support_x), task.support_y))
                (loss(adapted(task.query_x), task.query_y) / problem.tasks).backward()

    return _from_grad(problem, network, accumulate)


def torchopt_loop(problem: Problem) -> Measured:
    """TorchOpt's MetaSGD, task after task, as in its example of MAML."""
    network, batch, loss = problem.made(), problem.batch(), problem.objective.query_loss
    torchopt = library("torchopt")
    inner = torchopt.MetaSGD(network, lr=problem.inner_lr)
    weights = [(name, p) for name, p in network.named_parameters()]

    def accumulate() -> None:
        at_first = torchopt.extract_state_dict(network, by="reference")
        optimizer_at_first = torchopt.extract_state_dict(inner, by="reference")
        for number in range(problem.tasks):
            task = batch.task(number)
            for _ in range(problem.steps):
                inner.step(loss(network(task.support_x), task.support_y))
            (loss(network(task.query_x), task.query_y) / problem.tasks).backward()
            torchopt.recover_state_dict(network, at_first)
            torchopt.recover_state_dict(inner, optimizer_at_first)

    measured = _from_grad(problem, network, accumulate)
    return measured._replace(gradients=lambda _: {name: p.grad.clone() for name, p in weights if p.grad is not None})


def torchopt_vmap(problem: Problem) -> Measured:
    """TorchOpt's functional SGD under PyTorch's vmap, as in its example of functional MAML."""
    torchopt = library("torchopt")
    inner = torchopt.sgd(problem.inner_lr)

    def update(weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        updates, _ = inner.update(gradients, inner.init(weights), inplace=False)
        changed: dict[str, Tensor] = torchopt.apply_updates(weights, updates, inplace=False)
        return changed

    return _functional(problem, update)


def torch_func(problem: Problem) -> Measured:
    """`torch.func` alone, as in functorch's example of MAML."""

    def update(weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: w - problem.inner_lr * gradients[name] for name, w in weights.items()}

    return _functional(problem, update)


def _functional(problem: Problem, update: Callable[..., dict[str, Tensor]]) -> Measured:
    """The gradient of the mean over vmap; with batch norm, the mean over vmap of the gradient.

    PyTorch 2.15 gives the wrong gradient for the former where there is batch norm (`dmaml_pl.engines.vectorized`).
    """
    network, batch, loss = problem.made(), problem.batch(), problem.objective.query_loss
    meta = {name: p.detach() for name, p in network.named_parameters()}

    def task_loss(weights: dict[str, Tensor], *task: Tensor) -> Tensor:
        support_x, support_y, query_x, query_y = task

        def support_loss(weights: dict[str, Tensor]) -> Tensor:
            return loss(functional_call(network, weights, (support_x,)), support_y)

        for _ in range(problem.steps):
            weights = update(weights, grad(support_loss)(weights))
        return loss(functional_call(network, weights, (query_x,)), query_y)

    over_tasks = (None, 0, 0, 0, 0)
    if problem.has_batch_norm:
        each = vmap(grad(task_loss), in_dims=over_tasks)

        def whole(weights: dict[str, Tensor], *tasks: Tensor) -> dict[str, Tensor]:
            return {name: gradient.mean(dim=0) for name, gradient in each(weights, *tasks).items()}
    else:
        losses = vmap(task_loss, in_dims=over_tasks)
        whole = grad(lambda weights, *tasks: losses(weights, *tasks).mean())

    def compute() -> dict[str, Tensor]:
        found = whole(meta, batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        wait(problem)
        return found

    return Measured(compute, lambda found: found)


def supervised(problem: Problem) -> Measured:
    """The floor: forward and backward of plain supervised learning on as many samples, which no adaptation can beat."""
    network, batch, loss = problem.made(), problem.batch(), problem.objective.query_loss
    x = torch.cat([*[batch.support_x.flatten(0, 1)] * problem.steps, batch.query_x.flatten(0, 1)])
    y = torch.cat([*[batch.support_y.flatten(0, 1)] * problem.steps, batch.query_y.flatten(0, 1)])
    return _from_grad(problem, network, lambda: loss(network(x), y).backward())


def _jax(problem: Problem) -> Measured:
    from benchmarks.speed.jax_peer import meta_gradient  # noqa: PLC0415 - imports JAX, which may not be installed

    return meta_gradient(problem)


REFERENCE = Peer("learn2learn", learn2learn, "learn2learn")
FLOOR = Peer("floor: supervised forward + backward", supervised)
PEERS = (
    REFERENCE,
    Peer("higher", higher, "higher"),
    Peer("TorchOpt, MetaSGD", torchopt_loop, "torchopt"),
    Peer("TorchOpt, functional + vmap", torchopt_vmap, "torchopt"),
    Peer("torch.func + vmap", torch_func),
    Peer("JAX, jit + vmap", _jax, "jax"),
    Peer("dmaml_pl, learn2learn", partial(our_engine, name="learn2learn", compiled=False), ours=True),
    Peer("dmaml_pl, vectorized", partial(our_engine, name="vectorized", compiled=False), ours=True),
    Peer("dmaml_pl, vectorized + compile", partial(our_engine, name="vectorized", compiled=True), ours=True),
    Peer("dmaml_pl, native", partial(our_engine, name="native", compiled=False), ours=True),
    Peer("dmaml_pl, auto", partial(our_engine, name="auto", compiled=False), ours=True),
    Peer("dmaml_pl, auto + compile", partial(our_engine, name="auto", compiled=True), ours=True),
)
