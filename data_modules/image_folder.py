"""A user's own pictures: a folder of class folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from data_modules.cache import cache_folder
from data_modules.class_folders import SPLITS, UNSPLIT, Files, find_classes, read_lists
from data_modules.images import ClassImages, ImageTasks
from data_modules.photos import Fit, PhotoReader
from data_modules.pixel_store import Block, PixelStore, Sample, load_or_decode
from data_modules.samplers import SamplerName
from dmaml_pl.checks import require_positive
from dmaml_pl.data import Split
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import derive_seed


class ImageFolder(ImageTasks):
    """Pictures of your own, one folder a class, in any format that Pillow reads, of any size, in colour or grey.

    The folder that holds a picture is its class; folders may be nested. Which classes are for meta-training, validation
    and meta-testing is said by the sub-folders `train`, `val` and `test` of `root`, where there are such; or by lists
    (`splits`); else the classes are dealt by chance, which follows from `split_seed` and their names alone.

    The pictures are decoded once, into a file of `image_size` x `image_size` x `channels` bytes each in the cache
    folder, from which tasks are drawn without reading it whole: there may be more of them than fit in memory. Changed,
    new and removed files are noticed by name, size and time of change.

    Args:
        root: the folder.
        splits: folder with the lists `train`, `val` and `test`, as .csv files with the columns `filename` and `label`,
            or as .txt files with the name of a class folder in each line; None where there are none.
        val_share: share of the classes that is dealt to validation, where neither folders nor lists say so. This and
            the next are by default those of mini-ImageNet.
        test_share: share of the classes that is dealt to meta-testing; the others are for meta-training.
        split_seed: seed of dealing the classes.
        image_size: pixels along each axis that pictures are reduced, or enlarged, to.
        channels: 3 for colour, 1 for grey.
        fit: what happens to pictures that are not square: "crop" takes the middle, "pad" adds black sides, "stretch"
            squeezes them.
        ways: N, classes of a task.
        shots: K, support samples per class.
        queries: Q, query samples per class.
        meta_batch: T, tasks in the meta-batch of one worker.
        runs_per_epoch: runs that Lightning counts as one epoch.
        val_tasks: validation tasks.
        test_tasks: tasks of a meta-test.
        seed: seed of the training tasks; by default that of `seed_everything`, or 0.
        evaluation_seed: seed of the validation and test tasks.
        sampler: "batched" draws all tasks of a meta-batch at once; "learn2learn", the reference, one after another
            through learn2learn's task transforms. From the same seed they draw other tasks of the same distribution.
        cache_dir: folder to keep the decoded pictures in; by default `$XDG_CACHE_HOME/dmaml_pl` or `~/.cache/dmaml_pl`.
    """

    def __init__(
        self,
        *,
        root: str,
        splits: str | None = None,
        val_share: float = 0.16,
        test_share: float = 0.2,
        split_seed: int = 0,
        image_size: int = 84,
        channels: Literal[1, 3] = 3,
        fit: Fit = "crop",
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        meta_batch: int = 4,
        runs_per_epoch: int = 10,
        val_tasks: int = 100,
        test_tasks: int = 600,
        seed: int | None = None,
        evaluation_seed: int = 0,
        sampler: SamplerName = "batched",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            ways=ways,
            shots=shots,
            queries=queries,
            meta_batch=meta_batch,
            runs_per_epoch=runs_per_epoch,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            seed=seed,
            evaluation_seed=evaluation_seed,
            sampler=sampler,
        )
        require_positive(**{"data.val_share": val_share, "data.test_share": test_share, "data.image_size": image_size})
        if val_share + test_share >= 1:
            raise ConfigError(
                f"data.val_share + data.test_share is {val_share} + {test_share}, but must leave some classes for "
                "meta-training: choose them to be less than 1 together."
            )
        self.root = root
        self.splits = splits
        self.val_share = val_share
        self.test_share = test_share
        self.split_seed = split_seed
        self.cache_dir = cache_dir
        self.reader = PhotoReader(image_size, channels, fit)

    def prepare_data(self) -> None:
        """Decode the pictures, unless they are in the cache (once per machine)."""
        self._store()

    def read_sample(self, path: Path) -> Tensor:
        """A picture of a user's own as a sample (C, H, W), made as those of training are.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        return self.reader.read_sample(path)

    def load_splits(self) -> dict[Split, ClassImages]:
        """The images of each split, mapped into memory.

        Raises:
            ConfigError: a split gets no class.
            DataError: pictures are missing or damaged, or it cannot be told what is a class.
        """
        store = self._store()
        dealt = self._deal(store.parts[UNSPLIT]) if UNSPLIT in store.parts else store.parts
        return {split: images_of(store, dealt[split]) for split in SPLITS}

    def _deal(self, classes: list[Block]) -> dict[str, list[Block]]:
        # By a hash of each name: the same split on every machine.
        order = sorted(classes, key=lambda block: derive_seed("image_folder", self.split_seed, block.name))
        val, test = (max(1, round(share * len(order))) for share in (self.val_share, self.test_share))
        self.split_remedy = ", or deal the classes otherwise (data.val_share, data.test_share, data.splits)"
        if val + test >= len(order):
            raise ConfigError(
                f"data.root ({self.root}) has {len(order)} classes, which are too few to be dealt to train, val and "
                "test: add classes."
            )
        first = len(order) - val - test
        dealt = {"train": order[:first], "val": order[first : first + val], "test": order[first + val :]}
        return {split: sorted(blocks, key=lambda block: block.start) for split, blocks in dealt.items()}

    def _store(self) -> PixelStore:
        root = Path(self.root).expanduser()
        files = find_classes(root) if self.splits is None else read_lists(root, Path(self.splits).expanduser())
        return decode_files(files, root, self.reader, cache_folder(self.cache_dir), "image_folder")


def decode_files(files: Files, root: Path, reader: PhotoReader, cache: Path, name: str) -> PixelStore:
    """The pictures of a folder, decoded, and kept in the cache.

    Args:
        files: the pictures of each class of each split.
        root: the folder they are in.
        reader: how they are made samples.
        cache: the cache folder.
        name: with which the name of the entry begins.

    Raises:
        DataError: names a picture that cannot be read, or the cache folder that cannot be written.
    """
    listed = [(part, label, file) for part, classes in files.items() for label in classes for file in classes[label]]
    key = hashlib.blake2b(reader.identity.encode(), digest_size=8)
    for part, label, file in listed:
        status = file.stat()
        key.update(repr((part, label, str(file.relative_to(root)), status.st_size, status.st_mtime_ns)).encode())

    def decode() -> Iterator[Sample]:
        pixels = reader.read_all([file for _, _, file in listed])
        for (part, label, _), sample in zip(listed, pixels, strict=True):
            yield part, label, sample

    path = cache / f"{name}-{key.hexdigest()}"
    return load_or_decode(path, reader.shape, decode, what=str(root), count=len(listed))


def images_of(store: PixelStore, blocks: list[Block]) -> ClassImages:
    """Some of the classes of a store."""
    return ClassImages(
        store.pixels,
        np.array([block.start for block in blocks]),
        np.array([block.samples for block in blocks]),
        [block.name for block in blocks],
    )
