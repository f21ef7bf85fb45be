"""How long it takes to sample a meta-batch of image tasks, beside learn2learn's Taskset.

Tasks are 5-way 1-shot with 15 queries a class, of Glyphs and, where its folder is given, of Omniglot. Everybody begins
with uint8 images in memory and ends with float32 support and query sets of the whole meta-batch, on the CPU. All take
turns in one process, with one thread, as a worker often has; every meta-batch has other tasks. A turn is a row of
meta-batches, as in the other parts of the benchmark, or a single one: then everything else has been in the caches in
between, as in a training of a large network. What counts is the thread's CPU time, in the best turn, because whatever
else the machine does only adds to it. The process is a fresh one, as that of a training is: after the benchmark's other
parts a memory page costs more.

python -m benchmarks.speed.sampling [OMNIGLOT_FOLDER]

Legend: T tasks of a meta-batch, N ways, K shots, Q queries a class, H W image axes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.speed.alone import alone
from data_modules import Glyphs, Omniglot
from data_modules.images import ImageTasks
from data_modules.samplers import SamplerName
from dmaml_pl import _learn2learn
from dmaml_pl.tasks import TaskBatch

META_BATCHES = (16, 25)
REFERENCE = "learn2learn's Taskset"
TURNS = {"in a row": 10, "one": 1}
REPEATS = 25

Sample = Callable[[int], TaskBatch]
"""From the number of the repetition to a meta-batch."""


def measure(omniglot: Path | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Time every peer on every meta-batch, in a process of its own.

    Args:
        omniglot: its folder, as data.root; None leaves Omniglot out.

    Returns:
        seconds by meta-batch, kind of turn and peer.
    """
    found: dict[str, dict[str, dict[str, float]]] = alone(
        "benchmarks.speed.sampling", *([str(omniglot.resolve())] if omniglot else [])
    )
    return found


def main(omniglot: str | None = None) -> None:
    """Print the seconds of everyone, by meta-batch and kind of turn."""
    torch.set_num_threads(1)
    seconds = {}
    for tasks in META_BATCHES:
        settings: dict[str, Any] = {"ways": 5, "shots": 1, "queries": 15, "meta_batch": tasks, "seed": 0}
        found: list[tuple[type[ImageTasks], dict[str, Any]]] = [(Glyphs, settings)]
        if omniglot is not None:
            found.append((Omniglot, settings | {"root": omniglot}))
        for kind, own in found:
            ways_to_sample = peers(kind, own)
            seconds[f"{tasks} tasks of {kind.__name__}"] = {
                name: best_of(ways_to_sample, meta_batches) for name, meta_batches in TURNS.items()
            }
    print(json.dumps(seconds))


def best_of(peers: dict[str, Sample], meta_batches: int) -> dict[str, float]:
    """CPU seconds of a meta-batch in each one's fastest turn, which has so many of them."""
    best = dict.fromkeys(peers, float("inf"))
    for turn in range(REPEATS):
        for name, sample in peers.items():
            if meta_batches > 1:
                sample(0)  # with caches of one's own
            began = time.thread_time()
            for number in range(meta_batches):
                sample(turn * meta_batches + number)
            best[name] = min(best[name], (time.thread_time() - began) / meta_batches)
    return best


def peers(kind: type[ImageTasks], settings: dict[str, Any]) -> dict[str, Sample]:
    """All ways to sample that are measured, by name; checked to give equal shapes and types."""

    def ours(sampler: SamplerName) -> tuple[Sample, ImageTasks]:
        data = kind(**settings, sampler=sampler)
        data.prepare_data()
        data.setup("fit")
        return lambda number: data.sample(worker=0, run=0, iteration=number), data

    batched, data = ours("batched")
    images = data.load_splits()["train"]
    assert isinstance(images, Tensor)  # noqa: S101 - all classes of these have equally many samples
    found = {
        REFERENCE: by_taskset(data, images, fused=False, converted="each"),
        "the same with FusedNWaysKShots": by_taskset(data, images, fused=True, converted="each"),
        "the same, converting all images at once": by_taskset(data, images, fused=True, converted="together"),
        "dmaml_pl, `sampler: learn2learn`": ours("learn2learn")[0],
        "dmaml_pl, `sampler: batched`": batched,
    }
    forms = {name: [(part.shape, part.dtype) for part in sample(0).tensors()] for name, sample in found.items()}
    if any(form != forms[REFERENCE] for form in forms.values()):
        raise AssertionError(f"what is sampled differs: {forms}")
    return found


class Images(Dataset[tuple[Tensor, int]]):
    """One item a sample, as learn2learn expects: the image (1, H, W) and its class.

    Args:
        images: uint8 (classes, samples, 1, H, W).
        to_float: whether every item is converted, as torchvision's ToTensor does.
    """

    def __init__(self, images: Tensor, *, to_float: bool) -> None:
        self.samples = images.shape[1]
        self.pixels = images.flatten(0, 1)
        self.to_float = to_float

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pixels[index]
        return image.float().div_(255) if self.to_float else image, index // self.samples


def by_taskset(data: ImageTasks, images: Tensor, *, fused: bool, converted: str) -> Sample:
    """A meta-batch by learn2learn's own means, one task after another.

    Args:
        data: whose settings the tasks have.
        images: uint8 (classes, samples, 1, H, W).
        fused: choose classes and samples by FusedNWaysKShots rather than by NWays and KShots.
        converted: "each" image by the dataset, or all of the meta-batch "together".
    """
    learn2learn = _learn2learn.load().data
    transforms = learn2learn.transforms
    classes, samples = images.shape[:2]
    ways, per_class = data.ways, data.shots + data.queries
    dataset = learn2learn.MetaDataset(
        Images(images, to_float=converted == "each"),
        labels_to_indices={label: list(range(label * samples, (label + 1) * samples)) for label in range(classes)},
    )
    choose = (
        [transforms.FusedNWaysKShots(dataset, n=ways, k=per_class)]
        if fused
        else [transforms.NWays(dataset, n=ways), transforms.KShots(dataset, k=per_class)]
    )
    finish = [transforms.LoadData(dataset), transforms.RemapLabels(dataset), transforms.ConsecutiveLabels(dataset)]
    taskset = learn2learn.Taskset(dataset, task_transforms=choose + finish, num_tasks=-1)

    def sample(_: int) -> TaskBatch:
        tasks = [taskset.sample() for _ in range(data.meta_batch)]
        x = torch.stack([images for images, _ in tasks])
        x = x if converted == "each" else x.float().mul_(1 / 255)
        x = x.unflatten(1, (ways, per_class))  # ConsecutiveLabels has put each class's samples together
        y = torch.stack([labels for _, labels in tasks]).unflatten(1, (ways, per_class))
        support, query = slice(None, data.shots), slice(data.shots, None)
        return TaskBatch.of(*(part[:, :, which].flatten(1, 2) for which in (support, query) for part in (x, y)))

    return sample


if __name__ == "__main__":
    main(*sys.argv[1:])
