"""Pictures changed by chance, each differently, as their task's seed alone says.

Legend: T tasks, B pictures of a task, C H W image axes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmaml_pl.errors import ConfigError


def augmented(setting: str, transforms: Sequence[nn.Module], x: Tensor, seeds: Sequence[int]) -> Tensor:
    """Pictures (T, B, C, H, W) after some transforms, which draw anew for each picture; of a task by its own seed.

    Global random generators are left as they were.

    Args:
        setting: that names the transforms.
        transforms: from a picture (C, H, W) to one of the same shape, one after another.
        x: real numbers from 0 to 1.
        seeds: of the tasks.

    Raises:
        ConfigError: a transform fails, or gives something else than such a picture.
    """
    changed = torch.empty_like(x)
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        for task, seed in enumerate(seeds):
            torch.manual_seed(seed)
            for number, picture in enumerate(x[task]):
                after = picture
                for transform in transforms:
                    after = _changed(setting, transform, after)
                if after.shape != picture.shape:
                    raise ConfigError(
                        f"data.{setting} makes of pictures {tuple(picture.shape)} such of {tuple(after.shape)}, but "
                        "must keep their shape."
                    )
                changed[task, number] = after
    return changed


def _changed(setting: str, transform: nn.Module, picture: Tensor) -> Tensor:
    name = type(transform).__name__
    try:
        after = transform(picture)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"data.{setting}: {name} cannot take pictures {tuple(picture.shape)} ({error}).") from error
    if not isinstance(after, Tensor) or not after.is_floating_point():
        raise ConfigError(f"data.{setting}: {name} gives a {_kind(after)}, but must give a picture of real numbers.")
    return after


def _kind(value: object) -> str:
    return f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
