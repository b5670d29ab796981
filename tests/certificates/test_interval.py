import copy
import doctest
import math

import mpmath
import pytest
import torch
from support.networks import Residual, mlp
from support.truth import norm
from torch import nn
from torch.nn import functional as F

from lightning_lip.certificates import interval as certificates
from lightning_lip.certificates.interval import Certificate, Uncertified, certified_matrix_norm, certify
from lightning_lip.constants import modules as constants
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.paper import PaperRegressor
from lightning_lip.rigorous import matrix as matrix_norms
from lightning_lip.rigorous.chain import combettes_pesquet, eclipse_fast

# Of a bound of a few operators: certificates 1e-11 each, and the program's rounding terms.
TIGHT = 1e-9


def test_a_linear_map_is_certified_to_the_last_digits():
    model = nn.Linear(7, 4)
    result = certify(model, torch.zeros(1, 7), torch.randn(5, 7))
    assert isinstance(result, Certificate)
    assert result.certified
    assert result.refused == ()
    truth = norm(model.weight)
    for value, tolerance in ((result.upper, TIGHT), (result.lower, 1e-12), (result.estimate, 1e-5)):
        assert value == pytest.approx(truth, rel=tolerance)
    with mpmath.workdps(50):
        exact = mpmath.matrix(model.weight.detach().double().tolist())
        assert mpmath.sqrt(max(mpmath.eigsy(exact * exact.T, eigvals_only=True))) <= mpmath.mpf(result.upper)


def test_a_chain_takes_the_tightest_of_its_bounds():
    model = mlp(6, 20, 20, 3)
    result = certify(model, torch.zeros(1, 6), torch.randn(200, 6))
    weights, slopes = [model[i].weight for i in (0, 2, 4)], [(0.0, 1.0)] * 2
    product = math.prod(norm(w) for w in weights)
    assert result.bounds["product"] == pytest.approx(product, rel=TIGHT)
    assert result.bounds["product"] >= product * (1 - 1e-14)
    assert result.bounds["combettes_pesquet"] == pytest.approx(combettes_pesquet(weights, slopes), rel=1e-14)
    assert result.bounds["eclipse_fast"] == pytest.approx(eclipse_fast(weights, slopes), rel=1e-14)
    assert result.upper == min(result.bounds.values()) < 0.9 * product
    assert result.bounds[result.tighter] == result.upper
    assert result.tighter in ("combettes_pesquet", "eclipse_fast")
    assert result.log_upper == pytest.approx(math.log(result.upper))
    assert 0 < result.lower <= result.upper
    assert result.estimate == pytest.approx(product, rel=1e-4)
    assert result.skipped == ()


def test_parts_of_a_chain():
    model = mlp(6, 20, 3)
    result = certify(model, torch.zeros(1, 6))
    assert result.lower is None
    assert [(p.name, p.kind, p.operator, p.multiplicity) for p in result.parts] == [
        ("0", "Linear", "MatrixOperator", 1),
        ("2", "Linear", "MatrixOperator", 1),
    ]
    for part, layer in zip(result.parts, (model[0], model[2]), strict=True):
        assert part.sigma <= part.certified
        assert part.sigma == pytest.approx(norm(layer.weight), rel=1e-4)
        assert part.certified == pytest.approx(norm(layer.weight), rel=TIGHT)
        assert part.slope == pytest.approx(1)
        assert part.constant == 1
    assert sum(part.share for part in result.parts) == pytest.approx(1)
    assert [node.rule for node in result.graph].count("operator") == 2


def test_negative_slopes_leave_combettes_pesquet():
    result = certify(mlp(5, 20, 20, 2, activation=nn.GELU), torch.zeros(1, 5), torch.randn(50, 5))
    assert set(result.bounds) == {"product", "combettes_pesquet"}
    assert result.tighter == "combettes_pesquet"
    assert result.skipped == ("eclipse_fast: it needs activations without negative slopes",)
    assert result.lower <= result.upper


