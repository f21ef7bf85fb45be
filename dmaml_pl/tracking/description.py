"""What the page of an MLflow run says at its top: how the training ended, its figures, and how to repeat it."""

import re
import shlex
from collections.abc import Mapping, Sequence

from dmaml_pl.tracking.views import ENV_STEPS, VIEWS, view_page

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as an MLflow run's description, as Markdown."""

_MARK = "<!-- by dmaml -->"  # not shown; what a person wrote has none, and is left alone
_HEADLINE = re.compile(r"^(?:test|val)/(?!.*(?:_step_\d+|_ci95|_worker_\d+)$)|^train/loss$")
COUNTS = {"train/run": "runs", "train/tasks_seen": "tasks seen", ENV_STEPS: "steps in environments"}
"""What is counted in a training, in words."""

_ENDED = {"FINISHED": "Finished", "FAILED": "Failed", "KILLED": "Stopped from outside", "RUNNING": "Under way"}


def may_describe(note: str | None) -> bool:
    """Whether there is no description yet, or one that was made here."""
    return not note or note.rstrip().endswith(_MARK)


def describe_training(
    figures: Mapping[str, float],
    outcome: str,
    error: str,
    command: str,
    commit: str,
    experiment_id: str,
    changed: Mapping[str, str] | None = None,
) -> str:
    """The description as Markdown: the last values of metrics by name, MLflow's status, what started the training.

    An `error` may be empty, a `commit` "unknown"; `changed` are the settings of a resumed
    training. The experiment's views show curves beside those of others.
    """
    counts = [f"{figures[name]:,.0f} {what}".replace(",", " ") for name, what in COUNTS.items() if name in figures]
    lines = [f"**{_ENDED[outcome]}**" + (f" after {_listed(counts)}" if counts else "")]
    if error:
        lines += ["", f"`{error[:500]}`"]
    shown = []
    stages = ("test", "val", "train")
    for name in sorted(filter(_HEADLINE.match, figures), key=lambda name: stages.index(name.partition("/")[0])):
        width = figures.get(f"{name}_ci95")
        shown.append(f"{name} **{figures[name]:.4g}" + ("**" if width is None else f" ± {width:.2g}**"))
    if shown:
        lines += ["", " · ".join(shown)]
    if changed:
        now = ", ".join(f"`{name}` is {value}" for name, value in sorted(changed.items()))
        lines += ["", f"Resumed with other settings than the parameters, which are the first: {now}."]
    views = [key for key, metric in VIEWS.items() if metric != ENV_STEPS or metric in figures]
    links = " or ".join(f"[{key.replace('-', ' ')}]({view_page(experiment_id, key)})" for key in views)
    lines += ["", f"Curves beside those of the experiment's other trainings: {links}."]
    at = "" if commit == "unknown" else f" (at git commit `{commit[:12]}`)"
    lines += ["", f"The same again{at}:", "", "```", wrap(command), "```", ""]
    lines += ["or, from the artifact `config.yaml`:", "", "```", "dmaml fit --config config.yaml", "```", _MARK]
    return "\n".join(lines)


def _listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def wrap(command: str, width: int = 78) -> str:
    """Break a shell command into lines that a terminal takes as one; a wide one would widen MLflow's page."""
    lines: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}" if lines else word)
    return " \\\n".join(lines)
