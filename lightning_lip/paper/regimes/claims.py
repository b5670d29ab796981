"""The paper's four claims, each with a test over seeds, and whether it holds in a run.

The paper claims, and this module tests:

(a) The product penalty has the best training MAE: its MAE at the last epoch is lower than every other
    regime's, one-sided Wilcoxon over seeds, all p < .05 after Holm over the 3 rivals.
(b) It has the best validation MAE at every eta: the same for 3 rivals x 4 noise levels, Holm over all 12.
(c) At eta = .6 it reaches a low MAE twice as fast as the layer penalty: the median over seeds of
    (epochs of the layer penalty) / (epochs of the product penalty) is at least 2, and the product penalty
    needs fewer epochs, one-sided Wilcoxon p < .05. The low MAE of a seed is 5% above the worse of the two
    regimes' best values over the epochs, so that both reach it.
(d) The layer penalty puts its mass in the last hidden layer, all others in the first: in each regime the
    largest of the three hidden spectral norms is at the claimed layer in most initialisations, one-sided
    sign test over seeds, all p < .05 after Holm over the 4 regimes.

A claim whose test is passed *holds*. Where the seeds are too few for the test to pass whatever the outcome,
and the averages go the claimed way, the claim is *undecided*. Otherwise it *does not hold*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_lip.paper.regimes.settings import LABELS, REGIMES, Table, finals
from lightning_lip.paper.settings import METRICS, NOISE_LEVELS, validation_key
from lightning_lip.paper.statistics import (
    ALPHA,
    Comparison,
    can_decide,
    compare,
    epochs_to,
    holm,
    low_level,
    sign_test,
    wilcoxon,
)

HOLDS = "holds"
DOES_NOT_HOLD = "does not hold"
UNDECIDED = "undecided"

SPEED_UP = 2.0
CLAIMED_LAYER = {"none": 0, "layer": 2, "product": 0, "maxnorm": 0}
RIVALS = tuple(regime for regime in REGIMES if regime != "product")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and its outcome.

    Attributes:
        letter: `"a"` to `"d"`.
        statement: What the paper claims.
        verdict: `"holds"`, `"does not hold"` or `"undecided"`.
        test: What was tested.
        figures: The numbers behind the verdict, in one sentence.
        p_values: By part of the claim, after Holm's correction.
    """

    letter: str
    statement: str
    verdict: str
    test: str
    figures: str
    p_values: dict[str, float]


def comparisons(table: Table) -> dict[str, dict[str, Comparison]]:
    """Compare the product penalty with every rival, by metric and rival."""
    return {
        metric: {rival: compare(finals(table, "product", metric), finals(table, rival, metric)) for rival in RIVALS}
        for metric in METRICS
    }


def epochs_ratios(table: Table) -> list[float]:
    """Return, by seed, the layer penalty's epochs to a low MAE at the largest eta over the product penalty's."""
    key = validation_key(NOISE_LEVELS[-1])
    ratios = []
    for layer, product in zip(table["layer"], table["product"], strict=True):
        level = low_level(layer.history[key], product.history[key])
        ratios.append(epochs_to(layer.history[key], level) / epochs_to(product.history[key], level))
    return ratios


def judge(table: Table) -> list[Claim]:
    """Test the four claims on one setting's records."""
    compared = comparisons(table)
    validation = {
        f"{LABELS[rival]}, eta {level:g}": comparison
        for level in NOISE_LEVELS
        for rival, comparison in compared[validation_key(level)].items()
    }
    training = {LABELS[rival]: comparison for rival, comparison in compared["train_mae"].items()}
    return [
        _best("a", "the product penalty has the best training MAE", training),
        _best("b", "the product penalty has the best validation MAE at every eta", validation),
        _speed(table),
        _mass(table),
    ]


def _best(letter: str, statement: str, parts: dict[str, Comparison]) -> Claim:
    adjusted = holm([part.p_less for part in parts.values()])
    n_seeds = next(iter(parts.values())).n_seeds
    n_passed = sum(p < ALPHA for p in adjusted)
    worst_name, worst = max(parts.items(), key=lambda item: item[1].p_less)
    return Claim(
        letter,
        statement,
        _verdict(
            n_passed == len(parts),
            can_decide(n_seeds, len(parts)),
            all(part.difference.mean < 0 for part in parts.values()),
        ),
        f"MAE lower than each rival's, one-sided Wilcoxon over {n_seeds} seeds, p < {ALPHA:g} after Holm over "
        f"{len(parts)} comparisons",
        f"{n_passed} of {len(parts)} comparisons passed; weakest against {worst_name}: difference "
        f"{worst.difference:+.3f}, won on {worst.share_won:.0%} of seeds, p = {max(adjusted):.2g}",
        dict(zip(parts, adjusted, strict=True)),
    )


def _speed(table: Table) -> Claim:
    ratios = epochs_ratios(table)
    median = float(np.median(ratios))
    p_value = wilcoxon(np.log(ratios), "greater")
    return Claim(
        "c",
        f"at eta {NOISE_LEVELS[-1]:g} the product penalty reaches a low MAE twice as fast as the layer penalty",
        _verdict(median >= SPEED_UP and p_value < ALPHA, can_decide(len(ratios), 1), median >= SPEED_UP),
        f"median ratio of epochs at least {SPEED_UP:g}, and fewer epochs, one-sided Wilcoxon over {len(ratios)} "
        f"seeds, p < {ALPHA:g}",
        f"epochs of the layer penalty / epochs of the product penalty: median {median:.2f}, from "
        f"{min(ratios):.2f} to {max(ratios):.2f}, p = {p_value:.2g}",
        {"fewer epochs": p_value},
    )


def _mass(table: Table) -> Claim:
    n_seeds = len(table["product"])
    counts = {
        regime: sum(_heaviest(record.sigmas) == CLAIMED_LAYER[regime] for record in table[regime]) for regime in REGIMES
    }
    adjusted = holm([sign_test(count, n_seeds) for count in counts.values()])
    shares = "; ".join(
        f"{LABELS[regime]}: W{CLAIMED_LAYER[regime] + 1} on {count} of {n_seeds}" for regime, count in counts.items()
    )
    return Claim(
        "d",
        "the layer penalty puts its mass in the last hidden layer, all others in the first",
        _verdict(
            all(p < ALPHA for p in adjusted),
            can_decide(n_seeds, len(counts)),
            all(2 * count > n_seeds for count in counts.values()),
        ),
        f"largest hidden norm at the claimed layer in most seeds, one-sided sign test over {n_seeds} seeds, "
        f"p < {ALPHA:g} after Holm over {len(counts)} regimes",
        f"largest hidden norm as claimed: {shares}",
        {LABELS[regime]: p for regime, p in zip(counts, adjusted, strict=True)},
    )


def _verdict(passed: bool, decidable: bool, as_claimed_on_average: bool) -> str:
    if passed:
        return HOLDS
    return UNDECIDED if as_claimed_on_average and not decidable else DOES_NOT_HOLD


def _heaviest(sigmas: Sequence[float]) -> int:
    return int(np.argmax(sigmas[:3]))
