"""A traced graph of which some layers are selected: the bound over all of it, the gradient for the selected ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_lip.graph.bound import NetworkBound
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.selection import Selected, Selection, select


def trace_selected(
    model: nn.Module, example_input: Any, layers: Selection | None, exclude: Selection | None
) -> tuple[NetworkBound | None, set[int] | None]:
    """Return the bound over the graph that an example input shows, and the ids of the selected parameters in it.

    A LightningModule's own ``example_input_array`` serves if no input is given. It was not set for this purpose, so a
    graph without a known bound is then no error: a warning says why, and the product of the layers remains.
    """
    if example_input is not None:
        network = NetworkBound.trace(model, example_input)
        return network, _chosen(network.operators, select(model, layers, exclude), must_cover=layers is not None)
    example_input = getattr(model, "example_input_array", None)
    if example_input is None:
        return None, None
    try:
        network = NetworkBound.trace(model, example_input)
        return network, _chosen(network.operators, select(model, layers, exclude), must_cover=layers is not None)
    except ValueError as error:  # UnsupportedLayerError is one
        warnings.warn(
            f"The bound over the graph of the module's example_input_array cannot serve; the product of the layers "
            f"does instead. {error}",
            stacklevel=3,
        )
        return None, None


def _chosen(operators: Sequence[LinearOperator], selected: Sequence[Selected], must_cover: bool) -> set[int]:
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
