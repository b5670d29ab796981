"""Functions of one variable that a forward pass writes out: GELU, mish, hardswish, masks, and sums of such.

An operation is read backwards as a function of one earlier value, elementwise, as a polynomial of
:mod:`lightning_lip.constants.functions`, where its slopes are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from lightning_lip.constants import functions as fn
from lightning_lip.constants import modules as constants
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.builder import (
    Builder,
    Dependent,
    Independent,
    Refused,
    RefusedError,
    arguments_of,
    dimensions,
    is_real,
    is_sized,
    shape_of,
    size_along,
)
from lightning_lip.rigorous.evaluation import evaluated
from lightning_lip.rigorous.rounding import divide_up, multiply_up, sqrt_up, sum_up

N_OPERATIONS = 40
"""How far back an operation is read."""

LARGEST = 2**20
"""How many elements a stored tensor may have to be looked at for a single number."""


def written_out(builder: Builder, node: torch.fx.Node) -> Dependent | Refused | None:
    """Return the value of an operation that is a known function of one earlier value, elementwise; None otherwise.

    Of a refused value it is refused for that value's reasons, and not for those of the operations in between.

    Raises:
        RefusedError: If it is read, and is discontinuous; the message is the reason.
    """
    if _name(node) not in _READ or not is_real(node.meta.get("val")):
        return None
    reason = None
    for base in _bases(builder, node):
        try:
            slope = fn.slopes_of(_Reader(builder, base).polynomial(node))
        except (fn.UnknownFunctionError, ArithmeticError):
            continue
        except UnsupportedLayerError as error:
            reason = reason or RefusedError(str(error))
            continue
        except ValueError:
            # A factor that is NaN is no fraction.
            continue
        constant = slope.magnitude * (1 + 1e-15)
        value = builder.values[base]
        return builder.chain(node, value, constant, how="a function of one variable, written out")
    if reason is not None:
        raise reason
    return _root_mean_square(builder, node) or _response_normalised(builder, node) or _of_refused(builder, node)


def _of_refused(builder: Builder, node: torch.fx.Node) -> Refused | None:
    """Return the refused value, of the fewest reasons, that an operation is a known function of; None without one."""
    bases = sorted(_bases(builder, node, Refused), key=lambda base: len(builder.values[base].refusals))
    for base in bases:
        try:
            fn.slopes_of(_Reader(builder, base).polynomial(node))
        except (fn.UnknownFunctionError, ArithmeticError, ValueError):  # UnsupportedLayerError is a ValueError
            continue
        value: Refused = builder.values[base]
        return value
    return None


def _root_mean_square(builder: Builder, node: torch.fx.Node) -> Dependent | Refused | None:
    """Return the value of an RMSNorm without its gain, ``x / r`` with ``r^2 = |x|^2 / n + eps``, eps a number.

    Its Jacobian ``(I - x x^T / (n r^2)) / r`` has the eigenvalues 1 / r and eps / r^3, so that the constant is
    ``1 / sqrt(eps)``, which x = 0 attains. (Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.)
    """
    a, b = _arguments(node, "mul", "multiply", keys=("self", "other"))
    numerator, divisor = _arguments(node, "div", "divide", "true_divide", keys=("self", "other"))
    pairs = [(a, b, "rsqrt"), (b, a, "rsqrt"), (numerator, divisor, "sqrt")]
    for factor, root, name in pairs:
        (inner,) = _arguments(root, name, keys=("self",))
        mean, eps = _arguments(inner, "add", keys=("self", "other"))
        squares, dims, keeps = _arguments(mean, "mean", keys=("self", "dim", "keepdim"))
        source, exponent = _arguments(squares, "pow", keys=("self", "exponent"))
        base = _without_casts(factor)
        if source is None or _without_casts(source) is not base or exponent != 2 or not dims or not keeps:
            continue
        value = builder.values.get(base)
        if not isinstance(eps, (int, float)) or not eps > 0:
            return None
        if isinstance(value, Refused):
            return value
        if isinstance(value, Dependent) and value.pending is None and dimensions(value, dims):
            constant = divide_up(1.0, math.nextafter(math.sqrt(eps), 0.0))
            return builder.chain(node, value, constant, how="a root mean square normalisation, written out")
    return None


def _without_casts(node: Any) -> Any:
    """Return the node before casts that change neither dtype nor shape."""
    while isinstance(node, torch.fx.Node) and _name(node) in ("to", "_to_copy", "type_as"):
        source = node.args[0]
        if not isinstance(source, torch.fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = source
    return node


def _response_normalised(builder: Builder, node: torch.fx.Node) -> Dependent | None:
    """Return the value of ConvNeXt V2's response normalisation, ``x_c |x_c| / (M + eps)``, M the mean of the |x_c|.

    |x_c| is the norm of a channel, of C. With n_c = |x_c| / (M + eps), of sum at most C,
    ``|df_c| <= 2 n_c |dx_c| + n_c^2 |dM|`` and ``|dM| <= ||dx|| / sqrt(C)``, so that ``||df|| <= (2 max n_c +
    sqrt(sum n_c^4 / C)) ||dx||``: an *upper bound* ``2 C + C^(3/2)``, which an input of one channel comes near.
    (Woo and others, ConvNeXt V2, 2023, define the layer.)
    """
    if _name(node) not in ("mul", "multiply"):
        return None
    for base, quotient in (node.args[:2], node.args[1::-1]):
        value = builder.values.get(base) if isinstance(base, torch.fx.Node) else None
        channels = _response_channels(base, quotient, value) if isinstance(value, Dependent) else None
        if channels is not None:
            constant = sum_up([2.0 * channels, multiply_up(float(channels), sqrt_up(channels))])
            return builder.chain(node, value, constant, how="a response normalisation")  # type: ignore[arg-type]
    return None


def _response_channels(base: Any, quotient: Any, value: Dependent) -> int | None:
    """Return the number of channels if a quotient is that of a response normalisation of a value."""
    norm, divisor = _arguments(quotient, "div", "divide", "true_divide", keys=("self", "other"))
    mean, eps = _arguments(divisor, "add", keys=("self", "other"))
    averaged, channels, keeps = _arguments(mean, "mean", keys=("self", "dim", "keepdim"))
    source, order, places, keep = _arguments(
        norm, "linalg_vector_norm", "norm", keys=("self", "ord|p", "dim", "keepdim")
    )
    if source is not base or averaged is not norm or not keep or not keeps or order not in (2, None) or not places:
        return None
    if not isinstance(eps, (int, float)) or not eps > 0 or not channels:
        return None
    over, along = dimensions(value, channels), dimensions(value, places)
    return None if set(over) & set(along) else size_along(value, over)


def _arguments(node: Any, *names: str, keys: tuple[str, ...]) -> list[Any]:
    """Return some arguments of an operation of one of these names; None for each of any other one."""
    if not isinstance(node, torch.fx.Node) or _name(node) not in names:
        return [None] * len(keys)
    a = arguments_of(node, lambda leaf: leaf)
    if a.get("alpha", 1) != 1 or a.get("rounding_mode") is not None:
        return [None] * len(keys)
    return [next((a[k] for k in key.split("|") if k in a), None) for key in keys]


def _name(node: Any) -> str:
    schema = getattr(node.target, "_schema", None)
    name = "" if schema is None else str(schema.name)
    return name.removeprefix("aten::") if name.startswith("aten::") else ""


def _bases(
    builder: Builder, node: torch.fx.Node, kind: type[Dependent] | type[Refused] = Dependent
) -> list[torch.fx.Node]:
    """Return the earlier values of a kind and of the node's shape that it may be a function of, the latest first."""
    seen: dict[torch.fx.Node, None] = {}
    waiting = [node]
    while waiting and len(seen) < N_OPERATIONS:
        for source in waiting.pop(0).all_input_nodes:
            if source not in seen and not isinstance(builder.values.get(source), Independent):
                seen[source] = None
                if _name(source) in _READ:
                    waiting.append(source)
    shape = shape_of(node)
    found = []
    for source in seen:
        value = builder.values.get(source)
        if not isinstance(value, kind) or not is_real(source.meta["val"]) or shape_of(source) != shape:
            continue
        if isinstance(value, Refused) or value.pending is None:
            found.append(source)
    if len(found) > 1:
        order = {other: i for i, other in enumerate(node.graph.nodes)}
        found.sort(key=order.__getitem__, reverse=True)
    return found


