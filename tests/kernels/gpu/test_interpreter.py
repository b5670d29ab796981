"""Tier 1 of the proof without a GPU: the kernels' numbers, under Triton's interpreter in a process of its own."""

import ast
from pathlib import Path

import pytest
from support.iterations import run_apart

pytest.importorskip("triton", minversion="3.3")
pytestmark = pytest.mark.timeout(900)  # the first test waits for all cases of the interpreter

CASES = Path(__file__).with_name("interpreter_cases.py")
NAMES = [
    node.name
    for node in ast.parse(CASES.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Run all cases once; {test name: [(case, failure or None)]} and the process's output."""
    folder, environment = tmp_path_factory.mktemp("interpreter"), {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    cases, output = run_apart(CASES, folder, f"--rootdir={CASES.parent}", **environment)
    results = {}
    for case in cases:
        failure = next((child.attrib.get("message", child.tag) for child in case if child.tag != "system-out"), None)
        results.setdefault(case.attrib["name"].partition("[")[0], []).append((case.attrib["name"], failure))
    return results, output


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(outcome, name):
    results, output = outcome
    assert name in results, output[-4000:]
    failures = [f"{case}: {failure}" for case, failure in results[name] if failure is not None]
    assert not failures, "\n".join(failures)
