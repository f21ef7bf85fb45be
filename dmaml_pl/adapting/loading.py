"""From a file to a learner: checkpoints of trainings, and learners that were adapted and kept.

A file is read with `weights_only=True`: it holds tensors and plain values, and no code of it is run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from data_modules import TaskDataModule
from dmaml_pl.adapting.adapted import ADAPTED_KEY, AdaptedLearner, give_shapes
from dmaml_pl.adapting.exported import WEIGHTS, read_weights
from dmaml_pl.adapting.learner import FewShotLearner
from dmaml_pl.adapting.policy import AdaptedPolicy
from dmaml_pl.adapting.recipe import build, of_today
from dmaml_pl.checkpoints import CONFIG_KEY, check_fits
from dmaml_pl.checkpoints.lookup import read_plain
from dmaml_pl.checks import or_last
from dmaml_pl.errors import CheckpointError, reason_of
from dmaml_pl.modules import MetaLearning
from dmaml_pl.tasks import Scaling


def load(path: str | Path, module: MetaLearning | None = None, trust: Sequence[str] = ()) -> FewShotLearner:
    """The learner of a training, ready to be adapted to a user's own samples.

    Args:
        path: a checkpoint, such as `best.ckpt`, what `FewShotLearner.save` wrote, or the folder of `dmaml export`.
        module: a module like the trained one, which gets the weights. Needed for trainings made in Python; those made
            by `dmaml fit` keep their configuration in the checkpoint, from which the module is built.
        trust: packages or modules outside of dmaml_pl and PyTorch whose classes that configuration may name, such as
            that of a user's own network.

    Raises:
        CheckpointError: there is no such file, it is damaged, or is not such a file; what to do, in one line.

    Examples:
        >>> module, data = MetaLearning(MLP()), Sinusoid(val_tasks=2)
        >>> training = fit(module, data, max_steps=2, logger=False, meta_test=False)
        >>> learner = load(training.last, MetaLearning(MLP()))
        >>> learner.adapt(torch.rand(10, 1), torch.rand(10, 1)).predict(torch.rand(3, 1)).shape
        torch.Size([3, 1])
    """
    learner = load_either(path, module, trust)
    if isinstance(learner, AdaptedLearner):
        raise CheckpointError(
            f"{path} is adapted already: dmaml_pl.load_adapted loads it, and dmaml adapt takes it without --support."
        )
    return learner


def load_adapted(path: str | Path, module: MetaLearning | None = None, trust: Sequence[str] = ()) -> AdaptedLearner:
    """A learner that was adapted before, from what `AdaptedLearner.save` wrote; arguments and errors are `load`'s.

    Examples:
        >>> learner = FewShotLearner(MetaLearning(MLP(), MAML()))
        >>> learner.adapt(torch.rand(10, 1), torch.rand(10, 1)).save("adapted.pt")
        >>> load_adapted("adapted.pt", MetaLearning(MLP())).predict(torch.rand(3, 1)).shape
        torch.Size([3, 1])
    """
    learner = load_either(path, module, trust)
    if isinstance(learner, FewShotLearner):
        raise CheckpointError(
            f"{path} is the checkpoint of a training, and not adapted to anything yet: adapt it first, with "
            "dmaml_pl.load(...).adapt(x, y), or dmaml adapt --support; a policy with adapt_to(task), or --task."
        )
    return learner


def load_either(
    path: str | Path, module: MetaLearning | None = None, trust: Sequence[str] = ()
) -> FewShotLearner | AdaptedLearner:
    """What `load` or `load_adapted` gives, whichever the file is of; arguments and errors are theirs."""
    if not isinstance(path, str | Path):
        raise CheckpointError(f"The path of the checkpoint is {path!r}, but must be one, such as 'best.ckpt'.")
    content = _read(Path(path))
    config, data = None, None
    if module is None:
        module, config, data = _build(Path(path), content, trust)
    adapted: dict[str, Any] | None = content.get(ADAPTED_KEY)
    trained: nn.Module = module if adapted is None else module.network
    if adapted is not None and module.algorithm.any_ways:
        give_shapes(trained, content["state_dict"])
    check_fits(content, trained, Path(path), option="")
    trained.load_state_dict(content["state_dict"])
    module.shapes = content.get("shapes") or module.shapes
    if content.get("scaling"):
        module.scaling = Scaling(**content["scaling"])
    if adapted is None:
        return FewShotLearner(module, config, data)
    of_kind = AdaptedPolicy if module.objective.acts else AdaptedLearner
    own = adapted | {"classes": tuple(adapted["classes"])}
    return of_kind(module.network, module.objective, module.shapes, module.scaling, config, data, **own)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path /= WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there: {or_last(path, 'give the checkpoint of a training, such as best.ckpt')}."
        )
    if path.suffix == ".safetensors":
        return read_weights(path)
    content = read_plain(
        path,
        f"{path} is truncated, damaged, or no checkpoint at all; code in a file is never run: give the checkpoint of "
        "a training, such as best.ckpt.",
    )
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} holds no weights: give the checkpoint of a training, such as best.ckpt.")
    return content


def _build(path: Path, content: dict[str, Any], trust: Sequence[str]) -> tuple[MetaLearning, dict[str, Any], Any]:
    """The module to take the weights, the configuration that it is built from, and the data module that this names."""
    config = content.get(CONFIG_KEY)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} does not say what network it is of, as the training was not made by dmaml fit, or by an older "
            "version: in Python, dmaml_pl.load(FILE, module=...) takes a module like the trained one."
        )
    try:
        module: MetaLearning = build(of_today(config.get("model")), (MetaLearning,), trust)
        return module, config, build(config.get("data"), (TaskDataModule,), trust)
    except Exception as error:  # also of settings that were changed
        raise CheckpointError(f"{path} cannot be used: {reason_of(error)}.") from error