def test_too_costly_chains_keep_the_product():
    result = certify(mlp(5, 20, 2), torch.zeros(1, 5), max_chain_flops=10.0)
    assert result.tighter == "product"
    assert len(result.skipped) == 2
    assert all("more than max_chain_flops=10" in reason for reason in result.skipped)


def test_a_chain_is_traced_once(monkeypatch):
    exports = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: exports.append(1) or export(*args, **kwargs))
    result = certify(PaperRegressor(), torch.zeros(1, 13))
    assert set(result.bounds) == {"product", "combettes_pesquet", "eclipse_fast"}
    assert len(exports) == 1


def test_a_residual_network_has_the_graph_bound():
    model = Residual(5, 7, 2)
    result = certify(model, torch.zeros(1, 5), torch.randn(30, 5))
    block = 1 + norm(model.inner) * norm(model.back)
    expected = norm(model.out) * block
    assert result.bounds == {"graph": result.upper}
    assert result.tighter == "graph"
    assert expected * (1 - 1e-14) <= result.upper <= expected * (1 + TIGHT)
    assert result.lower <= result.upper
    # d log(c (1 + a b)) / d log a = a b / (1 + a b)
    slopes = {"inner": 1 - 1 / block, "back": 1 - 1 / block, "out": 1}
    assert {part.name: part.slope for part in result.parts} == pytest.approx(slopes, rel=1e-6)


def test_a_convolutional_network_with_normalisation():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    model(torch.randn(8, 2, 4, 4))  # running statistics that are no start values
    result = certify(model, torch.zeros(1, 2, 4, 4), torch.randn(20, 2, 4, 4))
    assert result.certified
    assert result.tighter == "graph"
    assert result.lower <= result.upper
    assert [part.kind for part in result.parts] == ["Conv2d", "Linear"]
    assert all(part.certified >= part.sigma > 0 for part in result.parts)


def test_a_weight_used_twice_counts_twice():
    layer = nn.Linear(4, 4)
    result = certify(nn.Sequential(layer, nn.Sigmoid(), layer), torch.zeros(1, 4))
    assert [part.multiplicity for part in result.parts] == [2]
    assert result.parts[0].slope == pytest.approx(2)
    assert result.bounds["product"] == pytest.approx(norm(layer.weight) ** 2 / 4, rel=TIGHT)


def test_constants_outside_the_chain_count():
    model = nn.Sequential(nn.Sigmoid(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(dim=-1))
    result = certify(model, torch.zeros(1, 4))
    inner = certify(model[1:4], torch.zeros(1, 4))
    for method, bound in inner.bounds.items():
        assert result.bounds[method] == pytest.approx(bound / 8, rel=1e-12)


def test_a_network_without_weights():
    result = certify(nn.Sequential(nn.ReLU(), nn.Tanh()), torch.zeros(1, 3))
    assert 1 <= result.upper <= 1 + 1e-12
    assert result.parts == ()


def test_zero_and_overflowing_networks():
    model = mlp(3, 4, 2)
    with torch.no_grad():
        model[2].weight.zero_()
    result = certify(model, torch.zeros(1, 3), torch.randn(4, 3))
    assert result.upper == result.lower == result.estimate == 0
    assert result.log_upper == -math.inf
    assert all(part.share is None for part in result.parts)

    result = certify(mlp(*[2] * 12, scale=1e30), torch.zeros(1, 2))
    assert result.certified
    assert result.upper == math.inf
    assert 11 * math.log(1e29) < result.log_upper < 11 * math.log(1e31)

    result = certify(mlp(*[2] * 12, scale=1e-30), torch.zeros(1, 2))
    # Too small for a float: rounded up to the next one, not down to 0.
    assert 0 < result.upper < 1e-300
    assert result.log_upper < -690


def test_refused_networks_say_what_and_where():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0] + self.mlp(x)

    result = certify(Attention(), torch.zeros(2, 3, 4), torch.randn(5, 3, 4))
    assert isinstance(result, Uncertified)
    assert not result.certified
    assert result.upper is None
    assert result.estimate is None
    assert result.lower > 0
    assert len(result.refused) == 1
    assert result.refused[0].startswith("attention (MultiheadAttention)")
    # The layers that are known are listed all the same.
    part = next(part for part in result.parts if part.name == "mlp")
    assert part.certified >= part.sigma
    assert part.slope is None
    assert part.constant is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    model = mlp(3, 4, 2)
    with torch.no_grad():
        model[2].weight[0, 0] = bad
    result = certify(model, torch.zeros(1, 3))
    assert result.refused == (
        "2 (Linear): Expected a matrix of finite numbers, got NaN or an infinity: it has no spectral norm.",
    )
    assert [part.certified is None for part in result.parts] == [False, True]
    assert result.upper is None


