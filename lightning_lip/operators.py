"""A module's weight as a linear operator, and how the operators of a model are found.

What a layer cannot be is as important as what it is: a selected module whose operator is not known is refused by name.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

Selection = str | nn.Module | Sequence[str | nn.Module]
"""Module names, glob patterns (``*`` also crosses dots) or submodules; a container stands for all that is in it."""


class UnsupportedLayerError(ValueError):
    """A selected module has weights whose linear operator is not known."""


class LinearOperator(ABC):
    """A layer's weight as a linear map, with what an iteration and a penalty need of it.

    Attributes:
        name: The module's name in the model, without the prefixes that wrappers (DDP, torch.compile) add.
        module: The module that owns the weight.
        multiplicity: How often the operator stands in the network: a weight shared by k layers counts k times.
    """

    is_matrix = False
    """Whether :meth:`weight` is the operator's matrix (m, n), which the compiled kernels can serve."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.multiplicity = 1

    @property
    @abstractmethod
    def domain_shape(self) -> tuple[int, ...]:
        """Shape of one input of the operator."""

    @property
    @abstractmethod
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape of one output of the operator."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the weight is, or is computed from."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the present weight, differentiable in :attr:`parameters`, computed with eval semantics."""

    @abstractmethod
    def apply(self, inputs: Tensor) -> Tensor:
        """Map a batch (r, *domain_shape) to (r, *codomain_shape)."""

    @abstractmethod
    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map a batch (r, *codomain_shape) to (r, *domain_shape)."""

    @property
    def block_shape(self) -> tuple[int, int]:
        """How long the vectors of a block are, and how many there can be: of the domain; a matrix's shorter side."""
        domain, codomain = math.prod(self.domain_shape), math.prod(self.codomain_shape)
        return domain, min(domain, codomain)

    @abstractmethod
    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``<u, W v>``, shape (), differentiable in :attr:`parameters`.

        For the leading singular vectors it is the spectral norm and its gradient is the spectral norm's
        (``u v^T`` for a matrix); for any unit u, v the gradient is an epsilon-subgradient, epsilon = sigma_1 - u^T W v.

        Args:
            left: u, unit, flat, of as many elements as the codomain.
            right: v, unit, flat, of as many elements as the domain.
        """

    @property
    def direct_parameter(self) -> nn.Parameter | None:
        """The parameter that *is* the matrix (m, n), if kernels may write its gradient in place; else None."""
        return None

    @property
    def trainable(self) -> bool:
        """Whether any of the parameters requires a gradient."""
        return any(p.requires_grad for p in self.parameters)


class MatrixOperator(LinearOperator):
    """``x -> W x`` for a weight W of shape (m, n), as in ``nn.Linear``."""

    is_matrix = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        # A look-up in this dict costs 30 ns, through nn.Module.__getattr__ a microsecond; and unlike a reference to
        # the Parameter it survives `load_state_dict(assign=True)`.
        self._slots = module._parameters

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape (n,)."""
        return (self.weight().shape[1],)

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape (m,)."""
        return (self.weight().shape[0],)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weight itself."""
        return (self._parameter,)

    @property
    def _parameter(self) -> nn.Parameter:
        parameter = self._slots.get("weight")
        if parameter is None:
            raise RuntimeError(
                f"The weight of layer {self.name!r} is no longer a parameter of its own (parametrised, pruned or "
                "removed after the layers were selected): select the layers again."
            )
        return parameter

    @property
    def direct_parameter(self) -> nn.Parameter | None:
        """The weight itself, shape (m, n)."""
        return self._parameter

    def weight(self) -> Tensor:
        """Return W, shape (m, n)."""
        return self._parameter

    @property
    def block_shape(self) -> tuple[int, int]:
        """The shorter side, twice."""
        side = min(self.weight().shape)
        return side, side

    def apply(self, inputs: Tensor) -> Tensor:
        """Map (r, n) to (r, m)."""
        return inputs @ self.weight().to(inputs.dtype).mT

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map (r, m) to (r, n)."""
        return outputs @ self.weight().to(outputs.dtype)

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``u^T W v``, shape (), in the vectors' dtype."""
        return left @ (self.weight().to(left.dtype) @ right)


