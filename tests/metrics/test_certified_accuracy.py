import math

import numpy as np
import pytest
import torch
from support.certified import LEVELS, make_batches, make_metric, true_values, update_all
from torch import nn

from lightning_lip.metrics.certified_accuracy import (
    CertifiedAccuracy,
    certified_accuracy,
    certified_radii,
    certified_worst_case_mae,
)


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_class_and_function_match_the_truth(dtype, with_weight):
    batches = make_batches(dtype=dtype)
    weight = (torch.randn(4, 6, generator=torch.Generator().manual_seed(9)) / 4).to(dtype) if with_weight else None
    metric = update_all(make_metric(), batches, last_weight=weight)
    truth = true_values(batches, 1.5, weight=None if weight is None else weight.double().numpy())
    np.testing.assert_allclose(metric.compute().numpy(), truth, rtol=1e-6)
    assert 0 < truth[2] < truth[1] < truth[0]  # the data tell the radii apart
    stacked = [torch.cat(part) for part in zip(*batches, strict=True)]
    np.testing.assert_allclose(certified_accuracy(*stacked, 1.5, LEVELS, weight).numpy(), truth, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("constants", [(1.5,), (1.5, "rows"), (1.5, "rows", 0.9)])
def test_a_sample_is_certified_at_its_radius_and_not_far_beyond(constants, dtype):
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    constants = [rows if constant == "rows" else constant for constant in constants]
    logits, target = (torch.cat(part) for part in zip(*make_batches(dtype=dtype), strict=True))
    radii = certified_radii(logits, target, *constants)
    assert radii.dtype == torch.float32
    assert torch.equal(radii > 0, logits.argmax(1) == target)
    for z, y, radius in zip(logits, target, radii.tolist(), strict=True):
        lipschitz, *others = constants
        shares = certified_accuracy(z[None], y[None], lipschitz, [radius, 1.000001 * radius + 1e-30], *others)
        assert shares.tolist() == [float(radius > 0), 0.0]


def test_radii_of_no_number_are_zero_and_without_slope_infinite():
    logits = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [0.5, 0.5], [2.0, 1.0]])
    target = torch.zeros(4, dtype=torch.long)
    assert certified_radii(logits, target, 0.0).tolist() == [0.0, 0.0, 0.0, torch.inf]
    assert not certified_radii(logits, target, 1.0, torch.tensor([[torch.nan], [0.0]])).any()


def test_one_radius_gives_a_scalar(pyplot):
    batches = make_batches()
    metric = update_all(CertifiedAccuracy(0.1), batches)
    assert metric.compute().shape == ()
    assert metric.compute().item() == pytest.approx(true_values(batches, 1.5)[1])
    assert certified_accuracy(*batches[0], 1.5, 0.1).shape == ()
    _, axes = metric.plot()
    assert [list(line.get_ydata()) for line in axes.lines] == [[pytest.approx(metric.compute().item())]]


def test_the_constant_may_change_between_batches():
    batches = make_batches()
    metric = make_metric()
    counts = 0
    for (logits, target), lipschitz in zip(batches, (0.0, torch.tensor(2.0), 0.5), strict=True):
        metric.update(logits, target, lipschitz)
        counts = counts + true_values([(logits, target)], float(lipschitz)) * len(target)
    np.testing.assert_allclose(metric.compute().numpy(), counts / 46, rtol=1e-6)


def test_no_perturbation_inside_the_radius_changes_a_certified_prediction():
    # A linear classifier, whose worst perturbation is known: towards each other class along w_j - w_y.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    target = (x @ weight.T).argmax(dim=1)
    eps = 0.2
    sigma = torch.linalg.matrix_norm(weight, 2).item()
    plain = certified_accuracy(x @ weight.T, target, sigma, eps)
    pairwise = certified_accuracy(x @ weight.T, target, 1.0, eps, weight)
    kept = torch.ones(200, dtype=torch.bool)
    for j in range(3):
        direction = torch.nn.functional.normalize(weight[j] - weight[target], dim=1)
        kept &= ((x + eps * direction) @ weight.T).argmax(dim=1) == target
    exact = kept.double().mean()
    # The pairwise form is exact here; the plain one is not above it.
    assert 0 < plain < pairwise == pytest.approx(exact.item(), abs=1e-7)


