"""A model watched once: by an input, or in the next training step."""

import pytest
import torch
from torch import nn

from lightning_lip import LipschitzRegularizer, UnsupportedLayerError
from lightning_lip.usage import observation


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: x W + b."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Language(nn.Module):
    """Conv1D, an embedding tied to the head, and a layer that nothing calls."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(7, 4), Conv1D(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.idle = Conv1D(3, 3)

    def forward(self, tokens, twice=False):
        h = self.inner(self.table(tokens))
        return self.head(self.inner(h) if twice else h)


def test_a_model_of_no_known_class_is_covered_by_what_it_computes():
    model = Language()
    regularizer = LipschitzRegularizer(model, 1.0, inputs={"tokens": torch.tensor([[1, 2]]), "twice": True})
    # The table counts once, through the head; the loop counts once.
    assert {op.name: op.multiplicity for op in regularizer.operators} == {"inner": 1, "head": 1}
    assert [(layer.name, layer.kind) for layer in regularizer.coverage.skipped] == [("idle", "Conv1D")]
    expected = [torch.linalg.matrix_norm(m.weight, 2) for m in (model.inner, model.head)]
    regularizer.iterate()
    assert torch.allclose(regularizer.sigma(), torch.stack(expected), rtol=1e-4)
    regularizer.add_grad_()
    assert model.inner.weight.grad is not None


def test_strict_selection_takes_what_is_seen_and_refuses_the_rest():
    with pytest.raises(UnsupportedLayerError, match=r"idle \(Conv1D\)"):
        LipschitzRegularizer(Language(), 1.0, inputs=torch.tensor([[1, 2]]), unknown="refuse")
    regularizer = LipschitzRegularizer(Language(), 1.0, inputs=torch.tensor([[1, 2]]), unknown="refuse", exclude="idle")
    assert len(regularizer.operators) == 2


def test_watching_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2)).train()
    before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    observation.observe(model, torch.randn(2, 3, 6, 6, generator=torch.Generator()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def training_step(self, x, fail=False):
        if fail:
            raise KeyError
        return self.layer(x)


def test_the_next_training_step_is_watched_once_for_all_who_ask():
    model, x = Steps(), torch.randn(2, 3)
    observation.begin(model)
    observation.begin(model)
    assert observation.seen(model) is None  # nothing yet
    model.training_step(x)
    assert "training_step" not in vars(model)
    assert torch.overrides._get_current_function_mode() is None
    first, second = observation.seen(model), observation.seen(model)
    for seen in (first, second):
        assert [op.name for op in seen.operators_of(model.layer, "layer")] == ["layer"]
    observation.end(model)
    assert observation.seen(model) is not None
    observation.end(model)
    assert observation.seen(model) is None


def test_a_step_that_fails_or_never_comes_leaves_nothing_behind():
    model = Steps()
    observation.begin(model)
    with pytest.raises(KeyError):
        model.training_step(None, fail=True)
    assert torch.overrides._get_current_function_mode() is None
    observation.end(model)
    observation.begin(model)
    observation.end(model)
    assert "training_step" not in vars(model)


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_convolutions_are_taken_at_the_size_that_was_seen(padding, mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode))
    regularizer = LipschitzRegularizer(model, 1.0, inputs=torch.randn(2, 3, 6, 7), convolutions="spatial")
    assert regularizer.operators[0].domain_shape == (3, 6, 7)
