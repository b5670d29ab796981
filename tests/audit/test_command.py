import io
import json
import math
import os
import pickle
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console
from torch import nn

from lightning_lip import cli
from lightning_lip.audit.checkpoints import HYPER_PARAMETERS, RECORDED_KEY, load_network
from lightning_lip.audit.command import AuditError, audit, document, example_input, load_inputs
from lightning_lip.audit.report import interval, print_report, rounded_up, write_json
from lightning_lip.certificates.interval import Certificate, Part, Uncertified, certify
from lightning_lip.errors import BoundError
from lightning_lip.graph.bound import GraphNode
from lightning_lip.paper import PaperRegressor
from lightning_lip.paper.regimes.settings import Run

PAPER = "lightning_lip.paper:PaperRegressor"
BORING = "lightning.pytorch.demos.boring_classes:BoringModel"

NETWORKS = """
import torch
from torch import nn
import lightning.pytorch as pl

def diagonal(*entries):
    layer = nn.Linear(len(entries), len(entries), bias=False)
    layer.weight.data = torch.diag(torch.tensor(entries))
    return layer

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = diagonal(2.0, 1.0), diagonal(1.5, 1.0)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.attend = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        return self.attend(x, x, x)[0]

class Module(pl.LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(1, width)
        self.net = nn.Linear(width, 2)

    def forward(self, x):
        return self.net(x)

class Forgetful(Module):
    strict_loading = False

class NeedsWidth(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(width, 2)

def two():
    return nn.Sequential(diagonal(2.0, 2.0))

def double_gelu():
    return nn.Sequential(diagonal(2.0, 2.0), nn.GELU())

def huge():
    return nn.Sequential(*[diagonal(1e30, 1e30) for _ in range(11)])

def not_a_network():
    return 3

def fails():
    raise RuntimeError("no network today")

class Holder:
    inner = Net()
    number = 3
"""


class Touch:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def networks(tmp_path):
    (tmp_path / "audited_networks.py").write_text(NETWORKS)
    path = list(sys.path)
    yield "audited_networks"
    sys.modules.pop("audited_networks", None)
    assert sys.path == path, "the working folder must not stay on the path"


