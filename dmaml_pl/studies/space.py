"""The search space of a sweep, from YAML: settings by their names in the configuration, and what each may be.

trainer.strategy.run_length: {int: [5, 200], log: true}
model.meta_optimizer.init_args.lr: {float: [1.0e-4, 1.0e-2], log: true}
trainer.strategy.merge: {choice: [dmaml_pl.MeanMerge, dmaml_pl.OuterOptimizerMerge]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmaml_pl.errors import ConfigError
from dmaml_pl.studies.plan import text_of
from dmaml_pl.studies.yaml_file import read_settings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_FORMS = "{int: [LOW, HIGH]}, {float: [LOW, HIGH]} (both with log: true, if wanted) or {choice: [A, B, ...]}"
_TAKEN = ("trainer.devices", "trainer.num_nodes", "trainer.logger", "seed_everything", "checkpoint", "ckpt_path")


@dataclass(frozen=True)
class Dimension:
    """What one setting may be: a whole number or a number between two, or one of some texts.

    Attributes:
        kind: "int", "float" or "choice".
        low: least value.
        high: greatest value.
        log: whether values are spread evenly over orders of magnitude.
        choices: as on the command line.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()

    def distribution(self) -> BaseDistribution:
        """In Optuna's words."""
        from optuna import distributions  # noqa: PLC0415 - a second, and only when a sweep begins

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.choices)
        if self.kind == "int":
            return distributions.IntDistribution(int(self.low), int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)

    def extremes(self) -> tuple[float, float]:
        """The least and the greatest value.

        Raises:
            ConfigError: a choice that is no number has none.
        """
        if self.kind != "choice":
            return self.low, self.high
        values = [_number(choice) for choice in self.choices]
        if not all(map(math.isfinite, values)):
            raise ConfigError(f"--space: {', '.join(self.choices)} must be numbers for a sweep with --target.")
        return min(values), max(values)

    def corner(self, number: int) -> Any:
        """An extreme value: by turns the least and the greatest, or each choice."""
        if self.kind == "choice":
            return self.choices[number % len(self.choices)]
        value = (self.low, self.high)[number % 2]
        return int(value) if self.kind == "int" else value


@dataclass(frozen=True)
class Space:
    """What a sweep searches.

    Attributes:
        dimensions: by the name of the setting.
    """

    dimensions: Mapping[str, Dimension]

    @classmethod
    def read(cls, path: Path) -> Space:
        """Read a file.

        Raises:
            ConfigError: names the file, and the setting that is not understood.
        """
        content = read_settings("--space", path, f"lines of the form `NAME: {_FORMS}` are expected")
        return cls({str(name): _dimension(str(name), entry) for name, entry in content.items()})

    def corners(self) -> list[dict[str, Any]]:
        """As few settings of all dimensions as it takes to have every choice and both ends of each range once."""
        count = max(max(len(dimension.choices), 2) for dimension in self.dimensions.values())
        return [{name: dimension.corner(n) for name, dimension in self.dimensions.items()} for n in range(count)]

    @staticmethod
    def settings(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Names and values as on the command line."""
        return tuple((name, text_of(value)) for name, value in values.items())


def _dimension(name: str, entry: Any) -> Dimension:
    if any(name == taken or name.startswith(f"{taken}.") for taken in _TAKEN):
        raise ConfigError(f"--space names {name}, which a sweep sets itself: leave it out.")
    if not isinstance(entry, dict) or len(kinds := {"int", "float", "choice"} & entry.keys()) != 1:
        raise ConfigError(f"--space: {name} is {entry}, but must be {_FORMS}.")
    (kind,) = kinds
    foreign = entry.keys() - kinds - ({"log"} if kind != "choice" else set())
    if foreign:
        raise ConfigError(f"--space: {name} has {', '.join(map(str, foreign))}, but must be {_FORMS}.")
    values, log = entry[kind], entry.get("log", False)
    if kind == "choice":
        return _choice(name, values)
    if not isinstance(log, bool):
        raise ConfigError(f"--space: log of {name} is {log}, but must be true or false.")
    return _range(name, kind, values, log=log)


def _choice(name: str, values: Any) -> Dimension:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"--space: {name} has no choices: {{choice: [A, B, ...]}} is expected.")
    texts = tuple(text_of(value) for value in values)
    if len(set(texts)) < len(texts):
        raise ConfigError(f"--space: {name} names a choice twice: {', '.join(texts)}.")
    return Dimension("choice", choices=texts)


def _range(name: str, kind: str, values: Any, *, log: bool) -> Dimension:
    ends = [_number(value) for value in values] if isinstance(values, list) else []
    if len(ends) != 2 or not all(map(math.isfinite, ends)) or not ends[0] < ends[1]:
        raise ConfigError(f"--space: {name} is {values}, but must be [LOW, HIGH] with LOW below HIGH.")
    if kind == "int" and not all(end.is_integer() for end in ends):
        raise ConfigError(f"--space: {name} is {values}, but must be two whole numbers.")
    if log and ends[0] <= 0:
        raise ConfigError(f"--space: {name} is {values} with log: true, for which LOW must be greater than 0.")
    return Dimension(kind, ends[0], ends[1], log)


def _number(value: Any) -> float:
    """A number; YAML reads one as 1e-4, without a point, as a text."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
