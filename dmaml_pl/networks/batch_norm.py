"""Keeps batch-norm statistics from leaking between tasks, and from test to training."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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
