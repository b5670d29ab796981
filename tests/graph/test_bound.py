import math

import pytest
import torch
from support.networks import Lambda, linear
from support.truth import check_bound, jacobian_norm, norm, value_of
from torch import nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer
from lightning_lip.constants import modules as constants
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.graph.program import log_up


def test_a_chain_multiplies():
    a, b = linear(5, 4), linear(3, 5, 1)
    check_bound(nn.Sequential(a, nn.ReLU(inplace=True), b, nn.Sigmoid()), 4, expected=norm(a) * norm(b) / 4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x + m.a(x), lambda a, b: 1 + a),
        (lambda m, x: m.b(m.a(x)) - 0.5 * x, lambda a, b: a * b + 0.5),
        (lambda m, x: torch.add(m.a(x), m.b(x), alpha=-2), lambda a, b: a + 2 * b),
        (lambda m, x: torch.rsub(m.a(x), m.b(x), alpha=3), lambda a, b: 3 * a + b),
        (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), lambda a, b: math.hypot(a, b)),
        (lambda m, x: torch.stack([m.a(x), m.b(x), x], 0), lambda a, b: math.hypot(a, b, 1)),
        (lambda m, x: torch.stack([m.a(x), m.b(x), x], 2), lambda a, b: math.hypot(a, b, 1)),
        (lambda m, x: (m.a(x), m.b(x)), lambda a, b: math.hypot(a, b)),
        (lambda m, x: torch.maximum(m.a(x), m.b(x)), lambda a, b: math.hypot(a, b)),
        (lambda m, x: m.a(m.a(m.a(x))), lambda a, b: a**3),
        (lambda m, x: x + m.a(x + m.a(x)), lambda a, b: 1 + a * (1 + a)),
        (lambda m, x: F.linear(m.a(x), m.b.weight), lambda a, b: a * b),
        (lambda m, x: m.a(x) @ m.b.weight, lambda a, b: a * b),
        (lambda m, x: torch.addmm(m.a.bias, x, m.b.weight), lambda a, b: b),
        (lambda m, x: torch.mm(x, m.b.weight), lambda a, b: b),
        (lambda m, x: torch.addmm(m.a.bias, x, m.b.weight, alpha=-3), lambda a, b: 3 * b),
        (lambda m, x: m.a(x) + m.b.bias, lambda a, b: a),
        (lambda m, x: torch.cat([m.a(x), m.b.bias.expand(len(x), -1)], 1), lambda a, b: a),
        (lambda m, x: torch.where(torch.arange(4) > 1, m.a(x), m.b(x)), lambda a, b: math.hypot(a, b)),
        (lambda m, x: m.a(x).masked_fill(torch.arange(4) > 1, 0.0), lambda a, b: a),
        (lambda m, x: m.a(x) * 0 + torch.zeros_like(x), lambda a, b: 0.0),
    ],
)
def test_branches(function, expected):
    a, b = linear(4, 4), linear(4, 4, 1)
    check_bound(Lambda(function, a=a, b=b), 4, expected=expected(norm(a), norm(b)))


def test_separate_inputs_take_the_maximum():
    a, b = linear(4, 4), linear(4, 4, 1)
    x, y = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    side = Lambda(lambda m, x, y: torch.cat([m.a(x), m.b(y)], 1), a=a, b=b)
    assert value_of(side, (x, y)) == pytest.approx(max(norm(a), norm(b)), rel=1e-9)
    assert jacobian_norm(side, x[:1], y[:1]) == pytest.approx(max(norm(a), norm(b)), rel=1e-6)
    added = Lambda(lambda m, x, y: m.a(x) + m.b(y), a=a, b=b)
    assert value_of(added, {"x": x, "y": y}) == pytest.approx(math.hypot(norm(a), norm(b)), rel=1e-9)
    assert jacobian_norm(added, x[:1], y[:1]) <= math.hypot(norm(a), norm(b))
    mixed = Lambda(lambda m, x, y: torch.cat([m.a(x), m.b(y), x + y], 1), a=a, b=b)
    # x + y joins both inputs into one group.
    expected = math.sqrt(norm(a) ** 2 + norm(b) ** 2 + 2)
    assert value_of(mixed, (x, y)) == pytest.approx(expected, rel=1e-9)
    assert jacobian_norm(mixed, x[:1], y[:1]) <= expected


