"""The search space of a sweep, from YAML: settings by their names in the configuration, and what each may be.

trainer.strategy.run_length: {int: [5, 200], log: true}
model.meta_optimizer.init_args.lr: {float: [1.0e-4, 1.0e-2], log: true}
trainer.strategy.merge: {choice: [dmaml_pl.MeanMerge, dmaml_pl.OuterOptimizerMerge]}

Each becomes the distribution of Optuna's of the same name, which knows what its bounds may be.
"""

import math
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from dmaml_pl.errors import ConfigError
from dmaml_pl.studies.settings_files import read_settings, text_of

Space = dict[str, BaseDistribution]
"""What each setting may be, by its name; texts of choices are as on the command line."""

_FORMS = "{int: [LOW, HIGH]}, {float: [LOW, HIGH]} (both with log: true, if wanted) or {choice: [A, B, ...]}"
_TAKEN = ("trainer.devices.", "trainer.num_nodes.", "trainer.logger.", "seed_everything.", "checkpoint.", "ckpt_path.")
_LOG: tuple[dict[str, bool], ...] = ({}, {"log": True}, {"log": False})


def read_space(path: Path) -> Space:
    """Read a file.

    Raises:
        ConfigError: names the file, and the setting that is not understood.
    """
    content = read_settings("--space", path, f"lines of the form `NAME: {_FORMS}` are expected")
    for name in map(str, content):
        if f"{name}.".startswith(_TAKEN):
            raise ConfigError(f"--space names {name}, which a sweep sets itself: leave it out.")
    return {str(name): _distribution(str(name), entry) for name, entry in content.items()}


def _distribution(name: str, entry: Any) -> BaseDistribution:
    wrong = f"--space: {name} is {entry}, but must be {_FORMS}"
    try:
        match entry:
            case {"int": [low, high], **further} if further in _LOG:
                if not (_number(low).is_integer() and _number(high).is_integer()):
                    raise ConfigError(f"{wrong}: with int both must be whole numbers.")
                return IntDistribution(int(_number(low)), int(_number(high)), log=bool(further.get("log")))
            case {"float": [low, high], **further} if further in _LOG:
                return FloatDistribution(_number(low), _number(high), log=bool(further.get("log")))
            case {"choice": [_, *_] as choices, **further} if not further:
                return CategoricalDistribution(tuple(dict.fromkeys(map(text_of, choices))))
    except ValueError as error:
        raise ConfigError(f"{wrong}: {error}") from error
    raise ConfigError(f"{wrong}.")


def _number(value: Any) -> float:
    """A finite number, else a ValueError; YAML reads one as 1e-4, without a point, as a text."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is no number.")
    return number


def corners(space: Space) -> list[dict[str, Any]]:
    """As few settings of the whole space as it takes to have every choice and both ends of each range once."""
    ends = {name: _ends(distribution) for name, distribution in space.items()}
    return [
        {name: values[number % len(values)] for name, values in ends.items()}
        for number in range(max(map(len, ends.values())))
    ]


def extremes(name: str, distribution: BaseDistribution) -> tuple[float, float]:
    """The least and the greatest value of a setting.

    Raises:
        ConfigError: a choice that is no number has none.
    """
    values = _ends(distribution)
    try:
        numbers = [_number(value) for value in values]
    except ValueError as error:
        raise ConfigError(
            f"--space: {name} is {', '.join(values)}, but must be numbers for a sweep with --target."
        ) from error
    return min(numbers), max(numbers)


def _ends(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)  # noqa: S101 - there are no others here
    return [distribution.low, distribution.high]
