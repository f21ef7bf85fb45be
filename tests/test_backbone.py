"""Bodies of torchvision, timm and one's own: their features, where their weights come from, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ShuffleNet_V2_X0_5_Weights, get_model
from torchvision.models.vision_transformer import VisionTransformer

from dmaml_pl import Backbone, ResNet12
from dmaml_pl.errors import ConfigError
from tests.recipes import same
from tests.servers import serving_files

SMALL = "torchvision:shufflenet_v2_x0_5"
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)


def vit() -> VisionTransformer:
    return VisionTransformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("body", "features", "size"), [(SMALL, 1024, 32), (vit(), 16, 16), (ResNet12(widths=[4, 4, 4, 8]), 8, 16)]
)
def test_a_body_gives_what_its_own_head_was_given(body: str | nn.Module, features: int, size: int) -> None:
    torch.manual_seed(0)
    given: list[Tensor] = []
    network = Backbone(copy.deepcopy(body), ways=3).eval()
    x = images(size)
    if isinstance(body, str):
        torch.manual_seed(0)
        model = get_model(body.partition(":")[2], weights=None).eval()
        inputs = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
            3, 1, 1
        )
    else:
        model, inputs = copy.deepcopy(body).eval(), x
    *_, head = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    head.register_forward_pre_hook(lambda layer, args: given.append(args[0]))
    model(inputs)
    assert network.embed(x).shape == (2, features)
    assert network(x).shape == (2, 3)
    torch.testing.assert_close(network.embed(x), given[0])
    assert torch.equal(network.head(network.embed(x)), network(x))
    assert {name.partition(".")[0] for name in network.state_dict()} == {"body", "head"}


def test_channels_are_normalized_as_asked_for() -> None:
    torch.manual_seed(0)
    network = Backbone(vit(), mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.125]).eval()
    x = images(16)
    scaled = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    torch.testing.assert_close(network.embed(x), network.body(scaled))


@pytest.mark.parametrize("within", [None, "state_dict", "model"])
def test_weights_of_a_file_are_the_bodys_and_those_of_its_head_are_left_out(tmp_path: Path, within: str | None) -> None:
    model = get_model(SMALL.partition(":")[2], weights=None)
    state = model.state_dict()
    torch.save(state if within is None else {within: state, "epoch": 3}, tmp_path / "weights.pth")
    torch.manual_seed(1)
    network = Backbone(SMALL, weights=str(tmp_path / "weights.pth"))
    assert same(network.body.state_dict(), {name: w for name, w in state.items() if not name.startswith("fc.")})


@needs_safetensors
def test_weights_of_a_safetensors_file_are_the_bodys(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = vit()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    body = Backbone(vit(), weights=str(tmp_path / "weights.safetensors")).body
    assert same(body.state_dict(), {name: w for name, w in model.state_dict().items() if "heads" not in name})
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0no json!")
    with pytest.raises(ConfigError, match=r"broken.safetensors, which cannot be read"):
        Backbone(vit(), weights=str(tmp_path / "broken.safetensors"))


def test_safetensors_without_its_package_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ConfigError, match=r"safetensors is not installed: pip install 'dmaml_pl\[timm\]'"):
        Backbone(vit(), weights=str(tmp_path / "weights.safetensors"))


def test_a_file_of_weights_that_does_not_fit_is_refused_with_how_much_of_it_does(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(2)}, path)
    total = len(Backbone(vit()).body.state_dict())
    for content, message in (
        ({"a": torch.zeros(2)}, f"has 0 of the {total} tensors of VisionTransformer: class_token, .* is not there"),
        (
            vit().state_dict() | {"class_token": torch.zeros(1, 1, 8)},
            rf"has {total - 1} of the {total} .*: class_token, of shape \(1, 1, 16\), is of shape \(1, 1, 8\) there",
        ),
        ([1, 2], "cannot be read .it holds no tensors by name"),
    ):
        torch.save(content, path)
        with pytest.raises(ConfigError, match=message):
            Backbone(vit(), weights=str(path))
    path.write_text("no weights")
    with pytest.raises(ConfigError, match="cannot be read"):
        Backbone(vit(), weights=str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"body": "torchvision:resnet19"}, "resnet19, which torchvision does not have; near it are resnet1"),
        ({"body": "resnet18"}, "body is resnet18, but must be timm:NAME, torchvision:NAME, or a module"),
        ({"body": SMALL, "options": {"depth": 3}}, f"options do not go with {SMALL} .*depth"),
        ({"body": SMALL, "weights": "nowhere.pth"}, "weights is nowhere.pth, but there is no such file"),
        ({"body": SMALL, "ways": 0}, "ways is 0, but must be greater than 0"),
        ({"body": "torchvision:squeezenet1_0"}, "torchvision:squeezenet1_0, which has no linear layer"),
        ({"body": vit(), "weights": "pretrained"}, "VisionTransformer, which takes its options itself"),
        ({"body": vit(), "options": {"image_size": 32}}, "VisionTransformer, which takes its options itself"),
    ],
)
def test_a_setting_that_cannot_work_is_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Backbone(**settings)
    assert "\n" not in str(raised.value)


def test_weights_that_cannot_be_downloaded_are_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fails)
    with pytest.raises(ConfigError, match=rf"none for {SMALL}, or they cannot be downloaded \(no route to host\)"):
        Backbone(SMALL, weights="pretrained")


def test_weights_are_downloaded_once_their_bits_are_checked_and_they_are_the_bodys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = get_model(SMALL.partition(":")[2], weights=None).state_dict()
    (tmp_path / "served").mkdir()
    torch.save(state, tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]
    served = tmp_path / "served" / f"weights-{digest}.pth"
    shutil.copy(tmp_path / "weights", served)
    kept = ShuffleNet_V2_X0_5_Weights.DEFAULT
    with serving_files(tmp_path / "served") as address:
        weights = dataclasses.replace(kept.value, url=f"{address}/{served.name}")
        monkeypatch.setattr(kept, "_value_", weights)
        for home, told in (("first", None), ("first", None), ("second", "invalid hash value")):
            monkeypatch.setenv("TORCH_HOME", str(tmp_path / home))
            if told is not None:
                with pytest.raises(ConfigError, match=told):
                    Backbone(SMALL, weights="pretrained")
                continue
            body = Backbone(SMALL, weights="pretrained").body
            assert same(body.state_dict(), {name: w for name, w in state.items() if not name.startswith("fc.")})
            served.write_bytes(b"not the weights")  # which nobody asks for a second time


def test_a_missing_timm_is_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ConfigError, match=r"timm is not installed: pip install 'dmaml_pl\[timm\]', or take torchvision"
    ):
        Backbone("timm:vit_tiny_patch16_224")


@needs_timm
def test_a_body_of_timm_gives_what_its_own_head_is_given() -> None:
    import timm

    torch.manual_seed(0)
    network = Backbone("timm:vit_tiny_patch16_224", ways=3, options={"img_size": 32, "depth": 2}).eval()
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
    x = images()
    torch.testing.assert_close(network.embed(x), model((x - 0.5) / 0.5))
    assert network(x).shape == (2, 3)
    assert Backbone("timm:mobilenetv3_small_050", ways=3).eval()(x).shape == (2, 3)  # its head takes more than its body


@needs_timm
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"body": "timm:vit_tinny_patch16_224"}, "which timm does not have; near it are vit_tiny_patch16_224"),
        ({"body": "timm:vit_tiny_patch16_224", "options": {"size": 3}}, "options do not go with timm:vit_tiny"),
        ({"body": "timm:vit_tiny_patch16_224", "options": {"checkpoint_path": "x"}}, "options do not go with"),
        ({"body": "timm:hf-hub:someone/something"}, "which timm does not have"),
    ],
)
def test_what_timm_refuses_is_told_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(**settings)
