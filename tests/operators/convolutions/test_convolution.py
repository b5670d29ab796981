import copy
import itertools
import math
import random
from collections import Counter

import mpmath
import numpy as np
import pytest
import torch
from support.truth import forward_matrix, norm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import lightning_lip.rigorous.convolution as convolution_norms
import lightning_lip.rigorous.hermitian as hermitian_norms
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.norms.matrix_free import MatrixFreeIteration
from lightning_lip.operators.convolutions.convolution import ConvolutionOperator
from lightning_lip.operators.convolutions.paddings import most_copies, pad, pad_adjoint, padding_pairs
from lightning_lip.rigorous.convolution import PHASE_ERROR, certified_convolution_norm, half_grid, roots_of_unity
from lightning_lip.rigorous.evaluation import Evaluation
from lightning_lip.rigorous.hermitian import LargestEigenvalue
from lightning_lip.rigorous.operators import certified_norm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MODES = ("zeros", "circular", "reflect", "replicate")

# The certificate may lie this far above the infinite grid's norm at N = 16 (h - 1), by dimension.
ABOVE = {1: 1.01, 2: 1.01, 3: 1.015}


def grid_norm(operator):
    """Return the bound on the grid of frequencies, which does not look at the matrix on the input's size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_norms, "sized_norm", lambda kernel, axes: None)
        return certified_norm(operator)


def random_operator(seed):
    """Return an operator with random settings, in fp64, whose dense matrix is small."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        dims = rng.choice((1, 2, 3))
        kernel, stride, dilation, spatial = (
            tuple(rng.randint(1, top) for _ in range(dims))
            for top in ((5, 3, 3)[dims - 1], 3, (3, 3, 2)[dims - 1], (24, 7, 4)[dims - 1])
        )
        groups = rng.choice((1, 1, 2, 3))
        c_in, c_out = groups * rng.randint(1, 2), groups * rng.randint(1, 2)
        settings = {"stride": stride, "dilation": dilation, "groups": groups}
        if rng.random() < 0.3:
            kind = TRANSPOSED[dims - 1]
            settings["padding"] = tuple(rng.randint(0, 2) for _ in range(dims))
            settings["output_padding"] = tuple(
                rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)
            )
        else:
            kind = CONVOLUTIONS[dims - 1]
            settings["padding_mode"] = mode = rng.choice(MODES)
            choice = rng.random()
            if choice < 0.15:
                settings |= {"padding": "same", "stride": 1}
            elif choice < 0.25:
                settings["padding"] = "valid"
            elif choice < 0.4:
                settings["padding"] = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
            else:
                tops = [4 if mode in ("zeros", "replicate") else n - (mode == "reflect") for n in spatial]
                settings["padding"] = tuple(rng.randint(0, min(4, top)) for top in tops)
        module = kind(c_in, c_out, kernel, bias=False, dtype=torch.float64, **settings)
        try:
            operator = ConvolutionOperator("c", module, (c_in, *spatial))
        except ValueError:  # No output, or a padding wider than the input.
            continue
        if math.prod(operator.codomain_shape) > 2000:
            continue
        with torch.no_grad():
            # A flat kernel's norm lies at frequency 0, an alternating one's at pi, a random one's between.
            module.weight.copy_(rng.choice((torch.randn_like, torch.rand_like))(module.weight))
            module.weight.mul_(2.0 ** rng.randint(-40, 40))
        return operator


def dense(operator):
    """Return the operator's matrix from the module's own forward, (codomain, domain)."""
    return forward_matrix(operator.module, operator.domain_shape).detach()


def estimate(operator, n_iterations=300, dtype=torch.float64):
    """Return the norm and its singular vectors u, v, flat, by block iteration."""
    size = math.prod(operator.domain_shape)
    block = torch.linalg.qr(torch.randn(size, min(8, size), dtype=torch.float64)).Q.mT.to(dtype)
    with torch.no_grad():
        step = MatrixFreeIteration(operator, block, "reference").power_step(n_iterations)
    return step.sigma[0], step.left[0], step.right[0]


