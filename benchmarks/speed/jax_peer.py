"""The meta-gradient in JAX, jitted, over all tasks at once; networks in the layout that XLA prefers (channels last).

A convolution is nine shifts and a matrix product here, and pooling a maximum: on CPUs the derivatives of XLA's own
(`conv_general_dilated`, `reduce_window`) took fifteen times as long. One task after another (`lax.map`) took a tenth
more.

Legend: B samples, H W C image axes, I O the channels of a convolution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed.peers import Measured, UnavailableError, library
from benchmarks.speed.problems import Problem
from dmaml_pl.networks import MLP, Conv4

Weights = dict[str, Any]


def meta_gradient(problem: Problem) -> Measured:
    """JAX's meta-gradient.

    Raises:
        UnavailableError: JAX is not installed, or does not see the device.
    """
    jax = library("jax")
    if problem.device == "cuda" and jax.default_backend() != "gpu":
        raise UnavailableError("the installed JAX does not see the GPU")
    jax.config.update("jax_enable_x64", True)  # what is float32 stays float32
    jnp, network, batch = jax.numpy, problem.made(), problem.batch()
    predict = _predictor(jax, network)

    def loss(weights: Weights, x: Any, y: Any) -> Any:
        prediction = predict(weights, x)
        if problem.objective_name == "regression":
            return jnp.mean((prediction - y) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(prediction), y[:, None], axis=1))

    def task_loss(weights: Weights, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(problem.steps):
            gradients = jax.grad(loss)(weights, support_x, support_y)
            weights = {name: w - problem.inner_lr * gradients[name] for name, w in weights.items()}
        return loss(weights, query_x, query_y)

    def mean_loss(weights: Weights, *tasks: Any) -> Any:
        return jnp.mean(jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))(weights, *tasks))

    compiled = jax.jit(jax.value_and_grad(mean_loss))
    weights = {name: jnp.asarray(_to_jax(p)) for name, p in network.named_parameters()}
    tasks = [jnp.asarray(_samples(tensor)) for tensor in batch.tensors()]

    def gradients(found: Any) -> dict[str, Tensor]:
        return {name: _from_jax(np.asarray(gradient), problem.device) for name, gradient in found[1].items()}

    return Measured(lambda: jax.block_until_ready(compiled(weights, *tasks)), gradients)


def _predictor(jax: Any, network: nn.Module) -> Any:
    """The network as a function of its weights and samples, as `network.forward`.

    Raises:
        UnavailableError: there is none for this network.
    """
    if isinstance(network, MLP):
        layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]

        def mlp(weights: Weights, x: Any) -> Any:
            for layer in layers:
                x = x @ weights[f"{layer}.weight"] + weights[f"{layer}.bias"]
                x = x if layer == layers[-1] else jax.nn.relu(x)
            return x

        return mlp
    if isinstance(network, Conv4):
        blocks = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
        norms = dict(zip(blocks, _names(network, nn.BatchNorm2d), strict=True))
        return lambda weights, x: _conv4(jax, weights, x, norms)
    raise UnavailableError(f"no {type(network).__name__} in JAX")


def _names(network: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, layer in network.named_modules() if isinstance(layer, kind)]


def _conv4(jax: Any, weights: Weights, x: Any, norms: dict[str, str]) -> Any:
    """Four times 3x3 convolution, batch norm, ReLU, 2x2 max-pool; then a linear layer."""
    jnp, lax = jax.numpy, jax.lax
    for block, norm in norms.items():
        _, height, width, _ = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        kernel = weights[f"{block}.weight"]
        x = jnp.concatenate(shifts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
        x = x + weights[f"{block}.bias"]
        mean, variance = jnp.mean(x, axis=(0, 1, 2)), jnp.var(x, axis=(0, 1, 2))
        x = (x - mean) * lax.rsqrt(variance + 1e-5) * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
        x = jax.nn.relu(x)
        corners = [x[:, i : height - height % 2 : 2, j : width - width % 2 : 2] for i in range(2) for j in range(2)]
        x = jnp.maximum(jnp.maximum(corners[0], corners[1]), jnp.maximum(corners[2], corners[3]))
    return x.reshape(x.shape[0], -1) @ weights["head.weight"] + weights["head.bias"]  # of 1x1 pixels


def _to_jax(parameter: Tensor) -> Any:
    value = parameter.detach().cpu().numpy()
    if value.ndim == 4:  # (O, I, H, W)
        return value.transpose(2, 3, 1, 0)
    return value.T


def _from_jax(value: Any, device: str) -> Tensor:
    turned = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return torch.from_numpy(np.array(turned, order="C")).to(device)


def _samples(tensor: Tensor) -> Any:
    value = tensor.cpu().numpy()
    return np.moveaxis(value, 2, -1) if value.ndim == 5 else value
