"""Data sets, splits and scalings."""

import numpy as np
import pytest

from lightning_lip.errors import DataError
from lightning_lip.paper.data import Dataset, load_boston, load_diabetes, split
from lightning_lip.paper.settings import SCALINGS


@pytest.fixture(scope="module")
def boston():
    return load_boston()


def test_boston_is_the_paper_s(boston):
    assert boston.inputs.shape == (506, 13)
    assert boston.target.shape == (506,)
    assert boston.inputs[:, 11].max() == pytest.approx(396.9)  # column B is there


def test_diabetes_is_in_its_own_units():
    inputs, target = load_diabetes()
    assert inputs.shape == (442, 10)
    assert (inputs[:, 0].min(), inputs[:, 0].max()) == (19, 79)  # years of age, not scaled
    assert (target.min(), target.max()) == (25, 346)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda d: (d.inputs[:, :12], d.target),
        lambda d: (d.inputs, d.target + 1),
        lambda d: (d.inputs, np.where(np.arange(506) == d.target.argmax(), 50.01, d.target)),
    ],
)
def test_other_data_are_refused(boston, wrong, monkeypatch):
    monkeypatch.setattr("mlxtend.data.boston_housing_data", lambda: wrong(boston))
    with pytest.raises(DataError, match=r"\(506, 13\).*22.5328.*16 targets equal to 50.0"):
        load_boston()
    monkeypatch.setattr("sklearn.datasets.load_diabetes", lambda **kwargs: (np.zeros((442, 10)), np.zeros(442)))
    with pytest.raises(DataError, match=r"\(442, 10\).*152\.1335.*got .* 0\.0"):
        load_diabetes()


def test_split_is_by_seed_and_covers_every_row_once(boston):
    first, again, other = split(boston, 3), split(boston, 3), split(boston, 4)
    assert (len(first.train_target), len(first.validation_target)) == (404, 102)
    assert np.array_equal(first.train_inputs, again.train_inputs)
    assert not np.array_equal(first.train_inputs, other.train_inputs)
    rows = np.column_stack([boston.inputs, boston.target])
    parts = np.vstack(
        [
            np.column_stack([first.train_inputs, first.train_target]),
            np.column_stack([first.validation_inputs, first.validation_target]),
        ]
    )
    assert np.array_equal(rows[np.lexsort(rows.T)], parts[np.lexsort(parts.T)])


def test_scaling_uses_the_training_rows_only(boston):
    raw, minmax, standardised = (split(boston, 0, scaling) for scaling in SCALINGS)
    assert np.array_equal(raw.feature_max, raw.train_inputs.max(axis=0))
    assert (minmax.feature_min, minmax.feature_max) == (pytest.approx(0), pytest.approx(1))
    spread = raw.feature_max - raw.feature_min
    assert minmax.validation_inputs == pytest.approx((raw.validation_inputs - raw.feature_min) / spread)
    assert standardised.train_inputs.mean(axis=0) == pytest.approx(0, abs=1e-10)
    assert standardised.train_inputs.std(axis=0) == pytest.approx(1)
    assert np.array_equal(raw.train_target, standardised.train_target)


@pytest.mark.parametrize("scaling", ["minmax", "standardised"])
def test_a_constant_column_scales_to_zero(scaling):
    data = Dataset(np.column_stack([np.full(20, 7.0), np.arange(20.0)]), np.arange(20.0))
    parts = split(data, 0, scaling)
    assert not parts.train_inputs[:, 0].any()
    assert np.isfinite(parts.validation_inputs).all()


def test_an_unknown_scaling_is_refused(boston):
    with pytest.raises(ValueError, match=r"among .*'raw'.*got 'log'"):
        split(boston, 0, "log")
