"""Numbers that no rule is made for are refused in one place for all rules: complex, integer, NaN and infinite ones."""

import math

import pytest
import torch
from support.networks import Lambda, linear
from support.truth import value_of
from torch import nn
from torch.nn import functional as F

from lightning_lip.certificates.interval import certify
from lightning_lip.constants import modules as constants
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.graph.builder import RULES

X = torch.randn(2, 4, dtype=torch.float64)


def refusal_of(function, x=X, **members):
    with pytest.raises(UnsupportedLayerError) as caught:
        NetworkBound.trace(Lambda(function, **members), x)
    return str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.tanh(x + 1.5j).abs(),
        lambda m, x: (x * m.three).abs(),
        lambda m, x: F.linear(x + 0j, m.five).abs(),
        lambda m, x: torch.view_as_real(x * 2j),
        lambda m, x: x.to(torch.complex128).real,
        lambda m, x: (x + m.three).real,
    ],
)
def test_complex_values_are_refused(function):
    three, five = torch.full((4,), 3j, dtype=torch.complex128), 5j * torch.eye(4, dtype=torch.complex128)
    assert "complex" in refusal_of(function, three=three, five=five)


def test_a_real_weight_may_be_computed_through_complex_numbers():
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    model = Lambda(lambda m, x: F.linear(x, torch.fft.irfft(m.weight, n=4)), weight=weight)
    expected = torch.linalg.matrix_norm(torch.fft.irfft(weight, n=4), 2).item()
    assert certify(model, X).upper == pytest.approx(expected)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda m, x: x.sum(1, dtype=torch.int64).double(), "int64"),
        (lambda m, x: x.sum(1, keepdim=True, dtype=torch.bool) * 1.0, "bool"),
        (lambda m, x: x.to(torch.int32).double(), "int32"),
        (lambda m, x: x.type_as(m.whole).double(), "int64"),
        (lambda m, x: x.view(torch.int64).double(), "another dtype"),
        (lambda m, x: x.view(torch.float32).double(), "another dtype"),
    ],
)
def test_results_that_are_not_floating_point_are_refused(function, dtype):
    assert dtype in refusal_of(function, whole=torch.zeros(1, dtype=torch.int64))


def test_another_floating_dtype_is_the_identity():
    assert value_of(Lambda(lambda m, x: x.sum(1, dtype=torch.float32)), X) == pytest.approx(2.0)
    assert value_of(Lambda(lambda m, x: x.amax(1, keepdim=True).float()), X) == pytest.approx(1.0)
    assert certify(Lambda(lambda m, x: torch.max(x, 1)[0]), X).upper == pytest.approx(1.0)


BAD = [math.nan, math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("layer", "name", "shape"),
    [
        (nn.Linear(4, 3), "bias", (2, 4)),
        (nn.Conv1d(4, 3, 1), "bias", (2, 4, 5)),
        (nn.BatchNorm1d(4), "running_mean", (2, 4)),
        (nn.BatchNorm1d(4), "running_var", (2, 4)),
        (nn.BatchNorm1d(4), "bias", (2, 4)),
        (nn.LayerNorm(4), "bias", (2, 4)),
        (nn.GroupNorm(2, 4), "bias", (2, 4)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_stored_tensors_that_are_not_finite_are_refused_by_name(layer, name, shape, bad):
    tensor = getattr(layer, name).data
    kept = tensor.clone()
    tensor[1] = bad
    result = certify(nn.Sequential(layer), torch.randn(shape))
    tensor.copy_(kept)
    assert not result.certified
    assert f"0.{name}, is not finite" in result.refused[0]
    assert certify(nn.Sequential(layer), torch.randn(shape)).certified


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.clamp(max=math.nan),
        lambda m, x: torch.where(m.mask, x, math.nan),
        lambda m, x: x.masked_fill(m.mask, math.nan),
        lambda m, x: F.pad(x, (0, 1), value=math.nan),
        lambda m, x: x + torch.log(-m.mask.double() - 1),
        lambda m, x: torch.cat([x, m.infinite.expand(2, -1)], 1),
        lambda m, x: x + m.infinite,
        lambda m, x: x.clamp(min=math.inf),
    ],
)
def test_constants_that_make_the_output_nan_or_infinite_are_refused(function):
    model = Lambda(function, mask=torch.arange(4) > 1, infinite=torch.tensor([0.0, -math.inf, 0.0, 0.0]).double())
    assert not certify(model, X).certified


def test_an_attention_mask_of_infinities_is_certified():
    mask = torch.tensor([0.0, -math.inf, 0.0, 0.0]).double()
    for function in (
        lambda m, x: torch.softmax(x + m.mask, 1),
        lambda m, x: torch.softmax(x.masked_fill(m.mask < 0, -math.inf), 1),
        lambda m, x: torch.softmax(torch.where(m.mask < 0, -math.inf, x), 1),
        lambda m, x: torch.maximum(x, m.mask),
        lambda m, x: x.clamp(-math.inf, math.inf),
    ):
        assert certify(Lambda(function, mask=mask), X).certified


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda m, x: x.repeat_interleave(m.repeats, 1), "repeat_interleave"),
        (lambda m, x: torch.add(x, x + 0j, alpha=3j).abs(), "add"),
        (lambda m, x: torch.sub(x, x * 1j, alpha=2j).abs(), "mul"),
    ],
)
def test_arguments_of_another_kind_are_refusals_that_name_the_operation(function, operation):
    model = Lambda(function, repeats=torch.tensor([1, 2, 1, 1]))
    result = certify(model, X)
    assert not result.certified
    assert operation in result.refused[0] or "cannot be traced" in result.refused[0]


