"""MaxNorm: Keras's constraint, unit by unit."""

import lightning.pytorch as lightning
import pytest
import torch
from support.trainers import weights_of
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lip import MaxNorm, UnsupportedLayerError
from lightning_lip.callbacks.max_norm import clip_rows_


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clips_rows_above_and_leaves_the_others_bit_for_bit(dtype):
    weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [1e-3, -2.0]], dtype=dtype)
    before = weight.clone()
    assert int(clip_rows_(weight, 2.5)) == 1
    assert torch.equal(weight[1:], before[1:])
    # bf16 rounds each entry to 8 bits.
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert weight[0].double().tolist() == pytest.approx([1.5, 2.0], rel=tolerance)


@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"accumulate_grad_batches": 3, "max_epochs": 3}], ids=str)
def test_holds_after_every_step(fit, make_module, pl, settings):
    seen = []

    class Check(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append(max(float(pl_module.net[i].weight.norm(dim=1).max()) for i in (0, 2, 4)))

    module = make_module(pl, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    fit(constraint := MaxNorm(0.5), Check(), package=pl, module=module, **settings)
    assert seen[0] > 0.5  # the initial weights violate it: the test would show an inactive constraint
    assert max(seen[1:]) <= 0.5 * (1 + 1e-6)
    assert constraint.n_clipped > 0


def test_never_active(fit):
    assert torch.equal(weights_of(fit()[0]), weights_of(fit(loose := MaxNorm(100.0))[0]))
    assert loose.n_clipped == 0


def test_selection_and_frozen_layers(fit, make_module):
    module = make_module(lightning)
    module.net[2].weight.requires_grad_(False)
    frozen = module.net[2].weight.clone()
    fit(MaxNorm(0.1, exclude="net.0"), module=module)
    assert torch.equal(module.net[2].weight, frozen)
    assert float(module.net[4].weight.norm(dim=1).max()) <= 0.1 * (1 + 1e-6)
    assert float(module.net[0].weight.norm(dim=1).max()) > 0.1


def no_matrices():
    """Return a network of which the last layer alone is a matrix of its own."""
    odd = [nn.Conv1d(1, 1, 1), nn.LayerNorm(4), parametrizations.weight_norm(nn.Linear(4, 4))]
    return nn.Sequential(nn.Unflatten(1, (1, 4)), *odd, nn.Flatten(), nn.Linear(4, 1))


@pytest.mark.parametrize("arguments", [{"unknown": "refuse"}, {"layers": ["net.1", "net.2", "net.3"]}], ids=str)
def test_layers_without_a_matrix_are_refused_by_name(fit, make_module, arguments):
    refused = (
        r"(?s)MaxNorm takes .*net\.1 \(Conv1d\): .*no linear layer.*net\.2 \(LayerNorm\).*net\.3 .*is parametrised"
    )
    with pytest.raises(UnsupportedLayerError, match=refused):
        fit(MaxNorm(1.0, **arguments), module=make_module(lightning, net=no_matrices()))


def test_layers_without_a_matrix_are_left_out_and_told(fit, make_module, told):
    module = make_module(lightning, net=no_matrices())
    fit(MaxNorm(0.1), module=module)
    assert float(module.net[5].weight.norm(dim=1).max()) <= 0.1 * (1 + 1e-6)
    (text,) = (text for text in told if text.startswith("MaxNorm: 1 layer with "))
    assert [line.split()[3] for line in text.splitlines() if line.startswith("  left out")] == [
        "Conv1d:",
        "LayerNorm:",
        "ParametrizedLinear:",
    ]
