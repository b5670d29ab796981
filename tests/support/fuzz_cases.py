"""From a seed to a network: one step of the grammar that the seed stands for, with others before and after it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from support.fuzz_grammar import SHAPES, Case, Production, UnfitError, Writer, kind_of, seed_everything
from support.fuzz_hazards import HAZARDS
from support.fuzz_operations import OPERATIONS

CALM = tuple(
    Production("calm", template)
    for template in (
        "nn.Linear({last}, {2|3|5}) -> {m}({x})", "torch.tanh({x})", "F.gelu({x})", "{x} + {y}", "{x} * {2.5|-0.3}",
        "{x}.flip(-1)", "torch.cat([{x}, {y}], -1)", "F.relu({x})", "{x} + {buffer}", "{x}.flatten(1)",
    )
)  # fmt: skip
"""Steps that are certified, around one that is to be looked at."""

ALL: tuple[Production, ...] = (*OPERATIONS, *(p for group in HAZARDS.values() for p in group))
# In one order for good, so that the first seeds are a sample of all.
_POOLS: dict[str | None, Sequence[Production]] = {
    None: random.Random(0).sample(ALL, len(ALL)),
    "operations": random.Random(0).sample(OPERATIONS, len(OPERATIONS)),
    **HAZARDS,
}
FAMILIES = [name for name in _POOLS if name is not None]
_FAMILIES = {p.family: [q for q in OPERATIONS if q.family == p.family] for p in OPERATIONS}
_TO_COMPLEX = [p for p in HAZARDS["complex"] if p.kind == "real"]
_TO_WHOLE = [p for p in HAZARDS["whole numbers"] if p.kind == "real"]
_FROM = {kind: [p for p in ALL if p.kind == kind] for kind in ("complex", "whole")}
_TRIES = 400


def write(seed: int, family: str | None = None) -> Case:
    """Return the network of a seed: seeds go through all productions, or those of a family, one after the other."""
    pool = _POOLS[family]
    return of_production(pool[seed % len(pool)], seed, calm=family in HAZARDS)


def of_production(production: Production, seed: int, *, calm: bool, alone: bool = False) -> Case:
    """Return a network around a production, drawn from the seed.

    Raises:
        RuntimeError: If no network takes it, which is a mistake in its template.
    """
    for attempt in range(_TRIES):
        rng = random.Random(f"{seed} {attempt}")
        seed_everything(seed)
        try:
            return _case(production, seed, rng, calm or rng.random() < 0.5, alone)
        except UnfitError:
            continue
    raise RuntimeError(f"No network takes {production}.")


def _case(production: Production, seed: int, rng: random.Random, calm: bool, alone: bool) -> Case:
    rank = (production.rank or rng.choice((2, 2, 3, 3, 4))) - 1
    shapes = [rng.choice(SHAPES[rank])]
    if rng.random() < 0.2 and not alone:
        shapes.append(shapes[0])
    dtype = torch.float32 if rng.random() < 0.1 else torch.float64
    writer = Writer(rng, shapes, dtype)
    families = []
    name = rng.choice(writer.inputs)

    def go(chosen: Production, value: str) -> str:
        families.append(chosen.family)
        return writer.step(chosen, value)

    def around(value: str, lengths: tuple[int, ...]) -> str:
        for _ in range(0 if alone else rng.choice(lengths)):
            pool = CALM if calm else _FAMILIES[rng.choice(list(_FAMILIES))]
            source = value if rng.random() < 0.75 else rng.choice(list(writer.values))
            kind = kind_of(writer.values[source])
            for _ in range(4):
                try:
                    value = go(rng.choice(pool if kind == "real" else _FROM[kind]), source)
                    break
                except UnfitError:
                    families.pop()
        return value

    if production.rank is None or production.kind == "real":
        name = around(name, (0, 0, 0, 1) if calm else (0, 0, 1, 2))
    if production.kind != "real":
        name = go(rng.choice(_TO_COMPLEX if production.kind == "complex" else _TO_WHOLE), name)
    if kind_of(writer.values[name]) != production.kind:
        raise UnfitError
    name = around(go(production, name), (0, 0, 1, 2, 3))
    while (kind := kind_of(writer.values[name])) != "real":
        name = go(rng.choice(_FROM[kind]), name)
    returned = name
    if rng.random() < 0.1 and not alone:
        returned = ", ".join(n for n, v in writer.values.items() if n == name or v.is_floating_point())
    if production.family == "cached":
        writer.setup.append("self.cached = True")
    return Case(seed, tuple(families), writer.source(returned), tuple(shapes), dtype)
