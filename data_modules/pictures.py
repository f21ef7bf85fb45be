"""What data sets of pictures share: each picture is made a sample once, and kept in the cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from data_modules.class_images import ClassImages
from data_modules.images import ImageTasks
from data_modules.reading.cache import Sample, cache_folder, fingerprint, load_or_make
from data_modules.reading.class_folders import Files
from data_modules.reading.pictures import InkReader, PictureReader
from dmaml_pl.data import PlottedTasks, Split


class PictureTasks(ImageTasks):
    """Base of the data sets whose images are kept in the cache: a subclass says which parts they have.

    Args:
        cache_dir: folder to keep the images in; by default `$XDG_CACHE_HOME/dmaml_pl` or `~/.cache/dmaml_pl`.
        settings: those of `ImageTasks`.

    Attributes:
        reader: how a picture becomes a sample; a subclass sets it.
        files: of each row of the images, below the folder that they are in; empty where they are not files.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from data_modules.pictures import PictureTasks
        >>> from data_modules.reading.pictures import InkReader
        >>> class Bars(PictureTasks):
        ...     reader = InkReader(8)
        ...     def load_parts(self):
        ...         return self.cached("bars", self.drawn)
        ...     def drawn(self):
        ...         for row in range(8):
        ...             for _ in range(4):
        ...                 picture = np.zeros((1, 8, 8), dtype=np.uint8)
        ...                 picture[:, row] = 255
        ...                 yield "all", str(row), picture
        ...     def load_splits(self):
        ...         bars = self.load_parts()["all"]
        ...         return {"train": bars.choose(range(4)), "val": bars.choose([4, 5]), "test": bars.choose([6, 7])}
        >>> data = Bars(ways=2, shots=1, queries=3, cache_dir=tempfile.mkdtemp())
        >>> data.setup()
        >>> data.sample_task("test", seed=0).support_x.shape
        torch.Size([2, 1, 8, 8])
    """

    reader: PictureReader

    def __init__(self, *, cache_dir: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.cache_dir = cache_dir
        self.files: list[str] = []

    @abstractmethod
    def load_parts(self) -> dict[str, ClassImages]:
        """The images by part of the data set, from the cache; put there where they are not."""

    def prepare_data(self) -> None:
        """Fill the cache, unless it is filled (once per machine)."""
        self.load_parts()

    def read_sample(self, path: Path | str) -> Tensor:
        """A picture of a user's own as a sample (C, H, W), made by the reader of those of training.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        return self.reader.read_sample(path)

    def tasks_to_plot(self, count: int) -> PlottedTasks:
        """As `ImageTasks.tasks_to_plot`; letters dark on light, as they are written."""
        return replace(super().tasks_to_plot(count), ink_is_bright=isinstance(self.reader, InkReader))

    def query_files(self, split: Split, indices: Sequence[int]) -> list[list[str]] | None:
        """The files of the query samples of evaluated tasks (T, Q), in their order; None where they are not files."""
        if not self.files:
            return None
        rows = self.evaluation_rows(split, indices)[:, :, self.shots :].reshape(len(indices), -1)
        return [[self.files[row] for row in task] for task in rows.tolist()]

    def cached(
        self,
        name: str,
        make: Callable[[], Iterator[Sample]],
        *,
        identity: str = "",
        files: Mapping[str, Path] | None = None,
        what: str = "",
        count: int | None = None,
    ) -> dict[str, ClassImages]:
        """The images by part of the data set, as `load_or_make` has them.

        Args:
            name: with which the name of the entry begins.
            make: yields the samples.
            identity: says what they depend on, beside the reader and the files.
            files: that they are made of, by name.
            what: what they are called while they are made.
            count: how many there will be, if that is known.
        """
        key = fingerprint(f"{self.reader.identity}{identity}", files)
        return load_or_make(cache_folder(self.cache_dir) / f"{name}-{key}", self.reader.shape, make, what, count)

    def decoded(self, name: str, root: Path, files: Files) -> dict[str, ClassImages]:
        """The pictures of class folders, by part of the data set.

        Args:
            name: with which the name of the entry begins.
            root: the folder they are in.
            files: the pictures of each class of each part.

        Raises:
            DataError: names a picture that cannot be read, or the cache folder that cannot be written.
        """
        listed = [(part, label, file) for part in files for label in files[part] for file in files[part][label]]

        def decode() -> Iterator[Sample]:
            pixels = self.reader.read_all(file for _, _, file in listed)
            for (part, label, _), sample in zip(listed, pixels, strict=True):
                yield part, label, sample

        self.files = [file.relative_to(root).as_posix() for _, _, file in listed]
        named = {f"{part} {label} {file.relative_to(root)}": file for part, label, file in listed}
        return self.cached(name, decode, files=named, what=str(root), count=len(listed))
