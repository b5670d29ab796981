"""Steps of optimisers: of some, or of all where one is not torch's."""

import torch

from lightning_lip.models.optimizer_steps import last_step, optimizer_steps


def test_only_the_steps_of_these_optimisers_count():
    mine, other = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0) for _ in range(2))
    mine.step()
    after = optimizer_steps()
    other.step()
    assert last_step([mine]) == after == optimizer_steps() - 1
    assert last_step([mine, other]) == optimizer_steps()
    # A wrapper around an optimiser of torch is not seen to step itself.
    assert last_step([object()]) == optimizer_steps()
