"""What `dmaml adapt` does: reads a user's samples, adapts to them, and predicts others."""

from __future__ import annotations

from pathlib import Path

from dmaml_pl.adapting.answers import Answers
from dmaml_pl.adapting.columns import read_columns
from dmaml_pl.adapting.folders import find_query, find_support
from dmaml_pl.adapting.learner import AdaptedLearner, FewShotLearner, check_ways
from dmaml_pl.adapting.loading import is_adapted, load, load_adapted
from dmaml_pl.adapting.onnx import check_can_export
from dmaml_pl.adapting.request import Request
from dmaml_pl.errors import CheckpointError, ConfigError, DataError
from dmaml_pl.tasks import NamedColumns, SampleReader


def adapt_and_predict(request: Request) -> None:
    """Make what was asked for.

    Raises:
        DmamlError: what is wrong, in one line.
    """
    if request.onnx is not None:
        check_can_export()
    learner = _adapted_before(request) if is_adapted(request.ckpt) else load(request.ckpt, trust=request.trust)
    if not learner.shapes:
        raise CheckpointError(f"--ckpt {request.ckpt} does not say what samples its network takes: use it in Python.")
    of_kind = _of_pictures if learner.objective.name == "classification" else _of_columns
    adapted, answers = of_kind(learner, request)
    about = {"checkpoint": str(request.ckpt), "steps": adapted.steps, "support_samples": adapted.support}
    answers.write(request.output, about)
    answers.print(
        f"{len(answers.rows)} samples, after {adapted.steps} adaptation step{'s' if adapted.steps > 1 else ''} on "
        f"{adapted.support} support samples"
    )
    print(f"\nPredictions: {request.output}")
    if request.save is not None:
        adapted.save(request.save)
        print(f"Adapted network: {request.save}")
    if request.onnx is not None:
        adapted.to_onnx(request.onnx)
        print(f"ONNX: {request.onnx}")


def _adapted_before(request: Request) -> AdaptedLearner:
    given = [name for name in ("support", "steps", "save") if getattr(request, name) is not None]
    if given:
        raise ConfigError(f"--ckpt {request.ckpt} is adapted already: leave out --{given[0]}, or give a training's.")
    return load_adapted(request.ckpt, trust=request.trust)


def _of_pictures(learner: FewShotLearner | AdaptedLearner, request: Request) -> tuple[AdaptedLearner, Answers]:
    reader = learner.data
    if not isinstance(reader, SampleReader):
        raise ConfigError(
            f"{type(reader).__name__}, which the network was trained on, cannot read pictures: give it a method "
            "read_sample, or adapt in Python, dmaml_pl.load(FILE).adapt(x, y)."
        )
    if isinstance(learner, AdaptedLearner):
        query = find_query(request.query, [str(name) for name in learner.classes])
        x = query.read(reader)
    else:
        support = find_support(_support_of(request))
        classes = sorted(set(support.classes or ()))
        check_ways(classes, learner.shapes["output"][0])
        query = find_query(request.query, classes)  # before pictures are read, which takes long
        x = query.read(reader)
        learner = learner.adapt(support.read(reader), support.classes or [], request.steps)
    return learner, Answers.of_classes(query, learner.predict(x), [str(name) for name in learner.classes])


def _of_columns(learner: FewShotLearner | AdaptedLearner, request: Request) -> tuple[AdaptedLearner, Answers]:
    sample, output = learner.shapes["sample"], learner.shapes["output"]
    if len(sample) != 1 or len(output) != 1:
        raise ConfigError(
            f"The network takes samples of shape {tuple(sample)}, which no CSV file holds: adapt in Python, "
            "dmaml_pl.load(FILE).adapt(x, y)."
        )
    names = (learner.data.inputs, learner.data.targets) if isinstance(learner.data, NamedColumns) else None
    query = read_columns("--query", request.query, *sample, *output, needs_targets=False, names=names)
    if isinstance(learner, AdaptedLearner):
        targets = query.targets or ["target" if output == [1] else f"target {number}" for number in range(output[0])]
    else:
        support = read_columns("--support", _support_of(request), *sample, *output, needs_targets=True, names=names)
        targets, given, expected = support.targets, query.inputs + query.targets, support.inputs + support.targets
        if given != expected[: len(given)]:
            raise DataError(
                f"--query {request.query} has the columns {', '.join(given)}, but --support {', '.join(expected)}."
            )
        learner = learner.adapt(support.x, support.y if support.y is not None else [], request.steps)
    return learner, Answers.of_values(query, learner.predict(query.x), targets)


def _support_of(request: Request) -> Path:
    if request.support is None:
        raise ConfigError(f"Not set: --support, the samples to adapt {request.ckpt} to. dmaml adapt --help says more.")
    return request.support
