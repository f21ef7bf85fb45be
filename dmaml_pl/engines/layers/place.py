"""Where the faster layers can take the place of a network's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from dmaml_pl.engines.layers.batch_norm import BatchNorm, batch_norm
from dmaml_pl.engines.layers.block import batch_norm_relu_pool, pool_then_relu
from dmaml_pl.engines.layers.convolution import convolution

Step = Callable[[Tensor], Tensor]


def use_faster_layers(network: nn.Module) -> None:
    """Make what is known of a network on a CPU compute as the files of this folder say; all else stays as it is.

    Modules of a class of one's own, or with hooks, are not known. Gradients of gradients can be taken then, but not
    gradients of those.
    """
    for layer in network.modules():
        if _is(layer, nn.Sequential):
            steps = _steps(list(layer))  # type: ignore[arg-type]
            if len(steps) < len(layer):  # type: ignore[arg-type]
                layer.forward = partial(_walk, steps)
        elif _is_batch_norm(layer):
            layer.forward = partial(batch_norm, layer)
        elif _is(layer, nn.Conv2d):
            layer.forward = partial(convolution, layer)


def _is_batch_norm(layer: nn.Module) -> bool:
    # Also of a class of one's own, such as those that learn2learn makes, whose forward is PyTorch's.
    return isinstance(layer, BatchNorm) and type(layer).forward is BatchNorm.forward and layer.running_mean is None


def _is(layer: nn.Module, kind: type[nn.Module]) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks  # noqa: SLF001 - PyTorch tells in no other way
    return type(layer) is kind and not hooked


def _steps(layers: Sequence[nn.Module]) -> list[Step]:
    """What a `Sequential` does one after another, where neighbours that go together are one."""
    steps: list[Step] = []
    while layers:
        first, *rest = layers
        if len(rest) >= 2 and _is(first, nn.BatchNorm2d) and _is_batch_norm(first) and _are_relu_and_pool(*rest[:2]):
            steps.append(partial(batch_norm_relu_pool, first, *rest[:2]))
            layers = rest[2:]
        elif rest and _are_relu_and_pool(first, rest[0]):
            steps.append(partial(pool_then_relu, first, rest[0]))
            layers = rest[1:]
        else:
            steps.append(first)
            layers = rest
    return steps


def _are_relu_and_pool(first: nn.Module, second: nn.Module) -> bool:
    return _is(first, nn.ReLU) and _is(second, nn.MaxPool2d) and not second.return_indices


def _walk(steps: Sequence[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x
