"""A network read as a chain of stages, which the native engine computes: convolution, norm, activation, pooling.

Legend: C H W image axes, F features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

LINEAR, RELU, TANH = range(3)
NO_POOL, MAX, MEAN = range(3)
BIAS, BATCH, GROUP = range(3)
_ACTS: dict[Any, int] = {
    nn.ReLU: RELU, F.relu: RELU, torch.relu: RELU, "relu": RELU,
    nn.Tanh: TANH, F.tanh: TANH, torch.tanh: TANH, "tanh": TANH,
}  # fmt: skip
PADDED_TO = 64
"""Bytes that the channels of an image are filled up to; as in `simd.h`."""


class UnknownLayerError(Exception):
    """A network is no chain of known stages; says what of it, in a few words."""


@dataclass
class Stage:
    """A convolution, or a linear layer as one, and what follows it up to the next.

    Attributes:
        weight: of the convolution, (filters, C, kernel height, kernel width), by name.
        bias: of the convolution, by name, if it has one.
        size: C, H, W of what it is given.
        filters: that it gives.
        kernel: height and width.
        stride: down and across.
        padding: with zeros, at top and bottom, at left and right.
        norm: BIAS for none, BATCH, GROUP.
        groups: of group norm.
        eps: of the norm.
        scale: the norm's weight, by name.
        shift: the norm's bias, by name.
        act: LINEAR, RELU, TANH.
        pool: NO_POOL, MAX, MEAN (over all pixels).
        window: of max-pooling.
    """

    weight: str
    bias: str | None
    size: tuple[int, int, int]
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    norm: int = BIAS
    groups: int = 1
    eps: float = 0.0
    scale: str | None = None
    shift: str | None = None
    act: int = LINEAR
    pool: int = NO_POOL
    window: int = 1

    def fields(self) -> list[int]:
        """As `convolutions.cpp` takes them."""
        channels, height, width = self.size
        shape = [channels, self.filters, height, width, *self.kernel, *self.stride, *self.padding]
        return [*shape, self.norm, self.groups, self.act, self.pool, self.window]

    @property
    def elements(self) -> int:
        """Of what it is given."""
        return math.prod(self.size)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer with an activation at most."""
        return self.convolved() == (1, 1) and self.padding == (0, 0) and not self.norm and not self.pool

    def convolved(self) -> tuple[int, int]:
        """Height and width of the convolution's output."""
        down, across = (
            (self.size[axis + 1] + 2 * self.padding[axis] - self.kernel[axis]) // self.stride[axis] + 1
            for axis in range(2)
        )
        return down, across


@dataclass
class Chain:
    """A network of stages.

    Attributes:
        stages: in their order.
        ignored: names of weights that change nothing: biases before a batch norm.
    """

    stages: list[Stage]
    ignored: list[str]

    @property
    def is_linear(self) -> bool:
        """Whether it has linear layers and activations alone, which are computed by C++ of their own."""
        return all(stage.is_linear for stage in self.stages)