class _Reader:
    """Reads operations as polynomials in functions of the value of one node."""

    def __init__(self, builder: Builder, base: torch.fx.Node) -> None:
        self._builder = builder
        self._known: dict[torch.fx.Node, fn.Polynomial] = {base: fn.VARIABLE}
        self._shape = shape_of(base)

    def polynomial(self, argument: Any) -> fn.Polynomial:
        """Return the polynomial of a node, a number or a stored tensor of one element."""
        if isinstance(argument, (bool, int, float)):
            if not math.isfinite(argument):
                raise fn.UnknownFunctionError
            return fn.constant(argument)
        if not isinstance(argument, torch.fx.Node):
            raise fn.UnknownFunctionError
        if argument not in self._known:
            value = self._builder.values.get(argument)
            self._known[argument] = self._stored(value) if isinstance(value, Independent) else self._read(argument)
        return self._known[argument]

    def _read(self, node: torch.fx.Node) -> fn.Polynomial:
        name = _name(node)
        if name not in _READ or len(self._known) > N_OPERATIONS:
            raise fn.UnknownFunctionError
        if not is_real(node.meta["val"]) and _READ[name] is not _comparison:
            raise fn.UnknownFunctionError
        if not is_sized(node.meta["val"]) or shape_of(node) != self._shape:
            raise fn.UnknownFunctionError
        return _READ[name](self.polynomial, arguments_of(node, lambda leaf: leaf), node)

    @staticmethod
    def _stored(value: Independent) -> fn.Polynomial:
        if value.live or not 0 < math.prod(value.shape) <= LARGEST:
            raise fn.UnknownFunctionError
        number = evaluated(lambda: torch.as_tensor(value.compute()))
        # One number in all places, known exactly: what is computed is known but for a rounding, unless it is zero.
        is_one = bool((number.value == number.value.flatten()[0]).all() & number.value.isfinite().all())
        if not is_one or number.error_norm() > 0:
            raise fn.UnknownFunctionError
        return fn.constant(number.value.flatten()[0].item())


