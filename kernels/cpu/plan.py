"""How the work of the compiled CPU kernels is shared between threads, and the scratch between layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.products import band_width

_LINE = 16
"""Ranges begin at multiples of 16 fp32 numbers: threads share no cache line, and rows stay in their groups of eight."""

Task = tuple[int, int, int, int, int, int]


class Plan(NamedTuple):
    """Tasks for several threads, and scratch.

    Attributes:
        tasks: What to do, the layer, and where: rows of T from and to, rows of Z from and to.
        phases: The first task of each phase, which begins when the one before has ended, and the number of tasks. The
            last phase updates the gradients.
        offsets: Where in the scratch each layer's Z and T lie, in fp32 numbers.
        scratch: The length of the scratch.
    """

    tasks: list[Task]
    phases: list[int]
    offsets: list[tuple[int, int]]
    scratch: int


def plan(sides: Sequence[tuple[int, int, int]], group: int, part: int) -> Plan:
    """Share the work of L layers out.

    The weights are gone through in groups of about `group` elements: several small layers, or some rows of a large one.
    Of each, first T is formed, then Z, while the group lies in a cache; layers that are complete are finished. Results
    do not depend on it: no sum is split.

    Args:
        sides: p, q and the lanes of each unit, (L, 3): of a matrix the shorter and the longer side. One without lanes
            has no T and no Z.
        group: Elements of a group; with 0 each layer is one.
        part: Elements for each task, about.
    """
    tasks: list[Task] = []
    phases = [0]
    offsets: list[tuple[int, int]] = []
    scratch = 0
    for layers in _groups(sides, group):
        place = 0
        for layer in layers:
            p, q, lanes = sides[layer]
            offsets.append((place, place + _ceil(lanes * p)))
            place += _ceil(lanes * p) + _ceil(lanes * q)
        scratch = max(scratch, place)
        steps = {layer: _step(sides[layer], group) for layer in layers}
        # One round, unless it is a layer alone that is larger than a group.
        for begin in range(0, max(sides[layer][1] for layer in layers), max(steps.values())):
            ranges = {layer: (begin, min(begin + steps[layer], sides[layer][1])) for layer in layers}
            for what in (at.FORM_IMAGES, at.FORM_PRODUCTS):
                for layer, (i, end) in ranges.items():
                    p, _, lanes = sides[layer]
                    if lanes == 0:
                        continue
                    if what == at.FORM_IMAGES:
                        tasks += [(what, layer, a, b, 0, 0) for a, b in _parts(i, end, part // p)]
                    else:
                        tasks += [(what, layer, i, end, a, b) for a, b in _parts(0, p, part // (end - i))]
                if len(tasks) > phases[-1]:
                    phases.append(len(tasks))
        tasks += [(at.FINISH, layer, 0, 0, 0, 0) for layer in layers]
        phases.append(len(tasks))
    for layer, (p, q, _) in enumerate(sides):
        tasks += [(at.UPDATE, layer, a, b, 0, 0) for a, b in _parts(0, q, part // p)]
    return Plan(tasks, [*phases, len(tasks)], offsets, scratch)


def _groups(sides: Sequence[tuple[int, int, int]], group: int) -> list[list[int]]:
    """Return the layers of each group, in their order."""
    groups: list[list[int]] = []
    size = group
    for layer, (p, q, _) in enumerate(sides):
        size += p * q
        if size > group or not groups:
            groups.append([])
            size = p * q
        groups[-1].append(layer)
    return groups


def _step(sides: tuple[int, int, int], group: int) -> int:
    """Return the rows of T that one round forms: whole bands, whatever the layout."""
    p, q, _ = sides
    band = band_width(p)
    return q if p * q <= group else max(band, group // p // band * band)


def _parts(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """Return the ranges of about `size` that make up a range."""
    size = max(_LINE, size // _LINE * _LINE)
    return [(a, min(a + size, end)) for a in range(begin, end, size)]


def _ceil(size: int) -> int:
    return -(-size // _LINE) * _LINE
