import io
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console

import lightning_lip
from lightning_lip.errors import UsageError
from lightning_lip.paper import PaperRegressor, command
from lightning_lip.paper.data import DataError, Dataset, checked, load_boston, split
from lightning_lip.paper.regimes import claims, experiment, figures, report, settings, tuning
from lightning_lip.paper.regimes.settings import (
    LAMBDAS,
    METRICS,
    NOISE_LEVELS,
    PAPER_SETTING,
    REGIMES,
    Record,
    Run,
    Setting,
    run_for,
    table_of,
    validation_key,
)
from lightning_lip.paper.regimes.training import artefacts_of, train
from lightning_lip.paper.statistics import (
    Comparison,
    Interval,
    can_decide,
    compare,
    epochs_to,
    holm,
    interval,
    low_level,
    sign_test,
    wilcoxon,
)
from lightning_lip.reporting.extras import MissingExtraError, extra
from lightning_lip.reporting.processes import RunError, map_tasks
from lightning_lip.reporting.progress import progress

FIRST_HEAVY, LAST_HEAVY = (3.0, 2.0, 2.0, 1.0), (2.0, 2.0, 3.0, 1.0)


def record(regime, seed, error, *, sigmas=FIRST_HEAVY, n_clipped=0, fast=True, epochs=8):
    """A record whose errors fall from 20 to `error`, in 2 epochs or only at the last but one."""
    curve = [20.0 if epoch < (2 if fast else epochs - 2) else error for epoch in range(epochs)]
    history = {name: list(curve) for name in (*METRICS, "train_mse")}
    return Record(Run(regime, seed, epochs=epochs), history, sigmas, 2.5, n_clipped)


def synthetic(errors, n_seeds=10, **changes):
    """A table with a mean error by regime; seeds differ by more than the regimes do, as splits do."""
    rng = np.random.default_rng(1)  # a draw in which equal regimes do not happen to differ
    by_seed = rng.normal(0, 1, n_seeds)
    table = {}
    for regime in REGIMES:
        noise = rng.normal(0, 0.02, n_seeds)
        table[regime] = [
            record(regime, seed, errors[regime] + by_seed[seed] + noise[seed], **changes.get(regime, {}))
            for seed in range(n_seeds)
        ]
    return table


EQUAL = dict.fromkeys(REGIMES, 5.0)
PRODUCT_BEST = EQUAL | {"product": 4.0}
PRODUCT_WORST = EQUAL | {"product": 6.0}
AS_CLAIMED = {"layer": {"sigmas": LAST_HEAVY, "fast": False}}


@pytest.fixture(scope="module")
def boston():
    return load_boston()


def test_boston_is_the_paper_s(boston):
    assert boston.inputs.shape == (506, 13)
    assert boston.target.shape == (506,)
    assert boston.inputs[:, 11].max() == pytest.approx(396.9)  # column B is there


@pytest.mark.parametrize(
    "wrong",
    [
        lambda d: Dataset(d.inputs[:, :12], d.target),
        lambda d: Dataset(d.inputs, d.target + 1),
        lambda d: Dataset(d.inputs, np.where(np.arange(506) == d.target.argmax(), 50.01, d.target)),
    ],
)
def test_other_data_are_refused(boston, wrong):
    with pytest.raises(DataError, match=r"\(506, 13\).*22.5328.*16 targets"):
        checked(wrong(boston))


def test_split_is_by_seed_and_covers_every_row_once(boston):
    first, again, other = split(boston, 3), split(boston, 3), split(boston, 4)
    assert (len(first.train_target), len(first.validation_target)) == (404, 102)
    assert np.array_equal(first.train_inputs, again.train_inputs)
    assert not np.array_equal(first.train_inputs, other.train_inputs)
    rows = np.column_stack([boston.inputs, boston.target])
    parts = np.vstack(
        [
            np.column_stack([first.train_inputs, first.train_target]),
            np.column_stack([first.validation_inputs, first.validation_target]),
        ]
    )
    assert np.array_equal(rows[np.lexsort(rows.T)], parts[np.lexsort(parts.T)])