Read = Callable[[Any], fn.Polynomial]


def _exact(number: float) -> Fraction:
    if not math.isfinite(number):
        raise fn.UnknownFunctionError
    return Fraction(number)


def _sum(read: Read, a: dict[str, Any], node: torch.fx.Node) -> fn.Polynomial:
    p, q, alpha = read(a["self"]), read(a["other"]), _exact(a.get("alpha", 1))
    if "rsub" in _name(node):
        return fn.plus(q, p, -alpha)
    return fn.plus(p, q, alpha if "add" in _name(node) else -alpha)


def _product(read: Read, a: dict[str, Any], node: torch.fx.Node) -> fn.Polynomial:
    return fn.times(read(a["self"]), read(a["other"]))


def _quotient(read: Read, a: dict[str, Any], node: torch.fx.Node) -> fn.Polynomial:
    if a.get("rounding_mode") is not None:
        raise fn.UnknownFunctionError
    return fn.times(read(a["self"]), fn.reciprocal(read(a["other"])))


def _comparison(read: Read, a: dict[str, Any], node: torch.fx.Node) -> fn.Polynomial:
    difference = fn.plus(read(a["self"]), read(a["other"]), -1)
    name = _name(node)
    return fn.step(difference if name.startswith("g") else fn.negative(difference))


