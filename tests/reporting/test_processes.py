"""Tasks over processes: failures name their task, and no process outlives the command."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from lightning_lip.reporting.processes import RunError, map_tasks, one_thread


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


def test_one_thread_is_for_the_block_only():
    @one_thread()
    def fail():
        raise ValueError(torch.get_num_threads())

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match=r"^1$"):
            fail()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
