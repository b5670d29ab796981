import inspect
from importlib.metadata import entry_points

import pytest
from support.commands import run_cli

from lightning_lip import cli
from lightning_lip.audit.command import audit
from lightning_lip.bench import bench
from lightning_lip.errors import AuditError, BoundError
from lightning_lip.paper import command, reproduce
from lightning_lip.reporting import extras


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


@pytest.mark.parametrize("function", [audit, bench, reproduce])
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
    assert 'pip install "lightning-lip[paper]"' in capsys.readouterr().err
    assert not called


def test_an_interrupt_is_status_130(capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_lip.paper.regimes.experiment.run_experiment", interrupt)
    assert run_cli("reproduce") == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_installed_command_is_this_one():
    (script,) = entry_points(group="console_scripts", name="lightning-lip")
    assert script.load() is cli.main
