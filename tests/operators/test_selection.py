"""What is selected, and what becomes of the layers whose operator is not known."""

import pytest
import torch
from torch import nn

from lightning_lip import LipschitzRegularizer, UnsupportedLayerError
from lightning_lip.operators.base import MatrixOperator
from lightning_lip.operators.selection import PROVIDERS, cover


class Block(nn.Module):
    """A block that holds a parameter of its own beside its layers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.norm(x)) * self.scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(5, 4)
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(4, 1, bias=False)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


LINEAR = ["first.linear", "second.linear", "head"]
LEFT_OUT = ["token", "first", "first.norm", "second", "second.norm"]


def test_unknown_layers_are_left_out_and_told_in_a_table(told):
    model = Net()
    coverage = LipschitzRegularizer(model, 1.0).coverage
    assert [op.name for op in coverage.operators] == list(coverage.layers) == LINEAR
    assert [layer.name for layer in coverage.skipped] == LEFT_OUT
    assert coverage.share == pytest.approx((2 * 20 + 4) / (20 + 2 * (4 + 8 + 20) + 4))
    (text,) = told
    assert str(coverage) in text
    assert text.splitlines() == [
        "Product of spectral norms: 3 layers with 50.0% of the parameters:",
        "  covered   3 Linear",
        "  left out  2 Block: what it computes from its parameters ['scale'] is not known",
        "  left out  2 LayerNorm: a normalisation is bounded in its place in the graph only: pass example_input=",
        "  left out  1 Embedding: an embedding is a look-up, not a linear map: start at its output",
        'With unknown="refuse" these are refused.',
    ]


def test_nothing_is_told_where_nothing_is_left_out(told):
    LipschitzRegularizer(Net(), 1.0, exclude=[nn.Embedding, nn.LayerNorm, "first.scale", "second.scale"])
    LipschitzRegularizer(Net(), 1.0, layers="head")
    assert told == []


def test_the_strict_way():
    with pytest.raises(UnsupportedLayerError) as caught:
        LipschitzRegularizer(Net(), 1.0, unknown="refuse")
    assert all(f"- {name} (" in str(caught.value) for name in LEFT_OUT)


@pytest.mark.parametrize("named", ["first.norm", "module", "token"])
def test_a_layer_that_is_named_is_refused(named):
    model = Net()
    named = model.first.norm if named == "module" else named
    with pytest.raises(
        UnsupportedLayerError, match=r"never counted as 1:\n  - (first\.norm|token) \(\w+\)[^\n]*\nLeave"
    ):
        cover(model, layers=["*", named], unknown="skip")


@pytest.mark.parametrize("layers", ["first*", ["first", "first.linear"], "module", nn.Linear, [Block], nn.Module])
def test_patterns_types_and_blocks_are_lenient(layers):
    model = Net()
    found = cover(model, layers=model.first if layers == "module" else layers, unknown="skip")
    assert next(op.name for op in found.operators) == "first.linear"


def test_types_select_with_all_that_is_in_them_and_exclude():
    model = Net()
    assert [op.name for op in cover(model, layers=Block, unknown="skip").operators] == LINEAR[:2]
    assert [op.name for op in cover(model, [Block, "head"], Block, "skip").operators] == LINEAR[2:]
    assert [op.name for op in cover(model, exclude=[Block, nn.Embedding]).operators] == LINEAR[2:]

    class Own(nn.Linear):
        """A subclass counts as its base."""

    model.second.linear = Own(4, 4)
    assert [op.name for op in cover(model, layers=Own).operators] == ["second.linear"]
    assert [op.name for op in cover(model, layers=nn.Linear).operators] == LINEAR
    with pytest.raises(ValueError, match=r"`layers`: <class '.*Conv2d'> matches no module"):
        cover(model, layers=nn.Conv2d)


def test_where_nothing_is_found_the_error_says_what_was_seen():
    with pytest.raises(ValueError, match=r"Layers with weights are: none\. The model holds 2 ReLU, 1 Sequential\."):
        cover(nn.Sequential(nn.ReLU(), nn.ReLU()), unknown="skip")
    model = nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3), nn.LayerNorm(3))
    seen = r"(?s)no others:\n  - 2 LayerNorm: a norm.*\n  - 1 Embedding: an emb.*holds 2 LayerNorm, 1 Sequential, 1 Emb"
    with pytest.raises(UnsupportedLayerError, match=seen):
        cover(model, unknown="skip")


def test_many_types_are_counted():
    kinds = [type(f"Own{i}", (Block,), {}) for i in range(10)]
    coverage = cover(nn.Sequential(*(kind() for kind in kinds)), exclude=nn.LayerNorm, unknown="skip")
    assert str(coverage).splitlines()[-1] == "  left out  2 of other types"


def test_providers_are_asked_in_turn():
    def own(module, name):
        if not isinstance(module, nn.Embedding):
            raise UnsupportedLayerError("no embedding")
        return [MatrixOperator(name, module)]

    def none_needed(module, name):
        if not isinstance(module, nn.LayerNorm):
            raise UnsupportedLayerError("no normalisation")
        return []

    found = cover(Net(), unknown="skip", providers=[*PROVIDERS, own, none_needed])
    assert [op.name for op in found.operators] == ["token", *LINEAR]
    assert [layer.name for layer in found.skipped] == ["first", "second"]
    assert found.skipped[0].reason.startswith("what it computes")  # the first provider's reason
    assert found.layers["first.norm"] == "LayerNorm"


def test_lazy_parameters_have_no_share():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    found = cover(model, unknown="skip")
    assert found.share == 1.0
    assert [layer.name for layer in found.skipped] == ["0"]
