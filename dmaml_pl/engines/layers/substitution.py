"""Where the faster layers can take the place of a network's own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from dmaml_pl.engines.layers.batch_norm import batch_norm
from dmaml_pl.engines.layers.block import batch_norm_relu_pool, pool_then_relu
from dmaml_pl.engines.layers.convolution import convolution

Step = Callable[[Tensor], Tensor]
Kind = TypeVar("Kind", bound=nn.Module)


def use_faster_layers(network: nn.Module) -> bool:
    """Make what is known of a network on a CPU compute as the files of this folder say; all else stays as it is.

    Modules of a class of one's own, or with hooks, are not known. Gradients of gradients can be taken then, but not
    gradients of those.

    Returns:
        Whether anything is.
    """
    known = False
    for layer in network.modules():
        forward = _faster(layer)
        if forward is not None:
            layer.forward = forward
            known = True
    return known


def _faster(layer: nn.Module) -> Step | None:
    if _is(layer, nn.Sequential):
        steps = _steps(list(layer))
        return partial(_walk, steps) if len(steps) < len(layer) else None
    if _is_batch_norm(layer):
        return partial(batch_norm, layer)
    return partial(convolution, layer) if _is(layer, nn.Conv2d) else None


def _is(layer: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    hooks = (getattr(layer, f"_{which}_hooks") for which in ("forward", "forward_pre", "backward", "backward_pre"))
    return type(layer) is kind and not any(hooks)


def _is_batch_norm(layer: nn.Module) -> TypeGuard[BatchNorm]:
    # Of any class, whose forward is PyTorch's: what goes on within hooks does not matter to one layer on its own.
    return isinstance(layer, BatchNorm) and type(layer).forward is BatchNorm.forward and layer.running_mean is None


def _steps(layers: Sequence[nn.Module]) -> list[Step]:
    """What a `Sequential` does one after another, where neighbours that go together are one."""
    steps: list[Step] = []
    while layers:
        first, *rest = layers
        norm = first if _is(first, nn.BatchNorm2d) and _is_batch_norm(first) else None
        relu_and_pool = rest[:2] if norm is not None else layers[:2]
        pool = _pool_after_relu(relu_and_pool)
        if pool is None:
            steps.append(first)
            layers = rest
        elif norm is None:
            steps.append(partial(pool_then_relu, pool))
            layers = layers[2:]
        else:
            steps.append(partial(batch_norm_relu_pool, norm, pool))
            layers = layers[3:]
    return steps


def _pool_after_relu(layers: Sequence[nn.Module]) -> nn.MaxPool2d | None:
    if len(layers) == 2 and _is(layers[0], nn.ReLU):
        pool = layers[1]
        return pool if _is(pool, nn.MaxPool2d) and not pool.return_indices else None
    return None


def _walk(steps: Sequence[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x
