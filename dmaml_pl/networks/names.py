"""Weights chosen by patterns of their names, and the parts of a network that names tell."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dmaml_pl.errors import ConfigError

HEAD = "head."
"""What the names of the weights begin with of a network's last part, where it is split; see `is_split`."""


def select(names: Sequence[str], patterns: Sequence[str], setting: str) -> list[str]:
    """The names that patterns choose, in their order.

    Args:
        names: to choose from, such as `features.0.weight`.
        patterns: as of a shell, one after another: `features.*` adds, `!*.bias` takes out again. Where the first takes
            out, all are there before it.
        setting: what the patterns are the value of.

    Raises:
        ConfigError: a pattern matches nothing, or they are no list.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise ConfigError(f"{setting} is {patterns!r}, but must be a list of patterns, such as [{names[-1]!r}].")
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


def is_split(network: nn.Module) -> bool:
    """Whether a network has an embedding and a head: a method `embed` and a submodule `head` which share no weight.

    Its forward is then to be `head(embed(x))`.
    """
    head = network._modules.get("head")  # noqa: SLF001 - and no attribute of another kind
    if head is None or not callable(getattr(type(network), "embed", None)):
        return False
    named = list(network.named_parameters(remove_duplicate=False))
    return not {id(p) for name, p in named if name.startswith(HEAD)} & {
        id(p) for name, p in named if not name.startswith(HEAD)
    }
