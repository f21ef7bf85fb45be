"""Omniglot (Lake, Salakhutdinov and Tenenbaum 2015): 1,623 hand-written characters of 50 alphabets, 20 times each."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_modules.cache import Arrays, cache_folder, load_or_make
from data_modules.images import ImageTasks
from data_modules.pictures import Listing, list_pictures, read_ink, read_pictures
from data_modules.samplers import SamplerName
from dmaml_pl.checks import require_positive
from dmaml_pl.data import Split
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.tasks import derive_seed

PARTS = ("images_background", "images_evaluation")
SIZE = 28


class Omniglot(ImageTasks):
    """Omniglot as 28x28 images, in the split that is usual for few-shot learning.

    The characters of both parts are put together and dealt to the splits by chance: 1,100 for meta-training, 100 for
    validation, and the other 423 for meta-testing. With `rotations`, a character turned by 90, 180 or 270 degrees is a
    class of its own, in the split of its character, which makes 4,400, 400 and 1,692 classes.

    Args:
        root: folder with `images_background` and `images_evaluation`, as folders or as .zip files, or with the folder
            `omniglot-py` that torchvision makes.
        download: fetch the images into `root` if they are not there.
        ways: N, classes of a task.
        shots: K, support samples per class.
        queries: Q, query samples per class; at most 20 together with the shots.
        meta_batch: T, tasks in the meta-batch of one worker.
        rotations: whether characters turned by 90, 180 and 270 degrees are classes too, in every split.
        train_classes: characters for meta-training.
        val_classes: characters for validation; those that remain are for meta-testing.
        split_seed: seed of dealing the characters to the splits.
        runs_per_epoch: runs that Lightning counts as one epoch.
        val_tasks: validation tasks.
        test_tasks: tasks of a meta-test.
        seed: seed of the training tasks; by default that of `seed_everything`, or 0.
        evaluation_seed: seed of the validation and test tasks.
        sampler: "batched" draws all tasks of a meta-batch at once; "learn2learn", the reference, one after another
            through learn2learn's task transforms. From the same seed they draw other tasks of the same distribution.
        cache_dir: folder to keep the reduced images in; by default `$XDG_CACHE_HOME/dmaml_pl` or `~/.cache/dmaml_pl`.
    """

    def __init__(
        self,
        *,
        root: str = "data/omniglot",
        download: bool = False,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        meta_batch: int = 16,
        rotations: bool = True,
        train_classes: int = 1100,
        val_classes: int = 100,
        split_seed: int = 0,
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
        require_positive(**{"data.train_classes": train_classes, "data.val_classes": val_classes})
        self.root = root
        self.download = download
        self.rotations = rotations
        self.train_classes = train_classes
        self.val_classes = val_classes
        self.split_seed = split_seed
        self.cache_dir = cache_dir

    def prepare_data(self) -> None:
        """Download if asked to, and reduce the images, unless they are in the cache (once per machine)."""
        if self.download and _find_parts(Path(self.root)) is None:
            _download(self.root)
        self._characters()

    def read_sample(self, path: Path) -> Tensor:
        """A picture of a user's own, of any size, as a sample (1, 28, 28); see `data_modules.pictures.read_ink`."""
        return read_ink(path, SIZE)

    def load_splits(self) -> dict[Split, Tensor]:
        """The images of each split, uint8 (classes, 20, 28, 28), 255 where there is ink.

        Raises:
            ConfigError: no character is left for the test split.
            DataError: the images are missing or damaged.
        """
        arrays = self._characters()
        names, images = arrays["names"].tolist(), torch.from_numpy(arrays["images"])
        first_test = self.train_classes + self.val_classes
        if first_test >= len(names):
            raise ConfigError(
                f"data.train_classes + data.val_classes is {self.train_classes} + {self.val_classes}, but data.root "
                f"({self.root}) has {len(names)} characters, and the test split needs some of them."
            )
        # By a hash of each name: the same split on every machine, from folders as from .zip files.
        order = sorted(range(len(names)), key=lambda number: derive_seed("omniglot", self.split_seed, names[number]))
        dealt: dict[Split, list[int]] = {
            "train": order[: self.train_classes],
            "val": order[self.train_classes : first_test],
            "test": order[first_test:],
        }
        turns = range(4 if self.rotations else 1)
        return {
            split: torch.cat([images[numbers].rot90(turn, (2, 3)) for turn in turns])
            for split, numbers in dealt.items()
        }

    def _characters(self) -> Arrays:
        """Reduced images of all characters, uint8 (characters, 20, 28, 28), and the names of the characters."""
        parts = _find_parts(Path(self.root))
        if parts is None:
            raise DataError(
                f"data.root ({self.root}) does not hold Omniglot: {PARTS[0]} and {PARTS[1]} are expected in it, "
                "as folders or as .zip files. `--data.download true` fetches them."
            )
        listings = [list_pictures(part, depth=2) for part in parts]
        identity = hashlib.blake2b(repr((SIZE, listings, "version 1")).encode(), digest_size=8).hexdigest()
        path = cache_folder(self.cache_dir) / f"omniglot-{identity}.npz"
        return load_or_make(path, lambda: _read_characters(parts, listings))


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


def _read_characters(parts: list[Path], listings: list[Listing]) -> Arrays:
    names: list[str] = []
    images: list[np.ndarray] = []
    for part, listing in zip(parts, listings, strict=True):
        if not listing:
            raise DataError(f"{part} holds no pictures: {part.stem}/<alphabet>/<character>/<drawing>.png are expected.")
        drawings: dict[str, list[np.ndarray]] = defaultdict(list)
        for picture, image in zip(listing, read_pictures(part, list(listing), SIZE), strict=True):
            drawings[picture.rpartition("/")[0]].append(255 - image)  # ink is black in the files
        for name, drawn in drawings.items():
            names.append(name)
            images.append(np.stack(drawn))
            if len(images[-1]) != len(images[0]):
                raise DataError(f"{part}: {name} has {len(drawn)} drawings, but {names[0]} has {len(images[0])}.")
    return {"names": np.array(names), "images": np.stack(images)}


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
