import math

import pytest
import torch
from support.networks import Lambda
from support.truth import check_bound
from torch.nn import functional as F

from lightning_lip.constants import modules as constants


@pytest.mark.parametrize(
    ("function", "expected", "attained"),
    [
        (lambda m, x: x.flatten(1), 1, True),
        (lambda m, x: x.view(-1, 6)[:, 1:4].reshape(-1, 4, 3)[:, 1:], 1, True),
        (lambda m, x: x.permute(2, 0, 1), 1, True),
        (lambda m, x: x.transpose(0, 1).reshape(4, -1, 2, 3).flip(0), 1, True),
        (lambda m, x: x.chunk(2, 1)[1].squeeze().unsqueeze(1), 1, True),
        (lambda m, x: x.unbind(1)[2], 1, True),
        (lambda m, x: x[:, [0, 0, 0, 2]], math.sqrt(3), True),
        (lambda m, x: x[:, :, :1].expand(-1, -1, 5), math.sqrt(5), True),
        (lambda m, x: x.repeat(1, 2, 3), math.sqrt(6), True),
        (lambda m, x: x.repeat_interleave(2, 0), math.sqrt(2), True),
        (lambda m, x: x.unfold(2, 3, 1), math.sqrt(3), True),
        (lambda m, x: x.roll(1, 2).detach().clone() + 0 * x, None, False),
        (lambda m, x: F.pad(x, (1, 2)), 1, True),
        (lambda m, x: F.pad(x, (1, 2), value=7.0), 1, True),
        (lambda m, x: F.pad(x, (3, 3), mode="reflect"), math.sqrt(3), True),
        (lambda m, x: F.pad(x, (2, 1), mode="replicate"), math.sqrt(3), True),
        (lambda m, x: F.pad(x, (2, 3), mode="circular"), math.sqrt(2), True),
        (lambda m, x: x.mean((1, 2)), 1 / math.sqrt(24), True),
        (lambda m, x: x.mean(1, keepdim=True), 0.5, True),
        (lambda m, x: x.sum(2), math.sqrt(6), True),
        (lambda m, x: x.amax(1), 1, True),
        (lambda m, x: torch.max(torch.zeros(6, dtype=torch.float64) - 99, x), 1, True),
        (lambda m, x: x[:, :1].expand_as(x), 2, True),
        (lambda m, x: x.view_as(x.clone()), 1, True),
        (lambda m, x: x.tril(), 1, True),
        (lambda m, x: x.diagonal(0, 1, 2), 1, True),
        (lambda m, x: x.max(1)[0], 1, True),
        (lambda m, x: x.logsumexp(2), 1, False),
        (lambda m, x: torch.linalg.vector_norm(x, dim=2), 1, True),
        (lambda m, x: x.norm(p=1, dim=2), math.sqrt(6), True),
        (lambda m, x: x * 3.0 / -2, 1.5, True),
        (lambda m, x: x * torch.arange(6.0, dtype=torch.float64), 5, True),
        (lambda m, x: x / torch.arange(2.0, 8.0, dtype=torch.float64), 0.5, True),
        (lambda m, x: x[:, :, :1] * torch.ones(6, dtype=torch.float64), math.sqrt(6), True),
        (lambda m, x: x.mean((1, 2), keepdim=True) + x, 2.0, True),
        (lambda m, x: x.softmax(1), 0.5, False),
        (lambda m, x: x.log_softmax(1), 2, False),
        (lambda m, x: F.layer_norm(x, (6,), eps=0.01), 10, False),
        (lambda m, x: F.rms_norm(x, (6,), eps=0.01), 10, False),
        (lambda m, x: F.group_norm(x, 2, eps=0.01), 10, False),
        (lambda m, x: F.instance_norm(x, eps=0.01), 10, False),
        (lambda m, x: F.dropout(x, 0.5, m.training), 1, True),
        (lambda m, x: x.float().double(), 1, True),
        (lambda m, x: x - torch.tanh(x), 1, False),
        (lambda m, x: torch.rsub(x, torch.tanh(x)), 1, False),
        (lambda m, x: torch.subtract(x, torch.tanh(x)), 1, False),
        (lambda m, x: torch.sub(x, torch.tanh(x), alpha=-1), 2, False),
        (lambda m, x: torch.rsub(x, torch.tanh(x), alpha=-1), 2, False),
        (lambda m, x: x / (1 + x.abs()), 1, False),
        (lambda m, x: torch.true_divide(x, x.abs() + 1), 1, False),
        (lambda m, x: x * torch.sigmoid(1.702 * x), constants.SILU, False),
        (lambda m, x: x.sigmoid() * x, constants.SILU, False),
        (lambda m, x: x.clone().mul_(-2.0).add_(1.0), 2, True),
        (lambda m, x: F.max_pool1d(x, 3, 1), math.sqrt(3), False),
        (lambda m, x: F.avg_pool1d(x, 2), math.sqrt(0.5), True),
        (lambda m, x: F.adaptive_avg_pool1d(x, 1), 1 / math.sqrt(6), True),
        (lambda m, x: F.adaptive_max_pool1d(x, 4), math.sqrt(2), False),
        (lambda m, x: F.interpolate(x, scale_factor=3), math.sqrt(3), True),
        (lambda m, x: F.interpolate(x, scale_factor=2.0, mode="linear"), None, True),
        (lambda m, x: F.interpolate(x, size=11, mode="linear", align_corners=True), None, True),
        (lambda m, x: F.interpolate(x[:, None], size=(3, 9), mode="bilinear"), None, True),
        (lambda m, x: F.interpolate(x[:, None], scale_factor=2, mode="bicubic"), None, True),
        (lambda m, x: F.interpolate(x[:, None], size=(7, 3), mode="area"), None, True),
        (lambda m, x: F.interpolate(x[:, None], size=(7, 3), mode="nearest-exact"), None, True),
        (lambda m, x: F.interpolate(x[:, None], size=(2, 3), mode="bilinear", antialias=True), None, True),
        (lambda m, x: F.interpolate(x[:, None, None], scale_factor=2, mode="trilinear"), None, True),
        (lambda m, x: F.pixel_shuffle(x.view(-1, 4, 2, 3), 2), 1, True),
    ],
)
def test_rules_without_weights(function, expected, attained):
    # 4 x 6 a sample. Where the map is linear or a selection the sampled Jacobian attains the value.
    check_bound(Lambda(function), 4, 6, expected=expected, attained=attained)
