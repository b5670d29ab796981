"""The symbols of convolutions in the compiled CPU kernels, against the reference step by step."""

import copy
import math
import pickle

import pytest
import torch
from support.iterations import penalise
from support.symbols import random_geometry, random_kernel, start
from support.truth import blocks, generator

from lightning_lip.kernels import choose_backend, iterations_for
from lightning_lip.kernels.cpu import iteration as cpu
from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu import threads as pool
from lightning_lip.kernels.cpu.iteration import CpuIteration
from lightning_lip.kernels.reference import ReferenceIteration
from lightning_lip.kernels.symbol import Symbol, unpacked
from lightning_lip.kernels.waves import Geometry

# What is compared        bound   why
SIGMA = 5e-6  #           relative, as of matrices: fp32 rounds T and Z
GRADIENT = 2e-4  #        relative to the largest entry: the frequency of a flat peak is known to the root of rounding
STATE = 2e-3  #           entries of vectors and frequencies, for the same reason
BF16_GRADIENT = 2**-7  #  one rounding to 8 bits

ONE = (1, 1)
THREE = Geometry(20, 12, 1, (3, 3), ONE, ONE)
GEOMETRIES = {
    "3 x 3": THREE,
    "tall": Geometry(70, 3, 1, (3, 3), ONE, ONE),
    "wide": Geometry(3, 70, 1, (3, 3), ONE, ONE),
    "stride 2": THREE._replace(stride=(2, 2)),
    "no wider than the stride": Geometry(9, 5, 1, (2, 2), (2, 2), ONE),
    "1 x 1": Geometry(9, 5, 1, ONE, ONE, ONE),
    "1 x 3": Geometry(9, 5, 1, (1, 3), ONE, ONE),
    "even, dilated": Geometry(5, 9, 1, (4, 2), (1, 2), (2, 3)),
    "7 x 7, stride 2": Geometry(16, 3, 1, (7, 7), (2, 2), ONE),
    "1-d": Geometry(8, 6, 1, (5,), (1,), (1,)),
    "3-d": Geometry(6, 5, 1, (3, 2, 3), (1, 1, 1), (1, 1, 1)),
    "groups": Geometry(6, 5, 3, (3, 3), ONE, ONE),
    "one row a group": Geometry(1, 4, 5, (3, 3), ONE, ONE),
    "depthwise": Geometry(1, 1, 70, (3, 3), ONE, ONE),
    "depthwise, stride 2": Geometry(1, 1, 5, (5, 5), (2, 2), ONE),
    "depthwise with a multiplier": Geometry(2, 1, 7, (3, 3), ONE, ONE),
}


def pair(kernels, geometries, n_waves=8):
    """Return the reference and the compiled iteration of kernels, from the same states."""
    symbols = [Symbol(geometry, n_waves) for geometry in geometries]
    states = [start(k, g) for k, g in zip(kernels, geometries, strict=True)]
    return [kind(kernels, [s.clone() for s in states], symbols) for kind in (ReferenceIteration, CpuIteration)]


def gradient(iteration, kernel, dtype=torch.float32):
    grad = torch.zeros_like(kernel, dtype=dtype)
    iteration.rank_one_update_([grad], torch.ones(1))
    return grad.double()


def assert_same_step(reference, compiled, kernel, n_iterations, scales=None, state_bound=STATE):
    wanted = reference.power_step([kernel], n_iterations, scales)
    got = compiled.power_step([kernel], n_iterations, scales)
    torch.testing.assert_close(got.sigma, wanted.sigma, rtol=SIGMA, atol=0)
    expected = gradient(reference, kernel)
    torch.testing.assert_close(
        gradient(compiled, kernel), expected, rtol=0, atol=GRADIENT * float(expected.abs().max())
    )
    # Whose wave it is, and its phase, may differ: the two rank-one terms do not.
    outer = [s.left[0].view(2, -1).T @ s.right[0].view(2, -1) for s in (got, wanted)]
    torch.testing.assert_close(*outer, rtol=0, atol=GRADIENT * float(outer[1].abs().max()))
    if state_bound is not None:
        torch.testing.assert_close(
            got.vectors[0], wanted.vectors[0], rtol=0, atol=state_bound * max(1, float(wanted.sigma))
        )


@pytest.mark.parametrize("n_waves", [2, 8, 12])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_step_is_the_references(name, n_waves):
    geometry = GEOMETRIES[name]
    kernel = random_kernel(geometry)
    reference, compiled = pair([kernel], [geometry], n_waves)
    for n_iterations in (1, 0, 1, 1):
        # From the same state each: near-ties are decided by rounding, and would be followed.
        reference.vectors = [state.clone() for state in compiled.vectors]
        # The one row's u is a phase: the frequency of a flat f is not determined, nor are then its vectors.
        assert_same_step(reference, compiled, kernel, n_iterations, state_bound=STATE if geometry.rows > 1 else None)