NAN_SETTINGS = {
    "LeakyReLU": nn.LeakyReLU(math.nan),
    "ELU": nn.ELU(math.nan),
    "CELU": nn.CELU(math.nan),
    "Softplus threshold": nn.Softplus(1.0, math.nan),
    "Softplus beta": nn.Softplus(math.nan),
    "Threshold": nn.Threshold(math.nan, math.nan),
    "LayerNorm": nn.LayerNorm(3, eps=math.nan),
    "RMSNorm": nn.RMSNorm(3, eps=math.nan),
    "LocalResponseNorm": nn.LocalResponseNorm(2, alpha=math.nan),
}


@pytest.mark.parametrize("setting", NAN_SETTINGS)
def test_a_setting_that_is_nan_is_refused_by_name(setting):
    module = NAN_SETTINGS[setting]
    result = certify(nn.Sequential(nn.Identity(), module), torch.zeros(1, 3, 3))
    assert not result.certified
    assert f"({type(module).__name__})" in result.refused[0]
    with pytest.raises(ValueError, match=r"nan|discontinuous|k > 0"):
        constants.lipschitz_constant(module)
    with pytest.raises(ValueError, match="discontinuous"):  # torch itself refuses it in the forward pass
        constants.lipschitz_constant(nn.Softshrink(math.nan))


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x):
        return self.function(x, self.weight)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.addmm(torch.zeros(3), x, w, alpha=math.nan),
        lambda x, w: torch.add(x, 2 * x, alpha=math.nan),
        lambda x, w: torch.add(x, w[0], alpha=math.nan),
        lambda x, w: torch.add(x, 2 * x, alpha=math.inf),
        lambda x, w: F.leaky_relu(x, math.inf),
        lambda x, w: x * torch.tensor(math.nan),
    ],
)
def test_a_factor_that_is_not_finite_is_refused(function):
    result = certify(Of(function), torch.zeros(1, 3))
    assert not result.certified
    assert result.refused[0].startswith("(the model itself) (Of)")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_slope_that_is_not_finite_is_refused_also_once_it_becomes_so(bad):
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.Linear(3, 2))
    network = NetworkBound.trace(model, torch.zeros(1, 3))
    model[1].weight.data.fill_(bad)
    assert certify(model, torch.zeros(1, 3)).refused[0].startswith("1 (PReLU)")
    if math.isnan(bad):
        with pytest.raises(ValueError, match="bound is NaN"):
            network.log_bound_up([1.0, 1.0])
    else:
        assert network.log_bound_up([1.0, 1.0]) == math.inf


def test_a_constant_that_is_wrong_is_found_out(monkeypatch):
    monkeypatch.setattr(constants, "_RULES", dict(constants._RULES))

    class Triple(nn.Module):
        def forward(self, x):
            return 3 * x

    model = nn.Sequential(nn.Linear(3, 3), Triple())
    constants.register_constant(Triple, lambda module: 3.0)
    assert certify(model, torch.zeros(1, 3), torch.randn(4, 3)).certified
    constants.register_constant(Triple, lambda module: 2.0)
    result = certify(model, torch.zeros(1, 3), torch.randn(4, 3))
    assert not result.certified
    assert "exceeds the bound" in result.refused[0]
    assert "register_constant" in result.refused[0]


