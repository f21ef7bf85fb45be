"""The two few-shot benchmarks made of CIFAR-100 (Krizhevsky 2009): CIFAR-FS and FC100.

Both take all 600 pictures of each of its 100 classes; they differ in which classes are for what.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_modules.classic_benchmark import MODES, Benchmark, Packed, broken
from data_modules.reading.cache import Sample
from data_modules.reading.plain_pickle import read_plain
from dmaml_pl.data import Split

FOLDER = "cifar-100-python"
SHAPE = (3, 32, 32)

# Bertinetto et al. 2019; all other classes are for meta-training.
CIFAR_FS: dict[Split, str] = {
    "val": (
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark "
        "television tractor"
    ),
    "test": (
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table "
        "telephone wardrobe whale woman worm"
    ),
}
# Oreshkin et al. 2018; by superclass. All others are for meta-training.
FC100_SUPERCLASSES: dict[Split, str] = {
    "val": "large_carnivores large_omnivores_and_herbivores non-insect_invertebrates small_mammals",
    "test": "aquatic_mammals insects medium_mammals people",
}


class Cifar100Tasks(Benchmark):
    """Base of both. The arguments are those of `Benchmark`."""

    size = 32

    def find(self, root: Path) -> Packed | tuple[Path, Path] | None:
        """CIFAR-100 itself, as torchvision fetches it."""
        files = [root / FOLDER / name for name in ("meta", "train", "test")]
        return Packed(files, lambda: self._samples(files)) if all(file.is_file() for file in files) else None

    def fetch(self, root: Path) -> None:
        """CIFAR-100, by torchvision, which checks it by its checksum."""
        from torchvision.datasets import CIFAR100  # noqa: PLC0415 - takes a second, and is rarely needed
        from torchvision.datasets.utils import download_and_extract_archive  # noqa: PLC0415 - the same

        download_and_extract_archive(CIFAR100.url, str(root), filename=CIFAR100.filename, md5=CIFAR100.tgz_md5)

    @abstractmethod
    def split_of(self, name: str, superclass: str) -> Split:
        """Which split a class belongs to."""

    def _samples(self, files: list[Path]) -> Iterator[Sample]:
        meta, *halves = [read_plain(file) for file in files]
        try:
            images = np.concatenate([half["data"] for half in halves]).reshape(-1, *SHAPE)
            labels = np.concatenate([half["fine_labels"] for half in halves])
            upper = np.concatenate([half["coarse_labels"] for half in halves])
            names, superclasses = meta["fine_label_names"], meta["coarse_label_names"]
            home = {
                label: self.split_of(name, superclasses[upper[labels == label][0]])
                for label, name in enumerate(names)
                if (labels == label).any()
            }
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise broken(files[1], error) from error
        for split in MODES:
            chosen = [label for label in home if home[label] == split]
            for label in chosen:
                for row in np.flatnonzero(labels == label):
                    yield split, names[label], images[row]


class CIFARFS(Cifar100Tasks):
    """CIFAR-FS (Bertinetto et al. 2019, arXiv:1805.08136): 32x32 in colour, 64, 16 and 20 classes of 600.

    `root` holds one of these, looked for in this order:

    - torchvision's `cifar-100-python`, which `download` fetches;
    - learn2learn's `cifarfs/cifar100`, that is the folders `data` and `splits/bertinetto` of its authors;
    - `train`, `val` and `test`, in each of them a folder of pictures a class.

    The arguments are those of `Benchmark`.

    Examples:
        >>> CIFARFS(root="data/cifar", ways=5, shots=1).ways
        5
    """

    title = "CIFAR-FS"
    expected = (
        f"torchvision's folder {FOLDER}, or cifarfs/cifar100 with data and splits/bertinetto, or train, val and test "
        "with class folders"
    )

    def find(self, root: Path) -> Packed | tuple[Path, Path] | None:
        """CIFAR-100 itself, or the folders of the authors of CIFAR-FS."""
        found = super().find(root)
        folder = root / "cifarfs" / "cifar100"
        if found is None and (folder / "splits" / "bertinetto").is_dir():
            return folder / "data", folder / "splits" / "bertinetto"
        return found

    def split_of(self, name: str, superclass: str) -> Split:
        """By the lists of Bertinetto et al."""
        return next((split for split, names in CIFAR_FS.items() if name in names.split()), "train")


class FC100(Cifar100Tasks):
    """FC100 (Oreshkin et al. 2018, arXiv:1805.10123): 32x32 in colour, 60, 20 and 20 classes of 600.

    The splits share no superclass, which makes it harder than CIFAR-FS. `root` holds one of these, looked for in this
    order:

    - learn2learn's `FC100_train.pickle`, `FC100_val.pickle` and `FC100_test.pickle`;
    - torchvision's `cifar-100-python`, which `download` fetches;
    - `train`, `val` and `test`, in each of them a folder of pictures a class.

    The arguments are those of `Benchmark`.

    Examples:
        >>> FC100(root="data/cifar", ways=5, shots=1).ways
        5
    """

    title = "FC100"
    expected = (
        f"FC100_train.pickle, FC100_val.pickle and FC100_test.pickle, or torchvision's folder {FOLDER}, or train, val "
        "and test with class folders"
    )

    def find(self, root: Path) -> Packed | tuple[Path, Path] | None:
        """The pickles of its authors, or CIFAR-100 itself."""
        files = [root / f"FC100_{split}.pickle" for split in MODES]
        if all(file.is_file() for file in files):
            return Packed(files, lambda: _fc100_samples(files))
        return super().find(root)

    def split_of(self, name: str, superclass: str) -> Split:
        """By the superclasses of Oreshkin et al."""
        return next((split for split, names in FC100_SUPERCLASSES.items() if superclass in names.split()), "train")


def _fc100_samples(files: list[Path]) -> Iterator[Sample]:
    for split, file in zip(MODES, files, strict=True):
        content = read_plain(file)
        try:
            images = np.asarray(content["data"]).transpose(0, 3, 1, 2).reshape(-1, *SHAPE)
            labels = np.asarray(content["labels"])
            names = {label: f"{split}-{label}" for label in sorted(set(labels.tolist()))}
        except (TypeError, KeyError, ValueError) as error:
            raise broken(file, error) from error
        for label, name in names.items():
            for row in np.flatnonzero(labels == label):
                yield split, name, np.ascontiguousarray(images[row])
