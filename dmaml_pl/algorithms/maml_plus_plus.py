"""MAML++: what makes MAML easier to train (Antoniou, Edwards and Storkey 2019, arXiv:1810.09502)."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dmaml_pl.algorithms.base import OWN, Outcome, Tasks, Weights
from dmaml_pl.algorithms.lslr import LSLR
from dmaml_pl.checks import require_not_negative
from dmaml_pl.errors import ConfigError

LEAST = 0.03
"""Share of the mean weight that the loss after a step but the last keeps; of the paper's code."""

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class MAMLPlusPlus(LSLR):
    """MAML with losses after every step, rates per layer and step, and norm weights per step, each by its own switch.

    What is differentiated is the sum of importance[n] * L(query; w after n steps). All steps are equally important at
    first, then more and more the last; after `multi_step_until` meta-iterations it is the last step's loss alone.

    Per step, the network's norm layers have a gamma and a beta of their own (the `weight` and `bias` of batch, group,
    layer and instance norms), which are meta-learned and do not adapt: the network's own before the first step, others
    after each. So a query set after n steps sees those that support step n + 1 sees; the paper's code gives it those of
    support step n, having one set less. Its running statistics per step are written and never read, as its batch norm
    is always in training mode; ours takes the statistics of the samples at hand, always.

    The paper also starts in first order (`first_order_until`; its code leaves that out in its experiments), and anneals
    the meta-optimizer's learning rate along a cosine (`model.meta_schedule`).

    Args:
        multi_step_until: meta-iterations in which losses after all steps count; 10 epochs of 500 in the paper's
            experiments on Omniglot, 15 on mini-ImageNet. 0: the last step's loss counts alone, always.
        learned_rates: learn the rates; otherwise they stay `inner_lr`.
        per_step_norms: what of the norm layers would adapt (`adapts`) has a value for every step instead.
        settings: those of `LSLR`.

    Attributes:
        importance: (`inner_steps`,), of the loss after each step, in the meta-iteration that `begin` was told of.

    Raises:
        ConfigError: a number is out of range, or only norm layers were to adapt.

    Examples:
        >>> algorithm = MAMLPlusPlus(inner_lr=0.01, inner_steps=5, multi_step_until=1000)
        >>> MetaLearning(MLP(hidden=[8]), algorithm).learner.states()
        {'frozen': 0, 'learned': 20, 'adapting': 25}
    """

    importance: Tensor

    def __init__(
        self,
        multi_step_until: int = 5000,
        learned_rates: bool = True,
        per_step_norms: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_not_negative(**{"model.algorithm.multi_step_until": multi_step_until})
        self.multi_step_until = multi_step_until
        self._multi_step = multi_step_until > 0
        self.learned_rates = learned_rates
        self.per_step_norms = per_step_norms
        self._norms: list[str] = []

    def attach(self, network: nn.Module) -> None:
        """Make the rates, and the norm weights of every step but the first."""
        super().attach(network)
        if self.per_step_norms:
            self._take_norms_out(network)
        rates = self.rates.new_full((len(self.adapts), self.steps), self.inner_lr)
        self.rates = nn.Parameter(rates, requires_grad=self.learned_rates)
        self.register_buffer("importance", self.rates.new_tensor(self.importance_at(0)), persistent=False)

    def _take_norms_out(self, network: nn.Module) -> None:
        of_norms = {
            f"{layer}.{name}" if layer else name
            for layer, module in network.named_modules()
            if isinstance(module, _NORMS)
            for name, _ in module.named_parameters(recurse=False)
        }
        self._norms = [name for name in self.adapts if name in of_norms]
        self.adapts = [name for name in self.adapts if name not in of_norms]
        if not self.adapts:
            raise ConfigError(
                "model.algorithm.adapts chooses weights of norm layers only, which do not adapt where "
                "model.algorithm.per_step_norms is true: set that to false, or let others adapt, too."
            )
        weights = dict(network.named_parameters())
        self.norms = nn.ParameterList(
            weights[name].detach().expand(self.steps, *weights[name].shape).clone() for name in self._norms
        )

    def importance_at(self, meta_iteration: int) -> list[float]:
        """The importance of the loss after each step; they add up to one."""
        steps = self.steps
        if meta_iteration >= self.multi_step_until:
            return [0.0] * (steps - 1) + [1.0]
        gone = meta_iteration / self.multi_step_until
        each = max((1 - gone) / steps, LEAST / steps)
        return [each] * (steps - 1) + [1 - (steps - 1) * each]

    def begin(self, meta_iteration: int) -> None:
        """Move importance to the last step."""
        super().begin(meta_iteration)
        self._multi_step = meta_iteration < self.multi_step_until
        self.importance.copy_(self.importance.new_tensor(self.importance_at(meta_iteration)))

    @property
    def phase(self) -> Hashable:
        """Whether losses after all steps are evaluated."""
        return super().phase, self._multi_step

    def place(self, meta: Weights, fast: Weights, number: int) -> Weights:
        """The same, and the norm weights of the step; beyond training, those after the last."""
        if not number or not self._norms:
            return fast
        tasks, at = len(next(iter(fast.values()))), min(number, self.steps) - 1
        norms = [meta[f"{OWN}norms.{place}"][at] for place in range(len(self._norms))]
        return fast | {name: w.expand(tasks, *w.shape) for name, w in zip(self._norms, norms, strict=True)}

    def outer(self, meta: Weights, path: list[Weights], tasks: Tasks) -> Outcome:
        """The query losses after every step, by importance; shown is the last."""
        if not self._multi_step:
            return super().outer(meta, path, tasks)
        evaluated = [tasks.query(meta, self.place(meta, fast, number)) for number, fast in enumerate(path) if number]
        losses = torch.stack([loss for loss, _ in evaluated], dim=1)
        loss, output = evaluated[-1]
        return Outcome((losses * meta[f"{OWN}importance"]).sum(dim=1), loss.detach(), output)
