"""What tests of mistakes share: small configurations, and the command that must refuse them in one line."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmaml_pl.cli.run import run
from tests.adapting import TRAINER

# Small, should a test fail to produce its error.
SINUSOID: dict[str, Any] = {
    "seed_everything": 0,
    "data": {"class_path": "data_modules.Sinusoid", "init_args": {"meta_batch": 2, "val_tasks": 4, "test_tasks": 4}},
    "model": {
        "class_path": "dmaml_pl.MetaLearning",
        "init_args": {
            "objective": "regression",
            "network": {"class_path": "dmaml_pl.networks.MLP", "init_args": {"hidden": [8, 8]}},
            "algorithm": {"class_path": "dmaml_pl.MAML", "init_args": {"inner_lr": 0.01}},
            "meta_optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.003}},
        },
    },
    "trainer": TRAINER | {"max_steps": 1},
    "checkpoint": {"monitor": "val/loss", "mode": "min"},
    "meta_test": False,
}
GLYPHS: dict[str, Any] = SINUSOID | {
    "data": {
        "class_path": "data_modules.Glyphs",
        "init_args": {"ways": 5, "shots": 1, "queries": 5, "meta_batch": 2, "val_tasks": 4, "test_tasks": 4},
    },
    "model": {
        "class_path": "dmaml_pl.MetaLearning",
        "init_args": {
            "objective": "classification",
            "network": {"class_path": "dmaml_pl.networks.Conv4", "init_args": {"ways": 5, "filters": 4}},
        },
    },
    "checkpoint": {"monitor": "val/accuracy", "mode": "max"},
}
OMNIGLOT: dict[str, Any] = GLYPHS | {
    "data": {
        "class_path": "data_modules.Omniglot",
        "init_args": {"root": "omniglot", "ways": 2, "shots": 1, "queries": 1, "train_classes": 6, "val_classes": 3},
    }
}
VIT = {"image_size": 8, "patch_size": 8, "num_layers": 1, "num_heads": 1, "hidden_dim": 2, "mlp_dim": 2}
DATA, MODEL, STRATEGY, LOGGER = (
    f"{name}.init_args" for name in ("data", "model", "trainer.strategy", "trainer.logger")
)
INNER = f"{MODEL}.algorithm.init_args"

Refusal = Callable[..., str]


@pytest.fixture(autouse=True)
def as_the_user_left_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each command line has a process of its own; what it puts into the environment goes with it."""
    monkeypatch.setattr(tempfile, "tempdir", str(Path.cwd()))  # where tracebacks are kept
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(name="refusal")
def make_refusal(capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Run a command that must be refused; returns the message, which is all that the user hears."""

    def refuse(*words: str, config: dict[str, Any] | None = None) -> str:
        if config is not None:
            Path("a.yaml").write_text(yaml.safe_dump(config))
            command, settings = ("fit", words) if not words or words[0].startswith("-") else (words[0], words[1:])
            words = (command, "--config", "a.yaml", *settings)
        before = set(Path.cwd().rglob("*.ckpt"))
        assert run(list(words)) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("dmaml: error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert set(Path.cwd().rglob("*.ckpt")) == before, "nothing was trained"
        return err.removeprefix("dmaml: error: ").removesuffix("\n")

    return refuse


def changed(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration with `a.b.c` set; a `~` before a name renames the setting to the value instead."""
    config = copy.deepcopy(config)
    for path, value in settings.items():
        *groups, name = path.lstrip("~").split(".")
        group = config
        for key in groups:
            group = group.setdefault(key, {})
        if path.startswith("~"):
            group[value] = group.pop(name)
        else:
            group[name] = value
    return config
