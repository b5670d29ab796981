"""Computed weights and scales count in exact arithmetic on the stored tensors, whatever dtype they are stored in."""

import warnings

import numpy as np
import pytest
import torch
from support.networks import Lambda
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lightning_lip import project
from lightning_lip.certificates.interval import certify
from lightning_lip.constants.modules import lipschitz_constant
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.operators.known import operator_of
from lightning_lip.rigorous.evaluation import evaluated
from lightning_lip.rigorous.operators import certified_norm

# Certificates err by 1e-11, the evaluation by 1e-12; the models' dtypes by 1e-7 to 1e-2.
TIGHT = 1e-10

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Own(nn.Module):
    """A parametrization that casts, makes a tensor of the default dtype and holds one that is not registered."""

    def __init__(self):
        super().__init__()
        self.factor = torch.rand(8)

    def forward(self, weight):
        return (weight.float() * torch.linspace(0.1, 0.7, 8) * self.factor).to(weight.dtype)


def own(layer):
    parametrize.register_parametrization(layer, "weight", Own())
    return layer


LAYERS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "own": own,
}


def make(kind, seed, dtype, linear=None):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return LAYERS[kind](nn.Linear(8, 6) if linear is None else linear).to(dtype).eval()


def exact_weight(layer, kind):
    """The weight by numpy in fp64, from the stored tensors."""

    def stored(tensor):
        return tensor.detach().double().numpy()

    p = getattr(layer, "parametrizations", {"weight": None})["weight"]
    if "weight_norm" in kind:
        g, v = (layer.weight_g, layer.weight_v) if p is None else (p.original0, p.original1)
        axes = tuple(range(1, v.dim()))
        return stored(g) * stored(v) / np.sqrt((stored(v) ** 2).sum(axis=axes, keepdims=True))
    if "spectral_norm" in kind:
        w, u, v = (layer.weight_orig, layer.weight_u, layer.weight_v) if p is None else (p.original, p[0]._u, p[0]._v)
        return stored(w) / (stored(u) @ stored(w) @ stored(v))
    return stored(p.original) * np.linspace(0.1, 0.7, 8) * stored(p[0].factor)


