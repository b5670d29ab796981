import math

import pytest
import torch
from support.networks import Lambda, linear
from support.truth import check_bound, jacobian_norm, operator_norms, value_of
from torch import nn
from torch.nn import functional as F

from lightning_lip.constants import modules as constants
from lightning_lip.constants.modules import register_constant
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound

POINTWISE = [
    F.relu, F.relu6, F.gelu, F.silu, F.mish, F.selu, F.hardswish, torch.sigmoid, F.hardsigmoid, torch.tanh, F.elu,
    F.celu, F.leaky_relu, F.rrelu, F.softplus, F.logsigmoid, F.softsign, F.tanhshrink, F.softshrink, F.hardtanh,
    torch.erf, torch.sin, torch.cos, torch.abs, torch.neg, torch.atan, torch.asinh,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: F.threshold(x, 0.1, 0.1), lambda x: x.clamp(-1, 1),
    lambda x: x.clamp(min=0), lambda x: F.leaky_relu(x, -3.0), lambda x: F.elu(x, 2.0),
]  # fmt: skip


@pytest.mark.parametrize("function", POINTWISE)
def test_pointwise_functions(function):
    grid = torch.linspace(-30, 30, 60001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(grid).sum(), grid)
    value = value_of(Lambda(lambda m, x: function(x)), torch.randn(2, 3))
    steepest = slope.abs().max().item()
    # torch's backward of hardsigmoid multiplies by an fp32 1/6, 3e-8 too large.
    assert steepest * (1 - 4e-8) <= value <= steepest * (1 + 1e-4)


MODULES = [
    nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(), nn.Softmin(1), nn.Softmax2d(), nn.LPPool2d(2, 2),
    nn.LocalResponseNorm(3), nn.PReLU(4, init=-2.0), nn.PReLU(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, True),
    nn.ZeroPad2d(1), nn.ReflectionPad2d(2), nn.CircularPad2d(1), nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2),
    nn.ChannelShuffle(2), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.AdaptiveMaxPool2d(3), nn.Dropout2d(0.3),
    nn.AdaptiveAvgPool2d((2, None)), nn.Flatten(), nn.Identity(), nn.Softplus(2.0), nn.RReLU(), nn.Unfold(2),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_modules(module):
    # An in-place operation beside it sends the graph through functionalisation, where functions decompose.
    check_bound(nn.Sequential(Lambda(lambda m, x: x.clone().add_(1.0)), module), 4, 6, 6, n=2)


def test_live_constants_are_read_at_each_evaluation():
    model = nn.Sequential(nn.PReLU(init=0.5))
    bound = NetworkBound.trace(model, torch.randn(2, 3))
    empty = torch.zeros(0)
    assert bound.log_bound(empty).exp().item() == pytest.approx(1.0)
    model[0].weight.data.fill_(-4.0)
    assert bound.log_bound(empty).exp().item() == pytest.approx(4.0)
    scaled = Lambda(lambda m, x: x * m.s.abs())
    scaled.register_buffer("s", torch.tensor([1.0, -3.0]))
    bound = NetworkBound.trace(scaled, torch.randn(2, 2))
    assert bound.log_bound(empty).exp().item() == pytest.approx(3.0)
    scaled.s.mul_(2)
    assert bound.log_bound(empty).exp().item() == pytest.approx(6.0)


def test_a_slope_that_is_nan_shows():
    model = nn.Sequential(nn.PReLU())
    bound = NetworkBound.trace(model, torch.randn(2, 3))
    model[0].weight.data.fill_(math.nan)
    assert bound.log_bound(torch.zeros(0)).isnan()


class FiftySoftsign(nn.Softsign):
    def forward(self, x):
        return 50 * super().forward(x)


class FiftyTanhshrink(nn.Tanhshrink):
    def forward(self, x):
        return 50 * super().forward(x)


class FiftySoftshrink(nn.Softshrink):
    def forward(self, x):
        return 50 * super().forward(x)


class Square(nn.Tanhshrink):
    def forward(self, x):
        return x * x


class Renamed(nn.Softsign):
    """A subclass that keeps the forward."""


