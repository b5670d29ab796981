import pytest
import torch
from support.networks import Lambda
from support.truth import value_of
from torch import nn

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.graph.builder import RULES, rule
from lightning_lip.graph.refusals import Refusal, listed


def test_an_operation_has_one_rule():
    before = dict(RULES)
    with pytest.raises(ValueError, match=r"one rule for each operation, got a second one for \['linear', 'mul'\]"):
        rule("mul", "an operation without a rule", "linear")(lambda builder, node, arguments: None)
    assert before == RULES


def refusal_of(function, *shape, **members):
    with pytest.raises(UnsupportedLayerError) as caught:
        NetworkBound.trace(Lambda(function, **members), torch.randn(2, *shape))
    return str(caught.value).splitlines()[1:-1]


def test_what_is_refused_behind_a_refused_operation_is_told_as_well():
    def forward(m, x):
        y = m.shrink(m.glu(x.exp()))
        return y @ y.mT

    block = Lambda(forward, shrink=nn.Hardshrink(), glu=nn.GLU())
    lines = refusal_of(lambda m, x: m.block(m.block(x)), 4, 4, block=block)
    assert [line.split(":")[0] for line in lines] == [
        "  - block (Lambda), aten.exp.default",
        "  - block.glu (GLU), aten.glu.default",
        "  - block.shrink (Hardshrink), aten.hardshrink.default",
        "  - block (Lambda), aten.matmul.default",
    ]


def test_what_is_known_behind_a_refused_operation_is_not_told():
    lines = refusal_of(lambda m, x: m.a(x.exp().relu().flatten(1).softmax(1)).argmax(1), 2, 4, a=nn.Linear(8, 3))
    assert [line.partition(", ")[2] for line in lines] == [
        "aten.exp.default: it has no finite Lipschitz constant, unless its argument is bounded from above",
        "aten.argmax.default: an index jumps",
    ]
    # Behind a transposed matrix nobody knows where the samples lie: that they are mixed is not told.
    assert len(refusal_of(lambda m, x: m.a(x.exp().view(4, 2).t().reshape(2, 4)), 4, a=nn.Linear(4, 3))) == 1


def test_only_the_shape_of_a_refused_value_may_be_used():
    model = Lambda(lambda m, x: x + torch.ones_like(x.exp()))
    assert value_of(model, torch.randn(2, 3)) == pytest.approx(1.0)


def test_an_operator_behind_a_refused_operation_is_none_of_the_network():
    model = Lambda(lambda m, x: x + torch.ones_like(m.a(x.exp())), a=nn.Linear(3, 3))
    assert NetworkBound.trace(model, torch.randn(2, 3)).operators == []


def test_a_list_of_refusals_is_short():
    def refusal(path, operation):
        return Refusal(path, "Block", operation, "no")

    same = listed([refusal(f"blocks.{i}", "exp") for i in (*range(12), 3)])
    assert same == "blocks.0, blocks.1, blocks.2, blocks.3 and 8 more (Block), exp: no"
    several = listed([refusal("", f"op{i}") for i in range(14)]).splitlines()
    assert len(several) == 11
    assert several[0] == "(the model itself) (Block), op0: no"
    assert several[-1] == "  - and 4 more"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.repeat_interleave(x, torch.tensor(2), -2) * 2 + torch.repeat_interleave(x, torch.tensor(2), -2),
        lambda x: x[x > 0].exp() * 2,
        lambda x: x.nonzero().sum() * x,
    ],
)
def test_what_has_a_size_that_depends_on_values_is_refused(function):
    with pytest.raises(UnsupportedLayerError):
        NetworkBound.trace(Lambda(lambda m, x: function(x)), torch.randn(2, 3, 3))
