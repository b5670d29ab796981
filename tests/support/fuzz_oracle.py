"""What is true of a network, and whether `certify` said so: no certificate below what is measured, nothing changed.

The measures know nothing of the graph: dense Jacobians by autograd of the map of a batch of two, and slopes between
points, near and far, searched by bisection. Of a map that keeps the samples apart the Jacobian of the batch is block
diagonal but for an order of its rows, so its norm is the larger one of the two samples, wherever the samples lie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

import lightning_lip
from lightning_lip.errors import UnsupportedLayerError
from support.fuzz_grammar import NOT_TAKEN, Case, seed_everything

TOLERANCE = 1e-9
"""How far a measure may lie above the bound, relative, in fp64."""

AUTOGRAD_TOLERANCE = 1e-6
"""The same for Jacobians behind hardsigmoid and hardswish, whose slopes autograd rounds to fp32 (1/6: off by 3e-8)."""

ROUNDINGS = {"half|float16": 1e-3, "bfloat16": 8e-3, r"float32|float\(\)": 1.2e-7}
"""Unit roundoffs of the dtypes that a source names: a certificate is of the network in exact arithmetic."""

FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
)
"""What no call of `certify` may raise; `ValueError` and `TypeError` in the package's own words only."""

PACKAGE = {Path(package.__file__).parent for package in (lightning_lip, lightning_lip.kernels)}

Point = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Attributes:
        kind: "certified", "refused" or "failed".
        what: The kind of refusal or failure, without names and numbers; of a certificate "".
        detail: The whole reason.
        upper: The bound of a certificate.
    """

    kind: str
    what: str = ""
    detail: str = ""
    upper: float = math.nan


def check(case: Case, certify: Callable[..., Any] = lightning_lip.certify) -> Outcome:
    """Certify a network and compare with what is measured; `certify` is another function in tests of this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, example = case.build()
        rng = random.Random(case.seed)
        model.train(rng.random() < 0.3 or hasattr(model, "cached"))
        data = _data(case, example) if rng.random() < 0.25 else None
        seed_everything(case.seed)
        with _cached(model, example):
            before = _state(model, example)
            try:
                result = certify(model, example if len(example) > 1 else example[0], data=data)
            except (ValueError, UnsupportedLayerError, *FOREIGN) as error:
                outcome = _raised(error)
            else:
                outcome = _returned(result)
            changed = sorted({key for key, value in _state(model, example).items() if before.get(key) != value})
        wrong = contradiction(model.eval(), list(example), result.upper, case) if outcome.kind == "certified" else None
    if wrong is not None:
        return Outcome("failed", *wrong)
    if outcome.kind != "failed" and changed:
        return Outcome("failed", "state changed", ", ".join(changed))
    return outcome


@contextlib.contextmanager
def _cached(model: nn.Module, example: Sequence[Tensor]) -> Iterator[None]:
    """Certify inside of ``parametrize.cached()`` where the model says so, after a step of training."""
    if not hasattr(model, "cached"):
        yield
        return
    with parametrize.cached():
        model(*example)
        yield


def _data(case: Case, example: Sequence[Tensor]) -> Any:
    """Return data to measure the lower bound on; None for networks that are another map at another batch size."""
    batch = tuple(torch.cat([x, 3 * x]) for x in example)
    model = case.build()[0].eval()
    try:
        outputs = [model(*(x[:size].clone() for x in batch)) for size in (1, 4)]
    except NOT_TAKEN:
        return None
    if not all(isinstance(output, Tensor) and output.is_floating_point() for output in outputs):
        return None
    single, several = outputs
    same = several.shape == (4, *single.shape[1:]) and torch.allclose(several[:1], single, equal_nan=True)
    return (batch[0] if len(batch) == 1 else [batch]) if same else None


def _raised(error: BaseException) -> Outcome:
    """Return a refusal if the error is raised by the package, in its own words, else a failure."""
    frames = traceback.extract_tb(error.__traceback__)
    # An error of Python itself, in a line of the package, has no `raise`.
    own = _is_own(frames[-1]) and (frames[-1].line or "").startswith("raise ")
    if own and isinstance(error, (ValueError, TypeError, UnsupportedLayerError)):
        return Outcome("refused", _words(str(error).partition("\n")[0]), str(error))
    where = next((f"{Path(f.filename).name}: {f.name}" for f in reversed(frames) if _is_own(f)), "")
    return Outcome("failed", f"raw exception: {type(error).__name__}", f"{where}: {error}"[:600])


