"""Frobenius norms and relative changes; those of shards are in test_sharded.py."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lip.norms.frobenius import FrobeniusNorms
from lightning_lip.operators.base import MatrixOperator, ParametrizedMatrixOperator

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # bf16 rounds each entry to 8 bits


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norms_and_changes(dtype):
    layers = [nn.Linear(5, 3, dtype=dtype), nn.Linear(2, 7, dtype=dtype)]
    norms = FrobeniusNorms([MatrixOperator(str(i), layer) for i, layer in enumerate(layers)])
    before = [layer.weight.detach().double().clone() for layer in layers]
    assert norms.measure()[1] is None
    norms.keep()
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(1.25)
    norms.keep()  # the copies stay those from before
    found, ratios = norms.measure()
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1.25 * float(w.norm()) for w in before], rel=TOLERANCE[dtype])
    assert ratios.tolist() == pytest.approx([0.25, 0.25], rel=TOLERANCE[dtype])
    assert norms.measure()[1] is None  # they are freed
    norms.keep()
    norms.drop()
    assert norms.measure()[1] is None


def test_zero_and_computed_weights():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2))]
    nn.init.zeros_(layers[0].weight)
    nn.init.zeros_(layers[1].weight)
    kinds = (MatrixOperator, MatrixOperator, ParametrizedMatrixOperator)
    norms = FrobeniusNorms([kind(str(i), layer) for i, (kind, layer) in enumerate(zip(kinds, layers, strict=True))])
    norms.keep()
    with torch.no_grad():
        layers[1].weight.fill_(1.0)
        layers[2].parametrizations.weight.original0.mul_(3)
    found, ratios = norms.measure()
    assert found[:2].tolist() == [0.0, 2.0]
    assert ratios.tolist() == pytest.approx([0.0, math.inf, 2.0])
