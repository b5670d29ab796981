"""The plan of a visit, and its run: ``bash bench/gpu/visit.sh``, or ``python -m lightning_lip.bench.gpu.visit``.

Each step runs in a process of its own, so that one that fails, hangs or loses the device does not end the visit. All
of them together keep to $BUDGET seconds (480): what comes too late is skipped. $OUT (the present folder) gets
results.jsonl, summary.txt and pytest.xml, from visit.sh also log.txt. ``DEV=cpu`` is a dry run, for machines without a
GPU: Triton interprets the kernels, and every size is the smallest.

A step leaves lines in results.jsonl, the last of which has `done`, `failed` or `skipped`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from lightning_lip.bench.gpu import ceilings, correctness, graphs, kernels, training
from lightning_lip.bench.gpu.measuring import DRY, out, record
from lightning_lip.reporting.documents import write_text

SHORTEST = 8.0
"""Seconds: a step with less time left is skipped."""

PATIENCE = 4 if DRY else 1
"""Over the limits of the steps, which are those of a GPU."""


class Step(NamedTuple):
    """One step of the plan.

    Attributes:
        limit: Seconds after which it is killed; a dry run allows more.
        work: A function that can be imported, called in a process of its own.
        arguments: Its arguments, which also name the step.
        needs_gpu: Whether a dry run skips it.
    """

    limit: float
    work: Callable[..., object]
    arguments: tuple[object, ...] = ()
    needs_gpu: bool = False

    @property
    def name(self) -> str:
        """Module, function and arguments: `kernels.step 4 x 4096^2 float32`."""
        function = f"{self.work.__module__.rpartition('.')[2]}.{self.work.__name__}"
        return " ".join([function, *map(str, self.arguments)])


FIRST = Step(90, ceilings.about)
"""It also waits for the imports of the fork server."""

LARGE = () if DRY else ("784-1024^3-10", "4 x 4096^2")
MODES = (None,) if DRY else (None, "reduce-overhead")

PLAN = [
    Step(90, kernels.warm),
    Step(30, correctness.smoke),
    *(Step(30, correctness.against_fp64, (name, dtype)) for name in correctness.SHAPES for dtype in kernels.DTYPES),
    Step(20, ceilings.memory),
    Step(20, ceilings.matrix_product),
    Step(90, correctness.own_tests, needs_gpu=True),
    *(Step(25, kernels.step, (name, dtype)) for name in kernels.SHAPES for dtype in kernels.DTYPES),
    *(Step(15, graphs.waits, (name,), case.needs_gpu) for name, case in graphs.CASES.items()),
    *(Step(15, kernels.spectral_norm, (name,)) for name in (kernels.SMALL, *LARGE)),
    Step(40, training.steps, ("gpt2-12", "bf16-mixed"), needs_gpu=True),
    Step(40, training.steps, ("paper", "32-true")),
    Step(40, training.steps, ("resnet18", "32-true"), needs_gpu=True),
    Step(20, graphs.whole_step),
    Step(30, training.strategy, ("ddp", "32-true")),
    Step(30, training.strategy, ("ddp", "16-mixed"), needs_gpu=True),
    Step(30, training.strategy, ("auto", "16-mixed"), needs_gpu=True),
    *(Step(15, kernels.by_kernel, (name, dtype)) for name in kernels.SHAPES for dtype in kernels.DTYPES),
    *(Step(40, kernels.compiled_loop, (name, mode)) for name in (kernels.SMALL, *LARGE[1:]) for mode in MODES),
    Step(40, training.steps, ("gpt2-12", "32-true"), needs_gpu=True),
    Step(40, training.steps, ("mnist", "32-true"), needs_gpu=True),
    *(Step(60, correctness.sanitise, (tool,), needs_gpu=True) for tool in ("memcheck", "racecheck")),
]
"""What would be missed most comes first."""


def _work(step: Step) -> None:
    """Run a step in a child, the leader of a group of processes that is killed as a whole; record how it ended."""
    os.setsid()
    os.environ["VISIT_STEP"] = step.name
    start = time.monotonic()
    try:
        step.work(*step.arguments)
    finally:  # whatever is raised goes on, to the log
        kind, error, _ = sys.exc_info()
        ended = {"done": True} if kind is None else {"failed": f"{kind.__name__}: {error}"[:600]}
        record(**ended, seconds=round(time.monotonic() - start, 1))


def run_step(step: Step, limit: float, start: str = "forkserver") -> bool:
    """Run one step in a process of its own and record how it ended.

    Args:
        step: The step.
        limit: Seconds until it is killed.
        start: How Python starts the process. A fork server imports everything once, and each step is forked from it.

    Returns:
        Whether it ended well.
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload([training.__name__, graphs.__name__])
    print(f"== {step.name}, at most {limit:.0f} s", flush=True)
    process = context.Process(target=_work, args=(step,))  # type: ignore[attr-defined]
    process.start()
    process.join(limit)
    os.environ["VISIT_STEP"] = step.name
    if process.exitcode is None:
        process.kill()
        with suppress(ProcessLookupError):  # where it has not yet become the leader of its group
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        record(failed=f"killed after {limit:.0f} s")
    elif process.exitcode < 0 or process.exitcode > 1:
        record(failed=f"its process ended with {process.exitcode}")
    return bool(process.exitcode == 0)


def run(plan: Sequence[Step], budget: float) -> int:
    """Run the steps of a plan, one after the other, within a budget of seconds, and write the summary.

    Returns:
        How many failed.
    """
    end = time.monotonic() + budget
    # A fork server must not have started CUDA, which no child could use then; if importing did, each step imports anew.
    start = "forkserver"
    if not run_step(FIRST, PATIENCE * FIRST.limit):
        start, plan = "spawn", [FIRST, *plan]
    n_failed = 0
    for step in plan:
        limit = min(PATIENCE * step.limit, end - time.monotonic())
        os.environ["VISIT_STEP"] = step.name
        if DRY and step.needs_gpu:
            record(skipped="it needs a GPU")
        elif limit < SHORTEST:
            record(skipped=f"no time left of {budget:.0f} s")
        else:
            n_failed += not run_step(step, limit, start)
    write_text(summary(), out() / "summary.txt")
    return n_failed


def summary() -> str:
    """Return results.jsonl in words: first what failed and what was skipped, then a line for each result."""
    lines = (out() / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    text = [
        f"{kind.upper()} {row['step']}: {row[kind]}" for kind in ("failed", "skipped") for row in rows if kind in row
    ]
    for row in rows:
        if not {"done", "failed", "skipped", "smi"} & set(row):
            text.append(f"{row.pop('step')}: {json.dumps(row)}")
    return "\n".join(text) + "\n"


def main() -> int:
    """Make the visit; return 1 if a step failed."""
    # Asked of NVML: the usual question, whether there is a GPU, starts CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if DRY:
        os.environ |= {"TRITON_INTERPRET": "1", "LIGHTNING_LIP_BACKEND": "gpu"}
    n_failed = run(PLAN, float(os.environ.get("BUDGET", "480")))
    print((out() / "summary.txt").read_text(encoding="utf-8")[:12000], flush=True)
    return int(n_failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
