"""Several steps of another optimizer on one meta-batch, as proximal policy optimization makes them (ProMP, PPO)."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from dmaml_pl.checks import require_positive
from dmaml_pl.optimizers.problem import AskingOptimizer, flat


class Epochs(AskingOptimizer):
    """Several steps on one meta-batch, until the adapted policies are too far from those that acted.

    With `dmaml_pl.PolicyGradient(clip=0.3, inner_penalty=5e-4)` and Adam it is ProMP (Rothfuss et al. 2019,
    arXiv:1810.06784). That paper stops after a number of epochs alone; without a bound on the KL a training may
    collapse in one meta-iteration.

    Args:
        params: parameters, or groups of them.
        optimizer: from parameters to the optimizer that makes the steps; Adam with 1e-3, as in the paper, by default.
        epochs: steps on each meta-batch at most; 5 in the paper.
        max_kl: a step after which the mean KL is larger is taken back, and is the last.

    Raises:
        ConfigError: a value that is not greater than zero.

    Examples:
        >>> epochs = lambda weights: Epochs(weights, epochs=5, max_kl=0.05)
        >>> objective = PolicyGradient(clip=0.2)
        >>> module = MetaLearning(GaussianMLP(2, 2), MAML(), objective, meta_optimizer=epochs)
        >>> module.objective.better
        'max'
    """

    metric_names: ClassVar[tuple[str, ...]] = ("kl", "epochs")

    def __init__(
        self,
        params: Any,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        epochs: int = 5,
        max_kl: float = 0.05,
    ) -> None:
        require_positive(**{"model.meta_optimizer.epochs": epochs, "model.meta_optimizer.max_kl": max_kl})
        super().__init__(params, {})
        self.stepper: Optimizer = optimizer(self.param_groups)
        # One set of groups and one state, so that schedules, merges and checkpoints see the optimizer that steps.
        self.param_groups, self.state = self.stepper.param_groups, self.stepper.state
        self.epochs = epochs
        self.max_kl = max_kl

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer that steps does, whose state it is."""
        self.stepper.load_state_dict(state_dict)
        self.param_groups, self.state = self.stepper.param_groups, self.stepper.state

    def step(self, closure: Callable[..., Tensor]) -> Tensor:  # type: ignore[override]  # without a closure there is nothing to ask
        """Make the steps.

        Returns:
            The loss before them.
        """
        first: Tensor | None = None
        self.metrics = {"kl": 0.0, "epochs": 0.0}
        for number in range(self.epochs):
            with torch.enable_grad():
                loss = closure()
            first = loss if first is None else first
            before = flat(self.parameters()).detach().clone()
            state = {p: copy.deepcopy(moments) for p, moments in self.state.items()}
            self.stepper.step()
            values = self.problem.values()
            if not values.constraint <= self.max_kl:  # neither is what is not a number
                self.put(before)
                self.state.clear()
                self.state.update(state)
                break
            self.metrics = {"kl": values.constraint, "epochs": float(number + 1)}
        assert first is not None, "there is at least one epoch"  # noqa: S101
        return first
