"""All models of the zoo, by name; only a model that is built imports its package."""

from __future__ import annotations

from lightning_lip.bench.zoo import graphs, language, plain, vision

ENTRIES = {entry.name: entry for room in (plain, vision, language, graphs) for entry in room.ENTRIES}
