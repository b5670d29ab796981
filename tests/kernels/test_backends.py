"""The choice of a kernel: by device, by name, with a reason; and the same training with each."""

import logging
import math

import lightning.pytorch as lightning
import pytest
import torch
from support.iterations import check_a_product_beyond_fp32, penalise
from support.truth import blocks
from torch import nn

from lightning_lip import LipschitzPenalty, LipschitzRegularizer, kernels
from lightning_lip.kernels import PENALTY_CODES, choose_backend, iterations_for, penalty_slope
from lightning_lip.kernels.cpu.iteration import CpuIteration
from lightning_lip.kernels.penalties import LARGEST_KNEE, level_of
from lightning_lip.kernels.reference import ReferenceIteration
from lightning_lip.penalty.penalties import get_penalty

LOG_LARGEST = math.log(LARGEST_KNEE)


def test_the_device_chooses(monkeypatch):
    monkeypatch.delenv("LIGHTNING_LIP_BACKEND", raising=False)
    assert choose_backend(torch.ones(3, 4), 8) == "cpu"
    assert choose_backend(torch.ones(3, 4, dtype=torch.bfloat16), 8) == "cpu"


def test_a_fallback_is_logged_once_with_its_reason(monkeypatch, caplog):
    monkeypatch.delenv("LIGHTNING_LIP_BACKEND", raising=False)
    monkeypatch.setattr(kernels, "_already_told", set())
    with caplog.at_level(logging.INFO, "lightning_lip"):
        for _ in range(3):
            assert choose_backend(torch.ones(3, 4, dtype=torch.float64), 8) == "reference"
    (record,) = caplog.records
    assert "instead of the compiled kernels: they take fp32 and bf16, not torch.float64" in record.message


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_backend_asked_for_by_name_serves_or_raises(monkeypatch, how):
    def choose(weight, name):
        monkeypatch.setenv("LIGHTNING_LIP_BACKEND", name if how == "environment" else "")
        return choose_backend(weight, 8, name if how == "argument" else None)

    assert choose(torch.ones(3, 4), "reference") == "reference"
    assert choose(torch.ones(3, 4), "cpu") == "cpu"
    with pytest.raises(ValueError, match=r"'cpu' cannot serve a weight of shape \(3, 4\): they take fp32 and bf16"):
        choose(torch.ones(3, 4, dtype=torch.float64), "cpu")
    reason = "not on a CUDA device|Triton 3.3 is needed"
    with pytest.raises(ValueError, match=rf"'gpu' cannot serve a weight of shape \(3, 4\): .*({reason})"):
        choose(torch.ones(3, 4), "gpu")
    with pytest.raises(ValueError, match="Unknown backend 'tpu': expected one of 'reference', 'cpu', 'gpu'"):
        choose(torch.ones(3, 4), "tpu")


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("LIGHTNING_LIP_BACKEND", "reference")
    assert choose_backend(torch.ones(3, 4), 8, "cpu") == "cpu"


def test_the_regulariser_checks_the_name_at_construction():
    with pytest.raises(ValueError, match="Unknown backend 'fast'"):
        LipschitzRegularizer(nn.Linear(2, 2), 1.0, backend="fast")


def test_weights_of_one_kind_share_an_iteration(monkeypatch):
    monkeypatch.delenv("LIGHTNING_LIP_BACKEND", raising=False)
    weights = [torch.ones(3, 4), torch.ones(2, 2, dtype=torch.float64), torch.ones(5, 1), torch.ones(4, 4).bfloat16()]
    groups = iterations_for(weights, blocks(weights, 2))
    assert [(indices, type(iteration)) for indices, iteration in groups] == [
        ([0, 2], CpuIteration),
        ([1], ReferenceIteration),
        ([3], CpuIteration),
    ]


def test_reference_iteration_needs_a_step_first():
    weight = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="take a power_step first"):
        ReferenceIteration([weight], blocks([weight], 2)).rank_one_update_([weight], torch.ones(1))


