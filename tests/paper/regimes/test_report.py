"""The sentences and tables of the report."""

import io
import re

from rich.console import Console
from support.records import EQUAL, LAST_HEAVY, PRODUCT_BEST, PRODUCT_WORST, synthetic

from lightning_lip.paper.regimes import claims, report
from lightning_lip.paper.regimes.settings import LAMBDAS, PAPER_SETTING, Setting


def test_findings_name_a_direction_only_where_a_test_shows_one():
    start = "MAE of product penalty against layer penalty: "
    lower, *_ = report.findings(synthetic(PRODUCT_BEST))
    assert re.match(start + r"lower in train \(-[01]\.\d+ ± 0\.0\d+, p = 0\.039\), eta 0 ", lower)
    assert "no difference shown" not in lower
    higher, *_ = report.findings(synthetic(PRODUCT_WORST))
    assert re.match(start + r"higher in train \(\+[01]\.\d+ ± 0\.0\d+, p = 0\.039\), eta 0 ", higher)
    for neutral in (*report.findings(synthetic(EQUAL)), *report.findings(synthetic(PRODUCT_BEST, 3))):
        assert "no difference shown in train, eta 0, eta 0.2, eta 0.4, eta 0.6" in neutral
        assert "lower" not in neutral
        assert "higher" not in neutral


def test_summary_counts_the_claims_that_hold():
    assert report.summary(claims.judge(synthetic(PRODUCT_BEST))).startswith("2 of 4 claims hold in this run: (a), (b)")
    none = report.summary(claims.judge(synthetic(EQUAL, none={"sigmas": LAST_HEAVY})))
    assert none == "None of the 4 claims is shown to hold in this run."


def test_notes_say_whether_max_norm_acted_and_what_three_norms_bound():
    idle = report.notes(PAPER_SETTING, synthetic(EQUAL))
    assert "MaxNorm 10 was never active; the largest norm of a unit at the end was 2.50." in idle
    assert any("the output layer is free" in note for note in idle)
    active = report.notes(Setting(n_norms=4), synthetic(EQUAL, maxnorm={"n_clipped": 3}))
    assert active[0].startswith("MaxNorm 10 rescaled a unit's weights 30 times")
    assert not any("the output layer is free" in note for note in active)


def test_the_report_shows_errors_norms_and_claims():
    console = Console(file=io.StringIO(), width=120)
    report.print_report(console, {PAPER_SETTING: synthetic(PRODUCT_BEST)}, LAMBDAS, None)
    shown = console.file.getvalue()
    for part in ("0.0562", "3.000 (3.464)", "12.00 (12.31)", "the product penalty has the best training MAE: holds"):
        assert part in shown
    assert "\x1b" not in shown
