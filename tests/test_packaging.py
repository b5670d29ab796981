"""The wheel that users install holds everything that the checkout does, and public names stand where they are said to.

Every path that is not in `PUBLIC` is private and may move.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import lightning_lip

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    ROOT / "lightning_lip": "lightning_lip",
    ROOT / "kernels": "lightning_lip/kernels",
    ROOT / "bench": "lightning_lip/bench",
}
PUBLIC = {
    "lightning_lip": (
        "Certificate CertifiedAccuracy CertifiedValidation LipschitzConstraint LipschitzMixin "
        "LipschitzMonitor LipschitzPenalty LipschitzProjector LipschitzRegularizer MaxNorm "
        "NoisyMeanAbsoluteError NoisyValidation Projection Rebalanced SpectralCaps Uncertified UnsupportedLayerError "
        "certify project rebalance register_constant"
    ),
    "lightning_lip.audit": "document",
    "lightning_lip.callbacks": (
        "CertifiedValidation LipschitzConstraint LipschitzMonitor LipschitzPenalty MaxNorm NoisyValidation SpectralCaps"
    ),
    "lightning_lip.certificates": "Certificate Part Uncertified certified_matrix_norm certify",
    "lightning_lip.cli": "main",
    "lightning_lip.constants": "lipschitz_constant register_constant",
    "lightning_lip.kernels": "Backend PowerStep choose_backend penalty_slope power_step",
    "lightning_lip.metrics": (
        "CertifiedAccuracy NoisyMeanAbsoluteError certified_accuracy certified_worst_case_mae feature_ranges "
        "noisy_mean_absolute_error"
    ),
    "lightning_lip.paper": "PaperRegressor",
    "lightning_lip.projection": "bound_caps joint_caps log_clip_caps per_layer_caps",
    "lightning_lip.rebalancing": "rebalance",
}
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.o")


def run(command, cwd, **environment):
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the sdist and, from it, the wheel, from a copy: a build leaves folders in its source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in SOURCES:
        shutil.copytree(folder, source / folder.name, ignore=IGNORED)
    # What an old checkout, in which the folder stood inside the package, leaves behind.
    (source / "lightning_lip" / "bench" / "__pycache__").mkdir(parents=True)
    out = tmp_path_factory.mktemp("wheel")
    # Isolation fetches setuptools from the network: only where the environment has none.
    isolation = ["--no-isolation"] if importlib.util.find_spec("setuptools") else []
    run([sys.executable, "-m", "build", *isolation, "--outdir", str(out), str(source)], cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def source_files():
    """Return each source file of the checkout with its place in the wheel."""
    found = {}
    for folder, package in SOURCES.items():
        for path in folder.rglob("*"):
            # The results of the benchmarks are data of the checkout, not of the package.
            is_ignored = {"__pycache__", "results"} & set(path.relative_to(folder).parts[:-1]) or path.suffix in {
                ".pyc",
                ".so",
                ".o",
                ".sh",  # runs from a checkout, where nothing is installed
            }
            if path.is_file() and not is_ignored:
                found[f"{package}/{path.relative_to(folder).as_posix()}"] = path
    return found


def packages():
    return sorted(
        place.removesuffix("/__init__.py").replace("/", ".")
        for place in source_files()
        if place.endswith("/__init__.py")
    )


def test_pyproject_lists_every_room():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"] == packages()
    assert len(packages()) > 20
    assert {ROOT / folder: name.replace(".", "/") for name, folder in settings["package-dir"].items()} == SOURCES


@pytest.mark.parametrize("name", packages())
def test_every_room_is_importable(name):
    room = importlib.import_module(name)
    left = ROOT / name.replace(".", "/")
    assert room.__file__ is not None, f"delete {left}, which an old checkout left: it hides the room of that name"
    assert room.__doc__


def test_what_the_package_is_called_by():
    assert set(PUBLIC["lightning_lip"].split()) <= set(lightning_lip.__all__)
    assert importlib.import_module("lightning_lip.kernels").ENVIRONMENT_VARIABLE == "LIGHTNING_LIP_BACKEND"
    assert torch.ops.lightning_lip.penalty.default.name() == "lightning_lip::penalty"
    assert torch.ops.lightning_lip.whole_module.default.name() == "lightning_lip::whole_module"


def test_every_source_file_of_the_checkout_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        missing = set(source_files()) - set(archive.namelist())
    assert not missing, f"add their packages to pyproject.toml: {sorted(missing)}"


def test_nothing_but_the_package_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_lip"}
    assert "lightning_lip/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if "/results/" in name]


def test_the_wheel_works_without_the_checkout(unpacked, tmp_path):
    # A folder that holds neither the checkout nor the wheel; the wheel stands before an editable installation.
    code = (
        "import importlib, sys\n"
        "from importlib.metadata import distributions\n"
        f"for name in {packages()!r}:\n"
        "    print(importlib.import_module(name).__file__)\n"
        "assert 'kernels' not in sys.modules\n"
        f"for module, names in {PUBLIC!r}.items():\n"
        "    assert all(hasattr(importlib.import_module(module), name) for name in names.split()), module\n"
        f"(found,) = distributions(name='lightning-lip', path=[{str(unpacked)!r}])\n"
        "(command,) = [e for e in found.entry_points if e.group == 'console_scripts']\n"
        "assert command.name == 'lightning-lip'\n"
        "import lightning_lip\n"
        f"assert lightning_lip.__version__ == found.version == {declared_version()!r}, found.version\n"
        "print(sys.modules[command.load().__module__].__file__)\n"
    )
    output = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(unpacked))
    files = [Path(line).resolve() for line in output.splitlines()]
    assert len(files) == len(packages()) + 1
    elsewhere = [file for file in files if unpacked.resolve() not in file.parents]
    assert not elsewhere, f"imported from outside the wheel, so missing in pyproject.toml: {elsewhere}"


def declared_version():
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return version


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == declared_version()
    assert {"cff-version", "message", "title", "authors", "license", "date-released"} <= set(citation)


def test_ci_runs_every_python_that_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert f'requires-python = ">={declared[0]}"' in text
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["pythons"]["strategy"]["matrix"]["python"] == declared
    assert ".ci/run" in [step.get("run") for step in jobs["whole"]["steps"]]


def test_importing_keeps_the_logger_of_lightnings_messages():
    """Who silenced ``lightning.pytorch`` must not hear from ``pytorch_lightning`` instead."""
    code = (
        "import lightning.pytorch; from lightning_utilities.core import rank_zero; before = rank_zero.log; "
        "import lightning_lip; assert rank_zero.log is before, rank_zero.log"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_does_not_bring_tensorboard():
    """It takes a quarter of what the package adds to the time of importing Lightning."""
    code = "import lightning_lip.cli, sys; assert 'tensorboard' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