def infinite_grid_norm(module, refinement=2):
    """Return the largest norm over a finer grid: the aliases of each frequency side by side, no space-to-depth."""
    weight = module.weight.detach().numpy()
    dims = weight.ndim - 2
    groups = np.split(weight, module.groups)
    axes = []
    for k, s, d in zip(module.kernel_size, module.stride, module.dilation, strict=True):
        s, d = s // math.gcd(s, d), 1
        taps = -(-k // s)
        n = max(1, 16 * (taps - 1) * refinement)
        # phases (n, aliases, taps): the output's frequency theta comes from the input's (theta + 2 pi m) / s.
        inputs = (2 * np.pi * np.arange(n)[:, None] / n + 2 * np.pi * np.arange(s)) / s
        axes.append(np.exp(1j * inputs[..., None] * np.arange(k)) / math.sqrt(s))
    letters = [("a", "u", "x"), ("b", "v", "y"), ("c", "w", "z")][:dims]
    phases = ",".join("".join(names) for names in letters)
    taps, points, aliases = ("".join(names[i] for names in letters) for i in (2, 0, 1))
    largest = 0.0
    for group in groups:
        symbol = np.einsum(f"oi{taps},{phases}->{points}oi{aliases}", group, *axes, optimize=True)
        symbol = symbol.reshape(-1, group.shape[0], group.shape[1] * math.prod(symbol.shape[dims + 2 :]))
        largest = max(largest, np.linalg.norm(symbol, 2, axis=(1, 2)).max())
    return float(largest)


@pytest.mark.parametrize("seed", range(300))
def test_random_configurations(seed, record_property):
    operator = random_operator(seed)
    module = operator.module
    matrix = dense(operator)
    assert operator.codomain_shape == tuple(module(torch.zeros(1, *operator.domain_shape).double()).shape[1:])
    truth = norm(matrix)

    x = torch.randn(3, *operator.domain_shape, dtype=torch.float64)
    y = torch.randn(3, *operator.codomain_shape, dtype=torch.float64)
    with torch.no_grad():
        applied, pulled = operator.apply(x), operator.adjoint(y)
    scale = truth * x.norm().item() * y.norm().item() + 1e-300
    assert abs((applied * y).sum().item() - (x * pulled).sum().item()) <= 1e-13 * scale
    torch.testing.assert_close(applied.flatten(1), x.flatten(1) @ matrix.T, rtol=1e-10, atol=1e-12 * truth)

    assert estimate(operator)[0].item() == pytest.approx(truth, rel=1e-4)

    left, right = y[0].flatten(), x[0].flatten()
    (expected,) = torch.autograd.grad((left * operator.apply(x[:1]).flatten()).sum(), module.weight)
    tolerance = {"rtol": 1e-10, "atol": 1e-12 * expected.abs().max().item()}
    torch.testing.assert_close(operator.weight_gradient(left, right), expected, **tolerance)
    torch.testing.assert_close(operator.norm_gradients(left, right, [module.weight])[0], expected, **tolerance)
    assert operator.norm(left, right).item() == pytest.approx((left @ applied[0].flatten()).item(), abs=1e-13 * scale)

    certificate = certified_norm(operator)
    # The SVD's own rounding; the certificate has none to allow for.
    assert truth * (1 - 1e-13) <= certificate <= truth * (1 + 1e-6) + 1e-100
    on_grid = grid_norm(operator)
    assert on_grid >= truth * (1 - 1e-13)
    names = ("stride", "dilation", "groups", "padding", "padding_mode", "transposed")
    of_all_sizes = certified_convolution_norm(module.weight, **{name: getattr(module, name) for name in names})
    assert of_all_sizes >= truth * (1 - 1e-13)
    if module.padding_mode == "zeros":
        infinite = infinite_grid_norm(module)
        assert infinite * (1 - 1e-13) <= on_grid <= ABOVE[len(module.kernel_size)] * infinite
        assert on_grid == of_all_sizes
    record_property("gap_to_finite_operator", on_grid / truth - 1 if truth else 0.0)


def test_every_kind_is_among_the_random_configurations():
    modules = [random_operator(seed).module for seed in range(300)]
    kinds = Counter(module.padding_mode + "-transposed" * module.transposed for module in modules)
    assert set(kinds) == {*MODES, "zeros-transposed"}
    assert min(kinds.values()) >= 30


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_inputs_reach_the_certificate(dims, transposed):
    # The finite operator of a flat kernel tends to the infinite grid's: the certificate is no loose bound.
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[dims - 1]
    module = kind(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
    nn.init.ones_(module.weight)
    operator = ConvolutionOperator("c", module, (1, *[(200, 40, 12)[dims - 1]] * dims))
    certificate = grid_norm(operator)
    assert 3**dims <= certificate <= ABOVE[dims] * 3**dims
    assert estimate(operator, 60)[0].item() >= (0.99, 0.97, 0.9)[dims - 1] * 3**dims


def test_worst_case_of_the_grid_is_covered():
    # |1 - e^{i theta}|^(h-1) peaks at pi; shifting the peak halfway between two frequencies of an odd grid leaves the
    # most to Riesz's factor.
    for taps, grid in [(2, 3), (3, 5), (4, 7), (5, 5)]:
        kernel = torch.tensor([math.comb(taps - 1, j) * (-1.0) ** j for j in range(taps)], dtype=torch.float64)
        bound = certified_convolution_norm(kernel.view(1, 1, -1), grid=grid)
        assert bound >= 2.0 ** (taps - 1)
    # At two taps the factor is attained: max |1 + e^{i theta}| = 2 against 2 cos(pi / 2N) on the grid.
    assert certified_convolution_norm(torch.tensor([[[1.0, -1.0]]]), grid=3) == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding", "size", "exact"),
    [
        (3, 1, 1, 1, 9, True),
        (4, 1, 1, "same", 9, True),
        (3, 2, 1, 1, 8, True),
        (3, 2, 3, 3, 8, True),
        (5, 3, 2, 4, 12, True),
        (3, 2, 2, 2, 8, True),
        (3, 1, 4, 4, 6, True),  # The dilated kernel is longer than the input and wraps.
        (3, 2, 1, 1, 9, False),  # The stride does not divide the size.
        (3, 1, 1, 3, 5, False),  # More places than make it circulant.
        (3, 2, 1, 2, 5, False),
        (2, 3, 1, 4, 4, False),
    ],
)
def test_circular_padding(kernel, stride, dilation, padding, size, exact):
    for dims in (1, 2):
        module = CONVOLUTIONS[dims - 1](
            2, 3, kernel, stride, padding, dilation, padding_mode="circular", dtype=torch.float64, bias=False
        )
        operator = ConvolutionOperator("c", module, (2, *[size] * dims))
        truth, bound = norm(dense(operator)), grid_norm(operator)
        assert bound >= truth * (1 - 1e-13)
        if exact:
            assert bound <= truth * (1 + 1e-6)
        assert truth * (1 - 1e-13) <= certified_norm(operator) <= truth * (1 + 1e-6)


def test_circular_padding_of_a_large_input_uses_the_smaller_grid():
    module = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular", dtype=torch.float64, bias=False)
    operator = ConvolutionOperator("c", module, (2, 101))
    truth = norm(dense(operator))
    assert truth * (1 + 1e-6) < grid_norm(operator) <= 1.01 * infinite_grid_norm(module)


def test_flat_kernels_with_repeating_paddings_exceed_the_infinite_grid():
    # The padding's factor is needed: without it these certificates would be false.
    for mode, size in (("replicate", 1), ("reflect", 3), ("circular", 2)):
        module = nn.Conv1d(1, 1, 3, padding=2, padding_mode=mode, bias=False, dtype=torch.float64)
        nn.init.ones_(module.weight)
        operator = ConvolutionOperator("c", module, (1, size))
        truth = norm(dense(operator))
        assert truth > 3.04
        assert grid_norm(operator) >= truth * (1 - 1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_padding_adjoint_and_norm(mode):
    for size, before, after in itertools.product((1, 2, 3, 6), (0, 1, 2, 5), (0, 1, 3)):
        if max(before, after) > {"reflect": size - 1, "circular": size}.get(mode, 9):
            continue
        pairs = ((before, after),)
        matrix = pad(torch.eye(size, dtype=torch.float64)[:, None], pairs, mode)[:, 0].T
        padded = torch.eye(size + before + after, dtype=torch.float64)[:, None]
        assert torch.equal(pad_adjoint(padded, pairs, mode)[:, 0].T, matrix.T)
        copies = most_copies(size, pairs[0], mode, 1, 1, 1)
        assert copies == pytest.approx(norm(matrix) ** 2)
        assert most_copies(None, pairs[0], mode, 1, 1, 1) >= copies


def test_padding_copies_that_are_not_read_do_not_count():
    assert most_copies(4, (2, 2), "replicate", 1, 1, 1) == 3
    assert most_copies(4, (2, 2), "replicate", 1, 2, 1) == 2  # Reads places 0, 2, 4, 6: input 0 twice.
    assert most_copies(4, (2, 2), "replicate", 2, 8, 4) == 1  # Reads places 0 and 4.
    assert most_copies(4, (1, 1), "zeros", 3, 1, 1) == 1


def test_padding_words():
    assert padding_pairs("same", (4, 3), (1, 2)) == ((1, 2), (2, 2))
    assert padding_pairs("valid", (4, 3), (1, 2)) == ((0, 0), (0, 0))
    assert padding_pairs(2, (4,), (1,)) == ((2, 2),)
    with pytest.raises(ValueError, match="'same' or 'valid'"):
        padding_pairs("full", (3,), (1,))
    with pytest.raises(ValueError, match="2 numbers of at least 0"):
        padding_pairs((1,), (3, 3), (1, 1))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), padding_mode="reflect", groups=2, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False),
    ],
)
def test_dtypes(module):
    operators = {}
    for weight in (torch.float64, torch.float32, torch.bfloat16):
        operators[weight] = ConvolutionOperator("c", copy.deepcopy(module).to(weight), (4, 5, 6))
    truth = norm(dense(operators[torch.float64]))
    sigma, left, right = estimate(operators[torch.float32], dtype=torch.float32)
    assert sigma.dtype == left.dtype == right.dtype == torch.float32
    assert sigma.item() == pytest.approx(truth, rel=1e-5)
    # The bf16 weight is another matrix; the vectors stay fp32 and find that one's norm.
    rounded = copy.deepcopy(operators[torch.bfloat16].module).double()
    sigma, *_ = estimate(operators[torch.bfloat16], dtype=torch.float32)
    assert sigma.dtype == torch.float32
    assert sigma.item() == pytest.approx(norm(forward_matrix(rounded, (4, 5, 6))), rel=1e-5)


