"""What an algorithm is: an inner loop, and what of its outcome is differentiated.

Three words carry everything. *meta*: all meta-learned tensors by name, without a T axis: the network's parameters, and
the algorithm's own parameters and buffers as `algorithm.NAME`. *fast*: the tasks' own weights, with a leading T axis.
*tasks*: what an engine lends to an algorithm, the network run on T tasks at once, or on one (T = 1).

Legend: T tasks, S support samples, Q query samples, `...` the axes of one tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dmaml_pl.algorithms.inner_optimizers import InnerOptimizer
from dmaml_pl.checks import MOST_STEPS, require_at_most, require_not_negative
from dmaml_pl.errors import ConfigError
from dmaml_pl.networks.names import select
from dmaml_pl.tasks import TaskBatch

Weights = dict[str, Tensor]
"""Tensors by the names that `nn.Module.named_parameters` gives them."""

OWN = "algorithm."
"""What the names of an algorithm's own tensors begin with among the meta-weights."""


class Tasks(Protocol):
    """T tasks and one network, run by an engine.

    Attributes:
        count: T.
        batch: the tasks' samples.

    Examples:
        >>> from dmaml_pl.algorithms import Tasks
        >>> class Halfway(MAML):
        ...     def start(self, meta, tasks: Tasks):
        ...         return {name: tasks.expand(0.5 * meta[name]) for name in self.adapts}
        >>> MetaLearning(MLP(hidden=[8]), Halfway(inner_lr=0.01)).learner.algorithm.steps
        1
    """

    count: int
    batch: TaskBatch

    def expand(self, w: Tensor) -> Tensor:
        """A meta-weight (...) as every task's own, (T, ...), which takes no memory."""
        ...

    def run(self, meta: Weights, fast: Weights, x: Tensor, part: str | None = None) -> Any:
        """The network's outputs (T, B, ...) of inputs (T, B, ...), with each task's fast weights in place of the meta.

        Args:
            meta: meta-weights.
            fast: the tasks' own.
            x: inputs.
            part: name of a submodule or method of the network to be run in its stead, such as what gives features.
        """
        ...

    def support_loss(self, meta: Weights, fast: Weights, step: int, rows: Sequence[int] | None = None) -> Tensor:
        """Each task's loss on the support set of a step, (T,); on a minibatch of it where `rows` are given."""
        ...

    def query(self, meta: Weights, fast: Weights) -> tuple[Tensor, Any]:
        """Each task's loss on its query set, (T,), and the network's outputs, (T, Q, ...)."""
        ...


class Outcome(NamedTuple):
    """What becomes of the tasks of a meta-iteration.

    Attributes:
        differentiate: (T,), whose mean the meta-gradient is of.
        loss: (T,), which is shown.
        output: of the network for the query sets, (T, Q, ...).

    Examples:
        >>> from dmaml_pl.algorithms import Outcome
        >>> class Worst(MAML):
        ...     def outer(self, meta, path, tasks):
        ...         loss, output = tasks.query(meta, path[-1])
        ...         return Outcome(loss.max().expand_as(loss), loss, output)
        >>> isinstance(MetaLearning(MLP(hidden=[8]), Worst(inner_lr=0.01)).learner.algorithm, MAML)
        True
    """

    differentiate: Tensor
    loss: Tensor
    output: Any


def gradients(losses: Tensor, of: Weights, *, create_graph: bool) -> Weights:
    """Each task's own gradient: as no task's loss depends on another's weights, that of the sum holds them all.

    Args:
        losses: (T,).
        of: by what to differentiate, (T, ...).
        create_graph: keep what a second derivative takes.

    Returns:
        The gradients by name; what the losses do not depend on is left out.

    Examples:
        >>> from dmaml_pl.algorithms import gradients
        >>> weights = {"w": torch.ones(2, 1, requires_grad=True), "unused": torch.ones(2, 1, requires_grad=True)}
        >>> gradients((3 * weights["w"] ** 2).sum(1), weights, create_graph=False)
        {'w': tensor([[6.],
                [6.]])}
    """
    found = torch.autograd.grad(losses.sum(), list(of.values()), create_graph=create_graph, allow_unused=True)
    return {name: gradient for name, gradient in zip(of, found, strict=True) if gradient is not None}