def patched():
    module = nn.Softsign()
    module.forward = lambda x: 50 * F.softsign(x)
    return module


@pytest.mark.parametrize("make", [FiftySoftsign, FiftyTanhshrink, FiftySoftshrink, patched])
def test_a_module_with_a_forward_of_its_own_is_what_that_computes(make):
    check_bound(nn.Sequential(make()), 4, expected=50.0, scale=5.0)
    with pytest.raises(UnsupportedLayerError, match="a forward of its own"):
        constants.lipschitz_constant(make())


def test_a_module_with_a_forward_of_its_own_may_have_no_constant():
    with pytest.raises(UnsupportedLayerError, match="product of two activations"):
        NetworkBound.trace(nn.Sequential(Square()), torch.randn(2, 4))
    check_bound(nn.Sequential(Renamed()), 4, expected=1.0)
    assert constants.lipschitz_constant(Renamed()) == 1.0


@pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.RMSNorm(3, eps=1e-5)])
def test_a_normalisation_has_its_gamma_as_operator(module):
    module.weight.data.copy_(torch.tensor([1.0, -3.0, 2.0]))
    bound = NetworkBound.trace(nn.Sequential(module), torch.randn(2, 3))
    (op,) = bound.operators
    assert operator_norms([op]).item() == 3
    value = bound.log_bound(torch.tensor([3.0], dtype=torch.float64).log()).exp().item()
    assert value == pytest.approx(3 / math.sqrt(1e-5))


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(constants, "_RULES", {})


class Gate(nn.Module):
    """x times a gate: a product of two activations, of known constant only to who knows that x is bounded."""

    def __init__(self):
        super().__init__()
        self.limit = 2.0

    def forward(self, x, y=None):
        return x * torch.cos(x if y is None else y)


@pytest.mark.usefixtures("rules")
def test_registered_modules_are_one_node():
    a, gate = linear(4, 4), Gate()
    model = nn.Sequential(a, gate)
    with pytest.raises(UnsupportedLayerError, match="1 \\(Gate\\)"):
        NetworkBound.trace(model, torch.randn(2, 4).double())
    register_constant(Gate, lambda module: module.limit)
    bound = NetworkBound.trace(model, torch.randn(2, 4).double())
    zero = torch.zeros(1, dtype=torch.float64)
    assert bound.log_bound(zero).exp().item() == pytest.approx(2.0)
    gate.limit = 5.0
    assert bound.log_bound(zero).exp().item() == pytest.approx(5.0)
    assert "forward" not in vars(gate)
    two = Lambda(lambda m, x: m.g(m.a(x), y=m.a(x)), a=a, g=gate)
    bound = NetworkBound.trace(two, torch.randn(2, 4).double())
    assert bound.log_bound(zero).exp().item() == pytest.approx(5 * math.sqrt(2))
    gate.forward = lambda x: 2 * torch.sin(x)
    NetworkBound.trace(model, torch.randn(2, 4).double())
    assert gate(torch.zeros(1)) == 0
    del gate.forward
    turned = Lambda(lambda m, x: m.g(x.t()), g=gate)
    with pytest.raises(UnsupportedLayerError, match="first dimension"):
        NetworkBound.trace(turned, torch.randn(2, 4))


@pytest.mark.usefixtures("rules")
def test_a_registered_module_returns_one_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    register_constant(Pair, lambda module: 1.0)
    with pytest.raises(UnsupportedLayerError, match="one tensor"):
        NetworkBound.trace(nn.Sequential(Pair()), torch.randn(2, 4))
    with pytest.raises(UnsupportedLayerError, match="norm_type"):
        NetworkBound.trace(nn.Sequential(nn.LPPool1d(3, 2)), torch.randn(2, 1, 4))


@pytest.mark.parametrize("sizes", [(1, 8, 3, 1), (1, 8, 3, 2), (1, 4, 6, 1), (3, 4, 2, 1)])
def test_a_group_norm_that_counts_samples_otherwise_is_refused(sizes):
    function = Lambda(lambda m, x: torch.native_group_norm(x, None, None, *sizes, 0.1)[0])
    with pytest.raises(UnsupportedLayerError, match="samples of a batch for one"):
        NetworkBound.trace(function, torch.randn(2, 4, 3))


