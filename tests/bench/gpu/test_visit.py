"""A visit without a GPU: every step runs or says why not, and nothing that a step does ends the visit."""

import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_lip.bench.gpu import kernels, training, visit
from lightning_lip.bench.gpu.measuring import record

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux, and Triton is there only"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).resolve().parents[3]


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def ends(rows):
    return {row["step"]: row for row in rows if {"done", "failed", "skipped"} & set(row)}


def test_a_dry_run_of_the_whole_visit(tmp_path):
    out = tmp_path / "out"
    options = {"DEV": "cpu", "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "BUDGET": "800"}
    command = ["bash", str(ROOT / "bench" / "gpu" / "visit.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = results(out)
    found = ends(rows)
    # But for sizes that are left out, a dry run has every step of a visit, and says which of them it skips.
    plan = [visit.FIRST, *visit.PLAN]
    assert set(found) <= {step.name for step in plan}
    skipped = {name: row["skipped"] for name, row in found.items() if "skipped" in row}
    assert skipped == {step.name: "it needs a GPU" for step in plan if step.needs_gpu}
    ran = {name for name, row in found.items() if "done" in row}
    assert {name.split()[0] for name in ran} == {step.name.split()[0] for step in plan if not step.needs_gpu}
    # Each step that ran left what it measured.
    assert ran == {row["step"] for row in rows if row["step"] in ran and not {"done", "failed", "skipped"} & set(row)}
    checked = [row for row in rows if "right" in row]
    assert checked
    assert all(row["right"] for row in checked)
    assert (out / "log.txt").read_text().count("== ") == len(ran)
    assert "correctness.smoke" in (out / "summary.txt").read_text()


def test_the_steps_of_the_plan_can_be_called_and_are_all_different():
    for step in visit.PLAN:
        inspect.signature(step.work).bind(*step.arguments)
    assert len({step.name for step in visit.PLAN}) == len(visit.PLAN) > 50
    named = {
        step.arguments[0] for step in visit.PLAN if step.work.__module__.endswith("gpu.kernels") and step.arguments
    }
    assert named == set(kernels.SHAPES)
    assert {step.arguments[0] for step in visit.PLAN if step.work is training.steps} <= set(training.WHOLE)


def test_a_step_that_fails_hangs_or_dies_does_not_end_the_visit(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("VISIT_STEP", "")
    monkeypatch.setattr(visit, "SHORTEST", 0.0)
    plan = [
        visit.Step(60, json.loads, ("{",)),
        visit.Step(1, time.sleep, (600,)),
        visit.Step(60, os._exit, (3,)),
        visit.Step(60, os.abort),
        visit.Step(60, os.getpid),
    ]
    assert visit.run(plan, budget=300) == 4
    found = {name: row.get("failed") for name, row in ends(results(tmp_path)).items()}
    assert found.pop("ceilings.about") is None
    assert [text and text.split(":")[0] for text in found.values()] == [
        "JSONDecodeError",
        "killed after 1 s",
        "its process ended with 3",
        "its process ended with -6",
        None,
    ]
    assert visit.summary().count("FAILED") == 4


def test_what_comes_too_late_is_skipped_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("VISIT_STEP", "")
    monkeypatch.setattr(visit, "run_step", lambda step, *_: record(done=True) or True)
    assert visit.run([visit.Step(60, os.getpid)], budget=1.0) == 0
    assert ends(results(tmp_path))["posix.getpid"]["skipped"] == "no time left of 1 s"
    assert "SKIPPED posix.getpid" in (tmp_path / "summary.txt").read_text()
