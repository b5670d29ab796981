"""The command `lightning-lip audit`: inputs, status and document."""

import json
import math
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from support.audits import BORING, PAPER, Touch
from support.commands import run_cli
from support.disk import full_disk
from torch import nn

from lightning_lip.audit.checkpoints import load_network
from lightning_lip.audit.command import audit, document, example_input, load_inputs
from lightning_lip.audit.report import interval
from lightning_lip.certificates.interval import Part, certify
from lightning_lip.errors import AuditError, BoundError
from lightning_lip.graph.bound import GraphNode


def test_reproduces_own_checkpoint_is_audited(reproduced, capsys):
    assert run_cli("audit", reproduced, "--module", PAPER, "--input-shape", "13", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["certified"]
    assert found["module"] == "lightning_lip.paper.model:PaperRegressor"
    assert [layer["name"] for layer in found["layers"]] == ["net.0", "net.2", "net.4", "net.6"]
    weights = torch.load(reproduced, weights_only=True)["state_dict"]
    for layer in found["layers"]:
        truth = float(torch.linalg.matrix_norm(weights[layer["name"] + ".weight"].double(), 2))
        assert layer["sigma"] <= truth * (1 + 1e-6)
        assert truth <= layer["certified"] <= truth * (1 + 1e-6)
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)


def test_the_measured_slope_is_below_the_certificate(reproduced, tmp_path):
    from lightning_lip.paper.data import load_boston

    np.save("boston.npy", load_boston().inputs)
    found = audit(str(reproduced), PAPER, input_shape="13", data="boston.npy")
    assert 0 < found["lower"] <= found["upper"]
    assert found["n_inputs"] == 256
    assert found["tightness"] == found["upper"] / found["lower"]


def test_another_librarys_lightning_module(save_lightning, tmp_path, capsys):
    module = BoringModel()
    path = save_lightning(module, tmp_path / "boring.ckpt")
    assert run_cli("audit", path, "--module", BORING, "--input-shape", "32", "--json", "out.json") == 0
    found = json.loads(Path("out.json").read_text())
    truth = float(torch.linalg.matrix_norm(module.layer.weight.detach().double(), 2))
    assert truth <= found["upper"] <= truth * (1 + 1e-6)
    assert "layer (Linear)" in capsys.readouterr().out


def test_data_with_code_is_refused_with_the_switch_too(networks, tmp_path):
    trap = Touch(tmp_path / "ran")
    torch.save(trap, "data.pt")
    np.save("data.npy", np.array([trap], dtype=object))
    torch.save({"first.weight": torch.eye(2), "second.weight": torch.eye(2)}, "weights.pt")
    for data in ("data.pt", "data.npy"):
        with pytest.raises(AuditError, match=r"refused|cannot be read"):
            audit("weights.pt", "audited_networks:Net", input_shape="2", data=data, unsafe_load_pickle=True)
    assert not Path(trap.path).exists()


def test_the_models_own_example_input(networks):
    assert audit("audited_networks:Module", json="-")["input_shapes"] == [[3]]


@pytest.mark.parametrize("text", ["2", " 2 ", "(2)", "[2]"])
def test_input_shapes_as_written(text):
    model = nn.Linear(2, 2, dtype=torch.float64)
    example = example_input(model, text)
    assert example.shape == (2, 2)
    assert example.dtype == torch.float64


@pytest.mark.parametrize("text", ["", "0", "-1", "(2,)", "a", "1,,2", "1.5", "1x28"])
def test_no_input_shape(text):
    with pytest.raises(AuditError, match="Expected --input-shape as sizes"):
        example_input(nn.Linear(2, 2), text)


def test_an_unknown_input_shape_names_the_option():
    with pytest.raises(AuditError, match="--input-shape 1,28,28, or set the model's example_input_array"):
        example_input(nn.Linear(2, 2))


def test_a_shape_that_the_model_does_not_take():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    with pytest.raises(AuditError, match=r"Sequential fails on a batch of shape \(2, 3\).*RuntimeError"):
        example_input(model, "3")
    assert all(module.training for module in model.modules())


def test_a_module_without_a_forward_pass(networks):
    with pytest.raises(AuditError, match="forward pass of LightningModule fails"):
        audit("lightning.pytorch:LightningModule", input_shape="2")


