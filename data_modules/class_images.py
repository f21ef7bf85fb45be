"""The images of many classes, which may have different numbers of them, in one tensor.

Legend: C channels, H W image axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class ClassImages:
    """The images of a split whose classes may have different numbers of samples.

    Attributes:
        pixels: uint8 (rows, C, H, W), possibly of several splits together, and mapped into memory.
        starts: row of the first sample of each class, int64 (classes,); the others follow it.
        samples: how many samples each class has, int64 (classes,).
        names: of the classes.
        groups: number of the group of each class, such as its alphabet, (classes,), where the classes of a task are of
            one group; None where they are any.

    Examples:
        >>> from data_modules.class_images import ClassImages
        >>> images = ClassImages.of(torch.zeros(8, 20, 28, 28, dtype=torch.uint8))
        >>> images.pixels.shape, images.samples.tolist()
        (torch.Size([160, 1, 28, 28]), [20, 20, 20, 20, 20, 20, 20, 20])
    """

    pixels: Tensor
    starts: NDArray[np.int64]
    samples: NDArray[np.int64]
    names: list[str]
    groups: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, images: Tensor | ClassImages) -> ClassImages:
        """From images (classes, samples, H, W) or (classes, samples, C, H, W) as well."""
        if isinstance(images, ClassImages):
            return images
        classes, samples = images.shape[:2]
        pixels = images.flatten(0, 1)
        starts, each = np.arange(classes) * samples, np.full(classes, samples)
        return cls(pixels.unsqueeze(1) if pixels.ndim == 3 else pixels, starts, each, [])

    def choose(self, classes: Sequence[int] | NDArray[np.int64]) -> ClassImages:
        """Some of the classes, by their numbers; the pixels are shared."""
        chosen = np.asarray(classes, dtype=np.int64)
        names = [self.names[number] for number in chosen.tolist()]
        return ClassImages(self.pixels, self.starts[chosen], self.samples[chosen], names)

    def stacked(self) -> Tensor:
        """As (classes, samples, C, H, W), where all classes have equally many samples, one after another."""
        rows = self.pixels[int(self.starts[0]) :][: int(self.samples.sum())]
        return rows.view(len(self.starts), -1, *rows.shape[1:])
