"""mini-ImageNet (Vinyals et al. 2016, arXiv:1606.04080), in the split of Ravi and Larochelle (2017)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_modules.classic_benchmark import MODES, ZENODO, Benchmark, Packed, broken, fetch_file
from data_modules.reading.cache import Sample
from data_modules.reading.plain_pickle import read_plain


class MiniImageNet(Benchmark):
    """mini-ImageNet: 84x84 in colour; 64, 16 and 20 classes of 600 for meta-training, validation and meta-testing.

    `root` holds one of these, looked for in this order:

    - learn2learn's `mini-imagenet-cache-train.pkl`, `-validation.pkl` and `-test.pkl`, which `download` fetches;
    - Ravi and Larochelle's `train.csv`, `val.csv` and `test.csv`, and the pictures: in `images`, or sorted into any
      folders;
    - `train`, `val` and `test`, in each of them a folder of pictures a class.

    Pictures of another size are squeezed to 84x84, as in the MAML paper's code. The arguments are those of `Benchmark`.

    Examples:
        >>> MiniImageNet(root="data/mini-imagenet", shots=5).shots
        5
    """

    title = "mini-ImageNet"
    size = 84
    expected = (
        "learn2learn's mini-imagenet-cache-train.pkl, -validation.pkl and -test.pkl, or train.csv, val.csv and "
        "test.csv with the pictures in any folders, or train, val and test with class folders"
    )

    def find(self, root: Path) -> Packed | tuple[Path, Path] | None:
        """learn2learn's pickles, or pictures with Ravi and Larochelle's lists."""
        files = _pickles(root)
        if all(file.is_file() for file in files):
            return Packed(files, lambda: _samples(files))
        return (root, root) if (root / "train.csv").is_file() else None

    def fetch(self, root: Path) -> None:
        """learn2learn's pickles."""
        for file in _pickles(root):
            if not file.is_file():
                fetch_file(f"{ZENODO}/{file.name}", file)


def _pickles(root: Path) -> list[Path]:
    return [root / f"mini-imagenet-cache-{mode}.pkl" for mode in MODES.values()]


def _samples(files: list[Path]) -> Iterator[Sample]:
    for split, file in zip(MODES, files, strict=True):
        content = read_plain(file)
        try:
            images, classes = content["image_data"], content["class_dict"]
            for name in sorted(classes):
                for row in classes[name]:
                    yield split, str(name), np.ascontiguousarray(images[row].transpose(2, 0, 1).reshape(3, 84, 84))
        except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            raise broken(file, error) from error
