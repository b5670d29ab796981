"""The models that are trained: two multilayer perceptrons, a residual network and two transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BenchModel:
    """One model, and how it is trained.

    Attributes:
        title: What the tables call it.
        build: Makes the network.
        input_shape: Shape of one input.
        batch_size: Inputs a step, B.
        n_classes: Classes of the cross-entropy; None trains on the mean squared error.
        pattern: Glob pattern for the names of the linear layers and convolutions that are penalised.
        share: The share of a plain step that the penalty is to stay within; None where nothing is asked, and for
            convolutions, whose share follows from their work.
    """

    title: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    batch_size: int
    n_classes: int | None = None
    pattern: str = "*"
    share: float | None = None

    def network(self) -> nn.Module:
        """Return the network, with the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()

    def layers(self, network: nn.Module) -> list[str]:
        """Return the names of the penalised layers of `network`, in its order."""
        kinds = (nn.Linear, nn.Conv2d)
        named = network.named_modules()
        return [name for name, module in named if isinstance(module, kinds) and fnmatch(name, self.pattern)]

    def batch(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Return random inputs (B, *input_shape) and targets: classes (B,), or of the output's shape."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.batch_size, *self.input_shape, generator=generator)
        if self.n_classes is not None:
            return inputs, torch.randint(self.n_classes, (self.batch_size,), generator=generator)
        with torch.no_grad():
            shape = network(inputs[:2]).shape[1:]
        return inputs, torch.randn(self.batch_size, *shape, generator=generator)


def mlp(*sizes: int) -> nn.Sequential:
    """Return linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation around an identity or 1 x 1 shortcut (He et al., 2016)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, n_in, h, w) to (B, n_out, h / stride, w / stride)."""
        return F.relu(self.branch(inputs) + self.shortcut(inputs))


def resnet18(n_classes: int = 10) -> nn.Sequential:
    """Return ResNet-18 with the usual stem for 32 x 32 images: a 3 x 3 convolution, no pooling."""
    blocks: list[nn.Module] = []
    width = 64
    for n_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [BasicBlock(width, n_out, stride), BasicBlock(n_out, n_out, 1)]
        width = n_out
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes))


class TransformerBlock(nn.Module):
    """Attention and an MLP of four times the width, each behind a layer normalisation, as in GPT-2 and ViT."""

    def __init__(self, width: int, n_heads: int, causal: bool) -> None:
        super().__init__()
        self.n_heads, self.causal = n_heads, causal
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, tokens, width) to the same shape."""
        heads = self.qkv(self.norms[0](inputs)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=self.causal)
        hidden: Tensor = inputs + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norms[1](hidden))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """A small ViT (Dosovitskiy et al., 2021) for 32 x 32 images: 4 x 4 patches, mean pooling."""

    def __init__(self, width: int = 192, depth: int = 6, n_heads: int = 3, n_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, n_heads, causal=False) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, 3, 32, 32) to (B, n_classes)."""
        tokens = self.patches(inputs).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))  # type: ignore[no-any-return]


def gpt2_blocks(depth: int = 4) -> nn.Sequential:
    """Return blocks of GPT-2 small's size (width 768, 12 heads) on embedded tokens."""
    return nn.Sequential(*[TransformerBlock(768, 12, causal=True) for _ in range(depth)])


# GPT-2 small has 12 of these blocks: each costs and gets the same, so that four show the same ratios.
MODELS = {
    "paper": BenchModel("MLP 13-20-20-20-1", lambda: mlp(13, 20, 20, 20, 1), (13,), 50),
    "mnist": BenchModel("MLP 784-1024-1024-10", lambda: mlp(784, 1024, 1024, 10), (784,), 256, 10, share=0.03),
    "resnet18": BenchModel("ResNet-18, 32 x 32 images", resnet18, (3, 32, 32), 32, n_classes=10),
    "vit": BenchModel(
        "ViT, width 192, 6 blocks, 64 tokens: its MLPs", VisionTransformer, (3, 32, 32), 32, 10, pattern="*.mlp.*"
    ),
    "gpt2": BenchModel(
        "GPT-2 small, 4 of its 12 blocks, 128 tokens: their MLPs", gpt2_blocks, (128, 768), 8, pattern="*.mlp.*"
    ),
}
"""The models of ``--models``, by name, smallest first."""
