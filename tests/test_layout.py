"""The rooms of the package: what the documents say of them is what is there, and none of them is too large."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {ROOT / "lightning_lip": "", ROOT / "kernels": "kernels/", ROOT / "bench": "bench/"}
MODULES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
ROOMS = {
    prefix + "".join(f"{part}/" for part in init.parent.relative_to(folder).parts)
    for folder, prefix in FOLDERS.items()
    for init in folder.rglob("__init__.py")
} - {""}
ALONE = {path.name for path in (ROOT / "lightning_lip").glob("[!_]*.py")}
MAX_MODULES = 8
MAX_LINES = 400


def named(document, pattern):
    found = re.findall(pattern, (ROOT / document).read_text(), re.MULTILINE)
    assert len(found) == len(set(found))
    return found


def test_the_rooms_are_found():
    assert {"bench/gpu/", "graph/rules/", "kernels/cpu/compiled/"} <= ROOMS
    assert {"cli.py", "errors.py"} <= ALONE


@pytest.mark.parametrize(
    ("document", "pattern"),
    [("docs/architecture.md", r"^\| *\d* *\| `([\w/.]+)` \|"), ("CONTRIBUTORS.md", r"^([a-z_/]+(?:/|\.py)) {2,}\S")],
)
def test_a_document_names_every_room_and_no_other(document, pattern):
    assert set(named(document, pattern)) == ROOMS | ALONE


def test_the_floors_of_the_architecture_are_those_of_the_contract():
    contract = (ROOT / "pyproject.toml").read_text().partition('containers = ["lightning_lip"]\nlayers = [')[2]
    layers = re.findall(r'"(.+?)"', contract.partition("]")[0])
    floors = [set(re.findall(r"\w+", layer)) for layer in layers]
    assert len(floors) > 10
    rows = named("docs/architecture.md", r"^\| (\d+) \| `([\w.]+?)(?:/|\.py)` \|")
    assert [{room for number, room in rows if int(number) == len(floors) - i} for i in range(len(floors))] == floors


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_holds_eight_modules_at_most(room):
    folder = ROOT / room if room.startswith(("kernels/", "bench/")) else ROOT / "lightning_lip" / room
    modules = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
    assert len(modules) <= MAX_MODULES, modules


def test_no_module_is_longer_than_400_lines():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_every_path_in_contributors_is_there():
    """Backticked paths of the list of what to add where."""
    text = (ROOT / "CONTRIBUTORS.md").read_text().partition("## Adding")[2]
    paths = re.findall(r"`((?:lightning_lip|kernels|bench|tests|docs)/[\w./]*)`", text)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