@pytest.mark.parametrize("seed", range(20))
def test_random_configurations(seed):
    geometry = random_geometry(seed, sides=(1, 2, 8, 33))
    kernel, scale = random_kernel(geometry), torch.randn(geometry.groups * geometry.rows, generator=generator(seed))
    reference, compiled = pair([kernel], [geometry], 4 + seed % 9)
    for n_iterations in (1, 0, 1):
        reference.vectors = [state.clone() for state in compiled.vectors]  # see above
        assert_same_step(reference, compiled, kernel, n_iterations, [scale], state_bound=None)


def test_the_same_cells_are_chosen_for_many_steps():
    geometry = Geometry(24, 16, 1, (3, 3), ONE, ONE)
    kernel = random_kernel(geometry)
    reference, compiled = pair([kernel], [geometry], 6)
    for _ in range(12):
        before = unpacked(compiled.vectors[0].clone(), geometry)
        reference.vectors = [compiled.vectors[0].clone()]
        kernel = kernel * 1.001  # so that every cell that is worked on has another sigma
        wanted, got = reference.power_step([kernel], 1), compiled.power_step([kernel], 1)
        a, b = (unpacked(step.vectors[0], geometry) for step in (wanted, got))
        assert torch.equal(a.sigma != before.sigma, b.sigma != before.sigma)
        assert torch.equal(a.turn, b.turn)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_sigma_converges_to_the_references(name):
    geometry = GEOMETRIES[name]
    kernel = random_kernel(geometry)
    reference, compiled = pair([kernel], [geometry])
    wanted = reference.power_step([kernel], 150).sigma
    torch.testing.assert_close(compiled.power_step([kernel], 150).sigma, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["3 x 3", "groups", "depthwise", "7 x 7, stride 2"])
