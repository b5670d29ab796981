"""The Boston housing and diabetes data, their split by seed, and the scaling of the inputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_lip.paper.regimes.settings import SCALINGS
from lightning_lip.reporting.extras import extra

Array = npt.NDArray[np.float64]

NOTE = (
    "Boston housing is used for this reproduction only: scikit-learn and Keras discourage the data set, "
    "because its column B encodes an assumption about race."
)
TRAIN_SHARE = 0.8


class DataError(ValueError):
    """The data set at hand is not the one that was asked for."""


class Dataset(NamedTuple):
    """Inputs (n, features) and target (n,), both float64."""

    inputs: Array
    target: Array


class Split(NamedTuple):
    """One seed's split: inputs (n, features) after scaling, targets (n,), ranges (features,) of training rows."""

    train_inputs: Array
    train_target: Array
    validation_inputs: Array
    validation_target: Array
    feature_min: Array
    feature_max: Array


def load_boston() -> Dataset:
    """Boston housing with all 13 columns, from mlxtend (offline); the target is in thousands of dollars.

    Raises:
        MissingExtraError: If mlxtend is not installed.
        DataError: If the data are not those of the paper.
    """
    inputs, target = extra("mlxtend.data").boston_housing_data()
    return checked(Dataset(np.asarray(inputs, dtype=np.float64), np.asarray(target, dtype=np.float64)))


def checked(data: Dataset) -> Dataset:
    """Return `data` if it has the known shape, mean target and number of capped targets.

    Raises:
        DataError: If it has not.
    """
    found = (data.inputs.shape, round(float(data.target.mean()), 4), int((data.target == 50.0).sum()))
    expected = ((506, 13), 22.5328, 16)
    if found != expected:
        raise DataError(
            f"Expected the Boston housing data: inputs of shape {expected[0]}, a mean target of {expected[1]} "
            f"and {expected[2]} targets equal to 50.0; got {found[0]}, {found[1]} and {found[2]}. "
            "Install another version of mlxtend."
        )
    return data


def load_diabetes() -> Dataset:
    """The diabetes data with their 10 columns in the units they were measured in, from scikit-learn (offline).

    The target is the progression of the disease one year after baseline, from 25 to 346. Source: B. Efron, T. Hastie,
    I. Johnstone, R. Tibshirani, "Least angle regression" (2004).

    Raises:
        MissingExtraError: If scikit-learn is not installed.
        DataError: If the data are not those of the source.
    """
    inputs, target = extra("sklearn.datasets").load_diabetes(return_X_y=True, scaled=False)
    data = Dataset(np.asarray(inputs, dtype=np.float64), np.asarray(target, dtype=np.float64))
    found = (data.inputs.shape, round(float(data.target.mean()), 4))
    expected = ((442, 10), 152.1335)
    if found != expected:
        raise DataError(
            f"Expected the diabetes data: inputs of shape {expected[0]} and a mean target of {expected[1]}; "
            f"got {found[0]} and {found[1]}. Install another version of scikit-learn."
        )
    return data


def split(data: Dataset, seed: int, scaling: str = "raw") -> Split:
    """Split the rows by seed, 4/5 for training, and scale the inputs by the training rows' statistics.

    Args:
        data: The data set.
        seed: Of the permutation of the rows.
        scaling: `"raw"` (unchanged), `"minmax"` (training rows in [0, 1]) or `"standardised"` (training
            rows of mean 0 and standard deviation 1). A constant column is left at 0.

    Raises:
        ValueError: If the scaling is unknown.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"Expected a scaling among {SCALINGS}, got {scaling!r}.")
    rows = np.random.default_rng(seed).permutation(len(data.target))
    n_train = int(TRAIN_SHARE * len(rows))
    train, validation = rows[:n_train], rows[n_train:]
    inputs = data.inputs
    if scaling == "minmax":
        low = inputs[train].min(axis=0)
        inputs = (inputs - low) / _nonzero(inputs[train].max(axis=0) - low)
    elif scaling == "standardised":
        inputs = (inputs - inputs[train].mean(axis=0)) / _nonzero(inputs[train].std(axis=0))
    return Split(
        inputs[train],
        data.target[train],
        inputs[validation],
        data.target[validation],
        inputs[train].min(axis=0),
        inputs[train].max(axis=0),
    )


def _nonzero(scale: Array) -> Array:
    return np.where(scale > 0, scale, 1.0)
