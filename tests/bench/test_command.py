import json
import sys

import pytest
import torch
from support.commands import run_cli
from support.contenders import SMALL_CONVOLUTIONS, csv_rows
from support.disk import full_disk

from lightning_lip import bench as package
from lightning_lip import cli
from lightning_lip.bench import command
from lightning_lip.bench.contenders import peers
from lightning_lip.bench.contenders.models import MODELS
from lightning_lip.bench.scoreboard.plan import planned
from lightning_lip.bench.steps import figures, growth, measure, report, run
from lightning_lip.errors import UsageError
from lightning_lip.reporting.extras import install_command


@pytest.fixture
def small_run(monkeypatch):
    """Quick runs of two small models, with as few steps as the tables need."""
    monkeypatch.setattr(run, "QUICK_SECONDS", 0.5)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 2)
    monkeypatch.setattr(measure, "BLOCK_SECONDS", 0.01)
    monkeypatch.setitem(MODELS, "mnist", SMALL_CONVOLUTIONS)


def test_the_command_writes_tables_document_and_plots(small_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "found"
    cli.main(["bench", "--quick", "--out", str(out), "--threads", "1"])
    shown = capsys.readouterr().out
    document = json.loads((out / "bench.json").read_text())
    assert [model["model"] for model in document["models"]] == ["paper", "mnist"]
    assert document["versions"]["torch"] == torch.__version__
    assert (document["machine"]["threads"], document["machine"]["device"]) == (1, "cpu")
    rows, _ = csv_rows(out / "steps.csv")
    of_model = "model model_title batch_size n_layers n_weights n_parameters has_convolutions floor_ms"
    of_row = "contender title operator vectors n_blocks own_ms share held_bytes peak_bytes allowed_bytes error_max"
    spread = [f"{what}_p{p}" for what in ("step_ms", "ratio", "added_ms") for p in (20, 50, 80)]
    assert set(rows[0]) == {*of_model.split(), *of_row.split(), "error_median", "guarantee", *spread}
    found = {(row["model"], row["contender"]): row for row in rows}
    expected = [peer.name for peer in peers.PEERS if not peer.missing()]
    assert [name for model, name in found if model == "mnist"] == ["plain", *expected]
    dense = [peer.name for peer in peers.PEERS if not (peer.missing() or peer.for_convolutions)]
    assert [name for model, name in found if model == "paper"] == ["plain", *dense]
    for key, row in found.items():
        assert float(row["step_ms_p20"]) <= float(row["step_ms_p50"]) <= float(row["step_ms_p80"])
        assert float(row["added_ms_p20"]) <= float(row["added_ms_p50"]) <= float(row["added_ms_p80"])
        assert (row["own_ms"] != "") == key[1].startswith("penalty")
        assert (row["allowed_bytes"] != "") == (key[1] in ("penalty_r8", "penalty_r1"))
        assert row["vectors"] == {"_r8": "8", "_r1": "1"}.get(key[1][-3:], row["vectors"])
    assert (found["mnist", "autograd_block_loop"]["vectors"], found["mnist", "autograd_loop"]["vectors"]) == ("8", "1")
    assert found["paper", "penalty_r8"]["share"] == ""
    assert float(found["mnist", "penalty_r8"]["share"]) == pytest.approx(1.2 * 16 / (3 * 4))
    assert found["paper", "exact_svd"]["operator"] == "true"
    assert found["mnist", "exact_svd"]["operator"] == "reshaped"
    assert found["mnist", "autograd_loop"]["operator"] == "true"
    # The kernel as a matrix is not the convolution.
    assert float(found["paper", "exact_svd"]["error_max"]) < 1e-5 < float(found["mnist", "exact_svd"]["error_max"])
    assert len(csv_rows(out / "growth.csv")[0]) == 2 * len(run.QUICK_SIZES)
    assert document["figures"] == ["steps.png", "growth_depth.png", "growth_width.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in document["figures"])
    assert "small convolutions; batch 4, 3 layers penalised" in shown
    assert report.SECTIONS["reshaped"].partition(" as ")[0] in shown  # the column may fold the rest
    assert "A quick run" in shown
    assert shown.count("The penalty (r = 8) takes") == shown.count("With r = 8 it adds") == 2
    assert shown.count("The penalty (r = 1) takes") == shown.count("With r = 1 it adds") == 2


def test_an_interrupted_benchmark_goes_on(small_run, tmp_path, monkeypatch, capsys):
    grown, measured = [], []

    def measure_once(name, *arguments):
        measured.append(name)
        return measure.measure(name, *arguments)

    def grow_until(sizes, *arguments):
        if len(grown) == 1:
            raise KeyboardInterrupt
        grown.append(sizes)
        return growth.growth(sizes, *arguments)

    monkeypatch.setattr(run, "measure", measure_once)
    monkeypatch.setattr(run, "growth", grow_until)
    options = {"out": str(tmp_path), "models": "paper", "quick": True, "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        command.bench(**options)
    capsys.readouterr()
    monkeypatch.setattr(run, "growth", growth.growth)
    found = command.bench(**options)
    shown = capsys.readouterr().out
    assert f"continuing: 2 of {1 + len(run.QUICK_SIZES)} models and sizes are done" in shown
    assert measured == ["paper"]
    assert shown.count("The penalty (r = 8) takes") == 1  # what is finished is in the report
    assert len(found["growth"]) == 2 * len(run.QUICK_SIZES)
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(found))
    assert not list(tmp_path.glob("*.partial*"))


def test_a_full_disk_leaves_the_earlier_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "steps.png"
    path.write_text("valid")
    found = {"models": [], "growth": []}
    rows = [{"contender": name, "title": name, "ratio": (1, 2, 3), "own_ms": None} for name in ("plain", "peer")]
    found["models"] = [{"rows": rows, "model_title": "model", "batch_size": 1}]
    with pytest.raises(OSError, match="File too large"), full_disk(1000):
        figures.write_figures(found, tmp_path)
    assert path.read_text() == "valid"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_are_put_back(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.bench(str(tmp_path), quick=True, threads=2)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "resnet50"], "--models to name some of paper, mnist, resnet18, vit, gpt2"),
        (["--models", ","], "--models to name some of"),
        (["--threads", "0"], "--threads to be 1 to 1024, got 0"),
        (["--out", __file__], "--out to be a folder"),
        (["--device", "tpu-ish"], "--device cpu, cuda"),
        (["--device", "meta"], "--device cpu, cuda"),
        (["--device", "cuda:99"], "--device cuda:99 to be there"),
    ],
)
def test_options_that_make_no_sense_are_one_message_and_status_2(capsys, monkeypatch, options, message):
    monkeypatch.setattr(command, "run", lambda *_, **__: pytest.fail("it ran"))
    assert run_cli("bench", *options) == 2
    assert message in capsys.readouterr().err


