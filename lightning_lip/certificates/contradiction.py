"""A check of a whole certificate by measurement, which trusts neither the trace nor the rules.

The traced graph must compute what the model computes, call after call; its output must be finite; no sample's output
may move with another sample; and no two points may be further apart after the network than the bound allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_lip.graph.bound import NetworkBound
from lightning_lip.graph.tracing import TracedModel, as_traced
from lightning_lip.kernels.tensors import full_fp32
from lightning_lip.models.inputs import FAILURES, call_arguments, floating_dtype, traced_example

SLOPE_TOLERANCE = 1e-5
"""What a measured slope may exceed a bound by, relative: torch rounds constants of some activations to fp32, and its
Softplus jumps by 2e-9."""

N_BISECTIONS = 6
"""Steps towards the steepest place between two points; a jump grows by a factor of 2 with each."""

GRADIENTS: tuple[Callable[[], AbstractContextManager[None]], ...] = (
    torch.no_grad,
    torch.enable_grad,
    torch.inference_mode,
    torch.no_grad,
)
"""The modes that the points are compared in, with gradients of the inputs recorded in the second, as in an attack.

A forward pass may ask for its mode; it is traced in the first.
"""

Point = tuple[Tensor, ...]


class ContradictionError(Exception):
    """A measurement contradicts the certificate; the message says which."""


def contradiction(network: NetworkBound, example_input: object, upper: float) -> str | None:
    """Return what was measured that contradicts a bound, or None.

    The model runs in eval mode, in fp64 where it can and in its own dtype otherwise, on inputs of the example's shapes;
    what the forward pass changes (buffers, attributes, generators of random numbers) is given back.

    Args:
        network: The bound over the traced graph.
        example_input: What it was traced on.
        upper: The bound of the Lipschitz constant.
    """
    model = network.traced.model
    with as_traced(model), full_fp32():
        given = traced_example(example_input, floating_dtype(model), network.traced.batch_dim)
        own = floating_dtype(model) or _dtype_of(given)
        on_mps = any(tensor.device.type == "mps" for _, tensor in _named(model))  # which has no fp64
        # In another dtype the model may run other operations, or the same with a result of another dtype.
        dtypes = (own,) if on_mps or _names_a_dtype(network.traced) else (torch.float64, own)
        for dtype in dict.fromkeys(dtypes):
            measure = _Measure(network.traced, given, dtype)
            found = _contradiction(measure, upper)
            # In fp64 the model may not be what was traced; where it is, what is found there is final.
            if found is None or measure.is_as_traced:
                return found
        return found


def _dtype_of(given: object) -> torch.dtype:
    return next(x.dtype for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.is_floating_point())


def _dtypes(traced: TracedModel) -> set[torch.dtype]:
    """Return the floating-point dtypes that values are converted to."""
    arguments = pytree.tree_leaves([(node.args, node.kwargs) for node in traced.graph.nodes])
    return {leaf for leaf in arguments if isinstance(leaf, torch.dtype) and leaf.is_floating_point}


def _names_a_dtype(traced: TracedModel) -> bool:
    """Whether the graph converts values, or holds a number that depends on their dtype."""
    for node in traced.graph.nodes:
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        if any(isinstance(leaf, torch.dtype) for leaf in leaves) or "rms_norm" in str(node.target):
            return True
    return False


def _contradiction(measure: _Measure, upper: float) -> str | None:
    try:
        example = measure.example
        points = {
            "the example": example,
            "a normal point": measure.noise(),
            "a large point": tuple(30 * x for x in measure.noise()),
            "a small point": tuple(1e-3 * x for x in measure.noise()),
        }
        values = {
            name: measure.compared(name, point, mode)
            for (name, point), mode in zip(points.items(), GRADIENTS, strict=True)
        }
        measure.is_as_traced = True
        if not len(values["the example"]):
            return None
        measure.check_finite(values, upper)
        if measure.traced.batch_dim is not None:
            moved = measure.check_samples(points["a normal point"], values["a normal point"], points["a large point"])
            points |= {name: point for name, (point, _) in moved.items()}
            values |= {name: value for name, (_, value) in moved.items()}
        if math.isfinite(upper):
            measure.check_slopes(points, values, upper)
    except ContradictionError as error:
        return str(error)
    return None


class _Measure:
    """A model and its traced graph as maps of the floating-point inputs, in one dtype."""

    def __init__(self, traced: TracedModel, given: Any, dtype: torch.dtype) -> None:
        self.traced, self.dtype = traced, dtype
        self.is_as_traced = False
        """Whether the model was found to return what its graph does."""
        self.eps = max(torch.finfo(d).eps for d in (dtype, *_dtypes(traced)))
        self._leaves, self._spec = pytree.tree_flatten(call_arguments(given))
        self._at = [i for i, x in enumerate(self._leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        self._generator = torch.Generator("cpu").manual_seed(0)
        self.example: Point = tuple(self._leaves[i].to(dtype) for i in self._at)
        self._state = {name: self._cast(tensor) for name, tensor in _named(traced.model)}
        self._copies: dict[int, Tensor] = {id(tensor): self._state[name] for name, tensor in _named(traced.model)}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    def noise(self) -> Point:
        """Return normal inputs."""
        return tuple(torch.randn(x.shape, generator=self._generator, dtype=torch.float64).to(x) for x in self.example)

    def _arguments(self, point: Point) -> list[Any]:
        leaves = list(self._leaves)
        for i, x in zip(self._at, point, strict=True):
            # The forward pass may write into its input, which a leaf that requires gradients refuses.
            leaves[i] = x.detach().requires_grad_(torch.is_grad_enabled()).clone()
        return leaves

    def _flat(self, outputs: Sequence[object]) -> Tensor:
        tensors = [x.flatten().to(self.dtype) for x in outputs if isinstance(x, Tensor) and not x.is_complex()]
        return torch.cat(tensors) if tensors else torch.zeros(0)

    def value(self, point: Point) -> Tensor:
        """Return all that the model returns, side by side."""
        args, kwargs = pytree.tree_unflatten(self._arguments(point), self._spec)
        outputs = torch.func.functional_call(self.traced.model, self._state, args, dict(kwargs), strict=False)
        return self._flat(pytree.tree_leaves(outputs))

    def _value_in(self, mode: Callable[[], AbstractContextManager[None]], point: Point) -> Tensor:
        """Return the model's value in a grad mode, or in the present one where it does not run in that one."""
        try:
            with mode():
                return self.value(point)
        except FAILURES:
            return self.value(point)

    def traced_value(self, point: Point) -> Tensor:
        """Return the same by the operations of the graph."""
        traced = self.traced
        given = dict(zip(traced.inputs, self._arguments(point), strict=True))
        known: dict[torch.fx.Node, Any] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                if node.name in given:
                    known[node] = given[node.name]
                else:
                    stored = traced.stored[node.name]()
                    copy = self._copies.get(id(stored))
                    known[node] = self._cast(stored) if copy is None else copy
            elif node.op == "call_function" and "_assert_" not in str(node.target):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
        by_name = {node.name: value for node, value in known.items()}
        return self._flat([by_name[name] for name in traced.outputs if name in by_name])

    def compared(self, name: str, point: Point, mode: Callable[[], AbstractContextManager[None]]) -> Tensor:
        """Return the model's value at a point, where the graph's is the same.

        Args:
            name: What the point is called.
            point: The inputs.
            mode: The grad mode that the model runs in.

        Raises:
            ContradictionError: If it is not, or the model does not run.
        """
        try:
            # Outside of the mode no inference tensor, which may not be worked with in every place.
            value, traced = self._value_in(mode, point).detach().clone(), self.traced_value(point)
        except FAILURES as error:
            raise ContradictionError(f"the forward pass fails at {name} in {self.dtype}: {error}") from error
        largest = float(value.nan_to_num(0.0, 0.0, 0.0).abs().max()) if value.numel() else 0.0
        tolerance = math.sqrt(self.eps)
        if value.shape == traced.shape and torch.allclose(value, traced, tolerance, tolerance * largest, True):
            return value
        by = float((value - traced).abs().max()) if value.shape == traced.shape and len(value) else math.nan
        # Where all cancels, the values are rounding errors.
        if by <= self._noise((point, traced)):
            return value
        raise ContradictionError(
            f"at {name} the model returns other values than its traced graph (by up to {by:.3g}): its forward pass "
            "depends on something else than its input and its weights, such as a counter, random numbers of Python or "
            "whether gradients are recorded"
        )

    def check_finite(self, values: dict[str, Tensor], upper: float) -> None:
        """Check that values are finite, but where they are too large for the dtype.

        Raises:
            ContradictionError: If one is not.
        """
        for name in ("a normal point", "a small point"):
            if not bool(values[name].isfinite().all()) and not upper > torch.finfo(self.dtype).max ** 0.25:
                raise ContradictionError(f"the network's output at {name} holds NaN or an infinity")

    def check_samples(self, point: Point, value: Tensor, other: Point) -> dict[str, tuple[Point, Tensor]]:
        """Check that no output moves with both samples; return the points in which one sample is another, with values.

        Raises:
            ContradictionError: If one does.
        """
        moved, masks = {}, []
        for sample in range(2):
            changed = tuple(
                torch.stack([y[i] if i == sample else x[i] for i in range(2)])
                for x, y in zip(point, other, strict=True)
            )
            now = self.value(changed)
            moved[f"the normal point with sample {sample} from the large one"] = changed, now
            masks.append((now - value).abs() > math.sqrt(self.eps) * value.abs().max().clamp(min=1))
        if bool((masks[0] & masks[1]).any()):
            raise ContradictionError("the output of one sample moves with another sample of the batch")
        return moved

    def check_slopes(self, points: dict[str, Point], values: dict[str, Tensor], upper: float) -> None:
        """Check the slopes between all points, and at the steepest place between two of them.

        Raises:
            ContradictionError: If one exceeds the bound.
        """
        names = [name for name, value in values.items() if bool(value.isfinite().all())]
        if len(names) < 2:
            return
        rises = _distances([values[n] for n in names])
        slopes = (rises / _distances([torch.cat([x.flatten() for x in points[n]]) for n in names])).nan_to_num(0.0)
        low, high = (names[i] for i in divmod(int(slopes.argmax()), len(names)))
        self._check_slope((low, high), points[low], points[high], values[low], values[high], upper)
        a, b, f, g = points[low], points[high], values[low], values[high]
        for _ in range(N_BISECTIONS):
            middle = tuple((x + y) / 2 for x, y in zip(a, b, strict=True))
            value = self.value(middle)
            if not bool(value.isfinite().all()):
                return
            if float((value - f).norm()) >= float((g - value).norm()):
                b, g = middle, value
            else:
                a, f = middle, value
            self._check_slope((f"a place between {low}", high), a, b, f, g, upper)

    def _check_slope(self, names: tuple[str, str], a: Point, b: Point, f: Tensor, g: Tensor, upper: float) -> None:
        distance = _norm([x - y for x, y in zip(a, b, strict=True)])
        rise = float((f - g).double().norm())
        excess = rise - upper * distance * (1 + max(SLOPE_TOLERANCE, 1e3 * self.eps))
        if distance > 0 and excess > 0 and excess > self._noise((a, f), (b, g)):
            raise ContradictionError(
                f"between {names[0]} and {names[1]}, {distance:.3g} apart, the slope is {rise / distance:.6g}, "
                f"more than the bound {upper:.6g}: a constant stated with register_constant is too small, or a rule of "
                "this package is wrong"
            )

    def _noise(self, *ends: tuple[Point, Tensor]) -> float:
        """Return what rounding may do to a difference of values: how far they move where inputs move by roundings.

        It is the graph's values that are looked at, which have no state.
        """
        moves = [0.0]
        for point, value in ends:
            moves.append(self.eps * float(value.double().norm()))
            for _ in range(4):
                near = tuple(
                    x + 4 * self.eps * x.abs().clamp(min=1) * s for x, s in zip(point, self.noise(), strict=True)
                )
                moves.append(float((self.traced_value(near) - value).double().norm()))
        return 16 * max(moves)


def _distances(values: Sequence[Tensor]) -> Tensor:
    """Return the distances between all pairs of flat tensors."""
    stacked = torch.stack(list(values)).double()
    return torch.cdist(stacked, stacked, compute_mode="donot_use_mm_for_euclid_dist")


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(x.double().norm()) for x in tensors))


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