def test_scaling_uses_the_training_rows_only(boston):
    raw, minmax, standardised = (split(boston, 0, scaling) for scaling in settings.SCALINGS)
    assert np.array_equal(raw.feature_max, raw.train_inputs.max(axis=0))
    assert (minmax.feature_min, minmax.feature_max) == (pytest.approx(0), pytest.approx(1))
    spread = raw.feature_max - raw.feature_min
    assert minmax.validation_inputs == pytest.approx((raw.validation_inputs - raw.feature_min) / spread)
    assert standardised.train_inputs.mean(axis=0) == pytest.approx(0, abs=1e-10)
    assert standardised.train_inputs.std(axis=0) == pytest.approx(1)
    assert np.array_equal(raw.train_target, standardised.train_target)


@pytest.mark.parametrize("scaling", ["minmax", "standardised"])
def test_a_constant_column_scales_to_zero(scaling):
    data = Dataset(np.column_stack([np.full(20, 7.0), np.arange(20.0)]), np.arange(20.0))
    parts = split(data, 0, scaling)
    assert not parts.train_inputs[:, 0].any()
    assert np.isfinite(parts.validation_inputs).all()


def test_an_unknown_scaling_is_refused(boston):
    with pytest.raises(ValueError, match=r"among .*'raw'.*got 'log'"):
        split(boston, 0, "log")


def test_a_missing_extra_names_the_remedy():
    with pytest.raises(MissingExtraError, match=r'pip install "lightning-lip\[paper\]"'):
        extra("lightning_lip_no_such_module.stats")


def test_interval_is_student_s():
    # Quantile of t with 4 degrees of freedom: 2.7764; standard deviation of 1..5: 1.5811.
    result = interval([1, 2, 3, 4, 5])
    assert (result.mean, result.half_width) == (3, pytest.approx(2.7764 * 1.5811 / 5**0.5, rel=1e-4))
    assert interval([2.0]) == Interval(2.0, math.inf)
    assert f"{Interval(1.234, 0.567):+.1f}" == "+1.2 ± 0.6"


def test_wilcoxon_is_exact_for_few_seeds():
    assert wilcoxon([-1, -2, -3, -4, -5], "less") == pytest.approx(1 / 32)
    assert wilcoxon([-1, -2, -3, -4, -5], "greater") == pytest.approx(1)
    assert wilcoxon([1, 2, 3, 4, 5], "two-sided") == pytest.approx(2 / 32)
    assert wilcoxon([0, 0, 0], "less") == 1


def test_holm_steps_down_and_stays_monotone():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_compare_is_paired_and_halves_ties():
    # Paired, the difference is -1 with little spread, although the seeds spread over 100.
    comparison = compare([0, 10.1, 99.9, 7], [1, 11, 101, 7])
    assert comparison.difference.mean == pytest.approx(-0.75)
    assert comparison.share_won == pytest.approx(3.5 / 4)
    assert comparison.n_seeds == 4
    assert comparison.p_less < comparison.p_two_sided


def test_sign_test_and_the_fewest_seeds():
    assert sign_test(5, 5) == pytest.approx(1 / 32)
    assert sign_test(0, 5) == 1
    assert (can_decide(4, 1), can_decide(5, 1), can_decide(7, 12), can_decide(8, 12)) == (False, True, False, True)


def test_epochs_to_a_level_that_both_curves_reach():
    fast, slow = [9, 4, 4, 3.9, 4.2], [9, 8, 7, 6, 5]
    level = low_level(fast, slow)
    assert level == pytest.approx(5.25)
    assert (epochs_to(fast, level), epochs_to(slow, level)) == (2, 5)
    with pytest.raises(ValueError, match=r"never reaches 1: its lowest value is 5"):
        epochs_to(slow, 1)


def verdicts(table):
    return {claim.letter: claim.verdict for claim in claims.judge(table)}


def test_all_claims_hold_where_the_records_say_so():
    assert verdicts(synthetic(PRODUCT_BEST, **AS_CLAIMED)) == dict.fromkeys("abcd", claims.HOLDS)


@pytest.mark.parametrize("errors", [EQUAL, PRODUCT_WORST])
def test_no_claim_holds_where_the_records_say_the_opposite(errors):
    table = synthetic(errors, product={"fast": False}, none={"sigmas": LAST_HEAVY})
    assert verdicts(table) == dict.fromkeys("abcd", claims.DOES_NOT_HOLD)


def test_few_seeds_leave_a_claim_undecided_unless_the_averages_contradict_it():
    assert verdicts(synthetic(PRODUCT_BEST, 3, **AS_CLAIMED)) == dict.fromkeys("abcd", claims.UNDECIDED)
    table = synthetic(PRODUCT_WORST, 3, product={"fast": False}, none={"sigmas": LAST_HEAVY})
    assert verdicts(table) == dict.fromkeys("abcd", claims.DOES_NOT_HOLD)


