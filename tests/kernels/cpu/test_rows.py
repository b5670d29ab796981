"""The compiled finish of a step with an operator's own maps, against the reference and float64."""

import copy
import math
import pickle

import pytest
import torch
from support.iterations import cache_hits_and_misses, in_a_fork
from support.truth import generator, geometric, largest_singular_value, matrix_of, nearly_dependent, orthonormal_columns
from torch import nn

from lightning_lip.kernels import compiled_rows
from lightning_lip.kernels.cpu import threads as pool
from lightning_lip.kernels.cpu.compiled import rows as compiled
from lightning_lip.kernels.cpu.rows import CompiledRows
from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.convolution import ConvolutionOperator

# What is compared     bound   why
SIGMA = 1e-6  #        relative, of a step from the same block: sums of 512 products in fp32, the rest in fp64
VECTOR = 2e-5  #       entries of u and v at a gap of 0.8: rounding of 1e-7 over gap^2
ORTHONORMAL = 2e-6  #  entries of V V^T - I
ABOVE = 1e-6  #        how far an estimate from below may lie above, relative

# Around the registers of eight, the strips of 512 and the tasks of 8192 columns.
SIZES = [(1, 1), (5, 3), (8, 8), (17, 40), (511, 513), (1024, 520), (8193, 300), (40, 20001), (16384, 96)]
BLOCK_SIZES = [1, 2, 3, 4, 7, 8, 9, 16]


def orthonormal_rows(r, n, seed=1):
    return orthonormal_columns(n, r, seed).T.contiguous()


def operator_matrix(q, p, ratio=0.8, top=3.0, rank=24):
    """Return a float64 matrix (q, p) with singular values top, top ratio, ..."""
    return matrix_of(q, p, geometric(min(q, p, rank), ratio, top), seed=2)  # right singular vectors: of seed 3


class MapOperator(LinearOperator):
    """A matrix (q, p) that is known by its maps only; `view` returns their results as views of something larger."""

    def __init__(self, matrix, view=False):
        super().__init__("map", nn.Identity())
        self.matrix, self.view = nn.Parameter(matrix.float()), view
        self.n_applied = 0

    domain_shape = property(lambda self: (self.matrix.shape[1],))
    codomain_shape = property(lambda self: (self.matrix.shape[0],))
    parameters = property(lambda self: (self.matrix,))

    def weight(self):
        return self.matrix

    def _given(self, rows):
        return torch.stack([rows, rows], dim=-1)[..., 0] if self.view else rows

    def apply(self, inputs):
        self.n_applied += 1
        return self._given(inputs @ self.matrix.to(inputs.dtype).T)

    def adjoint(self, outputs):
        return self._given(outputs @ self.matrix.to(outputs.dtype))

    def norm(self, left, right):
        return left @ self.matrix @ right


def iteration_of(operator, block, backend=None):
    """Return the iteration of one operator from a given block."""
    norms = SpectralNorms([operator], backend=backend)
    _, [(_, iteration)] = norms._iterations([operator.weight().detach()], [block], [0])
    return iteration


@torch.no_grad()
def step_of(operator, block, n_iterations=1, backend=None):
    iteration = iteration_of(operator, block, backend)
    assert (iteration._rows is None) == (backend == "reference")
    return iteration.power_step(n_iterations)


