"""Tensors that no input enters: parameters, buffers, and what the forward pass computes from them, to compute anew."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from lightning_lip.models.modules import is_lora, walk
from lightning_lip.usage.functions import SLICES, TRANSPOSITIONS, name_of


@dataclass(frozen=True, eq=False)
class Stored:
    """A parameter or buffer, by its place in the model: what stands there is read anew each time.

    Attributes:
        module: The module that holds it.
        key: Its name there.
        shape: Its shape in the forward pass, where sharded weights are whole.
        layer: The module that it is a part of: the same, or the one whose parametrization or adapter holds it.
        name: The layer's name in the model.
        full_name: The layer's name for a ``weight``; of other tensors with their own name behind it.
    """

    module: nn.Module
    key: str
    shape: tuple[int, ...]
    layer: nn.Module
    name: str
    full_name: str

    @property
    def identity(self) -> Hashable:
        """What tells it from all other values."""
        return id(self.module), self.key

    @property
    def owner(self) -> Stored:
        """Itself: the place that a value is named after."""
        return self

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, and no buffer."""
        return self.key in self.module._parameters

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Itself, if it is a parameter."""
        parameter = self.module._parameters.get(self.key)
        return () if parameter is None else (parameter,)

    def compute(self) -> Tensor:
        """Return what stands there now.

        Raises:
            RuntimeError: If there is nothing any more.
        """
        tensor: Tensor | None = self.module._parameters.get(self.key)
        tensor = self.module._buffers.get(self.key) if tensor is None else tensor
        if tensor is None:
            raise RuntimeError(
                f"The tensor {self.full_name!r} is gone from the model (parametrised, pruned or removed after the "
                "layers were selected): select the layers again."
            )
        return tensor


@dataclass(frozen=True, eq=False)
class Computed:
    """What a function returned for values and constants; it is called again for the present ones.

    Attributes:
        function: A function of torch without side effects.
        leaves: Its arguments, flat: values, and constants.
        spec: How the arguments are nested: ``(args, kwargs)``.
        identity: The same for every result of the same calls on the same stored tensors.
        shape: Its shape; () if it is no tensor.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    identity: Hashable
    shape: tuple[int, ...]

    @property
    def sources(self) -> list[Stored | Computed]:
        """The values among its arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, (Stored, Computed))]

    @property
    def stored(self) -> list[Stored]:
        """The parameters and buffers that it is computed from, each once, in the order of the arguments."""
        found: dict[Hashable, Stored] = {}
        waiting: list[Stored | Computed] = [self]
        seen: set[int] = set()
        while waiting:
            value = waiting.pop()
            if isinstance(value, Stored):
                found.setdefault(value.identity, value)
            elif id(value) not in seen:
                seen.add(id(value))
                waiting.extend(reversed(value.sources))
        return list(found.values())

    @property
    def owner(self) -> Stored:
        """The first parameter that it is computed from, or the first buffer: the place that it is named after."""
        stored = self.stored
        return next((value for value in stored if value.is_parameter), stored[0])

    @property
    def full_name(self) -> str:
        """The owner's."""
        return self.owner.full_name

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that it is computed from."""
        return tuple(parameter for value in self.stored for parameter in value.parameters)

    def compute(self) -> Any:
        """Return the present value, differentiable in the parameters; each function is called once."""
        known: dict[int, Any] = {}
        waiting: list[Stored | Computed] = [self]
        while waiting:
            value = waiting[-1]
            unknown = [s for s in value.sources if id(s) not in known] if isinstance(value, Computed) else []
            waiting.extend(unknown)
            if not unknown:
                known[id(waiting.pop())] = value.compute() if isinstance(value, Stored) else value.call(known)
        return known[id(self)]

    def call(self, known: dict[int, Any]) -> Any:
        """Call the function once, with the values by id."""
        leaves = [known[id(leaf)] if isinstance(leaf, (Stored, Computed)) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)


Value = Stored | Computed


def derived(function: Callable[..., Tensor], source: Value, shape: Sequence[int], mark: Hashable) -> Computed:
    """Return a value that `function` computes from one other; `mark` tells the function from all others."""
    leaves, spec = pytree.tree_flatten(((source,), {}))
    return Computed(function, tuple(leaves), spec, (mark, source.identity), tuple(shape))


def stored_tensors(model: nn.Module) -> Iterator[tuple[Tensor, Stored]]:
    """Yield the parameters and buffers that stand in a model now, with their places; tied ones with the first of them.

    An embedding's table that is another layer's weight too is that layer's.
    """
    found: dict[int, tuple[Tensor, Stored]] = {}
    for f in walk(model):
        inner = list(f.module.modules())[1:] if is_lora(f.module) else []
        if parametrize.is_parametrized(f.module):
            inner = list(f.module.parametrizations.modules())  # type: ignore[union-attr]
        for holder in (f.module, *inner):
            for key, tensor in [*holder._parameters.items(), *holder._buffers.items()]:
                if tensor is None:
                    continue
                label = "weight" if holder is not f.module else key
                full = ".".join(part for part in (f.name, "" if label == "weight" else label) if part)
                present = found.get(id(tensor))
                if present is None or isinstance(present[1].layer, (nn.Embedding, nn.EmbeddingBag)):
                    found[id(tensor)] = tensor, Stored(holder, key, tuple(tensor.shape), f.module, f.name, full)
    yield from found.values()


@dataclass(frozen=True)
class Item:
    """Takes one of several results."""

    index: int

    def __call__(self, results: Any) -> Any:
        """Return it."""
        return results[self.index]


@dataclass(frozen=True)
class Arranged:
    """Brings a weight's dimensions into the order of a matrix, or of blocks of matrices."""

    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the matrix, or the blocks."""
        return weight.permute(self.order).reshape(self.shape)


def is_value(value: object) -> TypeGuard[Stored | Computed]:
    """Whether an object is a value of this module."""
    return isinstance(value, (Stored, Computed))


def whole_matrix(weight: Value) -> tuple[Value, bool]:
    """Return the matrix that a weight is a slice or the transpose of, if any, and whether it is transposed."""
    value, is_transposed = weight, False
    while isinstance(value, Computed) and len(value.sources) == 1:
        function = value.function
        name = "getitem" if isinstance(function, Item) else name_of(function)
        if name in TRANSPOSITIONS:
            is_transposed = not is_transposed
        elif name not in SLICES:
            break
        value = value.sources[0]
    if isinstance(value, Stored) and len(value.shape) == 2:
        return value, is_transposed
    return weight, False
