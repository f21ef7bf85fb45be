"""A meta-test as a text to read alone (`report.md`) and as one for machines (`report.json`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dmaml_pl.evaluation.curves import NETWORKS, PLAIN, TRAINED, UNTRAINED, MetaTest

Facts = Mapping[str, Mapping[str, Any]]

TITLES = {TRAINED: "meta-trained", PLAIN: "plainly trained", UNTRAINED: "untrained"}

JSON_VERSION = 1
"""Of the form of report.json; another one where a reader of the present form could not read it."""


_HOW_SURE = (
    "Mean ± half width of the 95 % confidence interval over the tasks, which are the same for each network. It says "
    "how sure the mean over such tasks is, for these weights; another training, with another seed, may lie outside. "
    "0 steps: unadapted. In training {steps} {were} made."
)


class Figure(NamedTuple):
    """A figure of a report: its path from the report, and its caption."""

    file: str
    caption: str


def cell(row: Mapping[str, float], name: str) -> str:
    """A network's mean and half width, as in a table."""
    return f"{row[name]:.4f} ± {row[f'{name}_ci95']:.4f}"


def advantage(result: MetaTest) -> str:
    """How much the meta-trained network is ahead of the plainly trained one, in a sentence."""
    step = result.inner_steps
    mean, width = result.advantage(PLAIN, step)
    if math.isnan(width):
        return ""
    word = "higher" if (mean > 0) == (result.objective.better == "max") else "lower"
    sure = "" if abs(mean) > width else ", which is within chance"
    return (
        f"After {_steps(step)} the {result.objective.title} of the meta-trained network is {word} by {abs(mean):.4f} ± "
        f"{width:.4f} than that of the plainly trained one, on the same tasks{sure}."
    )


def as_markdown(
    result: MetaTest, facts: Facts, figures: Sequence[Figure], about_plain: str | None, no_plain: str | None
) -> str:
    """The report as a page that can be read without anything else.

    Args:
        result: of the meta-test.
        facts: how it was made, by heading and name.
        figures: with paths from the report.
        about_plain: what the plainly trained network is, in words.
        no_plain: why there is none.
    """
    row, title = result.row(result.inner_steps), result.objective.title
    names = [name for name in NETWORKS if name in result.metrics]
    where = facts["data"].get("class", "held-out data")
    lines = [
        f"# Meta-test on {where}",
        "",
        f"**{title.capitalize()} {cell(row, TRAINED)}** after {_steps(result.inner_steps)} of adaptation to each of "
        f"{result.tasks} held-out tasks ({'higher' if result.objective.better == 'max' else 'lower'} is better); "
        + ", ".join(f"{TITLES[name]} {cell(row, name)}" for name in names if name != TRAINED)
        + ".",
        "",
        *([advantage(result), ""] if PLAIN in names else []),
        "| adaptation steps | " + " | ".join(TITLES[name] for name in names) + " |",
        "|---:|" + "---:|" * len(names),
        *(
            f"| {step} | " + " | ".join(cell(result.row(step), name) for name in names) + " |"
            for step in range(result.steps + 1)
        ),
        "",
        _HOW_SURE.format(steps=_steps(result.inner_steps), were="were" if result.inner_steps > 1 else "was"),
        "",
        f"- {TITLES[TRAINED]}: the checkpoint under test.",
        f"- {TITLES[PLAIN]}: " + (f"{about_plain}." if about_plain else f"none, as {no_plain}."),
        f"- {TITLES[UNTRAINED]}: the same network with its initial weights.",
        "",
    ]
    for figure in figures:
        lines += [f"![{figure.caption}]({figure.file})", "", f"*{figure.caption}.*", ""]
    lines += ["## How it was made", "", "| | | |", "|---|---|---|"]
    for heading, values in facts.items():
        if heading != "commands":
            lines += [f"| {heading} | {name} | {_text(value)} |" for name, value in values.items() if value is not None]
    commands = facts["commands"]
    lines += ["", "## To repeat it", ""]
    if commands.get("meta-test"):
        lines += ["The meta-test, from the same folder:", "", "```console", commands["meta-test"], "```", ""]
    lines += ["The command that wrote this report:", "", "```console", commands["given"], "```", ""]
    if facts["mlflow"]:
        lines += ["The MLflow run keeps the whole configuration as `config.yaml`.", ""]
    return "\n".join(lines)


def as_json(
    result: MetaTest, facts: Facts, figures: Sequence[Figure], about_plain: str | None, *, per_task: bool
) -> str:
    """The report for machines.

    Args:
        result: of the meta-test.
        facts: how it was made.
        figures: with paths from the report.
        about_plain: what the plainly trained network is, in words.
        per_task: whether to give the metric of every task, too.
    """
    ahead = result.advantage(PLAIN, result.inner_steps) if PLAIN in result.metrics else None
    content: dict[str, Any] = {
        "version": JSON_VERSION,
        "metric": result.objective.metric,
        "better": result.objective.better,
        "tasks": result.tasks,
        "inner_steps": result.inner_steps,
        "networks": list(result.metrics),
        "plain": about_plain,
        "steps": [result.row(step) for step in range(result.steps + 1)],
        "ahead_of_plain": None if ahead is None else {"mean": ahead[0], "ci95": ahead[1]},
        "figures": [figure.file for figure in figures],
        **facts,
    }
    if per_task:
        content["per_task"] = {name: values.tolist() for name, values in result.metrics.items()}
    return json.dumps(_finite(content), indent=1) + "\n"


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _text(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _finite(value: Any) -> Any:
    """Values that JSON has no words for as null."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
