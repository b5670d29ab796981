"""Records of the regimes, made up: what their statistics say is known."""

import numpy as np

from lightning_lip.paper.regimes.settings import REGIMES, Record, Run
from lightning_lip.paper.settings import METRICS

FIRST_HEAVY, LAST_HEAVY = (3.0, 2.0, 2.0, 1.0), (2.0, 2.0, 3.0, 1.0)


def record(regime, seed, error, *, sigmas=FIRST_HEAVY, n_clipped=0, fast=True, epochs=8):
    """A record whose errors fall from 20 to `error`, in 2 epochs or only at the last but one."""
    curve = [20.0 if epoch < (2 if fast else epochs - 2) else error for epoch in range(epochs)]
    history = {name: list(curve) for name in (*METRICS, "train_mse")}
    return Record(Run(regime, seed, epochs=epochs), history, sigmas, 2.5, n_clipped)


def synthetic(errors, n_seeds=10, **changes):
    """A table with a mean error by regime; seeds differ by more than the regimes do, as splits do."""
    rng = np.random.default_rng(1)  # a draw in which equal regimes do not happen to differ
    by_seed = rng.normal(0, 1, n_seeds)
    table = {}
    for regime in REGIMES:
        noise = rng.normal(0, 0.02, n_seeds)
        table[regime] = [
            record(regime, seed, errors[regime] + by_seed[seed] + noise[seed], **changes.get(regime, {}))
            for seed in range(n_seeds)
        ]
    return table


EQUAL = dict.fromkeys(REGIMES, 5.0)


PRODUCT_BEST = EQUAL | {"product": 4.0}


PRODUCT_WORST = EQUAL | {"product": 6.0}


AS_CLAIMED = {"layer": {"sigmas": LAST_HEAVY, "fast": False}}
