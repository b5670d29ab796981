"""The paper's network."""

import torch

from lightning_lip.paper import PaperRegressor


def test_the_network_starts_from_its_seed_alone():
    state = torch.get_rng_state()
    model, again = PaperRegressor(seed=1), PaperRegressor(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(20, 13), (20, 20), (20, 20), (1, 20)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.net[0].weight, PaperRegressor(seed=2).net[0].weight)
    assert model(torch.zeros(5, 13)).shape == (5, 1)
