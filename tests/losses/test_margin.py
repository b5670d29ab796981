"""The margin losses as functions of logits and bounds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lip import certified_margin_loss

C = 5


def case(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    rows = torch.randn(C, 3, generator=g, dtype=torch.float64)
    return logits, torch.randint(C, (12,), generator=g), torch.cdist(rows, rows).to(dtype)


def by_sample(z, y, bounds, form):
    """Each form as its paper states it, one sample and one class at a time."""
    losses = []
    for row, own in zip(z, y.tolist(), strict=True):
        if form == "gloro":
            top = int(row.argmax())
            bottom = max(row[j] + bounds[top, j] for j in range(C) if j != top)
            losses.append(-torch.cat([row, bottom[None]]).log_softmax(0)[own])
            continue
        moved = []
        for j in range(C):
            share = 1.0
            if form == "emma" and j != own:
                share = min(max(((row[own] - row[j]) / bounds[own, j]).item(), 0.01), 1.0)
            moved.append(row[j] + share * bounds[own, j])
        losses.append(-torch.stack(moved).log_softmax(0)[own])
    return torch.stack(losses)


@pytest.mark.parametrize("form", ["margin", "emma", "gloro"])
def test_value_and_gradients_are_those_of_the_definition(form):
    z, y, bounds = case()
    bounds.requires_grad_()
    truth = by_sample(z, y, bounds, form)
    assert torch.allclose(certified_margin_loss(z, y, bounds, form, reduction="none"), truth, rtol=1e-12)
    expected = torch.autograd.grad(truth.mean(), [z, bounds])
    found = torch.autograd.grad(certified_margin_loss(z, y, bounds, form), [z, bounds])
    apart = 1 - torch.eye(C, dtype=torch.float64)  # a logit's difference from itself is 0, and no bound
    for a, b in zip((found[0], found[1] * apart), (expected[0], expected[1] * apart), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", ["margin", "emma", "gloro"])
def test_a_number_bounds_every_pair(form):
    z, y, _ = case()
    everywhere = 0.7 * (1 - torch.eye(C, dtype=torch.float64))
    loss = certified_margin_loss(z, y, torch.tensor(0.7, dtype=torch.float64), form)
    assert loss.item() == pytest.approx(certified_margin_loss(z, y, everywhere, form).item(), rel=1e-12)


@pytest.mark.parametrize("form", ["margin", "emma"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_a_bound_it_is_the_cross_entropy(form, smoothing, reduction):
    z, y, bounds = case(torch.float32)
    weight = torch.arange(1.0, C + 1)
    y[3] = -7
    options = {"weight": weight, "ignore_index": -7, "reduction": reduction, "label_smoothing": smoothing}
    assert torch.allclose(certified_margin_loss(z, y, 0 * bounds, form, **options), F.cross_entropy(z, y, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gloro_smooths_weighs_and_ignores_over_the_classes_alone(reduction):
    z, y, bounds = case()
    y[3] = -7
    weight = torch.arange(1.0, C + 1, dtype=torch.float64)
    top = z.argmax(1)
    bottom = (z + bounds[top]).masked_fill(F.one_hot(top, C).bool(), -torch.inf).amax(1, keepdim=True)
    log_p = torch.cat([z, bottom], 1).log_softmax(1)[:, :C]
    losses = []
    for row, own in zip(log_p, y.tolist(), strict=True):
        parts = 0.8 * F.one_hot(torch.tensor(max(own, 0)), C).double() + 0.2 / C
        losses.append(-(parts * weight * row).sum() if own >= 0 else 0 * row.sum())
    losses = torch.stack(losses)
    total = weight[y[y >= 0]].sum()
    truth = {"mean": losses.sum() / total, "sum": losses.sum(), "none": losses}[reduction]
    options = {"weight": weight, "ignore_index": -7, "reduction": reduction, "label_smoothing": 0.2}
    assert torch.allclose(certified_margin_loss(z, y, bounds, "gloro", **options), truth, rtol=1e-12)


@pytest.mark.parametrize("form", ["margin", "emma", "gloro"])
def test_an_ignored_sample_is_as_if_it_were_not_there(form):
    z, y, bounds = case()
    ignored = torch.cat([y, torch.tensor([-100])])
    more = torch.cat([z, torch.full_like(z[:1], 50.0)])
    truth, found = certified_margin_loss(z, y, bounds, form), certified_margin_loss(more, ignored, bounds, form)
    assert found.item() == pytest.approx(truth.item(), rel=1e-12)


@pytest.mark.parametrize("form", ["margin", "emma", "gloro"])
def test_under_autocast_it_is_computed_in_fp32(form):
    z, y, bounds = case(torch.float32)
    half = z.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = certified_margin_loss(half, y, bounds, form)
    assert loss.dtype == torch.float32
    assert loss.item() == certified_margin_loss(half.float(), y, bounds, form).item()


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 3), TypeError, "soft targets"),
        (torch.zeros(4, 3), torch.zeros(4), TypeError, "integer classes"),
        (torch.zeros(2, 3, 5, 5), torch.zeros(2, 5, 5, dtype=torch.long), ValueError, "dense predictions"),
        (torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), ValueError, "at least 2 classes"),
        (torch.zeros(4, 3), torch.zeros(3, dtype=torch.long), ValueError, r"`target` of shape \(B,\)"),
        (torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long), TypeError, "floating-point logits"),
    ],
)
def test_what_has_no_margin_is_refused_in_words(logits, target, error, message):
    with pytest.raises(error, match=message):
        certified_margin_loss(logits, target, torch.tensor(0.1))


def test_bounds_of_another_shape_and_an_unknown_form_are_refused():
    z, y, bounds = case()
    with pytest.raises(ValueError, match=r"of shape \(\) or \(5, 5\)"):
        certified_margin_loss(z, y, bounds[0])
    with pytest.raises(ValueError, match="one of"):
        certified_margin_loss(z, y, bounds, "lmt")


def test_it_trains_a_module_as_cross_entropy_does():
    net = nn.Linear(2, 3)
    certified_margin_loss(net(torch.ones(1, 2)), torch.tensor([1]), torch.tensor(0.1)).backward()
    assert net.weight.grad.isfinite().all()
