import numpy as np
import pytest
import torch
import torchmetrics
from support.metrics import check_examples, copies, on_two_ranks
from torch import nn

from lightning_lip.metrics import (
    NoisyMeanAbsoluteError,
    feature_ranges,
    noisy_mean_absolute_error,
)

LEVELS = (0.0, 0.3, 0.1)
LOW = [-1.0, 0.0, 2.0]
HIGH = [1.0, 10.0, 2.0]  # the last feature is constant: it gets no noise
WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -1.0]])

# One rounding of each product and of the sum over a batch, in the accumulating dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
# Half precision rounds the noisy input and the prediction: its own spacing at 1, times a few operations.
HALF_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def linear(x):
    return x @ WEIGHT.to(x.dtype).T


def make_batches(n_batches=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [5, 1, 4, 7][:n_batches]
    low, high = torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64)
    return [
        (
            (low + (high - low) * torch.rand(size, 3, generator=generator, dtype=torch.float64)).to(dtype),
            torch.randn(size, 2, generator=generator, dtype=torch.float64).to(dtype),
        )
        for size in sizes
    ]


def numpy_errors(batches, levels=LEVELS, low=LOW, high=HIGH, symmetric=False, seed=0, rank=0):
    """Sum of absolute errors per level and batch, and target elements per batch, in float64, with the seed replayed."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]))
    weight = WEIGHT.numpy().astype(np.float64)
    sums, counts = [], []
    for inputs, target in batches:
        u = torch.rand(inputs.shape, generator=generator).numpy().astype(np.float64)
        u = 2 * u - 1 if symmetric else u
        x, y = inputs.double().numpy(), target.double().numpy()
        span = np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)
        sums.append([np.abs((x + eta * span * u) @ weight.T - y).sum() for eta in levels])
        counts.append(y.size)
    return np.array(sums), np.array(counts)


def numpy_truth(batches, **kwargs):
    sums, counts = numpy_errors(batches, **kwargs)
    return sums.sum(axis=0) / counts.sum()


def make_metric(**kwargs):
    return NoisyMeanAbsoluteError(LEVELS, **{"feature_min": LOW, "feature_max": HIGH, **kwargs})


def update_all(metric, batches, predict=linear):
    for inputs, target in batches:
        metric.update(predict, inputs, target)
    return metric


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_matches_numpy(dtype, symmetric):
    batches = make_batches(dtype=dtype)
    value = update_all(make_metric(symmetric=symmetric, seed=7), batches).compute()
    assert value.dtype == dtype
    assert value.shape == (len(LEVELS),)
    truth = numpy_truth(batches, symmetric=symmetric, seed=7)
    np.testing.assert_allclose(value.numpy(), truth, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("symmetric", [False, True])
def test_function_matches_numpy(symmetric):
    batches = make_batches(n_batches=1)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([3, 0]).generate_state(1)[0]))
    value = noisy_mean_absolute_error(linear, *batches[0], LEVELS, LOW, HIGH, symmetric=symmetric, generator=generator)
    truth = numpy_truth(batches, symmetric=symmetric, seed=3)
    np.testing.assert_allclose(value.numpy(), truth, rtol=TOLERANCE[torch.float32])


def test_function_without_generator_follows_the_global_seed():
    inputs, target = make_batches(n_batches=1)[0]
    values = []
    for _ in range(2):
        torch.manual_seed(11)
        values.append(noisy_mean_absolute_error(linear, inputs, target, LEVELS, LOW, HIGH))
    assert torch.equal(*values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_accumulate_in_float32(dtype):
    batches = make_batches(dtype=dtype)
    seen = []
    value = update_all(make_metric(), batches, lambda x: seen.append(x.dtype) or linear(x)).compute()
    assert set(seen) == {dtype}  # the model gets what it was built for
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), numpy_truth(batches), rtol=HALF_TOLERANCE[dtype])


def test_half_precision_sum_does_not_saturate():
    # 81920 errors of 1: beyond the largest float16.
    inputs, target = torch.zeros(1024, 1, dtype=torch.float16), torch.ones(1024, 80, dtype=torch.float16)
    metric = NoisyMeanAbsoluteError((0.0,), 0.0, 1.0)
    metric.update(lambda x: torch.zeros_like(target), inputs, target)
    assert metric.sum_abs_error.item() == 81920
    assert metric.compute().item() == 1


def test_half_precision_inputs_with_a_range_beyond_half_precision():
    inputs = torch.zeros(10, 1, dtype=torch.float16)
    metric = NoisyMeanAbsoluteError((0.001,), 0.0, 100_000.0)
    metric.update(lambda x: x, inputs, inputs)
    assert 0 < metric.compute() < 100


def test_level_zero_sees_the_inputs_exactly_and_levels_share_one_draw():
    inputs, target = make_batches(n_batches=1)[0]
    calls = []
    make_metric().update(lambda x: calls.append(x) or linear(x), inputs, target)
    assert len(calls) == 1
    clean, noisy, less_noisy = calls[0].unflatten(0, (3, 5))
    assert torch.equal(clean, inputs)
    torch.testing.assert_close((noisy - inputs) / 0.3, (less_noisy - inputs) / 0.1, rtol=1e-4, atol=1e-5)
    assert torch.equal(noisy[:, 2], inputs[:, 2])


@pytest.mark.parametrize(("symmetric", "low"), [(False, 0.0), (True, -1.0)])
def test_noise_spans_its_interval(symmetric, low):
    inputs = torch.zeros(4000, 1)
    seen = []
    metric = NoisyMeanAbsoluteError((0.5,), 10.0, 14.0, symmetric=symmetric)
    metric.update(lambda x: seen.append(x) or x, inputs, inputs)
    noise = seen[0] / (0.5 * 4.0)
    # 4000 draws: an end is missed by 1 % of the interval with probability .99^4000 < 1e-17.
    assert low <= noise.min() < low + 0.02
    assert 0.98 < noise.max() <= 1


def test_scalar_tensor_and_image_ranges():
    inputs, target = torch.rand(4, 2, 3), torch.rand(4)

    def predict(x):
        return x.sum(dim=(1, 2))

    values = [
        noisy_mean_absolute_error(
            predict, inputs, target, (0.2,), low, high, generator=torch.Generator().manual_seed(0)
        )
        for low, high in [
            (0.0, 2.0),
            ([0.0] * 3, 2.0),
            (np.zeros((2, 1)), torch.full((2, 3), 2.0, requires_grad=True)),
        ]
    ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert not values[2].requires_grad


def test_metric_keeps_its_own_ranges():
    low = torch.zeros(3, dtype=torch.float64)
    metric = make_metric(feature_min=low)
    low += 1
    assert metric.feature_min.tolist() == [0, 0, 0]


def test_reset_repeats_the_noise_and_further_batches_do_not():
    inputs, target = make_batches(n_batches=1)[0]
    metric = make_metric()
    epochs = []
    for _ in range(2):
        epochs.append([metric(linear, inputs, target) for _ in range(2)])
        metric.reset()
    assert torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(epochs[0][1], epochs[1][1])
    assert not torch.equal(epochs[0][0], epochs[0][1])


def test_seeds_differ():
    batches = make_batches()
    values = [update_all(make_metric(seed=seed), batches).compute() for seed in (0, 1)]
    assert values[0][0] == values[1][0]  # eta = 0: no noise
    assert (values[0][1:] != values[1][1:]).all()


def test_global_generators_are_neither_used_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = update_all(make_metric(), make_batches()).compute()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(update_all(make_metric(), make_batches()).compute(), first)


@pytest.mark.parametrize("dist_sync_on_step", [False, True])
def test_forward_value_and_accumulated_value_come_from_one_draw(dist_sync_on_step):
    # With dist_sync_on_step, torchmetrics calls update twice a batch.
    batches = make_batches()
    metric = make_metric(dist_sync_on_step=dist_sync_on_step)
    values = np.array([metric(linear, inputs, target).numpy() for inputs, target in batches])
    sums, counts = numpy_errors(batches)
    np.testing.assert_allclose(values, sums / counts[:, None], rtol=TOLERANCE[torch.float32])
    np.testing.assert_allclose(metric.compute().numpy(), numpy_truth(batches), rtol=TOLERANCE[torch.float32])


def test_forward_and_update_mix():
    batches = make_batches()
    metric = make_metric()
    metric.update(linear, *batches[0])
    metric(linear, *batches[1])
    metric.update(linear, *batches[2])
    np.testing.assert_allclose(metric.compute().numpy(), numpy_truth(batches), rtol=TOLERANCE[torch.float32])


def test_failed_forward_leaves_the_reset_working():
    batches = make_batches()
    metric = make_metric()
    with pytest.raises(ValueError, match="NaN"):
        metric(linear, torch.full((2, 3), torch.nan), torch.zeros(2, 2))
    metric.reset()
    np.testing.assert_allclose(
        update_all(metric, batches).compute().numpy(), numpy_truth(batches), rtol=TOLERANCE[torch.float32]
    )


@copies
@pytest.mark.parametrize("n_before", [0, 1])
def test_copies_continue_the_noise(copy_of, n_before):
    batches = make_batches()
    metric = update_all(make_metric(), batches[:n_before])
    twin = copy_of(metric)
    for each in (metric, twin):
        update_all(each, batches[n_before:])
        np.testing.assert_allclose(each.compute().numpy(), numpy_truth(batches), rtol=TOLERANCE[torch.float32])


def test_half_of_a_module_leaves_states_and_ranges():
    module = nn.Module()
    module.metric = NoisyMeanAbsoluteError((1.0,), 0.0, 100_000.0)  # beyond float16
    module.half()
    assert module.metric.sum_abs_error.dtype == torch.float32
    inputs = torch.zeros(2, 1)
    module.metric.update(lambda x: x, inputs, inputs)
    assert module.metric.compute().isfinite().all()


def test_set_dtype_accumulates_in_float64():
    metric = make_metric().set_dtype(torch.float64)
    assert update_all(metric, make_batches()).compute().dtype == torch.float64


@pytest.mark.skipif(not hasattr(torchmetrics.Metric, "merge_state"), reason="torchmetrics before 1.5")
def test_merge_state():
    batches = make_batches()
    first, second = update_all(make_metric(), batches[:2]), update_all(make_metric(seed=5), batches[2:])
    first.merge_state(second)
    sums = numpy_errors(batches[:2])[0].sum(axis=0) + numpy_errors(batches[2:], seed=5)[0].sum(axis=0)
    count = sum(target.numel() for _, target in batches)
    np.testing.assert_allclose(first.compute().numpy(), sums / count, rtol=TOLERANCE[torch.float32])


def test_states_made_in_inference_mode_stay_usable():
    batches = make_batches()
    metric = make_metric()
    with torch.inference_mode():
        update_all(metric, batches[:1])
    update_all(metric, batches[1:])
    np.testing.assert_allclose(metric.compute().numpy(), numpy_truth(batches), rtol=TOLERANCE[torch.float32])


def test_value_on_a_batch_is_differentiable_and_states_are_not():
    (inputs, target) = make_batches(n_batches=1)[0]
    model = nn.Linear(3, 2)
    metric = make_metric()
    metric(model, inputs, target)[1].backward()
    gradient = model.weight.grad.clone()
    assert not metric.sum_abs_error.requires_grad

    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([0, 0]).generate_state(1)[0]))
    span = torch.tensor(HIGH) - torch.tensor(LOW)
    model.zero_grad()
    (model(inputs + 0.3 * span * torch.rand(5, 3, generator=generator)) - target).abs().mean().backward()
    torch.testing.assert_close(gradient, model.weight.grad)


def test_default_dtype_and_integer_targets():
    metric = NoisyMeanAbsoluteError((0.0,), 0.0, 1.0)
    metric.update(lambda x: x[:, 0], torch.tensor([[0.5], [1.5]]), torch.tensor([1, 1]))
    assert metric.compute().item() == 0.5


# A rank without a batch is warned by torchmetrics.
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_ddp_matches_numpy_with_both_ranks_seeds(tmp_path):
    of_rank = [make_batches(n_batches=2 + rank, seed=rank) for rank in range(2)]

    def work(metric, rank):
        # The ranks hold different numbers of samples; the second epoch gives a rank no batch at all.
        epochs = []
        for batches in (of_rank[rank], make_batches() if rank == 0 else []):
            update_all(metric, batches)
            first = metric.compute()
            assert torch.equal(metric.compute(), first)  # unsynced and synced again
            epochs.append(first)
            metric.reset()
        return torch.stack(epochs)

    values = on_two_ranks(lambda: make_metric(seed=2), work, tmp_path)
    assert torch.equal(values[0], values[1])
    sums, counts = zip(*(numpy_errors(of_rank[rank], seed=2, rank=rank) for rank in range(2)), strict=True)
    truth = sum(each.sum(axis=0) for each in sums) / sum(each.sum() for each in counts)
    np.testing.assert_allclose(values[0][0].numpy(), truth, rtol=TOLERANCE[torch.float32])
    np.testing.assert_allclose(values[0][1].numpy(), numpy_truth(make_batches(), seed=2), rtol=TOLERANCE[torch.float32])
    # The truth itself depends on the rank's seed.
    assert not np.allclose(numpy_truth(make_batches(), rank=0)[1:], numpy_truth(make_batches(), rank=1)[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_noise_on_cuda():
    seen = {}
    for device in ("cpu", "cuda"):
        metric = make_metric().to(device)
        seen[device] = []
        for inputs, target in make_batches():
            metric.update(
                lambda x, device=device: seen[device].append(x.cpu()) or x[:, :2], inputs.to(device), target.to(device)
            )
        assert metric.compute().device.type == device
    for on_cpu, on_cuda in zip(seen["cpu"], seen["cuda"], strict=True):
        torch.testing.assert_close(on_cpu, on_cuda, rtol=1e-6, atol=1e-6)  # a fused multiply-add rounds once


@pytest.mark.parametrize(
    ("noise_levels", "error", "message"),
    [
        ((), ValueError, "at least one noise level"),
        ((0.1, -0.1), ValueError, "finite and not negative"),
        ((float("nan"),), ValueError, "finite and not negative"),
        ((float("inf"),), ValueError, "finite and not negative"),
        ((0.1, 0.2, 0.1), ValueError, "distinct noise levels"),
        (0.2, TypeError, r"`noise_levels` to be a sequence of numbers, .* got 0\.2\."),
        ("0.2", TypeError, r"`noise_levels` to be a sequence of numbers, .* got '0\.2'\."),
    ],
)
def test_wrong_noise_levels(noise_levels, error, message):
    with pytest.raises(error, match=message):
        NoisyMeanAbsoluteError(noise_levels, 0.0, 1.0)
    with pytest.raises(error, match=message):
        noisy_mean_absolute_error(linear, torch.zeros(1, 3), torch.zeros(1, 2), noise_levels, 0.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (None, None, "no feature_min and no feature_max: .*feature_ranges learns them"),
        (0.0, None, "got no feature_max"),
        (None, 0.0, "got no feature_min"),
        ([0.0, 1.0], [1.0, 0.0], "feature_max >= feature_min .* less for 1 of them"),
        ([0.0, float("nan")], 1.0, "finite feature_min and feature_max"),
        (0.0, float("inf"), "finite feature_min and feature_max"),
        ([0.0, 0.0], [1.0, 1.0, 1.0], r"broadcast, got \(2,\) and \(3,\)"),
    ],
)
def test_wrong_feature_ranges(low, high, message):
    with pytest.raises(ValueError, match=message):
        NoisyMeanAbsoluteError((0.1,), low, high)
    with pytest.raises(ValueError, match=message):
        noisy_mean_absolute_error(linear, torch.zeros(1, 3), torch.zeros(1, 2), (0.1,), low, high)


def test_feature_ranges_missing_by_default():
    with pytest.raises(ValueError, match="no feature_min and no feature_max"):
        NoisyMeanAbsoluteError((0.1,))


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
def test_wrong_seed(seed):
    with pytest.raises(ValueError, match="integer of at least 0"):
        make_metric(seed=seed)


@pytest.mark.parametrize("shape", [(2,), (4, 3)])
def test_ranges_of_another_shape_than_the_features(shape):
    metric = make_metric(feature_min=torch.zeros(shape), feature_max=torch.ones(shape))
    with pytest.raises(ValueError, match=r"broadcast to the features' shape \(3,\), got \("):
        metric.update(linear, torch.zeros(5, 3), torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("predict", "target", "message"),
    [
        # (15, 1) - (5,) would broadcast silently to (3, 5, 5)
        (lambda x: x[:, :1], torch.zeros(5), r"shape \(15,\) .* got \(15, 1\)"),
        (lambda x: x[:, 0], torch.zeros(5, 1), r"shape \(15, 1\) .* got \(15,\)"),
        (lambda x: x[:5], torch.zeros(5, 3), r"shape \(15, 3\) .* got \(5, 3\)"),
        (lambda x: x.sum(), torch.zeros(5), r"shape \(15,\) .* got \(\)"),
        (linear, torch.zeros(4, 2), r"inputs of shape .* got \(5, 3\) and \(4, 2\)"),
        (linear, torch.tensor(0.0), r"inputs of shape .* got \(5, 3\) and \(\)"),
    ],
)
def test_wrong_shapes(predict, target, message):
    with pytest.raises(ValueError, match=message):
        make_metric().update(predict, torch.zeros(5, 3), target)


def test_scalar_inputs():
    with pytest.raises(ValueError, match=r"got \(\) and \(1,\)"):
        NoisyMeanAbsoluteError((0.0,), 0.0, 1.0).update(linear, torch.tensor(0.0), torch.zeros(1))


def test_predictions_that_are_no_tensor():
    with pytest.raises(TypeError, match=r"one tensor of shape \(15, 2\), got a tuple"):
        make_metric().update(lambda x: (x, x), torch.zeros(5, 3), torch.zeros(5, 2))


def test_integer_inputs():
    with pytest.raises(TypeError, match=r"floating-point inputs, got torch\.int64"):
        make_metric().update(linear, torch.zeros(5, 3, dtype=torch.int64), torch.zeros(5, 2))


def test_nan_inputs():
    inputs = torch.zeros(5, 3)
    inputs[3, 1] = torch.nan
    with pytest.raises(ValueError, match="inputs without NaN"):
        make_metric().update(linear, inputs, torch.zeros(5, 2))


def test_nan_predictions_are_reported_not_refused():
    metric = make_metric()
    metric.update(lambda x: linear(x) * torch.nan, torch.zeros(5, 3), torch.zeros(5, 2))
    assert metric.compute().isnan().all()


# torchmetrics warns, we raise.
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_compute_without_update():
    metric = make_metric()
    with pytest.raises(RuntimeError, match="call update"):
        metric.compute()
    update_all(metric, make_batches()).reset()
    with pytest.raises(RuntimeError, match="call update"):
        metric.compute()


def test_empty_batch():
    metric = make_metric()
    metric.update(linear, torch.zeros(0, 3), torch.zeros(0, 2))
    with pytest.raises(RuntimeError, match="no sample was seen"):
        metric.compute()
    with pytest.raises(RuntimeError, match="no sample was seen"):
        noisy_mean_absolute_error(linear, torch.zeros(0, 3), torch.zeros(0, 2), LEVELS, LOW, HIGH)


def test_feature_ranges_over_batches():
    batches = [inputs for inputs, _ in make_batches(4)]
    low, high = feature_ranges([*batches, torch.zeros(0, 3)])
    everything = torch.cat(batches).double()
    assert torch.equal(low, everything.min(dim=0).values)
    assert torch.equal(high, everything.max(dim=0).values)


def test_feature_ranges_of_integers_and_images():
    low, high = feature_ranges(iter([torch.arange(12, dtype=torch.uint8).view(2, 2, 3)]))
    assert low.dtype == torch.float64
    assert low.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert high.tolist() == [[6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no training inputs"),
        ([torch.zeros(0, 3)], ValueError, "no training inputs"),
        ([torch.zeros(1, 3), torch.tensor([[0.0, torch.nan, 0.0]])], ValueError, r"NaN or infinity \(batch 1\)"),
        ([torch.tensor([[0.0], [-torch.inf]])], ValueError, r"NaN or infinity \(batch 0\)"),
        ([torch.zeros(1, 3), torch.zeros(1, 1)], ValueError, r"shape \(3,\) .* got \(1,\) in batch 1"),
        ([[0.0, 1.0]], TypeError, "got a list"),
        ([torch.tensor(1.0)], TypeError, r"got a tensor of shape \(\)"),
    ],
)
def test_feature_ranges_refuse(batches, error, message):
    with pytest.raises(error, match=message):
        feature_ranges(batches)


def test_plot_of_one_value_has_noise_levels_on_its_axis(pyplot):
    metric = update_all(make_metric(), make_batches())
    for val in (None, metric.compute()):
        figure, ax = metric.plot(val)
        assert figure is not None
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.3", "0.1"]
        drawn = [float(line.get_ydata()[0]) for line in ax.lines]
        np.testing.assert_allclose(drawn, metric.compute().numpy())
        assert ax.get_xaxis().get_visible()
        assert ax.get_legend() is None


def test_plot_of_a_single_level_on_given_axes(pyplot):
    metric = NoisyMeanAbsoluteError((0.2,), 0.0, 1.0)
    metric.update(lambda x: x, torch.rand(3, 2), torch.rand(3, 2))
    _, given = pyplot.subplots()
    figure, ax = metric.plot(ax=given)
    assert figure is None
    assert ax is given
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.2"]


def test_plot_of_steps_has_one_line_a_level(pyplot):
    metric = make_metric()
    values = [metric(linear, inputs, target) for inputs, target in make_batches()]
    _, ax = metric.plot(values)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["eta=0", "eta=0.3", "eta=0.1"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [value[1] for value in values])


def test_doctests(pyplot):
    check_examples(NoisyMeanAbsoluteError, 11)
