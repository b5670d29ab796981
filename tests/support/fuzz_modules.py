"""Modules that random networks are written with: parametrizations with a state, layers that a forward pass changes."""

import torch
from torch import nn

from lightning_lip.constants import register_constant


class Adapter(nn.Module):
    """A low-rank update of a weight that is added while it is switched on, as LoRA's."""

    def __init__(self, out_features, in_features, scale=1.0):
        super().__init__()
        self.down = nn.Parameter(torch.randn(1, in_features))
        self.up = nn.Parameter(torch.randn(out_features, 1))
        self.scale = scale
        self.on = False

    def forward(self, weight):
        return weight + self.scale * self.up @ self.down if self.on else weight


class Scaled(nn.Module):
    """A weight times a number that is read each time."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, weight):
        return self.scale * weight


class LargerInEval(nn.Module):
    """A weight that is larger in eval mode."""

    def forward(self, weight):
        return weight if self.training else 3 * weight


class Counting(nn.Module):
    """A weight that grows with each use."""

    def __init__(self):
        super().__init__()
        self.uses = 0

    def forward(self, weight):
        self.uses += 1
        return weight * self.uses


class Nested(nn.Module):
    """A factor that a module inside holds, with the constant that it states."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.factor = 1.0

    def forward(self, x):
        return self.inner.factor * x


class Reader(nn.Module):
    """Adds a tensor that it is not given as an argument, or works in place, and states a constant of 1."""

    def __init__(self):
        super().__init__()
        self.context = None

    def forward(self, x):
        return 100 * x.mul_(0.01) if self.context is None else x + self.context


register_constant(Nested, lambda module: abs(module.inner.factor))
register_constant(Reader, lambda module: 1.0)


def parametrized(layer, parametrization, key="weight"):
    """Return the layer with a parametrization that need not keep the module's shape checks."""
    nn.utils.parametrize.register_parametrization(layer, key, parametrization)
    return layer


def spoilt(layer, key, value):
    """Return the layer with one entry of a parameter or buffer set, to NaN or infinity mostly."""
    getattr(layer, key).data.flatten()[0] = value
    return layer
