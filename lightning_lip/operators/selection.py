"""Which of a model's modules are selected, under which names, and how often each counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import eq
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from lightning_lip.checks import check_items
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.models.modules import Found, walk
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.recorded import RecordedConvolution
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.coverage import Coverage, Skipped, counted, rows, share_of
from lightning_lip.operators.known import carries_weight, is_registered, operator_of

Selection = str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]]
"""Module names, glob patterns (``*`` also crosses dots), submodules or types of modules, subclasses included; a
container stands for all that is in it."""

Unknown = Literal["skip", "refuse"]
"""What becomes of a selected layer whose norm is not known: it is left out, or refused by name."""

Provider = Callable[[nn.Module, str], Sequence[LinearOperator]]
"""Returns the operators of a module of a given name; raises UnsupportedLayerError, with the reason, if it knows none.

None at all (an empty sequence) says that the module needs no operator of its own.
"""


def known_by_type(module: nn.Module, name: str, convolutions: Convolutions = "symbol") -> list[LinearOperator]:
    """Return the operator that a module has by its type; a ``"spatial"`` convolution waits for the size of its input.

    Raises:
        UnsupportedLayerError: If it is not known; the message is the reason.
    """
    is_recorded = convolutions == "spatial" and isinstance(module, nn.modules.conv._ConvNd)
    is_recorded = is_recorded and not is_registered(module)
    return [RecordedConvolution(name, module) if is_recorded else operator_of(module, name)]


PROVIDERS: Sequence[Provider] = (known_by_type,)
"""Who is asked for a module's operators, in this order; the reason for a refusal is that of the first."""


NOT_KNOWN = "The spectral norm of these selected layers is not known, and an unknown one is never counted as 1"


def _items(selection: Selection, argument: str) -> list[str | nn.Module | type[nn.Module]]:
    if isinstance(selection, (str, nn.Module, type)):
        items = [selection]
    else:
        items = check_items(argument, selection, "a module name, a glob pattern, a module, a type or a list of them")
    for item in items:
        if not (issubclass(item, nn.Module) if isinstance(item, type) else isinstance(item, (str, nn.Module))):
            raise TypeError(
                f"Expected `{argument}` to hold module names, glob patterns, modules or types of modules, got {item!r}."
            )
    if not items:
        raise ValueError(f"`{argument}` is empty: expected at least one name, pattern, module or type, or None.")
    return items


