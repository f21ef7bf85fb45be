"""A step of the meta-optimizer and of its schedule, along the meta-gradient that a closure computes."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from dmaml_pl.engines.base import Of
from dmaml_pl.optimizers import AskingOptimizer

_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")


Closure = Callable[..., Tensor]
"""PyTorch's own protocol: forgets the gradients, computes them anew, and returns the loss; of="constraint": that."""


class OuterStep:
    """Steps the meta-optimizer; made once a run, as Lightning's optimizers change between trainings.

    Lightning asks every callback before and after each backward and each step, which takes longer than the
    meta-gradient of a small network. Where nobody listens and nothing is scaled, it is left out.

    Args:
        module: whose meta-optimizer it is; attached to a Trainer.
        gradient_clip: largest norm of the meta-gradient; None leaves it as it is.

    Attributes:
        backward: differentiates a loss.
        asking: the meta-optimizer, if it asks more of a meta-iteration than a gradient.
    """

    def __init__(self, module: pl.LightningModule, gradient_clip: float | None) -> None:
        self._module = module
        self._gradient_clip = gradient_clip
        optimizer: Any = module.optimizers()
        schedule: Any = module.lr_schedulers()
        self._optimizer = optimizer
        self.asking = optimizer.optimizer if isinstance(optimizer.optimizer, AskingOptimizer) else None
        self._advance: Callable[[], object] | None = None if schedule is None else schedule.step
        self._is_plain = _is_plain(module)
        forgets = type(optimizer.optimizer).zero_grad is Optimizer.zero_grad
        groups = optimizer.optimizer.param_groups if self._is_plain and forgets else None
        self._parameters = None if groups is None else [p for group in groups for p in group["params"]]
        self.backward: Callable[[Tensor], object] = Tensor.backward if self._is_plain else module.manual_backward

    def zero_grad(self) -> None:
        """Forget the last meta-gradient."""
        if self._parameters is None:
            self._optimizer.zero_grad()
        else:
            for parameter in self._parameters:
                parameter.grad = None

    def clip(self) -> None:
        """Shorten a meta-gradient that is longer than `gradient_clip`."""
        if self._gradient_clip is not None:
            self._module.clip_gradients(self._optimizer, self._gradient_clip, "norm")

    def step(self, loss: Tensor, closure: Closure) -> None:
        """Make one step, which Lightning counts as one of `global_step`.

        Args:
            loss: what `closure` has just given, whose gradient is in the parameters' `.grad`: an optimizer that
                evaluates once, as most do, computes nothing again.
            closure: for an optimizer that evaluates more often, or the constraint.
        """
        first: list[Tensor] = [loss]

        def evaluated(of: Of = "loss") -> Tensor:
            return first.pop() if first and of == "loss" else closure(of)

        if self._is_plain:
            self._optimizer._on_before_step()  # noqa: SLF001 - Lightning's counters
            self._optimizer.optimizer.step(evaluated)
            self._optimizer._on_after_step()  # noqa: SLF001
        else:
            self._optimizer.step(evaluated)
        if self._advance is not None:
            self._advance()


def _is_plain(module: pl.LightningModule) -> bool:
    """Whether Lightning would do nothing at a backward and a step but call PyTorch."""
    trainer = module.trainer
    strategy: Any = trainer.strategy
    listeners = [(module, pl.LightningModule), *((callback, pl.Callback) for callback in trainer.callbacks)]  # type: ignore[attr-defined]
    return (
        type(strategy.precision_plugin) is Precision
        and type(strategy).backward is Strategy.backward
        and type(strategy).optimizer_step in (Strategy.optimizer_step, DDPStrategy.optimizer_step)
        and getattr(strategy, "_model_averager", None) is None
        and isinstance(trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]
        and not is_overridden("backward", module)
        and not any(is_overridden(hook, listener, base) for listener, base in listeners for hook in _HOOKS)
    )
