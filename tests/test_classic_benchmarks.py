"""The classic benchmarks, from files of the forms that they are published in: few and small ones, made here.

The real ones cannot be fetched where these tests must run.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

from data_modules import CIFARFS, FC100, MiniImageNet, TieredImageNet
from data_modules.cifar100 import CIFAR_FS, FC100_SUPERCLASSES
from data_modules.classic_benchmark import Benchmark
from data_modules.reading.plain_pickle import read_plain
from dmaml_pl.cli.run import run
from dmaml_pl.errors import DataError
from dmaml_pl.tasks import check_tasks

SPLITS = ("train", "val", "test")
CLASSES, SAMPLES = 6, 3
LONG = {"train": "train", "val": "validation", "test": "test"}

# The superclasses of CIFAR-100 in the order of their numbers, and of each its classes.
CIFAR_100 = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


def pixels(split: str, label: int, sample: int, size: int) -> np.ndarray:
    """(H, W, 3), whose corner tells split, class and sample."""
    image = np.full((size, size, 3), 100, dtype=np.uint8)
    image[0, 0] = SPLITS.index(split), label, sample
    return image


def every(split: str, size: int) -> list[np.ndarray]:
    """Sample after sample, the classes mixed."""
    return [pixels(split, label, sample, size) for sample in range(SAMPLES) for label in range(CLASSES)]


def dump(content: Any, path: Path, protocol: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def mini_pickles(root: Path) -> None:
    for split in SPLITS:
        classes = {f"n{label:08}": list(range(label, CLASSES * SAMPLES, CLASSES)) for label in range(CLASSES)}
        content = {"image_data": np.stack(every(split, 84)), "class_dict": classes}
        dump(content, root / f"mini-imagenet-cache-{LONG[split]}.pkl", protocol=2)


def mini_lists(root: Path, home: str = "images") -> None:
    for split in SPLITS:
        rows = ["filename,label"]
        for label in range(CLASSES):
            for sample in range(SAMPLES):
                name = f"{split}{label}{sample}.png"
                folder = root / home.format(label=f"{split}{label}", half="val" if sample else "train")
                save(pixels(split, label, sample, 84), folder / name)
                rows.append(f"{name},{split}{label}")
        (root / f"{split}.csv").write_text("\n".join(rows))


def folders(root: Path, size: int) -> None:
    for split in SPLITS:
        for label in range(CLASSES):
            for sample in range(SAMPLES):
                save(pixels(split, label, sample, size), root / split / f"{split}{label}" / f"{sample}.png")


def save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def tiered_pickles(root: Path) -> None:
    for split in SPLITS:
        encoded = []
        for image in every(split, 84):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "png")
            encoded.append(np.frombuffer(stream.getvalue(), dtype=np.uint8))
        labels = [label for _ in range(SAMPLES) for label in range(CLASSES)]
        dump(encoded, root / "tiered-imagenet" / f"{split}_images_png.pkl")
        dump({"label_specific": labels}, root / "tiered-imagenet" / f"{split}_labels.pkl")


def fc100_pickles(root: Path) -> None:
    for split in SPLITS:
        labels = [label for _ in range(SAMPLES) for label in range(CLASSES)]
        dump({"data": np.stack(every(split, 32)), "labels": labels}, root / f"FC100_{split}.pickle", protocol=2)


def cifar_100(root: Path) -> None:
    """As torchvision unpacks it: 100 classes, two samples of each in `train` and one in `test`."""
    names = sorted(" ".join(CIFAR_100.values()).split())
    upper = {name: number for number, names_in in enumerate(CIFAR_100.values()) for name in names_in.split()}
    folder = root / "cifar-100-python"
    dump({"fine_label_names": names, "coarse_label_names": list(CIFAR_100)}, folder / "meta", protocol=2)
    for half, samples in (("train", (0, 1)), ("test", (2,))):
        labels = [label for _ in samples for label in range(100)]
        images = np.stack([pixels("train", label, sample, 32) for sample in samples for label in range(100)])
        content = {
            "data": images.transpose(0, 3, 1, 2).reshape(len(labels), -1),
            "fine_labels": labels,
            "coarse_labels": [upper[names[label]] for label in labels],
        }
        dump(content, folder / half, protocol=2)


def cifar_fs_folders(root: Path) -> None:
    """As learn2learn unpacks it."""
    folder = root / "cifarfs" / "cifar100"
    lists = folder / "splits" / "bertinetto"
    lists.mkdir(parents=True)
    for split in SPLITS:
        (lists / f"{split}.txt").write_text("".join(f"{split}{label}\n" for label in range(CLASSES)))
        for label in range(CLASSES):
            for sample in range(SAMPLES):
                save(pixels(split, label, sample, 32), folder / "data" / f"{split}{label}" / f"{sample}.png")


Forms = list[tuple[type[Benchmark], Callable[[Path], None]]]
FORMS: Forms = [
    (MiniImageNet, mini_pickles),
    (MiniImageNet, mini_lists),
    # As for a classifier: pictures of every class in both folders.
    (MiniImageNet, lambda root: mini_lists(root, "{half}/{label}")),
    (MiniImageNet, lambda root: folders(root, 84)),
    (TieredImageNet, tiered_pickles),
    (TieredImageNet, lambda root: folders(root, 84)),
    (CIFARFS, cifar_fs_folders),
    (CIFARFS, lambda root: folders(root, 32)),
    (FC100, fc100_pickles),
    (FC100, lambda root: folders(root, 32)),
]


def benchmark(kind: type[Benchmark], root: Path, **settings: Any) -> Benchmark:
    return kind(root=str(root), cache_dir=str(root.parent / "cache"), **{"queries": 2, "meta_batch": 2, **settings})


@pytest.mark.parametrize(("kind", "make"), FORMS)
def test_every_form_gives_its_classes_and_samples_to_the_split_they_belong_to(
    kind: type[Benchmark], make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "root")
    data = benchmark(kind, tmp_path / "root")
    data.prepare_data()
    data.setup("fit")

    for number, split in enumerate(SPLITS):
        images = data.load_splits()[split]  # type: ignore[index]
        assert images.samples.tolist() == [SAMPLES] * CLASSES
        for label, start in enumerate(images.starts.tolist()):
            block = images.pixels[start : start + SAMPLES]
            assert block.shape == (SAMPLES, 3, data.size, data.size)
            assert block[:, :, 0, 0].tolist() == [[number, label, sample] for sample in range(SAMPLES)]
            assert (block[:, :, 1:] == 100).all()
    batch = data.sample(worker=0, run=0, iteration=0)
    check_tasks(batch)
    assert batch.support_x.shape == (2, 5, 3, data.size, data.size)


def test_cifar_100_becomes_cifar_fs_by_the_lists_of_its_paper(tmp_path: Path) -> None:
    cifar_100(tmp_path / "root")
    splits = benchmark(CIFARFS, tmp_path / "root").load_splits()

    assert {split: len(images.names) for split, images in splits.items()} == {"train": 64, "val": 16, "test": 20}
    assert splits["test"].names == sorted(CIFAR_FS["test"].split())
    names = sorted(" ".join(CIFAR_100.values()).split())
    for images in splits.values():
        for name, start in zip(images.names, images.starts.tolist(), strict=True):
            corner = images.pixels[start : start + SAMPLES, :, 0, 0].tolist()
            assert corner == [[0, names.index(name), sample] for sample in range(SAMPLES)]


def test_cifar_100_becomes_fc100_by_superclass(tmp_path: Path) -> None:
    cifar_100(tmp_path / "root")
    splits = benchmark(FC100, tmp_path / "root").load_splits()

    assert {split: len(images.names) for split, images in splits.items()} == {"train": 60, "val": 20, "test": 20}
    for split in ("val", "test"):
        members = " ".join(CIFAR_100[upper] for upper in FC100_SUPERCLASSES[split].split())
        assert splits[split].names == sorted(members.split())


# ---- download


@pytest.mark.parametrize(
    ("kind", "make", "expected"),
    [(MiniImageNet, mini_pickles, 3), (TieredImageNet, tiered_pickles, 6)],
)
def test_download_fetches_each_file_once_and_goes_on_where_it_stopped(
    kind: type[Benchmark],
    make: Callable[[Path], None],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path / "server")
    asked = []

    def fetch(url: str, folder: str, filename: str) -> None:
        name = url.rpartition("/")[2]
        asked.append(name)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (found,) = [each for each in (tmp_path / "server").rglob("*.pkl") if name.endswith(each.name)]
        (Path(folder) / filename).write_bytes(found.read_bytes()[: 10 if len(asked) == 2 else None])
        if len(asked) == 2:
            raise URLError("connection lost")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fetch)
    data = benchmark(kind, tmp_path / "root", download=True)
    with pytest.raises(DataError, match=r"could not be fetched into data\.root .*connection lost.*by hand: "):
        data.prepare_data()
    data.prepare_data()
    data.prepare_data()

    assert len(asked) == expected + 1
    assert len(set(asked)) == expected


@pytest.mark.parametrize("kind", [CIFARFS, FC100])
def test_cifar_100_is_fetched_by_torchvision_and_checked(
    kind: type[Benchmark], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        assert url.endswith("cifar-100-python.tar.gz")
        assert len(md5) == 32
        cifar_100(Path(root))

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    data = benchmark(kind, tmp_path / "root", download=True)
    data.prepare_data()
    data.prepare_data()


# ---- mistakes


@pytest.mark.parametrize("kind", [MiniImageNet, TieredImageNet, CIFARFS, FC100])
def test_a_root_without_the_data_set_says_what_belongs_there_and_how_to_get_it(
    kind: type[Benchmark], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        benchmark(kind, tmp_path / "none").prepare_data()

    message = str(caught.value)
    for part in (f"data.root ({tmp_path / 'none'})", kind.title, kind.expected, "--data.download true"):
        assert part in message
    assert "\n" not in message


def test_an_incomplete_data_set_is_one_that_is_not_there(tmp_path: Path) -> None:
    mini_pickles(tmp_path / "root")
    (tmp_path / "root" / "mini-imagenet-cache-test.pkl").unlink()

    with pytest.raises(DataError, match=r"does not hold mini-ImageNet"):
        benchmark(MiniImageNet, tmp_path / "root").prepare_data()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged, or no such data set"),
        (b"<html>404</html>", "is damaged, or no such data set"),
        (pickle.dumps([1, 2]), "does not hold what it should"),
        (pickle.dumps({"image_data": np.zeros((2, 9, 9, 3), "u1"), "class_dict": {"a": [0]}}), "does not hold what it"),
        (pickle.dumps({"image_data": np.zeros((2, 84, 84, 3), "u1"), "class_dict": {"a": [2]}}), "does not hold what"),
    ],
)
def test_a_damaged_pickle_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    mini_pickles(tmp_path / "root")
    (tmp_path / "root" / "mini-imagenet-cache-train.pkl").write_bytes(content)

    with pytest.raises(DataError, match=rf"mini-imagenet-cache-train\.pkl {message}"):
        benchmark(MiniImageNet, tmp_path / "root").prepare_data()


class Attack:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    mini_pickles(tmp_path / "root")
    dump(Attack(tmp_path / "attacked"), tmp_path / "root" / "mini-imagenet-cache-train.pkl")

    with pytest.raises(DataError, match=r"train\.pkl asks for \w+\.mkdir to be run, .* is not read"):
        benchmark(MiniImageNet, tmp_path / "root").prepare_data()
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_and_plain_values_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "a": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "b": [1, 2.5, None, True],
        "c": b"x",
        "d": np.int64(3),
    }
    dump(content, tmp_path / "p", protocol)

    read = read_plain(tmp_path / "p")

    assert np.array_equal(read["a"], content["a"])
    assert {name: read[name] for name in "bcd"} == {name: content[name] for name in "bcd"}


def test_a_pickle_of_an_older_numpy_is_read(tmp_path: Path) -> None:
    text = pickle.dumps(np.arange(3, dtype=np.uint8), protocol=2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "p").write_bytes(text)

    assert read_plain(tmp_path / "p").tolist() == [0, 1, 2]


# ---- the configs


@pytest.mark.parametrize(
    ("name", "make", "size"),
    [
        ("mini_imagenet", mini_pickles, 84),
        ("tiered_imagenet", tiered_pickles, 84),
        ("cifar_fs", cifar_100, 32),
        ("fc100", cifar_100, 32),
    ],
)
def test_every_config_follows_the_paper_and_trains(
    name: str,
    make: Callable[[Path], None],
    size: int,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's call
    file = repository / "configs" / f"{name}.yaml"
    config = yaml.safe_load(file.read_text())
    model, network = (config["model"]["init_args"], config["model"]["init_args"]["network"]["init_args"])
    assert (network["channels"], network["image_size"], network["filters"]) == (3, size, 32)
    inner = model["algorithm"]["init_args"]
    assert (inner["inner_lr"], inner["inner_steps"], model["evaluation_steps"]) == (
        0.05,
        5,
        10,
    )  # of a mean loss, where the paper sums over 5 classes
    assert model["meta_optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}}
    assert (config["data"]["init_args"]["queries"], config["data"]["init_args"]["meta_batch"]) == (15, 4)
    assert (config["trainer"]["max_steps"], config["trainer"]["devices"]) == (60000, 1)
    make(tmp_path / "root")
    small = {
        "data.root": tmp_path / "root",
        "data.cache_dir": tmp_path / "cache",
        "data.queries": 1,
        "data.meta_batch": 1,
        "data.val_tasks": 1,
        "data.test_tasks": 1,
        "model.evaluation_steps": 1,
        "trainer.strategy.run_length": 1,
        "trainer.val_check_interval": 1,
        "trainer.max_steps": 1,
        "model.algorithm.inner_steps": 1,
        "report.baseline_budget": 0,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "false",
        "checkpoint.dirpath": tmp_path / "kept",
    }
    assert run(["fit", "--config", str(file), *(f"--{key}={value}" for key, value in small.items())]) == 0
    kept = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 1
    assert kept["shapes"] == {"sample": [3, size, size], "output": [5]}
