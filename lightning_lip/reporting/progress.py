"""How far a command is: a bar with the time left on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_lip.reporting.console import print_line
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.processes import map_tasks

LINES = 10
"""How many lines are printed in all where there is no terminal."""

SECONDS_BETWEEN_LINES = 10.0
"""How often a line names the present task where there is no terminal."""

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_with_progress(
    console: Console,
    what: str,
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    finished: Finished[Result],
) -> list[Result]:
    """Do what :func:`~lightning_lip.reporting.processes.map_tasks` does with those tasks that are not finished.

    How many tasks are done is shown.

    Args:
        console: Where to show it.
        what: What the tasks are called there.
        function: As in `map_tasks`, as the following.
        tasks: See there.
        workers: See there.
        finished: The results that are there; the others are kept in it as they come.

    Raises:
        RunError: If a task raises or its worker dies.
        OSError: If a result cannot be kept.
    """
    left = [task for task in tasks if repr(task) not in finished.results]
    if len(left) < len(tasks):
        print_line(console, f"continuing: {len(tasks) - len(left)} of {len(tasks)} {what} are done")
    with progress(console, len(left), what) as show:

        def on_done(task: Task, result: Result) -> None:
            finished.add(task, result)
            show(task)

        map_tasks(function, left, workers, on_done)
    return [finished.results[repr(task)] for task in tasks]


@contextmanager
def progress(console: Console, total: int, what: str) -> Iterator[Callable[[object], None]]:
    """Show how many of `total` tasks are done.

    Yields:
        A function to call after each task; its argument is ignored.
    """
    if console.is_terminal:
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda _: bar.advance(task)
        return
    n_done = 0
    start = time.monotonic()

    def on_done(_: object) -> None:
        nonlocal n_done
        n_done += 1
        if n_done * LINES // total > (n_done - 1) * LINES // total:
            elapsed = time.monotonic() - start
            left = elapsed / n_done * (total - n_done)
            print_line(console, f"{what}: {n_done}/{total}, {elapsed:.0f} s, about {left:.0f} s left")

    yield on_done


@contextmanager
def named_progress(console: Console, what: str) -> Iterator[Callable[[str, int], None]]:
    """Show which of several tasks is at work, by name: a bar that vanishes at the end, or a line every ten seconds.

    Yields:
        A function to call before each task, with its name and the number of all tasks.
    """
    n_begun = 0
    if console.is_terminal:
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            # Names may hold brackets, which rich would read as styles.
            TextColumn("{task.description}", markup=False),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)

            def show(name: str, total: int) -> None:
                nonlocal n_begun
                bar.update(task, description=name, completed=n_begun, total=total)
                n_begun += 1

            yield show
        return
    last = time.monotonic()

    def print_name(name: str, total: int) -> None:
        nonlocal n_begun, last
        n_begun += 1
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print_line(console, f"{what}: {n_begun}/{total}, {name}")

    yield print_name


@contextmanager
def timed_progress(console: Console, seconds: float) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """Show what is at work and how long is left, on a terminal only, for tasks that differ much in length.

    Args:
        console: Where to show it.
        seconds: How long all tasks may take, about: what counts is the ratio to that of each.

    Yields:
        A function to call with what is being done, and one to call after a task, with its part of `seconds`.
    """
    if not console.is_terminal:
        yield (lambda _: None), (lambda _: None)
        return
    columns = (
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # The tasks are minutes apart, and the estimate must not forget the last of them.
    with Progress(*columns, console=console, transient=True, speed_estimate_period=3600.0) as bar:
        task = bar.add_task("", total=seconds)
        yield (lambda text: bar.update(task, description=text)), (lambda part: bar.advance(task, part))