def check_step(step, matrix):
    """Check what holds of every step, converged or not."""
    sigma, u, v, block = step.sigma[0].double(), step.left[0].double(), step.right[0].double(), step.vectors[0].double()
    truth = largest_singular_value(matrix)
    assert sigma <= truth * (1 + ABOVE)
    torch.testing.assert_close(u @ matrix.double() @ v, sigma, rtol=SIGMA, atol=float(truth) * SIGMA)
    torch.testing.assert_close(torch.stack([u.norm(), v.norm()]), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (block @ block.T - torch.eye(len(block))).abs().max() < ORTHONORMAL


@pytest.mark.parametrize("r", BLOCK_SIZES)
@pytest.mark.parametrize(("q", "p"), SIZES)
def test_it_makes_the_references_step(q, p, r):
    r = min(r, q, p)
    matrix = operator_matrix(q, p)
    operator = MapOperator(matrix)
    block = step_of(operator, orthonormal_rows(r, p).float(), 3, "reference").vectors[0]
    step, expected = step_of(operator, block.clone()), step_of(operator, block.clone(), backend="reference")
    check_step(step, operator.matrix.detach().double())
    torch.testing.assert_close(step.sigma, expected.sigma, rtol=SIGMA, atol=0)
    outer = step.left[0][:99, None] * step.right[0][:99], expected.left[0][:99, None] * expected.right[0][:99]
    torch.testing.assert_close(*outer, rtol=0, atol=VECTOR)
    # The same vectors, up to their signs: in the order of the Ritz values.
    alike = (step.vectors[0] * expected.vectors[0]).sum(1).abs()
    torch.testing.assert_close(alike, torch.ones_like(alike), rtol=0, atol=VECTOR)


@pytest.mark.parametrize("n_iterations", [1, 2, 5])
@pytest.mark.parametrize("r", [1, 8])
def test_it_converges_as_the_reference_does(r, n_iterations):
    matrix = operator_matrix(900, 700)
    block = orthonormal_rows(r, 700).float()
    step, expected = (step_of(MapOperator(matrix), block, n_iterations, b) for b in (None, "reference"))
    check_step(step, MapOperator(matrix).matrix.detach().double())
    torch.testing.assert_close(step.sigma, expected.sigma, rtol=SIGMA, atol=0)


@pytest.mark.parametrize("renewed", [True, False])
def test_results_are_the_same_bit_for_bit_for_any_number_of_threads(renewed):
    # An object of its own for each number of threads, or one that sees the number change between steps.
    operator, block = MapOperator(operator_matrix(20_000, 9_000, rank=9)), orthonormal_rows(8, 9_000).float()
    rows = CompiledRows(8, 20_000, 9_000)
    before = torch.get_num_threads()
    found = []
    try:
        with torch.no_grad():
            images = operator.apply(block)
            products = operator.adjoint(images)
        for n_threads in (2, 1, 3, 8):
            torch.set_num_threads(n_threads)
            rows = CompiledRows(8, 20_000, 9_000) if renewed else rows
            basis = products.clone()
            found.append((*rows.finish(images, basis), basis))
            assert int(rows._header[compiled.THREADS]) == (n_threads if pool.pool_address() else 1)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("distance", "serves"), [(1.0, True), (0.5, True), (0.1, True), (0.03, True), (1e-3, False), (0.0, False)]
)
def test_rows_that_are_nearly_dependent(distance, serves):
    products = nearly_dependent(distance, 4096, 4).float()
    basis = products.clone()
    # Images in the order of the rows, so that these are not mixed first.
    images = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    finished = CompiledRows(4, 4, 4096).finish(images, basis)
    assert (finished is not None) == (serves and distance > compiled.LEAST_PIVOT)
    if finished is not None:
        basis, rows = basis.double(), products.double()
        assert (basis @ basis.T - torch.eye(4)).abs().max() < ORTHONORMAL
        # Each row lies in the span of the basis up to it.
        outside = rows - (rows @ basis.T).tril() @ basis
        assert outside.norm(dim=1).max() < 2e-6


def turned(rows):
    """Mix rows by a rotation that leaves none as it is."""
    return torch.linalg.qr(torch.randn(len(rows), len(rows), generator=generator(), dtype=torch.float64)).Q @ rows


@pytest.mark.parametrize("ratio", [0.95, 0.9, 0.8, 0.75, 0.6])
def test_rows_that_cancel_are_orthonormalised_twice(ratio):
    # Z of a block far from the Ritz vectors: its last rows are differences of much longer ones.
    matrix = operator_matrix(900, 700, ratio=ratio, rank=8)
    block = turned(orthonormal_rows(8, 700, 3)).float()
    operator = MapOperator(matrix)
    step = step_of(operator, block)
    check_step(step, operator.matrix.detach().double())
    # The reference takes over where the compiled iteration declined.
    assert operator.n_applied == (2 if ratio == 0.6 else 1)  # cancellation of 1e3 is left to the reference


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-8, 1e-3, 1e3, 1e6, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("r", [1, 8])
def test_any_magnitude(r, scale):
    matrix = scale * operator_matrix(2000, 1500, top=1.0)
    operator = MapOperator(matrix)
    step = step_of(operator, orthonormal_rows(r, 1500).float(), 30)
    assert step.sigma.item() == pytest.approx(scale, rel=1e-5)
    check_step(step, operator.matrix.detach().double())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_low_rank(rank):
    operator = MapOperator(operator_matrix(900, 700, rank=rank) if rank else torch.zeros(900, 700))
    block = start = orthonormal_rows(8, 700).float()
    for _ in range(10):
        step = step_of(operator, block)
        block = step.vectors[0]
        assert (block @ block.T - torch.eye(8)).abs().max() < 5 * ORTHONORMAL  # the reference's Householder
    assert step.sigma.item() == pytest.approx(3.0 if rank else 0.0, rel=1e-6)
    if rank == 0:
        assert torch.equal(block, start)
        assert step.left[0].count_nonzero() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(bad):
    matrix = operator_matrix(900, 700)
    matrix[5, 7] = bad
    block = orthonormal_rows(8, 700).float()
    step = step_of(MapOperator(matrix), block.clone())
    assert step.sigma.isnan().all()
    assert torch.equal(step.vectors[0], block)


