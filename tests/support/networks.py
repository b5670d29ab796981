"""Small networks, each from a seed of its own."""

from itertools import pairwise

import torch
from torch import nn


class Lambda(nn.Module):
    """A module of a function, with the modules and tensors it uses."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Residual(nn.Module):
    """``x -> out(x + back(relu(inner(x))))``."""

    def __init__(self, n=8, hidden=16, n_out=3):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.back, self.out = nn.Linear(n, hidden), nn.Linear(hidden, n), nn.Linear(n, n_out)

    def forward(self, x):
        return self.out(x + self.back(torch.relu(self.inner(x))))


def mlp(*sizes, activation=nn.ReLU, bias=True, seed=0, dtype=torch.float32, scale=1.0):
    """Return linear layers of these sizes, with activations between them; `scale` multiplies every parameter."""
    torch.manual_seed(seed)
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.to(dtype)


def linear(m, n, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(n, m).double()


def randomised_batch_norm(norm_layer, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm_layer.running_var.copy_(torch.rand(norm_layer.running_var.shape, generator=g) + 0.2)
        norm_layer.running_mean.copy_(torch.randn(norm_layer.running_mean.shape, generator=g))
        if norm_layer.weight is not None:
            norm_layer.weight.copy_(torch.randn(norm_layer.weight.shape, generator=g))
    return norm_layer
