"""What the classic few-shot benchmarks share: found in a user's folder, or fetched, and decoded once.

Legend: C channels, H W image axes.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_modules.cache import cache_folder
from data_modules.class_folders import SPLITS, UNSPLIT, find_classes, read_lists
from data_modules.image_folder import decode_files, images_of
from data_modules.images import ClassImages, ImageTasks
from data_modules.photos import Fit, PhotoReader
from data_modules.pixel_store import PixelStore, Sample, load_or_decode
from data_modules.samplers import SamplerName
from dmaml_pl.data import Split
from dmaml_pl.errors import DataError

ZENODO = "https://zenodo.org/record/7978538/files"
"""Where the authors of learn2learn publish the benchmarks."""

MODES: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}
"""What learn2learn calls the splits."""


@dataclass(frozen=True)
class Packed:
    """A benchmark in few large files, not one a picture.

    Attributes:
        files: all that is read.
        decode: yields the samples.
    """

    files: Sequence[Path]
    decode: Callable[[], Iterator[Sample]]


class Benchmark(ImageTasks):
    """Base of the classic benchmarks, whose splits are published with them.

    Args:
        root: folder with the data set, or to fetch it into.
        download: fetch the data set into `root` if it is not there.
        ways: N, classes of a task.
        shots: K, support samples per class.
        queries: Q, query samples per class; 15 in the MAML paper.
        meta_batch: T, tasks in the meta-batch of one worker.
        runs_per_epoch: runs that Lightning counts as one epoch.
        val_tasks: validation tasks.
        test_tasks: tasks of a meta-test.
        seed: seed of the training tasks; by default that of `seed_everything`, or 0.
        evaluation_seed: seed of the validation and test tasks.
        sampler: "batched" draws all tasks of a meta-batch at once; "learn2learn", the reference, one after another
            through learn2learn's task transforms. From the same seed they draw other tasks of the same distribution.
        cache_dir: folder to keep the decoded pictures in; by default `$XDG_CACHE_HOME/dmaml_pl` or `~/.cache/dmaml_pl`.

    Attributes:
        title: name of the data set.
        size: pixels along each axis.
        fit: what happens to pictures that are not square.
        expected: what a root may hold, in words.
    """

    title: str
    size: int
    fit: Fit = "stretch"
    expected: str

    def __init__(
        self,
        *,
        root: str,
        download: bool = False,
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
        self.root = root
        self.download = download
        self.cache_dir = cache_dir
        self.reader = PhotoReader(self.size, 3, self.fit)

    @abstractmethod
    def find(self, root: Path) -> Packed | tuple[Path, Path] | None:
        """The data set as others publish it.

        Returns:
            Packed files; or a folder of class folders, and one of lists; or None where there is neither.
        """

    @abstractmethod
    def fetch(self, root: Path) -> None:
        """Download what `find` then finds."""

    def prepare_data(self) -> None:
        """Fetch the data set if asked to, and decode it, unless it is in the cache (once per machine)."""
        root = Path(self.root).expanduser()
        if self.download and self.find(root) is None and not _is_sorted(root):
            try:
                self.fetch(root)
            except (
                Exception
            ) as error:  # whatever goes wrong on the way to the server, the user can do the same about it
                raise DataError(
                    f"{self.title} could not be fetched into data.root ({root}): {error}. Put it there by hand: "
                    f"{self.expected}."
                ) from None
        self._store()

    def read_sample(self, path: Path) -> Tensor:
        """A picture of a user's own as a sample (3, H, W), made as those of training are.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        return self.reader.read_sample(path)

    def load_splits(self) -> dict[Split, ClassImages]:
        """The images of each split, mapped into memory.

        Raises:
            DataError: the data set is missing or damaged.
        """
        store = self._store()
        missing = next((split for split in SPLITS if split not in store.parts), None)
        if missing is not None:
            raise DataError(f"{self.title} in data.root ({self.root}) has no classes for {missing}: fetch it anew.")
        return {split: images_of(store, store.parts[split]) for split in SPLITS}

    def _store(self) -> PixelStore:
        root = Path(self.root).expanduser()
        found, cache, name = self.find(root), cache_folder(self.cache_dir), type(self).__name__.lower()
        if isinstance(found, Packed):
            key = hashlib.blake2b(f"{self.reader.identity}, version 1".encode(), digest_size=8)
            for file in found.files:
                status = file.stat()
                key.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
            path = cache / f"{name}-{key.hexdigest()}"
            return load_or_decode(path, self.reader.shape, found.decode, what=str(root), count=None)
        if found is not None:
            folders, lists = found
            return decode_files(read_lists(folders, lists), folders, self.reader, cache, name)
        if _is_sorted(root):
            files = find_classes(root)
            if UNSPLIT not in files:
                return decode_files(files, root, self.reader, cache, name)
        raise DataError(
            f"data.root ({root}) does not hold {self.title}: expected are {self.expected}. `--data.download true` "
            "fetches it."
        )


def broken(file: Path, reason: object) -> DataError:
    """That a file holds something else than it should."""
    return DataError(f"{file} does not hold what it should ({reason}): fetch it anew.")


def fetch_file(url: str, path: Path) -> None:
    """Download a file, and put it in its place when it is whole."""
    from torchvision.datasets.utils import download_url  # noqa: PLC0415 - takes a second, and is rarely needed

    partial = path.with_name(f"{path.name}.part")
    partial.unlink(missing_ok=True)  # half a file of an earlier try
    download_url(url, str(path.parent), partial.name)
    partial.replace(path)


def _is_sorted(root: Path) -> bool:
    """Whether a folder has a sub-folder for each split."""
    return all((root / split).is_dir() for split in SPLITS)
