"""The scoreboard from its plan to its files: settings chosen on validation, then three seeds on the test images."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lip.bench.scoreboard import evaluation
from lightning_lip.bench.scoreboard.data import Part, load
from lightning_lip.bench.scoreboard.methods import METHODS, Setting
from lightning_lip.bench.scoreboard.networks import NETWORKS, exported
from lightning_lip.bench.scoreboard.plan import TUNING_SEED, Board, Job, Plan
from lightning_lip.bench.scoreboard.report import figure, print_tables, row, write_rows
from lightning_lip.bench.scoreboard.training import Training, step_times, train
from lightning_lip.projection.layers import LinAlgError
from lightning_lip.reporting.console import make_console, print_line
from lightning_lip.reporting.documents import machine, replacing, versions, write_json
from lightning_lip.reporting.failures import in_one_line
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.processes import one_thread
from lightning_lip.reporting.progress import map_with_progress

PACKAGES = ("lightning-lip", "numpy", "scipy", "deel-torchlip", "orthogonium", "mlxtend")


@dataclass(frozen=True)
class Outcome:
    """What became of a training.

    Attributes:
        certified: Certified accuracy at :meth:`Board.eps`, of which the first is the accuracy; zeros for a training
            that failed.
        by_numpy: The same by the independent norms; empty where settings are chosen, as all that follows.
        attacked: Accuracy under the attack at the radii.
        n_certified: Samples that are certified at the radii, in all.
        n_broken: Of these, those that the attack breaks.
        excess: By how much the certified norm exceeds the independent one, relative.
        error: Why the training failed, empty for one that ended.
    """

    certified: list[float]
    by_numpy: list[float]
    attacked: list[float]
    n_certified: int
    n_broken: int
    excess: float
    error: str = ""


def outcome_from_json(found: dict[str, Any]) -> Outcome:
    """Return what JSON gives for an outcome as one."""
    return Outcome(**found)


def run_job(job: Job) -> Outcome:
    """Train and evaluate, on one thread."""
    with one_thread():
        board, data = job.board, load(job.board.data)
        training = _prepared(board, job.method, job.setting, job.seed)
        error = ""
        try:
            train(training, data.fit, job.steps, job.seed)
        except LinAlgError as failure:
            error = in_one_line(failure)
        except ValueError:
            if _is_finite(training.network):  # what is projected must be
                raise
        network = exported(training.network)
        if not _is_finite(network):
            error = "it diverged"
        if error:
            nothing = [0.0] * len(board.eps())
            final = (nothing, [0.0] * len(board.radii)) if job.is_final else ([], [])
            return Outcome(nothing, *final, 0, 0, 0.0, error)
        return _evaluated(job, network)


def _is_finite(network: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def _evaluated(job: Job, network: nn.Sequential) -> Outcome:
    board, data = job.board, load(job.board.data)
    example = data.fit.inputs[:1]
    norms = evaluation.norms_of(network, example)
    if not job.is_final:
        certified = evaluation.certified(network, norms, data.validation, board.eps())
        return Outcome(certified, [], [], 0, 0, 0.0)
    certified = evaluation.certified(network, norms, data.test, board.eps())
    independent = evaluation.independent_norm(network, example)
    by_numpy = evaluation.by_numpy(network, independent, data.test, board.eps())
    attacked, n_certified, n_broken = [], 0, 0
    for radius in board.radii:
        is_kept = evaluation.attacked(network, data.test, radius)
        attacked.append(float(is_kept.float().mean()))
        n_certified += round(certified[board.eps().index(radius)] * len(is_kept))
        lost = Part(data.test.inputs[~is_kept], data.test.targets[~is_kept])
        n_broken += round(evaluation.certified(network, norms, lost, [radius])[0] * len(lost.targets))
    excess = norms.features / independent - 1
    return Outcome(certified, by_numpy, attacked, n_certified, n_broken, excess)


def _prepared(board: Board, method: str, setting: Setting, seed: int) -> Training:
    data = load(board.data)
    torch.manual_seed(seed)
    network = NETWORKS[board.network](METHODS[method].layers(), data.fit.inputs.shape[1:], data.n_classes)
    return METHODS[method].prepare(network, data.fit.inputs[:1], setting)


def measured(board: Board, methods: tuple[str, ...]) -> list[float]:
    """Return the CPU milliseconds of a step of each method, at the middle one of its settings."""
    with one_thread():
        settings = [METHODS[name].settings() for name in methods]
        middle = [each[len(each) // 2] for each in settings]
        made = [_prepared(board, name, setting, TUNING_SEED) for name, setting in zip(methods, middle, strict=True)]
        return step_times(made, load(board.data).fit)


def with_steps(plan: Plan, step_ms: list[list[float]]) -> Plan:
    """Return a plan with the steps that its budgets come to."""
    steps = tuple(
        tuple(board.budget.steps(ms, len(load(board.data).fit.targets)) for ms in times)
        for board, times in zip(plan.boards, step_ms, strict=True)
    )
    return replace(plan, step_ms=tuple(map(tuple, step_ms)), steps=steps)


def chosen(plan: Plan, outcomes: dict[str, Outcome], board: Board, method: str, radius: float) -> Job:
    """Return the tuning job with the largest certified accuracy on validation; the accuracy decides between equals."""
    jobs = [job for job in plan.jobs() if (job.board, job.method) == (board, method)]
    index = board.eps().index(radius)

    def key(job: Job) -> tuple[float, float]:
        certified = outcomes[repr(job)].certified
        return certified[index], certified[0]

    return max(jobs, key=key)


def final_jobs(plan: Plan, outcomes: dict[str, Outcome]) -> list[Job]:
    """Return the trainings of the chosen settings, each once."""
    jobs: dict[Job, None] = {}
    for board in plan.boards:
        for method in plan.methods:
            for radius in board.radii:
                best = chosen(plan, outcomes, board, method, radius)
                jobs.update(dict.fromkeys(replace(best, seed=seed, is_final=True) for seed in plan.seeds))
    return list(jobs)


def document(plan: Plan, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Return what scoreboard.json says of the outcomes of a plan.

    Returns:
        ``boards``: of each its ``title``, its ``radii``, ``eps`` (where the curves have points) and ``rows``, one for
        each method and radius: the columns of the CSV file, ``title`` and ``curve``, the mean certified accuracy at
        ``eps``. ``checks``: ``n_certified`` and ``n_broken`` by the attack, the ``least_excess`` and
        ``largest_excess`` of certified over independent norms, and the ``largest_difference`` of the certified
        accuracies by both. ``failed``: trainings that did not end, and why. ``missing``: methods that were left out,
        and what they need.
    """
    boards = []
    for board, step_ms in zip(plan.boards, plan.step_ms, strict=True):
        known = {"data": board.data, "network": board.network, "budget": board.budget.amount}
        rows = []
        for radius in board.radii:
            for name, ms in zip(plan.methods, step_ms, strict=True):
                method, best = METHODS[name], chosen(plan, outcomes, board, name, radius)
                finals = [outcomes[repr(replace(best, seed=seed, is_final=True))] for seed in plan.seeds]
                values = {
                    **known,
                    "unit": board.budget.unit,
                    "radius": radius,
                    "method": name,
                    "title": method.title,
                    "group": method.group,
                    "step_ms": ms,
                    "steps": best.steps,
                    "setting": method.described(best.setting),
                    "validation": outcomes[repr(best)].certified[board.eps().index(radius)],
                }
                rows.append(row(values, finals, board.eps(), board.radii))
        boards.append({"title": str(board), "radii": list(board.radii), "eps": board.eps(), "rows": rows})
    finals = [outcomes[repr(job)] for job in final_jobs(plan, outcomes)]
    differences = [abs(a - b) for o in finals for a, b in zip(o.certified, o.by_numpy, strict=True)]
    checks = {
        "n_certified": sum(outcome.n_certified for outcome in finals),
        "n_broken": sum(outcome.n_broken for outcome in finals),
        "least_excess": min(outcome.excess for outcome in finals),
        "largest_excess": max(outcome.excess for outcome in finals),
        "largest_difference": max(differences),
    }
    jobs = [*plan.jobs(), *final_jobs(plan, outcomes)]
    failed = {str(job): error for job in jobs if (error := outcomes[repr(job)].error)}
    missing = {name: needs for name, method in METHODS.items() if (needs := method.missing())}
    return {"boards": boards, "checks": checks, "failed": failed, "missing": missing, "n_seeds": len(plan.seeds)}


