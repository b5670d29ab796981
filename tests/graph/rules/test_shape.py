import math

import pytest
import torch
from support.networks import Lambda
from support.truth import check_bound
from torch.nn import functional as F

from lightning_lip.constants import modules as constants
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound


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


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda m, x: x.sort(1)[0], (4,), 1.0),
        (lambda m, x: x.sort(-1, descending=True).values, (3, 4), 1.0),
        (lambda m, x: torch.sort(x, stable=True, dim=2)[0], (3, 4), 1.0),
        (lambda m, x: x.topk(2, -2).values, (3, 4), 1.0),
        (lambda m, x: torch.cat([x.topk(0, 1).values, x], 1), (4,), math.sqrt(2)),
        (lambda m, x: x.kthvalue(2, 1, keepdim=True)[0], (4,), 1.0),
        (lambda m, x: x.kthvalue(2, -1)[0], (3, 4), 1.0),
        (lambda m, x: x.median(1)[0], (4, 3), 1.0),
        (lambda m, x: x.transpose(0, 1).median(0).values, (3,), 1.0),
        (lambda m, x: x.transpose(0, 1).msort(), (4,), 1.0),
        (lambda m, x: x.cummax(-1)[0], (4,), 2.0),
        (lambda m, x: x.cummin(1)[0], (4, 2), 2.0),
    ],
)
def test_order_statistics(function, shape, expected):
    check_bound(Lambda(function), *shape, n=8, expected=expected, attained=expected == 1.0)


def test_groups_that_are_sorted_have_constant_one():
    def group_sort(m, x):
        return x.view(len(x), -1, 2).sort(2)[0].flatten(1)

    check_bound(Lambda(group_sort), 6, expected=1.0, attained=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: x.sort(1)[1].double(), "index jumps"),
        (lambda m, x: x.topk(2, 1)[1] + x[:, :2], "index jumps"),
        (lambda m, x: x.argsort(1) * 1.0, "index jumps"),
        (lambda m, x: x.gather(1, x.sort(1)[1]), "index jumps"),
        (lambda m, x: x.sort(0)[0], "mixes the samples"),
        (lambda m, x: x.msort(), "mixes the samples"),
        (lambda m, x: x.median(), "mixes the samples"),
        (lambda m, x: x.topk(2, 1, sorted=False)[0], "no stated order"),
        (lambda m, x: x.scatter_add(0, m.i[:2], x), "mixes the samples"),
        (lambda m, x: x.index_add(0, torch.tensor([1, 0]), x), "mixes the samples"),
        (lambda m, x: x.new_zeros(2, 4).scatter_add(1, x.argsort(1), x), "jumps"),
        (lambda m, x: x.new_zeros(2, 4).scatter(1, m.i[:2], x), "at indices"),
        (lambda m, x: x.scatter_reduce(1, m.i[:2], x, "prod"), "prod"),
        (lambda m, x: x.diff(dim=0), "mixes the samples"),
        (lambda m, x: x.cumsum(0), "mixes the samples"),
        (lambda m, x: x.diff(dim=1, prepend=x[:, :1]), "depends"),
        (lambda m, x: F.fold(x[:, :, None].mT.transpose(0, 1).reshape(4, 2), (1, 2), 1), "channels|mixes"),
    ],
)
def test_what_jumps_or_mixes_is_refused(function, reason):
    model = Lambda(function, i=torch.tensor([[0, 1, 1, 3]] * 2))
    with pytest.raises(UnsupportedLayerError, match=reason):
        NetworkBound.trace(model, torch.randn(2, 4).double())


