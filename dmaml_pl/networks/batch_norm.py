"""Keeps batch-norm statistics from leaking between tasks, and from test to training."""

from types import MethodType
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dmaml_pl.errors import ConfigError

BatchNormUse = Literal["task", "frozen"]


def use_batch_statistics(network: nn.Module) -> list[str]:
    """Make every batch norm use the statistics of the samples at hand, in training and in evaluation.

    Running statistics would be written by every support and query set in turn, of one task after another (learn2learn's
    clones share the buffers), and would differ between workers. The MAML paper's code uses batch statistics throughout.

    Returns:
        The names of the layers that were changed.
    """
    changed = []
    for name, layer in network.named_modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats:
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            changed.append(name)
    return changed


def use_running_statistics(network: nn.Module) -> None:
    """Make every batch norm use its running statistics, and never write them, in training and in evaluation.

    That is what a pretrained body is to be run with; each sample is then normalized alone (inductive).

    Raises:
        ConfigError: a layer keeps none.
    """
    for name, layer in network.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if layer.running_mean is None:
            raise ConfigError(
                f"model.batch_norm is frozen, but {name} of model.network, {type(network).__name__}, keeps no running "
                "statistics: set it to task."
            )
        layer.eval()
        layer.train = MethodType(_stay_as_it_is, layer)  # type: ignore[method-assign]  # also of copies


def _stay_as_it_is(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer
