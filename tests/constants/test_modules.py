import math

import pytest
import torch
from torch import nn

from lightning_lip.constants import modules as constants
from lightning_lip.constants.modules import lipschitz_constant, register_constant
from lightning_lip.constants.pooling import (
    adaptive_average_pool_constant,
    adaptive_max_pool_constant,
    average_pool_constant,
    linear_map_norm,
    max_pool_constant,
    per_dimension,
    sized_average_pool_constant,
)
from lightning_lip.errors import UnsupportedLayerError

# Slopes are sampled in fp64 on a grid of step 5e-4: a maximum of a smooth slope is met within 1e-6.
GRID = torch.linspace(-40, 40, 160001, dtype=torch.float64)

SCALAR = {
    "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(),
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "SELU": nn.SELU(),
    "Hardswish": nn.Hardswish(),
    "Sigmoid": nn.Sigmoid(),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Tanh": nn.Tanh(),
    "ELU": nn.ELU(),
    "ELU 2": nn.ELU(2.0),
    "ELU .5": nn.ELU(0.5),
    "ELU -3": nn.ELU(-3.0),
    "CELU": nn.CELU(2.0),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "LeakyReLU -3": nn.LeakyReLU(-3.0),
    "PReLU": nn.PReLU(init=-1.5).double(),
    "PReLU small": nn.PReLU(init=0.25).double(),
    "RReLU": nn.RReLU(0.1, 0.3),
    "RReLU steep": nn.RReLU(1.0, 4.0),
    "Softplus": nn.Softplus(),
    "Softplus beta": nn.Softplus(beta=5.0),
    "LogSigmoid": nn.LogSigmoid(),
    "Softsign": nn.Softsign(),
    "Tanhshrink": nn.Tanhshrink(),
    "Softshrink": nn.Softshrink(0.7),
    "Hardtanh": nn.Hardtanh(-0.5, 2.0),
    "Threshold": nn.Threshold(0.5, 0.5),
    "Identity": nn.Identity(),
    "Dropout": nn.Dropout(0.5),
}


@pytest.mark.parametrize("name", SCALAR)
def test_scalar_constants_are_attained_and_never_exceeded(name):
    module = SCALAR[name].eval()
    constant = lipschitz_constant(module)
    x = GRID.clone().requires_grad_()
    y = module(x[:, None]).flatten()
    (slope,) = torch.autograd.grad(y.sum(), x)
    quotients = (y.diff() / x.diff()).abs().max().item()
    # Softplus jumps by 2e-9 where it turns linear: over a step of 5e-4 that is 4e-6.
    # torch's backward of hardsigmoid multiplies by an fp32 1/6, 3e-8 too large.
    assert slope.abs().max().item() <= constant * (1 + (4e-8 if name == "Hardsigmoid" else 1e-12))
    assert quotients <= constant * (1 + 1e-5)
    assert slope.abs().max().item() >= constant * (1 - 1e-4)


