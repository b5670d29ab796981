import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lip.bench.scoreboard.data import Part
from lightning_lip.bench.scoreboard.training import BATCH_SIZE, WARM_UP_STEPS, Budget, Training, train, warm_up

PART = Part(torch.randn(3 * BATCH_SIZE - 10, 4), torch.arange(3 * BATCH_SIZE - 10) % 3)


def recorded(calls, rate=0.1):
    network = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)

    def loss(logits, targets):
        calls.append(("loss", len(targets)))
        return F.cross_entropy(logits, targets)

    return Training(
        network,
        loss,
        [optimizer],
        after_backward=lambda: calls.append(("backward", float(network.weight.grad.norm()))),
        after_step=lambda: calls.append(("step", optimizer.param_groups[0]["lr"])),
        on_progress=lambda progress: calls.append(("progress", progress)),
        at_end=lambda: calls.append(("end", None)),
    )


def test_epochs_are_whole_and_the_rate_follows_a_cosine():
    calls = []
    training = recorded(calls)
    spent = train(training, PART, Budget(2, "epochs"), seed=0)
    assert spent.steps == 6
    assert [kind for kind, _ in calls] == ["progress", "loss", "backward", "step"] * 6 + ["end"]
    assert sorted(size for kind, size in calls if kind == "loss") == [BATCH_SIZE - 10] * 2 + [BATCH_SIZE] * 4
    rates = [0.05 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert [value for kind, value in calls if kind == "step"] == pytest.approx(rates)
    assert [value for kind, value in calls if kind == "progress"] == pytest.approx([k / 6 for k in range(6)])


def test_seconds_are_of_the_processor_and_not_of_the_wall():
    calls = []
    training = recorded(calls)
    training.after_step = lambda: time.sleep(0.005)
    start = time.monotonic()
    spent = train(training, PART, Budget(0.05, "seconds"), seed=0)
    # Sleep costs no processor time.
    assert time.monotonic() - start > 2 * spent.seconds > 0.1
    assert spent.steps > 5


def test_the_seed_orders_the_batches():
    def weights(seed):
        torch.manual_seed(0)
        training = recorded([])
        train(training, PART, Budget(1, "epochs"), seed)
        return training.network.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_warming_up_makes_a_few_steps():
    calls = []
    warm_up(recorded(calls), PART)
    assert [kind for kind, _ in calls].count("step") == WARM_UP_STEPS
    assert calls[-1] == ("end", None)


def test_a_budget_is_said_in_words():
    assert str(Budget(15, "seconds")) == "15 CPU seconds a training"
    assert str(Budget(40, "epochs")) == "40 epochs a training"