def test_maps_that_return_views_and_the_callers_own_tensor():
    matrix = operator_matrix(900, 700)
    block = orthonormal_rows(8, 700).float()
    expected = step_of(MapOperator(matrix), block)
    torch.testing.assert_close(step_of(MapOperator(matrix, view=True), block).vectors[0], expected.vectors[0])

    class Same(MapOperator):
        apply = adjoint = lambda self, rows: rows  # the identity, without a copy

    kept = block.clone()
    step = step_of(Same(torch.eye(700)), block)
    assert step.sigma.item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(block, kept)


def test_the_blocks_version_tells_autograd_of_the_writing():
    images, products = torch.randn(4, 50), torch.randn(4, 30)
    version = products._version
    assert CompiledRows(4, 50, 30).finish(images, products) is not None
    assert products._version > version


@pytest.mark.parametrize(
    ("block", "backend"),
    [
        (orthonormal_rows(4, 50), None),  # fp64
        (orthonormal_rows(17, 50).float(), None),
        (orthonormal_rows(4, 50).float().to("meta"), None),
        (orthonormal_rows(4, 50).float(), "reference"),
    ],
)
def test_what_is_left_to_the_reference(block, backend):
    assert compiled_rows(block, 60, 50, backend) is None


def test_the_environment_variable_forces_the_reference(monkeypatch):
    for backend, is_served in (("", True), ("reference", False)):
        monkeypatch.setenv("LIGHTNING_LIP_BACKEND", backend)
        assert (compiled_rows(orthonormal_rows(4, 50).float(), 60, 50) is not None) == is_served


def conv_norms(backend=None):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2), nn.ConvTranspose2d(8, 4, 3, stride=2)]
    sizes = [(3, 20, 20), (8, 20, 20), (8, 9, 9)]
    operators = [ConvolutionOperator(str(i), c, s) for i, (c, s) in enumerate(zip(convs, sizes, strict=True))]
    return SpectralNorms(operators, backend=backend)


def test_convolutions_are_tracked_as_by_the_reference():
    compiled, expected = conv_norms(), conv_norms("reference")
    for _ in range(5):
        torch.testing.assert_close(compiled.step().sigma, expected.step().sigma, rtol=2e-6, atol=0)
        for norms in (compiled, expected):
            for op in norms.operators:
                with torch.no_grad():
                    op.module.weight.mul_(1.1).add_(0.01)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_headers_of_their_own_and_go_on_from_the_same_blocks(copied):
    rows = CompiledRows(4, 50, 30)
    images, products = torch.randn(4, 50), torch.randn(4, 30)
    other = copied(rows)
    assert other._header_address != rows._header_address
    assert other.finish(images, products.clone())[0] == rows.finish(images, products.clone())[0]
    norms = conv_norms()
    norms.step()
    assert torch.equal(copied(norms).step().sigma, norms.step().sigma)


@pytest.mark.parametrize(
    "images", [torch.ones(4, 51), torch.ones(4, 50, dtype=torch.float64), torch.ones(50, 4).T, torch.ones(3, 50)]
)
def test_other_rows_are_refused(images):
    with pytest.raises(ValueError, match=r"contiguous fp32 rows of shape \(4, 50\)"):
        CompiledRows(4, 50, 30).finish(images, torch.ones(4, 30))


def test_a_forked_process_works_without_the_pool():
    images, products = torch.randn(8, 20_000), torch.randn(8, 9_000)

    def finish(products):
        """Return sigma and the number of threads that served."""
        torch.set_num_threads(2)
        rows = CompiledRows(8, 20_000, 9_000)
        return rows.finish(images, products)[0].item(), int(rows._header[compiled.THREADS])

    sigma, n_threads = finish(products.clone())
    assert n_threads == (2 if pool.pool_address() else 1)
    # Copied here: in the child torch's own threads are gone.
    assert in_a_fork(finish, products.clone()) == (sigma, 1)


def test_compiled_code_is_cached_between_processes():
    CompiledRows(2, 2, 2)
    use = "from lightning_lip.kernels.cpu.rows import CompiledRows; CompiledRows(2, 2, 2)"
    assert cache_hits_and_misses(use, "rows") == (1, 0)