def test_bf16_kernels_and_gradients(name):
    geometry = GEOMETRIES[name]
    kernel = random_kernel(geometry).bfloat16()
    reference, compiled = pair([kernel], [geometry])
    got, wanted = compiled.power_step([kernel], 2), reference.power_step([kernel], 2)
    torch.testing.assert_close(got.sigma, wanted.sigma, rtol=SIGMA, atol=0)
    expected = gradient(reference, kernel)
    bound = BF16_GRADIENT * float(expected.abs().max())
    torch.testing.assert_close(gradient(compiled, kernel, torch.bfloat16), expected, rtol=0, atol=bound)
    torch.testing.assert_close(gradient(compiled, kernel, torch.float64), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("exponent", [-30, 30, -36, 35])
@pytest.mark.parametrize("name", ["3 x 3", "groups", "depthwise"])
def test_extreme_scales(name, exponent):
    geometry = GEOMETRIES[name]
    kernel = random_kernel(geometry)
    truth = pair([kernel], [geometry])[1].power_step([kernel], 60).sigma.double()
    scaled = kernel * 10.0**exponent
    compiled = CpuIteration([scaled], [start(kernel, geometry)], [Symbol(geometry, 8)])
    sigma = compiled.power_step([scaled], 60).sigma.double() / 10.0**exponent
    torch.testing.assert_close(sigma, truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["3 x 3", "groups", "depthwise"])
def test_a_kernel_that_is_zero_or_not_finite_keeps_its_vectors_and_recovers(name, value):
    geometry = GEOMETRIES[name]
    kernel = random_kernel(geometry)
    _, compiled = pair([kernel], [geometry])
    wanted = compiled.power_step([kernel], 60).sigma
    bad = torch.full_like(kernel, value)
    grad = torch.zeros_like(kernel)
    penalise(compiled, [bad], [grad], n_iterations=20)
    assert not grad.any()
    sigma = compiled.last_step.sigma
    assert float(sigma) == 0 if value == 0 else sigma.isnan()
    states = compiled.vectors[0]
    if geometry.columns > 1:
        wave = unpacked(states, geometry)
        assert wave.v.isfinite().all()
        assert wave.w.isfinite().all()
        assert not wave.before.any()
    torch.testing.assert_close(compiled.power_step([kernel], 60).sigma, wanted, rtol=1e-5, atol=0)


def test_a_symbol_that_vanishes_in_cells_gives_no_nan():
    kernel = torch.ones(THREE.shape)
    _, compiled = pair([kernel], [THREE])
    sigma = compiled.power_step([kernel], 40).sigma
    assert float(sigma) == pytest.approx(9 * math.sqrt(12 * 20), rel=1e-5)
    assert compiled.vectors[0].isfinite().all()


@pytest.mark.parametrize("name", ["3 x 3", "stride 2", "groups"])
def test_channels_last(name):
    geometry = GEOMETRIES[name]
    kernel = random_kernel(geometry)
    _, compiled = pair([kernel], [geometry])
    moved = kernel.contiguous(memory_format=torch.channels_last)
    for of in (kernel, moved, kernel):  # as it may change between steps
        reference = ReferenceIteration([kernel], [compiled.vectors[0].clone()], [Symbol(geometry, 8)])
        assert_same_step(reference, compiled, of, 1)
        expected = gradient(reference, kernel)
        for like in (kernel, moved):
            got = gradient(compiled, like)
            torch.testing.assert_close(got, expected, rtol=0, atol=GRADIENT * float(expected.abs().max()))


def test_scales_of_rows_stay_until_there_are_others():
    kernel, scale = random_kernel(THREE), torch.linspace(-1, 2, 20)
    reference, compiled = pair([kernel], [THREE])
    for scales in ([scale], None, [scale.double() * 3], [None]):
        reference.vectors = [compiled.vectors[0].clone()]
        assert_same_step(reference, compiled, kernel, 1, scales, state_bound=None)


def test_penalise_of_matrices_and_convolutions_is_one_step():
    geometries = [None, THREE, GEOMETRIES["groups"], None, GEOMETRIES["depthwise"]]
    kernels = [torch.randn(9, 14, generator=generator(1)) if g is None else random_kernel(g) for g in geometries]
    symbols = [None if g is None else Symbol(g, 8) for g in geometries]
    starts = [blocks([k], 4)[0] if g is None else start(k, g) for k, g in zip(kernels, geometries, strict=True)]
    scales = [None, torch.rand(20, generator=generator(2)), None, None, torch.rand(70, generator=generator(3))]
    found = []
    for kind in (ReferenceIteration, CpuIteration):
        iteration = kind(kernels, [s.clone() for s in starts], symbols)
        grads = [torch.ones_like(k) for k in kernels]
        value = iteration.penalise_(kernels, grads, 2, 3, 1.0, 0.1, [1, 2, 1, 3, 1], scales)
        found.append([value, iteration.coefficients, *grads])
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["3 x 3", "groups", "depthwise"])
def test_a_copy_goes_on_from_the_same_state(name):
    geometry = GEOMETRIES[name]
    kernel = random_kernel(geometry)
    _, compiled = pair([kernel], [geometry])
    compiled.power_step([kernel], 3)
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        state = compiled.vectors[0].clone()
        wanted = twin.power_step([kernel], 2)
        assert torch.equal(compiled.vectors[0], state), "of its own"
        got = CpuIteration([kernel], [state], [Symbol(geometry, 8)]).power_step([kernel], 2)
        assert torch.equal(got.sigma, wanted.sigma)
        assert torch.equal(got.vectors[0], wanted.vectors[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_give_the_same_bit_for_bit(monkeypatch, dtype):
    monkeypatch.setattr(cpu, "PARALLEL", 1)
    monkeypatch.setattr(cpu, "PART", 64)
    monkeypatch.setattr(cpu, "GROUP", 400)
    kernels = [random_kernel(geometry).to(dtype) for geometry in GEOMETRIES.values()]
    symbols = [Symbol(geometry, 8) for geometry in GEOMETRIES.values()]
    states = [start(k, g) for k, g in zip(kernels, GEOMETRIES.values(), strict=True)]
    before = torch.get_num_threads()
    found = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        compiled = CpuIteration(kernels, states, symbols)
        grads = [torch.ones_like(k) for k in kernels]
        penalise(compiled, kernels, grads, "log", n_iterations=3, scale=0.1)
        if pool.pool_address():
            assert compiled._header[at.THREADS] == n_threads
        found.append([compiled.last_step.sigma, *compiled.vectors, *grads])
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_who_serves_a_symbol(monkeypatch):
    monkeypatch.delenv("LIGHTNING_LIP_BACKEND", raising=False)
    kernel = random_kernel(THREE)
    symbol = Symbol(THREE, 8)
    assert choose_backend(kernel, 8, None, symbol) == "cpu"
    assert choose_backend(kernel.bfloat16(), 8, None, symbol) == "cpu"
    assert choose_backend(kernel, 8, "reference", symbol) == "reference"
    assert choose_backend(kernel, 8, "gpu", symbol) == "reference", "nothing else serves all of them"
    assert choose_backend(kernel.double(), 8, None, symbol) == "reference"
    circular = Symbol(THREE._replace(sizes=(8, 8)), 8)
    assert choose_backend(kernel, 8, "cpu", circular) == "reference"
    assert "circulant" in CpuIteration.why_not(kernel, 8, circular)
    assert "at most 16 waves" in CpuIteration.why_not(kernel, 8, Symbol(THREE, 17))
    assert "contiguous" in CpuIteration.why_not(kernel[:, :, ::2, :2], 8, Symbol(THREE, 8))
    ((indices, iteration),) = iterations_for(
        [kernel, torch.ones(3, 4)], [start(kernel, THREE), torch.eye(3)[:1]], None, [symbol, None]
    )
    assert indices == [0, 1]
    assert isinstance(iteration, CpuIteration)


def test_what_does_not_fit_is_refused():
    kernel = random_kernel(THREE)
    symbol = Symbol(THREE, 8)
    with pytest.raises(ValueError, match=r"a state of shape \(20, 52\), got .*\(3, 3\)"):
        CpuIteration([kernel], [torch.eye(3)], [symbol])
    _, compiled = pair([kernel], [THREE])
    with pytest.raises(ValueError, match="a scale for each row of kernel 0"):
        compiled.power_step([kernel], 1, [torch.ones(19)])
    with pytest.raises(ValueError, match="construct a new iteration"):
        compiled.power_step([kernel[:10].clone()], 1)
    with pytest.raises(ValueError, match="can no longer serve weight 0"):
        compiled.power_step([kernel.double()], 1)
