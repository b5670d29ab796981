"""The study of the knee: its table, and what it trains."""

import math

import pytest
import torch
from support.contenders import csv_rows

from lightning_lip.bench.studies import knee
from lightning_lip.bench.studies.tracking import digits
from lightning_lip.penalty.penalties import COEFFICIENT, KNEE


def test_the_quick_table(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        knee.main(["--quick", "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    rows, comments = csv_rows(tmp_path / "knee.csv")
    assert comments[0].startswith("# cpu: ")
    assert list(rows[0]) == list(knee.Result._fields)
    assert (rows[0]["penalised"], rows[0]["ratio"], rows[0]["knee"]) == ("", "", "")
    assert {row["penalised"] for row in rows[1:]} == {"product"}
    for row in rows:
        assert float(row["loss"]) < 3
    # In the range where the product is plain, the ratio is proportional to the coefficient.
    ratios = {float(row["coefficient"]): float(row["ratio"]) for row in rows[1:]}
    assert ratios[1e-2] == pytest.approx(10 * ratios[1e-3], rel=1e-3)
    assert ratios[1e-3] == pytest.approx(10 * ratios[1e-4], rel=1e-3)


def test_what_is_trained_holds_the_defaults_and_the_plain_product():
    kinds = {(name, optimiser, *rest) for name, optimiser, *rest in knee.settings()}
    assert len(kinds) == len(knee.settings())
    for model in knee.MODELS:
        for optimiser in knee.OPTIMISERS:
            for how in (("", None, ""), ("product", KNEE, f"{COEFFICIENT:g}"), ("product", math.inf, "0.001")):
                assert (model, optimiser, *how) in kinds


def test_auto_sets_the_share_at_the_first_step():
    result = knee.train("mlp", "Adam", "bound", 100.0, "auto 0.5", 2, digits())
    assert result.ratio == pytest.approx(0.5, rel=1e-6)
    assert result.log_bound == pytest.approx(result.log_product, abs=1e-4)  # a chain of ReLU
