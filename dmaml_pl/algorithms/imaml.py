"""iMAML: an implicit meta-gradient, of which the inner loop is no part (Rajeswaran et al. 2019, arXiv:1909.04630)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmaml_pl.algorithms.base import Outcome, Tasks, Weights, gradients
from dmaml_pl.algorithms.maml import MAML
from dmaml_pl.checks import require_not_negative, require_positive


class IMAML(MAML):
    """The inner loop minimizes L(support; w) + regularization / 2 * |w - w_0|^2 by gradient descent.

    Where it ends in the minimum w*, the meta-gradient is (1 + H / regularization)^-1 g, H the second derivative of the
    support loss there, g the gradient of the query loss. The system is solved by conjugate gradients, which take
    products with H alone. So the memory does not grow with the steps of the inner loop, and these may be many; where
    they are too few to come near the minimum, the meta-gradient is another one than that of the weights they come to.

    Weights that do not adapt (`adapts`) have their part of the implicit meta-gradient, too: the query loss depends on
    them, and so does w*.

    Args:
        inner_lr: step size of the inner loop; 0.01 in the paper's code for Omniglot. Beyond 2 over the sum of
            `regularization` and the largest curvature the inner loop diverges. The implicit meta-gradient knows nothing
            of steps, so nothing keeps the curvature below that, as MAML's does: it was seen to grow through a training
            of sinusoid regression until the loss was not finite, with 0.01 within 200 meta-iterations. A smaller
            `inner_lr` (0.003 there) and a smaller learning rate of the meta-optimizer (0.001) put that off
            beyond 3,000 meta-iterations; more `regularization` does not.
        inner_steps: steps of the inner loop in training; 16 in the paper's 5-way Omniglot.
        regularization: how strongly the adapted weights are drawn to the meta-weights, 2 in the paper's Omniglot.
            Greater than the support loss is curved downwards anywhere, or there need be no minimum, and without
            `damping` the meta-gradient may be of any size; a task's conjugate gradients end where they notice. The
            greater, the less is adapted: 5 did more than 50 in sinusoid regression.
        cg_steps: of conjugate gradients at most; 5 in the paper.
        damping: added to `regularization` in the meta-gradient alone, (1 + H / (regularization + damping))^-1 g: the
            support loss may be curved downwards as much as both. The paper has none, but its code
            (github.com/aravindr93/imaml_dev) solves (2 + H / (regularization + 10)), which is a damping of 22 for 2 but
            for a factor. Without, Omniglot stayed where it came to within a hundred meta-iterations.
        settings: those of `MAML`, without those of its first order: no derivative of a step is taken here.

    Raises:
        ConfigError: a value is not greater than zero, or `damping` negative.

    Examples:
        >>> algorithm = IMAML(inner_lr=0.01, inner_steps=16, regularization=2.0)
        >>> MetaLearning(MLP(hidden=[8]), algorithm).learner.states()
        {'frozen': 0, 'learned': 0, 'adapting': 25}
    """

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 16,
        regularization: float = 2.0,
        cg_steps: int = 5,
        damping: float = 22.0,
        **settings: Any,
    ) -> None:
        super().__init__(inner_lr, inner_steps, first_order=False, first_order_until=0, **settings)
        require_positive(
            **{"model.algorithm.regularization": regularization, "model.algorithm.cg_steps": cg_steps},
        )
        require_not_negative(**{"model.algorithm.damping": damping})
        self.regularization = regularization
        self.cg_steps = cg_steps
        self.damping = damping

    def adapt(self, meta: Weights, tasks: Tasks, steps: int, *, create_graph: bool) -> list[Weights]:
        """The fast weights after 0 .. `steps` steps, constants; in training the last ones stand for those between."""
        fixed = {name: weight.detach() for name, weight in meta.items()}
        center = self.start(fixed, tasks)
        fast, state, path = center, None, [center]
        for number in range(steps):
            at = {name: weight.detach().requires_grad_() for name, weight in fast.items()}
            losses = tasks.support_loss(fixed, at, number)
            found = {
                name: g + self.regularization * (fast[name] - center[name])
                for name, g in gradients(losses, at, create_graph=False).items()
            }
            if self.inner_optimizer is not None:
                found, state = self.inner_optimizer.direction(found, state, number)
            fast = fast | self.step(fixed, {name: fast[name] for name in found}, found, number)
            path.append(fast)
            if create_graph:
                path = [fast] * len(path)
        return path

    def outer(self, meta: Weights, path: list[Weights], tasks: Tasks) -> Outcome:
        """A sum whose gradient by the meta-weights is the implicit meta-gradient: that of w_0, and of all others."""
        at = {name: weight.detach().requires_grad_() for name, weight in path[-1].items()}
        loss, output = tasks.query(meta, at)
        slope = gradients(tasks.support_loss(meta, at, max(len(path) - 2, 0)), at, create_graph=True)

        strength = self.regularization + self.damping

        def curved(v: Weights) -> Weights:
            """(H + strength) v."""
            products = _gradients(_dot(slope, v), at)
            return {name: products[name] + strength * each for name, each in v.items()}

        solution = _solve(curved, _gradients(loss, at), self.cg_steps)
        differentiate = strength * _dot(self.start(meta, tasks), solution)
        if any(weight.requires_grad for name, weight in meta.items() if name not in at):
            differentiate = differentiate + loss - _dot(slope, solution)
        return Outcome(differentiate, loss.detach(), output)


def _gradients(losses: Tensor, of: Weights) -> Weights:
    """Each task's own, zero where there is none, (T, ...); what they were computed from is kept."""
    zeros = {name: torch.zeros_like(weight) for name, weight in of.items()}
    if not losses.requires_grad:  # such as products with a second derivative that is zero everywhere
        return zeros
    found = torch.autograd.grad(losses.sum(), list(of.values()), retain_graph=True, allow_unused=True)
    return zeros | {name: g for name, g in zip(of, found, strict=True) if g is not None}


def _dot(some: Weights, others: Weights) -> Tensor:
    """Each task's inner product of all tensors of `some` with those of the same names, (T,)."""
    return torch.stack([(tensor * others[name]).flatten(1).sum(dim=1) for name, tensor in some.items()]).sum(dim=0)


def _solve(matrix: Callable[[Weights], Weights], wanted: Weights, steps: int) -> Weights:
    """Each task's x of `matrix(x) = wanted` after so many conjugate gradients from zero (Hestenes and Stiefel 1952).

    A task whose residual is zero, or along whose direction the matrix is not positive, stays where it is.
    """

    def along(x: Weights, factors: Tensor, direction: Weights) -> Weights:
        return {
            name: each + factors.view(-1, *[1] * (each.ndim - 1)) * direction[name].detach() for name, each in x.items()
        }

    solution = {name: torch.zeros_like(each) for name, each in wanted.items()}
    residual = direction = wanted
    square = _dot(residual, residual)
    going = square > 0
    for _ in range(steps):
        product = matrix(direction)
        curvature = _dot(direction, product)
        going = going & (curvature > 0)
        length = torch.where(going, square / curvature, 0.0)
        solution, residual = along(solution, length, direction), along(residual, -length, product)
        before, square = square, _dot(residual, residual)
        direction = along(residual, torch.where(going, square / before, 0.0), direction)
        going = going & (square > 0)
    return solution
