"""The fast engine for small networks on CPUs: no autograd, but C++ for chains of known layers.

A meta-gradient is that of the query loss, carried back through the steps w' = w - r g of the inner loop: v becomes
v - H (r v), where the Hessian of the support loss times a vector is the gradient's derivative along it, forward over
reverse. Tasks are computed one by one in threads, in memory that is kept, and added up in their order, so that threads
do not change the bits. All else (evaluation, predictions, autocast) is left to the engine that executes tasks one by
one.
"""

import copy
from collections.abc import Hashable
from contextlib import nullcontext

import torch
from torch import Tensor

from dmaml_pl.algorithms.base import Algorithm, Weights
from dmaml_pl.engines import loop, trial
from dmaml_pl.engines.base import Backward, MetaOutcome, Of, Tried
from dmaml_pl.engines.compiled import MetaGradient, hand_out
from dmaml_pl.engines.native.blocks import UnknownLayerError
from dmaml_pl.engines.native.layout import Layout, rates_of
from dmaml_pl.engines.native.library import SUFFIX, library
from dmaml_pl.engines.native.machine import Found, Machine
from dmaml_pl.engines.per_task import PerTaskEngine
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Classification, Objective, Regression
from dmaml_pl.tasks import TaskBatch

MOST_MACHINES = 2
"""Shapes of tasks that memory is kept for."""

EXACT = 1e-4
"""So far, as a share of its norm, a gradient in float64 may be from autograd's when a network is tried."""

_HOOKS = ("learned_from", "minibatch", "start", "place", "adapt", "outer")


