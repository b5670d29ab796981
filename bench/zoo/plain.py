"""What is written with torch.nn alone: the layers that every model is made of, each used as its documentation shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lip.bench.zoo.entry import CLASSES, vector


class LastState(nn.Module):
    """A recurrent layer and a head on its last output: (B, T, 12) to logits."""

    def __init__(self, layer: type[nn.RNN | nn.LSTM | nn.GRU], bidirectional: bool = False) -> None:
        super().__init__()
        self.recurrent = layer(12, 16, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(32 if bidirectional else 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (B, 10)."""
        out: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return out


class Encoder(nn.Module):
    """A TransformerEncoder over (B, T, 12), its mean classified."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (B, 10)."""
        out: Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return out


class Translator(nn.Module):
    """An nn.Transformer from (B, T, 12) to learnt queries, which are classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.queries = nn.Parameter(torch.randn(1, 4, 32))
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (B, 10)."""
        decoded = self.transformer(self.embed(x), self.queries.expand(len(x), -1, -1))
        out: Tensor = self.head(decoded.mean(1))
        return out


class Residual(nn.Module):
    """Two convolutions with batch normalisation around an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + body(x))."""
        return torch.relu(x + self.body(x))


class GatedBlock(nn.Module):
    """A block as of ConvNeXt: depthwise convolution, LayerNorm over channels, two linear layers, a layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 1e-1))

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the scaled branch."""
        branch: Tensor = self.scale * self.mlp(self.norm(self.depthwise(x).movedim(1, -1)))
        return x + branch.movedim(-1, 1)


def _mlp() -> nn.Module:
    layers = (nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    return nn.Sequential(nn.Flatten(), *layers)


def _resnet() -> nn.Module:
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    return nn.Sequential(*stem, Residual(16), Residual(16), *head)


def _convnext() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, CLASSES))
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), GatedBlock(16), GatedBlock(16), *head)


def _temporal() -> nn.Module:
    layers = (nn.Conv1d(12, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv1d(16, 16, 3, dilation=2), nn.PReLU())
    return nn.Sequential(*layers, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def _autoencoder() -> nn.Module:
    down = (nn.Conv2d(3, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU(), nn.Conv2d(8, 16, 3, 2, 1))
    up = (nn.ELU(), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.Softplus(), nn.ConvTranspose2d(8, CLASSES, 4, 2, 1))
    return nn.Sequential(*down, *up)


ENTRIES = [
    vector("torch.nn/mlp", _mlp, (12,)),
    vector("torch.nn/resnet", _resnet, (3, 16, 16)),
    vector("torch.nn/convnext", _convnext, (3, 16, 16)),
    vector("torch.nn/conv1d", _temporal, (12, 16)),
    vector("torch.nn/autoencoder", _autoencoder, (3, 16, 16)),
    vector("torch.nn/RNN", lambda: LastState(nn.RNN), (10, 12)),
    vector("torch.nn/LSTM", lambda: LastState(nn.LSTM), (10, 12)),
    vector("torch.nn/GRU", lambda: LastState(nn.GRU, bidirectional=True), (10, 12)),
    vector("torch.nn/TransformerEncoder", lambda: Encoder(norm_first=False), (10, 12)),
    vector("torch.nn/TransformerEncoder-pre-norm", lambda: Encoder(norm_first=True), (10, 12)),
    vector("torch.nn/Transformer", Translator, (10, 12)),
]