@pytest.mark.parametrize("sizes", [(2, 4, 3, 2), (4, 2, 3, 1), (2, 2, 6, 1), (8, 1, 3, 1), (2, 3, 4, 3)])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_a_group_norm_whose_blocks_lie_within_a_sample_is_bounded(sizes, order):
    model = Lambda(lambda m, x: torch.native_group_norm(x.permute(order), None, None, *sizes, 0.1)[0])
    x = torch.zeros(2, 4, 3, dtype=torch.float64)
    assert value_of(model, x) == pytest.approx(0.1**-0.5)
    jacobian = torch.autograd.functional.jacobian(model, x).view(2, 12, 2, 12)
    assert jacobian[0, :, 1].abs().max() == jacobian[1, :, 0].abs().max() == 0
    # A constant input, where the slope is steepest.
    assert torch.linalg.matrix_norm(jacobian[0, :, 0], 2).item() <= value_of(model, x) * (1 + 1e-12)


def changed(**settings):
    def function(m, x):
        kept = {key: getattr(m.inner, key) for key in settings}
        for key, value in settings.items():
            setattr(m.inner, key, value)
        y = m.inner(x)
        for key, value in kept.items():
            setattr(m.inner, key, value)
        return y

    return function


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (nn.LocalResponseNorm(2, alpha=1.0, k=1.0), {"k": 0.01}),
        (nn.LPPool1d(2, 4), {"kernel_size": 2, "stride": 1}),
        (nn.LPPool1d(2, 2, 2), {"norm_type": math.inf}),
        (nn.Softshrink(0.5), {"lambd": 0.1}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_module_traced_as_one_counts_as_it_is_set_when_it_is_called(module, settings):
    x = torch.randn(2, 4, 4)
    same = type(module)(**{**{k: v for k, v in vars(module).items() if k in type(module).__constants__}, **settings})
    assert value_of(Lambda(changed(**settings), inner=module), x) == value_of(
        Lambda(lambda m, x: m.inner(x), inner=same), x
    )


@pytest.mark.usefixtures("rules")
def test_a_registered_module_that_is_called_in_another_state_is_read_there_or_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))
            self.times = 1.0

        def forward(self, x):
            return self.factor * self.times * x

    register_constant(Scale, lambda module: abs(module.factor.item() * module.times))
    scale, x = Scale(), torch.randn(2, 3)
    assert value_of(Lambda(changed(times=7.0), inner=scale), x) == pytest.approx(14.0)
    other = Lambda(lambda m, x: torch.func.functional_call(m.inner, {"factor": 5 * m.inner.factor}, (x,)), inner=scale)
    with pytest.raises(UnsupportedLayerError, match="other parameters or buffers than its own"):
        NetworkBound.trace(other, x)
    with pytest.raises(UnsupportedLayerError, match="training mode"):
        NetworkBound.trace(Lambda(changed(training=True), inner=scale), x)


C = math.sqrt(2 / math.pi)
WRITTEN_OUT = [
    lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    lambda x: x * 0.5 + 0.5 * x * torch.erf(x * 0.70710678),
    lambda x: x * (0.5 * (1 + torch.erf(x / 1.41421))),
    lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
    lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    lambda x: x * torch.sigmoid(1.702 * x),
    lambda x: x / (1 + torch.exp(-x)),
    lambda x: x * F.relu6(x + 3) / 6,
    lambda x: x * torch.clamp(x + 3, 0, 6) / 6,
    lambda x: x * F.hardtanh(x.add(3), 0.0, 6.0).mul(1 / 6),
    lambda x: x * torch.tanh(F.softplus(x)),
    lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
    lambda x: x * x.exp().log1p().tanh(),
    lambda x: x * (x > 0),
    lambda x: x * (x >= 0).to(x.dtype),
    lambda x: torch.where(x > 0, x, 0.01 * x),
    lambda x: torch.where(x < 0, torch.zeros_like(x), x),
    lambda x: x.masked_fill(x < 0, 0.0),
    lambda x: torch.where(x > 0, x, 1.5 * (torch.exp(x) - 1)),
    lambda x: torch.where(x > 0, x, torch.expm1(x)),
    lambda x: torch.where(x > 1, 2 * x - 1, x),
    lambda x: 1 / (1 + torch.exp(-x)),
    lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
    lambda x: torch.exp(-(x**2)),
    lambda x: torch.exp(-(x - 1).square() / 2),
    lambda x: torch.exp(-x.abs()),
    lambda x: x * torch.exp(-x * x),
    lambda x: 1 / (1 + x * x),
    lambda x: x / torch.sqrt(1 + x**2),
    lambda x: torch.sqrt(x * x + 1e-3),
    lambda x: x / (2 + 3 * x.abs()),
    lambda x: x - x.tanh(),
    lambda x: x + torch.sin(x) ** 2,
    lambda x: x * x.sign(),
    lambda x: -F.logsigmoid(-x),
]


