"""Classes, or tasks of a table, dealt to the splits by chance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dmaml_pl.checks import require_positive
from dmaml_pl.data import Split
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.tasks import derive_seed


def shuffle(names: Iterable[str], kind: str, seed: int) -> list[str]:
    """The names in an order by chance, by a hash of each: the same on every machine, in whatever order they came.

    Args:
        names: all different.
        kind: of data set; another one has another order.
        seed: the same.
    """
    return sorted(names, key=lambda name: derive_seed(kind, seed, name))


@dataclass(frozen=True)
class Shares:
    """How much of a data set is for what.

    Args:
        val: `data.val_share`, dealt to validation.
        test: `data.test_share`, dealt to meta-testing; the others are for meta-training.
        what: is dealt, in words.

    Raises:
        ConfigError: the shares leave nothing for meta-training.
    """

    val: float
    test: float
    what: str

    def __post_init__(self) -> None:
        require_positive(**{"data.val_share": self.val, "data.test_share": self.test})
        if self.val + self.test >= 1:
            raise ConfigError(
                f"data.val_share + data.test_share is {self.val} + {self.test}, but must leave some {self.what} for "
                "meta-training: choose them to be less than 1 together."
            )

    def deal(self, shuffled: list[str], source: str) -> dict[Split, list[str]]:
        """The names of each split, at least one.

        Args:
            shuffled: all names, in the order in which they are dealt.
            source: where they are from, in words.

        Raises:
            DataError: there are too few.
        """
        val, test = (max(1, round(share * len(shuffled))) for share in (self.val, self.test))
        first = len(shuffled) - val - test
        if first < 1:
            raise DataError(
                f"{source} has {len(shuffled)} {self.what}, which are too few to be dealt to train, val and test: add "
                f"{self.what}; 3 or more are needed."
            )
        return {"train": shuffled[:first], "val": shuffled[first : first + val], "test": shuffled[first + val :]}