@torch.library.custom_op("lightning_lip_tests::sin", mutates_args=())
def steep_sine(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(30 * x)


@steep_sine.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op(
    "lightning_lip_tests::whole_module", mutates_args=(), schema="(Tensor x, Tensor[] others, int index) -> Tensor"
)
def hidden_source(x, others, index):
    return torch.exp(x)


@hidden_source.register_fake
def _(x, others, index):
    return torch.empty_like(x)


@pytest.mark.parametrize("function", [steep_sine, lambda x: hidden_source(x, [torch.zeros(2)], 0)])
def test_an_operation_of_another_library_is_not_that_of_torch(function):
    with pytest.raises(UnsupportedLayerError, match=r"lightning_lip_tests.*constant is not known"):
        NetworkBound.trace(Lambda(lambda m, x: function(x)), torch.randn(2, 4))


def test_gradient_is_that_of_the_formula():
    a, b = linear(4, 4), linear(4, 4, 1)
    bound = NetworkBound.trace(Lambda(lambda m, x: x + m.b(m.a(x)), a=a, b=b), torch.randn(2, 4).double())
    log_sigma = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(bound.log_bound(log_sigma), log_sigma)
    share = math.exp(0.7) / (1 + math.exp(0.7))
    assert slope.tolist() == pytest.approx([share, share])
    assert torch.autograd.gradcheck(bound.log_bound, (log_sigma,))
    with pytest.raises(ValueError, match="shape"):
        bound.log_bound(torch.zeros(3))


@pytest.mark.parametrize("combine", [torch.add, lambda a, b: torch.cat([a, b], 1)])
def test_zero_weights_have_finite_gradients(combine):
    a, b = linear(4, 4), linear(4, 4, 1)
    bound = NetworkBound.trace(Lambda(lambda m, x: combine(m.a(x), m.b(x)), a=a, b=b), torch.randn(2, 4).double())
    for values, expected in (([-math.inf, 0.5], 0.5), ([-math.inf, -math.inf], -math.inf)):
        log_sigma = torch.tensor(values, requires_grad=True)
        result = bound.log_bound(log_sigma)
        result.backward()
        assert result.item() == pytest.approx(expected)
        assert log_sigma.grad.isfinite().all()
    assert bound.log_bound(torch.tensor([math.nan, 0.0])).isnan()


def test_deep_networks_do_not_overflow():
    layers = [Lambda(lambda m, x: x + m.a(x), a=linear(2, 2)) for _ in range(150)]
    bound = NetworkBound.trace(nn.Sequential(*layers), torch.randn(2, 2).double())
    log_sigma = torch.full((150,), math.log(3.0))
    assert bound.log_bound(log_sigma).item() == pytest.approx(150 * math.log(4.0), rel=1e-5)


def test_constants_are_rounded_up():
    assert log_up(2.0) > math.log(2.0)
    assert log_up(1.0) == 0
    assert log_up(0.0) == -math.inf


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: x - x.mean(0), "mixes the samples"),
        (lambda m, x: x.mean(), "mixes the samples"),
        (lambda m, x: x[:1] + x, "mixes the samples"),
        (lambda m, x: x.flatten(), None),
        (lambda m, x: x.softmax(0), "mixes the samples"),
        (lambda m, x: x.t() @ m.a.weight.new_ones(2, 2), "mixes the samples"),
        (lambda m, x: m.a(x.view(4, 2).t()), "mixes the samples"),
        (lambda m, x: torch.cat([x, x], 0), "mixes the samples"),
        (lambda m, x: x.repeat(2, 1), "mixes the samples"),
        (lambda m, x: x[:, :2] + x.mean(1), "mixes the samples"),
        (lambda m, x: x * x, "product of two activations"),
        (lambda m, x: x * F.logsigmoid(x), "product of two activations"),
        (lambda m, x: x * F.hardsigmoid(x.flip(1)), "product of two activations, not the first known"),
        (lambda m, x: x.tanh() * x.flip(1), "product of two activations, not the second known"),
        (lambda m, x: x.tanh() / x.cos(), "quotient of two activations, not the second known .* 0"),
        (lambda m, x: x * (x > 0.5), r"mul.Tensor: it is discontinuous: it jumps by 0.5 at 0.5"),
        (lambda m, x: torch.where(x < 1, x, 0.0), "discontinuous: it jumps by -?1 at 1"),
        (lambda m, x: x.sign(), "discontinuous: it jumps by 2 at 0"),
        (lambda m, x: torch.div(x, 1 + x.abs(), rounding_mode="floor"), "quotient of two activations"),
        (lambda m, x: torch.div(x, 1 + x.abs(), rounding_mode="trunc"), "quotient of two activations"),
        (lambda m, x: x / x.abs(), "quotient of two activations"),
        (lambda m, x: 1 / x, "reciprocal"),
        (lambda m, x: x * math.inf, "factor is inf"),
        (lambda m, x: x * torch.tensor([math.nan, 1, 1, 1]), "not finite"),
        (lambda m, x: torch.div(x, 2, rounding_mode="floor"), "rounded quotient"),
        (lambda m, x: x @ x.t(), "product of two activations"),
        (lambda m, x: torch.bmm(x[:, None], x[:, :, None]), "product of two activations"),
        (lambda m, x: F.glu(x), "product of two activations"),
        (lambda m, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), "attention"),
        (lambda m, x: torch.einsum("bi,oi->o", x, m.a.weight), "mixes the samples"),
        (lambda m, x: x**2, "power"),
        (lambda m, x: x.exp(), "no finite"),
        (lambda m, x: F.hardshrink(x), "discontinuous"),
        (lambda m, x: torch.where(x > 0, x, x.flip(1)), "comparison"),
        (lambda m, x: torch.fft.rfft(x).angle(), "not known"),
        (lambda m, x: x.round(), "step function"),
        (lambda m, x: F.dropout(x, 0.5, True), "random"),
        (lambda m, x: F.rrelu(x, training=True), "random"),
        (lambda m, x: x + torch.randn(4), "random"),
        (lambda m, x: x.long().float(), "step function"),
        (lambda m, x: x.max(1)[1].float() + x.sum(1), "jumps"),
        (lambda m, x: x * x.mean().item(), "mixes the samples|number"),
        (lambda m, x: F.linear(x, m.a.weight, x[0]), "mixes the samples|bias"),
        (lambda m, x: F.softplus(x, threshold=1), "jumps"),
        (lambda m, x: x.norm(p=0.5, dim=1), "order"),
        (lambda m, x: F.batch_norm(x, None, None, training=True), "mixes the samples"),
        (lambda m, x: F.layer_norm(x, (2, 4)), "mixes the samples"),
        (lambda m, x: x.cumsum(0), "mixes the samples"),
        (lambda m, x: x.cumprod(1), "not known"),
        (lambda m, x: torch.addmm(x, x, m.a.weight), "bias depends"),
        (lambda m, x: torch.clamp(x, min=x.sin()), "argument `min` depends"),
        (lambda m, x: torch.ones(3).clamp(x[:, 0].new_ones(1), x[:, :3]), "nonlinear|depends"),
        (lambda m, x: F.prelu(x.t(), torch.ones(2)), "batch for channels"),
        (lambda m, x: F.batch_norm(x.t(), torch.zeros(2), torch.ones(2)), "batch for channels"),
        (lambda m, x: F.group_norm(x.t()[..., None], 2), "batch for channels"),
        (lambda m, x: F.max_pool1d(x.t(), 2), "mixes the samples"),
        (lambda m, x: F.conv1d(x[:, None], x[:1, None, :2]), "mixes the samples|depends"),
        (lambda m, x: torch.matmul(x[:, None], torch.ones(2, 4, 3)), "factor of its own"),
        (lambda m, x: x.min(1)[1] * 1.0, "jumps"),
    ],
)
def test_what_has_no_bound_is_refused(function, reason):
    model = nn.ModuleDict({"inner": Lambda(function, a=nn.Linear(4, 4))})
    outer = Lambda(lambda m, x: m.parts["inner"](x), parts=model)
    if reason is None:
        # Flattened, the samples still lie one after the other.
        assert value_of(outer, torch.randn(2, 4)) == pytest.approx(1.0)
        return
    with pytest.raises(UnsupportedLayerError, match=reason) as caught:
        NetworkBound.trace(outer, torch.randn(2, 4))
    assert "parts.inner" in str(caught.value)