def run(plan: Plan, folder: Path, workers: int) -> dict[str, Any]:
    """Run a plan, print its tables and write scoreboard.csv, scoreboard.json and scoreboard.png.

    First the time of a step of each method is measured, from which the steps of a training follow, the same whatever
    else the machine does then. Each finished training stays in scoreboard.partial.jsonl until the end: the same plan
    goes on from there.

    Args:
        plan: What to run.
        folder: Where the files go; made if missing.
        workers: Processes of one thread each.

    Returns:
        The contents of scoreboard.json: what :func:`document` returns, ``versions``, ``machine`` and ``seconds``.

    Raises:
        RunError: If a training fails.
        OSError: If a file cannot be written.
    """
    console = make_console(160)
    start = time.monotonic()
    for board in plan.boards:
        load(board.data)  # what is missing is told before anything is trained
    about = versions(*PACKAGES)
    times = Finished[list[float]](folder / "times.partial.jsonl", (plan, about), list)
    step_ms = [times.once(str(board), partial(measured, board, plan.methods)) for board in plan.boards]
    plan = with_steps(plan, step_ms)
    finished = Finished(folder / "scoreboard.partial.jsonl", (plan, about), outcome_from_json)
    print_line(console, cost(plan, workers))
    map_with_progress(console, "choosing settings", run_job, plan.jobs(), workers, finished)
    jobs = final_jobs(plan, finished.results)
    map_with_progress(console, "testing", run_job, jobs, workers, finished)
    found = document(plan, finished.results)
    found |= {"versions": about, "machine": machine(), "seconds": round(time.monotonic() - start, 1)}
    print_tables(console, found)
    write_rows(found, folder / "scoreboard.csv")
    with replacing(folder / "scoreboard.png") as beside:
        figure(found["boards"]).savefig(beside)
    write_json(found, folder / "scoreboard.json", indent=1)
    finished.remove()
    times.remove()
    return found


def cost(plan: Plan, workers: int) -> str:
    """Return what a plan takes at most, in words."""
    n_trainings = sum(plan.n_trainings(board) * len(plan.methods) for board in plan.boards)
    minutes = plan.seconds() / 60
    processes = "1 worker" if workers == 1 else f"{workers} workers"
    return (
        f"At most {n_trainings} trainings of {len(plan.methods)} methods, {minutes:.0f} CPU minutes beside their "
        f"evaluation: about {minutes / workers:.0f} minutes with {processes} on idle cores. Interrupt it at any time: "
        "it goes on where it was."
    )
