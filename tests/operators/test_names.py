"""Names that look like something else: a submodule called `weight`, and names with the characters of patterns."""

import re

import pytest
import torch
from torch import nn

from lightning_lip import LipschitzRegularizer, UnsupportedLayerError


class Weighted(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return self.weight(x)


@pytest.mark.parametrize("wrap", [Weighted, lambda layer: nn.Sequential(Weighted(layer))])
def test_a_submodule_called_weight_is_a_layer_like_any_other(wrap):
    model = wrap(nn.Linear(3, 3))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert list(LipschitzRegularizer(model, 1.0).spectral_norms()) == names


def test_a_model_that_is_itself_refused_has_no_name_to_exclude():
    quantised = torch.ao.nn.quantized.Linear(3, 3)
    with pytest.raises(UnsupportedLayerError, match=r"its weight is quantised\nSelect others") as caught:
        LipschitzRegularizer(quantised, 1.0, unknown="refuse")
    assert "exclude=" not in str(caught.value)


@pytest.mark.parametrize("name", ["[CLS]", "a*", "?", "[!x]"])
def test_an_exact_name_wins_over_the_pattern_that_it_is(name):
    model = nn.ModuleDict({key: nn.Linear(2, 2) for key in ("C", "a1", "y", name)})
    assert list(LipschitzRegularizer(model, 1.0, layers=name).spectral_norms()) == [name]
    assert name not in LipschitzRegularizer(model, 1.0, exclude=name).spectral_norms()


def test_a_container_of_such_a_name_stands_for_all_that_is_in_it():
    model = nn.ModuleDict({"[CLS]": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "C": nn.Linear(2, 2)})
    assert list(LipschitzRegularizer(model, 1.0, layers="[CLS]").spectral_norms()) == ["[CLS].0", "[CLS].1"]
    with pytest.raises(ValueError, match=re.escape("'[xyz]' matches no module")):
        LipschitzRegularizer(model, 1.0, layers="[xyz]")
