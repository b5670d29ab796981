"""Optional packages."""

import re
from pathlib import Path

import pytest

from lightning_lip.reporting.extras import MissingExtraError, extra, install_command

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_missing_extra_names_the_remedy():
    assert install_command("paper") == 'pip install -e ".[paper]"'
    with pytest.raises(MissingExtraError, match=re.escape(install_command("paper"))):
        extra("lightning_lip_no_such_module.stats")


def test_no_text_installs_by_a_name_that_no_index_knows():
    files = [
        path for room in ("lightning_lip", "bench", "kernels", "examples", "docs") for path in (ROOT / room).rglob("*")
    ]
    texts = {path: path.read_text() for path in [*files, ROOT / "README.md"] if path.suffix in (".py", ".md")}
    assert [path for path, text in texts.items() if re.search(r"pip install ['\"]?lightning-lip", text)] == []
