"""Tier 1 of the proof without a GPU: the kernels' numbers, under Triton's interpreter in a process of its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

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
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "--import-mode=importlib", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", f"--rootdir={CASES.parent}"]
    # The checkout must not be the working directory: `kernels` is a subpackage of the installed one.
    run = subprocess.run(command, cwd=report.parent, env=environment, capture_output=True, text=True, check=False)
    results = {}
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            failure = next(
                (child.attrib.get("message", child.tag) for child in case if child.tag != "system-out"), None
            )
            results.setdefault(case.attrib["name"].partition("[")[0], []).append((case.attrib["name"], failure))
    return results, run.stdout + run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(outcome, name):
    results, output = outcome
    assert name in results, output[-4000:]
    failures = [f"{case}: {failure}" for case, failure in results[name] if failure is not None]
    assert not failures, "\n".join(failures)
