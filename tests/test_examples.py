"""Every example runs, with both Lightning packages where it uses one of them, and does what it says."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in this process, as of another Lightning package; return the numbers that it prints, by word."""

    def run(name, package="lightning", arguments=()):
        pytest.importorskip(package)
        source = (EXAMPLES / name).read_text()
        if package == "pytorch_lightning":
            source = source.replace("import lightning as L", "import pytorch_lightning as L")
            source = source.replace("from lightning.pytorch", "from pytorch_lightning")
        script = tmp_path / Path(name).name
        script.write_text(source)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return [
            {word: float(number) for word, number in re.findall(r"(\w+) (\d+\.\d+)", line)}
            for line in capsys.readouterr().out.splitlines()
            if re.match(r"with|mean squared|accuracy", line)
        ]

    return run


def test_all_examples_are_tested():
    listed = set(re.findall(r"\]\(([\w/.]+\.(?:py|yaml|ipynb))\)", (EXAMPLES / "README.md").read_text()))
    files = {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*") if p.suffix in (".py", ".yaml", ".ipynb")}
    scripts = {"train.py", "certified.py", "cli/main.py", "cli/config.yaml", "third_party.py", "fabric.py", "plain.py"}
    assert listed == files == scripts | {"quickstart.ipynb"}


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_train(run, package):
    pytest.importorskip("sklearn")
    without, with_penalty = run("train.py", package)
    assert without["accuracy"] > 0.9
    assert with_penalty["accuracy"] > 0.9
    assert with_penalty["product"] < 0.8 * without["product"]


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_certified(run, package):
    pytest.importorskip("mlxtend")
    assert len((EXAMPLES / "certified.py").read_text().splitlines()) <= 60
    without, with_bound = run("certified.py", package)
    assert without["accuracy"] > 0.85
    assert with_bound["accuracy"] > 0.85
    assert with_bound["certified"] > 0.75 > 0.65 > without["certified"]


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_third_party(run, package):
    without, with_penalty = run("third_party.py", package)
    assert with_penalty["product"] < 0.8 * without["product"]


def test_fabric(run):
    (result,) = run("fabric.py")
    assert result["error"] < 0.01


def test_plain(run, capsys):
    pytest.importorskip("sklearn")
    (result,) = run("plain.py")
    assert result["accuracy"] > 0.85


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_cli(run, package, tmp_path):
    run("cli/main.py", package, ["fit", "-c", str(EXAMPLES / "cli" / "config.yaml"), "--trainer.max_epochs=2"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "lightning_logs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    # The module's example input lets the callbacks trace its graph.
    assert {"lipschitz/bound", "lipschitz/penalty", "lipschitz/certified", "val/noisy_mae/eta=0.2", "val/mse"} <= tags
    assert "val/certified_worst_case_mae/eps=0.05" in tags


def texts_and_pictures(notebook):
    """Return what a notebook's cells print, and the pictures that they show, in base64."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return text, [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_quickstart(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, of the extra `dev`")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat, of the extra `dev`")
    pytest.importorskip("ipykernel", reason="needs ipykernel, of the extra `dev`")
    stored = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "stderr" not in [output.get("name") for cell in code for output in cell.outputs]
    text, pictures = texts_and_pictures(stored)
    assert len(pictures) == 2
    assert all(len(picture) < 60_000 for picture in pictures)

    notebook = nbformat.from_dict(stored)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert list(tmp_path.iterdir()) == []
    now, drawn = texts_and_pictures(notebook)
    assert len(drawn) == 2
    assert re.sub(r"[\d.]+", "#", now) == re.sub(r"[\d.]+", "#", text)
    (before, product), (after, smaller) = re.findall(r"accuracy (\d\.\d+), product (\d+\.\d+)", now)
    assert min(float(before), float(after)) > 0.9
    assert float(smaller) < 0.5 * float(product)
    for lower, upper in re.findall(r"in \[([\d.]+), ([\d.]+)\]", now):
        assert 0.5 * float(upper) < float(lower) <= float(upper)
