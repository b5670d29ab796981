"""Random convolutions against their dense matrices: certified norm and singular values, at tiny inputs.

In 1 to 3 dimensions, with strides, dilations, groups, depthwise, transposed with an output padding, all padding modes,
even and rectangular kernels; as modules, as functions of a module's kernel, and after a pad node.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from support.fuzz_grammar import BATCH, NOT_TAKEN, Case, seed_everything
from support.fuzz_oracle import TOLERANCE, Outcome, check

MODES = ("zeros", "circular", "reflect", "replicate")
LARGEST = 160
"""Elements of a sample of the input and of the output: the dense matrix has at most their product."""


@dataclass
class Convolutions:
    """What became of many convolutions.

    Attributes:
        certified: How many were.
        refused: How many were not, by reason.
        ratios: Certified norms over dense ones, one each.
        failures: The wrong ones.
        seconds: Of the processor.
    """

    certified: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    failures: list[tuple[Case, Outcome]] = field(default_factory=list)
    seconds: float = 0.0

    def report(self) -> str:
        """Return the failing convolutions as source text."""
        return "\n\n".join(f"FAILED, {outcome.what}: {outcome.detail}\n{case}" for case, outcome in self.failures)

    def __str__(self) -> str:
        total = self.certified + sum(self.refused.values()) + len(self.failures)
        ratios = sorted(self.ratios) or [float("nan")]
        quantiles = ", ".join(f"{ratios[int(q * (len(ratios) - 1))]:.3f}" for q in (0, 0.5, 0.9, 1))
        return "\n".join(
            [
                f"{total} convolutions in {self.seconds:.1f} s of one core: {self.certified} certified, "
                f"{sum(self.refused.values())} refused, {len(self.failures)} failed",
                f"certified over dense norm: least, median, 90%, most: {quantiles}",
                *(f"  {n:5}  {reason}" for reason, n in self.refused.items()),
                self.report(),
            ]
        )


def write(seed: int) -> Case:
    """Return a network that is one convolution, drawn from the seed."""
    for attempt in range(1000):
        case = _drawn(random.Random(f"{seed} {attempt}"), seed)
        seed_everything(seed)
        try:
            model, (example,) = case.build()
            with torch.no_grad():
                output = model(example)
        except NOT_TAKEN:  # No output, or a padding wider than the input.
            continue
        if 0 < output[0].numel() <= LARGEST:
            return case
    raise RuntimeError(f"No convolution for seed {seed}.")


def _drawn(rng: random.Random, seed: int) -> Case:
    dims = rng.choice((1, 1, 2, 2, 3))
    kernel, stride, dilation, spatial = (
        tuple(rng.randint(low, top) for _ in range(dims))
        for low, top in ((1, (5, 3, 2)[dims - 1]), (1, 3), (1, (3, 3, 2)[dims - 1]), (1, (12, 5, 3)[dims - 1]))
    )
    groups = rng.choice((1, 1, 2, 3))
    inner = rng.choice((1, 1, 2))
    c_in, c_out = groups * inner, groups * rng.randint(1, 2)
    transposed = rng.random() < 0.3
    padding: object = tuple(rng.randint(0, 3) for _ in range(dims))
    settings: dict[str, object] = {"stride": stride, "dilation": dilation, "groups": groups}
    if transposed:
        settings["output_padding"] = tuple(rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
        name, mode = f"ConvTranspose{dims}d", "zeros"
    else:
        name, mode = f"Conv{dims}d", rng.choice(MODES)
        choice = rng.random()
        if choice < 0.15:
            padding, settings["stride"] = "same", 1
        elif choice < 0.25:
            padding = "valid"
        elif choice < 0.5:
            # What keeps the size, where circular padding is exact.
            padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
        settings["padding_mode"] = mode
    settings["padding"] = padding
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    forward = rng.choice(["self.m(x)"] * 3 + [_functional(rng, name, settings, mode, dims)])
    fill = rng.choice(("normal_()", "uniform_()", "fill_(1.0)", f"normal_().mul_(2.0 ** {rng.randint(-40, 40)})"))
    source = (
        "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.m = nn.{name}({c_in}, {c_out}, {kernel}, bias={rng.random() < 0.5}, {arguments})\n"
        f"        self.m.weight.data.{fill}\n\n    def forward(self, x):\n        return {forward}\n"
    )
    return Case(seed, (name, mode), source, ((c_in, *spatial),))


def _functional(rng: random.Random, name: str, settings: dict[str, object], mode: str, dims: int) -> str:
    """Return a call of the function with the module's kernel, mostly after a pad node like the module's own."""
    function = re.sub("Conv(Transpose)?", lambda m: "conv_transpose" if m[1] else "conv", name)
    kept = {key: value for key, value in settings.items() if key not in ("padding_mode", "padding")}
    padding = rng.choice([settings["padding"], 0, 1, tuple(rng.randint(0, 2) for _ in range(dims))])
    if padding == "same" and mode != "zeros":
        padding = 0
    arguments = ", ".join(f"{key}={value!r}" for key, value in {**kept, "padding": padding}.items())
    if mode == "zeros":
        padded = "x"
    elif rng.random() < 0.6:
        padded = f"F.pad(x, self.m._reversed_padding_repeated_twice, mode={mode!r})"
    else:
        padded = f"F.pad(x, {[rng.randint(0, 2) for _ in range(2 * dims)]}, mode={mode!r})"
    return f"F.{function}({padded}, self.m.weight, {arguments})"


def dense_norm(case: Case) -> float:
    """Return the norm of the matrix of one sample, (outputs, inputs), by singular values in fp64."""
    model, (example,) = case.build()
    if model.m.bias is not None:
        nn.init.zeros_(model.m.bias)  # Beside a tiny kernel it would leave only its rounding.
    size = example[0].numel()
    points = torch.cat([torch.zeros(1, size), torch.eye(size)]).to(example.dtype).view(-1, *case.shapes[0])
    with torch.no_grad():
        # In batches of two, which a certificate is of.
        images = torch.cat([model(pair) for pair in points.split(BATCH)]).flatten(1)
    return torch.linalg.matrix_norm((images[1:] - images[:1]).double(), 2).item()


def run(seeds: Iterable[int]) -> Convolutions:
    """Certify the convolutions of some seeds and compare each with its dense norm."""
    found = Convolutions()
    start = time.process_time()
    for seed in seeds:
        case = write(seed)
        outcome = check(case)
        if outcome.kind == "failed":
            found.failures.append((case, outcome))
            continue
        if outcome.kind == "refused":
            found.refused[outcome.what] = found.refused.get(outcome.what, 0) + 1
            continue
        upper, norm = outcome.upper, dense_norm(case)
        if norm > upper * (1 + TOLERANCE):
            found.failures.append((case, Outcome("failed", "false certificate", f"upper {upper!r}, dense {norm!r}")))
        else:
            found.certified += 1
            found.ratios.append(upper / norm if norm else 1.0)
    found.seconds = time.process_time() - start
    return found
