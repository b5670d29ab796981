"""Whether the kernels are right on this device: against fp64 on the CPU, under the tests, under the sanitiser."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_lip.bench.gpu.measuring import DEVICE, DRY, out, record
from lightning_lip.bench.studies.kernels import MODELS, kernel, parameters, start_blocks
from lightning_lip.kernels import PENALTY_CODES, iterations_for, power_step
from lightning_lip.kernels.gpu.iteration import GpuIteration

SHAPES = (
    {"small": [(20, 13), (1, 17)]}
    if DRY
    else {
        "small": [(1, 1), (1, 17), (20, 13), (20, 20), (257, 1000), (130, 300)],
        "wide": [(1024, 1024), (64, 4096), (4100, 4096), (768, 3072), (2048, 2048)],
        "odd": [(1023, 777), (33, 1), (5000, 30), (129, 2047)],
    }
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda w: w.clone(),
    "transposed": lambda w: w.mT.contiguous().mT,
    "unaligned": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape),
}
BLOCK_SIZES = (8,) if DRY else (1, 2, 8, 16)
MAX_SIGMA_ERROR = 3e-6
"""Relative, of two iterations from the same block in fp64 on the CPU: rounding in fp32."""
MAX_GRAM_ERROR = 1e-5
"""Of an element of V V^T against the identity."""
ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = ("kernels/gpu/test_device.py", "metrics/test_noisy_mae.py", "metrics/test_certified_accuracy.py")
"""Below tests/. `-m gpu` over all of them stops where jsonargparse is missing, which some files import."""


def smoke() -> None:
    """Make one step of the paper's network: the least that must work."""
    value = kernel(parameters(MODELS["MLP 13-20-20-20-1"], DEVICE.type), 8)()
    record(penalty=float(value))  # type: ignore[arg-type]


def against_fp64(name: str, dtype: str) -> None:
    """Compare two iterations and their update with the reference in fp64; repeat two penalised steps bit for bit.

    Raises:
        RuntimeError: If a case is wrong; all of them are recorded first.
    """
    n_wrong = 0
    for r in BLOCK_SIZES:
        for layout in LAYOUTS if (name, r) == ("small", 8) and not DRY else ("plain",):
            weights = [
                LAYOUTS[layout](w.detach()) for w in parameters(SHAPES[name], DEVICE.type, getattr(torch, dtype))
            ]
            found = _errors(weights, start_blocks(weights, r))
            right = found["sigma"] <= MAX_SIGMA_ERROR and found["gram"] <= MAX_GRAM_ERROR and found["repeats"]
            n_wrong += not right
            record(r=r, layout=layout, right=bool(right), **found)
    if n_wrong:
        raise RuntimeError(f"{n_wrong} cases are wrong: see results.jsonl.")


def _errors(weights: list[Tensor], start: list[Tensor]) -> dict[str, float]:
    exact, block = ([x.double().cpu() for x in xs] for xs in (weights, start))
    want = power_step(exact, block, 2)
    iteration = _poisoned(weights, start)
    step = iteration.power_step(weights, 2)
    grads = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    iteration.rank_one_update_(grads, torch.ones(len(weights), device=DEVICE))
    outer = [torch.outer(u, v) for u, v in zip(want.left, want.right, strict=True)]
    first, second = (_penalised(weights, start) for _ in range(2))
    return {
        "sigma": float(((step.sigma.double().cpu() - want.sigma).abs() / want.sigma).max()),
        "gram": max(float((v @ v.mT - torch.eye(len(v), device=DEVICE)).abs().max()) for v in step.vectors),
        "update": max(float((g.double().cpu() - uv).norm()) for g, uv in zip(grads, outer, strict=True)),
        "repeats": all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
    }


def _poisoned(weights: Sequence[Tensor], start: Sequence[Tensor]) -> GpuIteration:
    """Return an iteration whose buffers are NaN, the vectors aside: what is read before it is written shows."""
    ((_, iteration),) = iterations_for(weights, start, "gpu")
    assert isinstance(iteration, GpuIteration)
    vectors = iteration.vectors[0].untyped_storage().data_ptr()
    for buffer in vars(iteration).values():
        if isinstance(buffer, Tensor) and buffer.is_floating_point() and buffer.untyped_storage().data_ptr() != vectors:
            buffer.fill_(math.nan)
    return iteration


def _penalised(weights: Sequence[Tensor], start: Sequence[Tensor]) -> list[Tensor]:
    """Return the vectors and gradients after two penalised steps."""
    iteration = _poisoned(weights, start)
    grads = [torch.ones_like(w) for w in weights]
    for _ in range(1 if DRY else 2):
        iteration.penalise_(weights, grads, 1, PENALTY_CODES["softplus_log"], 1.0, 0.3, [1] * len(weights))
    return [*iteration.vectors, *grads]


def own_tests() -> None:
    """Run the tests that need a GPU, and leave pytest.xml.

    Raises:
        RuntimeError: If one fails.
    """
    # Not in the checkout, where `kernels` would be found as a top-level package.
    files = [str(ROOT / "tests" / name) for name in GPU_TESTS]
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={out() / 'pytest.xml'}", f"--rootdir={ROOT}"]
    _run([sys.executable, "-m", "pytest", *files, *options, "-c", str(ROOT / "pyproject.toml")])


def sanitise(tool: str) -> None:
    """Make one step under a tool of compute-sanitizer.

    Raises:
        RuntimeError: If it finds something.
    """
    _run(["compute-sanitizer", "--error-exitcode", "9", "--tool", tool, sys.executable, "-m", __name__])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-5000:], done.stderr[-2000:], flush=True)
    record(returncode=done.returncode, last=done.stdout.strip().splitlines()[-12:])
    if done.returncode:
        raise RuntimeError(f"{os.path.basename(command[0])} ended with {done.returncode}.")


if __name__ == "__main__":
    smoke()
