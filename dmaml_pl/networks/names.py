"""Weights chosen by patterns of their names."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dmaml_pl.errors import ConfigError


def select(names: Sequence[str], patterns: Sequence[str], setting: str) -> list[str]:
    """The names that patterns choose, in their order.

    Args:
        names: to choose from, such as `features.0.weight`.
        patterns: as of a shell, one after another: `features.*` adds, `!*.bias` takes out again. Where the first takes
            out, all are there before it.
        setting: what the patterns are the value of.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    chosen = set(names if patterns and patterns[0].startswith("!") else ())
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        matching = {name for name in names if fnmatchcase(name, wanted)}
        if not matching:
            near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.0)
            raise ConfigError(
                f"{setting} has the pattern {pattern!r}, which matches no weight of the network: it has such as "
                f"{', '.join(near)}."
            )
        chosen = chosen - matching if pattern.startswith("!") else chosen | matching
    return [name for name in names if name in chosen]


def head_of(network: nn.Module) -> str:
    """Name of the layer that a network's last weights belong to, which gives its outputs; "" is the network itself."""
    *_, last = (name for name, _ in network.named_parameters())
    return last.rpartition(".")[0]
