"""P>M>F: pretrain, meta-train as ProtoNet, fine-tune to each task of the test (Hu et al. 2022, arXiv:2204.07305).

Legend: T tasks, S support samples, C H W image axes.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dmaml_pl.algorithms.base import Algorithm, Tasks, Weights, gradients
from dmaml_pl.algorithms.inner_optimizers import InnerAdam, InnerOptimizer
from dmaml_pl.algorithms.proto import BIAS, WEIGHT, ProtoNet, head_of_prototypes
from dmaml_pl.checks import require_positive
from dmaml_pl.networks.names import HEAD

SHIFT, BRIGHTNESS = 0.125, 0.5
"""How far a picture is moved, as a share of its size, and how much is added to its pixels, at most; as in the paper's
code, which changes contrast and saturation, too, and leaves one in ten steps without."""


class PMF(ProtoNet):
    """A ProtoNet in training; at validation and test its body is fine-tuned to a task's support set, step by step.

    In each step prototypes are made of the support set, its pictures are moved and brightened at random, and the body
    follows the gradient of the cross-entropy by which the prototypes tell them. What is random follows from the step's
    number alone. `model.evaluation_steps` says how many steps are made, 50 in the paper; the report tells what each
    gains. Within the domain of the training it is little or nothing, the authors say; across domains it pays.

    The paper tells classes by the cosine of features, this by their distance, as ProtoNet does; and it searches the
    learning rate for each domain, among 0.01, 0.001 and 0.0001: set it, and compare the meta-tests.

    Args:
        inner_lr: step size of the fine-tuning.
        adapts: which weights of the body are fine-tuned, as patterns of their names; by default all not frozen.
        inner_optimizer: Adam by default, as in the paper's code.

    Raises:
        ConfigError: `inner_lr` is not greater than zero.

    Examples:
        >>> module = MetaLearning(Conv4(filters=8), PMF(inner_lr=0.001), "classification")
        >>> adapted = FewShotLearner(module).adapt(torch.rand(5, 1, 28, 28), torch.arange(5))
        >>> adapted.predict(torch.rand(9, 1, 28, 28)).shape
        torch.Size([9, 5])
    """

    fine_tunes = True

    def __init__(
        self,
        inner_lr: float = 0.001,
        adapts: Sequence[str] | None = None,
        inner_optimizer: InnerOptimizer | None = None,
    ) -> None:
        super().__init__()
        require_positive(**{"model.algorithm.inner_lr": inner_lr})
        self.inner_lr = inner_lr
        self._optimizer = InnerAdam() if inner_optimizer is None else inner_optimizer
        self._patterns = adapts

    def attach(self, network: Any) -> None:
        """Choose what of the body is fine-tuned."""
        super().attach(network)
        Algorithm.attach(self, network)
        self.adapts = [name for name in self.adapts if not name.startswith(HEAD)] + [WEIGHT, BIAS]

    def adapt(self, meta: Weights, tasks: Tasks, steps: int, *, create_graph: bool) -> list[Weights]:
        """The head of prototypes, and after it `steps` steps of fine-tuning, which nothing is learned from."""
        path, state = [self.start(meta, tasks)], None
        body = {name: tasks.expand(meta[name]) for name in self.adapts if not name.startswith(HEAD)}
        fixed = {name: weight.detach() for name, weight in meta.items()}
        for number in range(steps):
            x, y = tasks.batch.support_x, tasks.batch.support_y
            at = {name: weight.detach().requires_grad_() for name, weight in body.items()}
            outputs = tasks.run(fixed, at | head_of_prototypes(self, fixed, tasks, at), augmented(x, number))
            losses = functional.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none")
            found = gradients(losses.view(y.shape).mean(dim=1), at, create_graph=False)
            direction, state = self._optimizer.direction(found, state, number)
            body = {name: weight.detach() for name, weight in body.items()}
            body |= {name: body[name] - self.inner_lr * step for name, step in direction.items()}
            with torch.no_grad():
                path.append(body | head_of_prototypes(self, fixed, tasks, body))
        return path


def augmented(x: Tensor, number: int) -> Tensor:
    """Pictures (T, S, C, H, W), each moved, with nothing in its place, and brightened; other samples as they are."""
    if x.ndim != 5:
        return x
    draw, (height, width) = random.Random(number), x.shape[-2:]  # noqa: S311 - nothing secret
    changed = []
    for sample in x.unbind(dim=1):
        down, right = (round(draw.uniform(-SHIFT, SHIFT) * size) for size in (height, width))
        moved = functional.pad(sample, (right, -right, down, -down))
        changed.append(moved + draw.uniform(-BRIGHTNESS, BRIGHTNESS))
    return torch.stack(changed, dim=1)
