"""What a study trains: points, each of them with some seeds; and the command line of each training."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from dmaml_pl.cli.configs import find
from dmaml_pl.studies.settings_files import Settings

DEFAULTS = {
    "meta_test": "false",
    "trainer.enable_checkpointing": "false",
    "trainer.enable_progress_bar": "false",
    "trainer.val_check_interval": "1",
    "trainer.logger.system_metrics": "false",
    "model.evaluation_steps": "1",
}
"""Settings of all trainings of a study, which the user's own on the command line overrule: only the validation metric
after each run counts, and what is not needed for it would take time from it."""

DEFAULTS_OF_TABLE = {
    "report.baseline_budget": "0",
    "trainer.logger.system_metrics": "false",
}
"""The same for a table, whose trainings end as those of `dmaml fit`: the best checkpoint is meta-tested."""


@dataclass(frozen=True)
class Request:
    """What the user asks of every training of a study.

    Attributes:
        kind: which study, such as "workers".
        name: of the study; the same name goes on with it.
        configs: the configuration files.
        words: further words of the command line, passed on to `dmaml fit`.
        seeds: number of trainings that differ in the seed only.
        jobs: trainings at the same time; 0 for all that are known.
        launcher: where they run; one of `cluster.LAUNCHERS`.
        resources: what each is to have there, in the words of SLURM or Ray.
    """

    kind: str
    name: str
    configs: tuple[str, ...]
    words: tuple[str, ...]
    seeds: int
    jobs: int
    launcher: str = "local"
    resources: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> Mapping[str, str]:
        """Settings of all trainings that the user's own words overrule."""
        return DEFAULTS_OF_TABLE if self.kind == "table" else DEFAULTS

    def command(self, last: Settings, *, defaults: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """The words after `dmaml`: configurations, our defaults, the user's words, and what may not be overruled."""
        files = [word for config in self.configs for word in ("--config", config)]
        first = self.defaults if defaults is None else defaults
        ours, theirs = ([f"--{name}={value}" for name, value in some] for some in (first.items(), last))
        return ("fit", *files, *ours, *self.words, *theirs)

    def digest(self, *further: Any) -> str:
        """A short text that is another one for all else that is asked: made of files, words, and further plain data.

        What the files say counts, not how: their comments may change.
        """
        files = [yaml.safe_load(find(config).read_text(encoding="utf-8")) for config in self.configs]
        made_of = [files, [*self.defaults.items()], self.words, *further]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Point:
    """What distinguishes some trainings from the others of the study, seeds apart.

    Attributes:
        label: for people; no two points of a study share one.
        workers: W.
        settings: names and values as on the command line.
    """

    label: str
    workers: int
    settings: Settings = ()

    @property
    def overrides(self) -> Settings:
        """All settings of the point, the number of workers among them."""
        return (("trainer.devices", str(self.workers)), ("trainer.num_nodes", "1"), *self.settings)


@dataclass(frozen=True)
class Training:
    """One training of a study."""

    point: Point
    seed: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.point.label}, seed {self.seed}"

    @property
    def overrides(self) -> Settings:
        """All settings that make it this training."""
        return (*self.point.overrides, ("seed_everything", str(self.seed)))


def label_of(workers: int) -> str:
    """A number of workers, for people."""
    return f"{workers} worker{'s' if workers > 1 else ''}"
