"""Independent tasks over processes: failures name their task, and no process outlives the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as connection_wait
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


class RunError(RuntimeError):
    """A task failed; the message names it, and the cause is the worker's exception."""


def map_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    on_done: Callable[[Task, Result], None] = lambda task, result: None,
) -> list[Result]:
    """Apply `function` to every task and return the results in the order of the tasks.

    With one worker everything runs in this process; otherwise in spawned processes of one thread each. Workers
    end at once when this process is interrupted, fails or is killed.

    Args:
        function: Picklable, and so its tasks and results.
        tasks: What to do; `str(task)` names one in messages.
        workers: The number of processes, at least 1.
        on_done: Called in this process after each task, with its result.

    Raises:
        RunError: If a task raises or its worker dies.
    """
    if workers == 1 or len(tasks) < 2:
        return [_in_this_process(function, task, on_done) for task in tasks]
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(tasks))
    # Only this process holds the writing end: that it closes, for whatever reason, is what ends the workers.
    lifeline, held = context.Pipe(duplex=False)
    with (
        lifeline,
        held,
        ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(lifeline,)) as executor,
    ):
        try:
            # An interrupt finds most commands here at first: submitting starts the processes.
            futures = {executor.submit(function, task): task for task in tasks}
            _report(futures, on_done)
        except BaseException:
            # First, since this ends them whatever else is interrupted again; the executor waits for its processes.
            held.close()
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work on one thread, so that results do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def excepthook(error: threading.ExceptHookArgs) -> None:
    """Leave an OSError of a thread to the thread that waits for it; for ``threading.excepthook``.

    TensorBoard's writer prints a traceback at a full disk, and raises the same where it is flushed or closed.
    """
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _report(futures: dict[Future[Result], Task], on_done: Callable[[Task, Result], None]) -> None:
    waiting = set(futures)
    while waiting:
        # In slices, so that an interrupt from the keyboard is seen on every system.
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                result = future.result()
            except BrokenProcessPool as error:
                raise RunError(
                    f"A worker process died while {futures[future]} was running or waiting; "
                    "it may have run out of memory: try fewer workers."
                ) from error
            except Exception as error:
                raise _failure(futures[future], error) from error
            on_done(futures[future], result)


def _in_this_process(function: Callable[[Task], Result], task: Task, on_done: Callable[[Task, Result], None]) -> Result:
    try:
        result = function(task)
    except Exception as error:
        raise _failure(task, error) from error
    on_done(task, result)
    return result


def _failure(task: object, error: Exception) -> RunError:
    return RunError(f"{task} failed: {type(error).__name__}: {error}")


def _start_worker(lifeline: Connection) -> None:
    """Prepare a worker: one thread, no reaction to the keyboard, no life after its parent's."""
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.excepthook = excepthook
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    # Nothing is ever sent: the end of the file is the only event.
    connection_wait([lifeline])
    os._exit(1)
