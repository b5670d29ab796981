"""Normalisations in a product of norms: fused with the layer before them, undoing its scale, or factors of their own.

A layer whose output only goes into a LayerNorm, RMSNorm, GroupNorm or InstanceNorm is scale-invariant: with c W for W
the network is the same, so that its norm says nothing, and it is left out; the normalisation's gain enters as a factor,
max |gamma|. A batch normalisation divides by its running statistics, which know nothing of a new scale: behind a layer
both are one operator, diag(gamma / sqrt(var + eps)) W; elsewhere it is a factor of its own, its largest scale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_lip.constants.modules import batch_norm_scale
from lightning_lip.models.modules import walk
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.composed import DiagonalOperator, ScaledOperator
from lightning_lip.usage.records import Normalisation, Use
from lightning_lip.usage.values import Stored


@dataclass(frozen=True)
class Placed:
    """Operators with the normalisations in their places.

    Attributes:
        operators: The operators, in the order of the model's modules.
        fused: Names of layers that are one operator with the batch normalisation behind them.
        undone: Names of layers that are left out, because a normalisation undoes their scale.
        own: Names of normalisations that are factors of their own.
    """

    operators: list[LinearOperator]
    fused: tuple[str, ...]
    undone: tuple[str, ...]
    own: tuple[str, ...]

    def __str__(self) -> str:
        """Count them, in words; "" where there are none."""
        parts = (
            (self.fused, "fused with the batch normalisation behind them"),
            (self.undone, "left out, since a normalisation undoes their scale"),
            (self.own, "normalisations as factors of their own"),
        )
        return ", ".join(f"{len(names)} {what}" for names, what in parts if names)


def place_normalisations(
    model: nn.Module,
    operators: Sequence[LinearOperator],
    use_of: Callable[[LinearOperator], Use | None],
    normalisations: Sequence[Normalisation],
    chosen: Collection[int],
    leave_out: bool,
) -> Placed:
    """Return the operators of the layers with those of the selected normalisations.

    Args:
        model: The model.
        operators: The layers' operators.
        use_of: Returns how an operator's weight was used, or None if that was not seen.
        normalisations: The calls of normalisations.
        chosen: Ids of the modules whose normalisation counts.
        leave_out: Whether layers whose scale is undone are left out.
    """
    found = list({id(f.module): f for f in walk(model)}.values())
    names = {id(f.module): f.name for f in found}
    occurrences = {id(f.module): f.occurrences for f in found}
    calls: dict[object, list[Normalisation]] = {}
    for call in normalisations:
        if call.identity is not None and call.module is not None and id(call.module) in chosen:
            calls.setdefault(call.identity, []).append(call)
    kept: list[LinearOperator] = []
    fused: list[str] = []
    undone: list[LinearOperator] = []
    for operator in operators:
        use = use_of(operator)
        behind = None if use is None else _behind(use)
        if use is None or not behind:
            kept.append(operator)
        elif all(call.variance is None for call in behind):
            (undone if leave_out else kept).append(operator)
        elif _is_one_operator(use, behind, calls):
            last = behind[0]
            fused.append(operator.name)
            parameters = () if last.gain is None else last.gain.parameters
            label = names[id(last.module)]
            has_gain = isinstance(last.gain, Stored) and last.gain.is_parameter
            scaled = ScaledOperator(operator, f"{operator.name}+{label}", _batch_scale(last), parameters, has_gain)
            scaled.multiplicity = operator.multiplicity
            kept.append(scaled)
            del calls[last.identity]
        else:
            kept.append(operator)
    own = []
    for group in calls.values():
        call = group[0]
        gain = call.gain
        if call.variance is not None:
            compute, parameters = _batch_scale(call), () if gain is None else gain.parameters
        elif gain is not None and gain.parameters:
            compute, parameters = gain.compute, gain.parameters
        else:
            continue
        assert call.module is not None
        diagonal = DiagonalOperator(names[id(call.module)], call.module, compute, parameters)
        diagonal.multiplicity = occurrences[id(call.module)]
        own.append(diagonal)
    if not kept:  # a network of nothing else
        kept, undone = undone, []
    order = {id(f.module): index for index, f in enumerate(found)}
    placed = sorted([*kept, *own], key=lambda op: order.get(id(op.module), len(order)))
    _number(placed)
    return Placed(placed, tuple(fused), tuple(op.name for op in undone), tuple(op.name for op in own))


def _behind(use: Use) -> list[Normalisation]:
    """Return the normalisations behind a layer, if all its outputs go into one each, and nowhere else."""
    consumers = [output.consumers for output in use.outputs]
    if not use.is_seen or not all(len(own) == 1 for own in consumers):
        return []
    behind = [own[0] for own in consumers]
    return [call for call in behind if call is not None] if None not in behind else []


def _is_one_operator(use: Use, behind: Sequence[Normalisation], calls: dict[object, list[Normalisation]]) -> bool:
    """Whether a layer and the batch normalisation behind it always come together, channel by channel."""
    identity = behind[0].identity
    if not all(call.identity == identity and call.fits for call in behind) or use.layouts - {"rows", "convolution"}:
        return False
    # By identity: two calls of one layer may be equal.
    return {id(call) for call in calls.get(identity, [])} == {id(call) for call in behind}


def _batch_scale(call: Normalisation) -> Callable[[], Tensor]:
    """Return what computes gamma / sqrt(var + eps) from the present parameters and running statistics, in fp64."""
    variance, gain, eps = call.variance, call.gain, call.eps
    assert variance is not None

    def scale() -> Tensor:
        gamma = None if gain is None else gain.compute().double()
        return batch_norm_scale(gamma, variance.compute().double(), eps)

    return scale


def _number(operators: Sequence[LinearOperator]) -> None:
    """Give operators of one name different ones: names are the keys of saved vectors."""
    taken: dict[str, int] = {}
    for operator in operators:
        taken[operator.name] = taken.get(operator.name, 0) + 1
        if taken[operator.name] > 1:
            operator.name += f"#{taken[operator.name]}"
