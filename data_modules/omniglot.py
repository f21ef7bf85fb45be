"""Omniglot (Lake, Salakhutdinov and Tenenbaum 2015): 1,623 hand-written characters of 50 alphabets, 20 times each."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from data_modules.class_images import ClassImages
from data_modules.pictures import PictureTasks
from data_modules.reading.cache import Sample
from data_modules.reading.pictures import InkReader, Picture
from data_modules.shares import shuffle
from dmaml_pl.checks import require_one_of, require_positive
from dmaml_pl.data import Split
from dmaml_pl.errors import ConfigError, DataError

PARTS = ("images_background", "images_evaluation")
OmniglotSplit = Literal["characters", "lake"]
ALL = "all"


class Omniglot(PictureTasks):
    """Omniglot as 28x28 images, in the split that is usual for few-shot learning, or in Lake's own.

    "characters", the usual one: the characters of both parts are put together and dealt to the splits by chance, 1,100
    for meta-training, 100 for validation, and the other 423 for meta-testing. With `rotations`, a character turned by
    90, 180 or 270 degrees is a class of its own, in the split of its character, which makes 4,400, 400 and 1,692.

    "lake": the 30 alphabets of the background part are for meta-training, `val_alphabets` of them for validation, and
    the 20 of the evaluation part for meta-testing; all characters of a task are of one alphabet. That is harder: they
    look more alike, and no alphabet of a test was seen before. Lake et al. do not turn characters (`rotations: false`);
    turned alphabets are alphabets of their own.

    Args:
        root: folder with `images_background` and `images_evaluation`, as folders or as .zip files, or with the folder
            `omniglot-py` that torchvision makes.
        download: fetch the images into `root` if they are not there.
        meta_batch: T, tasks in the meta-batch of one worker.
        rotations: whether characters turned by 90, 180 and 270 degrees are classes too, in every split.
        train_classes: characters for meta-training.
        val_classes: characters for validation; those that remain are for meta-testing.
        split: "characters" or "lake", as above.
        val_alphabets: alphabets for validation in Lake's split; `train_classes` and `val_classes` are not heeded there.
        split_seed: seed of dealing the characters, or in Lake's split the validation alphabets, to the splits.
        settings: those of `PictureTasks`; at most 20 shots and queries together.

    Examples:
        >>> Omniglot(root="data/omniglot", ways=20, shots=1).ways
        20
    """

    reader = InkReader(28)

    def __init__(
        self,
        *,
        root: str = "data/omniglot",
        download: bool = False,
        meta_batch: int = 16,
        rotations: bool = True,
        train_classes: int = 1100,
        val_classes: int = 100,
        split: OmniglotSplit = "characters",
        val_alphabets: int = 5,
        split_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(meta_batch=meta_batch, **settings)
        require_positive(
            **{
                "data.train_classes": train_classes,
                "data.val_classes": val_classes,
                "data.val_alphabets": val_alphabets,
            }
        )
        require_one_of("data.split", split, get_args(OmniglotSplit))
        self.root = root
        self.download = download
        self.rotations = rotations
        self.train_classes = train_classes
        self.val_classes = val_classes
        self.split = split
        self.val_alphabets = val_alphabets
        self.split_seed = split_seed

    def prepare_data(self) -> None:
        """Download if asked to, and reduce the images, unless they are in the cache (once per machine)."""
        if self.download and _find_parts(Path(self.root)) is None:
            _download(self.root)
        super().prepare_data()

    def load_parts(self) -> dict[str, ClassImages]:
        """All characters together, unless they are in the cache reduced to 28x28."""
        parts = _find_parts(Path(self.root))
        if parts is None:
            raise DataError(
                f"data.root ({self.root}) does not hold Omniglot: {PARTS[0]} and {PARTS[1]} are expected in it, "
                "as folders or as .zip files. `--data.download true` fetches them."
            )
        drawings = {name: picture for part in parts for name, picture in _find_drawings(part).items()}
        # Of an archive's pictures the archive itself is told.
        files = {name: picture for name, picture in drawings.items() if isinstance(picture, Path)}
        files |= {part.name: part for part in parts if part.suffix == ".zip"}

        def decode() -> Iterator[Sample]:
            pixels = self.reader.read_all(drawings.values())
            for name, sample in zip(drawings, pixels, strict=True):
                yield ALL, name.rpartition("/")[0], sample

        try:
            return self.cached("omniglot", decode, files=files, what=self.root, count=len(drawings))
        finally:
            for archive in {picture.root for picture in drawings.values() if isinstance(picture, zipfile.Path)}:
                archive.close()  # else it is left to a collection of what an error has left

    def load_splits(self) -> dict[Split, Any]:
        """The images of each split, uint8 (classes, 20, 1, 28, 28), 255 where there is ink; `ClassImages` in Lake's.

        Raises:
            ConfigError: no character, or no alphabet, is left for a split.
            DataError: the images are missing or damaged.
        """
        characters = self.load_parts()[ALL]
        names, drawings = characters.names, characters.samples.tolist()
        for name, count in zip(names, drawings, strict=True):
            if count != drawings[0]:
                raise DataError(
                    f"data.root ({self.root}): {name} has {count} drawings, but {names[0]} has {drawings[0]}: fetch "
                    "Omniglot anew."
                )
        dealt = self._by_alphabets(names) if self.split == "lake" else self._by_characters(names)
        numbers = {name: number for number, name in enumerate(names)}
        alphabets = {name: number for number, name in enumerate(dict.fromkeys(map(_alphabet, names)))}
        images, turns = characters.stacked(), range(4 if self.rotations else 1)
        splits: dict[Split, Tensor] = {}
        for split, chosen in dealt.items():
            drawn = images[[numbers[name] for name in chosen]]
            splits[split] = torch.cat([drawn.rot90(turn, (3, 4)) for turn in turns])
        if self.split == "characters":
            return splits
        own = {split: np.array([alphabets[_alphabet(name)] for name in chosen]) for split, chosen in dealt.items()}
        return {
            split: replace(
                ClassImages.of(turned), groups=np.concatenate([own[split] + turn * len(alphabets) for turn in turns])
            )
            for split, turned in splits.items()
        }

    def _by_characters(self, names: list[str]) -> dict[Split, list[str]]:
        first_test = self.train_classes + self.val_classes
        if first_test >= len(names):
            raise ConfigError(
                f"data.train_classes + data.val_classes is {self.train_classes} + {self.val_classes}, but data.root "
                f"({self.root}) has {len(names)} characters, and the test split needs some of them."
            )
        order = shuffle(names, "omniglot", self.split_seed)
        return {
            "train": order[: self.train_classes],
            "val": order[self.train_classes : first_test],
            "test": order[first_test:],
        }

    def _by_alphabets(self, names: list[str]) -> dict[Split, list[str]]:
        background = [name for name in names if name.startswith(f"{PARTS[0]}/")]
        order = shuffle(list(dict.fromkeys(map(_alphabet, background))), "omniglot", self.split_seed)
        if self.val_alphabets >= len(order):
            raise ConfigError(
                f"data.val_alphabets is {self.val_alphabets}, but {PARTS[0]} in data.root ({self.root}) has "
                f"{len(order)} alphabets, and meta-training needs some of them."
            )
        held_out = set(order[: self.val_alphabets])
        return {
            "train": [name for name in background if _alphabet(name) not in held_out],
            "val": [name for name in background if _alphabet(name) in held_out],
            "test": [name for name in names if name.startswith(f"{PARTS[1]}/")],
        }


def _alphabet(name: str) -> str:
    """Part and alphabet of a character's name."""
    return name.rpartition("/")[0]


