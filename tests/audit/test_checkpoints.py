"""Networks from checkpoints and names: what is loaded, what is refused, and that no code in a file is run."""

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from support.audits import BORING, NETWORKS, PAPER, Touch
from support.commands import run_cli
from torch import nn

from lightning_lip.audit.checkpoints import HYPER_PARAMETERS, RECORDED_KEY, load_network
from lightning_lip.audit.command import audit
from lightning_lip.errors import AuditError
from lightning_lip.paper import PaperRegressor


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
    assert run_cli("audit", target, *([] if module is None else ["--module", module])) == 2
    assert capsys.readouterr().err.startswith("lightning-lip: ")


def test_a_switch_for_files_is_refused_where_there_is_none(networks):
    with pytest.raises(AuditError, match="--unsafe-load-pickle goes with a checkpoint"):
        load_network("audited_networks:Net", unsafe_load_pickle=True)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_damaged(reproduced, kept, capsys):
    contents = reproduced.read_bytes()
    Path("cut.ckpt").write_bytes(contents[: int(kept * len(contents)) if isinstance(kept, float) else kept])
    assert run_cli("audit", "cut.ckpt", "--module", PAPER) == 2
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
    assert run_cli("audit", "boring.pt", "--module", BORING, "--input-shape", "32", "--json", "-") in (0, 2)


def zip_of_text():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"garbage", b"\x00" * 64, b"PK\x03\x04", b"not\nat\nall a pickle, but text", zip_of_text()]
)
def test_a_file_of_something_else_is_damaged(content, capsys):
    Path("other.pt").write_bytes(content)
    assert run_cli("audit", "other.pt", "--module", BORING) == 2
    assert "other.pt is damaged, or no file that torch.save wrote" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_is_refused_and_the_code_not_run(tmp_path, capsys, protocol):
    trap = Touch(tmp_path / "ran")
    Path("code.ckpt").write_bytes(pickle.dumps({"state_dict": trap}, protocol=protocol))
    assert run_cli("audit", "code.ckpt", "--module", BORING, "--input-shape", "32") == 2
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
    assert run_cli("audit", "code.ckpt", "--module", BORING, "--input-shape", "32") == 2
    error = capsys.readouterr().err
    assert f"({os.mkdir.__module__}.mkdir)" in error, "only what is not part of a tensor is named"
    assert not Path(trap.path).exists()
    # The switch does what it says.
    assert run_cli("audit", "code.ckpt", "--module", BORING, "--input-shape", "32", "--unsafe-load-pickle") == 0
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
