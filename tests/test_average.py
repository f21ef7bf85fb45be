"""The average of merged weights that validation judges, in real trainings."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dmaml_pl import DMAMLStrategy, MergedAverage
from dmaml_pl.errors import ConfigError
from tests.recipes import Recorder, same, small_data, small_maml, small_trainer, state_of
from tests.workers import in_workers


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.02)


class SeenByValidation(Recorder):
    """Keeps what validation judges, beside what the merges gave."""

    def __init__(self) -> None:
        super().__init__()
        self.judged: list[dict[str, torch.Tensor]] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.judged.append(state_of(pl_module))


def _train(folder: Path, stop: int, ckpt: Path | None = None, decay: float = 0.6) -> Any:
    torch.set_num_threads(1)
    recorder = SeenByValidation()
    module = small_maml(meta_optimizer=sgd)
    trainer = small_trainer(
        devices=2,
        strategy=DMAMLStrategy(run_length=3),
        max_steps=stop,
        callbacks=[recorder, MergedAverage(decay)],
        limit_val_batches=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    module.on_train_end = lambda: trainer.save_checkpoint(folder / f"{stop}.ckpt")  # type: ignore[method-assign]
    trainer.fit(module, small_data(), ckpt_path=ckpt)
    return recorder.states, recorder.judged, state_of(module)


def test_validation_judges_the_exponential_average_of_merged_weights_and_training_goes_on_from_the_last(
    tmp_path: Path,
) -> None:
    (merged, judged, end), (others, _, other_end) = in_workers(_train, 2, tmp_path, 15)
    average = merged[0]
    for state, seen in zip(merged, judged, strict=True):
        average = {name: 0.6 * average[name] + 0.4 * value for name, value in state.items()}
        for name, value in seen.items():
            assert torch.allclose(value, average[name], atol=1e-6), name
    assert not same(judged[-1], merged[-1])
    assert same(end, judged[-1])
    assert same(end, other_end)
    for mine, other in zip(merged, others, strict=True):
        assert same(mine, other)


def test_without_decay_the_average_is_the_last_merge(tmp_path: Path) -> None:
    (merged, judged, _), _ = in_workers(_train, 2, tmp_path, 9, None, 0.0)
    for state, seen in zip(merged, judged, strict=True):
        assert same(state, seen)


def test_a_resumed_training_goes_on_from_both_sets_of_weights_to_the_bit(tmp_path: Path) -> None:
    (straight, judged, _), _ = in_workers(_train, 2, tmp_path, 15)
    in_workers(_train, 2, tmp_path, 9)
    (resumed, judged_then, _), _ = in_workers(_train, 2, tmp_path, 15, tmp_path / "9.ckpt")
    assert same(resumed[-1], straight[-1])
    assert same(judged_then[-1], judged[-1])


def test_an_average_is_steadier_than_what_it_averages(tmp_path: Path) -> None:
    (merged, judged, _), _ = in_workers(_train, 2, tmp_path, 90, None, 0.8)

    def unrest(states: list[dict[str, torch.Tensor]]) -> float:
        ways = [
            torch.cat([(after[name] - before[name]).reshape(-1) for name in after])
            for before, after in pairwise(states[10:])
        ]
        return float(torch.stack(ways).norm(dim=1).mean())

    assert unrest(judged) < 0.7 * unrest(merged)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_named(decay: float) -> None:
    with pytest.raises(ConfigError, match=rf"MergedAverage's decay is {decay}, but must be at least 0 and below 1"):
        MergedAverage(decay)