def test_a_margin_at_the_threshold_is_not_certified():
    threshold = math.sqrt(2) * 0.3
    for steps in (-1, 0, 1):
        margin = threshold
        for _ in range(abs(steps)):
            margin = math.nextafter(margin, math.copysign(math.inf, steps))
        logits = torch.tensor([[margin, 0.0]], dtype=torch.float64)
        assert certified_accuracy(logits, torch.tensor([0]), 1.0, 0.3) == 0
    logits = torch.tensor([[threshold * (1 + 1e-12), 0.0]], dtype=torch.float64)
    assert certified_accuracy(logits, torch.tensor([0]), 1.0, 0.3) == 1


@pytest.mark.parametrize("scale", [1e-308, 1e-162, 1.0, 1e160, 1e300])
def test_the_pairwise_norms_neither_underflow_nor_overflow(scale):
    weight = scale * torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    margins = torch.tensor([4.0, 5.0 * (1 - 1e-15), 5.0 * (1 + 1e-13)], dtype=torch.float64)
    logits = torch.stack([margins, torch.zeros(3, dtype=torch.float64)], dim=1)
    classes = torch.zeros(3, dtype=torch.int64)
    # The threshold is 5, twice: by the constant, and by the radius.
    for factors in ((1 / scale, 1.0), (1.0, 1 / scale)):
        assert certified_accuracy(logits, classes, *factors, weight) == pytest.approx(1 / 3)


