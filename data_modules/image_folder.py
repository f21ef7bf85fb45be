"""A user's own pictures: a folder of class folders."""

from __future__ import annotations

from typing import Any, Literal

from data_modules.class_images import ClassImages
from data_modules.pictures import PictureTasks
from data_modules.reading.class_folders import UNSPLIT, find_classes, read_lists
from data_modules.reading.pictures import Fit, PhotoReader
from data_modules.shares import Shares, shuffle
from dmaml_pl.checks import at_home, require_at_most, require_counts
from dmaml_pl.data import SPLITS, Split


class ImageFolder(PictureTasks):
    """Pictures of your own, one folder a class, in any format that Pillow reads, of any size, in colour or grey.

    The folder that holds a picture is its class; folders may be nested. Which classes are for meta-training, validation
    and meta-testing is said by the sub-folders `train`, `val` and `test` of `root`, where there are such; or by lists
    (`splits`); else the classes are dealt by chance, which follows from `split_seed` and their names alone.

    The pictures are decoded once, into a file of `image_size` x `image_size` x `channels` bytes each in the cache
    folder, from which tasks are sampled without reading it whole: there may be more of them than fit in memory.
    Changed, new and removed files are noticed by name, size and time of change.

    Args:
        root: the folder.
        splits: folder with the lists `train`, `val` and `test`, as .csv files with the columns `filename` and `label`,
            or as .txt files with the name of a class folder in each line; None where there are none. A listed file may
            lie in any folder below `root`.
        val_share: share of the classes that is dealt to validation, where neither folders nor lists say so. This and
            the next are by default those of mini-ImageNet.
        test_share: share of the classes that is dealt to meta-testing; the others are for meta-training.
        split_seed: seed of dealing the classes.
        image_size: pixels along each axis that pictures are reduced, or enlarged, to.
        channels: 3 for colour, 1 for grey.
        fit: what happens to pictures that are not square: "crop" takes the middle, "pad" adds black sides, "stretch"
            squeezes them.
        settings: those of `PictureTasks`.

    Examples:
        >>> ImageFolder(root="pictures", image_size=64, ways=5, shots=1).ways
        5
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
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_counts(**{"data.image_size": image_size})
        require_at_most(10_000, **{"data.image_size": image_size})
        self.shares = Shares(val_share, test_share, "classes")
        self.root = root
        self.splits = splits
        self.val_share = val_share
        self.test_share = test_share
        self.split_seed = split_seed
        self.reader = PhotoReader(image_size, channels, fit)

    def load_parts(self) -> dict[str, ClassImages]:
        """The images of each split, or all together where the splits are dealt by chance."""
        root = at_home(self.root)
        files = find_classes(root) if self.splits is None else read_lists(root, at_home(self.splits))
        return self.decoded("image_folder", root, files)

    def load_splits(self) -> dict[Split, ClassImages]:
        """The images of each split, mapped into memory.

        Raises:
            DataError: pictures are missing or damaged, it cannot be told what is a class, or there are too few.
        """
        parts = self.load_parts()
        if UNSPLIT not in parts:
            return {split: parts[split] for split in SPLITS}
        self.split_remedy = ", or deal the classes otherwise (data.val_share, data.test_share, data.splits)"
        images = parts[UNSPLIT]
        shuffled = shuffle(images.names, "image_folder", self.split_seed)
        numbers = {name: number for number, name in enumerate(images.names)}
        dealt = self.shares.deal(shuffled, f"data.root ({self.root})")
        return {split: images.choose(sorted(numbers[name] for name in names)) for split, names in dealt.items()}
