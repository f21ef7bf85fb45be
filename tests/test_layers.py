"""Layers whose derivatives are written by hand: PyTorch's values, PyTorch's first and second derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dmaml_pl.engines.layers import batch_norm, use_faster_layers
from tests.test_vectorized import TIGHT

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def samples(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (x.contiguous(memory_format=layout) if x.ndim == 4 else x).requires_grad_()


def norm(channels: int = 3, weights: tuple[float, ...] = (0.5, 1.0, 2.0)) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, track_running_stats=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
        layer.bias.copy_(torch.linspace(-0.3, 0.4, channels))
    return layer


def with_faster_layers(network: nn.Module) -> nn.Module:
    """A copy."""
    copied = copy.deepcopy(network)
    use_faster_layers(copied)
    return copied


def made_of(network: nn.Module, x: Tensor) -> Callable[..., Tensor]:
    """The network as a function of its samples and parameters."""
    names = [name for name, _ in network.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        out: Tensor = functional_call(network, dict(zip(names, parameters, strict=True)), (x,))
        return out

    return function


def assert_same_derivatives(network: nn.Module, x: Tensor) -> Tensor:
    """Values, first and second derivatives of a network with and without faster layers; gives the values."""
    network = network.double()
    parameters = [p.detach().clone().requires_grad_() for p in network.parameters()]
    generator = torch.Generator().manual_seed(1)

    def like(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in tensors]

    outs = [made_of(each, x)(x, *parameters) for each in (network, with_faster_layers(network))]
    torch.testing.assert_close(outs[1], outs[0], **TIGHT)
    (g,) = like(outs[:1])
    g.requires_grad_()
    inputs = [x, *parameters]
    firsts = [torch.autograd.grad(out, inputs, g, create_graph=True) for out in outs]
    torch.testing.assert_close(firsts[1], firsts[0], **TIGHT)
    for only in [None, *range(len(inputs))]:
        following = like(list(firsts[0]))
        chosen = range(len(inputs)) if only is None else [only]
        seconds = [
            torch.autograd.grad(
                [first[i] for i in chosen],
                [g, *inputs],
                [following[i] for i in chosen],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for first in firsts
        ]
        torch.testing.assert_close(seconds[1], seconds[0], rtol=1e-9, atol=1e-11)
    return outs[1]


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (7, 3)])
@LAYOUTS
def test_batch_norms_derivatives_are_right(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    layer = with_faster_layers(kind(3, track_running_stats=False).double())
    parameters = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    function, x = made_of(layer, samples(*shape)), samples(*shape, layout=layout)
    assert "_BatchNorm" in str(function(x, *parameters).grad_fn)
    weight, bias = parameters
    expected = F.batch_norm(x, None, None, weight, bias, training=True)
    torch.testing.assert_close(function(x, *parameters), expected, **TIGHT)
    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize("weights", [(0.5, 1.0, 2.0), (0.0, -1.0, 2.0)])
def test_batch_norm_has_pytorchs_derivatives_for_any_weight(weights: tuple[float, ...]) -> None:
    assert_same_derivatives(norm(weights=weights), samples(4, 3, 6, 5))


def test_statistics_of_a_channel_that_varies_little_are_exact_in_float32_with_channels_last() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.01 * (torch.rand(20, 4, 28, 28, generator=generator) < 0.1).float()
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(4), torch.zeros(4)
    found = batch_norm._BatchNorm.apply(x, weight, bias, 1e-5)
    expected = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True, eps=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


def test_statistics_of_many_samples_are_those_of_all_of_them() -> None:
    x = torch.randn(30, 2, 100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, r = batch_norm.statistics(x, 1e-5)
    assert x.numel() > batch_norm._AT_ONCE
    variance, expected = torch.var_mean(x, dim=[0, 2, 3], correction=0)
    torch.testing.assert_close(torch.from_numpy(mean), expected)
    torch.testing.assert_close(torch.from_numpy(r), (variance + 1e-5).rsqrt())


@LAYOUTS
@pytest.mark.parametrize("weights", [(0.5, 1.0, 2.0), (0.5, -1.0, -2.0)], ids=["positive", "of both signs"])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d((3, 2), stride=(1, 2), ceil_mode=True),
        nn.MaxPool2d(2, stride=1, dilation=2),
    ],
    ids=str,
)
def test_batch_norm_relu_and_pooling_as_one_have_pytorchs_derivatives(
    pool: nn.MaxPool2d, weights: tuple[float, ...], layout: torch.memory_format
) -> None:
    network = nn.Sequential(norm(weights=weights), nn.ReLU(), pool)
    out = assert_same_derivatives(network, samples(4, 3, 7, 6, layout=layout))
    assert "_Block" in str(out.grad_fn)


def test_a_weight_of_zero_leaves_ties_to_pytorch() -> None:
    network = nn.Sequential(norm(weights=(0.5, 0.0, 1.0)), nn.ReLU(), nn.MaxPool2d(2))
    out = assert_same_derivatives(network, samples(4, 3, 6, 6))
    assert "_Block" not in str(out.grad_fn)


def test_what_is_not_finite_stays_so_and_warns_of_nothing() -> None:
    network = with_faster_layers(nn.Sequential(norm(), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(3)))
    x = torch.full((2, 3, 4, 4), 1e30).requires_grad_()
    x.data[0, 0, 0, 0] = float("inf")
    network(x).sum().backward()
    assert not x.grad.isfinite().all()  # type: ignore[union-attr]


def test_relu_and_pooling_give_the_same_in_the_order_that_is_less_work() -> None:
    out = assert_same_derivatives(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), samples(2, 3, 6, 5))
    assert "Relu" in str(out.grad_fn)


@LAYOUTS
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=2, bias=False),
        nn.Conv2d(4, 6, 3, dilation=2, padding=(2, 1)),
        nn.Conv2d(4, 6, 3, groups=2),
    ],
    ids=str,
)
def test_convolutions_have_pytorchs_derivatives(layer: nn.Conv2d, layout: torch.memory_format) -> None:
    out = assert_same_derivatives(layer, samples(3, 4, 7, 6, layout=layout))
    assert "_Convolution" in str(out.grad_fn)


def test_a_convolution_of_samples_without_gradients_has_pytorchs_derivatives() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 3)).double()
    faster, x = with_faster_layers(network), samples(3, 1, 8, 8).detach()
    found = []
    for each in (network, faster):
        parameters = list(each.parameters())
        first = torch.autograd.grad(each(x).square().sum(), parameters, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))  # type: ignore[arg-type]
    torch.testing.assert_close(found[1], found[0], **TIGHT)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 2, 3, padding="same"), nn.Conv2d(1, 2, 3, padding_mode="reflect", padding=1)]
)
def test_convolutions_of_other_forms_are_left_to_pytorch(layer: nn.Conv2d) -> None:
    out = assert_same_derivatives(layer, samples(2, 1, 6, 6))
    assert "_Convolution" not in str(out.grad_fn)


def test_in_lower_precision_layers_are_left_to_pytorch() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), norm(), nn.ReLU(), nn.MaxPool2d(2))
    x = samples(4, 1, 8, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = network(x), with_faster_layers(network)(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_modules_of_ones_own_and_with_hooks_are_left_alone() -> None:
    class Own(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    seen: list[Tensor] = []
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda layer, given, out: seen.append(out))
    x = samples(4, 3, 6, 6).float()
    for relu in (Own(), hooked):
        network = nn.Sequential(norm(), relu, nn.MaxPool2d(2))
        torch.testing.assert_close(with_faster_layers(network)(x), network(x))
    assert [out.shape for out in seen] == [x.shape] * 2


def test_a_part_of_a_sequence_gives_what_it_gave() -> None:
    network = nn.Sequential(norm(), nn.ReLU(), nn.MaxPool2d(2))
    faster, x = with_faster_layers(network), samples(4, 3, 6, 6).float()
    assert isinstance(faster, nn.Sequential)
    torch.testing.assert_close(faster[1](faster[0](x)), network[1](network[0](x)))
