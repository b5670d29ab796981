"""What is certified about a trained network, by one certifier for all, an independent computation, and an attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_lip import certify
from lightning_lip.bench.contenders.layers import exact_norm
from lightning_lip.bench.scoreboard.data import Part
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.metrics import certified_accuracy

ATTACK_STEPS = 30
LAST_STEP = 0.05
"""Of the attack, in radii; the first is one radius long."""

Array = npt.NDArray[np.float64]


class Norms(NamedTuple):
    """What pairwise certificates of a chain of layers use: for the difference of logits i, j it is ``|w_i - w_j| L``.

    Attributes:
        features: The *certified upper bound* L of all layers but the last.
        whole: That of the network.
    """

    features: float
    whole: float


def norms_of(network: nn.Sequential, example: Tensor) -> Norms:
    """Certify a network of one chain of ordinary layers and activations of constant 1.

    Args:
        network: See there.
        example: An input, (1, ...).

    Raises:
        UnsupportedLayerError: If there is no certificate.
    """
    result = certify(network, example)
    if not result.certified or result.head is None:
        raise UnsupportedLayerError("; ".join(result.refused) or "the network does not end in a linear layer")
    return Norms(result.head.features, result.upper)


def independent_norm(network: nn.Sequential, example: Tensor) -> float:
    """Return the product of the norms of all layers but the last, by another computation than :func:`norms_of`.

    It is NumPy's singular value decomposition in float64, and for convolutions ARPACK, to 1e-4 from below.

    Args:
        network: A chain, see there.
        example: An input, (1, ...).

    Raises:
        MissingExtraError: If scipy is not installed and there is a convolution.
    """
    product, inputs = 1.0, example
    for layer in list(network)[:-1]:
        if isinstance(layer, nn.Linear):
            product *= float(np.linalg.svd(layer.weight.double().numpy(), compute_uv=False)[0])
        elif isinstance(layer, nn.Conv2d):
            product *= exact_norm(layer, inputs.shape[1:])
        inputs = layer(inputs)
    return product


def certified(network: nn.Sequential, norms: Norms, part: Part, radii: Sequence[float]) -> list[float]:
    """Return the certified accuracy at each radius, by certified norms and logits in float64; 0 without samples."""
    if not len(part.targets):
        return [0.0] * len(radii)
    logits = _in_double(network, part.inputs)
    weight = _head(network).weight
    shares = certified_accuracy(logits, part.targets, norms.features, radii, weight, norms.whole)
    return (shares.double() * len(logits)).round().div(len(logits)).tolist()


def by_numpy(network: nn.Sequential, features: float, part: Part, radii: Sequence[float]) -> list[float]:
    """Return the certified accuracy by the independent norm and NumPy in float64, to compare with."""
    logits: Array = _in_double(network, part.inputs).numpy()
    weight: Array = _head(network).weight.double().numpy()
    targets = part.targets.numpy()
    distances: Array = np.linalg.norm(weight[:, None] - weight[None], axis=2)[targets]
    margins = np.take_along_axis(logits, targets[:, None], 1) - logits
    own = np.arange(logits.shape[1]) == targets[:, None]
    return [float(((margins > eps * features * distances) | own).all(1).mean()) for eps in radii]


def _in_double(network: nn.Sequential, inputs: Tensor) -> Tensor:
    """Return the logits in float64, of the weights as they are stored."""
    values = inputs.double()
    with torch.no_grad():
        for layer in network:
            values = torch.func.functional_call(layer, {k: p.double() for k, p in layer.named_parameters()}, values)
    return values


def _head(network: nn.Sequential) -> nn.Linear:
    head = network[-1]
    assert isinstance(head, nn.Linear)
    return head


def attacked(network: nn.Module, part: Part, radius: float) -> Tensor:
    """Return which samples keep their class under projected gradient descent in the l2 ball, (n,), bool.

    It descends the margin, first to the sphere, then by steps that shrink, over all of input space as the certificates
    do: pixels may leave [0, 1]. A sample counts as broken if any point on the way is misclassified.
    """
    own = torch.nn.functional.one_hot(part.targets, int(network(part.inputs[:1]).shape[1])).bool()
    moved = torch.zeros_like(part.inputs)
    is_kept = torch.ones(len(part.targets), dtype=torch.bool)
    for step in range(ATTACK_STEPS + 1):
        moved.requires_grad_()
        logits = network(part.inputs + moved)
        margins = logits[own] - logits.masked_fill(own, -torch.inf).amax(1)
        is_kept &= margins.detach() > 0
        (slope,) = torch.autograd.grad(margins.sum(), moved)
        length = radius * (1 - (1 - LAST_STEP) * step / ATTACK_STEPS)
        moved = moved.detach() - slope * (length / _norms(slope))
        moved *= (radius / _norms(moved)).clamp(max=1.0)
    return is_kept


def _norms(rows: Tensor) -> Tensor:
    """Return the norm of each sample, at least 1e-12, to divide by."""
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1).clamp(min=1e-12)
    return norms.view(-1, *[1] * (rows.dim() - 1))
