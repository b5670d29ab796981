"""What is audited in tests: networks in a module of its own, and files with code in them."""

import os

PAPER = "lightning_lip.paper:PaperRegressor"
BORING = "lightning.pytorch.demos.boring_classes:BoringModel"

NETWORKS = """
import torch
from torch import nn
import lightning.pytorch as pl

def diagonal(*entries):
    layer = nn.Linear(len(entries), len(entries), bias=False)
    layer.weight.data = torch.diag(torch.tensor(entries))
    return layer

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = diagonal(2.0, 1.0), diagonal(1.5, 1.0)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.attend = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        return self.attend(x, x, x)[0]

class Module(pl.LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(1, width)
        self.net = nn.Linear(width, 2)

    def forward(self, x):
        return self.net(x)

class Forgetful(Module):
    strict_loading = False

class NeedsWidth(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(width, 2)

def two():
    return nn.Sequential(diagonal(2.0, 2.0))

def double_gelu():
    return nn.Sequential(diagonal(2.0, 2.0), nn.GELU())

def spoilt(tensor):
    network = nn.Sequential(diagonal(2.0, 2.0), nn.BatchNorm1d(2))
    getattr(network[1], tensor).data[0] = float("nan")
    return network

def nan_bias():
    return spoilt("bias")

def nan_mean():
    return spoilt("running_mean")

def huge():
    return nn.Sequential(*[diagonal(1e30, 1e30) for _ in range(11)])

def not_a_network():
    return 3

def fails():
    raise RuntimeError("no network today")

class Holder:
    inner = Net()
    number = 3
"""


class Touch:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
