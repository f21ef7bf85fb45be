"""What the page of an MLflow run says at its top: how the training ended, its figures, and how to repeat it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as an MLflow run's description, as Markdown."""

_MARK = "<!-- by dmaml -->"  # not shown; what a person wrote has none, and is left alone
_HEADLINE = re.compile(r"^(?:test|val)/(?!.*(?:_step_\d+|_ci95|_worker_\d+)$)|^train/loss$")
_ENDED = {"FINISHED": "Finished", "FAILED": "Failed", "KILLED": "Stopped from outside", "RUNNING": "Under way"}


class Description:
    """The latest figures of a training, and the text that tells them.

    Args:
        figures: those it had before this process, by the metric's name.
        existing: the description that the MLflow run has already, if any.
        ours: whether there may be a text of ours; False where the user has set one.
    """

    def __init__(
        self, figures: Mapping[str, float] | None = None, existing: str | None = None, *, ours: bool = True
    ) -> None:
        self._figures = dict(figures or {})
        self._ours = ours and (not existing or existing.rstrip().endswith(_MARK))

    def take(self, metrics: Mapping[str, float]) -> None:
        """Note the latest values of metrics."""
        self._figures.update(metrics)

    def text(
        self, outcome: str, error: str, command: str, commit: str, views: Mapping[str, str] | None = None
    ) -> str | None:
        """The description as Markdown; None where a person has written one.

        Args:
            outcome: how the training ended, as MLflow's status.
            error: what it ended with, if it failed.
            command: what started it.
            commit: the git commit it was started from, or "unknown".
            views: where its curves can be seen beside those of other trainings, by what the horizontal axis shows.
        """
        if not self._ours:
            return None
        figures = self._figures
        counts = [
            f"{figures[name]:,.0f} {what}".replace(",", " ")
            for name, what in (("train/run", "runs"), ("train/tasks_seen", "tasks seen"))
            if name in figures
        ]
        lines = [f"**{_ENDED[outcome]}**" + (f" after {' and '.join(counts)}" if counts else "")]
        if error:
            lines += ["", f"`{error[:500]}`"]
        names = sorted(filter(_HEADLINE.match, figures), key=lambda name: ("test", "val", "train").index(_stage(name)))
        if names:
            lines += ["", " · ".join(f"{name} **{self._shown(name)}**" for name in names)]
        links = " or ".join(f"[{name}]({page})" for name, page in (views or {}).items())
        lines += ["", f"Curves beside those of the experiment's other trainings: {links}."] if links else []
        at = "" if commit == "unknown" else f" (at git commit `{commit[:12]}`)"
        lines += ["", f"The same again{at}:", "", "```", wrap(command), "```", ""]
        lines += ["or, from the artifact `config.yaml`:", "", "```", "dmaml fit --config config.yaml", "```", _MARK]
        return "\n".join(lines)

    def _shown(self, name: str) -> str:
        width = self._figures.get(f"{name}_ci95")
        return f"{self._figures[name]:.4g}" + ("" if width is None else f" ± {width:.2g}")


def wrap(command: str, width: int = 78) -> str:
    """Break a shell command into lines that a terminal takes as one; a wide one would widen MLflow's page."""
    lines: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}" if lines else word)
    return " \\\n".join(lines)


def _stage(name: str) -> str:
    return name.partition("/")[0]