@pytest.mark.parametrize("function", WRITTEN_OUT)
def test_functions_that_are_written_out_have_their_largest_slope(function):
    grid = torch.linspace(-30, 30, 60001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(grid).sum(), grid)
    steepest = slope.abs().max().item()
    for before, scale in ((lambda x: x, 1), (lambda x: x.relu().mT.contiguous() - 2 * x, 3)):
        model = Lambda(lambda m, x, before=before: function(before(x)))
        value = value_of(model, torch.randn(2, 3, 3, dtype=torch.float64)) / scale
        assert steepest * (1 - 1e-9) <= value <= steepest * (1 + 1e-3)


def test_a_function_is_read_from_the_latest_value_it_is_of():
    def silu(m, y):
        return y * torch.sigmoid(y) + m.s[0] * y

    silu_of_relu = Lambda(lambda m, x: silu(m, x.relu()), s=torch.ones(2))
    check_bound(silu_of_relu, 3, expected=1 + constants.SILU)
    number = Lambda(lambda m, x: m.t * x * (1 + torch.erf(x * m.t)), t=torch.tensor(0.5))
    assert value_of(Lambda(lambda m, x: x + torch.tensor(2.0) * x, t=1), torch.randn(2, 3)) == pytest.approx(3.0)
    with pytest.raises(UnsupportedLayerError, match="product of two activations"):
        NetworkBound.trace(number, torch.randn(2, 3))


ON_RANGES = [
    (lambda x: x.tanh() * x.flip(-1).sigmoid(), 1.25),
    (lambda x: x.tanh() * x.sin()[:, :1], 1 + math.sqrt(3)),
    (lambda x: x.tanh() / (2 + x.cos()), 2.0),
    (lambda x: x.sin() ** 3, 3.0),
    (lambda x: torch.log1p(x.relu()), 1.0),
    (lambda x: torch.log(x.relu() + 0.1), 10.0),
    (lambda x: torch.log2(1 + x.abs()), 1 / math.log(2)),
    (lambda x: torch.log10(x.sigmoid() + 1), 0.25 / math.log(10)),
    (lambda x: x.clamp(max=1.0).exp(), math.e),
    (lambda x: torch.exp2(x.clamp_max(2.0)), 4 * math.log(2)),
    (lambda x: torch.expm1(-F.softplus(x)), 1.0),
    (lambda x: (x.abs() + 0.25).sqrt(), 1.0),
    (lambda x: (x.relu() + 0.25).rsqrt(), 4.0),
    (lambda x: (-x.relu() - 2).reciprocal(), 0.25),
    (lambda x: 3 / (x.abs() + 0.5), 12.0),
    (lambda x: torch.tensor([1.0, -4.0, 2.0]).to(x) / (x.abs() + 1), 4.0),
    (lambda x: x.clamp(-2, 1) ** 2, 4.0),
    (lambda x: F.relu6(x) ** 1.5, 1.5 * math.sqrt(6)),
    (lambda x: (x.relu() + 0.5) ** -1.5, 1.5 * 2**2.5),
    (lambda x: x.softmax(1).square(), 1.0),
    (lambda x: torch.cat([x.tanh(), 3 * x.sin()], 1).view(len(x), 2, -1)[:, 1] * x.cos(), 3 + math.sqrt(10)),
    (lambda x: F.pad(x.tanh(), (1, 0), value=-2.0)[:, :-1] * x.sin(), 3.0),
    (lambda x: (F.dropout(x, 0.5, False).sigmoid() - 1).sort(-1)[0].exp(), 0.25),
    (lambda x: torch.maximum(x.tanh(), x.sin()).mean(-1, keepdim=True) * x.cos(), None),
    (lambda x: x.split(1, -1)[2].sin() * x.cos(), None),
]


