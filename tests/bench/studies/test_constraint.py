"""The study of the constraint: its table, and that its excess tells a budget that is kept from one that is not."""

import pytest
import torch
from support.contenders import csv_rows

from lightning_lip import LipschitzProjector
from lightning_lip.bench.studies import constraint


def row_of(*arguments):
    return dict(zip(constraint.COLUMNS, constraint.train(*arguments), strict=True))


def test_the_quick_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constraint, "OPTIMIZERS", {"Adam": constraint.OPTIMIZERS["Adam"]})
    threads = torch.get_num_threads()
    try:
        constraint.main(["--quick", "--output", str(tmp_path / "made")])
    finally:
        torch.set_num_threads(threads)
    rows, comments = csv_rows(tmp_path / "made" / "constraint.csv")
    assert comments[0].startswith("# cpu: ")
    assert list(rows[0]) == constraint.COLUMNS
    assert [(row["target"], row["metric"]) for row in rows] == [
        ("", ""),
        *((target, metric) for target in ("2.0", "10.0") for metric in ("relative", "euclidean")),
    ]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for row in rows:
        assert (row["optimiser"], row["steps"]) == ("Adam", "28")  # 1400 digits in batches of 50
        assert float(row["accuracy"]) > 0.5
    # The plain training has no budget, and nothing to time.
    assert not any(rows[0][column] for column in constraint.COLUMNS[5:])
    for row in rows[1:]:
        assert float(row["largest_excess"]) < 1e-3
        for what in ("projection", "svd"):
            times = [float(row[f"{what}_us_{p}"]) for p in ("p20", "p50", "p80")]
            assert 0 < times[0] <= times[1] <= times[2]


def test_the_excess_is_that_of_the_true_norms(monkeypatch):
    # A budget that binds from the first step on is met closely, from below or above: the steps work on estimates.
    assert -1e-2 < float(row_of("Adam", 0.1, "relative", 1)["largest_excess"]) < 1e-2
    # Without projections the same table says by how much it is missed.
    monkeypatch.setattr(LipschitzProjector, "step", lambda self: None)
    assert float(row_of("Adam", 0.1, "relative", 1)["largest_excess"]) > 1


@pytest.mark.parametrize("metric", ["relative", "euclidean"])
def test_a_wide_budget_changes_nothing(metric):
    bounded, plain = row_of("SGD", 1e6, metric, 1), row_of("SGD", None, "", 1)
    assert bounded["accuracy"] == plain["accuracy"]