@pytest.mark.parametrize("knee", [5.0, math.inf])
@pytest.mark.parametrize("log_bound", [-3.0, -0.5, 0.7, 1.6, 5.0, 25.0, LOG_LARGEST - 1, LOG_LARGEST + 3])
@pytest.mark.parametrize("name", list(PENALTY_CODES))
def test_slopes_count_every_use_of_a_layer(name, log_bound, knee):
    uses = [1, 3, 1]
    repeats = torch.tensor(uses, dtype=torch.float64)
    log_sigma = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    log_sigma = (log_sigma + (log_bound - (repeats * log_sigma).sum()) / repeats.sum()).requires_grad_()
    repeated = log_sigma.repeat_interleave(repeats.long())
    value = get_penalty(name, 2.0, knee)(repeated, repeated.sum())
    (slope,) = torch.autograd.grad(value, log_sigma)
    sigma = log_sigma.detach().exp()
    got, got_slope = penalty_slope(PENALTY_CODES[name], sigma, uses, level_of(name, 2.0, knee))
    assert not got.requires_grad
    torch.testing.assert_close(got, value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_slope, slope / sigma, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "slopes"),
    [
        ("product", 0.0, [0.0, 0.0, 0.0]),
        ("softplus_log", 0.0, [0.0, 0.0, 0.0]),
        ("hinge_log", 0.0, [0.0, 0.0, 0.0]),
        ("log", -math.inf, [0.0, 4.0, 0.5]),
        ("layer_sum", 3.0, [0.0, 2.0, 1.0]),
        ("layer_sum_squares", 4.5, [0.0, 2.0, 4.0]),
    ],
)
def test_a_zero_layer_has_no_slope_and_leaves_the_others_theirs(name, value, slopes, inference):
    with torch.inference_mode(inference):
        sigma = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
        got, got_slopes = penalty_slope(PENALTY_CODES[name], sigma, [3, 2, 1], 1.0)
    assert got.item() == pytest.approx(value, rel=1e-12)
    assert got_slopes.tolist() == pytest.approx(slopes, rel=1e-12)


@pytest.mark.parametrize("name", list(PENALTY_CODES))
def test_slopes_that_are_not_finite_count_as_zero(name):
    sigma = torch.tensor([math.nan, 2.0], dtype=torch.float64)
    value, slopes = penalty_slope(PENALTY_CODES[name], sigma, [1, 1], 1.0)
    assert value.isnan()
    own = {"log": 0.5, "layer_sum": 1.0, "layer_sum_squares": 4.0}.get(name, 0.0)
    assert slopes.tolist() == pytest.approx([0.0, own], rel=1e-12)


@pytest.mark.parametrize("knee", [100.0, LARGEST_KNEE])
@pytest.mark.parametrize("kind", [ReferenceIteration, CpuIteration])
def test_a_product_beyond_fp32_has_the_gradient_of_its_knee(kind, knee):
    check_a_product_beyond_fp32(kind, knee)


@pytest.mark.parametrize("kind", [ReferenceIteration, CpuIteration])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38], ids=str)
@pytest.mark.parametrize("name", list(PENALTY_CODES))
def test_a_norm_that_is_not_finite_leaves_no_gradient_that_is_not(kind, bad, name):
    # 3e38 is finite, the norm of 8 x 8 of it is not.
    weights = [torch.full((8, 8), bad), torch.eye(4)]
    grads = [torch.ones_like(w) for w in weights]
    iteration = kind(weights, blocks(weights, 2))
    for _ in range(2):
        penalise(iteration, weights, grads, name)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("penalty", ["product", "layer_sum"])
def test_training_is_the_same_with_every_backend(make_module, make_trainer, regression_data, monkeypatch, penalty):
    weights = {}
    for backend in ("reference", "cpu", ""):
        monkeypatch.setenv("LIGHTNING_LIP_BACKEND", backend)
        module = make_module(lightning)
        callback = LipschitzPenalty(0.05, penalty, block_size=4)
        make_trainer(lightning, callbacks=[callback], max_epochs=5).fit(module, regression_data)
        weights[backend] = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert torch.equal(weights["cpu"], weights[""])  # the default on a CPU
    # 60 Adam steps carry fp32 rounding on; the penalty itself moves the weights by about 0.5.
    assert float((weights["cpu"] - weights["reference"]).norm()) < 1e-3