class NativeEngine(PerTaskEngine):
    """Differentiates chains of convolutions, norms, activations, pooling and linear layers without autograd."""

    name = "native"

    def __init__(self, objective: Objective, *, task_chunk: int | None = None) -> None:
        super().__init__(objective, task_chunk=task_chunk)
        self._layouts: Tried[dict[Hashable, Layout]] = Tried()
        self._threads: Tried[dict[Hashable, int | None]] = Tried()
        self._own_refusals: Tried[str | None] = Tried()

    def refusal(self, learner: MetaLearner, batch: TaskBatch) -> str | None:
        """Why not: in training the network must be a chain of known layers, and steps a rate times the gradient."""
        reason = super().refusal(learner, batch)
        if reason is not None or not learner.network.training:
            return reason
        if learner not in self._own_refusals:
            self._own_refusals[learner] = self._try_native(learner, batch)
        return self._own_refusals[learner]

    def meta_gradient(
        self, learner: MetaLearner, batch: TaskBatch, backward: Backward = Tensor.backward, of: Of = "loss"
    ) -> MetaOutcome:
        """Add the meta-gradient of all tasks to the parameters' `.grad`."""
        if of != "loss" or torch.is_autocast_enabled("cpu"):
            return super().meta_gradient(learner, batch, backward, of)
        threads, layout = torch.get_num_threads(), self._layout(learner, batch)
        # What surrounds the C++ is small, and threads would wait for each other.
        with nullcontext() if threads == 1 else limited_threads(1):
            gradients, found = self._compute(learner, batch, threads, layout)
        metric = found.loss
        if not self.objective.shows_its_loss:
            metric = loop.metrics_of(self.objective, found.losses, found.outputs, batch.query).mean()
        parameters = [layout.meta[name] for name in gradients]
        hand_out(MetaGradient(found.loss, metric, parameters, list(gradients.values()), apart=True), backward)
        return MetaOutcome(found.loss, metric)

    def threads(self, learner: MetaLearner, batch: TaskBatch) -> int | None:
        """All, a thread for whole tasks, but where there is so little to do that one is enough."""
        known = self._threads.setdefault(learner, {})
        key = (batch.support[0].x.shape, batch.query.x.shape, learner.algorithm.steps)
        if key not in known:
            known[key] = 1 if self._machine(learner, batch, self._layout(learner, batch)).is_small else None
        return known[key]

    def _compute(self, learner: MetaLearner, batch: TaskBatch, threads: int, layout: Layout) -> tuple[Weights, Found]:
        """Meta-gradients by name, and what else became of the tasks."""
        algorithm = learner.algorithm
        rates, unused = layout.rates(algorithm)
        machine = self._machine(learner, batch, layout)
        found = machine.run(layout.tensors(), rates, batch, threads, second_order=not algorithm.first_order)
        gradients = dict(zip(layout.names, found.gradients, strict=True))
        if len(layout.learned) < len(gradients):
            gradients = {name: gradients[name] for name in layout.learned}
        for name in layout.ignored:
            gradients[name] = torch.zeros_like(layout.meta[name])
        if found.by_rates is not None:
            zeros, of = [torch.zeros_like(rate) for rate in unused], [layout.meta[name] for name in layout.own]
            by = torch.autograd.grad([rates, *unused], of, [found.by_rates, *zeros], allow_unused=True)
            gradients |= {name: g for name, g in zip(layout.own, by, strict=True) if g is not None}
        return gradients, found

    def _layout(self, learner: MetaLearner, batch: TaskBatch) -> Layout:
        """How the network is made, and where its weights are; made anew where they are others.

        Raises:
            UnknownLayerError: of what is not known.
        """
        sample, layouts = batch.query.x.shape[2:], self._layouts.setdefault(learner, {})
        layout = layouts.get(sample)
        if layout is None or not layout.holds():
            layout = layouts[sample] = Layout(learner, sample)
        return layout

    def _machine(self, learner: MetaLearner, batch: TaskBatch, layout: Layout) -> Machine:
        shapes, steps = [samples.x.shape for samples in (batch.support[0], batch.query)], learner.algorithm.steps
        key = (*shapes, steps)
        machine: Machine | None = layout.machines.get(key)
        if machine is None:
            if len(layout.machines) >= MOST_MACHINES:
                del layout.machines[next(iter(layout.machines))]
            is_classes = isinstance(self.objective, Classification)
            machine = layout.machines[key] = Machine(layout, batch, steps, is_classes=is_classes)
        return machine

    def _try_native(self, learner: MetaLearner, batch: TaskBatch) -> str | None:
        network, algorithm = learner.network, learner.algorithm
        kinds = {(p.device.type, str(p.dtype).removeprefix("torch.")) for p in network.parameters()}
        known = {
            f"the losses of {type(self.objective).__name__}": type(self.objective) in (Classification, Regression),
            f"the inner loop of {type(algorithm).__name__}": all(
                getattr(type(algorithm), hook) is getattr(Algorithm, hook) for hook in _HOOKS
            ),
            "model.algorithm.inner_optimizer": algorithm.inner_optimizer is None,
            "weights that are not all float32 or all float64, on a CPU": len(kinds) == 1
            and all(device == "cpu" and of in SUFFIX for device, of in kinds),
            "several support sets, or targets that are several tensors": len(batch.support) == 1
            and all(isinstance(y, Tensor) for y in (batch.support[0].y, batch.query.y)),
        }
        unknown = next((what for what, is_known in known.items() if not is_known), None)
        if unknown is not None:
            return f"native does not know {unknown}"
        try:
            layout = self._layout(learner, batch)
        except UnknownLayerError as reason:
            return f"native cannot compute {type(network).__name__} ({reason})"
        if not _steps_by_rates(copy.deepcopy(learner).double()):
            return f"native does not know the steps of {type(algorithm).__name__}"
        found = library(linear=layout.chain.is_linear)
        return f"native cannot be compiled ({found})" if isinstance(found, str) else self._inexact(learner, batch)

    def _inexact(self, learner: MetaLearner, batch: TaskBatch) -> str | None:
        """Why the meta-gradient of one task is not autograd's, in float64; None where it is."""
        kind = type(learner.network).__name__
        with trial.trial(learner.network, batch) as given:
            generator = torch.Generator().manual_seed(0)
            # Pictures have areas of one colour, in which the largest of a window is a matter of rounding.
            drawn = given.map_inputs(lambda x: torch.rand(x.shape, generator=generator, dtype=torch.float64))
            task = drawn.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
            exact = copy.deepcopy(learner).double()
            other = NativeEngine(self.objective)  # with other caches
            own, _ = other._compute(exact, task, 1, other._layout(exact, task))
            meta = exact.meta()
            tasks = loop.NetworkTasks(
                exact.network, dict(exact.network.named_buffers()), self.objective, task, loop.one_by_one
            )
            names = loop.learned(meta)
            loss = loop.evaluate(exact, meta, tasks).differentiate.sum()
            wanted = torch.autograd.grad(loss, [meta[name] for name in names], allow_unused=True)
        expected = {name: g for name, g in zip(names, wanted, strict=True) if g is not None}
        if own.keys() != expected.keys():
            return f"native cannot compute {kind} (it has weights outside of its layers)"
        if not all(bool(torch.isfinite(g).all()) for g in expected.values()):
            return None  # an inner loop that diverges tells nothing
        largest = max((float(g.norm()) for g in expected.values()), default=0.0)
        for name, g in expected.items():
            if not float((own[name] - g).norm()) <= EXACT * max(float(g.norm()), 1e-3 * largest):
                return (
                    f"native does not compute the same as autograd with {type(learner.algorithm).__name__} and {kind}"
                )
        return None


def _steps_by_rates(learner: MetaLearner) -> bool:
    """Whether each step is w - rate * g, whatever the weights and the gradients."""
    algorithm, meta, generator = learner.algorithm, learner.meta(), torch.Generator().manual_seed(0)
    at, g = (
        {n: torch.randn((1, *meta[n].shape), generator=generator, dtype=torch.float64) for n in algorithm.adapts}
        for _ in range(2)
    )
    with torch.no_grad():
        for number in range(algorithm.steps):
            rates, moved = rates_of(algorithm, meta, number), algorithm.step(meta, at, g, number)
            if not all(torch.allclose(moved[name], at[name] - rates[name] * g[name]) for name in at):
                return False
    return True
