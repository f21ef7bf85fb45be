"""Checkpoints of version 0.1, whose network stood inside learn2learn's wrapper, and whose module was named MAML."""

from __future__ import annotations

from pathlib import Path

import torch

import dmaml_pl
from tests.trainings import dmaml, flags

PREDICTED = [-0.18184700, -0.25552136, -0.29932919, -0.33676225, -0.36791998]
"""What version 0.1 itself predicted."""

KEPT = Path(__file__).parent / "fixtures" / "version-0.1.ckpt"
SETTINGS = {
    "trainer.devices": 1,
    "model.network.hidden": "[4,4]",
    "model.algorithm.inner_lr": 0.02,
    "model.algorithm.inner_steps": 2,
    "trainer.max_steps": 12,
    "trainer.strategy.run_length": 4,
    "trainer.val_check_interval": 1,
    "data.val_tasks": 5,
    "data.test_tasks": 5,
    "data.meta_batch": 2,
    "meta_test": "false",
    "trainer.logger": "false",
}


def test_it_is_loaded_and_adapts_as_it_did() -> None:
    x = torch.linspace(-1, 1, 5).unsqueeze(1)
    learner = dmaml_pl.load(KEPT)
    assert learner.steps == 2
    torch.testing.assert_close(learner.adapt(x, x * 0.5).predict(x).flatten(), torch.tensor(PREDICTED))


def test_a_training_goes_on_from_it(repository: Path, tmp_path: Path) -> None:
    config = str(repository / "configs" / "sinusoid.yaml")
    ended = dmaml(tmp_path, "fit", "--config", config, "--ckpt_path", str(KEPT), *flags(SETTINGS))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (last,) = tmp_path.rglob("last.ckpt")
    kept = torch.load(last, weights_only=True)
    assert kept["global_step"] == 12
    assert kept["runs"]["done"] == 3
    assert all(name.startswith("learner.network.") for name in kept["state_dict"])


def test_with_another_network_it_is_refused_in_one_line(repository: Path, tmp_path: Path) -> None:
    config = str(repository / "configs" / "sinusoid.yaml")
    settings = SETTINGS | {"model.network.hidden": "[5,4]"}
    ended = dmaml(tmp_path, "fit", "--config", config, "--ckpt_path", str(KEPT), *flags(settings))
    assert ended.returncode == 1
    assert "was made for another network: learner.network.layers.0.weight is (4, 1)" in ended.stderr