@pytest.fixture
def save_lightning(make_trainer):
    """Return a function that saves a Lightning checkpoint of a module, with changes to its contents."""
    import lightning.pytorch

    def save(module, path, **changes):
        trainer = make_trainer(lightning.pytorch)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path)
        if changes:
            torch.save(torch.load(path, weights_only=True) | changes, path)
        return str(path)

    return save


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The checkpoint that the command `reproduce` leaves, after one epoch."""
    pytest.importorskip("mlxtend")
    pytest.importorskip("matplotlib")
    from lightning_lip.paper.data import load_boston
    from lightning_lip.paper.regimes.training import artefacts_of, train

    out = tmp_path_factory.mktemp("reproduced")
    run = Run("product", 0, n_norms=3, coefficient=0.0562, epochs=1)
    train(run, load_boston(), str(out))
    return out / artefacts_of(run)["checkpoint"]


def run_cli(*options):
    """Return the exit status of the command."""
    try:
        cli.main(["audit", *map(str, options)])
    except SystemExit as stopped:
        return stopped.code
    return 0


# What is loaded


def test_reproduces_own_checkpoint_is_audited(reproduced, capsys):
    assert run_cli(reproduced, "--module", PAPER, "--input-shape", "13", "--json", "-") == 0
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


def test_a_checkpoint_that_names_the_papers_network_needs_no_module(save_lightning, tmp_path):
    path = save_lightning(PaperRegressor(width=5), tmp_path / "paper.ckpt", **{RECORDED_KEY: PAPER})
    model = load_network(path)
    assert isinstance(model, PaperRegressor)
    assert model.net[0].out_features == 5


@pytest.mark.parametrize("name", ["audited_networks:fails", 3])
def test_any_other_name_in_a_file_is_not_imported(save_lightning, tmp_path, networks, name):
    path = save_lightning(PaperRegressor(), tmp_path / "paper.ckpt", **{RECORDED_KEY: name})
    with pytest.raises(AuditError, match="name it with --module"):
        load_network(path)
    assert networks not in sys.modules


def test_another_librarys_lightning_module(save_lightning, tmp_path, capsys):
    module = BoringModel()
    path = save_lightning(module, tmp_path / "boring.ckpt")
    assert run_cli(path, "--module", BORING, "--input-shape", "32", "--json", "out.json") == 0
    found = json.loads(Path("out.json").read_text())
    truth = float(torch.linalg.matrix_norm(module.layer.weight.detach().double(), 2))
    assert truth <= found["upper"] <= truth * (1 + 1e-6)
    assert "layer (Linear)" in capsys.readouterr().out


def test_hyper_parameters_come_from_the_checkpoint(save_lightning, tmp_path, networks, pl):
    # Both packages' modules: the class, not the package, says how its file is read.
    code = NETWORKS.replace("lightning.pytorch as pl", f"{pl.__name__} as pl")
    (tmp_path / "audited_networks.py").write_text(code)
    torch.save(
        {
            "pytorch-lightning_version": "2.5.0",
            "hyper_parameters": {"width": 7},
            "state_dict": {"net.weight": torch.ones(2, 7), "net.bias": torch.zeros(2)},
        },
        "seven.ckpt",
    )
    model = load_network("seven.ckpt", "audited_networks:Module")
    assert model.net.weight.tolist() == [[1.0] * 7] * 2


def test_a_state_dict_file_with_a_class_a_function_and_a_module(networks):
    state = {"first.weight": torch.diag(torch.tensor([4.0, 1.0])), "second.weight": torch.eye(2)}
    torch.save(state, "plain.pt")
    torch.save({"state_dict": state, "epoch": 3}, "wrapped.pt")
    for file in ("plain.pt", "wrapped.pt"):
        for name in ("audited_networks:Net", "audited_networks.Net", "audited_networks:Holder.inner"):
            assert audit(file, name, input_shape="2", json="-")["upper"] == pytest.approx(4)
    inner = sys.modules[networks].Holder.inner
    assert load_network("plain.pt", "audited_networks:Holder.inner") is inner


def test_a_lightning_checkpoint_into_what_a_function_returns(save_lightning, tmp_path, networks):
    path = save_lightning(BoringModel(), tmp_path / "boring.ckpt")
    with pytest.raises(AuditError, match=r"not those of Sequential.*Missing key.*0\.weight"):
        load_network(path, "audited_networks:two")


@pytest.mark.parametrize("target", ["audited_networks:two", "audited_networks.two"])
def test_an_importable_function(networks, target):
    assert audit(target, input_shape="2", json="-")["upper"] == pytest.approx(2)


def test_the_working_folder_is_searched_last(tmp_path):
    (tmp_path / "textwrap.py").write_text("raise RuntimeError")
    with pytest.raises(AuditError, match="has no 'Net'"):
        load_network("textwrap:Net")


@pytest.mark.parametrize(
    ("target", "module", "message"),
    [
        ("gone.ckpt", BORING, "no file gone.ckpt"),
        ("folder/gone", BORING, "no file folder"),
        ("gone", None, "as package.module:Class, got 'gone'"),
        ("audited_networks:Gone", None, "has no 'Gone'"),
        ("audited_gone:Net", None, "'audited_gone' of 'audited_gone:Net' cannot be imported: ModuleNotFoundError"),
        ("audited_networks:fails", None, "cannot be called without arguments: RuntimeError: no network today"),
        ("audited_networks:NeedsWidth", None, "cannot be called without arguments: TypeError.*width"),
        ("audited_networks:not_a_network", None, "to return a torch.nn.Module, got a int"),
        ("audited_networks:Holder.number", None, "or to return one, got a int"),
        ("audited_networks:Net", BORING, "--module .*BoringModel goes with a checkpoint"),
        ("sharded.ckpt", BORING, "is a folder"),
        ("weights.pt", None, "name it with --module"),
        ("weights.pt", BORING, r"not those of BoringModel.*Missing key.*layer\.weight"),
        ("weights.pt", "gone", "as package.module:Class, got 'gone'"),
        ("list.pt", BORING, "state_dict in list.pt, got a list"),
        ("other.pt", BORING, "got the keys epoch"),
        ("empty_dict.pt", BORING, "got the keys (none)"),
        ("numbers.pt", BORING, "got the keys 0"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_is_status_2(networks, capsys, target, module, message):
    os.mkdir("sharded.ckpt")
    torch.save({"weight": torch.ones(2, 2)}, "weights.pt")
    torch.save([torch.ones(1)], "list.pt")
    torch.save({"epoch": 3}, "other.pt")
    torch.save({}, "empty_dict.pt")
    torch.save({0: torch.ones(1)}, "numbers.pt")
    message = message.replace("(none)", r"\(none\)")
    with pytest.raises(AuditError, match=message):
        load_network(target, module)
    assert run_cli(target, *([] if module is None else ["--module", module])) == 2
    assert capsys.readouterr().err.startswith("lightning-lip: ")


def test_a_switch_for_files_is_refused_where_there_is_none(networks):
    with pytest.raises(AuditError, match="--unsafe-load-pickle goes with a checkpoint"):
        load_network("audited_networks:Net", unsafe_load_pickle=True)


# Damaged files and files with code


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_damaged(reproduced, kept, capsys):
    contents = reproduced.read_bytes()
    Path("cut.ckpt").write_bytes(contents[: int(kept * len(contents)) if isinstance(kept, float) else kept])
    assert run_cli("cut.ckpt", "--module", PAPER) == 2
    assert "cut.ckpt is damaged, or no file that torch.save wrote" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(20))
def test_overwritten_bytes_never_end_in_a_traceback(seed):
    torch.save({"state_dict": BoringModel().state_dict()}, "boring.pt")
    contents = bytearray(Path("boring.pt").read_bytes())
    generator = np.random.default_rng(seed)
    contents[generator.integers(len(contents))] ^= int(generator.integers(1, 256))
    start = int(generator.integers(200))
    contents[start : start + 8] = generator.bytes(8)
    Path("boring.pt").write_bytes(contents)
    assert run_cli("boring.pt", "--module", BORING, "--input-shape", "32", "--json", "-") in (0, 2)


@pytest.mark.parametrize("content", [b"garbage", b"\x00" * 64, b"PK\x03\x04", b"not\nat\nall a pickle, but text"])
def test_a_file_of_something_else_is_damaged(content, capsys):
    Path("other.pt").write_bytes(content)
    assert run_cli("other.pt", "--module", BORING) == 2
    assert "other.pt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_is_refused_and_the_code_not_run(tmp_path, capsys, protocol):
    trap = Touch(tmp_path / "ran")
    Path("code.ckpt").write_bytes(pickle.dumps({"state_dict": trap}, protocol=protocol))
    assert run_cli("code.ckpt", "--module", BORING, "--input-shape", "32") == 2
    error = capsys.readouterr().err
    assert "was refused" in error
    assert f"{os.mkdir.__module__}.mkdir" in error
    assert "--unsafe-load-pickle loads it and runs the code in it" in error
    assert not Path(trap.path).exists()


@pytest.mark.parametrize(("is_zip", "protocol"), [(True, 2), (True, 4), (False, 2), (False, 4)])
def test_code_in_a_file_of_torch_save_is_refused_and_not_run(tmp_path, capsys, is_zip, protocol):
    trap = Touch(tmp_path / "ran")
    torch.save(
        {"state_dict": BoringModel().state_dict(), "extra": trap},
        "code.ckpt",
        _use_new_zipfile_serialization=is_zip,
        pickle_protocol=protocol,
    )
    assert run_cli("code.ckpt", "--module", BORING, "--input-shape", "32") == 2
    error = capsys.readouterr().err
    assert f"({os.mkdir.__module__}.mkdir)" in error, "only what is not part of a tensor is named"
    assert not Path(trap.path).exists()
    # The switch does what it says.
    assert run_cli("code.ckpt", "--module", BORING, "--input-shape", "32", "--unsafe-load-pickle") == 0
    assert Path(trap.path).is_dir()


def test_code_that_fails_when_it_is_run_on_purpose(tmp_path):
    torch.save({"extra": Touch(tmp_path)}, "code.ckpt")
    with pytest.raises(AuditError, match=r"damaged.*FileExistsError"):
        load_network("code.ckpt", BORING, unsafe_load_pickle=True)


def test_a_pickled_module_needs_the_switch():
    torch.save(nn.Sequential(nn.Linear(2, 2)), "whole.pt")
    with pytest.raises(AuditError, match=r"refused: .*torch\.nn\.modules\.container\.Sequential"):
        load_network("whole.pt")
    assert isinstance(load_network("whole.pt", unsafe_load_pickle=True), nn.Sequential)


def test_data_with_code_is_refused_with_the_switch_too(networks, tmp_path):
    trap = Touch(tmp_path / "ran")
    torch.save(trap, "data.pt")
    np.save("data.npy", np.array([trap], dtype=object))
    torch.save({"first.weight": torch.eye(2), "second.weight": torch.eye(2)}, "weights.pt")
    for data in ("data.pt", "data.npy"):
        with pytest.raises(AuditError, match=r"refused|cannot be read"):
            audit("weights.pt", "audited_networks:Net", input_shape="2", data=data, unsafe_load_pickle=True)
    assert not Path(trap.path).exists()


# Lightning's hyper-parameters


@pytest.mark.parametrize("key", HYPER_PARAMETERS)
@pytest.mark.parametrize(
    "hyper_parameters",
    [{"backbone": {"class_path": "os.mkdir"}}, {"layers": [{"x": 1}, {"class_path": "os.mkdir"}]}],
)
def test_hyper_parameters_that_name_classes_are_refused(save_lightning, tmp_path, networks, key, hyper_parameters):
    module = load_network("audited_networks:Module")
    path = save_lightning(module, tmp_path / "cli.ckpt", **{key: hyper_parameters})
    with pytest.raises(AuditError, match=f"hyper-parameters {next(iter(hyper_parameters))} name classes to import"):
        load_network(path, "audited_networks:Module")


@pytest.mark.parametrize("key", HYPER_PARAMETERS)
def test_an_instantiator_in_the_file_is_not_called(save_lightning, tmp_path, networks, key):
    (tmp_path / "audited_trap.py").write_text("raise RuntimeError('imported')")
    changes = {key: {"width": 3, "_instantiator": "audited_trap.run"}}
    path = save_lightning(load_network("audited_networks:Module"), tmp_path / "cli.ckpt", **changes)
    assert load_network(path, "audited_networks:Module").net.in_features == 3
    with pytest.raises(AuditError, match=r"audited_trap|imported"):
        load_network(path, "audited_networks:Module", unsafe_load_pickle=True)


def test_the_class_that_a_file_names_must_be_the_one_given(save_lightning, tmp_path, networks):
    module = load_network("audited_networks:Module")
    right = {"width": 3, "_class_path": "audited_networks.Module"}
    path = save_lightning(module, tmp_path / "cli.ckpt", hyper_parameters=right)
    load_network(path, "audited_networks:Module")
    wrong = {"width": 3, "_class_path": "audited_networks.Other"}
    path = save_lightning(module, tmp_path / "cli.ckpt", hyper_parameters=wrong)
    with pytest.raises(AuditError, match=r"its class is audited_networks\.Other, not Module"):
        load_network(path, "audited_networks:Module")


def test_hyper_parameters_that_are_no_dict(save_lightning, tmp_path, networks):
    path = save_lightning(load_network("audited_networks:Module"), tmp_path / "bad.ckpt", hyper_parameters=[3])
    with pytest.raises(AuditError, match=r"'hyper_parameters' of .* to be a dict, got a list"):
        load_network(path, "audited_networks:Module")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("audited_networks:NeedsWidth", r"in the file: none, as without save_hyperparameters\(\)\): TypeError.*width"),
        (PAPER, r"PaperRegressor cannot be built.*Missing key.*net\.0\.weight"),
    ],
)
def test_the_wrong_lightning_class(save_lightning, tmp_path, networks, module, message):
    path = save_lightning(BoringModel(), tmp_path / "boring.ckpt")
    with pytest.raises(AuditError, match=message):
        load_network(path, module)


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")
def test_weights_that_a_lenient_class_does_not_find_are_missing(save_lightning, tmp_path, networks):
    state = {"state_dict": {"net.weight": torch.ones(2, 3)}}
    path = save_lightning(load_network("audited_networks:Module"), tmp_path / "half.ckpt", **state)
    with pytest.raises(AuditError, match=r"Missing key.*net\.bias"):
        load_network(path, "audited_networks:Module")
    with pytest.raises(AuditError, match=r"lacks weights of Forgetful.*: net\.bias\."):
        load_network(path, "audited_networks:Forgetful")


def test_a_lightning_checkpoint_without_weights(save_lightning, tmp_path, networks):
    path = save_lightning(load_network("audited_networks:Module"), tmp_path / "none.ckpt", state_dict={"a": 1})
    with pytest.raises(AuditError, match=r"cannot be built|holds no weights"):
        load_network(path, "audited_networks:Module")


# Inputs


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


def test_an_example_without_a_batch():
    model = nn.ReLU()
    model.example_input_array = torch.zeros(())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_lip.audit.command.load_network", lambda *args: model)
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
def test_data_for_a_model_of_two_inputs(example):
    torch.manual_seed(0)
    model = TwoInputs()
    example = example or {"left": torch.zeros(1, 2), "right": torch.zeros(1, 3)}
    torch.save({"right": torch.randn(4, 3), "left": torch.randn(4, 2)}, "named.pt")
    torch.save([torch.randn(4, 2), torch.randn(4, 3)], "listed.pt")
    path = Path("named.pt" if isinstance(example, dict) else "listed.pt")
    model.example_input_array = example
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_lip.audit.command.load_network", lambda *args: model)
        found = audit("any", data=str(path), json="-")
    # The network is affine, so that its slope is the norm of both weights side by side.
    truth = math.hypot(*torch.cat([model.left.weight, model.right.weight], dim=1).flatten().tolist())
    assert found["lower"] == pytest.approx(truth, rel=1e-6)
    assert found["input_shapes"] == [[2], [3]]
    assert found["upper"] >= truth * (1 - 1e-12)


def test_more_inputs_than_are_measured(networks):
    torch.save(torch.randn(300, 2), "many.pt")
    assert audit("audited_networks:Net", input_shape="2", data="many.pt", json="-")["n_inputs"] == 256


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (torch.zeros(4, 3), r"shape \(N, 2\) in --data data.pt, got torch.float32 of shape \(4, 3\)"),
        (torch.zeros(4, 2, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(()), r"of shape \(\)"),
        ([], "got none"),
        (3, "got int"),
        (["text"], "Expected tensors in --data"),
        ({"a": None}, "Expected tensors in --data"),
    ],
)
def test_data_that_do_not_fit(contents, message):
    torch.save(contents, "data.pt")
    with pytest.raises(AuditError, match=message):
        load_inputs(Path("data.pt"), torch.zeros(1, 2))


def test_named_data_that_lack_a_name_or_differ_in_number():
    example = {"left": torch.zeros(1, 2), "right": torch.zeros(1, 3)}
    torch.save({"left": torch.zeros(4, 2), "up": torch.zeros(4, 3)}, "data.pt")
    with pytest.raises(AuditError, match=r"Expected inputs left, right in --data data.pt, got left, up"):
        load_inputs(Path("data.pt"), example)
    torch.save({"left": torch.zeros(4, 2), "right": torch.zeros(5, 3)}, "data.pt")
    with pytest.raises(AuditError, match=r"as many of each input.*\[4, 5\]"):
        load_inputs(Path("data.pt"), example)
    torch.save(torch.zeros(4, 2), "data.pt")
    with pytest.raises(AuditError, match=r"Expected inputs \(2 tensors\)"):
        load_inputs(Path("data.pt"), tuple(example.values()))


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


# Status, document, report


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
    assert run_cli(target, "--input-shape", shape, *limits, "--json", "-") == status
    captured = capsys.readouterr()
    assert bool(captured.err) == bool(status)
    if status < 2:
        found = json.loads(captured.out)
        assert found["passed"] == (None if limit is None else status == 0)
        assert found["max_bound"] == (None if limit is None else float(limit))
    else:
        assert not captured.out


def test_the_message_of_a_bound_that_is_not_kept(networks):
    with pytest.raises(BoundError, match=r"of audited_networks:two is 2\.00001; --max-bound is 1\.5"):
        audit("audited_networks:two", input_shape="2", max_bound=1.5)
    with pytest.raises(BoundError, match=r"does not exist; --max-bound is 1.5"):
        audit("audited_networks:Attention", input_shape="3,4", max_bound=1.5)
    with pytest.raises(BoundError, match="huge is inf"):
        audit("audited_networks:huge", input_shape="2", max_bound=1.5)


def test_an_unknown_layer_is_named(networks, capsys):
    assert run_cli("audited_networks:Attention", "--input-shape", "3,4", "--max-bound", "5") == 1
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


def test_json_on_standard_output_stands_alone(networks, capsys):
    audit("audited_networks:two", input_shape="2", json="-")
    assert json.loads(capsys.readouterr().out)["certified"]


def test_json_that_cannot_be_written(networks, tmp_path):
    with pytest.raises(AuditError, match="There is no folder gone to write --json"):
        audit("audited_networks:two", input_shape="2", json="gone/out.json")
    with pytest.raises(AuditError, match="cannot be written"):
        write_json({}, str(tmp_path))


def test_the_report_shows_layers_constants_interval_and_limit(networks, capsys):
    torch.save(torch.ones(4, 2), "data.pt")
    audit("audited_networks:double_gelu", input_shape="2", data="data.pt", max_bound=5)
    shown = capsys.readouterr().out
    assert "0 (Linear)" in shown
    assert "share of log-bound" in shown
    # GELU's constant, printed rounded up.
    assert "1.12891" in shown
    assert "the largest slope at 4 inputs" in shown
    assert "The certified bound is at most" in shown
    assert "--max-bound 5 is kept." in shown
    assert "give --data" not in shown


def test_repeated_layers_and_names_with_brackets():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    result = certify(model, torch.zeros(1, 2))
    found = document("[red]", model, torch.zeros(1, 2), result)
    found["layers"][0]["name"] = "[bold]x"
    found["refused"] = ["[green]why"]
    found["skipped"] = ["[blue]what"]
    console = Console(file=io.StringIO(), width=150)
    print_report(console, found)
    shown = console.file.getvalue()
    for text in (
        "[red]: torch.nn",
        "[bold]x (Linear) x2",
        "  - [green]why",
        "left out: [blue]what",
        "by method: product",
    ):
        assert text in shown


@pytest.mark.parametrize("value", [0.1, 1 / 3, 2.0, 1.0000001, 123456.7, 1e300, 3e-310, 0.0])
def test_a_printed_bound_is_a_bound(value):
    assert value <= float(rounded_up(value)) <= value * (1 + 1.1e-5)


def test_certified_numbers_are_printed_outwards(networks, capsys):
    torch.manual_seed(0)
    np.save("data.npy", torch.randn(4, 2).numpy())
    found = audit("audited_networks:Module", input_shape="3", json="out.json")
    line = next(line for line in interval(found) if "certified upper" in line)
    assert float(line.split()[3]) >= found["upper"]


def test_the_result_types_are_told_apart(networks):
    model = load_network("audited_networks:Attention")
    assert isinstance(certify(model, torch.zeros(2, 3, 4)), Uncertified)
    assert isinstance(certify(load_network("audited_networks:two"), torch.zeros(2, 2)), Certificate)


def test_a_zip_that_is_no_checkpoint(capsys):
    with zipfile.ZipFile("archive.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    assert run_cli("archive.pt", "--module", BORING) == 2
    assert "archive.pt is damaged, or no file that torch.save wrote" in capsys.readouterr().err
