"""From a file to a learner: checkpoints of trainings, and learners that were adapted and kept.

A file is read with `weights_only=True`: it holds tensors and plain values, and no code of it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_modules import TaskDataModule
from dmaml_pl.adapting.learner import ADAPTED_KEY, AdaptedLearner, FewShotLearner
from dmaml_pl.adapting.recipe import build, of_today
from dmaml_pl.checkpoints import CONFIG_KEY, check_fits
from dmaml_pl.checkpoints.lookup import read_plain
from dmaml_pl.errors import CheckpointError, DmamlError
from dmaml_pl.modules import MetaLearning
from dmaml_pl.tasks import Scaling


def load(path: str | Path, module: MetaLearning | None = None, trust: Sequence[str] = ()) -> FewShotLearner:
    """The learner of a training, ready to be adapted to a user's own samples.

    Args:
        path: a checkpoint, such as `best.ckpt`, or what `FewShotLearner.save` wrote.
        module: a module like the trained one, which gets the weights. Needed for trainings made in Python; those made
            by `dmaml fit` keep their configuration in the checkpoint, from which the module is built.
        trust: packages or modules outside of dmaml_pl and PyTorch whose classes that configuration may name, such as
            that of a user's own network.

    Raises:
        CheckpointError: there is no such file, it is damaged, or is not such a file; what to do, in one line.
    """
    checkpoint = _read(Path(path))
    if ADAPTED_KEY in checkpoint:
        raise CheckpointError(
            f"{path} is adapted already: dmaml_pl.load_adapted loads it, and dmaml adapt takes it without --support."
        )
    module, config, data = _assemble(Path(path), checkpoint, module, trust)
    check_fits(checkpoint, module, Path(path), option="")
    module.load_state_dict(checkpoint["state_dict"])
    module.shapes = checkpoint.get("shapes") or module.shapes
    module.scaling = _scaling(checkpoint) or module.scaling
    return FewShotLearner(module, config, data)


def load_adapted(path: str | Path, module: MetaLearning | None = None, trust: Sequence[str] = ()) -> AdaptedLearner:
    """A learner that was adapted before, from what `AdaptedLearner.save` wrote.

    Args:
        path: the file.
        module: as for `load`.
        trust: as for `load`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or is not such a file; what to do, in one line.
    """
    kept = _read(Path(path))
    if ADAPTED_KEY not in kept:
        raise CheckpointError(
            f"{path} is the checkpoint of a training, and not adapted to anything yet: adapt it first, with "
            "dmaml_pl.load(...).adapt(x, y), or dmaml adapt --support."
        )
    module, config, data = _assemble(Path(path), kept, module, trust)
    check_fits(kept, module.network, Path(path), option="")
    module.network.load_state_dict(kept["state_dict"])
    adapted = kept[ADAPTED_KEY]
    return AdaptedLearner(
        module.network,
        module.objective,
        classes=tuple(adapted["classes"]),
        steps=adapted["steps"],
        support=adapted["support"],
        shapes=kept["shapes"],
        scaling=_scaling(kept),
        config=config,
        data=data,
    )


def is_adapted(path: str | Path) -> bool:
    """Whether a file holds an adapted learner.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    return ADAPTED_KEY in _read(Path(path))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not there: give the checkpoint of a training, such as best.ckpt.")
    content = read_plain(
        path,
        f"{path} is truncated, damaged, or no checkpoint at all; code in a file is never run: give the checkpoint of "
        "a training, such as best.ckpt.",
    )
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} holds no weights: give the checkpoint of a training, such as best.ckpt.")
    return content


def _scaling(content: dict[str, Any]) -> Scaling | None:
    kept = content.get("scaling")
    return None if kept is None else Scaling(**kept)


def _assemble(
    path: Path, content: dict[str, Any], module: MetaLearning | None, trust: Sequence[str]
) -> tuple[MetaLearning, dict[str, Any] | None, TaskDataModule | None]:
    """The module to take the weights, the configuration if there is one, and the data module that it names."""
    config = content.get(CONFIG_KEY)
    if module is not None:
        return module, None, None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} does not say what network it is of, as the training was not made by dmaml fit, or by an older "
            "version: in Python, dmaml_pl.load(FILE, module=...) takes a module like the trained one."
        )
    try:
        module = build(of_today(config.get("model")), MetaLearning, trust)
        return module, config, build(config.get("data"), TaskDataModule, trust)  # type: ignore[type-abstract]
    except DmamlError as error:
        raise CheckpointError(f"{path} cannot be used: {str(error).rstrip('.')}.") from error
