"""From the options to the files."""

import json

import pytest
from support.records import record

from lightning_lip.errors import UsageError
from lightning_lip.paper import command
from lightning_lip.paper.regimes import experiment, figures, settings, training, tuning
from lightning_lip.paper.regimes.settings import LAMBDAS, PAPER_SETTING, REGIMES, Setting, run_for, table_of
from lightning_lip.reporting.processes import RunError


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


def interrupt_after(n_runs, trained, monkeypatch):
    """Let `reproduce` be interrupted before it trains more than so many runs in all; None for never."""

    def train(run, *arguments):
        if len(trained) == n_runs:
            raise KeyboardInterrupt
        trained.append(run)
        return training.train(run, *arguments)

    monkeypatch.setattr(experiment, "train", train)


def test_reproduce_leaves_its_files_and_repeats_its_numbers_after_interrupts_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "GRID", (0.01, 0.1))
    monkeypatch.setattr(figures, "GRID", (0.01, 0.1))
    options = {"quick": True, "tune": True, "seeds": 2, "epochs": 1}
    first = command.reproduce(str(tmp_path / "first"), workers=1, **options)
    trained, again_folder = [], tmp_path / "again"
    for n_runs in (5, 12 + 5):  # in the tuning, then in the runs
        interrupt_after(n_runs, trained, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            command.reproduce(str(again_folder), workers=1, **options)
    # A logged run's files belong to its record: without them it is trained again.
    (again_folder / first["artefacts"]["layer"]["checkpoint"]).unlink()
    interrupt_after(None, trained, monkeypatch)
    again = command.reproduce(str(again_folder), workers=1, **options)
    assert len(trained) == 12 + 8 + 1
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("first", "again")]
    assert names[0] == names[1]  # nothing is left of the interrupts
    assert (again_folder / first["artefacts"]["layer"]["checkpoint"]).is_file()
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
    for line in ("continuing: 5 of 12 tuning runs are done", "continuing: 4 of 8 runs are done"):
        assert line in shown
    for part in ("column B", "lambda by grid search", "(d) the layer penalty", "results.json"):
        assert part in shown


def test_a_changed_plan_does_not_use_finished_runs(tmp_path, monkeypatch):
    trained = []
    interrupt_after(3, trained, monkeypatch)
    for epochs in (1, 2):
        trained.clear()
        with pytest.raises(KeyboardInterrupt):
            command.reproduce(str(tmp_path), seeds=2, epochs=epochs, workers=1)
    assert {run.epochs for run in trained} == {2}
    assert len(trained) == 3


def test_a_failing_run_names_regime_and_seed(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no luck")

    monkeypatch.setattr(experiment, "train", fail)
    with pytest.raises(RunError, match=r"regime 'none', seed 0 \(raw inputs\) failed: RuntimeError: no luck"):
        command.reproduce(str(tmp_path), seeds=2, epochs=1, workers=1)
    assert not (tmp_path / "results.json").exists()
