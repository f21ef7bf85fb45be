"""The one meta-gradient, adaptation curve and prediction, which all engines share; they differ in how tasks are run.

Legend: T tasks, B samples (S support, Q query), I adaptation steps.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from dmaml_pl.algorithms.base import OWN, Weights
from dmaml_pl.engines.base import Of
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks.names import HEAD, is_split
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Samples, TaskBatch

Found = TypeVar("Found")

at_once = partial(vmap, randomness="different")


def one_by_one(of_one_task: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of a function of one task one whose arguments and results have a T axis of size 1."""

    def with_axis(*given: Any) -> Any:
        return _mapped(_add_axis, of_one_task(*(_mapped(_drop_axis, each) for each in given)))

    return with_axis


def _drop_axis(tensor: Tensor) -> Tensor:
    return tensor.squeeze(0)


def _add_axis(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)


def _mapped(function: Callable[[Tensor], Tensor], given: Any) -> Any:
    """`tree_map` of tensors; what there is most of, tensors and weights by name, in a third of its time."""
    if isinstance(given, Tensor):
        return function(given)
    if type(given) is dict:
        return {name: _mapped(function, each) for name, each in given.items()}
    return tree_map(function, given)


Each = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes of a function of one task one of T tasks, whose arguments and results have a leading T axis."""


def adapts_head_alone(learner: MetaLearner) -> bool:
    """Whether all weights that adapt are of the head of a split network, whose embedding is then computed once."""
    return is_split(learner.network) and all(name.startswith(HEAD) for name in learner.algorithm.adapts)


def aliases_of(network: nn.Module) -> dict[str, str]:
    """Further names of tensors that several modules hold, and the first of each.

    `functional_call` would look for them anew in every call, and takes a module that has several names for as many: it
    then leaves the tensors in it that it was to run with.
    """
    first: dict[int, str] = {}
    found = {}
    for prefix, module in network.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001 - by each name
            whole = f"{prefix}.{name}".removeprefix(".")
            if tensor is not None and first.setdefault(id(tensor), whole) != whole:
                found[whole] = first[id(tensor)]
    return found


def named_everywhere(tensors: Weights, aliases: dict[str, str]) -> Weights:
    """Tensors by their names, and by further ones."""
    return tensors | {name: tensors[one] for name, one in aliases.items() if one in tensors} if aliases else tensors


class _Embedding(NamedTuple):
    """Features (T, B, ...) of inputs (T, B, ...), and the weights that they were computed with.

    Attributes:
        x: inputs.
        weights: the body's.
        differentiable: whether what leads to the features was recorded.
        features: of them.
    """

    x: Tensor
    weights: list[Tensor]
    differentiable: bool
    features: Any


class NetworkTasks:
    """The tasks of a meta-batch with a network: what an engine lends to an algorithm; see `algorithms.Tasks`.

    Where only the head of a split network adapts, all tasks share the body: the embedding of a set is computed once,
    also what it draws at random (dropout), and each step of the inner loop runs the head alone.

    Args:
        network: is run as a function, with other weights in the place of its own.
        buffers: the network's.
        objective: losses and metric.
        batch: the tasks' samples.
        each: how an engine runs many tasks.
    """

    def __init__(
        self, network: nn.Module, buffers: Weights, objective: Objective, batch: TaskBatch, each: Each
    ) -> None:
        self.count = batch.tasks
        self.batch = batch
        self.objective = objective
        self._network = network
        self._buffers = buffers
        self._each = each
        self._embeddings: list[_Embedding] = []

    def of(self, batch: TaskBatch) -> Self:
        """The same for other samples."""
        if batch is self.batch:
            return self
        return type(self)(self._network, self._buffers, self.objective, batch, self._each)

    def expand(self, w: Tensor) -> Tensor:
        """A meta-weight as every task's own, which are still equal, so that no memory is taken yet."""
        return w.unsqueeze(0) if self.count == 1 else w.expand(self.count, *w.shape)

    def run(self, meta: Weights, fast: Weights, x: Tensor, part: str | None = None) -> Any:
        """The network's outputs of inputs (T, B, ...)."""
        if part is None:
            call, x = self._prepared(meta, fast, x)
            return self._each(call)(fast, x)
        if part == "embed" and self._shares_body(fast):
            return self._embedding(self._shared(meta, fast), x)
        shared = self._shared(meta, fast)
        return self._each(lambda own, x: self._call(shared | own, x, part))(fast, x)

    def support_loss(self, meta: Weights, fast: Weights, step: int, rows: Sequence[int] | None = None) -> Tensor:
        """Each task's loss on the support set of a step, (T,); on a minibatch of it where `rows` are given."""
        samples = self.batch.support_of(step)
        if rows is not None:
            samples = samples.map(lambda tensor: tensor[:, list(rows)])
        return self._losses(self.objective.support_loss, meta, fast, samples)[0]

    def query(self, meta: Weights, fast: Weights) -> tuple[Tensor, Any]:
        """Each task's loss on its query set, (T,), and the network's outputs, (T, Q, ...)."""
        return self._losses(self.objective.query_loss, meta, fast, self.batch.query)

    def _losses(
        self, loss: Callable[..., Tensor], meta: Weights, fast: Weights, samples: Samples
    ) -> tuple[Tensor, Any]:
        call, x = self._prepared(meta, fast, samples.x)

        def of_one_task(own: Weights, x: Tensor, y: Any) -> tuple[Tensor, Any]:
            output = call(own, x)
            return loss(output, y), output

        found: tuple[Tensor, Any] = self._each(of_one_task)(fast, x, samples.y)
        return found

    def _prepared(self, meta: Weights, fast: Weights, x: Tensor) -> tuple[Callable[[Weights, Tensor], Any], Any]:
        """The network as a function of one task's own weights and inputs, and what it is to be given, (T, B, ...).

        That is the head and the embedding, where no more than the head differs between the tasks.
        """
        shared = self._shared(meta, fast)
        if not self._shares_body(fast):
            return lambda own, x: self._call(shared | own, x), x
        head: Any = self._network.head
        of_all = {name.removeprefix(HEAD): tensor for name, tensor in shared.items() if name.startswith(HEAD)}

        def run_head(own: Weights, features: Any) -> Any:
            of_task = {name.removeprefix(HEAD): tensor for name, tensor in own.items()}
            tensors = named_everywhere(of_all | of_task, self._aliases_in_head)
            return functional_call(head, tensors, (features,), tie_weights=False)

        return run_head, self._embedding(shared, x)

    @cached_property
    def _is_split(self) -> bool:
        return is_split(self._network)

    def _shares_body(self, fast: Weights) -> bool:
        return all(name.startswith(HEAD) for name in fast) and self._is_split

    def _embedding(self, shared: Weights, x: Tensor) -> Any:
        """The features of inputs, (T, B, ...), from a body that the tasks share; computed once."""
        body = {name: tensor for name, tensor in shared.items() if not name.startswith(HEAD)}
        weights = list(body.values())
        differentiable = torch.is_grad_enabled() and any(weight.requires_grad for weight in (x, *weights))
        for known in self._embeddings:
            if known.x is x and known.differentiable == differentiable and _same(known.weights, weights):
                return known.features
        features = self._each(lambda x: self._call(body, x, "embed"))(x)
        self._embeddings.append(_Embedding(x, weights, differentiable, features))
        return features

    def _shared(self, meta: Weights, fast: Weights) -> Weights:
        """What all tasks run with: buffers, and the weights that do not adapt."""
        return self._buffers | {
            name: weight for name, weight in meta.items() if name not in fast and not name.startswith(OWN)
        }

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return aliases_of(self._network)

    @cached_property
    def _aliases_in_head(self) -> dict[str, str]:
        return aliases_of(self._network.get_submodule(HEAD.removesuffix(".")))

    def _call(self, tensors: Weights, x: Tensor, part: str | None = None) -> Any:
        tensors = named_everywhere(tensors, self._aliases)
        if part is None:
            return functional_call(self._network, tensors, (x,), tie_weights=False)
        named = {f"network.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(_Part(self._network, part), named, (x,), tie_weights=False)


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


class _Part(nn.Module):
    """A network of which another submodule or method is called."""

    def __init__(self, network: nn.Module, part: str) -> None:
        super().__init__()
        self.network = network
        self.part = part

    def forward(self, x: Tensor) -> Any:
        """What the part gives."""
        return getattr(self.network, self.part)(x)


class Evaluated(NamedTuple):
    """What became of each task after adaptation, (T,) each: what is differentiated, loss or constraint, metric."""

    differentiate: Tensor
    loss: Tensor
    metric: Tensor


def evaluate(learner: MetaLearner, meta: Weights, tasks: NetworkTasks, of: Of = "loss") -> Evaluated:
    """Adapt to the tasks, and evaluate them; the mean of `differentiate` is what the meta-gradient is of."""
    algorithm, objective = learner.algorithm, tasks.objective
    tasks = tasks.of(algorithm.learned_from(tasks.batch))
    path = algorithm.adapt(meta, tasks, algorithm.steps, create_graph=not algorithm.first_order)
    differentiate, loss, output = algorithm.outer(meta, path, tasks)
    metric = metrics_of(objective, loss, output, tasks.batch.query)
    if objective.inner_penalty:
        for number, fast in enumerate(path[:-1]):
            samples = tasks.batch.support_of(number)
            acting = tasks.run(meta, algorithm.place(meta, fast, number), samples.x)
            differentiate = differentiate + objective.inner_penalty * vmap(objective.constraint)(acting, samples.y)
    if of == "constraint":
        differentiate = loss = vmap(objective.constraint)(output, tasks.batch.query.y)
    return Evaluated(differentiate, loss, metric)


def learned(meta: Weights) -> list[str]:
    """Names of the meta-weights that have a gradient."""
    return [name for name, weight in meta.items() if weight.requires_grad]


def steps_of(learner: MetaLearner, meta: Weights, tasks: NetworkTasks, steps: int) -> list[Weights]:
    """The weights that each task's network runs with after 0 .. `steps` steps; nothing is meta-learned."""
    meta = detached(meta)
    path = learner.algorithm.adapt(meta, tasks, steps, create_graph=False)
    return [learner.algorithm.place(meta, fast, number) for number, fast in enumerate(path)]


def walk(learner: MetaLearner, meta: Weights, tasks: NetworkTasks, steps: int) -> list[tuple[Tensor, Any]]:
    """Query losses (T,) and outputs (T, Q, ...) after 0 .. `steps` steps; nothing is meta-learned."""
    path = steps_of(learner, meta, tasks, steps)
    with torch.no_grad():
        return [tasks.query(meta, weights) for weights in path]


def curve(learner: MetaLearner, meta: Weights, tasks: NetworkTasks, steps: int) -> tuple[Tensor, Tensor]:
    """Query loss and metric of each task after 0 .. `steps` steps, both (T, I + 1)."""
    walked = walk(learner, meta, tasks, steps)
    metrics = [metrics_of(tasks.objective, loss, output, tasks.batch.query) for loss, output in walked]
    return torch.stack([loss for loss, _ in walked], dim=1), torch.stack(metrics, dim=1).to(walked[0][0].dtype)


def predictions(learner: MetaLearner, meta: Weights, tasks: NetworkTasks, steps: int) -> Tensor:
    """Query predictions after 0 .. `steps` steps, (T, I + 1, Q, ...)."""
    return torch.stack([output for _, output in walk(learner, meta, tasks, steps)], dim=1)


def detached(weights: Weights) -> Weights:
    """The same values without their history."""
    return {name: weight.detach() for name, weight in weights.items()}


def metrics_of(objective: Objective, losses: Tensor, outputs: Any, query: Samples) -> Tensor:
    """The metric of each task, (T,)."""
    if objective.shows_its_loss:
        return losses.detach()
    with torch.no_grad():
        metrics: Tensor = vmap(objective.measure)(outputs, query.y)
    return metrics


Work = Callable[[MetaLearner, Weights, NetworkTasks], Found]
