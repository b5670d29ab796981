"""The documentation: its code runs, its messages are the package's own, every public object has a page."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_lip
import lightning_lip.metrics
from lightning_lip.constants import modules as constants

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
# Every ```python block runs, in order, in one namespace for each page; a block that cannot is fenced as
# ``` {.python .no-run}.
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUNNABLE = [page for page in PAGES if BLOCK.search((DOCS / page).read_text())]
# What a page needs beside the package itself.
NEEDS = {"recipes/hugging-face.md": ("transformers", "accelerate")}


def test_there_are_pages_with_code():
    assert {"index.md", "getting-started.md", "tensorboard.md", "recipes/classification.md"} <= set(RUNNABLE)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", RUNNABLE)
def test_the_code_of_a_page_runs(page, monkeypatch):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package, reason=f"needs {package}, of the extra `dev`")
    monkeypatch.setattr(constants, "_RULES", dict(constants._RULES))  # pages register constants of their own
    text = (DOCS / page).read_text()
    namespace = {"__name__": f"docs_{Path(page).stem}".replace("-", "_")}
    for match in BLOCK.finditer(text):
        # Blank lines in front: an error then names the page's own line.
        source = "\n" * (text[: match.start()].count("\n") + 1) + match[1]
        exec(compile(source, str(DOCS / page), "exec"), namespace)


def test_every_public_object_has_a_page():
    documented = set(re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in DOCS.rglob("*.md")), re.MULTILINE))
    public = {f"lightning_lip.{name}" for name in lightning_lip.__all__}
    functions = {f"lightning_lip.metrics.{name}" for name in lightning_lip.metrics.__all__ if name.islower()}
    assert public | functions <= documented


def strings_of_the_package():
    """Return every string of the source, as a message shows it: the values in f-strings become ``…``."""
    found = []
    for path in (ROOT / "lightning_lip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.BinOp):  # "..." + "\n".join(...)
                parts = (c.value for c in ast.walk(node) if isinstance(c, ast.Constant))
                found.append("".join(part for part in parts if isinstance(part, str)))
    return found


def test_the_messages_are_those_of_the_package():
    text = (DOCS / "troubleshooting.md").read_text()
    messages = [m for m in re.findall(r"^### `(.*)`$", text, re.MULTILINE) if " " in m]
    assert len(messages) > 25
    strings = strings_of_the_package()
    for message in messages:
        fragments = [part.strip(" .:") for part in message.split("…") if part.strip(" .:,()")]
        assert any(all(part in string for part in fragments) for string in strings), message


def test_links_of_the_readme_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert "CHANGELOG.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_pictures_are_small_and_all_used():
    pages = "\n".join((DOCS / page).read_text() for page in PAGES)
    pictures = sorted((DOCS / "pictures").iterdir())
    assert len(pictures) >= 8
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture.name
        assert picture.name in pages, f"{picture.name} is on no page"


def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="needs MkDocs, of the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings, of the extra `docs`")
    # A copy: the build must not depend on what else lies in the checkout.
    for name in ("docs", "lightning_lip", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "site"],
        cwd=tmp_path,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    for page in ("index.html", "api/LipschitzPenalty/index.html", "maths/certificates/index.html"):
        html = (site / page).read_text()
        # What a browser loads by itself: scripts, style sheets, images, fonts.
        loads = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\"\s>]+)", html)
        loads += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)\"?[^>]*href=\"?([^\"\s>]+)", html)
        loads += re.findall(r"<link[^>]*href=\"?([^\"\s>]+)\"?[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)", html)
        assert loads
        assert [address for address in loads if "//" in address] == []
    assert "max_inputs" in (site / "api/CertifiedValidation/index.html").read_text()