def test_refusals_name_every_module():
    bilinear = Lambda(lambda m, x: m.b(x, x), b=nn.Bilinear(3, 3, 2))
    both = Lambda(
        lambda m, x: torch.cat([m.one(x), m.two(x[:, None], x[None])[0][:, 0], m.three(x)], 1),
        one=bilinear,
        two=nn.GRU(3, 3, batch_first=True),
        three=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
    )
    with pytest.raises(UnsupportedLayerError) as caught:
        NetworkBound.trace(both, torch.randn(2, 3))
    message = str(caught.value)
    assert "one.b (Bilinear)" in message
    assert "two (GRU), aten.gru.input: its initial state depends" in message
    assert "three" not in message


@pytest.mark.parametrize(
    "gelu",
    [
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: x * torch.sigmoid(1.702 * x),
    ],
)
def test_a_written_out_function_behind_a_refused_operation_is_not_refused(gelu):
    bilinear = Lambda(lambda m, x: gelu(m.b(x, x)), b=nn.Bilinear(3, 3, 2))
    with pytest.raises(UnsupportedLayerError) as caught:
        NetworkBound.trace(bilinear, torch.randn(2, 3))
    assert [line.partition(",")[0] for line in str(caught.value).split("\n  - ")[1:]] == ["b (Bilinear)"]
    # A power alone keeps its own reason.
    squared = Lambda(lambda m, x: m.b(x, x) ** 2 + 1, b=nn.Bilinear(3, 3, 2))
    with pytest.raises(UnsupportedLayerError, match="power"):
        NetworkBound.trace(squared, torch.randn(2, 3))


