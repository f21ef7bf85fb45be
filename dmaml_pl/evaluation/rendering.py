"""A meta-test for its readers: on the terminal, as a page to read alone (`report.md`), and for machines."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from dmaml_pl.console.tables import markdown, print_table
from dmaml_pl.evaluation.curves import BASELINE, TITLES, MetaTest

Facts = Mapping[str, Mapping[str, Any]]

JSON_VERSION = 2
"""Of the form of report.json; another one where a reader of the present form could not read it."""

FEW_STEPS = 4
"""Up to so many adaptation steps all are shown."""


def print_result(result: MetaTest) -> None:
    """Print the metric after some adaptation steps, with 95 % confidence intervals over the tasks."""
    where = "of" if result.objective.acts else "on the query sets of"
    title = f"{result.objective.title.capitalize()} {where} {result.tasks} held-out tasks"
    # As in the MAML paper, and the training's, and the last.
    steps = sorted({step for step in (0, 1, 5, 10, result.inner_steps, result.steps) if step <= result.steps})
    if result.steps <= FEW_STEPS:
        steps = list(range(result.steps + 1))
    print_table(rows_of(result, steps), title)
    unadapted = "; 0 steps: unadapted" if result.steps else ""
    print(f"mean ± half width of the 95 % confidence interval over the tasks{unadapted}")
    if BASELINE in result.metrics:
        print(f"baseline: {result.about_baseline}.\n{_advantage(result)}")
    else:
        print(f"No baseline to compare with: {result.about_baseline}.")


def as_markdown(result: MetaTest, facts: Facts, plots: Mapping[str, str]) -> str:
    """The report as a page that can be read without anything else: how it was made, and plots with captions."""
    template: Template = Template(
        Path(__file__).with_name("report.md.j2").read_text(encoding="utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made = [
        {"part": part, "setting": name, "value": str(value)}
        for part, values in facts.items()
        for name, value in values.items()
        if part != "commands" and value is not None
    ]
    return template.render(
        result=result,
        titles=TITLES,
        scores={name: _cell(result, name, result.inner_steps) for name in result.metrics},
        steps=_steps(result.inner_steps),
        curves=markdown(rows_of(result, range(result.steps + 1))),
        advantage=_advantage(result),
        plots=plots,
        facts=facts,
        made=markdown(made),
    )


def as_json(result: MetaTest, facts: Facts, plots: Mapping[str, str], *, per_task: bool = False) -> str:
    """The report for machines, if asked for with the metric of every single task."""
    ahead = result.advantage
    content: dict[str, Any] = {
        "version": JSON_VERSION,
        "metric": result.objective.metric,
        "better": result.objective.better,
        "tasks": result.tasks,
        "inner_steps": result.inner_steps,
        "networks": list(result.metrics),
        "baseline": None if ahead is None else result.about_baseline,
        "steps": [result.row(step) for step in range(result.steps + 1)],
        "ahead_of_baseline": None if ahead is None else {"mean": ahead[0], "ci95": ahead[1]},
        "figures": list(plots),
        **facts,
    }
    if per_task:
        content["per_task"] = {name: values.tolist() for name, values in result.metrics.items()}
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)  # JSON has no words for what is not
    return json.dumps(finite, indent=1) + "\n"


def rows_of(result: MetaTest, steps: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each of some numbers of adaptation steps, as people read it."""
    return [
        {"adaptation steps": step, **{TITLES[name]: _cell(result, name, step) for name in result.metrics}}
        for step in steps
    ]


def _cell(result: MetaTest, network: str, step: int) -> str:
    row = result.row(step)
    digits = _digits(result)
    return f"{row[network]:.{digits}f} ± {row[f'{network}_ci95']:.{digits}f}"


def _digits(result: MetaTest) -> int:
    """Decimals of the metric; returns are large, and vary by more."""
    return 2 if result.objective.acts else 4


def _advantage(result: MetaTest) -> str:
    """How much the meta-trained network is ahead of the baseline, in a sentence; empty where nothing can be said."""
    if result.advantage is None or math.isnan(result.advantage[1]):
        return ""
    mean, width = result.advantage
    word = "higher" if (mean > 0) == (result.objective.better == "max") else "lower"
    sure, digits = "" if abs(mean) > width else ", which is within chance", _digits(result)
    return (
        f"After {_steps(result.inner_steps)} the {result.objective.title} of the meta-trained network is {word} by "
        f"{abs(mean):.{digits}f} ± {width:.{digits}f} than that of the baseline, on the same tasks{sure}."
    )


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"
