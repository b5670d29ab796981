"""Build the sdist and, from it, the wheel of the tracked files, and check both: `make release`.

The wheel is installed into a clean environment, whose other packages are this one's: nothing is downloaded.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs in the clean environment.
CHECK = """
import importlib, sys
from pathlib import Path
rooms, version, site = sys.argv[1].split(), sys.argv[2], Path(sys.prefix).resolve()
for room in rooms:
    file = Path(importlib.import_module(room).__file__).resolve()
    assert site in file.parents, f"{room} comes from {file}, not from the wheel"
import lightning_lip
assert lightning_lip.__version__ == version, lightning_lip.__version__
assert (Path(lightning_lip.__file__).parent / "py.typed").is_file()
"""


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command, without anything of this environment in its paths; return what it prints."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(str(part) for part in command[:6])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path, out: Path) -> tuple[Path, Path]:
    """Build from a copy of the tracked files in `folder`; return sdist and wheel, in `out`."""
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if run("git", "status", "--porcelain", cwd=ROOT):
        print("Note: not everything is committed; tracked files are taken as they lie here.")
    shutil.rmtree(out, ignore_errors=True)
    # Without --sdist and --wheel the wheel is built from the sdist: what the sdist lacks is missing in it.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, folder)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def check_installed(wheel: Path, version: str, folder: Path) -> int:
    """Install the wheel alone into an environment in `folder` and import every room; return how many there are."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    # Dependencies are those of this environment; a path in a .pth file comes after the wheel's own folder, and the
    # .pth files in it (an editable installation) are not read.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    with zipfile.ZipFile(wheel) as archive:
        rooms = [name for name in archive.namelist() if name.endswith("/__init__.py")]
    names = [name.removesuffix("/__init__.py").replace("/", ".") for name in rooms]
    run(python, "-c", CHECK, " ".join(names), version, cwd=folder)
    run(folder / "bin" / "lightning-lip", "--help", cwd=folder)
    return len(names)


def declared(pattern: str, name: str) -> str:
    """Return the one place in a file of the checkout that fits."""
    found = re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE)
    if len(found) != 1:
        raise SystemExit(f"{name}: one line should fit {pattern!r}; {len(found)} do")
    return found[0]


def main() -> None:
    """Build, check, and say what is in `dist`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", action="store_true", help="do not ask CHANGELOG.md for the version and its date")
    draft = parser.parse_args().draft
    version = declared(r'^version = "(.*)"$', "pyproject.toml")
    if declared(r"^version: (.*)$", "CITATION.cff") != version:
        raise SystemExit(f"CITATION.cff: another version than {version}, which pyproject.toml states")
    if not draft:
        date = declared(rf"^## {re.escape(version)} \((\d{{4}}-\d\d-\d\d)\)$", "CHANGELOG.md")
        if declared(r"^date-released: (.*)$", "CITATION.cff") != date:
            raise SystemExit(f"CITATION.cff: another date than {date}, which CHANGELOG.md states")
    out = ROOT / "dist"
    with tempfile.TemporaryDirectory() as folder:
        sdist, wheel = build(Path(folder) / "source", out)
        for archive in (sdist, wheel):
            if version not in archive.name:
                raise SystemExit(f"{archive.name} is not of version {version}")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        if missing := {"LICENSE", "README.md", "pyproject.toml"} - names:
            raise SystemExit(f"{sdist.name} lacks {sorted(missing)}")
        rooms = check_installed(wheel, version, Path(folder) / "clean")
    print(f"dist/{sdist.name} and dist/{wheel.name}: built, checked, {rooms} rooms imported from the wheel.")
    print("Next: git tag v" + version + ", then twine upload dist/*")


if __name__ == "__main__":
    main()
