"""What `dmaml adapt` does: reads a user's samples, adapts to them, and predicts others; or has a policy act."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dmaml_pl.adapting.adapted import AdaptedLearner
from dmaml_pl.adapting.answers import Answers
from dmaml_pl.adapting.columns import dialect_of, read_classes, read_columns
from dmaml_pl.adapting.folders import find_pictures
from dmaml_pl.adapting.learner import FewShotLearner
from dmaml_pl.adapting.loading import load_either
from dmaml_pl.adapting.onnx import check_can_export
from dmaml_pl.console.meter import counted
from dmaml_pl.console.tables import print_table
from dmaml_pl.errors import CheckpointError, ConfigError, DataError
from dmaml_pl.tasks import NamedColumns, SampleReader


def adapt_and_predict(
    *,
    ckpt: Path,
    support: Path | None,
    query: Path | None,
    task: dict[str, Any] | None,
    steps: int | None,
    output: Path | None,
    save: Path | None,
    onnx: Path | None,
    trust: list[str],
) -> None:
    """Make what was asked for; the arguments are the options of `dmaml adapt`, see its help.

    Raises:
        DmamlError: what is wrong, in one line.
    """
    if onnx is not None:
        check_can_export()
    learner = load_either(ckpt, trust=trust)
    _check_kind(ckpt, learner, task)
    if isinstance(learner, AdaptedLearner):
        for option, value in (("--support", support), ("--task", task), ("--steps", steps), ("--save", save)):
            if value is not None:
                raise ConfigError(f"--ckpt {ckpt} is adapted already: leave out {option}, or give a training's.")
    elif task is not None:
        _adapt_policy(learner, task, steps, save)
        return
    elif support is None:
        raise ConfigError(f"Not set: --support, the samples to adapt {ckpt} to. dmaml adapt --help says more.")
    if not learner.shapes:
        raise CheckpointError(f"--ckpt {ckpt} does not say what samples its network takes: use it in Python.")
    assert query is not None, "only a task needs none"  # noqa: S101
    output = Path("predictions.csv") if output is None else output
    adapted, answers = _ask(learner, support or Path(), query, steps)  # of an adapted one the support is not read
    answers.write(output, {"checkpoint": str(ckpt), "steps": adapted.steps, "support_samples": adapted.support})
    answers.print(
        f"{counted(len(answers.table), 'sample')}, after {counted(adapted.steps, 'adaptation step')} on "
        f"{counted(adapted.support, 'support sample')}"
    )
    print(f"\nPredictions: {output}")
    if save is not None:
        adapted.save(save)
        print(f"Adapted network: {save}")
    if onnx is not None:
        adapted.to_onnx(onnx)
        print(f"ONNX: {onnx}")


def _check_kind(ckpt: Path, learner: FewShotLearner | AdaptedLearner, task: dict[str, Any] | None) -> None:
    """Check that policies are given tasks, and other networks samples.

    Raises:
        ConfigError: what is to be given instead.
    """
    if not learner.objective.acts:
        if task is not None:
            raise ConfigError(f"--ckpt {ckpt} was trained on samples: in place of --task give --support and --query.")
    elif isinstance(learner, AdaptedLearner):
        raise ConfigError(
            f"--ckpt {ckpt} is a policy that is adapted already: use it in Python, "
            "dmaml_pl.load_adapted(FILE).act(observations)."
        )
    elif task is None:
        raise ConfigError(
            f"--ckpt {ckpt} was trained in environments: in place of --support and --query give --task, such as "
            """--task '{"goal": [0.3, -0.2]}'."""
        )


def _adapt_policy(learner: FewShotLearner, task: dict[str, Any], steps: int | None, save: Path | None) -> None:
    """Adapt to a task by rollouts, and tell the returns."""
    adapted = learner.adapt_to(task, steps)
    rows: list[dict[str, Any]] = []
    for step, (mean, width) in enumerate(zip(adapted.returns, adapted.ci95, strict=True)):
        row = {"adaptation steps": step, "return": f"{mean:.2f} ± {width:.2f}"}
        rows.append(row if adapted.best is None else row | {"knows the task": f"{adapted.best:.2f}"})
    print_table(rows, f"Return in {json.dumps(task)}")
    print(f"mean ± half width of the 95 % confidence interval over {adapted.support} rollouts; 0 steps: unadapted")
    if save is not None:
        adapted.save(save)
        print(f"Adapted policy: {save}")


def _ask(
    learner: FewShotLearner | AdaptedLearner, support: Path, query: Path, steps: int | None
) -> tuple[AdaptedLearner, Answers]:
    if learner.objective.name != "classification":
        return _of_columns(learner, support, query, steps)
    of_classes = _of_rows if isinstance(learner.data, NamedColumns) else _of_pictures
    return of_classes(learner, support, query, steps)


def _of_pictures(
    learner: FewShotLearner | AdaptedLearner, support: Path, query: Path, steps: int | None
) -> tuple[AdaptedLearner, Answers]:
    reader = learner.data
    if not isinstance(reader, SampleReader):
        raise ConfigError(
            f"{type(reader).__name__}, which the network was trained on, cannot read pictures: give it a method "
            "read_sample, or adapt in Python, dmaml_pl.load(FILE).adapt(x, y)."
        )
    if isinstance(learner, AdaptedLearner):
        asked = find_pictures("--query", query, [str(name) for name in learner.classes])
    else:
        given = find_pictures("--support", support)
        if given.classes is None:
            raise DataError(
                f"--support is {support}, which is not a folder of classes: one folder a class, with one or more "
                "pictures in each, is expected in it."
            )
        asked = find_pictures("--query", query, sorted(set(given.classes)))  # before reading them, which takes long
        learner = learner.adapt(given.read(reader), given.classes, steps)
    names = [str(name) for name in learner.classes]
    return learner, Answers.of_classes(
        pd.DataFrame({"file": asked.names}), asked.classes, learner.predict(asked.read(reader)), names
    )


def _of_rows(
    learner: FewShotLearner | AdaptedLearner, support: Path, query: Path, steps: int | None
) -> tuple[AdaptedLearner, Answers]:
    """Of a table with a column of classes."""
    inputs, (classes,) = learner.data.inputs, learner.data.targets
    asked, true = read_classes("--query", query, inputs, classes, dialect_of(learner.data))
    if not isinstance(learner, AdaptedLearner):
        given, names = read_classes("--support", support, inputs, classes, dialect_of(learner.data))
        if names is None:
            raise DataError(f"--support {support} has no column {classes}, which must hold the class of each row.")
        learner = learner.adapt(torch.tensor(given.to_numpy()), names, steps)
    said = learner.predict(torch.tensor(asked.to_numpy()))
    return learner, Answers.of_classes(asked, true, said, [str(name) for name in learner.classes])


def _of_columns(
    learner: FewShotLearner | AdaptedLearner, support: Path, query: Path, steps: int | None
) -> tuple[AdaptedLearner, Answers]:
    shapes = learner.shapes["sample"], learner.shapes["output"]
    if any(len(shape) != 1 for shape in shapes):
        raise ConfigError(
            f"The network takes samples of shape {tuple(shapes[0])}, which no CSV file holds: adapt in Python, "
            "dmaml_pl.load(FILE).adapt(x, y)."
        )
    (inputs,), (outputs,) = shapes
    names = (learner.data.inputs, learner.data.targets) if isinstance(learner.data, NamedColumns) else None
    dialect = dialect_of(learner.data)
    asked = read_columns("--query", query, inputs, outputs, names, dialect)
    if isinstance(learner, AdaptedLearner):
        targets = ["target" if outputs == 1 else f"target {number}" for number in range(outputs)]
        targets = list(asked.columns[inputs:]) or targets
    else:
        given = read_columns("--support", support, inputs, outputs, names, dialect, needs_targets=True)
        targets, header = list(given.columns[inputs:]), list(asked.columns)
        if header != list(given.columns[: len(header)]):
            raise DataError(
                f"--query {query} has the columns {', '.join(header)}, but --support {', '.join(given.columns)}."
            )
        x, y = torch.tensor(given.to_numpy()).split([inputs, outputs], dim=1)
        learner = learner.adapt(x, y, steps)
    values = learner.predict(torch.tensor(asked.to_numpy())[:, :inputs])
    return learner, Answers.of_values(asked, values, targets)