def test_literals_agree_with_forty_digits():
    mp = pytest.importorskip("mpmath")
    with mp.workdps(40):

        def steepest(f, start):
            x = mp.findroot(lambda x: mp.diff(f, x, 2), start)
            return mp.diff(f, x)

        def sigmoid(x):
            return 1 / (1 + mp.exp(-x))

        a = mp.sqrt(2 / mp.pi)
        truth = {
            constants.GELU: steepest(lambda x: x * (1 + mp.erf(x / mp.sqrt(2))) / 2, 1.4),
            constants.GELU_TANH: steepest(lambda x: x / 2 * (1 + mp.tanh(a * (x + mp.mpf("0.044715") * x**3))), 1.4),
            constants.SILU: steepest(lambda x: x * sigmoid(x), 2.4),
            constants.MISH: steepest(lambda x: x * mp.tanh(mp.log(1 + mp.exp(x))), 1.5),
            constants.SELU: mp.mpf("1.6732632423543772848170429916717") * mp.mpf("1.0507009873554804934193349852946"),
            constants.ERF: 2 / mp.sqrt(mp.pi),
            constants.HARDSIGMOID: mp.mpf(1) / 6,
        }
        for value, exact in truth.items():
            assert exact <= mp.mpf(value) <= exact * (1 + mp.mpf("2e-15"))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Hardshrink(), "discontinuous"),
        (nn.Threshold(0.5, 2.0), "discontinuous"),
        (nn.Softshrink(0.5), None),
        (nn.Softplus(threshold=5), "jumps"),
        (nn.CELU(-1.0), "exponentially"),
        (nn.GLU(), "product of two activations"),
        (nn.MultiheadAttention(4, 2), "attention"),
        (nn.CosineSimilarity(), "slope grows"),
        (nn.FractionalMaxPool2d(2, output_size=2), "chance"),
        (nn.MaxUnpool2d(2), "chance"),
        (nn.LogSoftmax(-1), "size n"),
        (nn.AvgPool2d(3, 2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "count_include_pad"),
        (nn.LPPool2d(3, 2), "norm_type"),
        (nn.LayerNorm(4, eps=0.0), "eps"),
        (nn.BatchNorm1d(4, track_running_stats=False), "running statistics"),
        (nn.Linear(2, 2), "register_constant"),
        (nn.LocalResponseNorm(3, k=0.0), "k > 0"),
        (nn.AdaptiveAvgPool2d(2), "not known"),
    ],
)
def test_refusals_give_their_reason(module, reason):
    if reason is None:
        assert lipschitz_constant(module) == 1
        return
    with pytest.raises(UnsupportedLayerError, match=reason):
        lipschitz_constant(module)


def test_formulas_refuse_arguments_out_of_range():
    with pytest.raises(UnsupportedLayerError, match="negative"):
        constants.shrink(-1.0)
    with pytest.raises(UnsupportedLayerError, match="exponentially"):
        constants.elu(1.0, 1.0, -1.0)
    with pytest.raises(ValueError, match="nan from its parameters"):
        lipschitz_constant(nn.PReLU(init=math.nan))
    with pytest.raises(ValueError, match="default"):
        per_dimension(None, 2)