def test_an_argument_that_a_rule_does_not_read_is_named_with_its_cause(monkeypatch):
    def unreadable(builder, node, arguments):
        raise TypeError("float() argument must be a string or a real number")

    monkeypatch.setitem(RULES, "relu", unreadable)
    reason = refusal_of(lambda m, x: torch.relu(m.a(x)), a=linear(4, 4))
    assert "aten.relu.default: its arguments are not those that its rule reads: TypeError: float()" in reason


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * torch.empty(4, dtype=torch.float64),
        lambda m, x: x + torch.empty_like(m.w),
        lambda m, x: F.linear(x, m.w.new_empty(3, 4)),
        lambda m, x: x * torch.empty(4, dtype=torch.int64),
    ],
)
def test_what_the_memory_happens_to_hold_is_refused(function):
    assert not certify(Lambda(function, w=torch.ones(4, dtype=torch.float64)), X).certified


def test_an_empty_tensor_that_is_filled_is_certified():
    assert certify(Lambda(lambda m, x: x * torch.empty(4, dtype=torch.float64).fill_(2.0)), X).upper == pytest.approx(2)


class Reader(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.context = function, 0.0

    def forward(self, x):
        return self.function(self, x)


@pytest.fixture
def stated(monkeypatch):
    monkeypatch.setattr(constants, "_RULES", {})
    constants.register_constant(Reader, lambda module: 1.0)


def with_context(m, x):
    m.reader.context = 0.5 * x
    return m.reader(0.1 * x)


@pytest.mark.usefixtures("stated")
@pytest.mark.parametrize(
    ("forward", "inside", "reason"),
    [
        (with_context, lambda m, x: x + m.context, "a value of the network's input that it is not given"),
        (lambda m, x: m.reader(x.clone()), lambda m, x: x.mul_(0.01) * 100, "writes into its input"),
    ],
)
def test_a_module_with_a_stated_constant_is_a_map_of_what_it_is_given(forward, inside, reason):
    assert reason in refusal_of(forward, reader=Reader(inside))


@pytest.mark.usefixtures("stated")
def test_a_module_that_is_traced_as_one_may_act_on_a_weight():
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    model = Lambda(lambda m, x: F.linear(x, m.shrink(m.weight)), weight=weight, shrink=nn.Softshrink(0.1))
    expected = torch.linalg.matrix_norm(F.softshrink(weight, 0.1), 2).item()
    assert value_of(model, X) == pytest.approx(expected)
    counting = Reader(lambda m, x: m.count.add_(1) * x)
    counting.count = nn.Buffer(torch.zeros((), dtype=torch.float64))
    assert "changes a buffer" in refusal_of(lambda m, x: x * m.reader(m.weight[0]), weight=weight, reader=counting)
