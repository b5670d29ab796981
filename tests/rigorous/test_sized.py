"""Certified norms of convolutions on small images, against dense matrices."""

import pytest
import torch
from torch import nn

from lightning_lip.operators.convolutions.convolution import ConvolutionOperator
from lightning_lip.rigorous import certified_convolution_norm, certified_norm
from lightning_lip.rigorous import sized as module_under_test
from lightning_lip.rigorous.sized import LARGEST_SIDE, sized_axis, sized_norm


def dense_norm(module: nn.Module, *shape: int) -> float:
    size = torch.Size(shape).numel()
    with torch.no_grad():
        matrix = module(torch.eye(size, dtype=torch.float64).view(-1, *shape)).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2))


def convolution(*arguments: object, **settings: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*arguments, bias=False, dtype=torch.float64, **settings)


@pytest.mark.parametrize(("size", "looseness"), [(1, 2.5), (2, 1.35), (4, 1.08)])
def test_a_small_image_is_settled_where_the_grid_is_loose(size: int, looseness: float) -> None:
    module = convolution(16, 16, 3, padding=1)
    truth = dense_norm(module, 16, size, size)
    bound = certified_norm(ConvolutionOperator("c", module, (16, size, size)))
    assert truth <= bound <= truth * (1 + 1e-6)
    assert certified_convolution_norm(module.weight, padding=1) > looseness * truth


@pytest.mark.parametrize("groups", [1, 4, 24])
def test_groups_are_taken_one_by_one(groups: int) -> None:
    # 24 groups of 144 rows: too large to be estimated by decomposition, and many.
    module = convolution(24, 24, 3, padding=1, groups=groups)
    truth = dense_norm(module, 24, 12, 12) if groups > 1 else None
    bound = certified_norm(ConvolutionOperator("c", module, (24, 12, 12)))
    if truth is None:
        rough = certified_convolution_norm(module.weight, padding=1)
        assert 0.9 * rough < bound < rough
    else:
        assert truth <= bound <= truth * (1 + 1e-3)


def test_the_largest_side_decides() -> None:
    kernel = torch.randn(1, 2, 2, 3, dtype=torch.float64)
    # 2 channels: sides of 2 and 4 rows a place.
    for size, is_settled in ((LARGEST_SIDE // 2, True), (LARGEST_SIDE // 2 + 1, False)):
        axis = sized_axis(3, 1, 1, (1, 1), size, "zeros", False, None)
        norm = sized_norm(kernel / kernel.abs().max(), [axis])
        assert (norm is not None) == is_settled


def test_what_needs_large_tables_is_left_to_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch.ones(1, 2, 2, 3, dtype=torch.float64)
    axis = sized_axis(3, 1, 1, (1, 1), 5, "zeros", False, None)
    assert sized_norm(kernel, [axis]) is not None
    # 36 pairs of taps and rows, then 25 places for 9 pairs of taps.
    monkeypatch.setattr(module_under_test, "LARGEST_TABLE", 99)
    assert sized_norm(kernel, [axis]) is None


def test_a_kernel_that_reads_only_padding_is_zero() -> None:
    # Taps at -2 and 2 of a single place.
    module = nn.Conv1d(1, 1, 2, padding=2, dilation=4, bias=False, dtype=torch.float64)
    assert dense_norm(module, 1, 1) == 0
    assert certified_norm(ConvolutionOperator("c", module, (1, 1))) == 0


def test_an_output_padding_that_is_not_told_counts() -> None:
    torch.manual_seed(0)
    settings = {"stride": 2, "padding": 1}
    norms = []
    for output_padding in (0, 1):
        module = nn.ConvTranspose1d(1, 1, 3, output_padding=output_padding, bias=False, **settings).double()
        with torch.no_grad():
            module.weight.copy_(torch.tensor([[[1.0, 2.0, 5.0]]]))
        norms.append(dense_norm(module, 1, 1))
        told = certified_norm(ConvolutionOperator("c", module, (1, 1)))
        assert told == pytest.approx(norms[-1], rel=1e-6)
    untold = certified_convolution_norm(module.weight, transposed=True, spatial=[1], **settings)
    assert norms[0] < norms[1] == pytest.approx(untold, rel=1e-6)


def test_the_bound_holds_beside_large_cancellation() -> None:
    # Rows that nearly cancel against each other: the Gram matrix has rounding errors of its own size.
    torch.manual_seed(0)
    module = convolution(4, 4, 3, padding=1)
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 4, 3, 3).double() * 2.0 ** torch.randint(-60, 60, (4, 1, 1, 1)).double())
    truth = dense_norm(module, 4, 3, 3)
    bound = certified_norm(ConvolutionOperator("c", module, (4, 3, 3)))
    assert truth * (1 - 1e-14) <= bound <= truth * (1 + 1e-6)
