"""Settings of a number of workers' own, from YAML: so that each is compared at its best.

1: {model.meta_optimizer.init_args.lr: 0.0008}
4: {model.meta_optimizer.init_args.lr: 0.002}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dmaml_pl.errors import ConfigError
from dmaml_pl.studies.plan import text_of
from dmaml_pl.studies.yaml_file import read_settings

Settings = tuple[tuple[str, str], ...]


def read(path: Path | None, workers: Sequence[int]) -> Mapping[int, Settings]:
    """The settings of each number of workers, as on the command line; none without a file.

    Raises:
        ConfigError: names the file, and what in it is not understood.
    """
    if path is None:
        return {}
    form = "lines of the form `W: {NAME: VALUE, ...}` are expected, with W one of --workers"
    content = read_settings("--own", path, form)
    for count, settings in content.items():
        if count not in workers or not isinstance(settings, dict):
            raise ConfigError(f"--own {path} has {count}: {settings}, but {form}.")
        if "trainer.devices" in settings:
            raise ConfigError(f"--own {path} sets trainer.devices of {count} workers: leave it out.")
    return {
        count: tuple((str(name), text_of(value)) for name, value in settings.items())
        for count, settings in content.items()
    }
