"""tiered-ImageNet (Ren et al. 2018, arXiv:1803.00676): 608 classes of ImageNet, split by category."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_modules.classic_benchmark import ZENODO, Benchmark, Packed, broken, fetch_file
from data_modules.reading.cache import Sample
from data_modules.reading.pictures import PictureReader
from data_modules.reading.plain_pickle import read_plain
from dmaml_pl.data import SPLITS

FOLDER = "tiered-imagenet"


class TieredImageNet(Benchmark):
    """tiered-ImageNet: 84x84 in colour; 351 classes for meta-training, 97 for validation, 160 for meta-testing.

    `root` holds one of these, looked for in this order:

    - `tiered-imagenet` with `train_images_png.pkl`, `train_labels.pkl` and the same of `val` and `test`, as the authors
      and learn2learn publish them, and as `download` fetches them (12 GB);
    - `train`, `val` and `test`, in each of them a folder of pictures a class.

    The 779,165 pictures take 16.5 GB in the cache folder, and tasks are sampled from there without reading them whole.
    To decode the pickles, one split of them at a time must fit in memory. The arguments are those of `Benchmark`.

    Examples:
        >>> TieredImageNet(root="data/tiered-imagenet", shots=5).shots
        5
    """

    title = "tiered-ImageNet"
    size = 84
    expected = (
        f"the folder {FOLDER} with train_images_png.pkl, train_labels.pkl and the same of val and test, or train, val "
        "and test with class folders"
    )

    def find(self, root: Path) -> Packed | tuple[Path, Path] | None:
        """The pickles of its authors."""
        files = _pickles(root)
        if not all(file.is_file() for file in files):
            return None
        return Packed(files, lambda: _samples(files, self.reader))

    def fetch(self, root: Path) -> None:
        """The pickles, from where learn2learn's authors publish them."""
        for file in _pickles(root):
            if not file.is_file():
                fetch_file(f"{ZENODO}/{FOLDER}-{file.name}", file)


def _pickles(root: Path) -> list[Path]:
    return [root / FOLDER / f"{split}_{kind}.pkl" for split in SPLITS for kind in ("labels", "images_png")]


def _samples(files: list[Path], reader: PictureReader) -> Iterator[Sample]:
    for split, labels_file, images_file in zip(SPLITS, files[::2], files[1::2], strict=True):
        content, pictures = read_plain(labels_file), read_plain(images_file)
        try:
            labels, count = np.asarray(content["label_specific"]), len(pictures)
            order = labels.argsort(kind="stable")
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise broken(labels_file, error) from error
        if len(labels) != count:
            raise broken(images_file, f"{count} pictures, but {len(labels)} labels")
        for row in order:
            pixels = reader.read(io.BytesIO(pictures[row]), f"{images_file}, picture {row},")
            yield split, str(labels[row]), pixels