def test_best_means_better_than_every_rival():
    # Better than two rivals, as good as the third.
    assert verdicts(synthetic(PRODUCT_BEST | {"layer": 4.0}))["a"] == claims.DOES_NOT_HOLD


def test_best_at_every_eta_fails_with_one_eta():
    table = synthetic(PRODUCT_BEST)
    for row in table["product"]:
        row.history[validation_key(0.4)][-1] += 3
    assert verdicts(table)["a"] == claims.HOLDS
    assert verdicts(table)["b"] == claims.DOES_NOT_HOLD


def test_twice_as_fast_needs_twice():
    # 3 epochs against 5: surely faster, and not twice as fast.
    table = synthetic(EQUAL, layer={"fast": False, "epochs": 6}, product={"epochs": 6})
    (claim,) = (claim for claim in claims.judge(table) if claim.letter == "c")
    assert claims.epochs_ratios(table) == pytest.approx([5 / 3] * 10)
    assert claim.p_values["fewer epochs"] < 0.05
    assert claim.verdict == claims.DOES_NOT_HOLD


def test_findings_name_a_direction_only_where_a_test_shows_one():
    start = "MAE of product penalty against layer penalty: "
    lower, *_ = report.findings(synthetic(PRODUCT_BEST))
    assert re.match(start + r"lower in train \(-[01]\.\d+ ± 0\.0\d+, p = 0\.039\), eta 0 ", lower)
    assert "no difference shown" not in lower
    higher, *_ = report.findings(synthetic(PRODUCT_WORST))
    assert re.match(start + r"higher in train \(\+[01]\.\d+ ± 0\.0\d+, p = 0\.039\), eta 0 ", higher)
    for neutral in (*report.findings(synthetic(EQUAL)), *report.findings(synthetic(PRODUCT_BEST, 3))):
        assert "no difference shown in train, eta 0, eta 0.2, eta 0.4, eta 0.6" in neutral
        assert "lower" not in neutral
        assert "higher" not in neutral


@pytest.mark.parametrize(
    ("difference", "p_value", "words"),
    [(-1.0, 0.04, "lower"), (1.0, 0.04, "higher"), (-1.0, 0.05, "no difference shown"), (0.0, 0.01, "identical")],
)
def test_difference_in_words(difference, p_value, words):
    comparison = Comparison(Interval(difference, abs(difference)), 0.5, 0.5, 0.5, 10)
    assert report.difference_in_words(comparison, p_value) == words


def test_summary_counts_the_claims_that_hold():
    assert report.summary(claims.judge(synthetic(PRODUCT_BEST))).startswith("2 of 4 claims hold in this run: (a), (b)")
    none = report.summary(claims.judge(synthetic(EQUAL, none={"sigmas": LAST_HEAVY})))
    assert none == "None of the 4 claims is shown to hold in this run."


def test_notes_say_whether_max_norm_acted_and_what_three_norms_bound():
    idle = report.notes(PAPER_SETTING, synthetic(EQUAL))
    assert "MaxNorm 10 was never active; the largest norm of a unit at the end was 2.50." in idle
    assert any("the output layer is free" in note for note in idle)
    active = report.notes(Setting(n_norms=4), synthetic(EQUAL, maxnorm={"n_clipped": 3}))
    assert active[0].startswith("MaxNorm 10 rescaled a unit's weights 30 times")
    assert not any("the output layer is free" in note for note in active)


def test_the_report_shows_errors_norms_and_claims():
    console = Console(file=io.StringIO(), width=120)
    report.print_setting(console, PAPER_SETTING, synthetic(PRODUCT_BEST), LAMBDAS["raw/3/clean"])
    shown = console.file.getvalue()
    for part in ("0.0562", "3.000 (3.464)", "12.00 (12.31)", "the product penalty has the best training MAE: holds"):
        assert part in shown
    assert "\x1b" not in shown


def test_a_setting_without_coefficients_names_the_remedy():
    with pytest.raises(UsageError, match=r"minmax/3/clean.*--tune or --full"):
        run_for(Setting("minmax"), "layer", 0, LAMBDAS, 1)


