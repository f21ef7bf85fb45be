"""The curvature of the constraint at the adapted weights, as a linear map: what a trust region measures steps by.

With w(m) the tasks' weights after adaptation from the meta-weights m, J = dw/dm, N = d output / dw, and F the second
derivative of the objective's constraint (a KL) by the output, it is the mean over the tasks of J' N' F N J. That is the
constraint's own second derivative where the output is that of the policy that acted, as the first one is zero there,
and takes no third derivatives (Gauss-Newton). Each map is differentiated once, and then by what is linear in it, so
that a product computes only what changes with the vector. What that comes to is recorded, where it can be, and repeated
in every meta-iteration.

Legend: T tasks, B rollouts, L time steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from dmaml_pl.algorithms.base import OWN, Weights
from dmaml_pl.engines.base import Held, Product, Tried
from dmaml_pl.engines.fusing import fuse
from dmaml_pl.engines.loop import NetworkTasks, detached, learned
from dmaml_pl.engines.recording import Record, record
from dmaml_pl.learner import MetaLearner


def evaluate_only(learner: MetaLearner, meta: Weights, tasks: NetworkTasks) -> tuple[Tensor, Tensor]:
    """Loss and constraint of each task after adaptation, (T,) both; nothing is recorded to be differentiated."""
    algorithm, meta = learner.algorithm, detached(meta)
    path = algorithm.adapt(meta, tasks, algorithm.steps, create_graph=False)
    with torch.no_grad():
        loss, _, output = algorithm.outer(meta, path, tasks)
        return loss, vmap(tasks.objective.constraint)(output, tasks.batch.query.y)


def linearize(learner: MetaLearner, meta: Weights, tasks: NetworkTasks, *, exact: bool, every: int) -> Product:
    """The sum over the tasks of their curvatures.

    Args:
        learner: network and algorithm.
        meta: meta-weights.
        tasks: the tasks.
        exact: differentiate through the gradients of the inner loop; else they are constants, as they are for a
            first-order meta-gradient.
        every: only each so-many-th time step of the rollouts is looked at, of those that are adapted to as well as of
            the query sets. The weights after adaptation, where the curvature is taken, are those of all.
    """
    algorithm = learner.algorithm
    names = learned(meta)
    thinned = exact and every > 1
    path = algorithm.adapt(meta, tasks, algorithm.steps, create_graph=exact and not thinned)
    placed = algorithm.place(meta, path[-1], algorithm.steps)
    own = {name: w.detach().requires_grad_() for name, w in placed.items()}
    if thinned:
        few = [tasks.objective.thinned(samples, every) for samples in tasks.batch.support]
        path = algorithm.adapt(
            meta, tasks.of(tasks.batch._replace(support=tuple(few))), algorithm.steps, create_graph=True
        )
        placed = algorithm.place(meta, path[-1], algorithm.steps)
    adapted = _Map([w for w in placed.values() if w.requires_grad], [meta[name] for name in names])

    shared = {n: meta[n].detach().requires_grad_() for n in names if n not in own and not n.startswith(OWN)}
    query = tasks.objective.thinned(tasks.batch.query, every)
    output, form = tree_flatten(tasks.run(meta | shared, own, query.x))
    ran = _Map(output, [*own.values(), *shared.values()])

    at = [tensor.detach().requires_grad_() for tensor in output]
    value = vmap(tasks.objective.constraint)(tree_unflatten(at, form), query.y).sum()
    slope = _gradients([value], at, None, create_graph=True)

    def product(vector: Weights) -> Weights:
        moved = iter(adapted.forward([vector[name] for name in names]))
        tangents = [next(moved) if w.requires_grad else torch.zeros_like(w) for w in placed.values()]
        change = ran.forward([*tangents, *(vector[name] for name in shared)])
        found = ran.backward(_gradients(slope, at, change))
        of_own, of_shared = found[: len(own)], dict(zip(shared, found[len(own) :], strict=True))
        back = adapted.backward([g for g, w in zip(of_own, placed.values(), strict=True) if w.requires_grad])
        return {
            name: gradient + of_shared[name] if name in of_shared else gradient
            for name, gradient in zip(names, back, strict=True)
        }

    return product


class Curvatures:
    """Linearizes by what was recorded of `linearize`, once for all meta-batches of the same shapes.

    It is recorded of tensors without values, so networks that look at values, and those that draw at random or write
    into buffers, are linearized directly.
    """

    def __init__(self) -> None:
        self._records: Tried[dict[Any, Record | None]] = Tried()
        self._held = Held()

    def linearize(
        self, learner: MetaLearner, meta: Weights, tasks: NetworkTasks, *, exact: bool, every: int
    ) -> Product:
        """See the function of that name."""
        samples = tree_flatten((tasks.batch.support, tasks.batch.query))[0]
        tensors = [*(weight.detach() for weight in meta.values()), *samples]
        key = (
            exact,
            every,
            learner.algorithm.phase,
            *self._held.settings(learner),
            *learned(meta),
            *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors),
        )
        records = self._records.setdefault(learner, {})
        if key not in records:
            records[key] = _recorded(learner, meta, tasks, exact=exact, every=every)
        known = records[key]
        if known is None or torch.is_autocast_enabled(tensors[0].device.type):
            return linearize(learner, meta, tasks, exact=exact, every=every)
        with torch.no_grad():
            kept = known.once(*tensors)

        def product(vector: Weights) -> Weights:
            names = learned(meta)
            with torch.no_grad():
                return dict(zip(names, known.each(*kept, *(vector[name] for name in names)), strict=True))

        return product


def _recorded(learner: MetaLearner, meta: Weights, tasks: NetworkTasks, *, exact: bool, every: int) -> Record | None:
    """What linearizing and a product do; None where that depends on more than shapes."""
    samples, form = tree_flatten((tasks.batch.support, tasks.batch.query))
    names = learned(meta)

    def call(*given: Tensor) -> list[Tensor]:
        left = iter(given)
        own = {name: next(left).requires_grad_(weight.requires_grad) for name, weight in meta.items()}
        support, query = tree_unflatten([next(left) for _ in samples], form)
        batch = tasks.batch._replace(support=support, query=query)
        with torch.enable_grad():
            found = linearize(learner, own, tasks.of(batch), exact=exact, every=every)(
                dict(zip(names, left, strict=True))
            )
        return [found[name] for name in names]

    def shaped(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    try:
        found = record(
            call,
            [shaped(tensor) for tensor in (*meta.values(), *samples)],
            [shaped(meta[name]) for name in names],
            next(iter(meta.values())).device,
            fuse,
        )
    except Exception:  # a network may refuse in any way, and all can be done without
        return None
    return found if found.pure else None


class _Map:
    """A differentiable map at a point, and both directions of its derivative.

    The forward one is the derivative of the backward one, which is linear in what it is given.

    Args:
        outputs: of the map.
        inputs: of the map, which require gradients.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._outputs, self._inputs = list(outputs), list(inputs)
        self._given = [torch.zeros_like(tensor, requires_grad=True) for tensor in outputs]
        self._back = _gradients(self._outputs, self._inputs, self._given, create_graph=True)

    def backward(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The transposed derivative times `given`."""
        return _gradients(self._outputs, self._inputs, given)

    def forward(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The derivative times `given`."""
        pairs = [(back, each) for back, each in zip(self._back, given, strict=True) if back.requires_grad]
        return _gradients([back for back, _ in pairs], self._given, [each for _, each in pairs])


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[Tensor] | None, *, create_graph: bool = False
) -> list[Tensor]:
    if not outputs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(outputs, inputs, given, True, create_graph, allow_unused=True, materialize_grads=True)
    return list(found)
