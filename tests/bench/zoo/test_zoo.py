"""The zoo's models with the callbacks at their defaults: a few of torch alone always, and one of each package."""

import csv
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lightning_lip import LipschitzPenalty
from lightning_lip.bench.zoo import run as zoo
from lightning_lip.bench.zoo.measure import Row, as_row, measure, quiet
from lightning_lip.bench.zoo.run import ENTRIES, Job, raised
from lightning_lip.bench.zoo.table import BEGIN, END, page, write_docs, write_rows

PLAIN = ["torch.nn/resnet", "torch.nn/convnext", "torch.nn/conv1d", "torch.nn/GRU", "torch.nn/Transformer"]
OTHERS = {
    "torchvision": "torchvision/densenet",
    "timm": "timm/mixer",
    "transformers": "transformers/bert",
    "torch_geometric": "torch_geometric/GIN",
}


def whole(name):
    quiet()
    *_, row = measure(ENTRIES[name])
    return row


def check(row):
    assert row.stage == ""
    assert row.holds, row.losses
    assert 0 < row.share <= 1
    assert row.layers
    assert (row.log10_bound is None) == bool(row.refusals)
    assert json.loads(json.dumps(asdict(row))) == asdict(row)


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_of_torch_trains_as_without(name):
    check(whole(name))


@pytest.mark.parametrize("package", OTHERS)
def test_a_model_of_a_package_trains_as_without(package):
    pytest.importorskip(package)
    check(whole(OTHERS[package]))


def test_the_list_has_every_package_and_sixty_models():
    packages = [entry.package for entry in ENTRIES.values()]
    assert len(packages) >= 60
    assert set(packages) == {*OTHERS, "torch.nn"}
    assert min(packages.count(name) for name in set(packages)) >= 8
    assert all(name == entry.name for name, entry in ENTRIES.items())


def test_a_penalty_that_destroys_the_training_is_found(monkeypatch):
    monkeypatch.setattr("lightning_lip.bench.zoo.measure.LipschitzPenalty", lambda: LipschitzPenalty(1e4))
    row = whole("torch.nn/convnext")
    assert not row.error
    assert not row.holds
    assert row.kept("sgd") < 0.5
    # The training without it is stable, so that it is the penalty's doing.
    assert row.nudged["sgd"] == pytest.approx([row.losses["sgd"][0]] * 3, rel=1e-2)
    assert not row.unstable("sgd")
    assert "**" in page([row], {})
    assert "†" not in page([row], {})


def test_a_model_that_fails_or_takes_too_long_is_a_row():
    failed = zoo.run(Job("no such model", 200))
    assert (failed.name, failed.stage, failed.holds) == ("no such model", "start", False)
    assert failed.error == "KeyError: 'no such model'"
    slow = zoo.run(Job("torch.nn/mlp", 0.01))
    assert slow.error == "took more than 0.01 seconds"


PARENT = """
import multiprocessing, os, sys, threading, time
from lightning_lip.bench.zoo.run import end_with_parent

def child(path):
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(100)

if __name__ == "__main__":
    multiprocessing.get_context("forkserver").Process(target=child, args=(sys.argv[1],)).start()
    time.sleep(100)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_no_model_outlives_the_command(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    pid = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(pid)])
    try:
        wait_for(lambda: pid.exists() and pid.read_text())
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not Path(f"/proc/{pid.read_text()}").exists())


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("It does not come true.")


def test_the_exception_of_a_process_is_its_first_line():
    output = (
        "loading\nTraceback (most recent call last):\n  File x, line 1\nValueError: The model holds\n  a table\nmore"
    )
    assert raised(output) == "ValueError: The model holds"
    assert raised("killed") == "killed"
    assert raised("") == ""


def rows():
    done = Row("a/one", 100, "2 Linear", 90, "1 LayerNorm", log10_bound=3.25)
    done.start, done.losses = 2.0, {"sgd": [1.0, 1.1], "adam": [0.5, 1.0]}
    done.products, done.seconds = {"sgd": [2.0], "adam": [1.0]}, {"sgd": [1.0, 2.0], "adam": [1.0, 2.0]}
    worse = replace(done, name="b/two", losses={"sgd": [1.0, 2.2], "adam": [0.5, math.nan]}, log10_bound=None)
    worse.refusals = {"aten.exp.default: it has no finite Lipschitz constant": 2}
    return [done, worse, Row("c/three", stage="trace", error="RuntimeError: <none> | no")]


def test_a_row_holds_only_if_everything_ran_and_no_loss_suffered():
    done, worse, failed = rows()
    assert done.holds
    assert done.kept("sgd") == pytest.approx(0.9)
    assert not worse.within("sgd")
    assert not worse.within("adam")
    assert not failed.holds
    assert not worse.unstable("sgd")
    assert replace(worse, nudged={"sgd": [1.0, 2.2, 1.0]}).unstable("sgd")
    assert as_row(json.loads(json.dumps(asdict(done)))) == done


def test_the_tables_say_what_the_rows_say(tmp_path):
    write_rows(rows(), tmp_path / "zoo.csv", {"torch": "2"})
    first, *lines = (tmp_path / "zoo.csv").read_text().splitlines()
    assert first == "# torch: 2"
    one, two, three = csv.DictReader(lines)
    assert (one["holds"], one["share"], one["log10_bound"], one["sgd_loss_with"]) == ("True", "0.900", "3.25", "1.1")
    assert two["refused"] == "2 aten.exp.default: it has no finite Lipschitz constant"
    assert three["error"] == "RuntimeError: <none> | no"
    document = tmp_path / "zoo.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_docs(rows(), document, {"torch": "2"})
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "Of 3 models 2 ran to the end, and 1 ended" in text
    assert "| a/one | 1 → 1.1 | 0.5 → 1 | 100 | 90.0% | 1 LayerNorm | 10^3.2 |" in text
    assert "**1 → 2.2**" in text
    assert "| 1 | aten.exp.default: it has no finite Lipschitz constant |" in text
    document.write_text("nothing")
    with pytest.raises(ValueError, match="to hold"):
        write_docs(rows(), document, {})


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "zoo.md").write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(zoo, "ENTRIES", dict.fromkeys(row.name for row in rows()))
    monkeypatch.setattr("sys.argv", ["zoo", "--output", str(tmp_path), "--docs", str(tmp_path / "zoo.md")])
    known, ran = {row.name: row for row in rows()}, []

    def run(job):
        ran.append(job.name)
        if ran == ["a/one", "b/two"]:
            raise KeyboardInterrupt
        return known[job.name]

    monkeypatch.setattr(zoo, "run", run)
    with pytest.raises(KeyboardInterrupt):
        zoo.main()
    assert not (tmp_path / "zoo.csv").exists()
    zoo.main()
    assert ran == ["a/one", "b/two", "b/two", "c/three"]
    assert len((tmp_path / "zoo.csv").read_text().splitlines()) > 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["zoo.csv", "zoo.md"]