def test_regimes_without_a_penalty_serve_several_settings():
    plan = command.plan(full=True, seeds=2)
    lambdas = {s.name: {"layer": 0.1 * i, "product": 0.2 * i} for i, s in enumerate(plan.settings, 1)}
    runs = experiment.reported_runs(plan, lambdas)
    # 3 scalings x 2 seeds for each regime without a penalty, 12 settings x 2 seeds for each with one.
    assert {regime: sum(run.regime == regime for run in runs) for regime in REGIMES} == {
        "none": 6,
        "layer": 24,
        "product": 24,
        "maxnorm": 6,
    }
    records = {run: record(run.regime, run.seed, 1.0) for run in runs}
    tables = [table_of(records, s, plan.seeds, lambdas, plan.epochs) for s in plan.settings[:2]]
    assert tables[0]["none"][0] is tables[1]["none"][0]
    assert tables[0]["product"][0] is not tables[1]["product"][0]


def test_plans():
    assert command.plan().settings == (PAPER_SETTING,)
    assert (len(command.plan().seeds), len(command.plan(quick=True).seeds)) == (10, 3)
    assert command.plan().tuned_settings == ()
    tuned = command.plan(tune=True)
    assert [s.name for s in tuned.tuned_settings] == ["raw/3/clean", "raw/3/noise"]
    full = command.plan(full=True)
    assert (len(full.settings), len(full.seeds), len(full.tuning_seeds)) == (12, 40, 20)
    assert not set(full.seeds) & set(full.tuning_seeds)


def test_the_coefficients_in_use_are_on_the_grid():
    for row in LAMBDAS.values():
        for coefficient in row.values():
            assert coefficient in settings.GRID


def test_tuning_takes_the_best_by_each_criterion():
    seeds = range(1000, 1002)
    wanted = [Setting(), Setting(criterion="noise")]
    runs = tuning.tuning_runs(wanted, seeds, 8)
    assert len(runs) == len(set(runs)) == 2 * len(settings.GRID) * 2  # both criteria read the same runs
    records = {}
    for run in runs:
        result = record(run.regime, run.seed, 5.0)
        # Clean: best at the third of the grid. Noisy: the larger the better.
        place = settings.GRID.index(run.coefficient)
        result.history[validation_key(0.0)][-1] += abs(place - 2)
        for level in NOISE_LEVELS[1:]:
            result.history[validation_key(level)][-1] -= 0.1 * place
        records[run] = result
    found = tuning.choose(records, wanted, seeds, 8)
    assert found.lambdas["raw/3/clean"] == dict.fromkeys(settings.PENALISED, settings.GRID[2])
    assert found.lambdas["raw/3/noise"] == dict.fromkeys(settings.PENALISED, settings.GRID[-1])
    assert found.at_the_edge == ["raw/3/noise, layer", "raw/3/noise, product"]
    assert len(found.sweeps) == 2
    assert tuning.sweeps_of(found, Setting(criterion="noise")) == list(found.sweeps)
    assert tuning.sweeps_of(found, Setting("minmax")) == tuning.sweeps_of(None, Setting()) == []
    json.dumps(found.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match=r"among .*'clean'.*got 'speed'"):
        tuning.choose(records, [Setting(criterion="speed")], seeds, 8)
    console = Console(file=io.StringIO(), width=120)
    report.print_lambdas(console, found)
    assert "the best value is at an end of the grid" in console.file.getvalue()


def test_every_regime_has_one_colour_in_every_figure(tmp_path):
    table = synthetic(PRODUCT_BEST)
    for figure in (figures.training(table), figures.validation(table), figures.front(table)):
        for axes in figure.axes:
            lines = {line.get_label(): line.get_color() for line in axes.lines}
            for regime in REGIMES:
                assert lines[settings.LABELS[regime]] == figures.COLOURS[regime]
            assert axes.get_xlabel()
            assert axes.get_ylabel()
    assert len(figures.validation(table).axes) == len(NOISE_LEVELS)


def test_the_front_shows_the_path_over_the_coefficients():
    mae = tuple((3.0 + k, 4.0, 5.0, 9.0 - k) for k in range(len(settings.GRID)))
    sweep = tuning.Sweep(Setting(criterion=""), "product", mae)
    (axes,) = figures.front(synthetic(EQUAL), [sweep]).axes
    assert axes.lines[-1].get_xydata()[1] == pytest.approx([4.0, 8.0])