def test_a_threshold_of_a_product_that_underflows():
    weight = torch.tensor([[1e300, 0.0], [0.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[1e-101, 0.0], [1e-99, 0.0], [1e-20, 0.0]], dtype=torch.float64)
    # The threshold is 1e-100; from 1e-400, rounded up to the least number, it is 5e-24.
    assert certified_accuracy(logits, torch.zeros(3, dtype=torch.int64), 1e-200, 1e-200, weight) == pytest.approx(1 / 3)
    for constant, radius in ((0.0, 1.0), (1.0, 0.0)):
        assert certified_accuracy(logits, torch.zeros(3, dtype=torch.int64), constant, radius, weight) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_certify_nothing(bad):
    weight = torch.tensor([[bad, 0.0], [0.0, 0.0]])
    assert certified_accuracy(torch.tensor([[9.0, 0.0]]), torch.tensor([0]), 1.0, 0.1, weight) == 0


def test_half_precision_margins_are_not_rounded():
    # 2049 is no fp16 number: in fp16 both margins would be 2048 and the second sample certified.
    logits = torch.tensor([[2048.0, -2.0], [2048.0, 0.0]], dtype=torch.float16)
    assert certified_accuracy(logits, torch.tensor([0, 0]), 2049 / math.sqrt(2), 1.0) == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_and_ties_do_not_count(bad):
    logits = torch.tensor([[3.0, bad], [bad, 3.0], [1.0, 1.0], [3.0, 1.0]])
    assert certified_accuracy(logits, torch.zeros(4, dtype=torch.long), 1.0, 0.0) == 0.25


def test_wrong_predictions_do_not_count():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert certified_accuracy(logits, torch.tensor([1, 0]), 1e-3, 0.0) == 0


def test_half_of_a_module_leaves_the_counts():
    parent = nn.Module()
    parent.metric = CertifiedAccuracy(0.0)
    parent.half()
    for _ in range(3):
        parent.metric.update(torch.tensor([[1.0, 0.0]]).expand(1001, 2), torch.zeros(1001, dtype=torch.long), 1.0)
    assert parent.metric.certified.tolist() == [3003]
    assert parent.metric.compute() == 1


LOGITS, TARGET = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS.long(), TARGET, 1.0), TypeError, r"floating-point logits, got torch\.int64"),
        ((LOGITS, TARGET.float(), 1.0), TypeError, r"integer classes, got torch\.float32"),
        ((LOGITS, TARGET.bool(), 1.0), TypeError, r"integer classes, got torch\.bool"),
        ((LOGITS[0], TARGET, 1.0), ValueError, r"got \(3,\) and \(2,\)"),
        ((LOGITS[:, :1], TARGET, 1.0), ValueError, r"a single logit z is the pair \(0, z\)"),
        ((LOGITS, TARGET[:, None], 1.0), ValueError, r"got \(2, 3\) and \(2, 1\)"),
        ((LOGITS, TARGET + 3, 1.0), ValueError, "classes from 0 to 2, got 3 to 3"),
        ((LOGITS, TARGET - 100, 1.0), ValueError, "leave out samples"),
        ((LOGITS, TARGET, math.inf), ValueError, "where nothing is certified there is none"),
        ((LOGITS, TARGET, math.nan), ValueError, "finite number of at least 0, got nan"),
        ((LOGITS, TARGET, -1.0), ValueError, "finite number of at least 0, got -1.0"),
        ((LOGITS, TARGET, 1.0, torch.ones(2, 5)), ValueError, r"last_weight of shape \(3, d\) .* got \(2, 5\)"),
        ((LOGITS, TARGET, 1.0, torch.ones(3)), ValueError, r"got \(3,\)"),
        ((LOGITS, TARGET, 1.0, torch.ones(3, 0)), ValueError, r"got \(3, 0\)"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        CertifiedAccuracy(0.1).update(*arguments)
    logits, target, lipschitz, *weight = arguments
    with pytest.raises(error, match=message):
        certified_accuracy(logits, target, lipschitz, 0.1, *weight)


@pytest.mark.parametrize("radius", [[], -0.1, math.nan, [0.1, math.inf]])
def test_wrong_radius(radius):
    with pytest.raises(ValueError, match="`radius` to be one or more finite numbers of at least 0"):
        CertifiedAccuracy(radius)


def test_an_empty_batch():
    for weight in (None, torch.ones(3, 2)):
        with pytest.raises(RuntimeError, match="no sample was seen"):
            certified_accuracy(LOGITS[:0], TARGET[:0], 1.0, 0.1, weight)


@pytest.mark.parametrize("n_outputs", [1, 4])
def test_worst_case_mae_bounds_every_perturbation(n_outputs):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_outputs, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(100, n_outputs, generator=generator, dtype=torch.float64)
    lipschitz = torch.linalg.matrix_norm(weight, 2).item()
    noise = 0.7 * torch.nn.functional.normalize(torch.linalg.svd(weight).Vh[0], dim=0)
    clean = (x @ weight.T - target).abs().mean().item()
    bound = certified_worst_case_mae(clean, lipschitz, 0.7, n_outputs)
    for sign in (-1, 1):
        assert ((x + sign * noise) @ weight.T - target).abs().mean() <= bound
    assert bound == pytest.approx(clean + lipschitz * 0.7 / math.sqrt(n_outputs))


def test_worst_case_mae_is_attained():
    # f(x) = -2 x, errors of one sign: the noise moves every prediction away from its target by L times its norm.
    x = torch.linspace(0, 1, 5)
    worst = (-2 * (x + 0.25) + 2 * x - 1).abs().mean().item()
    bound = certified_worst_case_mae(1.0, 2.0, 0.25)
    assert worst == pytest.approx(bound)
    assert isinstance(bound, float)
    assert torch.is_tensor(certified_worst_case_mae(torch.tensor(1.0), 2.0, 0.25))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 1.0, 1.0), "mae as a finite number of at least 0, got -1.0"),
        ((1.0, math.inf, 1.0), "lipschitz as a finite .* where nothing is certified"),
        ((1.0, 1.0, math.nan), "noise_norm as a finite"),
        ((1.0, 1.0, 1.0, 0), "`n_outputs` to be an integer of at least 1, got 0"),
        ((1.0, 1.0, 1.0, True), "`n_outputs` to be an integer of at least 1, got True"),
    ],
)
def test_worst_case_mae_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        certified_worst_case_mae(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_on_cuda():
    batches = make_batches()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    for last in (None, weight):
        metric = make_metric().cuda()
        for logits, target in batches:
            metric.update(logits.cuda(), target.cuda(), torch.tensor(1.5).cuda(), None if last is None else last.cuda())
        truth = true_values(batches, 1.5, weight=None if last is None else last.double().numpy())
        np.testing.assert_allclose(metric.compute().cpu().numpy(), truth, rtol=1e-6)
