"""What a policy is trained by: surrogates whose gradients are policy gradients, and the KL that bounds a step.

Legend: B rollouts of the task, L time steps (horizon); tensors of one task, without the T axis.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmaml_pl.checks import require_not_negative, require_one_of, require_positive
from dmaml_pl.errors import ConfigError
from dmaml_pl.objectives import Objective
from dmaml_pl.policies.distributions import ActionDistribution
from dmaml_pl.tasks import Samples

Surrogate = Literal["likelihood_ratio", "log_prob", "dice"]

OLD = "old_"
"""Before the names of the parameters of the distribution that the action was drawn from, in the targets."""


class PolicyGradient(Objective):
    """Policy gradients: the advantage of the actions that were taken, differentiated through their probabilities.

    The targets of samples are tensors by name, as `dmaml_pl.rollouts` makes them, (B, L) each: "action", (B, L, A),
    "advantage", "reward", "weight" (one over the number of steps of the task, zero after an end), and the parameters
    of the distribution that acted, "old_mean" and so on.

    Args:
        surrogate: of the inner loop. All three have the same gradient; they differ in what a second-order
            meta-gradient differentiates. "likelihood_ratio" is pi / pi_old * A, the low-variance curvature of Rothfuss
            et al. 2019 (arXiv:1810.06784), almost unbiased. "log_prob" is log pi * A, as in the MAML paper's code,
            whose second derivative leaves out a term and is wrong by several times its size. "dice" is unbiased, of
            high variance (Foerster et al. 2018, arXiv:1802.05098, with a baseline as Farquhar et al. 2019,
            arXiv:1909.10549).
        clip: of the ratio in the outer loss, as in PPO and ProMP (0.3 there); None, as for a trust region, does not.
        inner_penalty: so many times the KL from the policies that acted before each step of adaptation is added to the
            outer loss; 5e-4 in ProMP. Zero as long as the meta-weights are those that acted.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> module = MetaLearning(GaussianMLP(2, 2), MAML(inner_lr=0.1), PolicyGradient())
        >>> module.objective.metric
        'return'
    """

    name, metric, title, better = "reinforcement", "return", "return", "max"
    acts = True

    def __init__(
        self, surrogate: Surrogate = "likelihood_ratio", clip: float | None = None, inner_penalty: float = 0.0
    ) -> None:
        require_one_of("model.objective.surrogate", surrogate, get_args(Surrogate))
        if clip is not None:
            require_positive(**{"model.objective.clip": clip})
        require_not_negative(**{"model.objective.inner_penalty": inner_penalty})
        self.inner_penalty = inner_penalty
        self.surrogate = surrogate
        self.clip = clip

    def support_loss(self, output: ActionDistribution, y: dict[str, Tensor]) -> Tensor:
        """Minus the surrogate of the inner loop."""
        log_prob, weight = output.log_prob(y["action"]), y["weight"]
        if self.surrogate == "log_prob":
            gained = log_prob
        elif self.surrogate == "likelihood_ratio":
            gained = torch.exp(log_prob - old_of(output, y).log_prob(y["action"]))
        else:
            # The box of all actions up to a time, less that of those before; after an end no one acts.
            until = (log_prob * (weight > 0)).cumsum(-1)
            before = until - log_prob
            gained = _box(until) - _box(before)
        return -(gained * y["advantage"] * weight).sum()

    def query_loss(self, output: ActionDistribution, y: dict[str, Tensor]) -> Tensor:
        """Minus the expected advantage after adaptation, by the ratio to the policy that acted."""
        ratio = torch.exp(output.log_prob(y["action"]) - old_of(output, y).log_prob(y["action"]))
        gained = ratio * y["advantage"]
        if self.clip is not None:
            gained = torch.minimum(gained, ratio.clamp(1 - self.clip, 1 + self.clip) * y["advantage"])
        return -(gained * y["weight"]).sum()

    def constraint(self, output: ActionDistribution, y: dict[str, Tensor]) -> Tensor:
        """The mean KL from the policy that acted to the present one."""
        weight = y["weight"]
        return (old_of(output, y).kl_to(output) * weight).sum() / weight.sum()

    def thinned(self, samples: Samples, every: int) -> Samples:
        """Each so-many-th time step; all for "dice", in which a step depends on all before it."""
        if every == 1 or self.surrogate == "dice":
            return samples
        few = samples.map(lambda tensor: tensor[:, :, ::every])
        assert isinstance(few.y, dict)  # noqa: S101 - as every set of rollouts has them
        weight = few.y["weight"]
        return few._replace(y=few.y | {"weight": weight / weight.sum((1, 2), keepdim=True)})

    def between(self, before: ActionDistribution, after: ActionDistribution) -> Tensor:
        """The mean KL from a worker's policy to the merged one."""
        return before.kl_to(after).mean()

    def measure(self, output: ActionDistribution, y: dict[str, Tensor]) -> Tensor:
        """The mean undiscounted return of the rollouts, whatever the policy is now."""
        return y["reward"].sum(-1).mean()

    def check(self, output: Any, y: Any) -> None:
        """The network must be a policy, for actions such as the environments have."""
        if not isinstance(output, ActionDistribution):
            raise ConfigError(
                f"model.objective is {type(self).__name__}, but model.network gives a {type(output).__name__} and no "
                "distribution of actions: set it to a policy, such as dmaml_pl.GaussianMLP."
            )
        if not isinstance(y, dict) or "action" not in y:
            raise ConfigError(
                f"model.objective is {type(self).__name__}, but the data has no rollouts: set data to environments, "
                "such as data_modules.Navigation2D, or model.objective to regression or classification."
            )


def old_of(output: ActionDistribution, y: dict[str, Tensor]) -> ActionDistribution:
    """The distribution that the actions were drawn from, of the kind of `output`."""
    old: ActionDistribution = type(output)(**{n.removeprefix(OLD): t for n, t in y.items() if n.startswith(OLD)})
    return old


def _box(x: Tensor) -> Tensor:
    """DiCE's magic box: one, whose derivative is that of x."""
    return torch.exp(x - x.detach())
