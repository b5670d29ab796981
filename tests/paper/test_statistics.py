"""Statistics over seeds, against values known in closed form."""

import math

import pytest

from lightning_lip.paper.statistics import (
    Comparison,
    Corrected,
    Interval,
    can_decide,
    compare,
    corrected,
    epochs_to,
    holm,
    in_words,
    interval,
    low_level,
    sign_test,
    wilcoxon,
)


def test_interval_is_student_s():
    # Quantile of t with 4 degrees of freedom: 2.7764; standard deviation of 1..5: 1.5811.
    result = interval([1, 2, 3, 4, 5])
    assert (result.mean, result.half_width) == (3, pytest.approx(2.7764 * 1.5811 / 5**0.5, rel=1e-4))
    assert interval([2.0]) == Interval(2.0, math.inf)
    assert f"{Interval(1.234, 0.567):+.1f}" == "+1.2 ± 0.6"


def test_wilcoxon_is_exact_for_few_seeds():
    assert wilcoxon([-1, -2, -3, -4, -5], "less") == pytest.approx(1 / 32)
    assert wilcoxon([-1, -2, -3, -4, -5], "greater") == pytest.approx(1)
    assert wilcoxon([1, 2, 3, 4, 5], "two-sided") == pytest.approx(2 / 32)
    assert wilcoxon([0, 0, 0], "less") == 1


def test_holm_steps_down_and_stays_monotone():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_compare_is_paired_and_halves_ties():
    # Paired, the difference is -1 with little spread, although the seeds spread over 100.
    comparison = compare([0, 10.1, 99.9, 7], [1, 11, 101, 7])
    assert comparison.difference.mean == pytest.approx(-0.75)
    assert comparison.share_won == pytest.approx(3.5 / 4)
    assert comparison.n_seeds == 4
    assert comparison.p_less < comparison.p_two_sided


def test_sign_test_and_the_fewest_seeds():
    assert sign_test(5, 5) == pytest.approx(1 / 32)
    assert sign_test(0, 5) == 1
    assert (can_decide(4, 1), can_decide(5, 1), can_decide(7, 12), can_decide(8, 12)) == (False, True, False, True)


def test_epochs_to_a_level_that_both_curves_reach():
    fast, slow = [9, 4, 4, 3.9, 4.2], [9, 8, 7, 6, 5]
    level = low_level(fast, slow)
    assert level == pytest.approx(5.25)
    assert (epochs_to(fast, level), epochs_to(slow, level)) == (2, 5)
    with pytest.raises(ValueError, match=r"never reaches 1: its lowest value is 5"):
        epochs_to(slow, 1)


@pytest.mark.parametrize(
    ("difference", "p_value", "words"),
    [(-1.0, 0.04, "lower"), (1.0, 0.04, "higher"), (-1.0, 0.05, "no difference shown"), (0.0, 0.01, "identical")],
)
def test_difference_in_words(difference, p_value, words):
    comparison = Comparison(Interval(difference, abs(difference)), 0.5, 0.5, 0.5, 10)
    assert Corrected(comparison, p_value).verdict == words


def test_a_family_is_corrected_and_put_into_words():
    fewer = [9, 8.5, 9.1, 8, 8.8, 9.3, 8.9, 9.2, 8.6, 9.4]
    found = corrected({"eta 0": compare(fewer, [10.0] * 10), "eta 0.6": compare(fewer, fewer)})
    assert [t.p_value for t in found.values()] == pytest.approx([2 * 2 / 2**10, 1])
    assert in_words(((t.verdict, name) for name, t in found.items()), "at") == "lower at eta 0; identical at eta 0.6"
