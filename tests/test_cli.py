import inspect
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy
import pytest
import torch
from support.commands import run_cli
from support.disk import full_disk

from lightning_lip import cli
from lightning_lip.audit.command import audit
from lightning_lip.bench import bench
from lightning_lip.bench.command import scoreboard
from lightning_lip.errors import AuditError, BoundError
from lightning_lip.paper import command, reproduce
from lightning_lip.paper.data import checked
from lightning_lip.reporting import documents, extras
from lightning_lip.reporting.processes import RunError


@pytest.fixture
def called(monkeypatch):
    calls = []

    monkeypatch.setattr("lightning_lip.paper.regimes.experiment.run_experiment", lambda *args: calls.append(args))
    return calls


def test_help_names_the_command_and_its_purpose(capsys):
    assert run_cli("--help") == 0
    shown = capsys.readouterr().out
    assert "reproduce" in shown
    assert "state which of its claims hold" in " ".join(shown.split())
    assert "audit" in shown
    assert "show what each layer adds to it" in " ".join(shown.split())


@pytest.mark.parametrize("function", [audit, bench, reproduce, scoreboard])
def test_help_explains_every_option(capsys, function):
    with pytest.raises(SystemExit):
        cli.main([function.__name__, "--help"])
    # The usage line names the options too, without explaining them.
    shown = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    options = [p for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    assert options
    for option in (p.name.replace("_", "-") for p in options):
        explanation = shown.partition(f" --{option} ")[2].partition(" --")[0]
        # An option without an entry under `Args:` would show its type and default alone.
        assert len(explanation.split("(type")[0]) > 20, option


def test_options_reach_the_experiment(called):
    cli.main(["reproduce", "--out", "elsewhere", "--seeds", "5", "--epochs", "7", "--workers", "3", "--tune"])
    ((plan, folder, workers),) = called
    assert plan == command.plan(tune=True, seeds=5, epochs=7)
    assert (str(folder), workers) == ("elsewhere", 3)


def test_switches_take_no_value(called):
    cli.main(["reproduce", "--quick"])
    assert called[0][0] == command.plan(quick=True)
    assert run_cli("reproduce", "--quick", "true") == 2


def test_options_have_dashes_and_reach_the_audit(monkeypatch):
    seen = {}

    def record(target: str, max_bound: float | None = None, unsafe_load_pickle: bool = False):
        seen.update(target=target, max_bound=max_bound, unsafe=unsafe_load_pickle)

    monkeypatch.setitem(cli.COMMANDS, "audit", record)
    cli.main(["audit", "model.ckpt", "--max-bound", "1e1", "--unsafe-load-pickle"])
    assert seen == {"target": "model.ckpt", "max_bound": 10.0, "unsafe": True}
    assert run_cli("audit", "model.ckpt", "--max_bound", "1") == 2


def test_the_options_can_be_printed_as_a_configuration(capsys):
    assert run_cli("audit", "model.ckpt", "--max-bound", "3", "--print_config") == 0
    assert "max_bound: 3" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "status"), [(BoundError, 1), (AuditError, 2)])
def test_the_audits_errors_are_one_message_and_a_status(capsys, monkeypatch, error, status):
    def fail(target: str):
        raise error(f"about {target}")

    monkeypatch.setitem(cli.COMMANDS, "audit", fail)
    assert run_cli("audit", "model.ckpt") == status
    assert capsys.readouterr().err == "lightning-lip: about model.ckpt\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick", "--full"], "--quick or --full, got both"),
        (["--seeds", "1"], "--seeds to be 2 to 1000, got 1"),
        (["--epochs", "0"], "--epochs to be at least 1, got 0"),
        (["--workers", "0"], "--workers of at least 1, got 0"),
        (["--seeds", "many"], "seeds"),
        (["--colour"], "colour"),
    ],
)
def test_options_that_make_no_sense_are_one_message_and_status_2(called, capsys, options, message):
    assert run_cli("reproduce", *options) == 2
    assert message in capsys.readouterr().err
    assert not called


def test_a_missing_extra_names_the_remedy(called, capsys, monkeypatch):
    monkeypatch.setattr(extras, "MODULES", ("lightning_lip_no_such_module",))
    assert run_cli("reproduce") == 2
    assert extras.install_command("paper") in capsys.readouterr().err
    assert not called


def fill_memory():
    numpy.empty(2**56)


def fill_torchs_memory():
    torch.empty(2**58)


def fill_the_gpus_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


def fill_the_disk():
    with full_disk():
        documents.write_text("x" * 100, Path("file"))


def lose_a_worker():
    raise RunError("A worker process died while it was running")


def take_a_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_server(server.getsockname())


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (fill_memory, "Unable to allocate"),
        (fill_torchs_memory, "allocate"),
        (fill_the_gpus_memory, "CUDA out of memory"),
        (fill_the_disk, "File too large"),
        (lose_a_worker, "A worker process died"),
        (take_a_port, "Address already in use"),
        (lambda: checked([[1.0]], [1.0], "Boston housing", (506, 13), 22.5328, (16, 50.0)), "Boston housing data"),
    ],
)
def test_operational_errors_are_one_line_and_status_2(capsys, monkeypatch, fail, message):
    monkeypatch.setitem(cli.COMMANDS, "bench", fail)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-lip: ")
    assert message in error
    assert error.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail():
        raise RuntimeError("a fault of the package")

    monkeypatch.setitem(cli.COMMANDS, "bench", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["bench"])


@pytest.mark.parametrize("options", [["reproduce"], ["reproduce", "--budget"], ["bench", "--quick"]])
@pytest.mark.parametrize(
    ("out", "message"),
    [("file", "--out to be a folder, file is a file"), ("file/below", "Not a directory"), ("/proc/none", "/proc/none")],
)
def test_an_out_that_cannot_be_written_to_is_found_first(capsys, monkeypatch, options, out, message):
    for place in ("experiment.train", "study.train_seed"):
        room = {"experiment": "regimes", "study": "budgets"}[place.partition(".")[0]]
        monkeypatch.setattr(f"lightning_lip.paper.{room}.{place}", lambda *_, **__: pytest.fail("it trained"))
    monkeypatch.setattr("lightning_lip.bench.steps.run.measure", lambda *_: pytest.fail("it measured"))
    Path("file").write_text("a file")
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*options, "--out", out])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert Path("file").read_text() == "a file"


def test_a_full_disk_behind_standard_output_is_one_line_and_status_2():
    code = "import torch, sys; from lightning_lip.cli import main; main(sys.argv[1:])"
    command_line = [sys.executable, "-c", code, "audit", "torch.nn:ReLU", "--input-shape", "2", "--json", "-"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command_line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "lightning-lip: [Errno 28] No space left on device\n")


def test_an_interrupt_is_status_130(capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_lip.paper.regimes.experiment.run_experiment", interrupt)
    assert run_cli("reproduce") == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_installed_command_is_this_one():
    (script,) = entry_points(group="console_scripts", name="lightning-lip")
    assert script.load() is cli.main
