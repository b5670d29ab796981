"""Studies of minutes go on after an interrupt: what is finished is not done again, and the table is whole."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from lightning_lip.bench.studies import callbacks, constraint, kernels, knee, scale, tracking, trainers

ROOT = Path(__file__).resolve().parents[3]


def constraint_row(optimiser, target, metric, epochs):
    return [optimiser, target, metric, 28 * epochs, "0.900", *[""] * (len(constraint.COLUMNS) - 5)]


def tracking_row(optimiser, penalty, r, k, epochs, data):
    return tracking.Result(optimiser, penalty[0], r, k, 1e-3 / r, 1e-2, 0.1 * k, 5.0, 0.9, 2.0)


def knee_row(*setting):
    return knee.Result(*setting[:5], 0.1, 2.0, 3.0, 0.9, 1.0, 1.5, 1.0, 2.5)


@pytest.mark.parametrize(
    ("study", "name", "train"),
    [
        (knee, "train", knee_row),
        (constraint, "train", constraint_row),
        (tracking, "train", tracking_row),
        (kernels, "interleaved", None),
        (callbacks, "_in_a_process", lambda name, blocks: [[100.0] * blocks, [100.0 + len(name)] * blocks]),
    ],
)
def test_an_interrupted_study_goes_on(tmp_path, monkeypatch, capsys, study, name, train):
    if train is None:
        monkeypatch.setattr(study, "MODELS", {model: [(4, 3)] for model in ("one", "two", "three")})
        train = study.interleaved
    calls = []

    def until(limit):
        def interrupted(*arguments):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(arguments)
            return train(*arguments)

        monkeypatch.setattr(study, name, interrupted)

    stem = study.__name__.rpartition(".")[2]
    options = ["--quick", "--output", str(tmp_path / "out")]
    threads = torch.get_num_threads()
    try:
        until(2)
        with pytest.raises(KeyboardInterrupt):
            study.main(options)
        until(None)
        study.main(options)
        n_calls = len(calls)
        table = (tmp_path / "out" / f"{stem}.csv").read_text()
        assert not list((tmp_path / "out").glob("*.partial*"))
        study.main(["--quick", "--output", str(tmp_path / "whole")])
    finally:
        torch.set_num_threads(threads)
    assert n_calls == len(calls) - n_calls > 2
    if study is not kernels:  # whose table is times
        assert (tmp_path / "whole" / f"{stem}.csv").read_text() == table
    assert table.count("\n") == (tmp_path / "whole" / f"{stem}.csv").read_text().count("\n")


def test_an_interrupted_table_of_trainers_goes_on_with_the_cases_left(tmp_path, monkeypatch, capsys):
    started = []

    def launch(processes, indices, folder, ends=None):
        assert not list(folder.glob("*.partial*"))
        for index in indices:
            if len(started) == ends:
                # As if the process had got no further than the end of the training itself.
                torch.save(torch.zeros(1), folder / f"{index}.trained")
                raise KeyboardInterrupt
            started.append(index)
            case, stem = trainers.CASES[index], folder / str(index)
            if case.refused:
                stem.with_suffix(".err").write_text(f"ValueError: {case.refused}")
            else:
                torch.save(trainers.reference(case.feature, trainers.COEFFICIENT), stem.with_suffix(".pt"))

    half = len(trainers.CASES) // 2
    monkeypatch.setattr(trainers, "_launch", lambda *arguments: launch(*arguments, ends=half))
    with pytest.raises(KeyboardInterrupt):
        trainers.main(["--output", str(tmp_path / "out")])
    assert len((tmp_path / "out" / "trainers.partial.jsonl").read_text().splitlines()) == 1 + half
    monkeypatch.setattr(trainers, "_launch", launch)
    trainers.main(["--output", str(tmp_path / "out")])
    assert sorted(started) == list(range(len(trainers.CASES)))
    trainers.main(["--output", str(tmp_path / "whole")])
    tables = [(tmp_path / folder / "trainers.csv").read_text() for folder in ("out", "whole")]
    assert tables[0] == tables[1]
    assert "False" not in tables[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trainers.csv"]


def test_the_arithmetic_of_scale_is_done_again_whole(tmp_path, monkeypatch, capsys):
    scale.main(["--output", str(tmp_path)])
    table = (tmp_path / "scale.csv").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(scale, "_ring", lambda ranks: 1 / (ranks - 2))  # fails at two GPUs
        with pytest.raises(ZeroDivisionError):
            scale.main(["--output", str(tmp_path)])
    assert (tmp_path / "scale.csv").read_text() == table
    assert table == (ROOT / "bench" / "results" / "scale.csv").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["scale.csv"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it is imported already
@pytest.mark.parametrize("study", [callbacks, constraint, kernels, scale, tracking, trainers])
def test_an_output_that_is_a_file_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, study):
    (tmp_path / "file").write_text("a file")
    monkeypatch.setattr(sys, "argv", ["study", "--output", str(tmp_path / "file")])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(study.__name__, run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"{study.__name__.rpartition('.')[2]}: ")
    assert str(tmp_path / "file") in told
    assert told.count("\n") == 1
    assert (tmp_path / "file").read_text() == "a file"