class ParametrizedMatrixOperator(MatrixOperator):
    """A matrix that ``torch.nn.utils.parametrize`` computes from other parameters.

    A ``.grad`` written on the computed weight would be lost, so there is no direct parameter: gradients are pulled
    back to the originals through the parametrization.
    """

    @property
    def _parametrizations(self) -> nn.Module:
        if not parametrize.is_parametrized(self.module, "weight"):
            raise RuntimeError(
                f"The weight of layer {self.name!r} lost its parametrization after the layers were selected: select "
                "the layers again."
            )
        parametrizations = self.module.parametrizations
        assert isinstance(parametrizations, nn.ModuleDict)
        return parametrizations["weight"]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The originals and the parametrizations' own parameters."""
        return tuple(self._parametrizations.parameters())

    @property
    def direct_parameter(self) -> nn.Parameter | None:
        """None: the weight is computed."""
        return None

    def weight(self) -> Tensor:
        """Return W, shape (m, n), computed in eval mode: a parametrization's own buffers do not change."""
        with eval_mode(self._parametrizations):
            weight: Tensor = self._parametrizations()
        return weight


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside the context; each submodule gets its own mode back."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer its object and its values back at the end of the context."""
    kept = [
        (m, key, buffer, buffer.clone())
        for m in model.modules()
        for key, buffer in m._buffers.items()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for m, key, buffer, values in kept:
            if not torch.equal(buffer, values):
                buffer.copy_(values)
            m._buffers[key] = buffer


@singledispatch
def operator_of(module: nn.Module, name: str) -> LinearOperator:
    """Return the linear operator of a module that has weights.

    Args:
        module: The module.
        name: Its name in the model.

    Raises:
        UnsupportedLayerError: If the operator is not known; the message is the reason.
    """
    if callable(getattr(module, "weight", None)):
        raise UnsupportedLayerError("its weight is quantised")
    if _is_lora(module):
        raise UnsupportedLayerError("a LoRA layer is W + s B A, not its factors: merge the adapter first")
    own = [key for key, _ in module.named_parameters(recurse=False)]
    raise UnsupportedLayerError(f"what it computes from its parameters {own} is not known")


@operator_of.register
def _(module: nn.Linear, name: str) -> LinearOperator:
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        raise UnsupportedLayerError("it has a forward of its own, so it is not known to compute x W^T + b")
    if parametrize.is_parametrized(module, "weight"):
        return ParametrizedMatrixOperator(name, module)
    weight = module._parameters.get("weight")
    if weight is None:
        raise UnsupportedLayerError(
            "its weight is computed by a forward pre-hook (pruning, or the old weight_norm or spectral_norm): use "
            "torch.nn.utils.parametrizations, or make the pruning permanent with torch.nn.utils.prune.remove"
        )
    if is_lazy(weight):
        raise UnsupportedLayerError("its lazy weight has no shape yet: run one forward pass first")
    if weight.is_meta:
        raise UnsupportedLayerError("its weight is on the meta device: materialise the model first")
    kind = type(weight.data).__name__
    if kind == "DTensor":
        raise UnsupportedLayerError("its weight is a DTensor (FSDP2, tensor parallel), which is not supported")
    is_plain = type(weight.data) is Tensor and weight.layout == torch.strided
    if not is_plain or not weight.is_floating_point() or weight.element_size() < 2:
        raise UnsupportedLayerError(
            f"its weight is a {kind} of {weight.dtype}, {weight.layout}, not a dense fp64, fp32, fp16 or bf16 tensor"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        raise UnsupportedLayerError(
            f"its weight has shape {tuple(weight.shape)} instead of (out_features, in_features), as FSDP1's shards do"
        )
    return MatrixOperator(name, module)


def _refuse(reason: str) -> Callable[[nn.Module, str], LinearOperator]:
    def refuse(module: nn.Module, name: str) -> LinearOperator:
        raise UnsupportedLayerError(reason)

    return refuse


for _types, _reason in (
    (
        (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm),
        "normalisation is not supported",
    ),
    ((nn.modules.conv._ConvNd,), "convolutions are not supported"),
    ((nn.MultiheadAttention,), "dot-product attention has no finite Lipschitz constant"),
    ((nn.Embedding, nn.EmbeddingBag), "an embedding is a look-up, not a linear map: start at its output"),
    ((nn.Bilinear,), "a product of two inputs has no finite Lipschitz constant"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers are not supported"),
):
    for _type in _types:
        operator_of.register(_type)(_refuse(_reason))


def _carries_weight(module: nn.Module) -> bool:
    """Whether a module must have an operator: it owns parameters, or its type is known to scale its input."""
    return (
        any(p is not None for p in module._parameters.values())
        or parametrize.is_parametrized(module)
        or operator_of.dispatch(type(module)) is not operator_of.dispatch(object)
        or callable(getattr(module, "weight", None))
        or _is_lora(module)
    )


@dataclass(frozen=True)
class _Found:
    name: str
    module: nn.Module
    occurrences: int


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module only wraps another one (torch.compile, DDP), so that its attribute is not part of names."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(names & {"OptimizedModule", "DistributedDataParallel", "DataParallel", "_FabricModule"})


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the children with their number of entries: a module that a container holds k times is called k times."""
    children = [
        (key, child)
        for key, child in module._modules.items()
        if child is not None and not (key == "parametrizations" and parametrize.is_parametrized(module))
    ]
    is_container = isinstance(module, (nn.Sequential, nn.ModuleList))
    entries = Counter(id(child) for _, child in children)
    for key, child in children:
        yield key, child, entries[id(child)] if is_container else 1


def _walk(module: nn.Module, prefix: str = "", occurrences: int = 1) -> Iterator[_Found]:
    if _is_wrapper(module):
        for _, child, _ in _children(module):
            yield from _walk(child, prefix, occurrences)
        return
    yield _Found(prefix, module, occurrences)
    if _is_lora(module):
        return
    for key, child, count in _children(module):
        yield from _walk(child, f"{prefix}.{key}" if prefix else key, occurrences * count)


def _items(selection: Selection, argument: str) -> list[str | nn.Module]:
    items = [selection] if isinstance(selection, (str, nn.Module)) else list(selection)
    for item in items:
        if not isinstance(item, (str, nn.Module)):
            raise TypeError(
                f"Expected `{argument}` to hold module names, glob patterns or modules, got {type(item).__name__}."
            )
    if not items:
        raise ValueError(f"`{argument}` is empty: expected at least one name, pattern or module, or None.")
    return items


def _matcher(selection: Selection, argument: str, found: Sequence[_Found]) -> set[str]:
    """Return the names that a selection covers; a match covers everything inside the module.

    Raises:
        ValueError: If an item of the selection matches nothing.
    """
    covered: set[str] = set()
    names = [f.name for f in found]
    for item in _items(selection, argument):
        if isinstance(item, nn.Module):
            ids = {id(m) for m in item.modules()}
            hits = [f.name for f in found if id(f.module) in ids]
        else:
            hits = [name for name in names if any(fnmatchcase(part, item) for part in _ancestry(name))]
        if not hits:
            wanted = f"{type(item).__name__} module" if isinstance(item, nn.Module) else repr(item)
            raise ValueError(
                f"`{argument}`: {wanted} matches no module of the model. Names with weights are: {_listing(found)}."
            )
        covered.update(hits)
    return covered


def _ancestry(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules around it: 'a.b.c', 'a.b', 'a'."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _listing(found: Iterable[_Found]) -> str:
    return (
        ", ".join(
            f"{f.name or '(the model itself)'} ({type(f.module).__name__})" for f in found if _carries_weight(f.module)
        )
        or "none"
    )


def find_operators(
    model: nn.Module, layers: Selection | None = None, exclude: Selection | None = None
) -> list[LinearOperator]:
    """Return the linear operators of the selected layers, in the order of ``model.named_modules()``.

    A weight that several modules share, and a module that an ``nn.Sequential`` or ``nn.ModuleList`` holds several
    times, is one operator with that multiplicity. Frozen weights are included.

    Args:
        model: The model; wrappers (torch.compile, DDP) do not show in the names.
        layers: What to select; None selects everything.
        exclude: What to leave out of the selection. A parameter that a module holds directly (a position embedding,
            say) can also be named here.

    Raises:
        ValueError: If a name or pattern matches nothing, or no layer with a weight is left.
        UnsupportedLayerError: If a selected module has weights but its operator is not known.
    """
    found = list(_walk(model))
    unique: dict[int, _Found] = {}
    for f in found:
        unique.setdefault(id(f.module), f)
    named_parameters = [
        _Found(f"{f.name}.{key}" if f.name else key, f.module, 0)
        for f in unique.values()
        for key in f.module._parameters
    ]
    selected = None if layers is None else _matcher(layers, "layers", found)
    excluded = set() if exclude is None else _matcher(exclude, "exclude", [*found, *named_parameters])
    # A module that stands under several names is one module, whichever name it was selected by.
    selected_ids = {id(f.module) for f in found if selected is None or f.name in selected}
    excluded_ids = {id(f.module) for f in found if f.name in excluded}
    operators: dict[int, LinearOperator] = {}
    refused: list[str] = []
    to_exclude: list[str] = []
    for f in unique.values():
        if id(f.module) not in selected_ids or id(f.module) in excluded_ids or not _carries_weight(f.module):
            continue
        own = {f"{f.name}.{key}" if f.name else key: key for key in f.module._parameters}
        left = [name for name in own if name not in excluded]
        computed = f.module._modules.get("parametrizations") if parametrize.is_parametrized(f.module) else None
        only_biases = not isinstance(computed, nn.ModuleDict) or not set(computed) - {"bias"}
        if only_biases and len(left) < len(own) and all(own[name] == "bias" for name in left):
            continue
        try:
            operator = operator_of(f.module, f.name)
        except UnsupportedLayerError as error:
            refused.append(f"{f.name or ', '.join(left)} ({type(f.module).__name__}): {error}")
            to_exclude.extend([f.name] if f.name else left)
            continue
        weight = operator.direct_parameter
        tied = operators.setdefault(id(f.module if weight is None else weight), operator)
        tied.multiplicity = f.occurrences if tied is operator else tied.multiplicity + f.occurrences
    if refused:
        names = to_exclude[0] if len(to_exclude) == 1 else to_exclude
        raise UnsupportedLayerError(
            "The spectral norm of these selected layers is not known, and an unknown one is never counted as 1:\n  - "
            + "\n  - ".join(refused)
            + f"\nLeave them out with exclude={names!r}, or select others with "
            "layers=...; the product then covers the selected layers only."
        )
    if not operators:
        raise ValueError(
            f"No layer with a weight matches layers={layers!r}, exclude={exclude!r}. Layers with weights are: "
            f"{_listing(found)}."
        )
    return list(operators.values())


@torch.no_grad()
def count_calls(model: nn.Module, operators: Sequence[LinearOperator], example_input: object) -> None:
    """Set each operator's multiplicity to the number of calls in one forward pass in eval mode.

    Modes and buffers of the model and the random number generators are left as they were.

    Args:
        model: The model.
        operators: Operators of modules inside the model; a tied weight's other modules are counted too.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        ValueError: If a selected layer is not called in that forward pass.
    """
    calls = {id(op): 0 for op in operators}
    by_weight = {id(op.direct_parameter): op for op in operators if op.direct_parameter is not None}
    by_module = {id(op.module): op for op in operators}
    handles = []
    for module in model.modules():
        owner = by_weight.get(id(module._parameters.get("weight"))) or by_module.get(id(module))
        if owner is not None:

            def count(*_: object, operator: LinearOperator = owner) -> None:
                calls[id(operator)] += 1

            handles.append(module.register_forward_pre_hook(count))
    args, kwargs = _call_arguments(example_input)
    # A compiled region was traced without these hooks and would skip them.
    try:
        with eval_mode(model), _buffers_kept(model), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for op in operators:
        if not calls[id(op)]:
            raise ValueError(
                f"Layer {op.name!r} is not called in the forward pass of `example_input`: leave it out with "
                f"exclude={op.name!r}, or give an input that reaches it."
            )
        op.multiplicity = calls[id(op)]


def _call_arguments(example_input: object) -> tuple[tuple[object, ...], Mapping[str, object]]:
    if isinstance(example_input, Mapping):
        return (), example_input
    if isinstance(example_input, tuple):
        return example_input, {}
    return (example_input,), {}
