"""How far a command is."""

import io
import re

from rich.console import Console

from lightning_lip.reporting import progress as progress_module
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.progress import map_with_progress, named_progress, progress, timed_progress


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


def test_results_come_in_the_order_of_the_tasks(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    finished = Finished(tmp_path / "file", None, int)
    assert map_with_progress(console, "runs", len, ["a", "bb"], 1, finished) == [1, 2]
    assert console.file.getvalue().startswith("runs: 1/2, ")


def test_the_task_at_work_is_named_on_a_terminal():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with named_progress(console, "certifying") as show:
        show("first", 2)
        show("blocks[0].layer", 2)
    printed = console.file.getvalue()
    assert "certifying" in printed
    assert "left" in printed
    assert "blocks[0].layer" in printed
    assert "1/2" in printed  # one is done when the second begins


def test_the_task_at_work_is_named_now_and_then_elsewhere(monkeypatch):
    seconds = iter([0.0, 3.0, 11.0, 11.0, 12.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(seconds))
    console = Console(file=io.StringIO(), width=120)
    with named_progress(console, "certifying") as show:
        for name in ("first", "[second]", "third"):
            show(name, 3)
    assert console.file.getvalue().splitlines() == ["certifying: 2/3, [second]"]


def test_tasks_of_unequal_length_tell_the_time_left_on_a_terminal():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with timed_progress(console, 40.0) as (on_step, on_done):
        on_step("mnist: [plain]")
        on_done(30.0)
        on_done(10.0)
    printed = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())
    assert "left -:--:--" in printed
    assert "left 0:00:00 mnist: [plain]" in printed


def test_tasks_of_unequal_length_are_silent_elsewhere():
    console = Console(file=io.StringIO(), width=120)
    with timed_progress(console, 40.0) as (on_step, on_done):
        on_step("mnist: plain")
        on_done(40.0)
    assert console.file.getvalue() == ""