class Algorithm(nn.Module, ABC):
    """Base of the algorithms. `step` must be written; all else has MAML's form, to be overridden where it differs.

    An algorithm's own parameters are meta-learned with the network's, and its buffers go along with them, in every
    engine, at merges and in checkpoints. Both are read from `meta`, never from `self`: a compiled meta-gradient takes
    them as inputs. What is done to a tensor of `fast` or of gradients must treat its leading T axis as so many tasks.

    Args:
        inner_steps: steps of the inner loop in training.
        adapts: which weights adapt, as patterns of their names, such as `layers.4.*`; one that begins with `!` takes
            out again. The others are meta-learned, and the same for all tasks. By default all that are not frozen.
            After `attach` the attribute holds the names of the weights.
        inner_optimizer: what makes of gradients the direction of a step, such as `InnerAdam`; by default they are it.

    Attributes:
        steps: `inner_steps`.
        first_order: the meta-gradient takes the gradients of the inner loop for constants.
        any_ways: tasks may have any number of classes, whatever the network's head was made for.
        fine_tunes: steps are made at validation and test, though none are in training.
        meta_lr: learning rate of the algorithm's own parameters; None takes the meta-optimizer's.

    Raises:
        ConfigError: `inner_steps` is less than zero.

    Examples:
        >>> algorithm: Algorithm = MAML(inner_lr=0.01, inner_steps=5)
        >>> algorithm.steps, algorithm.first_order
        (5, False)
    """

    first_order: bool = False
    any_ways: bool = False
    fine_tunes: bool = False
    meta_lr: float | None = None

    def __init__(
        self,
        inner_steps: int,
        adapts: Sequence[str] | None = None,
        inner_optimizer: InnerOptimizer | None = None,
    ) -> None:
        super().__init__()
        require_not_negative(**{"model.algorithm.inner_steps": inner_steps})
        require_at_most(MOST_STEPS, **{"model.algorithm.inner_steps": inner_steps})
        self.steps = inner_steps
        self.adapts: list[str] = []
        self.inner_optimizer = inner_optimizer
        self._patterns = adapts

    def attach(self, network: nn.Module) -> None:
        """Choose what adapts, and make parameters of the algorithm's own; called once, before training.

        Raises:
            ConfigError: a pattern of `adapts` matches no weight, or all that match are frozen.
        """
        learned = [name for name, weight in network.named_parameters() if weight.requires_grad]
        if self._patterns is None:
            self.adapts = learned
            return
        names = [name for name, _ in network.named_parameters()]
        chosen = select(names, self._patterns, "model.algorithm.adapts")
        self.adapts = [name for name in learned if name in chosen]
        if not self.adapts:
            raise ConfigError(
                f"model.algorithm.adapts is {list(self._patterns)}, which leaves nothing that adapts: the network has "
                f"{', '.join(learned[:6])}{', ...' * (len(learned) > 6)}."
            )

    def begin(self, meta_iteration: int) -> None:
        """Called before each meta-iteration with its number since the start of the training, for what changes in time.

        It may set `first_order`, write into own buffers, or change what `phase` tells.
        """

    @property
    def phase(self) -> Hashable:
        """What of the Python code's course depends on `begin`: another phase is compiled anew."""
        return self.first_order

    @property
    def makes_steps(self) -> bool:
        """Whether tasks are adapted to by steps, in training or after it."""
        return self.steps > 0 or self.fine_tunes

    def learned_from(self, batch: TaskBatch) -> TaskBatch:
        """What of a meta-batch training adapts to and evaluates on; by default as it is."""
        return batch

    def minibatch(self, number: int, samples: int) -> Sequence[int] | None:
        """Which of so many support samples step `number` sees; None, as by default: all."""
        return None

    def start(self, meta: Weights, tasks: Tasks) -> Weights:
        """The fast weights before the first step; by default the meta-weights."""
        return {name: tasks.expand(meta[name]) for name in self.adapts}

    @abstractmethod
    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        """One step of the inner loop.

        Args:
            meta: meta-weights.
            fast: those fast weights that there are gradients for, (T, ...).
            gradients: of the support losses, or what the inner optimizer made of them, of the same names and shapes.
            number: of the step, from 0; at the meta-test it may exceed `steps`.

        Returns:
            The weights after the step, differentiable, of the same names and shapes.
        """

    def place(self, meta: Weights, fast: Weights, number: int) -> Weights:
        """The weights that the network runs with after `number` steps; for what differs from step to step."""
        return fast

    def adapt(self, meta: Weights, tasks: Tasks, steps: int, *, create_graph: bool) -> list[Weights]:
        """The fast weights after 0 .. `steps` steps.

        Args:
            meta: meta-weights.
            tasks: to adapt to.
            steps: steps of the inner loop.
            create_graph: differentiate through the gradients; else they are constants, and only what `start` and
                `step` make of the meta-weights is recorded.
        """
        # What starts from a constant is differentiated by, too.
        fast = {
            name: w if w.requires_grad else w.detach().requires_grad_() for name, w in self.start(meta, tasks).items()
        }
        path = [fast]
        fixed = meta if create_graph else {name: weight.detach() for name, weight in meta.items()}
        state: Any = None
        for number in range(steps):
            at = fast if create_graph else {name: weight.detach().requires_grad_() for name, weight in fast.items()}
            rows = self.minibatch(number, tasks.batch.support_of(number).x.shape[1])
            losses = tasks.support_loss(fixed, self.place(fixed, at, number), number, rows)
            found = gradients(losses, at, create_graph=create_graph)
            if self.inner_optimizer is not None:
                found, state = self.inner_optimizer.direction(found, state, number)
            fast = fast | self.step(meta, {name: fast[name] for name in found}, found, number)
            path.append(fast)
        return path

    def outer(self, meta: Weights, path: list[Weights], tasks: Tasks) -> Outcome:
        """What is differentiated and shown; by default the query loss after the last step.

        Args:
            meta: meta-weights.
            path: what `adapt` gave.
            tasks: the tasks.
        """
        loss, output = tasks.query(meta, self.place(meta, path[-1], len(path) - 1))
        return Outcome(loss, loss.detach(), output)

    def learn2learn(self, package: ModuleType, network: nn.Module) -> Any:
        """learn2learn's own wrapper of this algorithm around the network; None where learn2learn has none.

        It is what `model.engine: learn2learn` runs, and what the other engines are held against. Its parameters must be
        the network's and this algorithm's, the very tensors.

        Args:
            package: `learn2learn`, imported.
            network: the network.
        """
        return None
