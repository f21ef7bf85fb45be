"""What of a network and an algorithm stays from one meta-iteration to the next, as the native engine's C++ has it.

Legend: P parameters as the C++ has them, I adaptation steps.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from dmaml_pl.algorithms.base import OWN, Algorithm, Weights
from dmaml_pl.engines import loop
from dmaml_pl.engines.base import Held
from dmaml_pl.engines.native.blocks import read
from dmaml_pl.learner import MetaLearner


def rates_of(algorithm: Algorithm, meta: Weights, number: int) -> Weights:
    """The rate of each weight that adapts in a step: minus what a gradient of ones makes of zero."""
    at = {name: torch.zeros_like(meta[name]).unsqueeze(0) for name in algorithm.adapts}
    ones = {name: torch.ones_like(zeros) for name, zeros in at.items()}
    return {name: -moved.squeeze(0) for name, moved in algorithm.step(meta, at, ones, number).items()}


class Layout:
    """How a network is made, and where the weights of a learner are: what stays from one meta-iteration to the next.

    Args:
        learner: network and algorithm.
        sample: shape of a sample.
        key: what it holds for; kept.

    Attributes:
        chain: the stages.
        meta: all meta-weights by name.
        sources: the tensors that the stages have, in their order, followed by a zero and a one.
        learned, ignored, own: names of the meta-weights that have a gradient: of the stages, of what changes nothing,
            and of the algorithm.
        places: of all elements of those `learned`, one after another, among the parameters of the C++.
        sizes: how many elements each of them has.

    Raises:
        UnknownLayerError: the network is no chain.
    """

    def __init__(self, learner: MetaLearner, sample: tuple[int, ...], key: list[Any]) -> None:
        network, self.meta, self.key = learner.network, learner.meta(), key
        tensors = dict(network.named_buffers()) | self.meta
        self.chain = read(network, sample)
        self.chain.lay_out(tensors)
        self.sources = [tensors[name] for name in self.chain.names]
        self.sources.append(self.sources[0].new_tensor([0, 1]))
        names = loop.learned(self.meta)
        self.own = [name for name in names if name.startswith(OWN)]
        self.learned = [name for name in names if name in self.chain.places]
        self.ignored = [name for name in names if name in self.chain.ignored]
        empty = torch.empty(0, dtype=torch.long)
        self.places = torch.cat([empty, *(self.chain.places[name] for name in self.learned)])
        self.sizes = [self.meta[name].numel() for name in self.learned]
        self._fixed: tuple[Hashable, Tensor] | None = None
        self._held = Held()

    def rates(self, algorithm: Algorithm) -> tuple[Tensor, list[Tensor]]:
        """The rate of each parameter of the C++ in each step, (I, P), zero for those that have none.

        And those that are learned, of weights that change nothing.
        """
        settings = (algorithm.phase, *self._held.settings(algorithm))
        if self._fixed is not None and self._fixed[0] == settings:
            return self._fixed[1], []
        with torch.enable_grad():
            steps = [rates_of(algorithm, self.meta, number) for number in range(algorithm.steps)]
            laid = torch.stack([self._laid_out(each) for each in steps])
        if not any(name.startswith(OWN) for name in self.meta):  # with nothing of its own it always has the same
            self._fixed = settings, laid.detach()
        ignored = [each[name] for each in steps for name in self.chain.ignored if name in each]
        return laid, [rate for rate in ignored if rate.requires_grad]

    def _laid_out(self, values: Weights) -> Tensor:
        """Values of weights as the C++ has them, (P,); zero for those that have none."""
        parts = [
            values[name].flatten() if name in values else torch.zeros_like(tensor).flatten()
            for name, tensor in zip(self.chain.names, self.sources, strict=False)
        ]
        return torch.cat([*parts, parts[0].new_zeros(2)])[self.chain.index]
