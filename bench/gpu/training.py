"""Whole training steps under Lightning's Trainer, and its strategies on a GPU."""

from __future__ import annotations

from lightning_lip import LipschitzMonitor, LipschitzPenalty
from lightning_lip.bench.contenders.models import MODELS, BenchModel, gpt2_blocks, mlp
from lightning_lip.bench.contenders.peers import penalty, plain, task_of
from lightning_lip.bench.contenders.training import fit
from lightning_lip.bench.gpu.kernels import BLOCK_SIZES
from lightning_lip.bench.gpu.measuring import DEVICE, DRY, SIZES, record
from lightning_lip.bench.steps.measure import N_BEFORE, PLAIN, in_turn, percentiles

WHOLE = MODELS | {
    "paper": BenchModel("the paper's MLP", lambda: mlp(*SIZES), (13,), 50),
    "gpt2-12": BenchModel("GPT-2 small", lambda: gpt2_blocks(12), (512, 768), 8, pattern="*.mlp.*"),
}


def steps(name: str, precision: str) -> None:
    """Time whole steps without and with the penalty, in turn, and the penalty's own time on the device."""
    task, batch = task_of(WHOLE[name], DEVICE)
    contenders = {PLAIN: plain(task)} | {f"r={r}": penalty(r)(task) for r in BLOCK_SIZES}
    first = {}
    for key, contender in contenders.items():
        first[key] = fit(contender.training, contender.callbacks, batch, N_BEFORE, 1, precision)
    times = in_turn(contenders, first, batch, 0.0 if DRY else 12.0, precision)
    ms = {key: [round(1e3 * s, 4) for s in percentiles(found.steps)] for key, found in times.items()}
    own = {key: round(1e3 * percentiles(found.own)[1], 4) for key, found in times.items() if found.own}
    record(model=name, precision=precision, ms=ms, own_ms=own)


def strategy(name: str, precision: str) -> None:
    """Train with the penalty and the monitor in one process under a strategy: DDP is over NCCL, on a CPU over gloo."""
    task, batch = task_of(WHOLE["paper"], DEVICE)
    contender = penalty(8)(task)
    (callback,) = contender.callbacks
    assert isinstance(callback, LipschitzPenalty)
    # More steps than the default interval of logging, so that the monitor acts.
    n_steps = 1 if DRY else 100
    seconds, _ = fit(contender.training, [callback, LipschitzMonitor()], batch, 1, n_steps, precision, name)
    record(strategy=name, precision=precision, ms=1e3 * seconds, product=callback.regularizer.bound().item())
