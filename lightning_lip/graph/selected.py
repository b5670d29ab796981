"""What the norms of a model's selected layers bound: the whole network over its graph, or their own product."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from torch.nn.utils import parametrize

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.graph.product import ProductBound
from lightning_lip.models.inputs import BatchDim, check_batch_dim
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.coverage import Coverage, share_of
from lightning_lip.operators.recorded import recorded
from lightning_lip.operators.selection import PROVIDERS, Selected, Selection, Unknown, cover, known_by_type, select
from lightning_lip.usage.observation import Observation

Bound = ProductBound | NetworkBound


def bound_of(
    model: nn.Module,
    example_input: object,
    layers: Selection | None = None,
    exclude: Selection | None = None,
    unknown: Unknown = "refuse",
    batch_dim: BatchDim = 0,
    is_awaiting: bool = False,
) -> tuple[Bound, Coverage]:
    """Return the bound of the network over the graph that an example input shows, or the product of selected layers.

    In the graph every layer counts, and the selected ones' parameters are marked as such. A LightningModule's own
    ``example_input_array`` serves if no input is given. It was not set for this purpose, so a graph without a known
    bound is then no error: a warning says why, and the product of the layers remains.

    Args:
        model: The model.
        example_input: A tensor, a tuple of arguments, a dict of keyword arguments, or None.
        layers: What to select, as in :func:`~lightning_lip.operators.selection.select`.
        exclude: What to leave out.
        unknown: What becomes of the layers without a known norm in the product, as in
            :func:`~lightning_lip.operators.selection.cover`. In a graph they are always refused.
        batch_dim: None takes the whole example input as one sample, as :meth:`NetworkBound.trace` does.
        is_awaiting: Whether the product is only until a forward pass shows more, for :func:`observed_product`: layers
            that are not known by their type then wait for that.

    Returns:
        The bound, and what the selection covers of the model.

    Raises:
        ValueError: If a selection matches nothing, or names layers that do not act on the output.
        UnsupportedLayerError: If the operator of a selected layer is not known, or an operation between
            `example_input` and the output has no known finite constant.
    """
    check_batch_dim(batch_dim)
    given = getattr(model, "example_input_array", None) if example_input is None else example_input
    if given is not None:
        try:
            network = NetworkBound.trace(model, given, batch_dim)
            selected = select(model, layers, exclude)
            network.selected_ids = _parameter_ids(network.operators, selected, must_cover=layers is not None)
            layers_of = {s.found.name: type(s.found.module).__name__ for s in selected}
            chosen = [op for op in network.operators if network.selected(op)]
            return network, Coverage(network.operators, layers_of, (), share_of(model, chosen))
        except (ValueError, TypeError, RuntimeError) as error:  # UnsupportedLayerError is a ValueError
            if example_input is not None:
                raise
            warnings.warn(
                f"The bound over the graph of the module's example_input_array cannot serve; the product of the layers "
                f"does instead. {error}",
                stacklevel=3,
            )
    providers = (known_by_type, _nothing_yet) if is_awaiting else PROVIDERS
    coverage = cover(model, layers, exclude, unknown, providers)
    return ProductBound(coverage.operators), coverage


def _nothing_yet(module: nn.Module, name: str) -> Sequence[LinearOperator]:
    return ()


def observed_product(
    model: nn.Module,
    observation: Observation,
    present: Sequence[LinearOperator],
    layers: Selection | None = None,
    exclude: Selection | None = None,
    unknown: Unknown = "refuse",
    batch_statistics: bool = True,
) -> tuple[ProductBound, Coverage]:
    """Return the product of the selected layers' norms by what a forward pass showed, and what it covers.

    Layers that their types do not tell are covered where their weights multiply, and normalisations take their places,
    as :mod:`lightning_lip.usage.normalisation` says. A layer that `layers` selects stays, also where a normalisation
    undoes its scale.

    Args:
        model: The model.
        observation: What the forward pass showed.
        present: Operators that were made before, and go on.
        layers: What to select, as in :func:`~lightning_lip.operators.selection.select`.
        exclude: What to leave out.
        unknown: What becomes of the layers without a known norm.
        batch_statistics: Whether the running statistics of batch normalisations may be read.

    Raises:
        ValueError: If a selection matches nothing.
        UnsupportedLayerError: If a layer is refused, or the operator of no selected layer is known.
    """
    made = {id(op.module): op for op in present}

    def known(module: nn.Module, name: str) -> Sequence[LinearOperator]:
        operators = [made[id(module)]] if id(module) in made else known_by_type(module, name)
        for convolution in recorded(operators):
            shape = observation.input_shape_of(module)
            if shape is not None:
                convolution.saw(shape)
        return operators

    coverage = cover(model, layers, exclude, unknown, (known, observation.operators_of))
    chosen = {id(s.found.module) for s in select(model, layers, exclude)}
    placed = observation.place(coverage.operators, chosen, leave_out=layers is None, batch_statistics=batch_statistics)
    if not placed.operators:
        raise UnsupportedLayerError("Nothing is left: the selected layers are normalisations without parameters.")
    share = share_of(model, placed.operators)
    operators = placed.operators
    return ProductBound(operators), replace(coverage, operators=operators, share=share, normalisations=str(placed))


def _parameter_ids(operators: Sequence[LinearOperator], selected: Sequence[Selected], must_cover: bool) -> set[int]:
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
