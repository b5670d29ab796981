"""The penalty on convolutions by their symbols: one call for all layers, mixed precision, bf16 weights, frozen ones."""

import copy
import math

import pytest
import torch
from support.networks import randomised_batch_norm
from support.truth import operator_norms
from torch import nn

from lightning_lip import LipschitzRegularizer

IMAGES = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def network(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        *([randomised_batch_norm(nn.BatchNorm2d(6))] if norm else []),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect"),
        nn.Conv2d(6, 8, 1),
        *([randomised_batch_norm(nn.BatchNorm2d(8))] if norm else []),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2),
        nn.Conv2d(4, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(256, 3),
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "with batch normalisations"])
@pytest.mark.parametrize("penalty", ["product", "layer_sum"])
def test_value_and_gradient_are_those_of_the_true_norms(norm, penalty):
    model = network(norm).double()
    regularizer = LipschitzRegularizer(model, 0.1, penalty, knee=None, inputs=IMAGES.double(), n_iterations=300)
    added = regularizer.add_grad_()
    found = gradients(model)
    model.zero_grad()
    norms = operator_norms(regularizer.operators)
    truth = 0.1 * (norms.prod() if penalty == "product" else norms.sum())
    truth.backward()
    assert added.item() == pytest.approx(truth.item(), rel=1e-6)
    expected = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "with batch normalisations"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_changes_nothing(norm, backend):
    found = []
    for enabled in (False, True):
        model = network(norm)
        regularizer = LipschitzRegularizer(model, 0.1, inputs=IMAGES, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            regularizer.add_grad_()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "with batch normalisations"])
def test_weights_in_bf16_are_served(norm):
    model = network(norm).bfloat16()
    exact = LipschitzRegularizer(copy.deepcopy(model).float(), 0.1, n_iterations=50, inputs=IMAGES)
    regularizer = LipschitzRegularizer(model, 0.1, n_iterations=50, inputs=IMAGES.bfloat16())
    regularizer.iterate()
    exact.iterate()
    torch.testing.assert_close(regularizer.sigma(), exact.sigma(), rtol=1e-2, atol=0)
    regularizer.add_grad_()
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert model[0].weight.grad.isfinite().all()
    assert model[0].weight.grad.any()


def test_frozen_weights_and_gains_get_no_gradient_and_the_others_theirs():
    everything, some = network(), network()
    for frozen in (some[0].weight, some[5].weight):
        frozen.requires_grad_(False)
    for model in (everything, some):
        LipschitzRegularizer(model, 0.1, inputs=IMAGES).add_grad_()
    found, expected = gradients(some), gradients(everything)
    assert set(expected) - set(found) == {"0.weight", "5.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_parametrised_kernels_get_their_gradient_through_the_parametrization():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    for layer in (model[0], model[2]):
        nn.utils.parametrizations.weight_norm(layer)
    regularizer = LipschitzRegularizer(model, 1.0, "layer_sum", n_iterations=300)
    regularizer.add_grad_()
    found = gradients(model)
    model.zero_grad()
    operator_norms(regularizer.operators).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_layer_gone_bad_shows_and_spares_the_gradients():
    for norm in (False, True):
        model = network(norm)
        regularizer = LipschitzRegularizer(model, 0.1, inputs=IMAGES)
        nn.init.constant_(model[0].weight, math.nan)
        assert regularizer.add_grad_().isnan()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_another_choice_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`convolutions`.*'symbol', 'spatial'"):
        LipschitzRegularizer(network(), 0.1, convolutions="finite")
