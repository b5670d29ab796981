import csv
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lightning_lip.bench import command
from lightning_lip.bench.scoreboard import plan as plans
from lightning_lip.bench.scoreboard import report, run
from lightning_lip.bench.scoreboard.methods import METHODS, Setting
from lightning_lip.bench.scoreboard.plan import FULL, Board, Job, Plan, planned
from lightning_lip.bench.scoreboard.run import Outcome, chosen, final_jobs
from lightning_lip.bench.scoreboard.training import Budget

pytestmark = [pytest.mark.filterwarnings("ignore:.*not a Lipschitz layer.*")]

SMALL = Board("digits", "mlp", Budget(1, "epochs"), (0.1, 0.5))


@pytest.fixture(autouse=True)
def packages():
    for module in ("sklearn", "mlxtend", "scipy", "matplotlib"):
        pytest.importorskip(module)


STEPS = 10


def small(methods=("cross_entropy", "margin"), seeds=(1, 2)):
    """A plan whose times are not measured yet."""
    return Plan((SMALL,), methods, n_settings=2, seeds=seeds)


def timed(plan, step_ms=2.0):
    return run.with_steps(plan, [[step_ms] * len(plan.methods) for _ in plan.boards])


def outcome(certified, board=SMALL):
    """An outcome of a certified accuracy at every eps, and one of .9."""
    return Outcome([0.9, *[certified] * (len(board.eps()) - 1)], [], [], 0, 0, 0.0)


