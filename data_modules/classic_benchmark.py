"""What the classic few-shot benchmarks share: found in a user's folder, or fetched, and decoded once.

Legend: C channels, H W image axes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_modules.class_images import ClassImages
from data_modules.pictures import PictureTasks
from data_modules.reading.cache import Sample
from data_modules.reading.class_folders import UNSPLIT, find_classes, read_lists
from data_modules.reading.pictures import Fit, PhotoReader
from dmaml_pl.checks import at_home
from dmaml_pl.data import SPLITS, Split
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


class Benchmark(PictureTasks):
    """Base of the classic benchmarks, whose splits are published with them.

    Args:
        root: folder with the data set, or to fetch it into.
        download: fetch the data set into `root` if it is not there.
        settings: those of `PictureTasks`.

    Attributes:
        title: name of the data set.
        size: pixels along each axis.
        fit: what happens to pictures that are not square.
        expected: what a root may hold, in words.

    Examples:
        >>> CIFARFS(root="data/cifar-fs", download=True).title
        'CIFAR-FS'
    """

    title: str
    size: int
    fit: Fit = "stretch"
    expected: str

    def __init__(self, *, root: str, download: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.root = root
        self.download = download
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
        root = at_home(self.root)
        if self.download and self.find(root) is None and not _is_sorted(root):
            try:
                self.fetch(root)
            except Exception as error:  # whatever went wrong on the way, the user can do the same about it
                raise DataError(
                    f"{self.title} could not be fetched into data.root ({root}): {error}. Put it there by hand: "
                    f"{self.expected}."
                ) from None
        super().prepare_data()

    def load_splits(self) -> dict[Split, ClassImages]:
        """The images of each split, mapped into memory.

        Raises:
            DataError: the data set is missing or damaged.
        """
        parts = self.load_parts()
        missing = next((split for split in SPLITS if split not in parts), None)
        if missing is not None:
            raise DataError(f"{self.title} in data.root ({self.root}) has no classes for {missing}: fetch it anew.")
        return {split: parts[split] for split in SPLITS}

    def load_parts(self) -> dict[str, ClassImages]:
        """The images by split, from the cache; decoded there where they are not."""
        root = at_home(self.root)
        found, name = self.find(root), type(self).__name__.lower()
        if isinstance(found, Packed):
            files = {file.name: file for file in found.files}
            return self.cached(name, found.decode, files=files, what=str(root))
        if found is not None:
            folders, lists = found
            return self.decoded(name, folders, read_lists(folders, lists))
        if _is_sorted(root):
            files_found = find_classes(root)
            if UNSPLIT not in files_found:
                return self.decoded(name, root, files_found)
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