@pytest.mark.parametrize("kind", range(5))
def test_norm_gradient(kind):
    torch.manual_seed(kind)
    module = (
        nn.Conv1d(2, 3, 3, stride=2, padding=2, padding_mode="circular"),
        nn.Conv2d(2, 4, (2, 3), padding="same", groups=2),
        nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", stride=2),
        nn.ConvTranspose2d(2, 2, 3, stride=2, dilation=3, output_padding=2),
        nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"),
    )[kind].double()
    shape = (module.in_channels, *[4] * len(module.kernel_size))
    operator = ConvolutionOperator("c", module, shape)
    _, left, right = estimate(operator)
    value = operator.norm(left, right)
    assert value.shape == ()
    (gradient,) = torch.autograd.grad(value, module.weight)
    through_svd = torch.linalg.matrix_norm(forward_matrix(module, shape), 2)
    (expected,) = torch.autograd.grad(through_svd, module.weight)
    assert value.item() == pytest.approx(through_svd.item(), rel=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


POINTWISE = [
    (nn.Conv2d(3, 4, 1, bias=False), (3, 5, 4)),
    (nn.Conv2d(3, 4, 1, stride=2, bias=False), (3, 5, 4)),
    (nn.Conv1d(4, 6, 1, groups=2, dilation=3, padding_mode="reflect", bias=False), (4, 7)),
    (nn.Conv2d(3, 4, 1, padding="same", bias=False), (3, 3, 3)),
    (nn.ConvTranspose2d(4, 6, 1, stride=2, groups=2, output_padding=1, bias=False), (4, 3, 3)),
    (nn.Conv3d(2, 2, 1, stride=(1, 2, 1), bias=False), (2, 2, 3, 2)),
]


ADDED = [
    (nn.Conv2d(3, 5, 3, padding=1), (3, 8, 9)),
    (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (3, 8, 9)),
    (nn.Conv2d(6, 4, 1, stride=2), (6, 5, 5)),
    (nn.Conv2d(4, 4, 3, groups=2, padding=1), (4, 6, 6)),
    (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (3, 8, 9)),
    (nn.Conv2d(3, 5, 4, padding="same"), (3, 8, 9)),
    (nn.Conv2d(3, 40, 3, padding=1, stride=2), (3, 9, 7)),  # fewer places than channels
    (nn.Conv2d(3, 40, (2, 3), dilation=(2, 1)), (3, 5, 6)),
    (nn.Conv1d(3, 5, 3), (3, 12)),
    (nn.ConvTranspose2d(3, 5, 3, stride=2), (3, 5, 5)),
    (nn.Conv2d(3, 5, 3).double(), (3, 6, 6)),
    (nn.Conv2d(3, 5, 3).bfloat16(), (3, 6, 6)),
]


@pytest.mark.parametrize("factor", [0.5, -2.0, 0.0, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("start", ["none", "ones", "channels last"])
@pytest.mark.parametrize(("module", "shape"), ADDED, ids=lambda x: str(x) if isinstance(x, nn.Module) else "")
def test_gradients_are_added_to_what_is_there(module, shape, start, factor):
    op, weight = ConvolutionOperator("conv", module, shape), module.weight
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = (
        torch.randn(math.prod(side), generator=generator, dtype=dtype) for side in (op.codomain_shape, op.domain_shape)
    )
    if start != "none":
        # No view of what is channels last is a matrix.
        weight.grad = torch.ones_like(weight.mT).mT if start == "channels last" else torch.ones_like(weight)
    [expected] = op.norm_gradients(float(factor) * left, right, [weight])
    expected = expected if start == "none" else 1 + expected
    there = weight.grad
    with torch.no_grad():
        op.add_norm_gradients_(factor, left, right, [weight])
    if there is not None:
        assert weight.grad is there
    rounding = 8 * torch.finfo(weight.dtype).eps
    torch.testing.assert_close(weight.grad, expected, rtol=rounding, atol=rounding * float(expected.abs().max()))
    weight.grad = None


@pytest.mark.parametrize("factor", [0.0, torch.tensor(0.0)], ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_factor_of_zero_adds_nothing_of_a_gradient_that_is_nan(padding_mode, factor):
    module = nn.Conv2d(3, 50, 3, padding=1, padding_mode=padding_mode)
    op = ConvolutionOperator("conv", module, (3, 6, 6))
    left, right = torch.full((1800,), math.nan), torch.ones(108)
    module.weight.grad = torch.ones_like(module.weight)
    with torch.no_grad():
        op.add_norm_gradients_(factor, left, right, [module.weight])
    assert torch.equal(module.weight.grad, torch.ones_like(module.weight))


@pytest.mark.parametrize(("module", "shape"), POINTWISE, ids=lambda value: str(value)[:40])
def test_a_kernel_of_size_one_is_taken_at_one_place(module, shape):
    module = copy.deepcopy(module).double()
    operator = ConvolutionOperator("c", module, shape)
    places = (1,) * len(module.kernel_size)
    assert operator.domain_shape == (module.in_channels, *places)
    assert operator.codomain_shape == tuple(module(torch.zeros(1, *operator.domain_shape).double()).shape[1:])
    # The truth is the module's own forward at the size that was given.
    truth = torch.linalg.matrix_norm(forward_matrix(module, shape), 2)
    sigma, left, right = estimate(operator)
    assert sigma.item() == pytest.approx(truth.item(), rel=1e-10)
    (expected,) = torch.autograd.grad(truth, module.weight)
    torch.testing.assert_close(operator.weight_gradient(left, right), expected, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="to take inputs of shape"):
        ConvolutionOperator("c", module, (module.in_channels + 1, *shape[1:]))


def test_a_kernel_of_size_one_with_padding_keeps_its_input_size():
    # Copies of an input at padded places make the norm larger; zeros there may leave every place of one unread.
    for mode in MODES:
        module = nn.Conv1d(2, 3, 1, stride=2, padding=1, padding_mode=mode, bias=False, dtype=torch.float64)
        operator = ConvolutionOperator("c", module, (2, 4))
        assert operator.domain_shape == (2, 4)
        assert estimate(operator)[0].item() == pytest.approx(norm(dense(operator)), rel=1e-10)


def test_the_gradient_reaches_what_a_parametrised_kernel_is_computed_from():
    torch.manual_seed(0)
    for module, shape in (
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular"), (4, 7, 6)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 3, 4)),
    ):
        operator = ConvolutionOperator("c", weight_norm(module.double()), shape)
        u = torch.randn(math.prod(operator.codomain_shape), dtype=torch.float64)
        v = torch.randn(math.prod(operator.domain_shape), dtype=torch.float64)
        expected = torch.autograd.grad(u @ operator.apply(v.view(1, *shape)).flatten(), operator.parameters)
        with torch.no_grad():  # as the regulariser calls it
            got = operator.norm_gradients(u, v, operator.parameters)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        through_norm = torch.autograd.grad(operator.norm(u, v), operator.parameters)
        for a, b in zip(through_norm, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        unused = nn.Parameter(torch.zeros(1))
        assert operator.norm_gradients(u, v, [unused])[0] is None


def test_parametrised_weight():
    torch.manual_seed(0)
    module = weight_norm(nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64))
    operator = ConvolutionOperator("c", module, (2, 4, 4))
    assert {id(p) for p in operator.parameters} == {id(p) for p in module.parameters()}
    assert operator.direct_parameter is None
    sigma = estimate(operator)[0]
    assert sigma.item() == pytest.approx(norm(dense(operator)), rel=1e-10)
    assert certified_norm(operator) >= sigma.item()


def test_own_weight():
    module = nn.Conv1d(2, 3, 3)
    operator = ConvolutionOperator("c", module, [2, 5])
    assert operator.parameters == (module.weight,)
    assert operator.weight() is module.weight
    assert operator.domain_shape == (2, 5)
    doubled = Evaluation((2 * module.weight).detach(), None)
    assert certified_norm(operator, doubled) == 2 * certified_norm(operator)
    assert certified_convolution_norm(module.weight, spatial=operator.spatial, grid=64) < grid_norm(operator)


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input).square()


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(input, weight * 2, bias)


def replaced_forward():
    module = nn.Conv2d(1, 1, 3)
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnForward(1, 1, 3), "forward of its own"),
        (lambda: OwnConvolution(1, 1, 3), "forward of its own"),
        (replaced_forward, "forward of its own"),
        (lambda: nn.Linear(2, 2), "a Linear is not a convolution"),
    ],
)
def test_own_forwards_and_other_modules_are_refused(make, reason):
    with pytest.raises(UnsupportedLayerError, match=reason):
        ConvolutionOperator("c", make(), (1, 5, 5))


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({}, (3, 5, 5), r"inputs of shape \(2, then 2 sizes"),
        ({}, (2, 5), r"inputs of shape \(2, then 2 sizes"),
        ({}, (2, 5, 0), r"inputs of shape \(2, then 2 sizes"),
        ({}, (), r"inputs of shape \(2, then 2 sizes"),
        ({}, (2, 2, 5), r"output would have size \(0, 3\)"),
        ({"padding": 5, "padding_mode": "reflect"}, (2, 5, 5), "at most 4 places of reflect padding"),
        ({"padding": 6, "padding_mode": "circular"}, (2, 5, 5), "at most 5 places of circular padding"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(settings, shape, message):
    with pytest.raises(ValueError, match=message):
        ConvolutionOperator("c", nn.Conv2d(2, 2, 3, **settings), shape)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 2), {}, "3 to 5 dimensions"),
        ((2, 2, 3), {"groups": 3}, "`groups` to divide"),
        ((2, 2, 3), {"padding_mode": "mirror"}, "padding mode of torch.nn"),
        ((2, 2, 3), {"padding_mode": "reflect", "transposed": True}, "to have padding mode 'zeros'"),
        ((2, 2, 3), {"stride": (1, 2)}, "`stride` to be 1 numbers"),
        ((2, 2, 3), {"dilation": 0}, "`dilation` to be 1 numbers of at least 1"),
        ((2, 2, 3), {"spatial": (4, 4)}, "`spatial`"),
        ((2, 2, 3), {"spatial": (2,)}, "smaller than the kernel"),
        ((2, 2, 3), {"padding": 2, "padding_mode": "reflect", "spatial": (2,)}, "at most 1 places"),
        ((2, 2, 3), {"grid": 2}, "`grid` to be at least the number of taps, 3"),
    ],
)
def test_certificate_refuses(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        certified_convolution_norm(torch.ones(shape), **settings)


def test_certificate_refuses_what_is_not_finite():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite numbers"):
            certified_convolution_norm(torch.full((1, 1, 3), bad))


def test_certificate_of_zero_and_empty_kernels():
    assert certified_convolution_norm(torch.zeros(2, 2, 3, 3)) == 0.0
    assert certified_convolution_norm(torch.zeros(0, 2, 3, 3)) == 0.0


@pytest.mark.parametrize("exponent", [-1060, -500, -100, 100, 500, 1000])
def test_certificate_at_every_magnitude(exponent):
    torch.manual_seed(0)
    kernel = torch.randint(-4, 5, (2, 3, 3, 3)).double()
    bound = certified_convolution_norm(kernel)
    # 2^-1060 is subnormal, where a rounding is a large step.
    expected = pytest.approx(math.ldexp(bound, exponent), rel=1e-15, abs=1.5 * 2.0**-1074)
    scaled = certified_convolution_norm(kernel * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2))
    assert scaled == expected
    assert scaled >= math.ldexp(bound, exponent) * (1 - 1e-15)