class Functional(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (4,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("module", [nn.RMSNorm(4), nn.RMSNorm(4, elementwise_affine=False), Functional()])
def test_rms_norm_without_an_eps_takes_that_of_its_dtype(module, dtype):
    module = copy.deepcopy(module).to(dtype)
    # Near 0 the slope is the largest, and a quotient with 0 comes close to it.
    x = torch.full((1, 4), 2.0**-13 if dtype != torch.float64 else 2.0**-28, dtype=dtype)
    quotient = (module(x).double() / x.double()).max().item()
    result = certify(module, torch.zeros(1, 4, dtype=dtype), data=torch.cat([x, torch.zeros_like(x)]))
    assert result.certified
    assert quotient <= result.upper
    assert result.lower <= result.upper <= result.lower * (1 + TIGHT)
    if isinstance(module, nn.RMSNorm) and module.weight is not None:
        assert constants.lipschitz_constant(module) == pytest.approx(result.upper)


def test_a_constant_of_autograd_in_fp32_contradicts_no_bound():
    # torch's backward of hardsigmoid multiplies by the fp32 number next to 1/6, in fp64 too.
    for depth in (1, 10):
        model = nn.Sequential(*(nn.Hardsigmoid() for _ in range(depth)))
        result = certify(model, torch.zeros(1, 2), data=torch.zeros(1, 2))
        assert result.certified
        assert result.lower == pytest.approx(6.0**-depth, rel=1e-6)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    result = certify(model, data[:1], data)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [False, True, True, True, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # Nor does the surrounding mode matter.
    with torch.inference_mode():
        assert certify(model, data[:1], data).upper == result.upper
    with torch.autocast("cpu", torch.bfloat16):
        again = certify(model, data[:1], data)
    assert (again.upper, again.lower, again.estimate) == (result.upper, result.lower, result.estimate)
    # Half-precision weights convert exactly.
    assert certify(copy.deepcopy(model).bfloat16(), data[:1].bfloat16()).certified


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_modules(package):
    lightning = pytest.importorskip(package)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp(3, 5, 2)

        def forward(self, x):
            return self.net(x)

    module = Module()
    result = certify(module, torch.zeros(1, 3), [(torch.randn(4, 3), torch.zeros(4))])
    assert [part.name for part in result.parts] == ["net.0", "net.2"]
    assert "eclipse_fast" in result.bounds
    assert result.upper == certify(module.net, torch.zeros(1, 3)).upper


def test_results_are_frozen():
    result = certify(mlp(2, 2, 1), torch.zeros(1, 2))
    with pytest.raises(AttributeError):
        result.upper = 1.0


def test_intervals_of_random_networks_contain_their_jacobians():
    for seed, activation in enumerate([nn.ReLU, nn.Tanh, nn.SiLU, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Mish]):
        model = mlp(4, 8, 8, 3, activation=activation, seed=seed)
        result = certify(model, torch.zeros(1, 4), 3 * torch.randn(100, 4))
        assert 0 < result.lower <= result.upper <= result.bounds["product"]


def test_rounding_of_the_graph_bound_is_covered(monkeypatch):
    # 40 scalings by 1/3, whose logarithms are rounded: against exact arithmetic.
    weight = torch.tensor([[1 / 3]])
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(40)))
    for layer in model:
        layer.weight.data = weight.clone()
    result = certify(model, torch.zeros(1, 1), max_chain_flops=0.0)
    with mpmath.workdps(50):
        truth = mpmath.mpf(weight.item()) ** 40
        assert truth <= mpmath.mpf(result.upper) <= truth * (1 + mpmath.mpf(1e-9))
        assert mpmath.log(truth) <= mpmath.mpf(result.log_upper)


def test_certified_matrix_norm_is_exported():
    assert certified_matrix_norm is matrix_norms.certified_matrix_norm


def test_doctests():
    for module in (certificates, matrix_norms):
        result = doctest.testmod(module)
        assert result.attempted > 1
        assert result.failed == 0
