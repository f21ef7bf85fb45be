"""The convolutional networks: their shapes, what they compute, and that every engine runs them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmaml_pl import MAML, Conv4, ResNet12
from dmaml_pl.engines import EngineChoice, EngineName
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import Samples, TaskBatch
from tests.recipes import same

OF_MAML: dict[str, Any] = {"normalization": "batch_shift", "pooling": "stride", "initialization": "maml"}


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def strided() -> Conv4:
    torch.manual_seed(0)
    return Conv4(filters=4, **OF_MAML)


def test_the_strided_conv4_is_what_the_maml_papers_code_computes_written_out() -> None:
    network, x = strided(), images(6, 1, 28, 28)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    weights, out = dict(network.named_parameters()), x
    for number in (0, 3, 6, 9):
        out = F.conv2d(out, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], 2, 1)
        mean, var = out.mean((0, 2, 3), keepdim=True), out.var((0, 2, 3), correction=0, keepdim=True)
        shift = weights[f"features.{number + 1}.bias"].view(-1, 1, 1)
        out = ((out - mean) / (var + 0.001).sqrt() + shift).relu()
    assert out.shape == (6, 4, 2, 2)
    torch.testing.assert_close(network(x), F.linear(out.mean((2, 3)), weights["head.weight"], weights["head.bias"]))


def test_its_batch_norm_has_no_scale_to_learn_to_keep_or_to_merge() -> None:
    network = strided()
    names = ["features.0.weight", "features.0.bias", "features.1.bias"]
    assert [name for name, _ in network.named_parameters()][:3] == names
    assert list(network.state_dict())[:3] == names
    assert same(dict(network.named_buffers()), {f"features.{n}.weight": torch.ones(4) for n in (1, 4, 7, 10)})


def test_its_head_starts_at_the_normal_distribution_and_its_biases_at_zero() -> None:
    torch.manual_seed(0)
    network = Conv4(ways=20, filters=64, **OF_MAML).requires_grad_(False)
    assert float(network.head.weight.std()) == pytest.approx(1, abs=0.05)
    assert all(not weight.any() for name, weight in network.named_parameters() if name.endswith("bias"))
    limit = (6 / (9 * 64 + 9 * 64)) ** 0.5
    assert 0.95 * limit < float(dict(network.named_parameters())["features.3.weight"].abs().max()) <= limit
    pooled = Conv4(ways=20, filters=64, initialization="maml").requires_grad_(False)
    assert float(pooled.head.weight.abs().max()) <= (6 / (64 + 20)) ** 0.5


def test_names_of_the_pooled_conv4_are_those_of_old_checkpoints() -> None:
    layers = [f"features.{number}.{kind}" for number in (0, 1, 4, 5, 8, 9, 12, 13) for kind in ("weight", "bias")]
    assert list(Conv4(filters=4).state_dict()) == [*layers, "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "mean"}, "model.network.pooling is mean, but must be max or stride"),
        ({"normalization": "layer"}, "model.network.normalization is layer, but must be batch or batch_shift or group"),
        ({"initialization": "zero"}, "model.network.initialization is zero, but must be pytorch or maml"),
    ],
)
def test_a_setting_that_cannot_work_is_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Conv4(**settings)


def test_resnet12_has_the_parts_and_the_size_of_metaoptnets() -> None:
    network = ResNet12(ways=5)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    widths = [3, 64, 160, 320, 640]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        shape
        for before, width in pairwise(widths)
        for shape in ((before, width, 3), (width, width, 3), (width, width, 3), (before, width, 1))
    ]
    assert sum(p.numel() for p in network.blocks.parameters()) == 12_424_320
    assert network.embed(images(2, 3, 84, 84)).shape == (2, 640)


def test_a_block_of_resnet12_is_its_formula() -> None:
    torch.manual_seed(0)
    block, x = ResNet12(widths=[4, 4, 4, 4], channels=2).blocks[0], images(3, 2, 16, 16)
    weights = [w for name, w in block.named_parameters() if w.ndim == 4]

    def norm(z: Tensor) -> Tensor:
        return F.batch_norm(z, None, None, training=True)

    out = F.leaky_relu(norm(F.conv2d(x, weights[0], padding=1)), 0.1)
    out = F.leaky_relu(norm(F.conv2d(out, weights[1], padding=1)), 0.1)
    out = norm(F.conv2d(out, weights[2], padding=1)) + norm(F.conv2d(x, weights[3]))
    torch.testing.assert_close(block(x), F.max_pool2d(F.leaky_relu(out, 0.1), 2))


@pytest.mark.parametrize("widths", [[64, 64, 64], [64, 0, 64, 64]])
def test_widths_that_cannot_work_are_refused(widths: list[int]) -> None:
    with pytest.raises(ConfigError, match=re.escape("model.network.widths")):
        ResNet12(widths=widths)


@pytest.mark.parametrize("network", [strided(), ResNet12(channels=1, widths=[4, 4, 8, 8])])
def test_every_engine_gives_the_same_meta_gradient(network: nn.Module) -> None:
    x, y = images(2, 10, 1, 28, 28).double(), torch.arange(5).repeat(2, 2)
    batch, objective = TaskBatch((Samples(x, y),), Samples(x.flip(3), y)), objective_of("classification")
    learner, found = MetaLearner(network.double(), MAML(inner_lr=0.1, inner_steps=2)), []
    names: list[EngineName] = ["learn2learn", "per_task", "vectorized"]
    for name in names:
        learner.zero_grad()
        EngineChoice(name, objective).for_training(learner, batch).meta_gradient(learner, batch)
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == {name for name, _ in network.named_parameters()}
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(found[2], found[0], rtol=1e-8, atol=1e-11)
