"""Small models for the benchmark's tests, and the true norm of a layer."""

import copy
import csv

import torch
from torch import nn

from lightning_lip.bench.contenders import peers
from lightning_lip.bench.contenders.models import BenchModel, mlp
from support.truth import forward_matrix, norm

CPU = torch.device("cpu")


def small_convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


SMALL_MLP = BenchModel("a small MLP", lambda: mlp(6, 8, 7, 3), (6,), 4)
SMALL_CONVOLUTIONS = BenchModel("small convolutions", small_convolutions, (2, 6, 6), 4, n_classes=5)


def csv_rows(path):
    """Return the rows of a table by column, and the comment lines above them."""
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    return list(csv.DictReader(lines[len(comments) :])), comments


def peer_named(name):
    return next(peer for peer in (peers.PLAIN_PEER, *peers.PEERS) if peer.name == name)


def dense_norm(layer, shape):
    """The largest singular value of the layer's matrix, from its own forward pass in fp64."""
    return norm(forward_matrix(copy.deepcopy(layer).double(), shape))