@pytest.mark.parametrize(("function", "expected"), ON_RANGES)
def test_functions_of_bounded_values(function, expected):
    for scale in (0.5, 3.0):
        check_bound(Lambda(lambda m, x: function(x)), 3, n=20, expected=expected, scale=scale)


def test_what_can_change_has_no_range():
    model = Lambda(lambda m, x: (m.s * x.tanh()) * x.sin())
    model.s = nn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedLayerError, match="not the first known to be bounded"):
        NetworkBound.trace(model, torch.randn(2, 3))
    fixed = Lambda(lambda m, x: (torch.tensor([1.0, -3.0, 2.0]).to(x) * x.tanh()) * x.sin())
    check_bound(fixed, 3, expected=6.0, n=20)


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda m, x: torch.addcmul(m.b, m.w, x, value=-2), (3,), 6.0),
        (lambda m, x: torch.addcmul(x, x, m.w), (3,), 4.0),
        (lambda m, x: torch.addcmul(x, m.w, m.w), (3,), 1.0),
        (lambda m, x: torch.addcmul(m.b, x[:, :1], m.w), (3,), 3 * math.sqrt(3)),
        (lambda m, x: torch.lerp(x, x.flip(1), 0.25), (3,), 1.0),
        (lambda m, x: torch.lerp(x, x.flip(1), -1.0), (3,), 3.0),
        (lambda m, x: torch.lerp(m.b, x, torch.tensor([0.5, 2.0, -1.0]).to(x)), (3,), 2.0),
        (lambda m, x: torch.lerp(x, m.b, 0.25), (3,), 0.75),
        (lambda m, x: x.std(1), (3,), 1 / math.sqrt(2)),
        (lambda m, x: x.std(-1, unbiased=False, keepdim=True), (2, 4), 0.5),
        (lambda m, x: x.std((1, 2), correction=0.5), (2, 3), 1 / math.sqrt(5.5)),
        (lambda m, x: x.std((-1, 1)), (2, 2, 3), 1 / math.sqrt(5)),
        (lambda m, x: torch.cdist(x, m.p), (2, 3), 2.0),
        (lambda m, x: torch.cdist(x, m.p[:1]), (3,), 1.0),
        (lambda m, x: torch.cdist(m.p, x), (2, 3), 2.0),
        (lambda m, x: torch.cdist(m.p, x).mT, (3,), 2.0),
        (lambda m, x: torch.cdist(x, m.p, p=1.0), (2, 3), 2 * math.sqrt(3)),
        (lambda m, x: torch.cdist(x, m.p, p=math.inf), (2, 3), 2.0),
        (lambda m, x: torch.cdist(x, x.flip(1), p=3.0), (2, 3), 2 * math.sqrt(2)),
        (lambda m, x: torch.cdist(x, m.p.expand(1, 3, 4, 3)), (1, 2, 3), math.sqrt(12)),
        (lambda m, x: torch.exp(-torch.cdist(x, m.p).square()), (2, 3), 2 * math.sqrt(2 / math.e)),
    ],
)
def test_operations_of_several_tensors(function, shape, expected):
    torch.manual_seed(0)
    members = {"w": torch.tensor([1.0, -3.0, 2.0]), "b": torch.randn(3), "p": torch.randn(4, 3)}
    check_bound(Lambda(function, **members), *shape, n=10, expected=expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: torch.addcmul(x, x, x), "product of two activations"),
        (lambda m, x: torch.lerp(x, x, x), "weight depends"),
        (lambda m, x: torch.lerp(x, x.flip(1), m.w), "weight can change"),
        (lambda m, x: x.std(0), "mixes the samples"),
        (lambda m, x: x.std(), "mixes the samples"),
        (lambda m, x: x.var(1), "grows with the square"),
        (lambda m, x: x[:, :1].std(1), "divisor is not positive"),
        (lambda m, x: torch.cdist(x, m.w[None], p=0.5), "order 0.5"),
        (lambda m, x: torch.cdist(x, x), "mixes the samples"),
        (lambda m, x: torch.cdist(x.t(), m.w[None, :2]), "mixes the samples"),
    ],
)
def test_what_has_no_rule_of_several_tensors_is_refused(function, reason):
    model = Lambda(function)
    model.w = nn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedLayerError, match=reason):
        NetworkBound.trace(model, torch.randn(2, 3))


