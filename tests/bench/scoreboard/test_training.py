import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lip.bench.scoreboard.data import Part
from lightning_lip.bench.scoreboard.training import BATCH_SIZE, Budget, Training, step_times, train

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


def test_the_rate_follows_a_cosine_over_whole_epochs():
    calls = []
    train(recorded(calls), PART, 6, seed=0)
    assert [kind for kind, _ in calls] == ["progress", "loss", "backward", "step"] * 6 + ["end"]
    assert sorted(size for kind, size in calls if kind == "loss") == [BATCH_SIZE - 10] * 2 + [BATCH_SIZE] * 4
    rates = [0.05 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert [value for kind, value in calls if kind == "step"] == pytest.approx(rates)
    assert [value for kind, value in calls if kind == "progress"] == pytest.approx([k / 6 for k in range(6)])


def test_a_step_is_timed_by_the_processor_in_its_fastest_round():
    slept, busy = recorded([]), recorded([])
    slept.after_step = lambda: time.sleep(0.002)

    def work():
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    busy.after_step = work
    of_sleep, of_work = step_times([slept, busy], PART)
    # Sleep costs no processor time.
    assert 0 < of_sleep < 2 <= of_work


def test_a_budget_is_so_many_steps():
    assert Budget(10, "seconds").steps(step_ms=2.5, n_samples=1) == 4000
    assert Budget(1e-9, "seconds").steps(step_ms=2.5, n_samples=1) == 1
    assert Budget(2, "epochs").steps(step_ms=2.5, n_samples=2 * BATCH_SIZE + 1) == 6


def test_the_seed_orders_the_batches():
    def weights(seed):
        torch.manual_seed(0)
        training = recorded([])
        train(training, PART, 3, seed)
        return training.network.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_budget_is_said_in_words():
    assert str(Budget(15, "seconds")) == "15 CPU seconds a training"
    assert str(Budget(40, "epochs")) == "40 epochs a training"