INDEX = torch.tensor([0, 2, 2, 1, 2])


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda m, x: x.new_zeros(len(x), 3).index_add(1, m.i, x), (5,), math.sqrt(3)),
        (lambda m, x: x.new_zeros(len(x), 3).index_add(-1, m.i, x, alpha=-2), (5,), 2 * math.sqrt(3)),
        (lambda m, x: x.new_zeros(len(x), 3, 2).index_add(1, m.i, x), (5, 2), math.sqrt(3)),
        (lambda m, x: x.new_zeros(len(x), 3).scatter_add(1, m.i.expand(len(x), 5), x), (5,), math.sqrt(3)),
        (lambda m, x: x.new_zeros(len(x), 3).scatter_add(-1, m.i[:2].expand(len(x), 2), x), (2,), 1.0),
        (lambda m, x: x[:, :3].scatter_add(1, m.i.expand(len(x), 5), x), (5,), None),
        (lambda m, x: x.new_zeros(len(x), 2, 3).scatter_add(2, m.i.expand(len(x), 2, 5), x), (2, 5), math.sqrt(3)),
        (lambda m, x: x.new_zeros(len(x), 3).scatter_reduce(1, m.i.expand(len(x), 5), x, "amax"), (5,), 1.0),
        (lambda m, x: x.new_zeros(len(x), 3).scatter_reduce(1, m.i.expand(len(x), 5), x, "sum"), (5,), math.sqrt(3)),
        (lambda m, x: x[:, :3].scatter_reduce(1, m.i.expand(len(x), 5), x, "mean"), (5,), None),
        (lambda m, x: x[:, :3].scatter_reduce(1, m.i.expand(len(x), 5), x, "amin", include_self=False), (5,), None),
        (lambda m, x: x.new_zeros(len(x), 2, 5).slice_scatter(x, 2, 0, 5, 2), (2, 3), 1.0),
        (lambda m, x: (2 * x).slice_scatter(x[:, 1:], 1, 1), (4,), None),
        (lambda m, x: x.new_zeros(len(x), 2, 3).select_scatter(x, 1, -1), (3,), 1.0),
        (lambda m, x: x.new_zeros(len(x), 3, 3).diagonal_scatter(x, 0, 1, 2), (3,), 1.0),
        (lambda m, x: F.fold(x, (4, 4), 2), (4, 9), 2.0),
        (lambda m, x: F.fold(x, (3, 5), (1, 2), padding=(0, 1), stride=(1, 2)), (4, 9), 1.0),
        (lambda m, x: F.fold(F.unfold(x, 2), (4, 4), 2), (3, 4, 4), 4.0),
        (lambda m, x: x.cumsum(1), (5,), 1 / (2 * math.sin(math.pi / 22))),
        (lambda m, x: x.cumsum(-2), (3, 2), 1 / (2 * math.sin(math.pi / 14))),
        (lambda m, x: x.cumsum(1), (1,), 1.0),
        (lambda m, x: x.diff(), (5,), 2 * math.cos(math.pi / 10)),
        (lambda m, x: x.diff(dim=1, n=2), (5, 2), None),
        (lambda m, x: x.diff(dim=-1, prepend=x.new_ones(len(x), 1)), (4,), None),
    ],
)
def test_linear_maps_between_places(function, shape, expected):
    model = Lambda(function, i=INDEX)
    check_bound(model, *shape, n=4, expected=expected, attained=expected is not None)


def test_writing_into_a_part_in_place():
    def forward(m, x):
        y = torch.zeros_like(x)
        y[:, 1:] = 3 * x[:, :-1]
        y[:, 0] = x.sum(1)
        return y

    check_bound(Lambda(forward), 4, expected=math.sqrt(9 + 4), n=2)


def group_sort(x, size, dim=1):
    """GroupSort as deel-torchlip writes it."""
    shape = (*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])
    if size == 2:
        y = x.view(shape)
        smaller, larger = y.min(dim + 1, keepdim=True)[0], y.max(dim + 1, keepdim=True)[0]
        return torch.cat([smaller, larger], dim + 1).view(x.shape)
    return x.reshape(shape).sort(dim + 1)[0].reshape(x.shape)


