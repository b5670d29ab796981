"""What the functions of torch do with their arguments, as far as weights and normalisations need to know."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["rows", "columns", "blocks", "convolution"]
"""Whether a weight's outputs are its rows (``x W^T``) or its columns (``x W``); or blocks (G, m, n), or a kernel."""

Arguments = tuple[Sequence[Any], Mapping[str, Any]]

CASTS = {"to", "type_as", "type", "float", "double", "half", "bfloat16", "contiguous", "clone"}
"""Functions that return their argument's values in another dtype or memory."""

TRANSPOSITIONS = {"t", "T", "mT", "H", "mH", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
VIEWS = CASTS | TRANSPOSITIONS | _RESHAPES | _DROPOUTS
"""Functions that move the entries of their argument; a dropout only leaves some out in training."""

SLICES = {"chunk", "split", "tensor_split", "unbind", "narrow", "select", "getitem"}
"""Functions that return parts of their argument."""

HOMOGENEOUS = {
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "abs", "mean", "sum"),
    *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3)),
}
"""Functions with f(c x) = c f(x) for c > 0, which a normalisation behind them undoes as well."""

PRODUCTS = {"mul", "multiply", "rmul"}

_ATTRIBUTES = {"T", "mT", "H", "mH", "data"}

_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal", "uniform", "exponential", "poisson", "rrelu")

_MATRIX_PRODUCTS = {"matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv"}

_RECURRENT = {
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
}

_INVARIANT_NORMS = {"layer_norm", "rms_norm", "group_norm", "instance_norm", "normalize"}


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name without underscores around it; that of an attribute of tensors for its getter.

    Attributes that tell no values of the tensor (its shape, say) have the name "".
    """
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        return attribute if name == "__get__" and attribute in _ATTRIBUTES else ""
    return name.strip("_") if name.startswith("__") else name


def writes(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes one of its arguments in place."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    is_augmented = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return in_place or is_augmented or name == "__setitem__" or bool(kwargs.get("inplace")) or "out" in kwargs


def repeatable(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function returns the same for the same arguments, which it takes the values of, and changes nothing."""
    name = name_of(function)
    if name.startswith("new_") or name.endswith("_like"):  # only their shapes
        return False
    if not name or writes(function, kwargs) or any(word in name for word in _RANDOM):
        return False
    normalised = batch_norm_arguments(name, args, kwargs)
    return normalised is None or normalised.variance is None


class Multiplied(NamedTuple):
    """Weights among a function's arguments, and how they multiply."""

    weights: tuple[Any, ...]
    layout: Layout
    value: Any = None
    """The activations, where their shape matters."""
    output: int | None = 0
    """Which of the function's results are the weights' outputs; None where no result is that."""


class Normalised(NamedTuple):
    """What a function normalises, and by which tensors."""

    value: Any
    gain: Any
    variance: Any = None
    eps: float = 0.0


def multiplied(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Multiplied]:
    """Return the arguments of a function that multiply others as weights do, whether they are weights or not."""
    name = name_of(function)
    if name == "linear":
        value, weight = _take(args, kwargs, "input", "weight")
        return [Multiplied((weight,), "rows", value)]
    if name in _MATRIX_PRODUCTS:
        first, second = [*args, *kwargs.values()][-2:] if name in ("rmatmul",) else _factors(name, args, kwargs)
        if name == "rmatmul":
            first, second = second, first
        return [Multiplied((second,), "columns", first), Multiplied((first,), "rows", second, None)]
    if name.startswith("conv") and name.rstrip("d")[-1:].isdigit():
        value, weight = _take(args, kwargs, "input", "weight")
        return [Multiplied((weight,), "convolution", value)]
    if name == "multi_head_attention_forward":
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        inner = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        into = tuple(bound.get(key) for key in inner)
        return [Multiplied(into, "rows", None, None), Multiplied((bound["out_proj_weight"],), "rows")]
    if name in _RECURRENT:
        tensors = [leaf for arg in args for leaf in (arg if isinstance(arg, (list, tuple)) else [arg])]
        return [Multiplied(tuple(tensors), "rows", None, None)]
    return []


