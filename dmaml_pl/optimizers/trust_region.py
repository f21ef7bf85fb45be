"""The meta-optimizer of MAML for reinforcement learning: a natural gradient step within a trust region (TRPO).

Legend: P values of all parameters together.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dmaml_pl.checks import require_not_negative, require_one_of, require_positive
from dmaml_pl.errors import ConfigError
from dmaml_pl.optimizers.problem import AskingOptimizer, flat, gradients_of

Metric = Literal["first_order", "exact"]


class TrustRegion(AskingOptimizer):
    """Trust region policy optimization (Schulman et al. 2015, arXiv:1502.05477), as MAML takes it for its outer loop.

    The direction solves (F + damping) x = g by conjugate gradients, with g the meta-gradient and F the curvature of the
    mean KL after adaptation. It is as long as the KL's quadratic model allows, and is shortened until the loss falls
    and the true KL is within bounds; else no step is made.

    Args:
        params: parameters, or groups of them. Their `lr` is 1, the share of the length that is tried first, which a
            schedule may change.
        max_kl: largest mean KL of a step, in nats; 0.01 in the MAML paper.
        metric: "exact" differentiates the KL through the inner loop. "first_order" takes the inner loop's gradients for
            constants there, which is a little quicker, and learns far more slowly on 2D navigation: loss and KL of what
            is accepted are exact in both, but its steps point elsewhere, and have to be shortened.
        metric_every: only each so-many-th time step of the rollouts, before and after adaptation, counts for the
            metric; 1 takes all, at more than twice the time.
        damping: added to the diagonal of F.
        iterations: of conjugate gradients.
        tries: lengths that are tried.
        backtrack: each length is so many times the one before.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> trust_region = lambda weights: TrustRegion(weights, max_kl=0.01)
        >>> policy = GaussianMLP(observations=2, actions=2)
        >>> module = MetaLearning(policy, MAML(), PolicyGradient(), meta_optimizer=trust_region)
        >>> module.objective.better
        'max'
    """

    metric_names: ClassVar[tuple[str, ...]] = ("kl", "line_search_tries")

    def __init__(
        self,
        params: Any,
        max_kl: float = 0.01,
        metric: Metric = "exact",
        metric_every: int = 4,
        damping: float = 1e-5,
        iterations: int = 10,
        tries: int = 15,
        backtrack: float = 0.8,
    ) -> None:
        of = "model.meta_optimizer."
        require_positive(
            **{
                f"{of}max_kl": max_kl,
                f"{of}metric_every": metric_every,
                f"{of}iterations": iterations,
                f"{of}tries": tries,
            }
        )
        require_one_of(f"{of}metric", metric, ("first_order", "exact"))
        require_not_negative(**{f"{of}damping": damping})
        if not 0 < backtrack < 1:
            raise ConfigError(f"{of}backtrack is {backtrack}, but must be greater than 0 and less than 1.")
        super().__init__(params, {"lr": 1.0})
        self.max_kl = max_kl
        self.metric = metric
        self.metric_every = metric_every
        self.damping = damping
        self.iterations = iterations
        self.tries = tries
        self.backtrack = backtrack

    def step(self, closure: Callable[..., Tensor]) -> Tensor:  # type: ignore[override]  # without a closure there is nothing to ask
        """Make one step, or none.

        Returns:
            The loss before it.
        """
        with torch.enable_grad():
            loss = closure()
        before, slope = flat(self.parameters()).detach().clone(), gradients_of(self.parameters())
        step = self._longest_step(slope)
        self.metrics = {"kl": 0.0, "line_search_tries": 0.0}
        length = float(self.param_groups[0]["lr"])
        for number in range(self.tries if bool(torch.isfinite(step).all()) else 0):
            self.put(before - length * step)
            values = self.problem.values()
            if values.loss < float(loss) and values.constraint <= self.max_kl:
                self.metrics = {"kl": values.constraint, "line_search_tries": float(number + 1)}
                return loss
            length *= self.backtrack
        self.put(before)
        return loss

    def _longest_step(self, slope: Tensor) -> Tensor:
        """The natural gradient, as long as the quadratic model of the KL allows; not finite where there is none."""
        product = self.problem.curvature(exact=self.metric == "exact", every=self.metric_every)

        def damped(vector: Tensor) -> Tensor:
            return flat(product(self.split(vector))) + self.damping * vector

        direction, rest = conjugate_gradients(damped, slope, self.iterations)
        # (F + damping) x is what is not left, so that no further product is needed for the length.
        return direction * torch.sqrt(2 * self.max_kl / (direction @ (slope - rest)))


def conjugate_gradients(product: Callable[[Tensor], Tensor], wanted: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Solves `product(x) = wanted`, (P,), approximately; begins at zero, and ends early when it is solved.

    Returns:
        x, and what is left of `wanted`: `wanted - product(x)`.
    """
    x, rest = torch.zeros_like(wanted), wanted.clone()
    direction, square = rest.clone(), rest @ rest
    enough = 1e-10 * float(square)
    for _ in range(iterations):
        if not math.isfinite(float(square)) or float(square) <= enough:
            break
        along = product(direction)
        share = square / (direction @ along)
        x = x + share * direction
        rest = rest - share * along
        following = rest @ rest
        direction = rest + following / square * direction
        square = following
    return x, rest