def test_an_example_without_a_batch(monkeypatch):
    model = nn.ReLU()
    model.example_input_array = torch.zeros(())
    monkeypatch.setattr("lightning_lip.audit.command.load_network", lambda *args: model)
    with pytest.raises(AuditError, match="The audit of any failed: "):
        audit("any")


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(3, 1)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


def test_data_in_every_form(tmp_path):
    inputs, target = torch.randn(5, 2), torch.zeros(5)
    example = torch.zeros(1, 2)
    np.save("a.npy", inputs.numpy())
    np.savez("one.npz", inputs=inputs.numpy())
    np.savez("pair.npz", inputs=inputs.numpy(), target=target.numpy())
    torch.save(inputs, "a.pt")
    torch.save((inputs, target), "pair.pt")
    torch.save({"inputs": inputs, "target": target}, "dict.pt")
    for name in ("a.npy", "one.npz", "pair.npz", "a.pt", "pair.pt", "dict.pt"):
        found = load_inputs(Path(name), example)
        assert found.n_inputs == 5
        assert torch.equal(found.arguments[0], inputs)


@pytest.mark.parametrize("example", [(torch.zeros(1, 2), torch.zeros(1, 3)), None])
def test_data_for_a_model_of_two_inputs(example, monkeypatch):
    torch.manual_seed(0)
    model = TwoInputs()
    example = example or {"left": torch.zeros(1, 2), "right": torch.zeros(1, 3)}
    torch.save({"right": torch.randn(4, 3), "left": torch.randn(4, 2)}, "named.pt")
    torch.save([torch.randn(4, 2), torch.randn(4, 3)], "listed.pt")
    path = Path("named.pt" if isinstance(example, dict) else "listed.pt")
    model.example_input_array = example
    monkeypatch.setattr("lightning_lip.audit.command.load_network", lambda *args: model)
    found = audit("any", data=str(path), json="-")
    # The network is affine, so that its slope is the norm of both weights side by side.
    truth = math.hypot(*torch.cat([model.left.weight, model.right.weight], dim=1).flatten().tolist())
    assert found["lower"] == pytest.approx(truth, rel=1e-6)
    assert found["input_shapes"] == [[2], [3]]
    assert found["upper"] >= truth * (1 - 1e-12)


ONE = torch.zeros(1, 2)
NAMED = {"left": ONE, "right": torch.zeros(1, 3)}


@pytest.mark.parametrize(
    ("contents", "example", "message"),
    [
        (torch.zeros(4, 3), ONE, r"shape \(N, 2\) in --data data.pt, got torch.float32 of shape \(4, 3\)"),
        (torch.zeros(4, 2, dtype=torch.int64), ONE, "got torch.int64"),
        (torch.zeros(()), ONE, r"of shape \(\)"),
        ([], ONE, "got none"),
        (3, ONE, "got int"),
        (["text"], ONE, "Expected tensors in --data"),
        ({"a": None}, ONE, "Expected tensors in --data"),
        (NAMED | {"left": torch.zeros(5, 2)}, NAMED, r"as many of each input.*\[5, 1\]"),
        ({"left": ONE, "up": ONE}, NAMED, r"Expected inputs left, right in --data data.pt, got left, up"),
        (ONE, tuple(NAMED.values()), r"Expected inputs \(2 tensors\)"),
    ],
)
def test_data_that_do_not_fit(contents, example, message):
    torch.save(contents, "data.pt")
    with pytest.raises(AuditError, match=message):
        load_inputs(Path("data.pt"), example)


@pytest.mark.parametrize("name", ["gone.npy", "gone.pt", "bad.npy", "bad.npz", "bad.pt"])
def test_data_files_that_cannot_be_read(name, networks):
    for bad in ("bad.npy", "bad.npz", "bad.pt"):
        Path(bad).write_bytes(b"nothing")
    with pytest.raises(AuditError, match="There is no file" if "gone" in name else "cannot be read|damaged"):
        audit("audited_networks:Net", input_shape="2", data=name)


def test_data_that_give_no_slope(networks):
    torch.save(torch.zeros(0, 2), "data.pt")
    with pytest.raises(AuditError, match="failed: No data to measure"):
        audit("audited_networks:Net", input_shape="2", data="data.pt")


