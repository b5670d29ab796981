"""The wheel that users install holds everything that the checkout does."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    ROOT / "lightning_lip": "lightning_lip",
    ROOT / "kernels": "lightning_lip/kernels",
    ROOT / "bench": "lightning_lip/bench",
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
    """Build the wheel from a copy: a build leaves folders in its source tree, which other tests would see."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in SOURCES:
        shutil.copytree(folder, source / folder.name, ignore=IGNORED)
    out = tmp_path_factory.mktemp("wheel")
    # Isolation fetches setuptools from the network: only where the environment has none.
    isolation = ["--no-isolation"] if importlib.util.find_spec("setuptools") else []
    run([sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(out), str(source)], cwd=out)
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


def test_the_list_of_packages_is_not_empty():
    assert {"lightning_lip", "lightning_lip.callbacks", "lightning_lip.kernels", "lightning_lip.bench"} <= set(
        packages()
    )


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


def test_the_wheel_works_without_the_checkout(unpacked, tmp_path):
    # A folder that holds neither the checkout nor the wheel; the wheel stands before an editable installation.
    code = (
        "import importlib, sys\n"
        "from importlib.metadata import distributions\n"
        f"for name in {packages()!r}:\n"
        "    print(importlib.import_module(name).__file__)\n"
        "assert 'kernels' not in sys.modules\n"
        "import lightning_lip\n"
        "assert all(hasattr(lightning_lip, name) for name in lightning_lip.__all__)\n"
        f"(found,) = distributions(name='lightning-lip', path=[{str(unpacked)!r}])\n"
        "(command,) = [e for e in found.entry_points if e.group == 'console_scripts']\n"
        "assert command.name == 'lightning-lip'\n"
        "print(sys.modules[command.load().__module__].__file__)\n"
    )
    output = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(unpacked))
    files = [Path(line).resolve() for line in output.splitlines()]
    assert len(files) == len(packages()) + 1
    elsewhere = [file for file in files if unpacked.resolve() not in file.parents]
    assert not elsewhere, f"imported from outside the wheel, so missing in pyproject.toml: {elsewhere}"


def test_importing_keeps_the_logger_of_lightnings_messages():
    """Who silenced ``lightning.pytorch`` must not hear from ``pytorch_lightning`` instead."""
    code = (
        "import lightning.pytorch; from lightning_utilities.core import rank_zero; before = rank_zero.log; "
        "import lightning_lip; assert rank_zero.log is before, rank_zero.log"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