def test_embeddings_of_tokens_are_refused_and_of_positions_are_constants():
    embedding = nn.Embedding(5, 4)
    with pytest.raises(UnsupportedLayerError, match="look-up"):
        NetworkBound.trace(nn.Sequential(embedding, nn.Linear(4, 2)), torch.zeros(2, 3, dtype=torch.long))
    positions = Lambda(lambda m, x: m.a(x + m.e(torch.arange(3))), a=linear(4, 4), e=embedding)
    check_bound(positions, 3, 4, expected=norm(positions.a))
    with pytest.raises(UnsupportedLayerError, match="an input of"):
        NetworkBound.trace(Lambda(lambda m, x: x.float()), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "constant",
    [
        lambda m: F.dropout(m.a.weight[0], 0.1, m.training),
        lambda m: F.dropout(m.a.weight[0], 0.0, True),
        lambda m: F.rrelu(m.a.weight[0], training=m.training),
        lambda m: F.scaled_dot_product_attention(m.a.weight, m.a.weight, m.a.weight, dropout_p=0.0)[0],
    ],
)
def test_what_draws_numbers_in_training_only_is_a_constant_in_a_trace(constant):
    """Of a decoder's learnt queries, say, whose attention does not depend on the input."""
    model = Lambda(lambda m, x: x + constant(m), a=nn.Linear(4, 4)).train()
    assert value_of(model, torch.randn(2, 4)) == pytest.approx(1.0)


def test_an_output_without_the_input_is_refused():
    with pytest.raises(ValueError, match="No output"):
        NetworkBound.trace(Lambda(lambda m, x: torch.ones(2, 3)), torch.randn(2, 3))


def test_explain_lists_the_graph():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2))
    nodes = NetworkBound.trace(model, torch.randn(2, 3)).explain()
    assert [(n.path, n.operator) for n in nodes] == [("0", "0"), ("1", None), ("2", "2")]
    assert nodes[1].constant == constants.GELU


class Centred(nn.Module):
    """A linear layer with a batch normalisation, and a weight whose rows are centred in forward."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.raw = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return nn.functional.linear(self.norm(self.layer(x)), self.raw - self.raw.mean(dim=1, keepdim=True))


def test_parameters_replaced_after_the_trace_are_penalised():
    torch.manual_seed(0)
    model = Centred().eval()
    regularizer = LipschitzRegularizer(model, 1.0, example_input=torch.ones(2, 6))
    regularizer.add_grad_()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {"layer.weight", "norm.weight", "raw"} <= set(expected)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert all(p.grad is None for p in model.parameters())
    regularizer.add_grad_(advance=False)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    model.zero_grad()
    regularizer.value().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in expected)