def test_the_network_starts_from_its_seed_alone():
    state = torch.get_rng_state()
    model, again = PaperRegressor(seed=1), PaperRegressor(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(20, 13), (20, 20), (20, 20), (1, 20)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.net[0].weight, PaperRegressor(seed=2).net[0].weight)
    assert model(torch.zeros(5, 13)).shape == (5, 1)
    with pytest.raises(AttributeError, match="no_such_name"):
        lightning_lip.paper.no_such_name  # noqa: B018


def quick_run(regime, **changes):
    penalty = {"n_norms": 3, "coefficient": 0.1} if regime in settings.PENALISED else {}
    return replace(Run(regime, 0, epochs=2, **penalty), **changes)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_run_is_repeatable_and_logging_does_not_change_it(boston, tmp_path, regime):
    run = quick_run(regime)
    plain = train(run, boston)
    logged = train(run, boston, str(tmp_path))
    assert plain == logged
    assert {len(series) for series in plain.history.values()} == {2}
    assert plain.n_clipped == 0
    model = PaperRegressor.load_from_checkpoint(tmp_path / artefacts_of(run)["checkpoint"], map_location="cpu")
    norms = [torch.linalg.svdvals(m.weight.detach().double())[0].item() for m in model.net[::2]]
    assert plain.sigmas == pytest.approx(norms, rel=1e-12)
    parts = split(boston, 0)
    with torch.no_grad():
        predictions = model(torch.as_tensor(parts.validation_inputs, dtype=torch.float32))[:, 0]
    clean = np.abs(predictions.numpy() - parts.validation_target).mean()
    assert plain.final(validation_key(0.0)) == pytest.approx(clean, rel=1e-5)


def test_a_logged_run_leaves_one_tensorboard_log_with_the_norms(boston, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = quick_run("product", epochs=20)
    for _ in range(2):
        train(run, boston, str(tmp_path))
    folder = tmp_path / artefacts_of(run)["tensorboard"]
    assert len(list(folder.glob("events.*"))) == 1  # the second run replaced the first
    log = EventAccumulator(str(folder), {"images": 0}).Reload()
    assert len(log.Images("lipschitz/spectral_norms")) == 10  # of 20 epochs
    tags = set(log.Tags()["scalars"])
    assert {"train/mae", "val/noisy_mae/eta=0.6", "lipschitz/product"} <= tags
    assert {f"lipschitz/spectral_norm/net.{layer}" for layer in (0, 2, 4)} <= tags


def test_the_regimes_do_what_they_are_named_for(boston):
    free = train(quick_run("none", epochs=4), boston)
    product = train(quick_run("product", epochs=4, coefficient=50.0), boston)
    layer = train(quick_run("layer", epochs=4, coefficient=50.0), boston)
    for penalised in (product, layer):
        assert np.prod(penalised.sigmas[:3]) < 0.8 * np.prod(free.sigmas[:3])
    assert product.sigmas != layer.sigmas
    four = train(quick_run("product", epochs=4, coefficient=50.0, n_norms=4), boston)
    assert four.sigmas[3] < product.sigmas[3]


def test_max_norm_counts_what_it_rescales(boston, monkeypatch):
    monkeypatch.setattr("lightning_lip.paper.regimes.training.MAX_NORM", 0.5)
    result = train(quick_run("maxnorm"), boston)
    assert result.n_clipped > 0
    assert result.largest_unit_norm <= 0.5 * (1 + 1e-6)


def test_a_training_that_diverges_is_an_error(boston):
    huge = Dataset(boston.inputs, boston.target * 1e30)  # its square overflows float32
    with pytest.raises(FloatingPointError, match=r"regime 'none', seed 0 .*not finite"):
        train(quick_run("none"), huge)


def test_one_process_or_two_give_the_same_records_in_the_order_of_the_runs(boston):
    runs = [quick_run(regime, epochs=1, seed=seed) for seed in (0, 1) for regime in ("product", "none")]
    in_one: list[Run] = []
    in_two: list[Run] = []
    task = partial(train, data=boston)
    assert map_tasks(task, runs, 1, in_one.append) == map_tasks(task, runs, 2, in_two.append)
    assert in_one == runs
    assert sorted(in_two, key=str) == sorted(runs, key=str)  # as they end, in any order


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_names_its_task(workers):
    with pytest.raises(RunError, match=r"^-1\.0 failed: ValueError: .+") as error:
        map_tasks(math.sqrt, [4.0, -1.0], workers)
    assert isinstance(error.value.__cause__, ValueError)


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(RunError, match=r"A worker process died while 7 was running or waiting"):
        map_tasks(os._exit, [7, 7], 2)


SLEEPERS = """
import os, signal, sys, time
from pathlib import Path
from lightning_lip.reporting.processes import map_tasks

def sleep(name):
    Path(sys.argv[1], f"{name}.part").write_text(str(os.getpid()))
    Path(sys.argv[1], f"{name}.part").rename(Path(sys.argv[1], f"{name}.pid"))
    time.sleep(600)

if __name__ == "__main__":
    # A shell that runs these tests in the background starts them with the signal ignored, which is passed on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    map_tasks(sleep, ["a", "b"], 2)
"""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_command(tmp_path, signal_number):
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    files = [tmp_path / "a.pid", tmp_path / "b.pid"]
    # As from a shell's background.
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command_process = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, ignored)
    try:
        wait_until(lambda: all(file.exists() for file in files))
        command_process.send_signal(signal_number)
        assert command_process.wait(timeout=60) != 0
    finally:
        command_process.kill()
    workers = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(is_alive(pid) for pid in workers))


