"""A body from timm, torchvision or a file of one's own, pretrained where there are weights, with a new linear head.

Legend: B samples, C H W image axes, F features, N ways.
"""

import difflib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmaml_pl.checks import require_counts, require_kind, require_positive
from dmaml_pl.errors import ConfigError
from dmaml_pl.networks.pretrained import load_weights

PRETRAINED = "pretrained"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the red, green and blue values from 0 to 1 that torchvision's weights were trained on."""

_INSTALL_TIMM = "pip install 'dmaml_pl[timm]'"


class Backbone(nn.Module):
    """A body that turns images into features, and a linear head on it; their weights are named `body.` and `head.`.

    What becomes of the body is said elsewhere: `model.freeze: ["body.*"]` keeps it as it is, with `model.batch_norm:
    frozen` its running statistics, too; `model.algorithm.adapts: ["head.*"]` lets the head alone adapt. The features
    are then computed once for all steps of the inner loop.

    Args:
        body: "timm:NAME" or "torchvision:NAME", such as "timm:vit_tiny_patch16_224" and "torchvision:resnet18", or a
            module of one's own. The last linear layer of the latter two is left out: it is the head of before.
        ways: N, outputs.
        weights: of the body. A file of tensors by name (safetensors, or what `torch.save` wrote of a state dict, also
            under "state_dict" or "model"), in which those of a head may stand beside; or "pretrained", which downloads
            what the library has. At random by default. A checkpoint of a training holds all weights: adapting a network
            from it reads none of these.
        options: further arguments of the library's model, such as {image_size: 84} of torchvision's ViTs and
            {img_size: 84} of timm's.
        mean: is subtracted from each of the C channels, whose values go from 0 to 1; by default what the library's own
            weights of that name take; nothing for a module of one's own.
        std: what each channel is then divided by; as `mean`.

    Raises:
        ConfigError: there is no such model, timm is not installed, the model refuses an option, or the weights cannot
            be read, be downloaded, or do not fit.

    Examples:
        >>> network = Backbone("torchvision:resnet18", ways=5)
        >>> network(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """

    in_checkpoint = ("weights",)
    """Settings whose files a checkpoint does without; a network of one's own may say the same."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        body: str | nn.Module,
        ways: int = 5,
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        require_counts(**{"model.network.ways": ways})
        require_positive(**{"model.network.std": min(std or [1.0])})
        if isinstance(body, str):
            made = _from_library(body, options or {}, pretrained=weights == PRETRAINED)
        elif weights == PRETRAINED or options:
            raise ConfigError(
                f"model.network.body is {type(body).__name__}, which takes its options itself, and its weights from a "
                "file: set model.network.options to null, and model.network.weights to a file or null."
            )
        else:
            require_kind("model.network.body", body, nn.Module, "'torchvision:resnet18', its name")
            made = _without_head(type(body).__name__, body)
        self.body, features, usual = made
        if weights is not None and weights != PRETRAINED:
            load_weights(self.body, weights, "model.network.weights")
        for name, given, own in (("mean", mean, usual[0]), ("std", std, usual[1])):
            if given and own and len(given) not in (1, len(own)):
                raise ConfigError(f"model.network.{name} has {len(given)} values, but must have {len(own)}.")
            values = given or own
            channels = torch.tensor(values).view(-1, 1, 1) if values else None
            self.register_buffer(name, channels, persistent=False)
        self.head = nn.Linear(features, ways)

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W) whose values go from 0 to 1."""
        x = x if self.mean is None else x - self.mean
        out: Tensor = self.body(x if self.std is None else x / self.std)
        return out.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N) of images (B, C, H, W)."""
        out: Tensor = self.head(self.embed(x))
        return out


_Usual = tuple[Sequence[float], Sequence[float]]
_Body = tuple[nn.Module, int, _Usual]
"""From images to features, F, and the mean and standard deviation of the channels that it takes."""


def _from_library(body: str, options: dict[str, Any], *, pretrained: bool) -> _Body:
    library, _, name = body.partition(":")
    if library not in ("timm", "torchvision") or not name:
        raise ConfigError(
            f"model.network.body is {body}, but must be timm:NAME, torchvision:NAME, or a module by its class_path."
        )
    make = _from_timm if library == "timm" else _from_torchvision
    try:
        return make(name, options, pretrained)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"model.network.options do not go with {body} ({_first_line(error)}).") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ConfigError(f"model.network.options do not go with {body} ({_first_line(error)}).") from error
        raise ConfigError(
            f"model.network.weights is pretrained, but there are none for {body}, or they cannot be downloaded "
            f"({_first_line(error)}): give a file, or null for weights at random."
        ) from error


def _from_timm(name: str, options: dict[str, Any], pretrained: bool) -> _Body:
    try:
        import timm  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            f"model.network.body is timm:{name}, but timm is not installed: {_INSTALL_TIMM}, or take torchvision:NAME."
        ) from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    # Without its last layer; what may not be an option is given twice, which Python refuses.
    model = timm.create_model(name, pretrained=pretrained, num_classes=0, checkpoint_path=None, **options)
    usual = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    return model, getattr(model, "head_hidden_size", None) or model.num_features, usual


def _from_torchvision(name: str, options: dict[str, Any], pretrained: bool) -> _Body:
    from torchvision import models  # noqa: PLC0415 - takes a second, and few need it

    names = models.list_models(module=models)
    if name not in names:
        raise _unknown("torchvision", name, names)
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    body, features, _ = _without_head(f"torchvision:{name}", model)
    return body, features, (IMAGENET_MEAN, IMAGENET_STD)


def _without_head(name: str, model: nn.Module) -> _Body:
    """The same module, whose last linear layer gives what it is given."""
    layers = [(place, layer) for place, layer in model.named_modules() if place and type(layer) is nn.Linear]
    if not layers:
        raise ConfigError(
            f"model.network.body is {name}, which has no linear layer (nn.Linear) to put the head in the place of."
        )
    place, head = layers[-1]
    model.set_submodule(place, nn.Identity())
    return model, head.in_features, ((), ())


def _unknown(library: Literal["timm", "torchvision"], name: str, names: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return ConfigError(
        f"model.network.body is {library}:{name}, which {library} does not have"
        + (f"; near it are {', '.join(near)}." if near else ".")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
