"""The Boston housing and diabetes data, their split by seed, the scaling of the inputs, and batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_lip.errors import DataError
from lightning_lip.paper.settings import BATCH_SIZE, SCALINGS
from lightning_lip.reporting.extras import extra

Array = npt.NDArray[np.float64]

NOTE = (
    "Boston housing is used for this reproduction only: scikit-learn and Keras discourage the data set, "
    "because its column B encodes an assumption about race."
)
SOURCES = {"boston": "mlxtend.data.boston_housing_data", "diabetes": "sklearn.datasets.load_diabetes"}
UNITS = {"boston": "thousand dollars", "diabetes": "progression points"}
"""The units of the targets, and so of every MAE."""

TRAIN_SHARE = 0.8


class Dataset(NamedTuple):
    """Inputs (n, features) and target (n,), both float64."""

    inputs: Array
    target: Array


class Split(NamedTuple):
    """One seed's split: scaled inputs (n, features), targets (n,), ranges (features,) of the training inputs."""

    train_inputs: Array
    train_target: Array
    validation_inputs: Array
    validation_target: Array
    feature_min: Array
    feature_max: Array


def load_boston() -> Dataset:
    """Load Boston housing with all 13 columns from mlxtend (offline); the target is in thousands of dollars.

    Raises:
        MissingExtraError: If mlxtend is not installed.
        DataError: If the data are not those of the paper.
    """
    inputs, target = extra("mlxtend.data").boston_housing_data()
    return checked(inputs, target, "Boston housing", (506, 13), 22.5328, (16, 50.0))


def load_diabetes() -> Dataset:
    """Load the diabetes data with their 10 columns in the units they were measured in from scikit-learn (offline).

    The target is the progression of the disease one year after baseline, from 25 to 346. Source: B. Efron, T. Hastie,
    I. Johnstone, R. Tibshirani, "Least angle regression" (2004).

    Raises:
        MissingExtraError: If scikit-learn is not installed.
        DataError: If the data are not those of the source.
    """
    inputs, target = extra("sklearn.datasets").load_diabetes(return_X_y=True, scaled=False)
    return checked(inputs, target, "diabetes", (442, 10), 152.1335, (1, 346.0))


LOADERS = {"boston": load_boston, "diabetes": load_diabetes}


def checked(
    inputs: npt.ArrayLike,
    target: npt.ArrayLike,
    name: str,
    shape: tuple[int, int],
    mean: float,
    largest: tuple[int, float],
) -> Dataset:
    """Return a data set if it is the known one.

    Args:
        inputs: The inputs.
        target: The target.
        name: The data set's name, for the message.
        shape: The shape of the known inputs.
        mean: The mean of the known target, to 4 decimals.
        largest: How many of the known targets are the largest, and its value.

    Raises:
        DataError: If shape, mean or largest targets differ.
    """
    data = Dataset(np.asarray(inputs, dtype=np.float64), np.asarray(target, dtype=np.float64))
    top = float(data.target.max())
    found = (data.inputs.shape, round(float(data.target.mean()), 4), (int((data.target == top).sum()), top))
    if found != (shape, mean, largest):
        raise DataError(
            f"Expected the {name} data: inputs of shape {shape}, a mean target of {mean} and {largest[0]} targets "
            f"equal to {largest[1]}; got {found[0]}, {found[1]} and {found[2][0]} of {top:g}. "
            "Install another version of mlxtend or scikit-learn."
        )
    return data


def tensor(array: Array) -> Tensor:
    """Return an array as a float32 tensor."""
    return torch.as_tensor(array, dtype=torch.float32)


def batches(n_rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Draw an epoch's batches: row numbers in random order, `BATCH_SIZE` at a time."""
    return torch.split(torch.randperm(n_rows, generator=generator), BATCH_SIZE)


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
