"""The report on a terminal: numbers are rounded outwards, names are shown as they are."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_lip.audit.command import audit, document
from lightning_lip.audit.report import interval, print_report, rounded_up, write_json
from lightning_lip.certificates.interval import certify
from lightning_lip.errors import AuditError


def test_json_that_cannot_be_written(networks, tmp_path):
    with pytest.raises(AuditError, match="There is no folder gone to write --json"):
        audit("audited_networks:two", input_shape="2", json="gone/out.json")
    with pytest.raises(AuditError, match="cannot be written"):
        write_json({}, str(tmp_path))


def test_the_report_shows_layers_constants_interval_and_limit(networks, capsys):
    torch.save(torch.ones(4, 2), "data.pt")
    audit("audited_networks:double_gelu", input_shape="2", data="data.pt", max_bound=5)
    shown = capsys.readouterr().out
    assert "0 (Linear)" in shown
    assert "share of log-bound" in shown
    # GELU's constant, printed rounded up.
    assert "1.12891" in shown
    assert "the largest slope at 4 inputs" in shown
    assert "The certified bound is at most" in shown
    assert "--max-bound 5.0 is kept." in shown
    assert "give --data" not in shown


def test_repeated_layers_and_names_with_brackets():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    result = certify(model, torch.zeros(1, 2))
    found = document("[red]", model, torch.zeros(1, 2), result)
    found["layers"][0]["name"] = "[bold]x"
    found["refused"] = ["[green]why"]
    found["skipped"] = ["[blue]what"]
    console = Console(file=io.StringIO(), width=150)
    print_report(console, found)
    shown = console.file.getvalue()
    for text in (
        "[red]: torch.nn",
        "[bold]x (Linear) x2",
        "  - [green]why",
        "left out: [blue]what",
        "by method: product",
    ):
        assert text in shown


@pytest.mark.parametrize("value", [0.1, 1 / 3, 2.0, 1.0000001, 123456.7, 1e300, 3e-310, 0.0])
def test_a_printed_bound_is_a_bound(value):
    assert value <= float(rounded_up(value)) <= value * (1 + 1.1e-5)


def test_certified_numbers_are_printed_outwards(networks, capsys):
    torch.manual_seed(0)
    np.save("data.npy", torch.randn(4, 2).numpy())
    found = audit("audited_networks:Module", input_shape="3", json="out.json")
    line = next(line for line in interval(found) if "certified upper" in line)
    assert float(line.split()[3]) >= found["upper"]
