"""A worker that is lost stops the training in one line that says what can be done: real `dmaml fit` trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainings import Training, fit, of, same_weights

TASK_PARALLEL = ["--trainer.strategy=task_parallel", "--model.run_length=10"]


@pytest.mark.parametrize("strategy", [[], TASK_PARALLEL], ids=["dmaml", "task_parallel"])
def test_a_killed_worker_stops_the_training_in_one_line_and_the_same_command_goes_on_to_the_same_bits(
    strategy: list[str], undisturbed: Training, tmp_path: Path, sinusoid: str
) -> None:
    words = [*strategy, "--checkpoint.every_n_runs=1"]
    auto = ["--checkpoint.dirpath=kept", "--ckpt_path=auto"]
    disturb = {"at": [1, 4, 4], "send": "SIGKILL"}
    result = fit(tmp_path, sinusoid, *words, *auto, disturb=disturb)
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "dmaml: error" in line]
    assert "was killed by SIGKILL while run 3 was under way." in line
    assert "--ckpt_path last goes on from it, and so does auto" in line
    offered = "--trainer.strategy.elastic true (pip install 'dmaml_pl[elastic]')" in line
    assert offered == (strategy != TASK_PARALLEL), "what this strategy does not have is not offered"
    again = fit(tmp_path, sinusoid, *words, *auto, disturb=disturb)
    assert again.returncode == 0, again.stderr
    if strategy == TASK_PARALLEL:
        (folder := tmp_path / "undisturbed").mkdir()
        assert fit(folder, sinusoid, *words).returncode == 0
        undisturbed = of(folder)
    kept = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert kept["runs"]["done"] == 6
    assert same_weights(kept, undisturbed.checkpoint("last"))
