"""Which weights of a network stay as they are."""

from collections.abc import Sequence

from torch import nn

from dmaml_pl.networks.names import select


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the weights whose names match: they get no gradient, no step, and are not sent at merges.

    Args:
        network: it.
        patterns: as of a shell, such as `body.*`; one that begins with `!` takes out again.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    for name in select([name for name, _ in network.named_parameters()], patterns, "model.freeze"):
        network.get_parameter(name).requires_grad_(False)
