"""Finished results outlive an interrupt, and serve only what they were made for."""

import io
import json

import pytest
from rich.console import Console
from support.disk import full_disk

from lightning_lip.reporting import finished
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.progress import map_with_progress

TASKS = [1.5, float("inf"), (2, "x")]


def same(result):
    return result


def test_results_are_there_again_bit_for_bit(tmp_path):
    path = tmp_path / "made" / "file"
    first = Finished(path, "settings", same)
    for task in TASKS:
        first.add(task, [0.1 + 0.2, float("inf"), task])
    again = Finished(path, "settings", lambda result: (*result[:2],))
    assert again.results == {repr(task): (0.1 + 0.2, float("inf")) for task in TASKS}
    assert again.once(1.5, lambda: pytest.fail("it is there")) == (0.1 + 0.2, float("inf"))
    again.remove()
    assert not path.exists()


@pytest.mark.parametrize("changed", ["settings", "_sources", "machine", "backend"])
def test_what_depends_on_something_else_is_not_used(tmp_path, monkeypatch, changed):
    Finished(tmp_path / "file", "settings", same).add(1, 2)
    if changed == "backend":
        monkeypatch.setenv("LIGHTNING_LIP_BACKEND", "reference")
    elif changed != "settings":
        monkeypatch.setattr(finished, changed, lambda: "another")
    assert not Finished(tmp_path / "file", "others" if changed == "settings" else "settings", same).results
    monkeypatch.undo()
    assert not Finished(tmp_path / "file", "settings", same).results  # replaced, not kept beside


def test_a_line_that_was_cut_is_done_again(tmp_path):
    path = tmp_path / "file"
    store = Finished(path, "settings", same)
    store.add("whole", [[1]])
    with pytest.raises(OSError, match="File too large"), full_disk(path.stat().st_size + 20):
        store.add("cut", [[2, 3, 4, 5, 6, 7, 8, 9]])
    assert not path.read_text().endswith("\n")
    again = Finished(path, "settings", same)
    assert list(again.results) == ["'whole'"]
    again.add("next", 1)
    assert [json.loads(line)[0] for line in path.read_text().splitlines()[1:]] == ["'whole'", "'next'"]


@pytest.mark.parametrize(
    "cut", [b"[\"'cut'\", [2, 3", b"[\"'cut'\", [2, 3\n", b"[\"'cut\xc3\n", b"\0\0\0\n", b"[\"'a'\", 5]"]
)
def test_a_last_line_of_any_bytes_is_left_out_unless_it_is_whole(tmp_path, cut):
    path = tmp_path / "file"
    Finished(path, "settings", same).add("whole", [1])
    with path.open("ab") as file:
        file.write(cut)
    again = Finished(path, "settings", same)
    whole = ["'whole'", "'a'"] if cut.endswith(b"]") else ["'whole'"]
    assert list(again.results) == whole
    again.add("next", 1)
    assert [json.loads(line)[0] for line in path.read_text().splitlines()[1:]] == [*whole, "'next'"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_command_does_what_is_left(tmp_path, workers):
    console = Console(file=io.StringIO(), width=120)
    with pytest.raises(RuntimeError, match="None failed"):
        map_with_progress(console, "runs", len, ["a", None], 1, Finished(tmp_path / "file", 0, same))
    again = Finished(tmp_path / "file", 0, same)
    again.results["'a'"] = 10  # known, so not counted anew
    console = Console(file=io.StringIO(), width=120)
    assert map_with_progress(console, "runs", len, ["bb", "a", "ccc"], workers, again) == [2, 10, 3]
    assert console.file.getvalue().startswith("continuing: 1 of 3 runs are done\nruns: 1/2, ")
