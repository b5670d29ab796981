"""Random networks as source text: what a seed writes can be read, run and pasted into a report.

A *production* is one step of a forward pass, as a template. ``nn.Linear({last}, {1|3}) -> {m}({x})`` makes an attribute
of the model and applies it: the text before the arrow is made in ``__init__`` and named ``{m}``; ``;;`` parts
statements, of which the last is the value; ``{a|b}`` is a choice; other names in braces are those of `PLACES`. Every
step is run once on a batch of two while it is written: one that torch does not take there is written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import random
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from support import fuzz_modules

BATCH = 2
LARGEST = 72
"""Elements of a sample, in any value of a network."""

SHAPES = {
    1: [(n,) for n in range(2, 7)],
    2: [(c, n) for c in (1, 2, 3, 4) for n in (3, 4, 5, 6, 7)],
    3: [(c, h, w) for c in (1, 2, 3, 4) for h in (3, 4, 5) for w in (3, 4, 5)],
    4: [(c, 3, 3, 3) for c in (1, 2)],
}

NOT_TAKEN = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ZeroDivisionError)
"""What torch raises for a step that does not suit its input."""

NAMESPACE = {
    "np": np, "random": random, "torch": torch, "nn": nn, "F": F, "aten": torch.ops.aten,
    "parametrizations": parametrizations, "parametrize": parametrize, "prune": prune, "fuzz_modules": fuzz_modules,
}  # fmt: skip

HEADER = """\
import random
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from support import fuzz_modules
aten = torch.ops.aten
"""


class UnfitError(Exception):
    """Raised while a step is written: the value at hand does not suit it."""


@dataclasses.dataclass(frozen=True)
class Production:
    """One step of a forward pass.

    Attributes:
        family: The kind of operation, or the class of wrong certificates it is after.
        template: Its text.
        rank: Dimensions of the value it takes, with the batch; None for any.
        kind: Of the value it takes: "real", "complex" or "whole" (integers and booleans).
    """

    family: str
    template: str
    rank: int | None = None
    kind: str = "real"


def productions(family: str, templates: Sequence[str], rank: int | None = None, kind: str = "real") -> list[Production]:
    """Return the productions of a family that take values of one kind."""
    return [Production(family, template, rank, kind) for template in templates]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network: `source` defines ``Model``, whose weights and inputs of `shapes` are drawn from `seed`."""

    seed: int
    families: tuple[str, ...]
    source: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float64

    def build(self) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """Return the model and an example of a batch of two."""
        namespace: dict[str, Any] = {**NAMESPACE, "__name__": "fuzzed"}
        filename = f"<fuzz seed {self.seed}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        exec(compile(self.source, filename, "exec"), namespace)
        seed_everything(self.seed)
        with default_dtype(self.dtype):
            model = namespace["Model"]()
        generator = torch.Generator().manual_seed(self.seed)
        return model, tuple(torch.randn(BATCH, *s, dtype=self.dtype, generator=generator) for s in self.shapes)

    def __str__(self) -> str:
        inputs = ", ".join(f"torch.randn({BATCH}, {', '.join(map(str, shape))})" for shape in self.shapes)
        call = f"torch.set_default_dtype({self.dtype})\nmodel, inputs = Model(), ({inputs},)"
        return f"# seed {self.seed}: {', '.join(self.families)}\n{HEADER}\n{self.source}\n{call}"


def seed_everything(seed: int) -> None:
    """Seed all generators that a network may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is what a network may draw from


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of a dtype, complex ones as well, which ``Module.to(dtype)`` would make real."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def kind_of(tensor: torch.Tensor) -> str:
    """Return "real", "complex" or "whole"."""
    return "real" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


class Writer:
    """Writes one network, step by step, and runs each step."""

    def __init__(self, rng: random.Random, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.rng = rng
        self.dtype = dtype
        self.setup: list[str] = []
        self.lines: list[str] = []
        self.model = nn.Module()
        self.values: dict[str, torch.Tensor] = {
            "xyz"[i]: torch.randn(BATCH, *s, dtype=dtype) for i, s in enumerate(shapes)
        }
        self.inputs = list(self.values)
        self.count = 0

    def fresh(self, prefix: str) -> str:
        """Return a name that is not used yet."""
        self.count += 1
        return f"{prefix}{self.count}"

    def attribute(self, constructor: str) -> str:
        """Make an attribute of the model; return its name."""
        name = f"self.{self.fresh('m')}"
        with default_dtype(self.dtype):
            self.statement(f"{name} = {constructor}", {}, self.setup)
        return name

    def statement(self, text: str, local: dict[str, Any], written: list[str]) -> None:
        """Run a statement and write it."""
        exec(text, {**NAMESPACE, "self": self.model}, local)
        written.append(text)

    def step(self, production: Production, name: str) -> str:
        """Apply a production to the value of that name; return the new value's name.

        Raises:
            UnfitError: If it does not suit the value; nothing is written then.
        """
        value = self.values[name]
        if production.kind != kind_of(value) or production.rank not in (None, value.dim()):
            raise UnfitError
        setup, lines = len(self.setup), len(self.lines)
        result = self.fresh("v")
        try:
            before, arrow, after = production.template.rpartition(" -> ")
            known = {"x": name, "out": self.fresh("u")}
            if arrow:
                known["m"] = self.attribute(self.filled(before, known))
            local = dict(self.values)
            *statements, expression = self.filled(after, known).split(" ;; ")
            for statement in statements:
                self.statement(statement, local, self.lines)
            self.statement(f"{result} = {expression}", local, self.lines)
            tensor = local[result]
            if not isinstance(tensor, torch.Tensor) or not 0 < tensor.numel() <= BATCH * LARGEST:
                raise UnfitError
        except (UnfitError, *NOT_TAKEN):
            del self.setup[setup:], self.lines[lines:]
            raise UnfitError from None
        self.values[result] = tensor.detach()
        return result

    def filled(self, text: str, known: dict[str, str]) -> str:
        """Return a template with all that stands in braces replaced."""

        def replace(match: re.Match[str]) -> str:
            inside = match[1]
            if inside in known:
                return known[inside]
            if "|" in inside:
                return self.rng.choice(inside.split("|"))
            return str(PLACES[inside](self, self.values[known["x"]]))

        # The innermost braces first: what stands in a choice is filled before one is chosen.
        while "{" in text:
            text = re.sub(r"\{([^{}]+)\}", replace, text)
        return text

    def source(self, returned: str) -> str:
        """Return the text of the class."""
        body = textwrap.indent("\n".join(["super().__init__()", *self.setup]), " " * 8)
        forward = textwrap.indent("\n".join([*self.lines, f"return {returned}"]), " " * 8)
        return (
            f"class Model(nn.Module):\n    def __init__(self):\n{body}\n\n"
            f"    def forward(self, {', '.join(self.inputs)}):\n{forward}\n"
        )


def _dim(writer: Writer, x: torch.Tensor, first: int = 1) -> int:
    if x.dim() <= first:
        raise UnfitError
    dim = writer.rng.randrange(first, x.dim())
    return dim - x.dim() if writer.rng.random() < 0.5 else dim


def _dims(writer: Writer, x: torch.Tensor) -> str:
    if x.dim() < 2:
        raise UnfitError
    chosen = writer.rng.sample(range(1, x.dim()), writer.rng.randint(1, x.dim() - 1))
    return str(chosen)


def _other(writer: Writer, x: torch.Tensor) -> str:
    """Another value that is broadcast with this one, mostly of its shape."""
    names = [n for n, v in writer.values.items() if v.dtype == x.dtype and v.shape == x.shape]
    return writer.rng.choice(names)


def _broadcast_shape(writer: Writer, x: torch.Tensor) -> tuple[int, ...]:
    """A shape that is broadcast to a sample's, or to one that is larger where it has a size of one."""
    sizes = x.shape[writer.rng.randint(1, x.dim()) :]
    return tuple(
        writer.rng.randint(1, 3) if n == 1 and writer.rng.random() < 0.3 else 1 if writer.rng.random() < 0.3 else n
        for n in sizes
    )