def jacobian_norm(function, x):
    jacobian = torch.autograd.functional.jacobian(lambda z: function(z).flatten(), x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item()


@pytest.mark.parametrize("n", [2, 3, 7])
def test_softmax_and_log_softmax(n):
    torch.manual_seed(0)
    points = [torch.randn(n, dtype=torch.float64) * s for s in (0.1, 1, 10) for _ in range(30)]
    two = torch.full((n,), -50.0, dtype=torch.float64)
    two[:2] = 0
    one = torch.full((n,), -50.0, dtype=torch.float64)
    one[0] = 0
    soft = max(jacobian_norm(lambda z: z.softmax(0), x) for x in [*points, two])
    logs = max(jacobian_norm(lambda z: z.log_softmax(0), x) for x in [*points, one])
    assert 0.5 - 1e-4 <= soft <= lipschitz_constant(nn.Softmax(0)) + 1e-12
    assert lipschitz_constant(nn.Softmin(0)) == 0.5
    assert math.sqrt(n) * (1 - 1e-4) <= logs <= constants.log_softmax(n) * (1 + 1e-12)


NORMS = {
    "layer": (nn.LayerNorm(6), (6,)),
    "group": (nn.GroupNorm(2, 4), (4, 3)),
    "rms": (nn.RMSNorm(6, eps=1e-3), (6,)),
    "rms without eps": (nn.RMSNorm(6), (6,)),
    "instance": (nn.InstanceNorm1d(4, affine=True), (4, 3)),
    "layer plain": (nn.LayerNorm(6, elementwise_affine=False, eps=1e-2), (6,)),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalisations(name):
    module, shape = NORMS[name]
    module = module.double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(0.5, 2.0)
    if getattr(module, "weight", None) is not None:
        # One gamma for all attains the bound: the Jacobian at a constant input is a projector.
        with torch.no_grad():
            module.weight.fill_(-1.7)
    constant = lipschitz_constant(module)
    worst = max(
        jacobian_norm(lambda z: module(z[None]), torch.randn(shape, dtype=torch.float64) * s)
        for s in (0.0, 1e-6, 1e-2, 1.0, 10.0)
    )
    assert constant * (1 - 1e-4) <= worst <= constant * (1 + 1e-12)


def test_batch_norm_reads_its_running_statistics():
    module = nn.BatchNorm1d(3).double().eval()
    module.running_var.copy_(torch.tensor([0.5, 4.0, 0.01]))
    module.weight.data.copy_(torch.tensor([1.0, -8.0, 0.1]))
    x = torch.randn(3, dtype=torch.float64)
    truth = jacobian_norm(lambda z: module(z[None]), x)
    assert truth * (1 - 1e-12) <= lipschitz_constant(module) <= truth * (1 + 1e-12)
    plain = nn.BatchNorm1d(3, affine=False).eval()
    assert lipschitz_constant(plain) == pytest.approx((1 + 1e-5) ** -0.5)
    instance = nn.InstanceNorm1d(3, track_running_stats=True).eval()
    assert lipschitz_constant(instance) == pytest.approx((1 + 1e-5) ** -0.5)


@pytest.mark.parametrize(
    ("size", "alpha", "beta", "k"), [(5, 1e-4, 0.75, 1.0), (3, 2.0, 0.75, 2.0), (3, 1.0, 2.0, 0.5)]
)
def test_local_response_norm_is_bounded(size, alpha, beta, k):
    module = nn.LocalResponseNorm(size, alpha, beta, k)
    constant = lipschitz_constant(module)
    torch.manual_seed(0)
    worst = max(
        jacobian_norm(lambda z: module(z[None]), torch.randn(7, 1, dtype=torch.float64) * s)
        for s in (0.0, 0.3, 1.0, 3.0)
        for _ in range(10)
    )
    assert k**-beta * (1 - 1e-12) <= worst <= constant
    assert constants.local_response_norm(size, alpha, 0.0, k) == 1
    assert constants.local_response_norm(size, 0.0, beta, k) == pytest.approx(k**-beta)


@pytest.mark.parametrize(
    ("k", "s", "d"), [(2, 2, 1), (3, 2, 1), (3, 1, 1), (5, 2, 1), (3, 2, 2), (3, 3, 2), (4, 2, 2), (3, 4, 2)]
)
def test_max_pool_is_attained_by_a_spike(k, s, d):
    module = nn.MaxPool1d(k, s, dilation=d)
    constant = lipschitz_constant(module)
    gains = [module(torch.eye(40)[i][None, None]).norm().item() for i in range(40)]
    assert max(gains) == pytest.approx(constant, rel=1e-6)
    assert max_pool_constant(2, [k, 1], [s, 1], d) == pytest.approx(constant)


@pytest.mark.parametrize(("k", "s"), [(2, 2), (3, 2), (3, 1), (2, 1), (3, 3), (5, 2), (2, 3), (7, 3)])
def test_average_pool_formula_dominates_and_approaches_every_size(k, s):
    formula = lipschitz_constant(nn.AvgPool1d(k, s))
    sized = sized_average_pool_constant([400], k, s)
    assert sized <= formula * (1 + 1e-9)
    assert sized >= formula * (1 - 1e-3)
    assert average_pool_constant(2, [k, 1], [s, 1]) == pytest.approx(formula)


@pytest.mark.parametrize("options", [{}, {"ceil_mode": True}, {"count_include_pad": False}, {"divisor_override": 5}])
def test_sized_average_pool_is_exact_with_every_option(options):
    module = nn.AvgPool2d((3, 2), (2, 1), (1, 1), **options)
    matrix = module(torch.eye(42, dtype=torch.float64).view(42, 1, 7, 6)).flatten(1)
    truth = torch.linalg.matrix_norm(matrix, 2).item()
    value = sized_average_pool_constant([7, 6], (3, 2), (2, 1), (1, 1), **options)
    assert truth <= value <= truth * (1 + 1e-9)
    if options.get("divisor_override"):
        assert lipschitz_constant(module) >= truth


def test_lp_pool():
    torch.manual_seed(0)
    for power in (1, 2, 4):
        module = nn.LPPool1d(power, 3, 2)
        constant = lipschitz_constant(module)
        inputs = torch.rand(20, 1, 9, dtype=torch.float64) + 0.1
        worst = max(jacobian_norm(lambda z, m=module: m(z[None]), x) for x in inputs)
        assert worst <= constant * (1 + 1e-12)
    x = torch.full((1, 9), 1e-3, dtype=torch.float64)
    x[0, 2] = 1.0
    module = nn.LPPool1d(2, 3, 2)
    assert jacobian_norm(lambda z: module(z[None]), x) == pytest.approx(lipschitz_constant(module), rel=1e-4)


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize(("k", "s"), [(3, 3), (3, 2), (3, 1), (2, 3), (5, 3)])
def test_lp_pool_of_clipped_windows(k, s, power):
    torch.manual_seed(0)
    for size in range(k, 12):
        for module, shape in (
            (nn.LPPool1d(power, k, s, ceil_mode=True), (1, size)),
            (nn.LPPool2d(power, (k, 2), (s, 2), ceil_mode=True), (1, size, 5)),
        ):
            spikes = torch.full((8, *shape), 1e-3, dtype=torch.float64)
            spikes[..., -1].normal_()
            worst = max(jacobian_norm(lambda z, m=module: m(z[None]), x) for x in spikes)
            assert worst <= lipschitz_constant(module) * (1 + 1e-12)


def test_a_clipped_window_of_lp_pool_is_attained():
    module = nn.LPPool1d(2, 3, stride=3, ceil_mode=True)
    change = module(torch.tensor([[[0.0, 0, 0, 1]]])) - module(torch.zeros(1, 1, 4))
    assert change.norm().item() == pytest.approx(lipschitz_constant(module), rel=1e-6)
    assert lipschitz_constant(module) == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize(("n", "o"), [(7, 3), (7, 1), (5, 8), (6, 6), (600, 7)])
def test_adaptive_pools(n, o):
    eye = torch.eye(n, dtype=torch.float64)[:, None]
    average = torch.linalg.matrix_norm(nn.functional.adaptive_avg_pool1d(eye, o)[:, 0], 2).item()
    value = adaptive_average_pool_constant([n], [o])
    assert average * (1 - 1e-12) <= value
    assert value <= average * (1 + 1e-9)
    spike = max(nn.functional.adaptive_max_pool1d(e[None], o).norm().item() for e in eye)
    assert adaptive_max_pool_constant([n], [o]) == pytest.approx(spike)
    assert adaptive_max_pool_constant([n], [None]) == pytest.approx(1.0)


def test_row_and_column_sums_serve_a_large_map():
    # 599 windows of 2 on 600 inputs: the norm is cos(pi / 1200), the sums give 1.
    value = linear_map_norm(lambda x: nn.functional.avg_pool1d(x[:, None], 2, 1)[:, 0], 600)
    assert math.cos(math.pi / 1200) <= value <= 1 + 1e-11
    assert sized_average_pool_constant([600], 3, 1) <= 1 + 1e-11


def test_a_large_map_with_negative_entries_is_refused():
    with pytest.raises(UnsupportedLayerError, match="too large"):
        linear_map_norm(lambda x: x, 5000, non_negative=False)


class Own(nn.Module):
    def forward(self, x):
        return 3 * x


class Child(Own):
    pass


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(constants, "_RULES", {})


@pytest.mark.usefixtures("rules")
def test_registered_rules_serve_subclasses_and_come_first():
    with pytest.raises(UnsupportedLayerError, match="Own"):
        lipschitz_constant(Own())
    register_constant(Own, lambda module: 3)
    register_constant(nn.ReLU, lambda module: 7.0)
    assert lipschitz_constant(Child()) == 3.0
    assert lipschitz_constant(nn.ReLU()) == 7.0


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "3", True, None])
def test_registered_rules_must_return_a_number(value):
    register_constant(Own, lambda module: value)
    with pytest.raises(ValueError, match="finite float"):
        lipschitz_constant(Own())


def test_register_constant_checks_its_arguments():
    with pytest.raises(TypeError, match="subclass"):
        register_constant(Own(), lambda module: 1.0)
    with pytest.raises(TypeError, match="callable"):
        register_constant(Own, 1.0)
