"""Every row of the table of trainers: the distance within its tolerance, or the error that it names."""

import sys

import pytest
import torch

from lightning_lip.bench.studies.trainers import CASES, Row, reference, run
from lightning_lip.reporting.finished import Finished

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers")
    return {row.case: row for row in run(CASES, folder, Finished(folder / "finished", "", Row._make))}


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(", ", "-").replace(" ", "_") for case in CASES])
def test_case_ends_as_the_table_says(rows, case):
    if case.strategy.startswith("FSDP2") and torch.__version__ < (2, 7):
        pytest.skip("FSDP2 of torch 2.6 does not run on the CPU")
    assert rows[case].holds, f"distance {rows[case].distance}, {rows[case].error}"


def test_the_penalty_moves_the_reference():
    """The distances are relative to this: it must not be small."""
    with_penalty, without = (reference("Adam", c) for c in (0.3, 0.0))
    assert (with_penalty - without).norm() > 0.1 * without.norm()
