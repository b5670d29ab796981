"""What the norms of a model's selected layers bound: the whole network over its graph, or their own product."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from lightning_lip.graph.bound import NetworkBound
from lightning_lip.graph.program import ProductBound
from lightning_lip.models.inputs import BatchDim, check_batch_dim
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.coverage import Coverage, share_of
from lightning_lip.operators.selection import Selected, Selection, Unknown, cover, select

Bound = ProductBound | NetworkBound


def bound_of(
    model: nn.Module,
    example_input: object,
    layers: Selection | None = None,
    exclude: Selection | None = None,
    unknown: Unknown = "refuse",
    batch_dim: BatchDim = 0,
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
    coverage = cover(model, layers, exclude, unknown)
    return ProductBound(coverage.operators), coverage


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