@pytest.mark.parametrize(
    ("target", "shape", "limit", "status"),
    [
        ("audited_networks:two", "2", "2.001", 0),
        ("audited_networks:two", "2", "1.999", 1),
        ("audited_networks:two", "2", "0", 1),
        ("audited_networks:Attention", "3,4", "1e300", 1),
        ("audited_networks:Attention", "3,4", None, 0),
        ("audited_networks:huge", "2", "1e300", 1),
        ("audited_networks:two", "2", "-1", 2),
        ("audited_networks:two", "2", "inf", 2),
        ("audited_networks:two", "2", "many", 2),
        ("audited_networks:two", "2,2,x", "3", 2),
        ("gone.ckpt", "2", "3", 2),
    ],
)
def test_exit_status(networks, capsys, target, shape, limit, status):
    limits = [] if limit is None else ["--max-bound", limit]
    assert run_cli("audit", target, "--input-shape", shape, *limits, "--json", "-") == status
    captured = capsys.readouterr()
    assert bool(captured.err) == bool(status)
    if status < 2:
        found = json.loads(captured.out)
        assert found["passed"] == (None if limit is None else status == 0)
        assert found["max_bound"] == (None if limit is None else float(limit))
    else:
        assert not captured.out


def test_the_report_ends_with_the_command_that_checks_its_bound(networks, tmp_path, capsys):
    points = tmp_path / "some points.npy"
    np.save(points, np.eye(2, dtype=np.float32))
    assert run_cli("audit", "audited_networks:two", "--input-shape", "2", "--data", points) == 0
    label, command = capsys.readouterr().out.splitlines()[-1].split(": ", 1)
    assert label == "Next, as a check with an exit status"
    program, *arguments = shlex.split(command)
    assert program == "lightning-lip"
    assert run_cli(*arguments) == 0
    assert "is kept." in capsys.readouterr().out.splitlines()[-1]
    assert run_cli("audit", "audited_networks:Attention", "--input-shape", "3,4") == 0
    assert "Next" not in capsys.readouterr().out


LEAVING = """
import sys
from torch import nn
{on_import}
class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        {on_construction}

    def forward(self, x):
        {on_call}
        return super().forward(x)
"""
LEAVING_AT = ("on_import", "on_construction", "on_call")


@pytest.mark.parametrize("where", LEAVING_AT)
@pytest.mark.parametrize("leave", ["sys.exit(0)", "sys.exit()", "raise SystemExit(1)"])
def test_code_that_ends_the_process_does_not_pass(capsys, monkeypatch, where, leave):
    Path("leaving.py").write_text(LEAVING.format(**dict.fromkeys(LEAVING_AT, "pass") | {where: leave}))
    monkeypatch.delitem(sys.modules, "leaving", raising=False)
    assert run_cli("audit", "leaving:Net", "--input-shape", "2", "--max-bound", "1e9", "--json", "-") == 2
    captured = capsys.readouterr()
    assert "leaving:Net calls sys.exit" in captured.err
    assert not captured.out


def test_a_full_disk_leaves_the_earlier_document(networks, capsys):
    Path("out.json").write_text("valid")
    with full_disk():
        assert run_cli("audit", "audited_networks:two", "--input-shape", "2", "--json", "out.json") == 2
    assert "--json out.json cannot be written" in capsys.readouterr().err
    assert Path("out.json").read_text() == "valid"
    assert not list(Path().glob(".out*"))


def test_the_message_of_a_bound_that_is_not_kept(networks):
    with pytest.raises(BoundError, match=r"of audited_networks:two is 2\.00001; --max-bound is 1\.5"):
        audit("audited_networks:two", input_shape="2", max_bound=1.5)
    with pytest.raises(BoundError, match=r"does not exist; --max-bound is 1.5"):
        audit("audited_networks:Attention", input_shape="3,4", max_bound=1.5)
    for spoilt in ("nan_bias", "nan_mean"):
        with pytest.raises(BoundError, match=rf"{spoilt}.* does not exist; --max-bound is 100"):
            audit(f"audited_networks:{spoilt}", input_shape="2", max_bound=100)
    with pytest.raises(BoundError, match="huge is inf"):
        audit("audited_networks:huge", input_shape="2", max_bound=1.5)


