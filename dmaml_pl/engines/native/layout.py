"""What of a network and an algorithm stays from one meta-iteration to the next, as the native engine's C++ has it.

Legend: E elements of the tensors that the stages have, P parameters as the C++ has them, I adaptation steps.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmaml_pl.algorithms.base import OWN, Algorithm, Weights
from dmaml_pl.engines import loop
from dmaml_pl.engines.base import Parts
from dmaml_pl.engines.native.blocks import GROUP, PADDED_TO, Chain, Stage, UnknownLayerError, read
from dmaml_pl.learner import MetaLearner


@dataclass(frozen=True)
class Arrangement:
    """What the C++ is told of a network.

    Attributes:
        fields: of all stages, one after another.
        index: of each of its parameters, (P,): its place among the elements, which are followed by a zero and a one.
        places: of each element, (E,): its place among the parameters.
        counts: elements of each tensor.
    """

    fields: list[int]
    index: Tensor
    places: Tensor
    counts: list[int]


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

    Attributes:
        chain: the stages.
        arrangement: of these, for the C++.
        meta: all meta-weights by name.
        names: of the tensors that the stages have.
        sources: these.
        machines: of the C++ with its memory, by what they are for.
        learned, ignored, own: names of the meta-weights that have a gradient: of the stages, of what changes nothing,
            and of the algorithm.

    Raises:
        UnknownLayerError: the network is no chain.
    """

    def __init__(self, learner: MetaLearner, sample: tuple[int, ...]) -> None:
        network, self.meta = learner.network, learner.meta()
        tensors = dict(network.named_buffers()) | self.meta
        self.chain = read(network, sample)
        parts = [n for s in self.chain.stages for n in (s.weight, s.bias, s.scale, s.shift) if n is not None]
        self.names = [name for name in parts if name not in self.chain.ignored]
        self.sources = [tensors[name] for name in self.names]
        self.arrangement = _arrangement(self.chain, dict(zip(self.names, self.sources, strict=True)))
        names = loop.learned(self.meta)
        self.own = [name for name in names if name.startswith(OWN)]
        self.learned = [name for name in names if name in self.names]
        self.ignored = [name for name in names if name in self.chain.ignored]
        self.machines: dict[Hashable, Any] = {}
        self._parts = Parts(learner)
        self._weights = [*self.meta.values()]
        self._kinds = self._kinds_now()
        if len({tensor.dtype for tensor in self.sources}) > 1:
            raise UnknownLayerError("it has weights of several types")
        self._settings = [
            (vars(module), name)
            for module in learner.algorithm.modules()
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
        ]
        self._fixed: tuple[list[Hashable], Tensor] | None = None

    def holds(self) -> bool:
        """Whether network and algorithm are as they were when this was made, but for the values of their weights."""
        return self._parts.are_as_before() and self._kinds_now() == self._kinds

    def _kinds_now(self) -> list[Any]:
        return [
            *[tensor.dtype for tensor in self.sources],
            *[weight.requires_grad for weight in self._weights],
        ]

    def tensors(self) -> list[Tensor]:
        """Those that the stages have, in memory as the C++ reads it."""
        return [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in self.sources]

    def rates(self, algorithm: Algorithm) -> tuple[Tensor, list[Tensor]]:
        """The rate of each element in each step, (I, E), zero for those that have none.

        And those that are learned, of weights that change nothing.
        """
        settings = [algorithm.phase, *[held.get(name) for held, name in self._settings]]
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
        """Values of weights, one after another, (E,); zero for those that have none."""
        return torch.cat(
            [
                values[name].flatten() if name in values else torch.zeros_like(tensor).flatten()
                for name, tensor in zip(self.names, self.sources, strict=True)
            ]
        )


def _arrangement(chain: Chain, tensors: Weights) -> Arrangement:
    numbers, at = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = torch.arange(at, at + tensor.numel())
        at += tensor.numel()
    lanes = PADDED_TO // next(iter(tensors.values())).element_size()
    fields, pieces = [], []
    for number, stage in enumerate(chain.stages):
        is_first, is_last = number == 0, number == len(chain.stages) - 1
        if chain.is_linear:
            is_narrow = is_last and not is_first and 2 * stage.filters <= lanes
            fields += [stage.elements, stage.filters, stage.act, is_narrow]
            pieces += _of_linear(stage, numbers, at, lanes, is_first=is_first, is_narrow=is_narrow)
        else:
            fields += stage.fields()
            pieces += _of_convolution(stage, numbers, at, lanes, is_first=is_first)
    index = torch.cat(pieces)
    places = torch.empty(at + 2, dtype=torch.long)
    places[index] = torch.arange(len(index))
    return Arrangement(fields, index, places[:at], [len(number) for number in numbers.values()])


def _of_linear(
    stage: Stage, numbers: Weights, zero: int, lanes: int, *, is_first: bool, is_narrow: bool
) -> list[Tensor]:
    bias = torch.full((stage.filters,), zero) if stage.bias is None else numbers[stage.bias]
    weight = numbers[stage.weight].reshape(stage.filters, -1)
    if not is_narrow:
        weight = F.pad(weight.T, (0, 0, 0, 0 if is_first else -stage.elements % lanes), value=zero)
    return [F.pad(part, (0, -part.shape[-1] % lanes), value=zero).flatten() for part in (bias, weight)]


def _of_convolution(stage: Stage, numbers: Weights, zero: int, lanes: int, *, is_first: bool) -> list[Tensor]:
    filters, channels = stage.filters, stage.size[0]
    wide, one = -filters % lanes, zero + 1
    own = numbers[stage.weight].reshape(filters, channels, *stage.kernel).permute(2, 3, 1, 0)
    pieces = [F.pad(own, (0, wide, 0, 0 if is_first else -channels % lanes), value=zero).flatten()]
    gamma, beta = (stage.scale, stage.shift) if stage.norm else (None, stage.bias)
    before = [(stage.bias, zero)] if stage.norm == GROUP else []
    for part, otherwise in (*before, (gamma, one), (beta, zero)):
        own = torch.full((filters,), otherwise) if part is None else numbers[part]
        pieces.append(F.pad(own, (0, wide), value=zero))
    return pieces
