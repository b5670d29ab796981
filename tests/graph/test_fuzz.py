"""Random networks from a grammar over every registered operation, certified and attacked.

``LIGHTNING_LIP_FUZZ=2000 pytest tests/graph/test_fuzz.py -s`` runs 2,000 networks of all families instead of the few
here; ``python tests/support/fuzz.py --graphs 2000`` does the same without pytest.
"""

import dataclasses
import os
import random

import pytest
import torch
from support import fuzz
from support.fuzz_cases import ALL, of_production, write
from support.fuzz_grammar import Case
from support.fuzz_hazards import HAZARDS
from support.fuzz_operations import OPERATIONS
from support.fuzz_oracle import check
from torch import nn

import lightning_lip
from lightning_lip.graph.builder import RULES
from lightning_lip.graph.whole_modules import WHOLE_MODULES

LONG = int(os.environ.get("LIGHTNING_LIP_FUZZ", "0"))
BATCH = 40
N_OPERATIONS = 120

NOT_WRITTEN = {
    "lightning_lip::whole_module": "made by the trace, of the modules in WHOLE_MODULES",
    "cudnn_batch_norm": "made on a GPU only",
}
"""Operations that no line of a model stands for, with the reason."""


def assert_no_failure(summary):
    print(f"\n{summary}")
    assert not summary.failures, f"{summary}\n\n{summary.report()}"


def operations_of(case):
    """Return the names of all operations that torch calls in a forward pass."""
    model, example = case.build()
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        model.eval()(*example)
    return {event.name.removeprefix("aten::") for event in profile.function_events}


def test_the_grammar_writes_every_registered_operation():
    missing = set(RULES)
    for seed in range(12):
        # Another choice may call another operation: what is missing after all productions is looked for again.
        for number, production in enumerate(OPERATIONS):
            if seed == 0 or "|" in production.template:
                missing -= operations_of(of_production(production, 12 * number + seed, calm=True, alone=True))
        if missing == set(NOT_WRITTEN):
            break
    assert missing == set(NOT_WRITTEN), "say in NOT_WRITTEN why no line of a model calls it, or write a production"


def test_the_grammar_writes_every_module_that_is_traced_as_one():
    text = "\n".join(production.template for production in ALL)
    assert [kind for kind in WHOLE_MODULES if f"nn.{kind.__name__}(" not in text] == []


def test_a_seed_is_one_network():
    cases = [write(seed) for seed in range(5)]
    random.seed(1)
    torch.manual_seed(1)
    assert [write(seed) for seed in range(5)] == cases
    one, other = (case.build()[0].state_dict() for case in (cases[0], write(0)))
    torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.skipif(LONG > 0, reason="the long run has all families")
@pytest.mark.parametrize("start", range(0, N_OPERATIONS, BATCH))
def test_operations(start):
    assert_no_failure(fuzz.run(range(start, start + BATCH), "operations"))


@pytest.mark.skipif(LONG > 0, reason="the long run has all families")
@pytest.mark.parametrize("family", HAZARDS)
def test_classes_of_wrong_certificates(family):
    """Each production of a class once, and those of small classes more often."""
    assert_no_failure(fuzz.run(range(max(12, len(HAZARDS[family]))), family))


@pytest.mark.timeout(0)
@pytest.mark.skipif(LONG == 0, reason="LIGHTNING_LIP_FUZZ says how many networks")
def test_long_run():
    assert_no_failure(fuzz.run(range(LONG)))


LINEAR = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.Linear(4, 3)
        self.n = 0

    def forward(self, x):
        return {}