def test_an_interrupt_while_workers_start_ends_them(monkeypatch):
    submit = ProcessPoolExecutor.submit
    futures = []

    def interrupted(*arguments):
        if futures:
            wait_until(futures[0].running)
            raise KeyboardInterrupt
        futures.append(submit(*arguments))
        return futures[0]

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        map_tasks(time.sleep, [600.0, 600.0], 2)
    wait_until(futures[0].done)
    wait_until(lambda: set(multiprocessing.active_children()) <= before)


def wait_until(condition):
    # A limit for a test that fails, not a measurement.
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def is_alive(pid):
    """Whether a process runs; an orphan that nobody reaped is dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_progress_prints_lines_where_there_is_no_terminal():
    console = Console(file=io.StringIO(), width=120)
    with progress(console, 40, "runs") as done:
        for _ in range(40):
            done(None)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("runs: 4/40, ")
    assert lines[-1].startswith("runs: 40/40, ")


def test_progress_is_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with progress(console, 2, "runs") as done:
        done(None)
        done(None)
    assert "2/2" in console.file.getvalue()


def test_reproduce_leaves_its_files_and_repeats_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "GRID", (0.01, 0.1))
    monkeypatch.setattr(figures, "GRID", (0.01, 0.1))
    options = {"quick": True, "tune": True, "seeds": 2, "epochs": 1}
    first = command.reproduce(str(tmp_path / "first"), workers=1, **options)
    again = command.reproduce(str(tmp_path / "again"), workers=1, **options)
    for document in (first, again):
        assert document.pop("timing")["seconds"] > 0
    assert first == again
    written = json.loads((tmp_path / "first" / "results.json").read_text())
    del written["timing"]
    assert written == json.loads(json.dumps(first))
    assert len(first["runs"]) == 4 * 2
    assert set(first["lambdas"]["raw/3/clean"]) == set(settings.PENALISED)
    assert first["tuning"]["seeds"] == [1000, 1001, 1002]
    assert {claim["letter"] for claim in first["settings"]["raw/3/clean"]["claims"]} == set("abcd")
    assert [name.partition(".")[0] for name in first["figures"]] == [
        "figure_1_region",
        "figure_2_training",
        "figure_3_validation",
        "figure_4_front",
    ]
    for name in first["figures"]:
        assert (tmp_path / "first" / name).stat().st_size > 10_000
    for places in first["artefacts"].values():
        assert (tmp_path / "first" / places["checkpoint"]).is_file()
        assert list((tmp_path / "first" / places["tensorboard"]).glob("events.*"))
    assert list((tmp_path / "first" / "tensorboard" / "figures").glob("events.*"))
    shown = capsys.readouterr().out
    for part in ("column B", "lambda by grid search", "(d) the layer penalty", "results.json"):
        assert part in shown


def test_a_failing_run_names_regime_and_seed(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no luck")

    monkeypatch.setattr(experiment, "train", fail)
    with pytest.raises(RunError, match=r"regime 'none', seed 0 \(raw inputs\) failed: RuntimeError: no luck"):
        command.reproduce(str(tmp_path), seeds=2, epochs=1, workers=1)
    assert not (tmp_path / "results.json").exists()