def test_an_unknown_layer_is_named(networks, capsys):
    assert run_cli("audit", "audited_networks:Attention", "--input-shape", "3,4", "--max-bound", "5") == 1
    shown = capsys.readouterr().out
    refused = shown.partition("Refused:")[2]
    assert "attend" in refused
    assert "MultiheadAttention" in refused
    assert "none: see what was refused" in shown
    assert "embed (Linear)" in shown


def test_weights_that_are_not_finite_are_refused(networks):
    torch.save({"first.weight": torch.full((2, 2), math.nan), "second.weight": torch.eye(2)}, "nan.pt")
    found = audit("nan.pt", "audited_networks:Net", input_shape="2", json="out.json")
    assert not found["certified"]
    assert found["upper"] is None
    assert any("first" in reason for reason in found["refused"])
    assert found["layers"][0]["certified"] is None
    assert json.loads(Path("out.json").read_text()) == found


def test_the_json_document_holds_everything_and_survives_the_round_trip(networks):
    torch.save(torch.randn(4, 2), "data.pt")
    found = audit("audited_networks:Net", input_shape="2", data="data.pt", json="out.json", max_bound=9)
    read = json.loads(Path("out.json").read_text())
    assert read == found
    for key in read:
        assert f"`{key}`" in (document.__doc__ or ""), f"{key} is not documented"
    assert read["schema"] == 1
    assert all(set(layer) == {field.name for field in fields(Part)} for layer in read["layers"])
    model = load_network("audited_networks:Net")
    result = certify(model, torch.zeros(2, 2))
    assert tuple(Part(**layer) for layer in read["layers"]) == result.parts
    assert tuple(GraphNode(**node) for node in read["operations"]) == result.graph
    assert read["bounds"] == result.bounds
    assert (read["upper"], read["log_upper"], read["method"]) == (result.upper, result.log_upper, result.tighter)
    assert read["tightness"] >= 1


def test_numbers_that_json_does_not_have_are_null(networks):
    found = audit("audited_networks:huge", input_shape="2", json="out.json")
    assert found["certified"]
    assert found["upper"] is None
    assert found["log_upper"] == pytest.approx(11 * math.log(1e30), rel=1e-6)
    json.loads(Path("out.json").read_text(), parse_constant=pytest.fail)
    assert any("its logarithm is at most 759.854" in line for line in interval(found))


def test_a_constant_network():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    result = certify(model, torch.zeros(1, 2), torch.zeros(1, 2))
    found = document("zero", model, torch.zeros(1, 2), result, 1, 0.0)
    assert (found["upper"], found["log_upper"], found["tightness"], found["passed"]) == (0.0, None, None, True)
    assert any("certified upper bound             0" in line for line in interval(found))


GRAPH = """
import torch
from torch import nn

class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 3)
        self.register_buffer("propagation", torch.ones(5, 5) / 5)

    def forward(self, x):
        return (self.propagation @ self.layer(x)).mean(0)
"""


def test_a_network_without_a_batch(tmp_path, monkeypatch, capsys):
    (tmp_path / "graph_network.py").write_text(GRAPH)
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    np.save("data.npy", x)
    arguments = ("graph_network:Graph", "--input-shape", "5,2", "--data", "data.npy", "--json", "-")
    assert run_cli("audit", *arguments, "--no-batch") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["input_shapes"] == [[5, 2]]
    assert found["n_inputs"] == 1
    weight = torch.tensor(found["layers"][0]["certified"])
    # The mean of 5 nodes of equal values, from 5 nodes that are averaged.
    assert found["lower"] == pytest.approx(float(weight) / 5**0.5, rel=1e-5)
    assert found["upper"] == pytest.approx(found["lower"], rel=1e-5)
    np.save("data.npy", x[:4])
    with pytest.raises(AuditError, match=r"shape \(5, 2\) in --data data.npy, got torch.float32 of shape \(4, 2\)"):
        audit("graph_network:Graph", input_shape="5,2", data="data.npy", no_batch=True)


def test_the_layers_at_work_are_told_on_standard_error(networks, monkeypatch, capsys):
    monkeypatch.setattr("lightning_lip.reporting.progress.SECONDS_BETWEEN_LINES", 0.0)
    audit("audited_networks:Net", input_shape="2", json="-")
    told = capsys.readouterr()
    assert told.err.splitlines() == ["certifying: 1/2, first", "certifying: 2/2, second"]
    json.loads(told.out)