def _factors(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    given = [*args, *(kwargs[key] for key in ("mat1", "batch1", "other", "mat2", "batch2", "vec") if key in kwargs)]
    skipped = 1 if name.startswith(("add", "badd")) else 0
    first, second = [*given, None, None][skipped : skipped + 2]
    return first, second


class Contraction(NamedTuple):
    """How an einsum of two operands contracts a weight: its dimensions by their part in it, in their order."""

    weight: int
    blocks: list[int]
    rows: list[int]
    columns: list[int]


def contraction(equation: Any, n_operands: int, weight: int) -> Contraction | None:
    """Return how a weight is contracted by an einsum, or None if it is no linear map of the other operand."""
    if not isinstance(equation, str) or n_operands != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    own, other = terms[weight], terms[1 - weight]
    if not arrow or "." in own or len(set(own)) < len(own) or len(set(output)) < len(output):
        return None
    kinds: dict[str, list[int]] = {"blocks": [], "rows": [], "columns": []}
    for dim, letter in enumerate(own):
        part = (letter in other, letter in output)
        kind = {(True, True): "blocks", (False, True): "rows", (True, False): "columns"}.get(part)
        if kind is None:  # summed by itself
            return None
        kinds[kind].append(dim)
    return Contraction(weight, **kinds)


def _take(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str, default: Any = None) -> list[Any]:
    """Return arguments by position or name, in the order of the signature."""
    return [args[i] if i < len(args) else kwargs.get(name, default) for i, name in enumerate(names)]


def convolution_geometry(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a functional convolution, by their names in the modules; None where not given."""
    tail = ("output_padding", "groups", "dilation") if "transpose" in name else ("dilation", "groups")
    names = ("input", "weight", "bias", "stride", "padding", *tail)
    given = dict(zip(names[3:], _take(args, kwargs, *names)[3:], strict=True))
    return {key: value for key, value in given.items() if value is not None}


def batch_norm_arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Normalised | None:
    """Return what a batch normalisation normalises, without its variance where it keeps no running statistics."""
    if name != "batch_norm":
        return None
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    value, second, third, fourth, fifth, _, _, eps = _take(args, kwargs, *names)
    if len(args) == 9:  # torch.batch_norm, the native one: weight and bias come first
        return Normalised(value, second, fifth, float(args[7]))
    return Normalised(value, fourth, third, 1e-5 if eps is None else float(eps))


def normalised(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Normalised | None:
    """Return what a normalisation normalises; None for other functions.

    With running statistics it has a variance; without, it divides by the size of its own input.
    """
    name = name_of(function)
    if name == "batch_norm":
        return batch_norm_arguments(name, args, kwargs)
    if name not in _INVARIANT_NORMS:
        return None
    if name == "instance_norm":
        native = len(args) == 9
        names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
        value, second, third, fourth, fifth, *_, eps = _take(args, kwargs, *names)
        gain, variance = (second, fifth) if native else (fourth, third)
        return Normalised(value, gain, variance, float(args[7] if native else 1e-5 if eps is None else eps))
    value, _, gain = _take(args, kwargs, "input", "", "weight")
    return Normalised(value, None if name == "normalize" else gain)


def channel_after(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], channel: int, result: Tensor
) -> int | None:
    """Return the dimension of the channels after a view of a tensor where they were dimension `channel`; None if none.

    A change of shape keeps them where the result has a dimension of their size with as many entries behind it.
    """
    shape, name = tuple(args[0].shape), name_of(function)
    if name in _RESHAPES:
        size, behind = shape[channel], math.prod(shape[channel + 1 :])
        fits = [d for d, n in enumerate(result.shape) if n == size and math.prod(result.shape[d + 1 :]) == behind]
        return fits[0] if len(fits) == 1 else None
    if name not in TRANSPOSITIONS:
        return channel
    marked = torch.empty([2 if dim == channel else 1 for dim in range(len(shape))], device="meta")
    moved = function(marked, *args[1:], **kwargs)
    return [*moved.shape].index(2)
