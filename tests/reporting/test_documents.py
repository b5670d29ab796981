"""Files are written whole or not at all; versions and the machine."""

import csv
import os
import threading

import pytest
import torch
from support.disk import full_disk

from lightning_lip.reporting import documents
from lightning_lip.reporting.console import make_console, print_line


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "made" / "file.json"
    documents.write_json({"a": [1, None]}, path)
    assert path.read_text() == '{"a": [1, null]}\n'
    with pytest.raises(ValueError, match="Out of range float"):
        documents.write_json({"a": float("nan")}, path)
    replace = documents.Path.replace

    def interrupted(self, target):
        replace(self, self.with_suffix(".moved"))
        raise KeyboardInterrupt

    monkeypatch.setattr(documents.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        documents.write_json({"a": 2}, path)
    assert path.read_text() == '{"a": [1, null]}\n'


def test_a_file_is_on_the_disk_before_it_takes_the_others_place(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    flushed = []

    def flush(descriptor):
        flushed.append((os.pread(descriptor, 100, 0), path.read_text()))

    monkeypatch.setattr(os, "fsync", flush)
    documents.write_text("new", path)
    assert flushed == [(b"new", "old")]
    assert path.read_text() == "new"

    def fail(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        documents.write_text("newer", path)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: documents.write_text("x" * 10_000, path),
        lambda path: documents.write_json({"a": list(range(10_000))}, path),
        lambda path: documents.write_csv(path, ["a"], [[1]] * 10_000),
    ],
)
def test_a_full_disk_leaves_what_was_there(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("valid")
    with pytest.raises(OSError, match="File too large"), full_disk():
        write(path)
    assert path.read_text() == "valid"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_beside_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    documents.write_text("text", tmp_path / "file")
    with pytest.raises(OSError, match="folder"):
        documents.write_text("text", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_links_and_pipes_stay_what_they_are(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    (tmp_path / "target").write_text("old")
    link.symlink_to(tmp_path / "target")
    documents.write_text("new", link)
    assert link.is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    documents.write_text("through", pipe)
    reader.join(60)
    assert read == ["through"]
    assert pipe.is_fifo()


def test_a_table_lies_below_its_comments(tmp_path):
    documents.write_csv(tmp_path / "t.csv", ["a", "b"], [[1, "x, y"], [None, 2.5]], {"cpu": "some", "gpu": None})
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[:2] == ["# cpu: some", "# gpu: None"]
    assert list(csv.reader(lines[2:])) == [["a", "b"], ["1", "x, y"], ["", "2.5"]]


def test_versions_and_machine():
    found = documents.versions("numpy", "lightning-lip-no-such-package")
    assert list(found) == ["python", "torch", "numpy", "lightning-lip-no-such-package"]
    assert found["torch"] == torch.__version__
    assert found["lightning-lip-no-such-package"] is None
    machine = documents.machine(torch.device("cpu"))
    assert (machine["threads"], machine["device"], machine["gpu"]) == (torch.get_num_threads(), "cpu", None)
    assert machine["cpu"]


def test_lines_are_neither_broken_nor_styled(capsys):
    text = "[bold]" + "x" * 200
    print_line(make_console(), text)
    assert capsys.readouterr().out == text + "\n"