def hugging_face(x):
    g = torch.linalg.vector_norm(x, ord=2, dim=(1, 2), keepdim=True)
    return x * (g / (g.mean(dim=-1, keepdim=True) + 1e-6))


def timm(x):
    g = x.norm(p=2, dim=(1, 2), keepdim=True)
    return g / (g.mean(dim=-1, keepdim=True) + 1e-6) * x


@pytest.mark.parametrize("function", [hugging_face, timm])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_response_normalisation(function, channels):
    model = Lambda(lambda m, x: function(x))
    value, _ = check_bound(model, 2, 2, channels, expected=2 * channels + channels**1.5)
    one = 1e-3 * torch.randn(1, 2, 2, channels, dtype=torch.float64)
    one[..., 0] = torch.randn(2, 2)
    steep = jacobian_norm(model, one)
    assert channels * math.sqrt(channels) * 0.6 <= steep <= value


def test_what_is_no_response_normalisation_is_refused():
    for function in (
        lambda m, x: x * (x.norm(dim=1, keepdim=True) / (x.norm(dim=2, keepdim=True).mean(2, keepdim=True) + 1e-6)),
        lambda m, x: x.flip(1) * timm(x),
        lambda m, x: x * (x.norm(dim=(1, 2), keepdim=True) / x.norm(dim=(1, 2), keepdim=True).mean(3, keepdim=True)),
    ):
        with pytest.raises(UnsupportedLayerError, match="of two activations"):
            NetworkBound.trace(Lambda(function), torch.randn(2, 2, 3, 4))


def llama(x):
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.04)).to(x.dtype)


def gemma(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.04)


def t5(x):
    return torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 0.04) * x


def divided(x):
    return x / torch.sqrt((x**2).mean((1, 2), keepdim=True) + 0.04)


@pytest.mark.parametrize("function", [llama, gemma, t5, divided])
def test_a_root_mean_square_normalisation_written_out(function):
    """Its constant 1 / sqrt(eps) is attained at 0."""
    model = Lambda(lambda m, x: function(x))
    assert value_of(model, torch.randn(2, 3, 4)) == pytest.approx(5.0, rel=1e-12)
    steep = torch.autograd.functional.jacobian(function, torch.zeros(1, 3, 4)).reshape(12, 12)
    assert torch.linalg.matrix_norm(steep, 2) == pytest.approx(5.0, rel=1e-6)
    far = torch.autograd.functional.jacobian(function, torch.randn(1, 3, 4)).reshape(12, 12)
    assert torch.linalg.matrix_norm(far, 2) <= 5


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.0),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 0.1),
        lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 0.1),
        lambda m, x: x.flip(1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
        lambda m, x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 0.1),
        lambda m, x: x * torch.rsqrt(x.half().pow(2).mean(-1, keepdim=True) + 0.1),
    ],
)
def test_what_is_no_root_mean_square_normalisation_is_refused(function):
    with pytest.raises(UnsupportedLayerError):
        NetworkBound.trace(Lambda(function), torch.randn(2, 3, 4))


def test_a_normalisation_behind_a_refused_operation_is_not_refused():
    model = Lambda(lambda m, x: llama(m.b(x, x)), b=nn.Bilinear(4, 4, 4))
    with pytest.raises(UnsupportedLayerError) as caught:
        NetworkBound.trace(model, torch.randn(2, 3, 4))
    assert [line.partition(",")[0] for line in str(caught.value).split("\n  - ")[1:]] == ["b (Bilinear)"]
