"""What is wrong with a training, found out without making it. Needs PyTorch, so it is done in a process of its own."""

import threading
from functools import partial
from pathlib import Path

from dmaml_pl.cli.run import run
from dmaml_pl.cli.training import DmamlCLI
from dmaml_pl.errors import ConfigError


class _Check(DmamlCLI):
    """The command line up to the point where the training would begin; nothing is tracked."""

    def __init__(self, prepared: threading.Event, path: Path) -> None:
        self._path = path
        super().__init__(prepared)

    def _run_subcommand(self, subcommand: str) -> None:
        self._begin_session().check(subcommand, self._get(self.config_init, "ckpt_path"))
        if not (self.trainer.limit_val_batches or self._get(self.config_init, "meta_test")):
            raise ConfigError(
                "trainer.limit_val_batches is 0, but must be more: a study compares trainings by their validations."
            )
        config = self.config[subcommand]
        self._path.write_text(self._parser(subcommand).dump(config, skip_unset=False), encoding="utf-8")


def check(words: list[str], path: Path) -> int:
    """Make all checks of a `dmaml fit`; returns the exit code. The resolved configuration goes to `path`, as YAML."""
    return run(words, partial(_Check, path=path))
