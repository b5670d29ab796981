"""Studies of minutes go on after an interrupt: what is finished is not done again, and the table is whole."""

import pytest
import torch

from lightning_lip.bench.studies import constraint, kernels, knee, tracking


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
