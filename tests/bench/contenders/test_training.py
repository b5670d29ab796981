import pytest
import torch
from lightning.pytorch import Callback
from support.contenders import CPU, SMALL_MLP, peer_named

from lightning_lip.bench.contenders import peers
from lightning_lip.bench.contenders.training import fit


class Counter(Callback):
    def __init__(self):
        self.n_steps = 0

    def on_train_batch_end(self, *_):
        self.n_steps += 1


@pytest.mark.parametrize(("n_before", "n_steps"), [(0, 1), (1, 1), (2, 5)])
def test_a_fit_makes_the_steps_asked_for_and_times_them(n_before, n_steps):
    task, batch = peers.task_of(SMALL_MLP, CPU)
    contender = peer_named("penalty_r8").prepare(task)
    counter = Counter()
    seconds, own = fit(contender.training, [*contender.callbacks, counter], batch, n_before, n_steps)
    assert counter.n_steps == n_before + n_steps
    assert 0 < own < seconds


def test_fits_of_one_module_are_one_training():
    task, batch = peers.task_of(SMALL_MLP, CPU)
    parts, whole = peers.plain(task).training, peers.plain(task).training
    for _ in range(3):
        assert fit(parts, [], batch, 1, 1)[1] is None
    fit(whole, [], batch, 1, 5)
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), whole.parameters(), strict=True))