def check_selection(layers: Selection | None, exclude: Selection | None) -> None:
    """Check a selection where there is no model yet to select from.

    Raises:
        TypeError: If it holds anything but names, patterns, modules and their types.
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
        if not isinstance(item, str):
            roots = [item] if isinstance(item, nn.Module) else [f.module for f in found if isinstance(f.module, item)]
            ids = {id(m) for root in roots for m in root.modules()}
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


def _named(selection: Selection | None, found: Sequence[Found]) -> set[int]:
    """Return the ids of the modules that a selection names one by one: by their exact name, or as a module."""
    items = [] if selection is None else _items(selection, "layers")
    ids = {id(item) for item in items if isinstance(item, nn.Module)}
    return ids | {id(f.module) for f in found if f.name in items}


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
    is_named: bool
    """Whether `layers` names it: by its exact name, or as a module."""

    @property
    def is_block(self) -> bool:
        """Whether it is no layer but a block around others, which holds a parameter of its own."""
        module = self.found.module
        return any(module.children()) and operator_of.dispatch(type(module)) is operator_of.dispatch(object)


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
    if isinstance(layers, Iterator):
        layers = list(layers)  # which is read twice
    selected = None if layers is None else _matcher(layers, "layers", found)
    named = _named(layers, found)
    excluded = set() if exclude is None else _matcher(exclude, "exclude", [*found, *named_parameters])
    # A module that stands under several names is one module, whichever name it was selected by.
    selected_ids = {id(f.module) for f in found if selected is None or f.name in selected}
    excluded_ids = {id(f.module) for f in found if f.name in excluded}
    kept = []
    # A registered matrix stands for all that is in its module.
    inner = {id(m) for f in unique.values() if is_registered(f.module) for m in f.module.modules() if m is not f.module}
    for f in unique.values():
        if id(f.module) in inner or not carries_weight(f.module):
            continue
        if id(f.module) not in selected_ids or id(f.module) in excluded_ids:
            continue
        own = own_keys[id(f.module)]
        left = tuple(name for name in own if name not in excluded)
        computed = f.module._modules.get("parametrizations") if parametrize.is_parametrized(f.module) else None
        only_biases = not isinstance(computed, nn.ModuleDict) or not set(computed) - {"bias"}
        if only_biases and len(left) < len(own) and all(own[name] == "bias" for name in left):
            continue
        kept.append(Selected(f, left, id(f.module) in named))
    if not kept:
        seen = counted(type(f.module).__name__ for f in unique.values())
        raise ValueError(
            f"No layer with a weight matches layers={layers!r}, exclude={exclude!r}. Layers with weights are: "
            f"{_listing(found)}. The model holds {seen}."
        )
    return kept


def cover(
    model: nn.Module,
    layers: Selection | None = None,
    exclude: Selection | None = None,
    unknown: Unknown = "refuse",
    providers: Sequence[Provider] = PROVIDERS,
    problem: str = NOT_KNOWN,
) -> Coverage:
    """Return the linear operators of the selected layers, in the order of ``model.named_modules()``, and what is not.

    A weight that several modules share, and a module that an ``nn.Sequential`` or ``nn.ModuleList`` holds several
    times, is one operator with that multiplicity. Frozen weights are included.

    Args:
        model: The model.
        layers: What to select, as in :func:`select`.
        exclude: What to leave out, as in :func:`select`.
        unknown: ``"refuse"`` refuses the selected layers whose operator is not known; ``"skip"`` leaves them out, but
            for a layer that `layers` names: by its exact name, or as a module.
        providers: Who is asked for a module's operators, in this order.
        problem: What the errors say about layers that no provider knows.

    Raises:
        ValueError: If a name or pattern matches nothing, or no layer with a weight is left.
        UnsupportedLayerError: If a layer is refused, or the operator of no selected layer is known.
    """
    operators: dict[tuple[int, int], LinearOperator] = {}
    covered: dict[str, str] = {}
    refused: list[Selected] = []
    skipped: list[Skipped] = []
    for selected in select(model, layers, exclude):
        f = selected.found
        try:
            found = _provided(f, providers)
        except UnsupportedLayerError as error:
            skipped.append(Skipped(f.name or ", ".join(selected.left), type(f.module).__name__, str(error)))
            if unknown == "refuse" or (selected.is_named and not selected.is_block):
                refused.append(selected)
            continue
        covered[f.name] = type(f.module).__name__
        # One weight, one operator; a parametrised weight is its module's.
        weight = f.module._parameters.get("weight")
        for index, operator in enumerate(found):
            tied = operators.setdefault((id(f.module if weight is None else weight), index), operator)
            tied.multiplicity = f.occurrences if tied is operator else tied.multiplicity + f.occurrences
    if refused:
        raise UnsupportedLayerError(_refusal(problem, refused, skipped))
    if not operators and skipped:
        raise UnsupportedLayerError(
            f"{problem}, and there are no others:\n  - "
            + "\n  - ".join(rows(skipped))
            + f"\nThe model holds {counted(type(f.module).__name__ for f in walk(model))}."
        )
    found_operators = list(operators.values())
    return Coverage(found_operators, covered, skipped, share_of(model, found_operators))


def _provided(found: Found, providers: Sequence[Provider]) -> Sequence[LinearOperator]:
    """Return the operators of the first provider that knows a module's.

    Raises:
        UnsupportedLayerError: If none does, with the reason of the first.
    """
    reasons: list[UnsupportedLayerError] = []
    for provider in providers:
        try:
            return provider(found.module, found.name)
        except UnsupportedLayerError as error:
            reasons.append(error)
    raise reasons[0]


def _refusal(problem: str, refused: Sequence[Selected], skipped: Sequence[Skipped]) -> str:
    """Return the message that refuses layers, each with its reason, and what to do."""
    names = {selected.found.name or ", ".join(selected.left) for selected in refused}
    lines = [f"{layer.name} ({layer.kind}): {layer.reason}" for layer in skipped if layer.name in names]
    to_exclude: list[str] = []
    for selected in refused:
        name, left = selected.found.name, list(selected.left)
        # Of a block that holds a parameter of its own, not its name: that would leave out all that is in it.
        to_exclude.extend(left if left and (not name or selected.is_block) else [name])
    to_exclude = [name for name in to_exclude if name]  # the model itself has none
    wanted = to_exclude[0] if len(to_exclude) == 1 else to_exclude
    remedy = f"Leave them out with exclude={wanted!r}, or select" if wanted else "Select"
    return (
        f"{problem}:\n  - "
        + "\n  - ".join(lines)
        + f"\n{remedy} others with layers=...; the product then covers the selected layers only."
    )


def parameter_ids(operators: Sequence[LinearOperator], selected: Sequence[Selected], must_cover: bool) -> set[int]:
    """Return the ids of the selected layers' parameters in a traced graph's operators.

    Raises:
        ValueError: If there is none; or, where `must_cover`, if a selected layer is not in the graph.
    """
    in_graph = {id(p) for op in operators for p in op.parameters}
    chosen: set[int] = set()
    absent = []
    for layer in selected:
        module = layer.found.module
        # Its own parameters, and those of its parametrizations; a layer inside it is selected for itself.
        computed = module._modules.get("parametrizations") if parametrize.is_parametrized(module) else None
        own = [*module._parameters.values(), *(computed.parameters() if computed is not None else ())]
        ids = {id(p) for p in own if p is not None}
        chosen |= ids & in_graph
        if ids and not ids & in_graph:
            absent.append(layer.found.name)
    if absent and must_cover:
        names = absent[0] if len(absent) == 1 else absent
        raise ValueError(
            f"The selected layers {absent} do not act on the output for `example_input`: leave them out with "
            f"exclude={names!r}, or give an input that reaches them."
        )
    if not chosen:
        raise ValueError(
            f"No selected layer acts on the output for `example_input`: {[s.found.name for s in selected]}."
        )
    return chosen


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
