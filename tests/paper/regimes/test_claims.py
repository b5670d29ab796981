"""The paper's claims on records that fulfil them or do not."""

import pytest
from support.records import AS_CLAIMED, EQUAL, LAST_HEAVY, PRODUCT_BEST, PRODUCT_WORST, synthetic

from lightning_lip.paper.regimes import claims
from lightning_lip.paper.settings import validation_key


def verdicts(table):
    return {claim.letter: claim.verdict for claim in claims.judge(table)}


def test_all_claims_hold_where_the_records_say_so():
    assert verdicts(synthetic(PRODUCT_BEST, **AS_CLAIMED)) == dict.fromkeys("abcd", claims.HOLDS)


@pytest.mark.parametrize("errors", [EQUAL, PRODUCT_WORST])
def test_no_claim_holds_where_the_records_say_the_opposite(errors):
    table = synthetic(errors, product={"fast": False}, none={"sigmas": LAST_HEAVY})
    assert verdicts(table) == dict.fromkeys("abcd", claims.DOES_NOT_HOLD)


def test_few_seeds_leave_a_claim_undecided_unless_the_averages_contradict_it():
    assert verdicts(synthetic(PRODUCT_BEST, 3, **AS_CLAIMED)) == dict.fromkeys("abcd", claims.UNDECIDED)
    table = synthetic(PRODUCT_WORST, 3, product={"fast": False}, none={"sigmas": LAST_HEAVY})
    assert verdicts(table) == dict.fromkeys("abcd", claims.DOES_NOT_HOLD)


def test_best_means_better_than_every_rival():
    # Better than two rivals, as good as the third.
    assert verdicts(synthetic(PRODUCT_BEST | {"layer": 4.0}))["a"] == claims.DOES_NOT_HOLD


def test_best_at_every_eta_fails_with_one_eta():
    table = synthetic(PRODUCT_BEST)
    for row in table["product"]:
        row.history[validation_key(0.4)][-1] += 3
    assert verdicts(table)["a"] == claims.HOLDS
    assert verdicts(table)["b"] == claims.DOES_NOT_HOLD


def test_twice_as_fast_needs_twice():
    # 3 epochs against 5: surely faster, and not twice as fast.
    table = synthetic(EQUAL, layer={"fast": False, "epochs": 6}, product={"epochs": 6})
    (claim,) = (claim for claim in claims.judge(table) if claim.letter == "c")
    assert claims.epochs_ratios(table) == pytest.approx([5 / 3] * 10)
    assert claim.p_values["fewer epochs"] < 0.05
    assert claim.verdict == claims.DOES_NOT_HOLD
