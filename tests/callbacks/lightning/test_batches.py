"""What is taken from a batch as the model's input."""

import re

import pytest
import torch

from lightning_lip import LipschitzPenalty
from lightning_lip.callbacks.lightning.batches import input_of_batch

X, Y = torch.zeros(2, 4), torch.ones(2)


class Record:
    """A batch with keys that is no mapping."""

    def __getitem__(self, key):
        return {"x": X}[key]


@pytest.mark.parametrize(
    ("batch", "example_input"),
    [
        (X, "batch"),
        ((X, Y), "batch"),
        ([X], "batch"),
        ({"x": X, "y": Y}, "batch:x"),
        ((Y, X), "batch:1"),
        ([Y, X], "batch:-1"),
        (Record(), "batch:x"),
        ({"a:b": X}, "batch:a:b"),
    ],
)
def test_the_input(batch, example_input):
    (found,) = input_of_batch(batch, example_input)
    assert found is X


def test_several_tensors_together_are_one_argument():
    assert input_of_batch(({"a": X, "b": X}, Y), "batch") == ({"a": X, "b": X},)


@pytest.mark.parametrize(
    ("batch", "example_input", "holds"),
    [
        ({"x": X}, "batch", "a dict with the keys ['x']"),
        ({"x": X}, "batch:z", "a dict with the keys ['x']"),
        ((X, Y), "batch:2", "a tuple of 2 entries"),
        ((X, Y), "batch:x", "a tuple of 2 entries"),
        ((), "batch", "a tuple of 0 entries"),
        (None, "batch:0", "a NoneType"),
        (Record(), "batch", "a Record"),
    ],
)
def test_a_batch_without_it(batch, example_input, holds):
    message = f"example_input={example_input!r} finds no input in the first training batch, {holds}:"
    with pytest.raises(ValueError, match=re.escape(message)):
        input_of_batch(batch, example_input)


@pytest.mark.parametrize("wrong", ["", "batch:", "Batch", "batch[x]", "x"])
def test_other_text_is_refused(wrong):
    with pytest.raises(
        ValueError, match=r'`example_input` to be .*"batch" or "batch:<key>".*got ' + re.escape(repr(wrong))
    ):
        LipschitzPenalty(example_input=wrong)
