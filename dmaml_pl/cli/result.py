"""What came of a training that was made from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dmaml_pl.adapting.learner import FewShotLearner
from dmaml_pl.console.tables import markdown
from dmaml_pl.evaluation.curves import MetaTest
from dmaml_pl.evaluation.rendering import rows_of
from dmaml_pl.evaluation.report import MetaTestReport
from dmaml_pl.modules import MetaLearning


@dataclass(frozen=True)
class TrainingResult:
    """A finished training; in a notebook it shows the table of its meta-test.

    Attributes:
        module: with the weights of the best checkpoint, if there was a meta-test, else the last.
        metrics: of the last validation (`val/...`) and the meta-test (`test/...`), by the names that loggers have, too.
        meta_test: what the meta-test found, task by task; None without one.
        best: the checkpoint that was best at a validation; None where none was kept.
        last: the last checkpoint; None where none was kept.
        report: `report.md`; None without a meta-test.
        figures: the pictures that it shows.
        trainer: Lightning's, which may be asked for more: `training.trainer.validate(training.module, data)`.

    Examples:
        >>> module, data = MetaLearning(MLP()), Sinusoid(val_tasks=2)
        >>> training = fit(module, data, max_steps=2, logger=False, meta_test=False)
        >>> training.learner.adapt(torch.rand(10, 1), torch.rand(10, 1)).predict(torch.rand(3, 1)).shape
        torch.Size([3, 1])
    """

    module: MetaLearning = field(repr=False)
    metrics: dict[str, float]
    meta_test: MetaTest | None = field(repr=False)
    best: Path | None
    last: Path | None
    report: Path | None
    figures: tuple[Path, ...]
    trainer: pl.Trainer = field(repr=False)

    @classmethod
    def of(cls, trainer: Any, module: MetaLearning, metrics: Mapping[str, Any]) -> TrainingResult:
        """What a Trainer has found and written."""
        kept = trainer.checkpoint_callback
        written = [file for each in trainer.callbacks if isinstance(each, MetaTestReport) for file in each.files]
        named = {name: getattr(kept, f"{name}_model_path", "") for name in ("best", "last")}
        return cls(
            module=module,
            metrics={
                name: float(value) for name, value in metrics.items() if name.startswith(("train/", "val/", "test/"))
            },
            meta_test=module.meta_test,
            report=next((file for file in written if file.suffix == ".md"), None),
            figures=tuple(file for file in written if file.suffix in (".png", ".gif")),
            trainer=trainer,
            **{name: Path(path) if path else None for name, path in named.items()},
        )

    @property
    def learner(self) -> FewShotLearner:
        """The trained network, to be adapted: `training.learner.adapt(x, y).predict(query_x)`."""
        return FewShotLearner(self.module, data=getattr(self.trainer, "datamodule", None))

    @property
    def table(self) -> list[dict[str, float]]:
        """The meta-test's mean and `_ci95` after each adaptation step, of each network; for `pandas.DataFrame`."""
        return [] if self.meta_test is None else [self.meta_test.row(step) for step in range(self.meta_test.steps + 1)]

    def _repr_markdown_(self) -> str | None:
        """How a notebook shows it."""
        return None if self.meta_test is None else markdown(rows_of(self.meta_test, range(self.meta_test.steps + 1)))
