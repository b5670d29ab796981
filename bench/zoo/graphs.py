"""Models of torch_geometric on one fixed graph, whose nodes are classified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lip.bench.zoo.entry import CLASSES, Batch, Entry, classify, generator
from lightning_lip.reporting.extras import extra

NODES, EDGES, FEATURES, WIDTH = 64, 256, 12, 32


def _batch() -> Batch:
    """Return features of nodes, edges in both directions, and the nodes' classes."""
    rng = generator()
    edges = torch.randint(NODES, (2, EDGES), generator=rng)
    return {
        "x": torch.randn(NODES, FEATURES, generator=rng),
        "edge_index": torch.cat([edges, edges.flip(0)], 1),
        "labels": torch.randint(CLASSES, (NODES,), generator=rng),
    }


def _entry(name: str, build: Callable[[Any], nn.Module]) -> Entry:
    def made() -> nn.Module:
        return build(extra("torch_geometric.nn", "zoo"))

    return Entry(f"torch_geometric/{name}", made, _batch, classify, _features, OnGraph, None)


class OnGraph(nn.Module):
    """A model as a function of the nodes' features: the edges are a buffer."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("edge_index", batch["edge_index"])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the nodes, shape (nodes, 10)."""
        out: Tensor = self.model(x, self.edge_index)
        return out


def _features(batch: Batch) -> Tensor:
    return batch["x"]


def _model(name: str, **options: Any) -> Entry:
    return _entry(name, lambda layers: getattr(layers, name)(FEATURES, WIDTH, 2, CLASSES, **options))


class Layers(nn.Module):
    """Two convolutions of a graph with a ReLU between."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return the logits of the nodes, shape (nodes, 10)."""
        out: Tensor = self.second(self.first(x, edge_index).relu(), edge_index)
        return out


class Embedded(nn.Module):
    """A linear map to the width of a convolution that keeps it, and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(FEATURES, WIDTH), body, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return the logits of the nodes, shape (nodes, 10)."""
        out: Tensor = self.head(self.body(self.embed(x), edge_index))
        return out


def _two(layer: Callable[..., nn.Module], *options: int) -> nn.Module:
    return Layers(layer(FEATURES, WIDTH, *options), layer(WIDTH, CLASSES, *options))


def _gps(layers: Any) -> nn.Module:
    return Embedded(layers.GPSConv(WIDTH, layers.GCNConv(WIDTH, WIDTH), heads=4))


ENTRIES = [
    _model("GCN"),
    _model("GraphSAGE"),
    _model("GAT", heads=4),
    _model("GIN", norm="BatchNorm"),
    _model("EdgeCNN"),
    _entry("TransformerConv", lambda layers: _two(layers.TransformerConv)),
    _entry("ChebConv", lambda layers: _two(layers.ChebConv, 3)),
    _entry("GPSConv", _gps),
]