"""


def planted(expression, seed=0):
    return Case(seed, ("planted",), LINEAR.format(expression), ((4,),))


def scaled(factor):
    """Return `certify` with bounds that are wrong by a factor."""

    def certify(model, example, data=None):
        result = lightning_lip.certify(model, example, data)
        return dataclasses.replace(result, upper=factor * result.upper)

    return certify


def test_what_is_right_is_certified():
    assert check(planted("self.m(x)")).kind == "certified"


@pytest.mark.parametrize(
    ("expression", "factor"),
    [
        ("self.m(x)", 1 - 1e-8),
        ("x.flip(1)", 1 - 1e-8),
        ("torch.relu(x)", 1 - 1e-8),
        ("x.amax(1)", 1 - 1e-8),
        ("F.softplus(x)", 0.999),
        ("F.layer_norm(x, (4,))", 0.99),
        ("torch.softmax(x, 1)", 0.8),
    ],
)
def test_a_bound_that_is_a_little_too_small_is_found(expression, factor):
    assert check(planted(expression), scaled(factor)).what == "false certificate"


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("torch.floor(x)", "false certificate"),
        ("torch.where(x > 0, x, x + 1)", "false certificate"),
        ("x.detach() * 3", "false certificate"),
        ("x.pow(2)", "false certificate"),
        ("torch.sqrt(x.abs())", "false certificate"),
        ("x * random.uniform(1, 5)", "false certificate"),
        ("x.flip(0) + x", "samples are mixed"),
        ("0.1 * x.mean(0) + 0.9 * x", "samples are mixed"),
        ("0.01 * torch.round(x.mean(0)) + 0.9 * x.detach()", "samples are mixed"),
        ("x / 0", "not finite"),
        ("x.log()", "not finite"),
    ],
)
def test_a_certificate_of_what_has_none_is_found(expression, what):
    def certify(model, example, data=None):
        del data
        honest = lightning_lip.certify(nn.Identity(), torch.zeros(2, 4))
        return dataclasses.replace(honest, upper=2.5 if what == "samples are mixed" else 1.0, lower=None)

    assert check(planted(expression), certify).what == what


def raising(error):
    def certify(model, example, data=None):
        raise error

    return certify


@pytest.mark.parametrize("error", [TypeError("no"), RuntimeError("no"), ValueError("not the package's"), KeyError(1)])
def test_an_error_of_another_is_a_failure(error):
    assert check(planted("self.m(x)"), raising(error)).what == f"raw exception: {type(error).__name__}"


def test_an_error_of_the_package_is_a_refusal():
    assert check(planted("x[0, 0]")).kind == "refused"
    outcome = check(planted("torch.ones(3)"))
    assert (outcome.kind, outcome.detail[:25]) == ("refused", "No output of the model de")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.full((3, 4), float("nan")), "Expected `data` without NaN"),
        (torch.zeros(0, 4), "No data to measure"),
        (torch.zeros(3, 4, dtype=torch.long), "Expected floating-point inputs in `data`"),
        (torch.zeros(3, 5), "The Jacobian of Model cannot be measured"),
    ],
)
def test_what_the_package_says_of_data_is_a_refusal(data, words):
    given = data

    def certify(model, example, data=None):
        del data
        return lightning_lip.certify(model, example, data=given)

    outcome = check(planted("self.m(x)"), certify)
    assert outcome.kind == "refused"
    assert outcome.detail.startswith(words)


def changing(change):
    def certify(model, example, data=None):
        result = lightning_lip.certify(model, example, data)
        change(model, example)
        return result

    return certify


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m, x: m.m.weight.data.mul_(1 + 1e-15), "m._parameters"),
        (lambda m, x: m.m.weight.requires_grad_(False), "m._parameters"),
        (lambda m, x: setattr(m.m, "weight", nn.Parameter(m.m.weight.data.clone())), "m._parameters"),
        (lambda m, x: setattr(m, "n", 1), ".n"),
        (lambda m, x: m.train(not m.training), ".training, m.training"),
        (lambda m, x: m.register_forward_hook(print), "._forward_hooks"),
        (lambda m, x: x.add_(1), "the example"),
        (lambda m, x: torch.rand(()), "torch's generator"),
        (lambda m, x: random.random(), "random's generator"),
    ],
)
def test_a_change_is_found(change, what):
    outcome = check(planted("self.m(x)"), changing(change))
    assert outcome.what == "state changed"
    assert what in outcome.detail