def _constant(writer: Writer, x: torch.Tensor, values: str, wrapper: str = "nn.Buffer") -> str:
    shape = ", ".join(map(str, _broadcast_shape(writer, x)))
    return writer.attribute(f"{wrapper}({values.format(f'({shape},)' if shape else '()')})")


def _shape(writer: Writer, x: torch.Tensor) -> str:
    """Another shape of a sample's elements."""
    n = x[0].numel()
    divisors = [k for k in range(1, n + 1) if n % k == 0]
    k = writer.rng.choice(divisors)
    sizes = writer.rng.choice([[n], [k, n // k], [-1, k], [k, 1, n // k]])
    return ", ".join(map(str, [writer.rng.choice((2, 2, 2, -1)) if -1 not in sizes else 2, *sizes]))


def _pairs(writer: Writer, x: torch.Tensor, low: int, high: int) -> str:
    """Paddings of the last dimensions, two numbers each."""
    dims = writer.rng.randint(1, min(3, x.dim() - 1))
    return str([writer.rng.randint(low, high) for _ in range(2 * dims)])


def _sized(writer: Writer, x: torch.Tensor, dims: int, low: int, high: int) -> str:
    if writer.rng.random() < 0.4:
        return str(writer.rng.randint(low, high))
    return str(tuple(writer.rng.randint(low, high) for _ in range(dims)))


PLACES: dict[str, Any] = {
    "last": lambda w, x: x.shape[-1],
    "rows": lambda w, x: x.shape[-2],
    "channels": lambda w, x: x.shape[1],
    "size": lambda w, x: x[0].numel(),
    "places": lambda w, x: x[0, 0].numel(),
    "sizes": lambda w, x: ", ".join(map(str, x.shape[1:])),
    "rank": lambda w, x: x.dim(),
    "d": _dim,
    "e": _dim,
    "D": lambda w, x: _dim(w, x, 0),
    "dims": _dims,
    "dim?": lambda w, x: _dims(w, x) if w.rng.random() < 0.5 else _dim(w, x),
    "y": _other,
    "k": lambda w, x: w.rng.randint(1, 4),
    "dtype": lambda w, x: x.dtype,
    "perm": lambda w, x: [0, *w.rng.sample(range(1, x.dim()), x.dim() - 1)],
    "shape": _shape,
    "buffer": lambda w, x: _constant(w, x, "torch.randn({})"),
    "parameter": lambda w, x: _constant(w, x, "torch.randn({})", "nn.Parameter"),
    "positive": lambda w, x: _constant(w, x, "torch.rand({}) + 0.2"),
    "mask": lambda w, x: _constant(w, x, "torch.rand({}) > 0.5"),
    "complex": lambda w, x: _constant(w, x, "3j * torch.randn({}) + 1"),
    "pad": lambda w, x: _pairs(w, x, 0, 2),
    "pad?": lambda w, x: _pairs(w, x, -1, 2),
    "1-2": lambda w, x: _sized(w, x, x.dim() - 2, 1, 2),
    "1-3": lambda w, x: _sized(w, x, x.dim() - 2, 1, 3),
    "2-3": lambda w, x: _sized(w, x, x.dim() - 2, 2, 3),
    "0-1": lambda w, x: _sized(w, x, x.dim() - 2, 0, 1),
    "1-5": lambda w, x: _sized(w, x, x.dim() - 2, 1, 5),
}
