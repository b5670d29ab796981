"""Data that holds no numbers proves no lower bound."""

import math

import pytest
import torch
from torch import nn

from lightning_lip import certify


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n_batches", [1, 2])
def test_data_that_is_not_finite_is_refused(wrong, n_batches):
    data = torch.randn(100, 3)
    data[50, 1] = wrong
    with pytest.raises(ValueError, match="`data` without NaN and infinity"):
        certify(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.zeros(1, 3), data=data.chunk(n_batches))
