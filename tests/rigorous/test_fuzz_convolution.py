"""Random convolutions: certified norms against dense matrices, by ``LIGHTNING_LIP_FUZZ_CONVOLUTIONS=3000`` many."""

import os

import pytest
from support import fuzz_convolutions
from support.fuzz_convolutions import MODES, dense_norm, write

LONG = int(os.environ.get("LIGHTNING_LIP_FUZZ_CONVOLUTIONS", "0"))
BATCH = 40


def assert_no_failure(found):
    print(f"\n{found}")
    assert not found.failures, str(found)
    # A refusal hides nothing: nearly all convolutions are certified.
    assert found.certified >= 0.97 * (found.certified + sum(found.refused.values()))


@pytest.mark.skipif(LONG > 0, reason="the long run has them")
@pytest.mark.parametrize("start", range(0, 120, BATCH))
def test_convolutions(start):
    assert_no_failure(fuzz_convolutions.run(range(start, start + BATCH)))


@pytest.mark.timeout(0)
@pytest.mark.skipif(LONG == 0, reason="LIGHTNING_LIP_FUZZ_CONVOLUTIONS says how many")
def test_long_run():
    assert_no_failure(fuzz_convolutions.run(range(LONG)))


def test_all_kinds_are_drawn():
    cases = [write(seed) for seed in range(120)]
    assert {case.families[1] for case in cases} == set(MODES)
    assert {case.families[0] for case in cases} == {f"Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3)}
    text = "\n".join(case.source for case in cases)
    for part in ("groups=3", "output_padding=(1", "padding='same'", "F.conv2d(F.pad(", "F.conv_transpose1d("):
        assert part in text


def test_the_dense_norm_is_that_of_the_matrix():
    case = write(1)
    model, (example,) = case.build()
    size = example[0].numel()
    from_zero = [
        model(row.view(1, *example.shape[1:])) - model(0 * example[:1]) for row in example.new_ones(size).diag()
    ]
    columns = [image.detach().flatten() for image in from_zero]
    expected = sum(float(c @ c) for c in columns) ** 0.5
    assert dense_norm(case) <= expected * (1 + 1e-12)
    assert dense_norm(case) >= max(float(c.norm()) for c in columns) * (1 - 1e-12)
