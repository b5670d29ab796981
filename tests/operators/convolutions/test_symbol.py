"""A convolution by its symbol: its norm against dense frequencies, dense operators and certificates; its gradients."""

import math

import pytest
import torch
from support.symbol_norms import norm_of_symbol, symbol_norm
from support.truth import forward_matrix, norm
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.composed import ScaledOperator
from lightning_lip.operators.convolutions.symbol import SymbolOperator, symbol_at
from lightning_lip.operators.known import operator_of
from lightning_lip.rigorous.operators import certified_norm

LAYERS = {
    "plain": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "even and rectangular": lambda: nn.Conv2d(3, 4, (2, 3), padding="same"),
    "strided and dilated": lambda: nn.Conv2d(3, 4, 3, stride=2, dilation=(1, 3)),
    "one dimension": lambda: nn.Conv1d(4, 3, 5, stride=2),
    "three dimensions": lambda: nn.Conv3d(1, 2, 2, padding=1),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1, output_padding=1),
    "transposed groups": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "replicate, strided": lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "circular, other width": lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"),
    "size one": lambda: nn.Conv2d(3, 5, 1, stride=2),
    "patches": lambda: nn.Conv2d(3, 5, 2, stride=2),
    "patches, transposed": lambda: nn.ConvTranspose2d(5, 3, 2, stride=3),
    "size one, groups": lambda: nn.Conv2d(4, 6, 1, groups=2),
    "patches, reflected": lambda: nn.Conv1d(3, 5, 2, stride=2, padding=1, padding_mode="reflect"),
}

MATRICES = {"size one", "patches", "patches, transposed"}


def made(key):
    torch.manual_seed(0)
    return operator_of(LAYERS[key]().double(), key)


def converged(operator, n=200):
    norms = SpectralNorms([operator], n_iterations=n)
    return norms, norms.step()


@pytest.mark.parametrize("key", LAYERS)
def test_the_norm_is_the_largest_over_all_frequencies(key):
    operator = made(key)
    _, step = converged(operator)
    truth = norm_of_symbol(operator).item()
    assert step.sigma.item() == pytest.approx(truth, rel=1e-6)
    assert operator.is_matrix == (key in MATRICES)
    assert operator.norm(step.left[0], step.right[0]).item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("key", LAYERS)
def test_the_certificate_of_no_size_lies_just_above(key):
    operator = made(key)
    truth = norm_of_symbol(operator).item()
    certified = certified_norm(operator)
    assert truth * (1 - 1e-9) <= certified <= truth * 1.016


@pytest.mark.parametrize("key", LAYERS)
def test_the_operator_on_an_image_is_no_larger(key):
    operator, layer = made(key), made(key).module
    shape = (layer.in_channels, *[8] * len(layer.kernel_size))
    assert norm(forward_matrix(layer, shape)) <= norm_of_symbol(operator).item() * (1 + 1e-9)


@pytest.mark.parametrize("key", LAYERS)
def test_the_gradient_is_the_exact_one(key):
    operator = made(key)
    _, step = converged(operator)
    parameter = operator.module.weight
    (expected,) = torch.autograd.grad(norm_of_symbol(operator), parameter)
    (gradient,) = operator.norm_gradients(step.left[0], step.right[0], [parameter])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("key", ["plain", "size one", "groups", "reflect", "transposed", "patches, transposed"])
@pytest.mark.parametrize("gain", ["gamma", "computed"])
def test_a_batch_normalisation_behind_it_is_part_of_the_kernel(key, gain):
    layer = made(key).module
    gamma = nn.Parameter(torch.randn(layer.out_channels, dtype=torch.float64))
    gamma.data[0] = 0.0
    rest = torch.rand(layer.out_channels, dtype=torch.float64) + 0.5
    operator = ScaledOperator(operator_of(layer, "a"), "a+b", lambda: gamma * rest, (gamma,), gain == "gamma")
    norms, step = converged(operator)
    truth = norm_of_symbol(operator)
    assert step.sigma.item() == pytest.approx(truth.item(), rel=1e-6)
    expected = torch.autograd.grad(truth, [layer.weight, gamma])
    grads = operator.norm_gradients(step.left[0], step.right[0], [layer.weight, gamma])
    operator.add_norm_gradients_(1.0, step.left[0], step.right[0], [layer.weight, gamma])
    for found in (grads, (layer.weight.grad, gamma.grad)):
        for got, right in zip(found, expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
    assert (operator.gain is gamma) == (gain == "gamma" and not layer.transposed)
    if operator.gain is not None:
        gamma.grad = None
        operator.add_gain_gradient_(step.sigma[0] * 2, step.left[0])
        torch.testing.assert_close(gamma.grad, 2 * expected[1], rtol=1e-4, atol=1e-4 * expected[1].abs().max().item())
    if operator.written_parameter is not None:
        written = torch.zeros_like(layer.weight)
        norms.rank_one_update_([written], torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(written, expected[0], rtol=1e-4, atol=1e-4 * expected[0].abs().max().item())


@pytest.mark.parametrize(("size", "stride"), [(6, 1), (8, 2), (5, 1)])
def test_circular_padding_at_a_known_size_is_exact(size, stride):
    torch.manual_seed(1)
    layer = nn.Conv2d(2, 3, 3, stride=stride, padding=1, padding_mode="circular").double()
    operator = symbol_at("a", layer, (size, size))
    _, step = converged(operator)
    assert step.sigma.item() == pytest.approx(norm(forward_matrix(layer, (2, size, size))), rel=1e-6)
    assert operator.spatial == (size, size)


@pytest.mark.parametrize(("size", "padding"), [((7,), 1), ((6,), 2), ((65 * 65,), 1)])
def test_other_circular_padding_takes_all_frequencies(size, padding):
    layer = nn.Conv1d(2, 3, 3, stride=2 if size == (7,) else 1, padding=padding, padding_mode="circular")
    assert symbol_at("a", layer, size).spatial is None


PLACES = {
    "1 x 1": (lambda: nn.Conv2d(3, 4, 3, padding=1), (1, 1)),
    "strided to one": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 2)),
    "whole": (lambda: nn.Conv2d(3, 4, (4, 2)), (4, 2)),
    "transposed, whole": (lambda: nn.ConvTranspose2d(3, 4, 4), (1, 1)),
    "transposed, cropped": (lambda: nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1, output_padding=1), (1, 1)),
    "groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (1, 1)),
    "dilated": (lambda: nn.Conv1d(3, 4, 3, dilation=2, padding=2), (2,)),
}