def test_the_quick_run_leaves_tables_document_and_figure(tmp_path, capsys):
    peers = [name for name in ("torchlip_tau",) if METHODS[name].missing() is None]
    methods = ["penalty", "margin", *peers]
    found = command.scoreboard(str(tmp_path), ",".join(methods), quick=True, workers=1)
    shown = capsys.readouterr().out
    assert f"At most {len(methods) * (2 + 2)} trainings of {len(methods)} methods" in shown
    assert "goes on where it was" in shown
    assert "The attack breaks 0 of" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"scoreboard.{kind}" for kind in ("csv", "json", "png")]
    assert (tmp_path / "scoreboard.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "scoreboard.json").read_text()) == json.loads(json.dumps(found))
    (board,) = found["boards"]
    assert [(r["method"], r["radius"]) for r in board["rows"]] == [(m, e) for e in board["radii"] for m in methods]
    for r in board["rows"]:
        assert r["certified"] <= r["attacked"] <= r["accuracy"] <= 1
        assert r["accuracy"] > 0.5
        assert r["curve"] == sorted(r["curve"], reverse=True)
        assert r["curve"][board["eps"].index(r["radius"])] == pytest.approx(r["certified"])
        assert r["by_numpy"] == pytest.approx(r["certified"], abs=1e-3)
        assert r["step_ms"] > 0
    checks = found["checks"]
    assert checks["n_broken"] == 0 < checks["n_certified"]
    assert 0 <= checks["least_excess"] <= checks["largest_excess"] < 1e-8
    lines = (tmp_path / "scoreboard.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert list(rows[0]) == report.COLUMNS
    assert [float(r["certified"]) for r in rows] == pytest.approx([r["certified"] for r in board["rows"]], abs=1e-3)
    assert any(line.startswith("# torch: ") for line in lines)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    ran, run_job = [], run.run_job

    def until(n):
        def run_or_stop(job):
            if len(ran) == n:
                raise KeyboardInterrupt
            ran.append(str(job))
            return run_job(job)

        monkeypatch.setattr(run, "run_job", run_or_stop)

    n_tuning = len(timed(small()).jobs())
    for n in (2, n_tuning + 1):  # while settings are chosen, and in the tests
        until(n)
        with pytest.raises(KeyboardInterrupt):
            run.run(small(), tmp_path, workers=1)
    until(None)
    found = run.run(small(), tmp_path, workers=1)
    assert len(ran) == len(set(ran)) > n_tuning + 2
    assert not list(tmp_path.glob("*.partial*"))
    whole = run.run(small(), tmp_path / "whole", workers=1)
    # But for the times, which are measured anew.
    for a, b in zip(found["boards"][0]["rows"], whole["boards"][0]["rows"], strict=True):
        assert {**a, "step_ms": 0} == {**b, "step_ms": 0}


def test_settings_are_chosen_on_validation_for_each_radius():
    plan = timed(replace(small(("margin",)), n_settings=3))
    jobs = plan.jobs()
    near, far = SMALL.eps().index(0.1), SMALL.eps().index(0.5)
    outcomes = {repr(job): outcome(0.5) for job in jobs}
    outcomes[repr(jobs[1])].certified[far] = 0.6
    outcomes[repr(jobs[2])].certified[near] = 0.6
    assert chosen(plan, outcomes, SMALL, "margin", 0.5) == jobs[1]
    assert chosen(plan, outcomes, SMALL, "margin", 0.1) == jobs[2]
    finals = final_jobs(plan, outcomes)
    assert [(job.setting, job.seed) for job in finals] == [(jobs[i].setting, s) for i in (2, 1) for s in plan.seeds]
    assert all(job.is_final for job in finals)
    # The accuracy decides between equals.
    outcomes = {repr(job): outcome(0.5) for job in jobs}
    outcomes[repr(jobs[1])].certified[0] = 0.95
    assert chosen(plan, outcomes, SMALL, "margin", 0.5) == jobs[1]


@pytest.mark.parametrize("method", ["cross_entropy", "constraint"])
def test_a_training_that_diverges_certifies_nothing(method):
    job = Job(SMALL, method, Setting(math.inf, (1.0,)), STEPS, 0, True)
    found = run.run_job(job)
    assert set(found.certified) == set(found.by_numpy) == set(found.attacked) == {0.0}
    assert found.n_certified == 0
    assert found.error == "it diverged"


def test_a_training_that_fails_certifies_nothing_and_is_named(monkeypatch):
    def fail(*arguments):
        raise torch.linalg.LinAlgError("no singular values")

    job = Job(SMALL, "cross_entropy", METHODS["cross_entropy"].settings()[0], STEPS, 0, False)
    with monkeypatch.context() as patched:
        patched.setattr(run, "train", fail)
        failed = run.run_job(job)
    assert set(failed.certified) == {0.0}
    assert failed.error == "no singular values"
    plan = timed(small(("cross_entropy",), seeds=(1,)))
    outcomes = {repr(job): failed for job in plan.jobs()[1:]} | {repr(plan.jobs()[0]): run.run_job(plan.jobs()[0])}
    outcomes |= {repr(job): run.run_job(job) for job in final_jobs(plan, outcomes)}
    found = run.document(plan, outcomes)
    assert found["failed"] == {str(plan.jobs()[1]): "no singular values"}
    assert any("1 trainings failed" in line for line in report.checks(found))


def test_tuning_does_not_see_the_test_images():
    setting = METHODS["margin"].settings()[0]
    tuned, tested = (run.run_job(Job(SMALL, "margin", setting, STEPS, 0, is_final)) for is_final in (False, True))
    assert (tuned.by_numpy, tuned.attacked) == ([], [])
    assert tuned.certified != tested.certified
    assert len(tested.attacked) == len(SMALL.radii)


def test_the_cost_is_the_trainings_at_most():
    plan = Plan((replace(SMALL, budget=Budget(30, "seconds")),), ("margin", "penalty"), n_settings=9, seeds=(1, 2, 3))
    n = 2 * (9 + 3 * 2)
    told = run.cost(timed(plan), 2)
    assert f"{n} trainings of 2 methods, {n / 2:.0f} CPU minutes" in told
    assert f"about {n / 4:.0f} minutes with 2 workers" in told
    # Of epochs it is what they take.
    epochs = timed(replace(plan, boards=(replace(SMALL, budget=Budget(600, "epochs")),)), step_ms=5.0)
    assert epochs.seconds() == pytest.approx(n * 600 * math.ceil(1258 / 128) * 5e-3)


def test_the_steps_follow_from_the_measured_time():
    plan = run.with_steps(
        replace(small(), boards=(replace(SMALL, budget=Budget(1, "seconds")), SMALL)), [[2, 5], [2, 5]]
    )
    assert plan.steps == ((500, 200), (10, 10))
    assert {(job.method, job.steps) for job in plan.jobs()} == {
        *(("cross_entropy", 500), ("margin", 200), ("cross_entropy", 10), ("margin", 10))
    }
    fast, slow = run.measured(SMALL, ("cross_entropy", "constraint"))
    assert 0 < fast < slow


def test_full_adds_epochs_convolutions_and_digits():
    (only,) = planned(("margin",), None, 7.0, full=False, quick=False).boards
    assert (only.data, only.network, only.budget) == ("mnist", "mlp", Budget(7.0, "seconds"))
    full = planned(("margin",), None, 7.0, full=True, quick=False)
    assert full.boards == (only, *FULL)
    assert full.n_settings == 9
    assert {(b.network, b.budget.unit) for b in full.boards} == {
        (n, u) for n in run.NETWORKS for u in ("seconds", "epochs")
    }
    assert {board.data for board in planned(("margin",), "folder", 7.0, full=True, quick=False).boards} == {"folder"}
    for board in (*full.boards, plans.QUICK):
        eps = board.eps()
        assert set(board.radii) <= set(eps)
        assert min(b - a for a, b in pairwise(eps)) > 0.01


def test_the_docs_hold_the_committed_results_and_no_others():
    results = report.ROOT / "bench" / "results" / "scoreboard.json"
    page = (report.ROOT / "docs" / "scoreboard.md").read_text()
    expected = report.page(json.loads(results.read_text())).strip() if results.exists() else ""
    assert page.partition(report.BEGIN)[2].partition(report.END)[0].strip() == expected


def test_a_page_takes_the_tables_in_their_place(tmp_path):
    plan = timed(small(("cross_entropy", "margin"), seeds=(1,)))
    outcomes = {repr(job): outcome(0.5) for job in plan.jobs()}
    for number, job in enumerate(final_jobs(plan, outcomes)):
        share = 0.4 if number == 0 else 0.6
        curve = [0.9, *[share] * (len(SMALL.eps()) - 1)]
        outcomes[repr(job)] = Outcome(curve, curve, [0.8, 0.7], 100, 0, 1e-11)
    found = run.document(plan, outcomes) | {"versions": {"torch": "2", "absent": None}, "machine": {"cpu": "a CPU"}}
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_docs(found, page)
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "| cross-entropy | 2.0 | 10 | 0.400 ± 0.000 (0.900; 0.800) | 0.400 ± 0.000 (0.900; 0.700) |" in text
    assert "| margin loss | 2.0 | 10 | **0.600** ± 0.000 (0.900; 0.800) | **0.600** ± 0.000 (0.900; 0.700) |" in text
    assert "| margin loss | rate 0.002, eps 1 | rate 0.002, eps 1 |" in text
    assert "breaks 0 of 200 certified samples" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="to hold"):
        report.write_docs(found, page)
