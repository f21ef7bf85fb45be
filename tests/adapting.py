"""Checkpoints of tiny trainings, and a user's own pictures and numbers, for the tests of `dmaml adapt`."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from data_modules import Glyphs, Sinusoid
from data_modules.glyphs import load_fonts
from dmaml_pl.adapting.learner import FewShotLearner
from dmaml_pl.cli.run import run
from dmaml_pl.tasks import TaskBatch
from tests.trainings import lay_store

NAMES = ("ayb", "ben", "gan", "don", "en")
LETTERS = "ԱԲგდე"
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "strategy": {"class_path": "dmaml_pl.DMAMLStrategy", "init_args": {"run_length": 2}},
    "max_steps": 4,
    "enable_progress_bar": False,
    "logger": {"class_path": "dmaml_pl.MLflowTracker", "init_args": {"system_metrics": False}},
}
FEW = {"meta_batch": 1, "val_tasks": 2, "test_tasks": 2}
SINES: dict[str, Any] = {
    "data": {"class_path": "data_modules.Sinusoid", "init_args": FEW},
    "model": {
        "class_path": "dmaml_pl.MetaLearning",
        "init_args": {
            "network": {"class_path": "dmaml_pl.networks.MLP", "init_args": {"hidden": [8, 8]}},
            "algorithm": {"class_path": "dmaml_pl.MAML", "init_args": {"inner_steps": 2}},
            "evaluation_steps": 3,
            "meta_schedule": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}},
        },
    },
    "trainer": TRAINER,
    "meta_test": False,
}
LETTERS_SEEN: dict[str, Any] = SINES | {
    "data": {"class_path": "data_modules.Glyphs", "init_args": FEW | {"queries": 2}},
    "model": {
        "class_path": "dmaml_pl.MetaLearning",
        "init_args": {
            "objective": "classification",
            "network": {"class_path": "dmaml_pl.networks.Conv4", "init_args": {"filters": 4}},
            "algorithm": {"class_path": "dmaml_pl.MAML", "init_args": {"inner_lr": 0.4}},
            "evaluation_steps": 2,
        },
    },
}


def train(folder: Path, config: dict[str, Any], *words: str) -> Path:
    """`dmaml fit` in this process; the checkpoint."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    lay_store(folder)
    errors = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's call
        assert run(["fit", "--config", str(file), "--checkpoint.dirpath", "kept", *words]) == 0, errors.getvalue()
    assert errors.getvalue() == "", "nobody asked for what a library has to tell"
    return folder / "kept" / "best.ckpt"


def draw(letter: str, face: int, file: Path) -> None:
    """Dark ink on yellow paper, higher than wide."""
    picture = Image.new("RGB", (100, 130), (250, 245, 225))
    font = load_fonts()[face].font_variant(size=80)
    ImageDraw.Draw(picture).text((25, 15), letter, font=font, fill=(20, 20, 90))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def draw_folders(folder: Path, faces: dict[str, int], names: tuple[str, ...] = NAMES) -> Path:
    """A folder with one folder a class, and in each the pictures of some type faces."""
    for name, letter in zip(names, LETTERS, strict=True):
        for file, face in faces.items():
            draw(letter, face, folder / name / file)
    return folder


def first_task(data: Glyphs | Sinusoid) -> TaskBatch:
    data.prepare_data()
    data.setup("test")
    return data.evaluation_task("test", 0)


def last_predictions(learner: FewShotLearner, task: TaskBatch) -> torch.Tensor:
    """What the training's own code predicts after the last step of evaluation."""
    batch = task._replace(numbers=None).map(lambda tensor: tensor.unsqueeze(0))
    return learner.module.predict_step(batch)[0, -1].detach()