def certified(layer, data=None):
    result = certify(layer, torch.zeros(1, 8), data=data)
    if not result.certified and "assigned during export" in result.refused[0]:
        pytest.skip("this torch does not export the hooks of the old normalisations")
    assert result.certified, result.refused
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_computed_weight_counts_in_exact_arithmetic(kind, dtype):
    for seed in range(8):
        layer = make(kind, seed, dtype)
        truth = np.linalg.norm(exact_weight(layer, kind), 2)
        before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        result = certified(layer)
        assert truth <= result.upper <= truth * (1 + TIGHT)
        assert all(torch.equal(before[key], tensor) for key, tensor in layer.state_dict().items())
        if not kind.startswith("old"):
            assert certified_norm(operator_of(layer, "")) == pytest.approx(result.upper, rel=1e-14)


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm"])
def test_the_measured_norm_of_a_computed_weight_contradicts_no_certificate(kind):
    for seed in range(30):
        layer = make(kind, seed, torch.float32)
        result = certified(layer, torch.randn(16, 8))
        assert result.lower <= result.upper


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("use_trivialization", [True, False])
def test_orthogonal_maps_count_in_exact_arithmetic(orthogonal_map, use_trivialization):
    torch.manual_seed(0)
    layer = parametrizations.orthogonal(
        nn.Linear(6, 6), orthogonal_map=orthogonal_map, use_trivialization=use_trivialization
    )
    result = certify(layer, torch.zeros(1, 6), data=torch.randn(4, 6))
    assert result.certified
    assert result.lower <= result.upper
    if not use_trivialization:  # the stored base is orthogonal up to fp32's rounding only
        assert 1 <= result.upper <= 1 + TIGHT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_computed_kernel_counts_in_exact_arithmetic(padding_mode, dtype):
    conv = nn.Conv1d(8, 6, 3, padding=1, padding_mode=padding_mode)
    conv = make("weight_norm", 0, dtype, conv)
    exact = exact_weight(conv, "weight_norm")
    plain = nn.Conv1d(8, 6, 3, padding=1, padding_mode=padding_mode, bias=False, dtype=torch.float64)
    plain.weight.data.copy_(torch.from_numpy(exact))
    truth = certify(plain, torch.zeros(1, 8, 5)).upper
    assert truth <= certify(conv, torch.zeros(1, 8, 5)).upper <= truth * (1 + TIGHT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_computed_weight_before_a_batch_norm_counts_in_exact_arithmetic(dtype):
    layer, norm = make("weight_norm", 0, dtype), nn.BatchNorm1d(6).to(dtype).eval()
    norm.running_var.uniform_(0.2, 2)
    norm.weight.data.normal_()
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    truth = np.linalg.norm(scale.numpy()[:, None] * exact_weight(layer, "weight_norm"), 2)
    upper = certify(nn.Sequential(layer, norm), torch.zeros(1, 8)).upper
    assert truth <= upper <= truth * (1 + 1e-6)  # the scale is rounded up to fp32


def test_a_double_weight_before_a_batch_norm_is_one_operator_with_it():
    layer, norm = nn.Linear(2, 2).double(), nn.BatchNorm1d(2, eps=0.0).double().eval()
    layer.weight.data.copy_(torch.diag(torch.tensor([100.0, 0.01])))
    norm.weight.data.copy_(torch.tensor([0.01, 100.0]))
    assert 1 <= certify(nn.Sequential(layer, norm), torch.zeros(1, 2)).upper <= 1 + 1e-6
    layer.weight.data.mul_(1e300)
    norm.weight.data.mul_(1e30)
    assert certify(nn.Sequential(layer, norm), torch.zeros(1, 2)).upper == float("inf")


def scales(dtype):
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(6, generator=g).to(dtype), torch.rand(6, generator=g).to(dtype)
    stored = a.double().numpy(), b.double().numpy()
    return a, b, stored


@pytest.mark.parametrize("dtype", DTYPES)
def test_computed_scales_count_in_exact_arithmetic(dtype):
    a, b, (x, y) = scales(dtype)
    cases = {
        "exp of a parameter": (Lambda(lambda m, v: v * m.p.exp(), p=nn.Parameter(a)), np.exp(x)),
        "sum of buffers": (Lambda(lambda m, v: v * (m.a + m.b), a=a, b=b), x + y),
        "divisor": (Lambda(lambda m, v: v / (m.a * m.b + 1), a=a, b=b), 1 / (x * y + 1)),
        "cast": (Lambda(lambda m, v: v * (m.a.float() * m.b.bfloat16()).half(), a=a, b=b), x * y),
        "slope of a prelu": (Lambda(lambda m, v: F.prelu(v, m.a + m.b + 1), a=a, b=b), x + y + 1),
        "gamma": (
            Lambda(lambda m, v: F.layer_norm(v, (6,), (m.p + m.b) / 3, eps=1.0), p=nn.Parameter(a), b=b),
            (x + y) / 3,
        ),
    }
    for name, (model, exact) in cases.items():
        truth = np.abs(exact).max()
        result = certify(model.to(dtype), torch.zeros(1, 6, dtype=dtype))
        assert result.certified, (name, result.refused)
        upper = result.upper
        assert truth * (1 - 1e-15) <= upper <= truth * (1 + 1e-12), name


def test_a_computed_matrix_of_several_factors_counts_in_exact_arithmetic():
    torch.manual_seed(0)
    w, b, a = torch.randn(6, 8), torch.randn(6, 2), torch.randn(2, 8)
    model = Lambda(lambda m, x: F.linear(x, m.w + 0.5 * m.b @ m.a), w=nn.Parameter(w), b=nn.Parameter(b), a=a)
    exact = w.double().numpy() + 0.5 * b.double().numpy() @ a.double().numpy()
    truth = np.linalg.norm(exact, 2)
    assert truth <= certify(model, torch.zeros(1, 8)).upper <= truth * (1 + TIGHT)


def test_cancellation_in_fp64_is_measured_in_fp32():
    a = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    value, error = evaluated(lambda: (a + 1e6) - 1e6)
    assert ((value - a).abs() <= error).all()
    assert error.max() < 1e-7
    assert ((value - a).abs() > 1e-12).any()  # more than the roundings that count in any case


def test_stored_tensors_are_exact_beyond_fp32():
    huge = torch.tensor([1e300], dtype=torch.float64)
    assert evaluated(lambda: huge.view(1, 1).double()).error is None
    result = certify(Lambda(lambda m, x: x * m.huge, huge=huge), torch.zeros(1, 1).double())
    assert result.upper == pytest.approx(1e300)


@torch.library.custom_op("lightning_lip_tests::thirds", mutates_args=())
def thirds(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 3


@thirds.register_fake
def _(x):
    return torch.empty_like(x, dtype=torch.float32)


@torch.library.custom_op("lightning_lip_tests::fp32_only", mutates_args=())
def fp32_only(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise TypeError("expected fp32")
    return x / 3


@fp32_only.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: F.linear(x, thirds(m.w)), "returns another dtype"),
        (lambda m, x: F.linear(x, fp32_only(m.w)), "expected fp32"),
        (lambda m, x: x * thirds(m.a), "returns another dtype"),
        (lambda m, x: x * (m.b.double() * 1e300).sum(), "overflows in fp32"),
        (lambda m, x: x[:, :2] * m.a[:1].view(torch.bfloat16), "reads the bits anew"),
        (lambda m, x: F.linear(x, m.w.view(torch.int32).view(torch.float32)), "reads the bits anew"),
    ],
)
def test_what_cannot_be_computed_in_fp64_is_refused_by_name(function, reason):
    model = nn.Sequential(Lambda(function, w=nn.Parameter(torch.eye(3)), a=torch.ones(3), b=torch.ones(3).double()))
    result = certify(model, torch.zeros(1, 3))
    assert not result.certified
    assert reason in result.refused[0]
    assert result.refused[0].startswith("0 ")


def test_a_computation_that_fails_in_any_dtype_keeps_its_error():
    def fails():
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        evaluated(fails)


def test_the_projection_certifies_a_computed_matrix_in_exact_arithmetic():
    model = Lambda(lambda m, x: F.linear(x, m.w * 0.3), w=nn.Parameter(torch.randn(6, 8)))
    projection = project(model, 0.1, example_input=torch.zeros(1, 8))
    truth = np.linalg.norm(model.w.detach().double().numpy() * 0.3, 2)
    assert truth <= projection.bound <= 0.1
    assert NetworkBound.trace(model, torch.zeros(1, 8)).operators[0].weight().dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_constant_of_a_layer_with_a_computed_gamma_is_exact(dtype):
    a, _, (x, _) = scales(dtype)

    class Exp(nn.Module):
        def forward(self, weight):
            return weight.exp()

    for layer, constant in ((nn.LayerNorm(6, eps=1.0), 1.0), (nn.BatchNorm1d(6, eps=3.0), 0.5), (nn.PReLU(6), 1.0)):
        layer.weight.data.copy_(a)
        parametrize.register_parametrization(layer.to(dtype), "weight", Exp())
        truth = np.exp(x).max() * constant
        assert truth * (1 - 1e-15) <= lipschitz_constant(layer) <= truth * (1 + 1e-12)