def read(network: nn.Module, sample: Sequence[int]) -> Chain:
    """The stages of a network.

    Args:
        network: whose forward is looked at, and not run.
        sample: shape of a sample, (C, H, W) or (F).

    Raises:
        UnknownLayerError: it is no such chain.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):  # noqa: SLF001
        raise UnknownLayerError("it has hooks")
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception as error:  # whatever a network does in Python
        raise UnknownLayerError("its forward is no fixed chain of layers") from error
    reader = _Reader(network, sample)
    before = None
    for node in graph.nodes:
        if node.op == "placeholder" and before is None:
            before = node
        elif node.op == "output":
            if node.args != (before,):
                raise UnknownLayerError("it has several outputs")
        else:
            if node.all_input_nodes != [before] or not node.args or node.args[0] is not before:
                raise UnknownLayerError(f"{node.name} is not a layer in a chain")
            reader.take(node)
            before = node
    return reader.chain()


class _Reader:
    def __init__(self, network: nn.Module, sample: Sequence[int]) -> None:
        if len(sample) not in (1, 3):
            raise UnknownLayerError(f"its samples have {len(sample)} axes")
        self.modules = dict(network.named_modules())
        self.names = {id(t): name for name, t in (*network.named_parameters(), *network.named_buffers())}
        self.size: tuple[int, int, int] = (sample[0], 1, 1) if len(sample) == 1 else (sample[0], sample[1], sample[2])
        self.flat = len(sample) == 1
        self.stages: list[Stage] = []

    def take(self, node: fx.Node) -> None:
        layer = self.modules[str(node.target)] if node.op == "call_module" else None
        kind: Any = node.target if layer is None else type(layer)
        what = kind.__name__ if callable(kind) else str(kind)
        if kind in _ACTS and len(node.args) == 1:
            self._activate(_ACTS[kind], what)
        elif isinstance(layer, nn.Identity) or (type(layer) is nn.Dropout and layer.p == 0):
            pass
        elif type(layer) is nn.Conv2d:
            self._convolve(layer)
        elif type(layer) is nn.Linear:
            self._linear(layer)
        elif type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm):
            self._normalize(layer)
        elif type(layer) is nn.MaxPool2d:
            self._max_pool(layer)
        elif type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)):
            self._mean()
        elif _is_mean(kind) and _given(node, 1, "dim") in ((2, 3), [2, 3], (-2, -1), [-2, -1]) and not self.flat:
            self._mean()
            self.flat = not _given(node, 2, "keepdim")
        elif _is_flatten(kind, layer, node):
            self.flat = True
        else:
            raise UnknownLayerError(f"it has {what}")

    def chain(self) -> Chain:
        if not self.stages:
            raise UnknownLayerError("it has no layer with weights")
        self._close()
        if self.size[1:] != (1, 1) or not self.flat:
            raise UnknownLayerError("its outputs have no two axes")
        weights = [n for s in self.stages for n in (s.weight, s.bias, s.scale, s.shift) if n is not None]
        if len(set(weights)) < len(weights):
            raise UnknownLayerError("it has a layer twice")
        return Chain(self.stages, [s.bias for s in self.stages if s.norm == BATCH and s.bias is not None])

    def _name(self, tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        if id(tensor) not in self.names:
            raise UnknownLayerError("it makes weights of others")
        return self.names[id(tensor)]

    def _last(self, what: str) -> Stage:
        if not self.stages:
            raise UnknownLayerError(f"it begins with {what}")
        return self.stages[-1]

    def _close(self) -> None:
        """What the stages that are there give is what the next is given."""
        if not self.stages:
            return
        last = self.stages[-1]
        height, width = last.convolved()
        if last.pool == MAX:
            height, width = height // last.window, width // last.window
        self.size = (last.filters, *((1, 1) if last.pool == MEAN else (height, width)))

    def _add(self, layer: nn.Conv2d | nn.Linear, **settings: Any) -> None:
        weight, bias = self._name(layer.weight), self._name(layer.bias)
        assert weight is not None, "such layers have one"  # noqa: S101
        self.stages.append(Stage(weight, bias, self.size, layer.weight.shape[0], **settings))
        if min(self.stages[-1].convolved()) < 1:
            raise UnknownLayerError("its samples are too small")

    def _convolve(self, layer: nn.Conv2d) -> None:
        self._close()
        if layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros" or self.flat:
            raise UnknownLayerError("it has a convolution with groups, dilation or another padding")
        if isinstance(layer.padding, str):
            raise UnknownLayerError(f"it has a convolution with padding {layer.padding!r}")
        kernel, stride = (layer.kernel_size[0], layer.kernel_size[1]), (layer.stride[0], layer.stride[1])
        self._add(layer, kernel=kernel, stride=stride, padding=(layer.padding[0], layer.padding[1]))

    def _linear(self, layer: nn.Linear) -> None:
        self._close()
        if not self.flat:
            raise UnknownLayerError("it has a linear layer of images")
        self._add(layer, kernel=self.size[1:])

    def _normalize(self, layer: Any) -> None:
        last = self._last("a norm")
        if last.norm or last.act or last.pool or (self.flat and type(layer) is not nn.BatchNorm1d):
            raise UnknownLayerError("it has a norm that does not follow a convolution")
        if type(layer) is nn.GroupNorm:
            last.norm, last.groups = GROUP, layer.num_groups
        elif layer.running_mean is not None or layer.running_var is not None:
            raise UnknownLayerError("it has a batch norm with running statistics")
        else:
            last.norm = BATCH
        last.eps, last.scale, last.shift = layer.eps, self._name(layer.weight), self._name(layer.bias)

    def _activate(self, act: int, what: str) -> None:
        last = self._last(what)
        if last.act or last.pool == MEAN or (last.pool and act != RELU):
            raise UnknownLayerError(f"it has {what} that does not follow a convolution or norm")
        last.act = act

    def _max_pool(self, layer: nn.MaxPool2d) -> None:
        last = self._last("MaxPool2d")
        sizes = {*_pair(layer.kernel_size), *_pair(layer.stride)}
        plain = len(sizes) == 1 and set(_pair(layer.padding)) == {0} and set(_pair(layer.dilation)) == {1}
        if not plain or layer.ceil_mode or layer.return_indices or self.flat or last.pool or last.act == TANH:
            raise UnknownLayerError("it has a max-pooling that overlaps, pads or follows none of its kind")
        last.pool, last.window = MAX, sizes.pop()

    def _mean(self) -> None:
        last = self._last("a mean")
        if self.flat or last.pool or last.act == TANH:
            raise UnknownLayerError("it has a mean that does not follow a convolution")
        last.pool = MEAN


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _given(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _is_mean(kind: Any) -> bool:
    return kind in ("mean", torch.mean)


def _is_flatten(kind: Any, layer: nn.Module | None, node: fx.Node) -> bool:
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return kind in ("flatten", torch.flatten) and (_given(node, 1, "start_dim"), _given(node, 2, "end_dim")) in (
        (1, None),
        (1, -1),
    )
