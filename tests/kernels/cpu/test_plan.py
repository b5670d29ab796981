"""How work is shared between threads: every element once, in the order that the kernels count on."""

from itertools import pairwise

import pytest

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.products import band_width
from lightning_lip.kernels.cpu.plan import plan

# Shorter side, longer side, lanes: tiny ones, some that share a group, and some that are larger than one.
SIDES = [(1, 1, 1), (13, 20, 8), (20, 20, 16), (1, 300, 1), (100, 900, 8), (64, 64, 8), (200, 700, 8), (5, 5, 1)]


@pytest.mark.parametrize(("group", "part"), [(0, 64), (500, 64), (5000, 300), (10**9, 10**9)])
def test_every_row_is_formed_once_and_in_order(group, part):
    found = plan(SIDES, group, part)
    assert found.phases[0] == 0
    assert found.phases[-1] == len(found.tasks)
    assert found.phases == sorted(set(found.phases))
    formed = [[] for _ in SIDES]  # ranges of T, by layer
    added = [{} for _ in SIDES]  # for each range of T what of Z it was added to
    finished = []
    for first, end in zip(found.phases[:-2], found.phases[1:-1], strict=True):
        phase = found.tasks[first:end]
        assert len({task[0] for task in phase}) == 1, "tasks of one phase run at the same time"
        for what, layer, a, b, c, d in phase:
            if what == at.FORM_IMAGES:
                assert layer not in finished
                formed[layer].append((a, b))
            elif what == at.FORM_PRODUCTS:
                assert formed[layer][-1][1] == b, "these rows of T are there"
                added[layer].setdefault((a, b), []).append((c, d))
            else:
                assert what == at.FINISH
                finished.append(layer)
    assert finished == list(range(len(SIDES)))
    for layer, (p, q, _) in enumerate(SIDES):
        assert covers(formed[layer], q)
        assert covers(list(added[layer]), q)
        assert all(covers(ranges, p) for ranges in added[layer].values())
        # Sums over a band, or over eight rows, are formed at once: a round begins where one does.
        assert all(a % band_width(p) == 0 and a % 8 == 0 for a, _ in added[layer])
    updates = found.tasks[found.phases[-2] :]
    assert {task[0] for task in updates} == {at.UPDATE}
    for layer, (_, q, _) in enumerate(SIDES):
        assert covers([(a, b) for _, of, a, b, _, _ in updates if of == layer], q)


def covers(ranges, size):
    starts = [a for a, _ in ranges]
    ends = [b for _, b in ranges]
    return starts == [0, *ends[:-1]] and ends[-1] == size and all(a < b and a % 16 == 0 for a, b in ranges)


@pytest.mark.parametrize("group", [0, 500, 5000, 10**9])
def test_layers_share_scratch_unless_they_are_worked_on_together(group):
    found = plan(SIDES, group, 64)
    alive = {}
    for what, layer, *_ in found.tasks:
        p, q, lanes = SIDES[layer]
        z, t = found.offsets[layer]
        if what == at.FINISH:
            del alive[layer]
        elif what != at.UPDATE:
            alive[layer] = [range(z, z + lanes * p), range(t, t + lanes * q)]
        places = [place for ranges in alive.values() for place in ranges]
        assert all(place.stop <= found.scratch for place in places)
        ordered = sorted(places, key=lambda place: place.start)
        assert all(a.stop <= b.start for a, b in pairwise(ordered))
    largest = max(lanes * (p + q) for p, q, lanes in SIDES)
    if group == 0:
        assert largest <= found.scratch <= largest + 32
