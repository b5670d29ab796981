import math

import pytest
import torch
from support.networks import Lambda
from support.truth import check_bound, operator_norms
from torch import nn
from torch.nn import functional as F

from lightning_lip.certificates.interval import Certificate, certify
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound


def parameter(*shape):
    torch.manual_seed(sum(shape))
    return nn.Parameter(torch.randn(shape))


EXACT = [
    ("bi,oi->bo", (3,), (4, 3)),
    ("oi,bi->bo", (3,), (4, 3)),
    ("bi,io", (3,), (3, 4)),
    ("bti,oi->bto", (2, 3), (4, 3)),
    ("b...i,oi->...bo", (2, 3), (4, 3)),
    ("bhti,hio->bhto", (2, 2, 3), (2, 3, 4)),
    ("bgi,gio->bog", (3, 2), (3, 2, 4)),
    ("b i, i -> b i", (3,), (3,)),
    ("bi,i->b", (3,), (3,)),
    ("bi,o->bio", (3,), (4,)),
    ("bi,oi->b", (3,), (4, 3)),
    ("bij,kj->bk", (2, 3), (4, 3)),
    ("bij,->bi", (2, 3), ()),
    ("bhwc,hkc->bhwk", (2, 3, 4), (2, 5, 4)),
    ("bct,cdt->bdt", (2, 3), (2, 2, 3)),
    ("...i,...io->...o", (2, 3), (1, 3, 4)),
    ("...i,...io->...o", (1, 3), (5, 3, 2)),
    ("bgi,gio->bgo", (3, 1), (3, 1, 2)),
]


@pytest.mark.parametrize(("equation", "shape", "weight"), EXACT)
def test_einsum_with_a_weight(equation, shape, weight):
    tensor = parameter(*weight)

    def forward(m, x):
        return torch.einsum(equation, *((m.w, x) if equation.startswith("oi,b") else (x, m.w)))

    model = Lambda(forward, w=tensor)
    check_bound(model, *shape, n=1, attained=True)
    (op,) = NetworkBound.trace(model, torch.randn(2, *shape).double()).operators
    assert op.parameters == (model.w,)
    (gradient,) = torch.autograd.grad(operator_norms([op]).sum(), op.parameters)
    assert gradient.abs().sum() > 0
    certificate = certify(model, torch.randn(2, *shape).double())
    assert isinstance(certificate, Certificate)


PRODUCTS = [
    (lambda m, x: x @ m.w, (3, 2, 4), (3, 4, 5)),
    (lambda m, x: m.w @ x, (3, 2, 4), (3, 5, 2)),
    (lambda m, x: m.w @ x, (1, 2, 4), (3, 5, 2)),
    (lambda m, x: torch.matmul(x, m.w), (2, 4), (4,)),
    (lambda m, x: torch.matmul(m.w, x), (2, 4), (2,)),
    (lambda m, x: torch.matmul(x, m.w), (2, 4), (3, 1, 4, 2)),
    (lambda m, x: torch.bmm(x.transpose(0, 1), m.w), (3, 4), (3, 4, 2)),
    (lambda m, x: torch.bmm(m.w, x.transpose(0, 1).mT), (3, 4), (3, 2, 4)),
    (lambda m, x: torch.baddbmm(m.w[:, :1], x.transpose(0, 1), m.w, alpha=-2.0), (3, 4), (3, 4, 2)),
    (lambda m, x: torch.tensordot(x, m.w, dims=([2, 1], [0, 1])), (3, 4), (4, 3, 2)),
    (lambda m, x: torch.tensordot(m.w, x, dims=([1], [-1])), (3, 4), (5, 4)),
    (lambda m, x: torch.tensordot(x, m.w, dims=0), (3,), (4, 2)),
]


@pytest.mark.parametrize(("function", "shape", "weight"), PRODUCTS)
def test_products_with_batched_weights(function, shape, weight):
    model = Lambda(function, w=parameter(*weight))
    check_bound(model, *shape, n=1, attained=True)
    (op,) = NetworkBound.trace(model, torch.randn(2, *shape).double()).operators
    assert op.name == "w"
    check_bound(Lambda(function, w=parameter(*weight).detach()), *shape, n=1, attained=True)


def test_one_weight_is_one_operator_however_it_is_used():
    model = Lambda(lambda m, x: torch.einsum("bi,oi->bo", F.linear(x, m.w.weight), m.w.weight))
    model.w = nn.Linear(3, 3, bias=False)
    (op,) = NetworkBound.trace(model, torch.randn(2, 3)).operators
    assert op.multiplicity == 2
    apart = Lambda(lambda m, x: (x.transpose(0, 1) @ m.w @ m.w.mT).tanh() @ m.w, w=parameter(3, 4, 2))
    bound = NetworkBound.trace(apart, torch.randn(2, 3, 4))
    assert [op.multiplicity for op in bound.operators] == [2, 1]
    check_bound(apart, 3, 4)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: torch.einsum("bi,bi->b", x, x), "product of two activations"),
        (lambda m, x: torch.einsum("bij,bjk->bik", x[:, None], x[:, :, None]), "product of two activations"),
        (lambda m, x: torch.einsum("bi,oi->o", x, m.w), "mixes the samples"),
        (lambda m, x: torch.einsum("bi,bi->bi", x, m.w[:2]), "factor of its own"),
        (lambda m, x: torch.einsum("bii->bi", x[:, :, None] * m.w), "diagonal"),
        (lambda m, x: torch.einsum("bi,oi,oi->bo", x, m.w, m.w), "more than two"),
        (lambda m, x: torch.tensordot(x, m.w[:2], dims=([0], [0])), "mixes the samples"),
        (lambda m, x: torch.matmul(x, x.mT), "product of two activations"),
        (lambda m, x: torch.tensordot(x, x, dims=([1], [1])), "product of two activations"),
        (lambda m, x: torch.baddbmm(x[:, None], x[:, None], m.w.expand(2, 4, 4)), "bias depends"),
    ],
)
def test_what_is_no_product_with_a_weight_is_refused(function, reason):
    model = Lambda(function, w=parameter(4, 4))
    with pytest.raises(UnsupportedLayerError, match=reason):
        NetworkBound.trace(model, torch.randn(2, 4))


def test_einsum_of_one_tensor_sums_and_permutes():
    check_bound(Lambda(lambda m, x: torch.einsum("bij->bj", x)), 3, 2, expected=math.sqrt(3), attained=True)
    check_bound(Lambda(lambda m, x: torch.einsum("b...->...b", x)), 3, 2, expected=1.0, attained=True)