def _find_parts(root: Path) -> list[Path] | None:
    """Both parts, each a .zip file or a folder; None if one is missing."""
    found = []
    for part in PARTS:
        # The archive first: it tells by its checksums whether it is whole, a folder half unpacked does not.
        candidates = [
            root / f"{part}.zip",
            root / part,
            root / "omniglot-py" / f"{part}.zip",
            root / "omniglot-py" / part,
        ]
        existing = next((path for path in candidates if path.exists()), None)
        if existing is None:
            return None
        found.append(existing)
    return found


def _find_drawings(part: Path) -> dict[str, Picture]:
    """The drawings of a part, by `<part>/<alphabet>/<character>/<drawing>.png`, in a folder or in a .zip file."""
    found: dict[str, Picture]
    try:
        if part.suffix == ".zip":
            archive = zipfile.Path(part)
            found = {name: archive / name for name in archive.root.namelist()}
        else:
            found = {path.relative_to(part.parent).as_posix(): path for path in part.glob("*/*/*.png")}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{part} cannot be read ({error}): remove it, and fetch it anew.") from error
    names = sorted(name for name in found if re.fullmatch(rf"{part.stem}(/[^/]+){{3}}\.png", name))
    if not names:
        raise DataError(f"{part} holds no pictures: {part.stem}/<alphabet>/<character>/<drawing>.png are expected.")
    return {name: found[name] for name in names}


def _download(root: str) -> None:
    from torchvision.datasets import Omniglot as Download  # noqa: PLC0415 - takes a second, and is rarely needed

    try:
        for background in (True, False):
            Download(root, background=background, download=True)
    except Exception as error:  # whatever goes wrong between here and the server, the user can do the same about it
        raise DataError(
            f"Omniglot could not be fetched into data.root ({root}): {error}. Fetch {PARTS[0]}.zip and {PARTS[1]}.zip "
            "from https://github.com/brendenlake/omniglot (folder python) by hand, and put them there."
        ) from None