def halves(x, dim=1):
    first, second = x.split(x.size(dim) // 2, dim)
    return torch.cat([torch.max(first, second), torch.min(first, second)], dim)


def chosen(a, b):
    """MaxMin by choices."""
    return torch.cat([torch.where(a > b, a, b), torch.where(a > b, b, a)], 1)


SORTED = {
    "halves": halves,
    "the last dimension": lambda x: halves(x, -1),
    "chunks": lambda x: torch.cat([torch.minimum(*x.chunk(2, 1)), torch.maximum(*x.chunk(2, 1))], 1),
    "groups of two": lambda x: group_sort(x, 2),
    "groups of four": lambda x: group_sort(x, 4),
    "neighbours": lambda x: torch.stack(
        [torch.maximum(x[:, ::2], x[:, 1::2]), torch.minimum(x[:, ::2], x[:, 1::2])], 2
    ),
    "swapped": lambda x: torch.cat([torch.maximum(x[:, :2], x[:, 2:]), torch.minimum(x[:, 2:], x[:, :2])], 1),
    "amax": lambda x: torch.stack([x.unflatten(1, (2, 2)).amax(1), x.unflatten(1, (2, 2)).amin([1])], 1),
    "three of each": lambda x: torch.cat([x.unflatten(2, (2, 3)).amax(3), x.unflatten(2, (2, 3)).amin(3)], 2),
    "twice": lambda x: halves(halves(x)),
    "where": lambda x: chosen(*x.chunk(2, 1)),
    "where, of parts written anew": lambda x: torch.cat(
        [torch.where(x[:, :2] > x[:, 2:], x[:, :2], x[:, 2:]), torch.where(x[:, :2] <= x[:, 2:], x[:, :2], x[:, 2:])], 1
    ),
    "where, and a minimum": lambda x: torch.stack(
        [torch.where(x[:, ::2] < x[:, 1::2], x[:, 1::2], x[:, ::2]), torch.minimum(x[:, ::2], x[:, 1::2])], 2
    ),
    "topk": lambda x: x.unflatten(1, (2, 2)).topk(2, 2)[0].flatten(1, 2),
}


@pytest.mark.parametrize("name", SORTED)
def test_extremes_of_disjoint_groups_side_by_side_have_constant_one(name):
    check_bound(Lambda(lambda m, x: SORTED[name](x)), 4, 6, n=8, expected=1.0, attained=True)


MORE_THAN_ONE = {
    "maxima twice": lambda x: torch.cat([torch.maximum(*x.chunk(2, 1)), torch.maximum(*x.chunk(2, 1))], 1),
    "other pairs": lambda x: torch.cat([torch.maximum(*x.chunk(2, 1)), torch.minimum(x[:, ::2], x[:, 1::2])], 1),
    "groups of one": lambda x: torch.cat([x.unsqueeze(1).amax(1), x.unsqueeze(1).amin(1)], 1),
    "an element in two groups": lambda x: torch.cat(
        [torch.maximum(x[:, :1], x[:, 1:]), torch.minimum(x[:, :1], x[:, 1:])], 1
    ),
    "three branches": lambda x: torch.cat(
        [torch.maximum(*x.chunk(2, 1)), torch.minimum(*x.chunk(2, 1)), torch.minimum(*x.chunk(2, 1))], 1
    ),
    "of itself": lambda x: torch.cat([torch.maximum(x, x), torch.minimum(x, x)], 1),
    "choices that are both maxima": lambda x: torch.cat(
        [torch.where(x[:, :2] > x[:, 2:], x[:, :2], x[:, 2:]), torch.where(x[:, :2] < x[:, 2:], x[:, 2:], x[:, :2])], 1
    ),
}


@pytest.mark.parametrize("name", MORE_THAN_ONE)
def test_extremes_that_may_take_an_element_twice_count_more(name):
    bound = NetworkBound.trace(Lambda(lambda m, x: MORE_THAN_ONE[name](x)), torch.zeros(2, 4, 6, dtype=torch.float64))
    assert bound.log_bound(torch.zeros(0, dtype=torch.float64)).exp() > 1.4


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.where(a > b, a, 2 * b),
        lambda a, b: torch.where(a > b + 1, a, b),
        lambda a, b: torch.where(a > b, a.flip(1), b),
        lambda a, b: torch.where(a == b, a, b),
        lambda a, b: torch.where(a[:, :1] > b[:, :1], a, b),
    ],
)
def test_other_choices_between_two_values_are_refused(function):
    with pytest.raises(UnsupportedLayerError, match="a comparison jumps"):
        NetworkBound.trace(Lambda(lambda m, x: function(*x.chunk(2, 1))), torch.zeros(2, 4, 6))


def test_a_choice_of_the_greater_is_the_maximum():
    check_bound(Lambda(lambda m, x: torch.where(x >= m.t, x, m.t), t=torch.zeros(3)), 3, expected=1.0, attained=True)

    def lower(m, x):
        y = 2 * x.sin()
        return torch.where(x < y, x, y)

    check_bound(Lambda(lower), 3)


def test_extremes_of_two_values_are_no_sorted_pairs():
    model = Lambda(lambda m, x: torch.cat([torch.maximum(x, 2 * x), torch.minimum(x, 2 * x)], 1))
    bound = NetworkBound.trace(model, torch.zeros(2, 4, 6, dtype=torch.float64))
    assert bound.log_bound(torch.zeros(0, dtype=torch.float64)).exp() > 2.2
