"""The models that are trained: multilayer perceptrons, convolutional networks and transformers."""

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


def resnet18(n_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Return ResNet-18 with the usual stem for 32 x 32 images: a 3 x 3 convolution, no pooling."""
    blocks: list[nn.Module] = []
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    n_in = width
    for n_out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        blocks += [BasicBlock(n_in, n_out, stride), BasicBlock(n_out, n_out, 1)]
        n_in = n_out
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes))


def vgg(n_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Return a VGG-like network: eight 3 x 3 convolutions with batch normalisation, ReLU and three max pools."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_out in (width, 2 * width, 4 * width, 4 * width):
        for _ in range(2):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
            n_in = n_out
        layers.append(nn.MaxPool2d(2))
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(n_in, n_classes))


def vgg11(n_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Return VGG-11 (Simonyan and Zisserman, 2015) with batch normalisation and one linear layer, for 32 x 32."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_out in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8):  # in widths, 0 a pool
        if n_out == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(n_in, n_out * width, 3, padding=1), nn.BatchNorm2d(n_out * width), nn.ReLU()]
        n_in = n_out * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes))


def mobilenet(n_classes: int = 10, width: int = 32) -> nn.Sequential:
    """Return a MobileNet (Howard et al., 2017) for 32 x 32 images: depthwise 3 x 3 and 1 x 1 convolutions in turn."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    n_in = width
    for factor, stride in ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1), (16, 1)):
        n_out = factor * width
        layers += [nn.Conv2d(n_in, n_in, 3, stride, 1, groups=n_in), nn.BatchNorm2d(n_in), nn.ReLU()]
        layers += [nn.Conv2d(n_in, n_out, 1), nn.BatchNorm2d(n_out), nn.ReLU()]
        n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes))


class ConvNeXtBlock(nn.Module):
    """A depthwise 7 x 7 convolution, layer normalisation and an MLP of four times the width, added to the input.

    Source: Liu et al., "A ConvNet for the 2020s" (2022), without its layer scale.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, width, h, w) to the same shape."""
        hidden = self.norm(self.depthwise(inputs).permute(0, 2, 3, 1))
        return inputs + self.mlp(hidden).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def convnext(n_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Return a small ConvNeXt: a 2 x 2 stem, and three stages of two blocks that halve the image between them."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 2, stride=2)]
    for stage in range(3):
        n = width * 2**stage
        if stage:
            layers.append(nn.Conv2d(n // 2, n, 2, stride=2))
        layers += [ConvNeXtBlock(n), ConvNeXtBlock(n)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(n), nn.Linear(n, n_classes))


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
    """A small ViT (Dosovitskiy et al., 2021) of 64 patches, 4 x 4 of 32 x 32 images say, with mean pooling."""

    def __init__(self, width: int = 192, depth: int = 6, n_heads: int = 3, n_classes: int = 10, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, n_heads, causal=False) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, 3, 8 patch, 8 patch) to (B, n_classes)."""
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
