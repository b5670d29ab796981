"""`lightning-lip bench`: its options, and what they choose."""

from __future__ import annotations

from typing import Any

from lightning_lip.bench.contenders.models import MODELS
from lightning_lip.bench.steps.run import chosen_device, run
from lightning_lip.errors import UsageError
from lightning_lip.reporting.documents import out_folder
from lightning_lip.reporting.extras import extra
from lightning_lip.reporting.failures import check_options

QUICK_MODELS = ("paper", "mnist")
MAX_THREADS = 1024


def bench(
    out: str = "lightning_lip_bench",
    models: str | None = None,
    quick: bool = False,
    device: str = "cpu",
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure what the penalty costs in whole training steps, beside its alternatives.

    Trains each model with Lightning's Trainer as it is, with LipschitzPenalty, and with torch's spectral_norm,
    deel-torchlip's layers, autograd through power and block iteration and through an SVD, and a gradient penalty, in
    turn in one run; then the penalty on networks of growing depth and width. Prints a table for each model: the time of
    a step, the memory added, the error of the norms, and what they guarantee; then what peers add over what the penalty
    adds. Leaves steps.csv, growth.csv, bench.json and the plots as PNG under --out. Needs
    pip install -e ".[bench]" in a checkout. An interrupted run goes on where it was when it is started again.

    Args:
        out: The folder for everything that is written; files of an earlier run are replaced.
        models: Names of the models with commas between them, of paper, mnist, resnet18, vit and gpt2; by default all
            (paper and mnist with --quick).
        quick: A few seconds a model, and small sizes only (under a minute in all): to see that it works, not to read
            the numbers.
        device: Where to train, cpu or cuda, or one GPU as cuda:1.
        threads: torch's threads on the CPU; by default torch's own choice.

    Returns:
        The contents of bench.json, documented at `lightning_lip.bench.steps.tables.document`.

    Raises:
        UsageError: If an option is of another type, a model is unknown, the device is not there, `out` is a file, or
            `threads` is out of range.
        MissingExtraError: If the `bench` extra is not installed, deel-torchlip aside, without which its row is missing.
    """
    check_options(bench, locals())
    names = chosen_models(models, quick)
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"Expected --threads to be 1 to {MAX_THREADS}, got {threads}.")
    folder = out_folder(out)
    for module in ("matplotlib", "scipy"):
        extra(module, "bench")
    return run(names, folder, quick=quick, device=chosen_device(device), threads=threads)


def chosen_models(models: str | None, quick: bool) -> tuple[str, ...]:
    """Return the names of the models to measure, in the order of `MODELS`.

    Raises:
        UsageError: If one is unknown, or none is named.
    """
    if models is None:
        return QUICK_MODELS if quick else tuple(MODELS)
    wanted = [name.strip() for name in models.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in MODELS]
    if unknown or not wanted:
        raise UsageError(
            f"Expected --models to name some of {', '.join(MODELS)}, with commas between them, got {models!r}."
        )
    return tuple(name for name in MODELS if name in wanted)