@pytest.mark.parametrize("key", [key for key in PLACES if key != "dilated"])
@pytest.mark.parametrize("parametrised", [False, True])
def test_one_place_is_the_matrix_of_the_taps_inside(key, parametrised):
    torch.manual_seed(0)
    make, spatial = PLACES[key]
    layer = make().double()
    if parametrised:
        parametrizations.weight_norm(layer)
    operator = symbol_at("a", layer, spatial)
    _, step = converged(operator)
    matrix = forward_matrix(layer, (layer.in_channels, *spatial))
    assert step.sigma.item() == pytest.approx(norm(matrix), rel=1e-6)
    assert certified_norm(operator) == pytest.approx(norm(matrix), rel=1e-6)
    parameters = list(operator.parameters)
    expected = torch.autograd.grad(torch.linalg.matrix_norm(matrix, 2), parameters)
    found = operator.norm_gradients(step.left[0], step.right[0], parameters)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())


def test_more_than_one_place_is_on_the_infinite_grid():
    make, spatial = PLACES["dilated"]
    operator = symbol_at("a", make(), spatial)
    assert operator.kernel_size == (3,)
    assert operator.symbol_geometry is not None


@pytest.mark.parametrize(("size", "copies"), [(None, 7), (1, 7), (50, 4)])
def test_a_padding_that_copies_counts_the_copies(size, copies):
    layer = nn.Conv1d(1, 1, 1, padding=3, padding_mode="replicate").double()
    nn.init.ones_(layer.weight)
    operator = SymbolOperator("a", layer, None if size is None else (size,))
    assert converged(operator, 3)[1].sigma.item() == pytest.approx(math.sqrt(copies), rel=1e-12)
    for places in (1, 50) if size is None else (size,):
        assert norm(forward_matrix(layer, (1, places))) <= math.sqrt(copies) * (1 + 1e-12)


def test_a_symbol_has_channels_and_maps_nothing():
    operator = operator_of(nn.Conv2d(3, 5, 3), "a")
    assert (operator.domain_shape, operator.codomain_shape) == ((3,), (5,))
    for function in (operator.apply, operator.adjoint):
        with pytest.raises(TypeError, match="The symbol of layer 'a' is that of no size"):
            function(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LazyConv2d(3, 3), "lazy weight has no shape yet"),
        (lambda: nn.Conv2d(3, 3, 3, device="meta"), "meta device"),
        (lambda: type("Own", (nn.Conv2d,), {"forward": lambda self, x: x})(3, 3, 3), "forward of its own"),
    ],
)
def test_refused_with_a_reason(make, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        operator_of(make(), "a")


@pytest.mark.parametrize("kernel", ["zeros", "ones", "nan", "tiny", "huge"])
def test_kernels_without_a_direction(kernel):
    layer = nn.Conv2d(2, 3, 3)
    if kernel in ("zeros", "ones"):
        getattr(nn.init, kernel + "_")(layer.weight)
    else:
        layer.weight.data.mul_({"nan": math.nan, "tiny": 1e-25, "huge": 1e15}[kernel])
    operator = operator_of(layer, "a")
    norms, step = converged(operator, 3)
    if kernel == "nan":
        assert step.sigma.isnan().all()
        layer.weight.data.fill_(1.0)
        step = norms.step()
    truth = symbol_norm(layer.weight.detach(), 1, 1).item()
    assert step.sigma.item() == pytest.approx(truth, rel=1e-2)
    assert all(part.isfinite().all() for part in (step.left[0], step.right[0], *step.vectors))


def test_memory_formats_make_no_difference():
    torch.manual_seed(0)
    for layer in (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(3, 4, 1)):
        expected = converged(operator_of(layer, "a"), 5)
        last = layer.to(memory_format=torch.channels_last)
        operator = operator_of(last, "a")
        norms, step = converged(operator, 5)
        torch.testing.assert_close(step.sigma, expected[1].sigma, rtol=1e-5, atol=0)
        gradient = torch.zeros_like(last.weight)
        view = operator.gradient_view(gradient) if operator.written_parameter is not None else None
        if view is not None:
            norms.rank_one_update_([view], torch.ones(1))
            torch.testing.assert_close((gradient * last.weight).sum(), step.sigma[0], rtol=1e-3, atol=0)
