"""Each remedy against a class of wrong certificates is taken out: the fuzzer then finds what it is against.

With all remedies in place the same networks are in ``test_fuzz.py``, where none fails.
"""

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from support import fuzz
from support.fuzz_hazards import HAZARDS
from torch.nn.utils import parametrize

from lightning_lip.certificates import contradiction, interval
from lightning_lip.graph import bound, walk, whole_modules
from lightning_lip.graph.builder import RULES
from lightning_lip.graph.rules import linear
from lightning_lip.models import modules
from lightning_lip.operators.base import ParametrizedMatrixOperator

Patch = pytest.MonkeyPatch


def the_check_of_the_whole(patch: Patch) -> None:
    patch.setattr(interval, "contradiction", lambda *_: None)


def weights_of_the_graph(patch: Patch) -> None:
    """A parametrised weight is what the module computes after the trace."""
    patch.setattr(linear, "_is_parametrized", lambda *args: parametrize.is_parametrized(args[-1], "weight"))
    patch.setattr(
        linear, "TracedParametrizationOperator", lambda name, module, _: ParametrizedMatrixOperator(name, module)
    )
    patch.setattr(linear, "computed_source", lambda name, module, *_: ParametrizedMatrixOperator(name, module))


def real_values(patch: Patch) -> None:
    patch.setattr(walk, "check_real", lambda *_: None)
    patch.setattr(walk, "check_arguments", lambda *_: None)
    floating_values(patch)


def floating_values(patch: Patch) -> None:
    patch.setattr(walk, "only_floating", lambda _, result: result)


def padding_of_the_graph(patch: Patch) -> None:
    """A convolution's own padding is not looked at where a padding stands before it."""
    for name in ("conv1d", "conv2d"):

        def convolution(builder, node, arguments, own=RULES[name]):
            padded = getattr(node.args[0], "target", None) is torch.ops.aten.pad.default
            return own(builder, node, arguments | {"padding": 0} if padded else arguments)

        patch.setitem(RULES, name, convolution)


def settings_at_the_call(patch: Patch) -> None:
    patch.setattr(whole_modules.WholeModule, "counting", property(lambda call: call.module))


def settings_of_modules_inside(patch: Patch) -> None:
    def shallow(module, *_):
        kept = object.__new__(type(module))
        vars(kept).update({k: copy.copy(v) if k == "settings" else v for k, v in vars(module).items()})
        return kept

    patch.setattr(whole_modules, "_as_it_is", shallow)


def arguments_of_whole_modules(patch: Patch) -> None:
    patch.setattr(walk, "check_whole_module", lambda *_: None)


def buffers_that_are_written(patch: Patch) -> None:
    trace = bound.trace
    patch.setattr(bound, "trace", lambda *args: dataclasses.replace(trace(*args), written={}))


def grad_modes(patch: Patch) -> None:
    patch.setattr(contradiction, "GRADIENTS", (torch.no_grad,) * 4)


def finite_values(patch: Patch) -> None:
    patch.setattr(walk, "check_arguments", lambda *_: None)


def parametrizations_computed_anew(patch: Patch) -> None:
    """What ``parametrize.cached()`` keeps is used: the context sets another module's switch."""
    other = SimpleNamespace(_cache_enabled=0, is_parametrized=parametrize.is_parametrized)
    patch.setattr(modules, "parametrize", other)


def sizes_of_group_norms(patch: Patch) -> None:
    own = RULES["native_group_norm"]
    patch.setitem(RULES, "native_group_norm", lambda b, n, a: own(b, n, {k: v for k, v in a.items() if k != "HxW"}))


def reasons_for_errors(patch: Patch) -> None:
    patch.setattr(walk, "UNREADABLE", ())


@dataclasses.dataclass(frozen=True)
class Remedy:
    """What is taken out, and what the fuzzer then finds.

    Attributes:
        family: The class of wrong certificates.
        out: Takes the remedy out.
        found: What is found without it.
        overlaps: Whether the check of the whole finds all of it too, so that both have to go.
    """

    family: str
    out: Callable[[Patch], None]
    found: str = "false certificate"
    overlaps: bool = True


REMEDIES = {
    "1 weights computed again": Remedy("weights computed again", weights_of_the_graph),
    "2 complex values": Remedy("complex", real_values),
    "3 whole numbers": Remedy("whole numbers", floating_values, overlaps=False),
    "4 padding beside a pad": Remedy("padding beside a pad", padding_of_the_graph, overlaps=False),
    "5 changed modules": Remedy("changed modules", settings_at_the_call, overlaps=False),
    "5 modules inside": Remedy("changed modules", settings_of_modules_inside),
    "5 more than the arguments": Remedy("changed modules", arguments_of_whole_modules),
    "6 buffers": Remedy("state", buffers_that_are_written),
    "6 Python's state": Remedy("state", the_check_of_the_whole, overlaps=False),
    "6 grad mode": Remedy("state", grad_modes, overlaps=False),
    "7 not finite": Remedy("not finite", finite_values, "not finite"),
    "7 not finite in the output": Remedy("not finite", the_check_of_the_whole, "not finite", overlaps=False),
    "9 cached": Remedy("cached", parametrizations_computed_anew, overlaps=False),
    "10 mixing of samples": Remedy("mixing of samples", sizes_of_group_norms, "samples are mixed"),
    "11 raw exceptions": Remedy("raw exceptions", reasons_for_errors, "raw exception: RuntimeError", overlaps=False),
}
"""By the number of the class in the list of wrong certificates, each of which was found once."""


ENOUGH = 2
"""Networks that are looked for."""


def what_fails(remedy, seed, *taken_out):
    """Return how the network of a seed fails without some remedies, or None."""
    with pytest.MonkeyPatch.context() as patch:
        for out in taken_out:
            out(patch)
        summary = fuzz.run([seed], remedy.family)
    return next((outcome.what for _, outcome in summary.failures), None)


@pytest.mark.parametrize("remedy", REMEDIES.values(), ids=REMEDIES)
def test_the_fuzzer_finds_the_class_that_a_remedy_is_against(remedy):
    found = 0
    out = (remedy.out, the_check_of_the_whole) if remedy.overlaps else (remedy.out,)
    for seed in range(len(HAZARDS[remedy.family])):
        what = what_fails(remedy, seed, *out)
        # The same networks, with all but the check of the whole: some are what only that finds.
        if what is None or (remedy.overlaps and what_fails(remedy, seed, the_check_of_the_whole)):
            continue
        assert what == remedy.found
        assert what_fails(remedy, seed) is None
        if remedy.overlaps:
            assert what_fails(remedy, seed, remedy.out) is None, "the whole does not find it any more: overlaps=False"
        found += 1
        if found == ENOUGH:
            break
    assert found
