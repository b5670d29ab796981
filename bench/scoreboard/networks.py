"""The networks of the scoreboard, of ordinary layers or of a peer's, and their export to ordinary ones.

All have the same shapes and activations, MaxMin, so that only layers and losses differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_lip import MaxMin
from lightning_lip.reporting.extras import extra

EXTRA = "scoreboard"


@dataclass(frozen=True)
class Layers:
    """Makers of layers.

    Attributes:
        linear: Makes a linear layer from its sizes.
        convolution: Makes a convolution from channels, kernel size, stride and padding.
        head: Makes the last linear layer.
    """

    linear: Callable[[int, int], nn.Module]
    convolution: Callable[[int, int, int, int, int], nn.Module]
    head: Callable[[int, int], nn.Module]


def ordinary() -> Layers:
    """Return torch's own layers, orthogonal at the start, with zero biases."""

    def orthogonal(layer: nn.Linear | nn.Conv2d) -> nn.Module:
        nn.init.orthogonal_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        return layer

    def linear(n_in: int, n_out: int) -> nn.Module:
        return orthogonal(nn.Linear(n_in, n_out))

    def convolution(n_in: int, n_out: int, size: int, stride: int, padding: int) -> nn.Module:
        return orthogonal(nn.Conv2d(n_in, n_out, size, stride, padding))

    return Layers(linear, convolution, linear)


def torchlip(disjoint_head: bool = False) -> Layers:
    """Return deel-torchlip's spectral layers (norm, then Björck's iteration).

    Args:
        disjoint_head: Whether each row of the last layer has norm 1 by itself, as torchlip advises for its HKR loss.
    """
    package: Any = extra("deel.torchlip", EXTRA)

    def convolution(n_in: int, n_out: int, size: int, stride: int, padding: int) -> nn.Module:
        layer: nn.Module = package.SpectralConv2d(n_in, n_out, size, stride=stride, padding=padding)
        return layer

    head = package.FrobeniusLinear if disjoint_head else package.SpectralLinear
    return Layers(package.SpectralLinear, convolution, head)


def orthogonium() -> Layers:
    """Return orthogonium's orthogonal layers, AOC for convolutions."""
    layers: Any = extra("orthogonium.layers", EXTRA)

    def linear(n_in: int, n_out: int) -> nn.Module:
        return _zero_bias(layers.OrthoLinear(n_in, n_out))

    def convolution(n_in: int, n_out: int, size: int, stride: int, padding: int) -> nn.Module:
        made = layers.AdaptiveOrthoConv2d(n_in, n_out, size, stride=stride, padding=padding, padding_mode="zeros")
        return _zero_bias(made)

    return Layers(linear, convolution, linear)


def _zero_bias(layer: Any) -> nn.Module:
    nn.init.zeros_(layer.bias)
    made: nn.Module = layer
    return made


def mlp(layers: Layers, shape: Sequence[int], n_classes: int) -> nn.Sequential:
    """Return n-128-128-C for inputs of a shape."""
    n = 1
    for size in shape:
        n *= size
    hidden = [layers.linear(n, 128), MaxMin(), layers.linear(128, 128), MaxMin()]
    return nn.Sequential(nn.Flatten(), *hidden, layers.head(128, n_classes))


def cnn(layers: Layers, shape: Sequence[int], n_classes: int) -> nn.Sequential:
    """Return four convolutions, of which two halve the image, and two linear layers, for (channels, h, w)."""
    channels, height, width = shape
    parts: list[nn.Module] = []
    for n_out, size, stride in ((16, 3, 1), (16, 4, 2), (32, 3, 1), (32, 4, 2)):
        parts += [layers.convolution(channels, n_out, size, stride, 1), MaxMin()]
        channels = n_out
    n = channels * (height // 4) * (width // 4)
    return nn.Sequential(*parts, nn.Flatten(), layers.linear(n, 128), MaxMin(), layers.head(128, n_classes))


NETWORKS = {"mlp": mlp, "cnn": cnn}


@torch.no_grad()
def exported(network: nn.Module) -> nn.Sequential:
    """Return a network of one chain as ordinary layers, with the weights that it computes in eval mode."""
    network.eval()
    return nn.Sequential(*map(_ordinary, network.children()))


def _ordinary(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        new: nn.Linear | nn.Conv2d = nn.Linear(layer.in_features, layer.out_features)
    elif isinstance(layer, nn.Conv2d):
        sizes: Any = (layer.kernel_size, layer.stride, layer.padding)
        new = nn.Conv2d(layer.in_channels, layer.out_channels, *sizes)
    else:
        return layer
    new.weight.copy_(layer.weight)
    assert new.bias is not None
    assert layer.bias is not None
    new.bias.copy_(layer.bias)
    return new.requires_grad_(False)
