"""Statistics over seeds: intervals, paired comparisons, Holm's correction, epochs to a level.

Pure functions of arrays with one value per seed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_lip.reporting.extras import extra

Values = Sequence[float] | npt.NDArray[np.float64]

Key = TypeVar("Key")

ALPHA = 0.05
"""The level of every test; intervals hold the mean with probability 1 - ALPHA."""

DIRECTIONS = ("lower", "higher")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with half the width of its 95% interval (Student's t over seeds)."""

    mean: float
    half_width: float

    def __format__(self, spec: str) -> str:
        """Format both numbers with `spec`, for instance `f"{interval:.2f}"`."""
        return f"{self.mean:{spec}} ± {self.half_width:{spec.removeprefix('+')}}"


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of a regime with a rival on an error (lower is better).

    Attributes:
        difference: The regime's error minus the rival's, over seeds.
        p_less: Wilcoxon's signed-rank test, one-sided: the regime's error is lower.
        p_two_sided: The same test, two-sided.
        share_won: The share of seeds on which the regime's error is lower; a tie counts one half.
        n_seeds: The number of pairs.
    """

    difference: Interval
    p_less: float
    p_two_sided: float
    share_won: float
    n_seeds: int


class Corrected(NamedTuple):
    """A paired comparison and its two-sided p-value after Holm's correction."""

    comparison: Comparison
    p_value: float

    @property
    def verdict(self) -> str:
        """A direction if the p-value is below the level, `"no difference shown"` otherwise, or `"identical"`."""
        difference = self.comparison.difference
        if difference.mean == 0 and difference.half_width == 0:
            return "identical"
        return DIRECTIONS[difference.mean > 0] if self.p_value < ALPHA else "no difference shown"


def interval(values: Values) -> Interval:
    """Return the mean and the 95% interval of one value per seed; for a single seed the half width is infinite."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, math.inf)
    return Interval(mean, _quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array)))


def wilcoxon(differences: Values, alternative: str) -> float:
    """Return the p-value of Wilcoxon's signed-rank test on paired differences; 1 where all are zero.

    Args:
        differences: One per seed; zeros are left out, as Wilcoxon did.
        alternative: `"less"`, `"greater"` or `"two-sided"`.
    """
    array = np.asarray(differences, dtype=np.float64)
    if not array.any():
        return 1.0
    with warnings.catch_warnings():
        # With ties scipy falls back on the normal approximation and says so.
        warnings.simplefilter("ignore")
        return float(extra("scipy.stats").wilcoxon(array, alternative=alternative).pvalue)


def sign_test(successes: int, n: int) -> float:
    """Return the one-sided binomial p-value for a success being more likely than not."""
    return float(extra("scipy.stats").binomtest(successes, n, 0.5, alternative="greater").pvalue)


def compare(errors: Values, rival: Values) -> Comparison:
    """Compare two regimes' errors, paired by seed."""
    differences = np.asarray(errors, dtype=np.float64) - np.asarray(rival, dtype=np.float64)
    return Comparison(
        difference=interval(differences),
        p_less=wilcoxon(differences, "less"),
        p_two_sided=wilcoxon(differences, "two-sided"),
        share_won=float(((differences < 0) + 0.5 * (differences == 0)).mean()),
        n_seeds=len(differences),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: comparing the result with a level keeps the family-wise error at it."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def corrected(compared: Mapping[Key, Comparison]) -> dict[Key, Corrected]:
    """Correct the two-sided p-values of a family of comparisons by Holm's method."""
    adjusted = holm([comparison.p_two_sided for comparison in compared.values()])
    return {key: Corrected(compared[key], p_value) for key, p_value in zip(compared, adjusted, strict=True)}


def in_words(verdicts: Iterable[tuple[str, str]], preposition: str) -> str:
    """Name what each verdict was found for, as in `"lower in eta 0, eta 0.2; no difference shown in train"`."""
    named: dict[str, list[str]] = {}
    for verdict, name in verdicts:
        named.setdefault(verdict, []).append(name)
    return "; ".join(f"{verdict} {preposition} {', '.join(names)}" for verdict, names in named.items())


def can_decide(n_seeds: int, n_tests: int) -> bool:
    """Whether a family of tests over `n_seeds` signs can reach the level at all.

    The smallest one-sided p-value of Wilcoxon's and of the sign test is 2^-n; Holm multiplies it by the
    number of tests.
    """
    return bool(n_tests * 0.5**n_seeds < ALPHA)


def low_level(first: Values, second: Values, slack: float = 0.05) -> float:
    """Return an error that both curves reach: `slack` (relative) above the larger of their least values."""
    return (1 + slack) * max(float(np.min(first)), float(np.min(second)))


def epochs_to(curve: Values, level: float) -> int:
    """Return the first epoch (from 1) whose value is at most `level`.

    Raises:
        ValueError: If the curve never gets there.
    """
    reached = np.flatnonzero(np.asarray(curve) <= level)
    if not len(reached):
        raise ValueError(f"The curve never reaches {level:g}: its lowest value is {float(np.min(curve)):g}.")
    return int(reached[0]) + 1


@lru_cache
def _quantile(degrees_of_freedom: int) -> float:
    # Cached because a figure asks once per epoch and regime.
    return float(extra("scipy.stats").t.ppf(1 - ALPHA / 2, degrees_of_freedom))