def test_models_are_chosen_by_name_in_the_usual_order():
    assert command.chosen_models("vit, paper", quick=False) == ("paper", "vit")
    assert command.chosen_models(None, quick=True) == command.QUICK_MODELS
    assert command.chosen_models(None, quick=False) == tuple(MODELS)
    with pytest.raises(UsageError, match="got 'paper,resnet50'"):
        command.chosen_models("paper,resnet50", quick=False)
    assert set(run.SECONDS) == set(MODELS)


@pytest.mark.parametrize("module", ["matplotlib", "scipy"])
def test_a_missing_extra_names_the_remedy(capsys, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert run_cli("bench", "--quick", "--out", str(tmp_path / "none")) == 2
    assert f"needs {module}" in (error := capsys.readouterr().err)
    assert install_command("bench") in error
    assert not (tmp_path / "none").exists()


def test_block_sizes_have_colours_of_their_own():
    assert figures.COLOURS[1] != figures.COLOURS[8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "adversarial"], "--methods to name some of cross_entropy, penalty"),
        (["--methods", ","], "--methods to name some of"),
        (["--quick", "--full"], "--quick without --full or --data"),
        (["--quick", "--data", "folder"], "--quick without --full or --data"),
        (["--seconds", "0"], "--seconds above 0"),
        (["--workers", "0"], "--workers to be 1 to 1024, got 0"),
        (["--out", __file__], "--out to be a folder"),
    ],
)
def test_options_of_the_scoreboard_that_make_no_sense_are_told(capsys, monkeypatch, options, message):
    monkeypatch.setattr(command, "run_scoreboard", lambda *_, **__: pytest.fail("it ran"))
    assert run_cli("scoreboard", *options) == 2
    assert message in capsys.readouterr().err


def test_options_of_the_scoreboard_reach_its_plan(monkeypatch, tmp_path):
    for module in ("matplotlib", "scipy", "mlxtend", "sklearn"):
        pytest.importorskip(module)
    calls = []
    monkeypatch.setattr(command, "run_scoreboard", lambda *arguments: calls.append(arguments))
    out = str(tmp_path / "out")
    cli.main(["scoreboard", "--out", out, "--methods", "margin,penalty", "--seconds", "3", "--workers", "5", "--full"])
    ((plan, folder, workers),) = calls
    assert plan == planned(("penalty", "margin"), None, 3.0, full=True, quick=False)
    assert (str(folder), workers) == (out, 5)


def test_a_peer_that_is_not_installed_is_left_out_or_refused_by_name(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "deel.torchlip", None)
    names = command.chosen_methods(None)
    assert {"margin", "penalty"} <= set(names)
    assert not {"torchlip_tau", "torchlip_hkr"} & set(names)
    assert run_cli("scoreboard", "--methods", "torchlip_tau") == 2
    assert "torchlip_tau needs deel.torchlip" in capsys.readouterr().err


def test_a_folder_without_data_is_one_message_and_status_2(capsys, tmp_path):
    for module in ("matplotlib", "scipy", "mlxtend", "sklearn"):
        pytest.importorskip(module)
    (tmp_path / "data").mkdir()
    options = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--methods", "margin")
    assert run_cli("scoreboard", *options) == 2
    assert "x_train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_package_is_the_command():
    assert package.bench is command.bench
