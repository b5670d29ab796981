"""What the regimes and the budgets share: the training, the noise levels, and the names of the errors."""

from __future__ import annotations

NOISE_LEVELS = (0.0, 0.2, 0.4, 0.6)
EPOCHS = 200
BATCH_SIZE = 50

SCALINGS = ("raw", "minmax", "standardised")

REPORTED_SEED = 0
TUNING_SEED = 1000
"""The first seed of the tuning: larger than any that can be reported."""


def validation_key(noise_level: float) -> str:
    """Return the name of the validation MAE at a noise level."""
    return f"validation_mae/eta={noise_level:g}"


METRICS = ("train_mae", *(validation_key(level) for level in NOISE_LEVELS))
"""The errors that are reported."""


def rounded(value: float) -> float:
    """Round to the 6 significant digits of a results file."""
    return float(f"{value:.6g}")
