"""Which of a model's modules are selected, under which names, and how often each counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import eq

from torch import nn
from torch.nn.utils import parametrize

from lightning_lip.checks import check_items
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.models.modules import Found, walk
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.known import carries_weight, operator_of
from lightning_lip.operators.recorded import RecordedConvolution

Selection = str | nn.Module | Sequence[str | nn.Module]
"""Module names, glob patterns (``*`` also crosses dots) or submodules; a container stands for all that is in it."""


def _items(selection: Selection, argument: str) -> list[str | nn.Module]:
    if isinstance(selection, (str, nn.Module)):
        return [selection]
    items = check_items(argument, selection, "a module name, a glob pattern, a module or a list of them")
    for item in items:
        if not isinstance(item, (str, nn.Module)):
            raise TypeError(f"Expected `{argument}` to hold module names, glob patterns or modules, got {item!r}.")
    if not items:
        raise ValueError(f"`{argument}` is empty: expected at least one name, pattern or module, or None.")
    return items


def check_selection(layers: Selection | None, exclude: Selection | None) -> None:
    """Check a selection where there is no model yet to select from.

    Raises:
        TypeError: If it holds anything but names, patterns and modules.
        ValueError: If it is empty.
    """
    for argument, selection in (("layers", layers), ("exclude", exclude)):
        if selection is not None and not isinstance(selection, Iterator):  # which can be read once only
            _items(selection, argument)


def _matcher(selection: Selection, argument: str, found: Sequence[Found]) -> set[str]:
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
            # A name may look like a pattern, "[CLS]" say.
            matches = eq if item in names else fnmatchcase
            hits = [name for name in names if any(matches(part, item) for part in _ancestry(name))]
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


def _listing(found: Iterable[Found]) -> str:
    return (
        ", ".join(
            f"{f.name or '(the model itself)'} ({type(f.module).__name__})" for f in found if carries_weight(f.module)
        )
        or "none"
    )


@dataclass(frozen=True)
class Selected:
    """A selected module that has weights."""

    found: Found
    left: tuple[str, ...]
    """Names of its own parameters that are not left out by name."""


def select(model: nn.Module, layers: Selection | None = None, exclude: Selection | None = None) -> list[Selected]:
    """Return the selected modules that have weights, each once.

    Args:
        model: The model; wrappers (torch.compile, DDP) do not show in the names.
        layers: What to select; None selects everything.
        exclude: What to leave out of the selection. A parameter that a module holds directly (a position embedding,
            say) can also be named here.

    Raises:
        ValueError: If a name or pattern matches nothing, or no module with a weight is left.
    """
    found = list(walk(model))
    unique: dict[int, Found] = {}
    for f in found:
        unique.setdefault(id(f.module), f)
    own_keys = {
        index: {f"{f.name}.{key}" if f.name else key: key for key in f.module._parameters}
        for index, f in unique.items()
    }
    named_parameters = [Found(name, f.module, 0) for index, f in unique.items() for name in own_keys[index]]
    selected = None if layers is None else _matcher(layers, "layers", found)
    excluded = set() if exclude is None else _matcher(exclude, "exclude", [*found, *named_parameters])
    # A module that stands under several names is one module, whichever name it was selected by.
    selected_ids = {id(f.module) for f in found if selected is None or f.name in selected}
    excluded_ids = {id(f.module) for f in found if f.name in excluded}
    kept = []
    for f in unique.values():
        if id(f.module) not in selected_ids or id(f.module) in excluded_ids or not carries_weight(f.module):
            continue
        own = own_keys[id(f.module)]
        left = tuple(name for name in own if name not in excluded)
        computed = f.module._modules.get("parametrizations") if parametrize.is_parametrized(f.module) else None
        only_biases = not isinstance(computed, nn.ModuleDict) or not set(computed) - {"bias"}
        if only_biases and len(left) < len(own) and all(own[name] == "bias" for name in left):
            continue
        kept.append(Selected(f, left))
    if not kept:
        raise ValueError(
            f"No layer with a weight matches layers={layers!r}, exclude={exclude!r}. Layers with weights are: "
            f"{_listing(found)}."
        )
    return kept


def find_operators(
    model: nn.Module, layers: Selection | None = None, exclude: Selection | None = None
) -> list[LinearOperator]:
    """Return the linear operators of the selected layers, in the order of ``model.named_modules()``.

    A weight that several modules share, and a module that an ``nn.Sequential`` or ``nn.ModuleList`` holds several
    times, is one operator with that multiplicity. Frozen weights are included. A convolution's operator waits for the
    first forward pass with gradients enabled to learn the size of its input.

    Args:
        model: The model.
        layers: What to select, as in :func:`select`.
        exclude: What to leave out, as in :func:`select`.

    Raises:
        ValueError: If a name or pattern matches nothing, or no layer with a weight is left.
        UnsupportedLayerError: If a selected module has weights but its operator is not known.
    """
    operators: dict[int, LinearOperator] = {}
    refused: list[str] = []
    to_exclude: list[str] = []
    for selected in select(model, layers, exclude):
        f, left = selected.found, list(selected.left)
        try:
            is_convolution = isinstance(f.module, nn.modules.conv._ConvNd)
            operator = RecordedConvolution(f.name, f.module) if is_convolution else operator_of(f.module, f.name)
        except UnsupportedLayerError as error:
            refused.append(f"{f.name or ', '.join(left)} ({type(f.module).__name__}): {error}")
            # Of a block that holds a parameter of its own, not its name: that would leave out all that is in it.
            is_block = any(f.module.children()) and operator_of.dispatch(type(f.module)) is operator_of.dispatch(object)
            to_exclude.extend(left if left and (not f.name or is_block) else [f.name])
            continue
        # One weight, one operator; a parametrised weight is its module's.
        weight = f.module._parameters.get("weight")
        tied = operators.setdefault(id(f.module if weight is None else weight), operator)
        tied.multiplicity = f.occurrences if tied is operator else tied.multiplicity + f.occurrences
    if refused:
        to_exclude = [name for name in to_exclude if name]  # the model itself has none
        names = to_exclude[0] if len(to_exclude) == 1 else to_exclude
        remedy = f"Leave them out with exclude={names!r}, or select" if names else "Select"
        raise UnsupportedLayerError(
            "The spectral norm of these selected layers is not known, and an unknown one is never counted as 1:\n  - "
            + "\n  - ".join(refused)
            + f"\n{remedy} others with layers=...; the product then covers the selected layers only."
        )
    return list(operators.values())


def refuse_replaced(model: nn.Module, operators: Iterable[LinearOperator], owner: str) -> None:
    """Refuse to go on with layers that are no longer part of the model.

    Raises:
        RuntimeError: Naming them, and what to do.
    """
    present = {id(module) for module in model.modules()}
    gone = [operator.name for operator in operators if id(operator.module) not in present]
    if gone:
        raise RuntimeError(
            f"{owner}: the layers {gone} are no longer part of the model; they were replaced or removed after they "
            "were selected, when training started. Change layers before training or between two calls of "
            "trainer.fit, which select anew, or leave those that will go out with `exclude`."
        )
