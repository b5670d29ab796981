"""What holds for the metric of noise and for that of certified accuracy: states, copies, ranks, plots, examples."""

import numpy as np
import pytest
import torch
import torchmetrics
from support import certified, noisy
from support.metrics import check_examples, copies, on_two_ranks

pytestmark = pytest.mark.parametrize("kind", [noisy, certified], ids=["noisy", "certified"])


def check(value, truth):
    np.testing.assert_allclose(value.numpy(), truth, rtol=2e-6)


def of_all(parts, truths):
    """Return the truth over several lists of batches from those of each."""
    return np.average(truths, axis=0, weights=[sum(len(target) for _, target in batches) for batches in parts])


@copies
@pytest.mark.parametrize("n_before", [0, 1])
def test_copies_go_on_as_the_metric_does(kind, copy_of, n_before):
    batches = kind.make_batches()
    metric = kind.update_all(kind.make_metric(), batches[:n_before])
    for each in (metric, copy_of(metric)):
        check(kind.update_all(each, batches[n_before:]).compute(), kind.true_values(batches))


def test_update_in_inference_mode_forward_and_update_mix(kind):
    batches = kind.make_batches()
    metric = kind.make_metric()
    with torch.inference_mode():
        check(metric(*kind.arguments(batches[0])), kind.true_values(batches[:1]))
    kind.update_all(metric, batches[1:2])
    metric(*kind.arguments(batches[2]))
    check(metric.compute(), kind.true_values(batches))


@pytest.mark.skipif(not hasattr(torchmetrics.Metric, "merge_state"), reason="torchmetrics before 1.5")
def test_merge_state(kind):
    batches = kind.make_batches(4)
    first, second = (kind.update_all(kind.make_metric(), part) for part in (batches[:2], batches[2:]))
    first.merge_state(second)
    parts = batches[:2], batches[2:]  # each with noise from the seed on
    check(first.compute(), of_all(parts, [kind.true_values(part) for part in parts]))


# A rank without a batch is warned by torchmetrics.
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_ranks(kind, tmp_path):
    of_rank = [kind.make_batches(n_batches=2 + rank, seed=rank) for rank in range(2)]

    def work(metric, rank):
        # The ranks hold different numbers of samples; the second epoch gives a rank no batch at all.
        epochs = []
        for batches in (of_rank[rank], of_rank[1] if rank == 0 else []):
            epochs.append(kind.update_all(metric, batches).compute())
            assert torch.equal(metric.compute(), epochs[-1])  # unsynced and synced again
            metric.reset()
        return torch.stack(epochs)

    values = on_two_ranks(kind.make_metric, work, tmp_path)
    assert torch.equal(*values)
    own_noise = [{"rank": rank} if kind is noisy else {} for rank in range(2)]
    truths = [kind.true_values(batches, **own) for batches, own in zip(of_rank, own_noise, strict=True)]
    check(values[0][0], of_all(of_rank, truths))
    check(values[0][1], kind.true_values(of_rank[1]))


# torchmetrics warns, we raise.
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_compute_without_update(kind):
    metric = kind.make_metric()
    with pytest.raises(RuntimeError, match=r"no sample was seen.*call update"):
        metric.compute()
    kind.update_all(metric, kind.make_batches()).reset()
    with pytest.raises(RuntimeError, match=r"no sample was seen.*call update"):
        metric.compute()


def test_plot(kind, pyplot):
    batches = kind.make_batches()
    metric = kind.update_all(kind.make_metric(), batches)
    for val in (None, metric.compute()):
        figure, ax = metric.plot(val)
        assert figure is not None
        assert [label.get_text() for label in ax.get_xticklabels()] == [f"{level:g}" for level in kind.LEVELS]
        np.testing.assert_allclose([float(line.get_ydata()[0]) for line in ax.lines], metric.compute().numpy())
        assert ax.get_xaxis().get_visible()
        assert ax.get_legend() is None
    steps = [metric(*kind.arguments(batch)) for batch in batches]
    _, ax = metric.plot(steps)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [f"{kind.SYMBOL}={x:g}" for x in kind.LEVELS]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [step[1] for step in steps])


def test_plot_of_a_single_level_on_given_axes(kind, pyplot):
    metric = kind.update_all(kind.make_metric(levels=[0.2]), kind.make_batches())
    _, given = pyplot.subplots()
    figure, ax = metric.plot(ax=given)
    assert figure is None
    assert ax is given
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.2"]


def test_examples_in_the_docstrings(kind, pyplot):
    check_examples(type(kind.make_metric()), 11)