def test_certificate_that_may_overflow_is_infinite():
    assert certified_convolution_norm(torch.full((1, 1, 9), 1.7e308, dtype=torch.float64)) == math.inf


def test_finer_grid_is_tighter():
    torch.manual_seed(0)
    kernel = torch.randn(3, 3, 3, 3)
    bounds = [certified_convolution_norm(kernel, grid=n) for n in (4, 32, 128)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[2] <= bounds[1] <= 1.0098 * bounds[2]
    assert bounds[1] == certified_convolution_norm(kernel)


def test_kernel_of_size_one_is_a_matrix():
    torch.manual_seed(0)
    matrix = torch.randn(5, 4, dtype=torch.float64)
    bound = certified_convolution_norm(matrix[:, :, None, None], stride=3, padding=2)
    assert norm(matrix) * (1 - 1e-13) <= bound <= norm(matrix) * (1 + 1e-6)
    depthwise = certified_convolution_norm(matrix.flatten()[:, None, None], groups=20)
    assert depthwise == pytest.approx(matrix.abs().max().item(), rel=1e-6)


def test_many_chunks_and_large_matrices(monkeypatch):
    # Small chunks, and no exact decomposition: both paths of the estimate, and levels that rise from chunk to chunk.
    torch.manual_seed(0)
    kernel = torch.randn(2 * 12, 12, 3, 3, dtype=torch.float64)
    whole = certified_convolution_norm(kernel, groups=2)
    monkeypatch.setattr("lightning_lip.rigorous.convolution.CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(hermitian_norms, "EXACT_ESTIMATE_SIZE", 4)
    assert certified_convolution_norm(kernel, groups=2) == pytest.approx(whole, rel=1e-4)


def test_phases_against_forty_digits():
    mpmath.mp.dps = 40
    roots = roots_of_unity(37)
    assert roots.shape == (37,)
    for j in range(37):
        error = abs(mpmath.mpc(roots[j].item()) - mpmath.expj(2 * mpmath.pi * j / 37))
        # A third of the bound's share for one dimension.
        assert error <= PHASE_ERROR / 8


@pytest.mark.parametrize("counts", [[1], [6], [5, 4], [3, 1, 4]])
def test_half_grid_holds_one_of_each_conjugate_pair(counts):
    points = [tuple(p) for p in half_grid(counts).tolist()]
    assert len(points) == len(set(points))
    both = {*points, *(tuple(-j % n for j, n in zip(p, counts, strict=True)) for p in points)}
    assert both == set(itertools.product(*map(range, counts)))
    assert len(points) <= len(both) / 2 + 4


def test_largest_eigenvalue_against_fifty_digits():
    mpmath.mp.dps = 50
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        rows, columns = 1 + case % 4, 4 + case % 3
        real, imaginary = torch.randn(2, 3, rows, columns, generator=generator, dtype=torch.float64)
        if case % 5 == 0:  # Rank one: all other eigenvalues are zero.
            real[:, 1:], imaginary[:, 1:] = real[:, :1], imaginary[:, :1]
        if case % 5 == 1:  # Real, as at theta = 0.
            imaginary.zero_()
        symbol = torch.complex(real, imaginary)
        gram = symbol @ symbol.mH
        largest = LargestEigenvalue(rows)
        largest.include(gram)
        truth = max(max(mpmath.eighe(mpmath.matrix(matrix.tolist()), eigvals_only=True)) for matrix in gram)
        assert truth <= largest.bound() <= truth * (1 + 1e-6)


def test_level_rises_past_a_poor_estimate(monkeypatch):
    # An estimate that never gets there: the tolerance must grow until the factorisation succeeds.
    monkeypatch.setattr(hermitian_norms, "_estimate", lambda matrices: 0.9)
    matrices = torch.eye(3, dtype=torch.complex128)[None]
    largest = LargestEigenvalue(3)
    largest.include(matrices)
    assert 1 <= largest.bound() < 1.5
    before = largest.bound()
    largest.include(0.1 * matrices)
    assert largest.bound() == before