def _choice(read: Read, a: dict[str, Any], node: torch.fx.Node) -> fn.Polynomial:
    if "mask" in a:
        chosen, yes, no = read(a["mask"]), read(a["value"]), read(a["self"])
    else:
        chosen, yes, no = read(a["condition"]), read(a["self"]), read(a["other"])
    return fn.plus(no, fn.times(chosen, fn.plus(yes, no, -1)))


def _softplus(read: Read, a: dict[str, Any], node: torch.fx.Node) -> fn.Polynomial:
    constants.softplus(a["threshold"])
    beta = _exact(a["beta"])
    return fn.times(fn.constant(1 / beta), fn.function("softplus", fn.times(fn.constant(beta), read(a["self"]))))


def _one(read_atom: Callable[[fn.Polynomial], fn.Polynomial]) -> Callable[..., fn.Polynomial]:
    return lambda read, a, node: read_atom(read(a["self"]))


_READ: dict[str, Callable[..., fn.Polynomial]] = {
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), _sum),
    **dict.fromkeys(("mul", "multiply"), _product),
    **dict.fromkeys(("div", "divide", "true_divide"), _quotient),
    **dict.fromkeys(("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal"), _comparison),
    **dict.fromkeys(("where", "masked_fill"), _choice),
    **dict.fromkeys(("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach"), _one(lambda p: p)),
    "neg": _one(fn.negative),
    "pow": lambda read, a, node: fn.power(read(a["self"]), a["exponent"]),
    "square": _one(lambda p: fn.times(p, p)),
    "reciprocal": _one(fn.reciprocal),
    "sqrt": _one(lambda p: fn.function("sqrt", p)),
    "rsqrt": _one(lambda p: fn.function("rsqrt", p)),
    "exp": _one(lambda p: fn.function("exp", p)),
    "expm1": _one(lambda p: fn.plus(fn.function("exp", p), fn.constant(-1))),
    "log": _one(fn.logarithm),
    "log1p": _one(lambda p: fn.logarithm(fn.plus(p, fn.constant(1)))),
    "softplus": _softplus,
    "log_sigmoid": _one(lambda p: fn.negative(fn.function("softplus", fn.negative(p)))),
    "tanh": _one(lambda p: fn.function("tanh", p)),
    "sigmoid": _one(lambda p: fn.function("sigmoid", p)),
    "erf": _one(lambda p: fn.function("erf", p)),
    "sin": _one(lambda p: fn.function("sin", p)),
    "cos": _one(lambda p: fn.function("cos", p)),
    "atan": _one(lambda p: fn.function("atan", p)),
    "abs": _one(lambda p: fn.function("abs", p)),
    "sign": _one(lambda p: fn.plus(fn.times(fn.constant(2), fn.step(p)), fn.constant(-1))),
    "relu": _one(lambda p: fn.clamp(p, 0, None)),
    "relu6": _one(lambda p: fn.clamp(p, 0, 6)),
    "hardtanh": lambda read, a, node: fn.clamp(read(a["self"]), a["min_val"], a["max_val"]),
    "clamp": lambda read, a, node: fn.clamp(read(a["self"]), a["min"], a["max"]),
    "clip": lambda read, a, node: fn.clamp(read(a["self"]), a["min"], a["max"]),
    "clamp_min": lambda read, a, node: fn.clamp(read(a["self"]), a["min"], None),
    "clamp_max": lambda read, a, node: fn.clamp(read(a["self"]), None, a["max"]),
    "hardsigmoid": _one(fn.hard_sigmoid),
    "hardswish": _one(lambda p: fn.times(p, fn.hard_sigmoid(p))),
    "silu": _one(lambda p: fn.times(p, fn.function("sigmoid", p))),
}
"""How each operation is read, by its name in aten."""
