"""What the image data sets share: N-way K-shot tasks, gathered from images that are one uint8 tensor a split.

Legend: T tasks, N ways, K shots, Q queries a class, C H W image axes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_modules.augmenting import augmented
from data_modules.class_images import ClassImages
from data_modules.samplers import Sampler, SamplerName, WithinGroups, sampler_named
from dmaml_pl.checks import require_counts
from dmaml_pl.data import PlottedTasks, Split, TaskDataModule
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import LabelledSamples, Samples, TaskBatch, derive_seed

MOVED_UP_TO = 4 * 2**30
"""Bytes of images that are moved to the trainer's device; of more only the tasks are, each when it is sampled."""

IN_CACHE = 2**17
"""Values that are converted and then scaled before the next are, because 512 KiB stay in a core's cache meanwhile."""


class ImageTasks(TaskDataModule):
    """Base of the image data sets: a subclass says which images each split holds.

    A task takes N classes of its split, gives them the labels 0 .. N - 1 by chance, and takes K + Q samples of each,
    none of them twice. Its samples are sorted by label: support_x is (N * K, C, H, W), query_x (N * Q, C, H, W),
    float32 from 0 to 1; support_y is (N * K,), query_y (N * Q,), int64.

    The images of a split move to the trainer's device when the first of its tasks is sampled there, up to 4 GiB of
    them; the tasks of a meta-batch are then one gather and one conversion on that device. More stay where they are, and
    each meta-batch is gathered there.

    Attributes:
        split_remedy: what a message of too few classes says further, such as the setting that deals them out.

    Args:
        ways: N, classes of a task.
        shots: K, support samples per class.
        queries: Q, query samples per class; 15 in the MAML paper.
        meta_batch: T, tasks in the meta-batch of one worker.
        test_ways: N of validation and meta-test, where that is another: for algorithms that take any number of ways,
            such as `ProtoNet`, which learns more from tasks of more classes than it is to tell apart.
        test_queries: Q of validation and meta-test, where that is another; the MAML paper's code has 15 in training on
            mini-ImageNet, and as many as shots in the test.
        augment: transforms of torchvision.transforms.v2 (or modules of one's own), applied one after another to each
            picture (C, H, W), from 0 to 1, of a training task, and of the baseline's training; they draw anew for each.
        augment_support: the same for the support pictures of every task, those of validation and meta-test, too.
        sampler: "batched" samples all tasks of a meta-batch at once; "learn2learn", the reference, one after another
            through learn2learn's task transforms. From the same seed they make other tasks of the same distribution.
        settings: those of `TaskDataModule`.

    Examples:
        >>> from data_modules.images import ImageTasks
        >>> class Noise(ImageTasks):
        ...     def load_splits(self):
        ...         images = torch.randint(256, (8, 20, 28, 28), dtype=torch.uint8)
        ...         return {"train": images, "val": images, "test": images}
        >>> data = Noise(ways=5, shots=1, queries=15)
        >>> data.setup()
        >>> data.sample_task("train", seed=0).query_x.shape
        torch.Size([75, 1, 28, 28])
    """

    split_remedy = ""
    in_checkpoint = ("augment", "augment_support")  # a trained network is adapted without

    def __init__(
        self,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        meta_batch: int = 4,
        test_ways: int | None = None,
        test_queries: int | None = None,
        augment: Sequence[nn.Module] | None = None,
        augment_support: Sequence[nn.Module] | None = None,
        sampler: SamplerName = "batched",
        **settings: Any,
    ) -> None:
        super().__init__(shots=shots, queries=queries, meta_batch=meta_batch, **settings)
        self.ways = ways
        if test_queries is not None:
            require_counts(**{"data.test_queries": test_queries})
        self.test_ways = test_ways
        self.test_queries = test_queries
        self.augment = list(augment or ())
        self.augment_support = list(augment_support or ())
        self.sampler: SamplerName = sampler
        self._samplers: dict[Split, Sampler] = {}
        self._images: dict[Split, Tensor] = {}
        self._rows: dict[Split, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @abstractmethod
    def load_splits(self) -> Mapping[Split, Tensor | ClassImages]:
        """The images of each split.

        Returns:
            uint8 (classes, samples, H, W) or (classes, samples, C, H, W), where all classes have equally many samples;
            else `ClassImages`.
        """

    def setup(self, stage: str | None = None) -> None:
        """Load the images and make ready to sample tasks; a second call does nothing.

        Raises:
            ConfigError: a split has too few classes, or a class too few samples, for the tasks asked of them.
        """
        if self._samplers:
            return
        for setting, ways in (("ways", self.ways), ("test_ways", self.test_ways)):
            if ways is not None and ways < 2:
                raise ConfigError(f"data.{setting} is {ways}, but a task needs at least 2 classes to tell apart.")
        sampler = sampler_named(self.sampler)
        splits = {split: ClassImages.of(images) for split, images in self.load_splits().items()}
        # The smallest first, so that what it allows, every split allows.
        for split in sorted(splits, key=lambda split: len(splits[split].starts)):
            self._check(split, splits[split])
        for split, images in splits.items():
            self._images[split] = images.pixels
            self._rows[split] = (images.starts, images.samples)
            make = sampler if images.groups is None else partial(WithinGroups, sampler, images.groups)
            ways, queries = self._ways_of(split)[1], self._queries_of(split)[1]
            self._samplers[split] = make(
                images.samples, starts=images.starts, ways=ways, per_class=self.shots + queries
            )
        if self.augment or self.augment_support:
            self.sample_task("train", 0)  # what cannot be applied is refused before the training

    def _ways_of(self, split: Split) -> tuple[str, int]:
        """N of a split, and the setting that says it."""
        if split == "train" or self.test_ways is None:
            return "data.ways", self.ways
        return "data.test_ways", self.test_ways

    def _queries_of(self, split: Split) -> tuple[str, int]:
        """Q of a split, and the setting that says it."""
        if split == "train" or self.test_queries is None:
            return "data.queries", self.queries
        return "data.test_queries", self.test_queries

    def _check(self, split: Split, images: ClassImages) -> None:
        name, classes, of = type(self).__name__, len(images.starts), ""
        if images.groups is not None:
            classes, of = int(np.bincount(images.groups).max()), " in its largest alphabet"
        setting, ways = self._ways_of(split)
        if ways > classes:
            raise ConfigError(
                f"{setting} is {ways}, but the {split} split of {name} has {classes} classes{of}: "
                f"{f'choose 2 to {classes}' if classes > 1 else 'it needs more'}{self.split_remedy}."
            )
        smallest = int(images.samples.argmin())
        setting, queries = self._queries_of(split)
        samples, wanted = int(images.samples[smallest]), self.shots + queries
        if wanted > samples:
            few = [images.names[number] for number in np.flatnonzero(images.samples < wanted)] if images.names else []
            named = f"the class {images.names[smallest]}" if few else f"a class of {name}"
            others = f", and {len(few) - 1} further classes too few" if len(few) > 1 else ""
            leave_out = ", or leave such classes out" if few else ""
            raise ConfigError(
                f"data.shots + {setting} is {self.shots} + {queries}, but {named} has {samples} "
                f"samples{others}: choose them to be at most {samples} together{leave_out}."
            )

    def sample_tasks(self, split: Split, seeds: Sequence[int]) -> TaskBatch:
        """Tasks of a split, each a pure function of its own seed, (T, ...), on the trainer's device."""
        numbers = self._samplers[split](seeds)
        images = self._on_device(split)
        tasks, shape = len(seeds), numbers.shape
        # All support sets before all query sets, so that both are views of what is gathered and converted at once.
        pixels = self._converted(images, numbers.reshape(-1).take(_support_first(shape, self.shots)))
        support, query = (labels.clone() for labels in _labels(shape, self.shots, pixels.device))
        size = images.shape[1:]
        supports, queries = (
            Samples(part.view(tasks, -1, *size), labels)
            for part, labels in zip(pixels.split([support.numel(), query.numel()]), (support, query), strict=True)
        )
        support_x, query_x = supports.x, queries.x
        if self.augment and split == "train":
            support_x, query_x = (
                augmented("augment", self.augment, x, [derive_seed(part, seed) for seed in seeds])
                for part, x in (("support", support_x), ("query", query_x))
            )
        if self.augment_support:
            support_x = augmented("augment_support", self.augment_support, support_x, seeds)
        supports, queries = supports._replace(x=support_x), queries._replace(x=query_x)
        # Not counted from the labels, for which a device would be waited for.
        return TaskBatch((supports,), queries, ways=shape[1])

    def evaluation_rows(self, split: Split, indices: Sequence[int]) -> NDArray[np.int64]:
        """Which rows of the images evaluated tasks are made of, (T, N, K + Q)."""
        return self._samplers[split](self.evaluation_seeds(split, indices))

    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        """One task of a split, without the T axis; the same as `sample_tasks` makes among others."""
        return self.sample_tasks(split, [seed]).task(0)

    def sample_labelled(self, samples: int, seed: int) -> LabelledSamples:
        """Images of the training split and their classes, (samples, C, H, W), all images equally likely."""
        images = self._on_device("train")
        starts, counts = self._rows["train"]
        ends = counts.cumsum()
        chosen = torch.randint(int(ends[-1]), (samples,), generator=torch.Generator().manual_seed(seed)).numpy()
        classes = ends.searchsorted(chosen, side="right")
        pixels = self._converted(images, starts[classes] + chosen - (ends - counts)[classes])
        if self.augment:
            pixels = augmented("augment", self.augment, pixels.unsqueeze(0), [seed]).squeeze(0)
        return LabelledSamples(pixels, torch.from_numpy(classes).to(pixels.device), len(starts))

    def tasks_to_plot(self, count: int) -> PlottedTasks:
        """Meta-test tasks 0 .. `count` - 1, (T, ...), on the CPU."""
        return PlottedTasks(self.evaluation_tasks("test", range(count)).to(torch.device("cpu")))

    def _converted(self, images: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Rows of the images as floats from 0 to 1, on the trainer's device."""
        device = self._device()
        if images.device.type == device.type == "cpu":
            pixels = images.numpy().reshape(len(images), -1)
            scaled = np.empty((len(rows), pixels.shape[1]), dtype=np.float32)
            at_once = max(1, IN_CACHE // pixels.shape[1])
            for start in range(0, len(rows), at_once):
                part = scaled[start : start + at_once]
                np.copyto(part, pixels.take(rows[start : start + at_once], axis=0))
                part *= np.float32(1 / 255)
            return torch.from_numpy(scaled).view(-1, *images.shape[1:])
        index = torch.from_numpy(rows).to(images.device, non_blocking=True)
        return images.index_select(0, index).to(device, non_blocking=True).float().mul_(1 / 255)

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _on_device(self, split: Split) -> Tensor:
        """The images to sample from (rows, C, H, W), moved to the trainer's device once, if they are not too many."""
        images, device = self._images[split], self._device()
        if images.device != device and images.nbytes <= MOVED_UP_TO:
            moved = images.to(device)
            # Splits may share their images.
            self._images = {each: moved if its is images else its for each, its in self._images.items()}
        return self._images[split]


@lru_cache(maxsize=64)
def _support_first(shape: tuple[int, ...], shots: int) -> NDArray[np.int64]:
    """The order that brings samples (T, N, K + Q) to all tasks' (T, N, K) followed by all tasks' (T, N, Q)."""
    places = np.arange(np.prod(shape)).reshape(shape)
    return np.concatenate([places[:, :, :shots].reshape(-1), places[:, :, shots:].reshape(-1)])


@lru_cache(maxsize=64)
def _labels(shape: tuple[int, ...], shots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels (T, N K) and (T, N Q) of samples (T, N, K + Q)."""
    tasks, ways, per_class = shape
    labels = torch.arange(ways, device=device).view(1, -1, 1)
    support, query = (labels.expand(tasks, -1, count).reshape(tasks, -1) for count in (shots, per_class - shots))
    return support, query