def _is_own(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is of the package."""
    return not PACKAGE.isdisjoint(Path(frame.filename).parents)


def _returned(result: Any) -> Outcome:
    if not result.certified:
        if not result.refused or not all(result.refused):
            return Outcome("failed", "a refusal without a reason", str(result))
        return Outcome("refused", _words(result.refused[0]), "\n".join(result.refused))
    if math.isnan(result.upper) or result.upper < 0:
        return Outcome("failed", "a bound that is no number", str(result.upper))
    if result.lower is not None and not result.lower <= result.upper * (1 + AUTOGRAD_TOLERANCE):
        return Outcome("failed", "lower above upper", f"{result.lower} > {result.upper}")
    return Outcome("certified", upper=result.upper)


def _words(reason: str) -> str:
    """Return a reason without what differs from network to network."""
    if "cannot be traced by torch.export" in reason:
        return "it cannot be traced by torch.export"
    # path (Module), operation: reason
    reason = re.sub(r"^.*?\(\w+\)(, .+?)?: ", "", reason)
    return re.sub(r"\S*[\d'`(\[]\S*|\b(nan|inf)\b", "_", reason)[:90]


def _state(model: nn.Module, example: Sequence[Tensor]) -> dict[str, Any]:
    """Return all that a call may not change, as values that compare by content: the model's and the generators'."""
    state = {f"{name}.{key}": _frozen(value) for name, m in model.named_modules() for key, value in vars(m).items()}
    generators = {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "random's generator": random.getstate(),
        "NumPy's generator": repr(np.random.get_state(legacy=False)),  # noqa: NPY002
    }
    settings = {"grad mode": torch.is_grad_enabled(), "default dtype": torch.get_default_dtype()}
    return {**state, **generators, **settings, "the example": [_frozen(x) for x in example]}


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        raw = value.detach().to_dense().clone().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return id(value) if isinstance(value, nn.Parameter) else None, raw, value.requires_grad, value.grad is None
    if isinstance(value, dict):
        return [(key, _frozen(v)) for key, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_frozen(v) for v in value]
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes, set, frozenset))
    return repr(value) if plain else id(value)


def contradiction(model: nn.Module, example: Point, upper: float, case: Case) -> tuple[str, str] | None:
    """Return what shows that a bound is none, as a class and in words; None if nothing does."""
    eps = max([torch.finfo(case.dtype).eps, *(eps for name, eps in ROUNDINGS.items() if re.search(name, case.source))])
    if case.dtype == torch.float32:
        try:
            model.double()(*(x.double() for x in example))
            example = [x.double() for x in example]
        except NOT_TAKEN:  # Its source says fp32 itself.
            model.float()
    measure = _Measure(model, upper, eps)
    points = _points(example, case.seed)
    for name, point in points.items():
        value = measure.value(point)
        if not len(value):  # A mask without a true entry, drawn anew with the weights.
            return None
        if name == "normal" and not bool(value.isfinite().all()):
            return "not finite", f"the output is {value[~value.isfinite()][0].item()} at a normal point"
        jacobian = measure.jacobian(point)
        if jacobian is None:
            continue
        if measure.mixes(jacobian):
            return "samples are mixed", f"by the Jacobian at a {name} point"
        norm = torch.linalg.matrix_norm(jacobian, 2).item() if bool(jacobian.isfinite().all()) else 0.0
        slack = AUTOGRAD_TOLERANCE if re.search("hardsigmoid|hardswish", case.source) else TOLERANCE
        if norm > upper * (1 + slack + (1000 * eps if eps > 1e-10 else 0)):
            return "false certificate", f"upper {upper!r}, Jacobian {norm!r} at a {name} point"
    if not measure.is_steady(points["normal"]):
        return None
    return measure.moves_with_another(points) or measure.steepest(points)


class _Measure:
    """A network as a map of flat vectors, each of a batch of two."""

    def __init__(self, model: nn.Module, upper: float, eps: float) -> None:
        self.model, self.upper, self.eps = model, upper, eps

    def _outputs(self, point: Point) -> Tensor:
        """Return all outputs side by side; what the model does to its input is done to a copy."""
        leaves = pytree.tree_leaves(self.model(*(x.clone() for x in point)))
        return torch.cat([leaf.flatten().double() for leaf in leaves if isinstance(leaf, Tensor)])

    @torch.no_grad()
    def value(self, point: Point) -> Tensor:
        return self._outputs(point)

    def jacobian(self, point: Point) -> Tensor | None:
        """Return the Jacobian (outputs, inputs), the inputs of sample 0 first; None without a derivative."""
        leaves = [x.detach().requires_grad_() for x in point]
        try:
            value = self._outputs(leaves)
            if not value.requires_grad:
                return None
            rows = self._gradients(value, leaves)
        except RuntimeError:
            return None
        # Of an input that nothing depends on the gradient comes without the dimension of the outputs.
        rows = [row.expand(len(value), *x.shape).flatten(2) for row, x in zip(rows, leaves, strict=True)]
        return torch.cat(rows, 2).flatten(1).double()

    @staticmethod
    def _gradients(value: Tensor, leaves: Point) -> Sequence[Tensor]:
        settings = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        eye = torch.eye(len(value), dtype=value.dtype)
        try:
            return torch.autograd.grad(value, leaves, eye, is_grads_batched=True, **settings)
        except RuntimeError:  # An operation whose gradient is not batched.
            single = [torch.autograd.grad(value, leaves, row, **settings) for row in eye]
            return [torch.stack(parts) for parts in zip(*single, strict=True)]

    @staticmethod
    def mixes(jacobian: Tensor) -> bool:
        """Whether an output depends on both samples."""
        own = jacobian.view(len(jacobian), 2, -1).norm(dim=2)
        return bool((own.min(1).values > 1e-12 * own.max()).any())

    def is_steady(self, point: Point) -> bool:
        """Whether the map is the same twice; what has a state is seen by its Jacobians only."""
        return torch.equal(self.value(point), self.value(point))

    def moves_with_another(self, points: dict[str, Point]) -> tuple[str, str] | None:
        first, other = points["normal"], points["wide"]
        value = self.value(first)
        moved = []
        for sample in range(2):
            changed = [x.clone() for x in first]
            for x, y in zip(changed, other, strict=True):
                x[sample] = y[sample]
            moved.append((self.value(changed) - value).abs() > 1e-12 * value.abs().max().clamp(min=1))
        return ("samples are mixed", "by values") if bool((moved[0] & moved[1]).any()) else None

    def steepest(self, points: dict[str, Point]) -> tuple[str, str] | None:
        """Search the lines between points for the steepest place, which at a jump has no end."""
        for start, end in itertools.pairwise(points):
            a, b = points[start], [x.clone() for x in points[end]]
            for x, y in zip(b, a, strict=True):
                x[1] = y[1]  # One sample moves: what is steep is not hidden by the other.
            low, high = self.value(a), self.value(b)
            for _ in range(24):
                length = _distance(a, b)
                if length < 1e4 * self.eps * max(1.0, _size(a)):
                    break
                rise = (low - high).norm().item()
                # A cast to half precision overflows far out, which exact arithmetic does not.
                above = rise - self.upper * length
                if (
                    math.isfinite(rise)
                    and above > TOLERANCE * self.upper * length
                    and above > self._noise(low, high, a, b)
                ):
                    return "false certificate", f"upper {self.upper!r}, slope {rise / length!r}, {start} to {end} point"
                middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
                value = self.value(middle)
                if (value - low).norm() >= (high - value).norm():
                    b, high = middle, value
                else:
                    a, low = middle, value
        return None

    def _noise(self, low: Tensor, high: Tensor, *points: Point) -> float:
        """Return what rounding may do to a difference: a few roundings of the values, and of what they come from.

        The latter is how far values move where inputs move by a few roundings.
        """
        generator = torch.Generator().manual_seed(0)
        moves = [self.eps * max(low.norm().item(), high.norm().item())]
        for point, value in zip(points, (low, high), strict=True):
            for _ in range(4):
                signs = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in point]
                near = [x + 4 * self.eps * x.abs().clamp(min=1) * s for x, s in zip(point, signs, strict=True)]
                moves.append((self.value(near) - value).norm().item())
        return 16 * max(moves)


def _distance(a: Point, b: Point) -> float:
    return math.hypot(*((x - y).norm().item() for x, y in zip(a, b, strict=True)))


def _size(a: Point) -> float:
    return max(x.abs().max().item() for x in a)


def _points(example: Point, seed: int) -> dict[str, Point]:
    """Return points where slopes are steep in one network or another: near 0, near kinks, nearly constant, far out."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Point:
        return [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in example]

    def peaked(x: Tensor) -> Tensor:
        x = 0.1 * x
        x.view(2, -1)[:, int(torch.randint(x[0].numel(), (), generator=generator))] += 5
        return x

    return {
        "normal": noise(),
        "wide": [10 * x for x in noise()],
        "small": [1e-3 * x for x in noise()],
        "kinked": [(2 * x).round() / 2 + 1e-6 * n for x, n in zip(noise(), noise(), strict=True)],
        "flat": [
            x.flatten(1)[:, :1].view(2, *[1] * (x.dim() - 1)) + 1e-4 * n for x, n in zip(noise(), noise(), strict=True)
        ],
        "peaked": [peaked(x) for x in noise()],
        "far": [1e6 * x for x in noise()],
    }
