"""The README's Python examples run as pasted, with both Lightning packages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TAGS = re.findall(r"^\| `(lipschitz/[\w/<>]+)` \|", (ROOT / "docs" / "tensorboard.md").read_text(), re.MULTILINE)
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LIGHTNING = [example for example in EXAMPLES if "import lightning as L" in example]
VARIANTS = [example for example in EXAMPLES if "import" in example] + [
    e.replace("import lightning as L", "import pytorch_lightning as L") for e in LIGHTNING
]


def test_readme_has_the_examples_and_is_short():
    assert len(LIGHTNING) == 1
    assert len(EXAMPLES) == 4  # one of them is the line of the callbacks alone
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("example", VARIANTS, ids=range(len(VARIANTS)))
def test_example_runs_as_pasted(example, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "L.Trainer" in example:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (tmp_path / "lightning_logs").iterdir()
        events = EventAccumulator(str(folder))
        events.Reload()
        wanted = {tag.replace("<layer>", layer) for tag in TAGS if "<layer>" in tag for layer in ("net.0", "net.2")}
        assert len(wanted) == 10
        wanted |= {"lipschitz/product", "lipschitz/product_upper", "lipschitz/penalty"}
        assert wanted <= set(events.Tags()["scalars"])
    else:
        assert "tensor" in done.stdout or "True" in done.stdout
