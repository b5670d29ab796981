"""NormCaps: each layer's estimated spectral norm held at or below a radius, by scaling its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.checks import (
    check_choice,
    check_flag,
    check_model,
    check_state,
    check_vectors,
    is_finite_number,
    shown,
)
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.kernels.tensors import compute_dtype, in_double, is_sharded, without_modes
from lightning_lip.models.sharding import reshard
from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.convolution import KernelOperator
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.selection import Provider, Selection, Unknown, cover, known_by_type
from lightning_lip.projection.layers import is_homogeneous, writable
from lightning_lip.reporting.messages import tell

LAG = 4.0
"""What an estimate still lacks, in units of its rise in the last half iteration, where the block has a gap behind it.

Half an iteration shrinks what is missing by ``q = (sigma_{r+1} / sigma_1)^2``, so that after a rise of d the rest is
``d q / (1 - q)``: at most 4 d where sigma_{r+1}, the first value that the block does not hold, is below 0.89 sigma_1.
"""

DENSE_LAG = 0.05
"""The same where there is no gap, the number A in what follows.

After k iterations about ``A / k`` is missing, of which the next one regains ``A / k^2``: after a rise of d the rest is
``sqrt(A d)`` (J. Kuczynski and H. Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms
with a random start", 1992). A was measured: 0.02 to 0.06 with 16 vectors on random matrices of 512 to 1536 rows, and on
ones of 768 that Muon moves by a fiftieth of the radius.
"""

SETTLED = 1e-5
"""Vectors that start from random ones are iterated on, in the first step only, until no estimate rises by more."""

MAX_START_ITERATIONS = 60
"""But so many iterations at most."""

MUP = "mup"
"""The radius ``sqrt(out / in)``."""

STATE_KEYS = ("vectors", "is_settled")

NOT_SCALED = "SpectralCaps cannot hold the norms of these selected layers"


def check_radius(radius: object) -> float | Literal["mup"]:
    """Return a radius: a positive number, or ``"mup"``.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(radius, str) and radius == MUP:
        return "mup"
    if not is_finite_number(radius) or radius <= 0:
        raise ValueError(f"Expected `radius` to be a positive finite number or {MUP!r}, got {shown(radius)}.")
    return float(radius)


class NormCaps:
    """Scales the layers' weights after a step, so that their *estimated* spectral norms are at or below a radius.

    A weight whose norm exceeds the radius is multiplied by ``radius / norm``: of all weights of that norm it is the one
    in the same direction, and its singular vectors, those of the block among them, stay as they are. Lowering only the
    leading singular values of the block would be nearer, but cannot hold where many are alike, as with Muon, whose
    steps raise all of them at once. A weight within the radius stays bit for bit.

    A step is one iteration of the block and one look at the Ritz value that it gives. Both are *from below*; the
    weights have moved since the block was made. So the norm is taken higher than the Ritz value by a multiple of its
    rise over the estimate half an iteration earlier (`LAG`), or of the root of that rise (`DENSE_LAG`), whichever is
    more. Where the block has converged that is next to nothing. No certificate.

    Args:
        model: The model. Its weights are written in place by :meth:`step`.
        radius: The largest norm, positive, or ``"mup"``: ``sqrt(out / in)``, with the features of a linear layer or the
            channels of a convolution, whatever its kernel, stride and groups.
        layers: What to select, as in :func:`~lightning_lip.operators.selection.select`.
        exclude: What to leave out.
        block_size: Singular vectors a layer, r.
        n_iterations: Iterations a step.
        seed: Seed of the private generator that the vectors start from.
        unknown: ``"skip"`` leaves out the layers without a known norm, and those whose weight scales with none of
            their parameters, and tells so; ``"refuse"`` refuses them.
        convolutions: As in :class:`~lightning_lip.LipschitzRegularizer`.

    Attributes:
        operators: The L operators whose norms are held.
        coverage: Which layers these are, and which were left out and why.

    Raises:
        TypeError: If the model is no module.
        ValueError: If an argument is out of range, or a selection matches nothing.
        UnsupportedLayerError: If a layer is refused, or no selected one can be held.
    """

    def __init__(
        self,
        model: nn.Module,
        radius: float | Literal["mup"],
        *,
        layers: Selection | None = None,
        exclude: Selection | None = None,
        block_size: int = 16,
        n_iterations: int = 1,
        seed: int = 0,
        unknown: Unknown = "skip",
        convolutions: Convolutions = "symbol",
    ) -> None:
        check_model(model, "NormCaps")
        self._radius = check_radius(radius)
        check_choice("unknown", unknown, get_args(Unknown))
        reshard(model)
        check_choice("convolutions", convolutions, get_args(Convolutions))
        providers = [partial(_held, partial(known_by_type, convolutions=convolutions))]
        self.coverage = cover(model, layers, exclude, unknown, providers, NOT_SCALED)
        if self.coverage.skipped:
            tell(f'SpectralCaps: {self.coverage}\nWith unknown="refuse" these are refused.')
        self.operators: list[LinearOperator] = self.coverage.operators
        self._norms = SpectralNorms(self.operators, block_size, n_iterations, seed)
        self._is_settled = False
        # Not the parameters, which ``load_state_dict(assign=True)`` replaces.
        self._places = [_place_of_factor(op) for op in self.operators]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameter that is scaled of each of the L operators, as the model holds it now."""
        return [op.parameters[place] for op, place in zip(self.operators, self._places, strict=True)]

    @without_modes()
    def step(self) -> Tensor:
        """Iterate, and scale the weights whose norms exceed the radius; with sharded weights every rank must call it.

        Frozen weights stay as they are, and so does one that is zero or not finite. Of weights in fp16 and bf16 a
        factor nearer to 1 than their rounding changes little or nothing.

        Returns:
            Which of the L layers were scaled, shape (L,), bool.

        Raises:
            RuntimeError: If the input size of a convolution is not known yet.
        """
        sigma, rise = self._iterate()
        if not self._is_settled:
            for _ in range(MAX_START_ITERATIONS):
                if float(rise.nan_to_num().max()) <= SETTLED:
                    break
                sigma, rise = self._iterate()
            self._is_settled = True
        norms = sigma * (1.0 + torch.maximum(LAG * rise, (DENSE_LAG * rise).sqrt()))
        radii = torch.tensor([radius_of(op, self._radius) for op in self.operators], dtype=sigma.dtype).to(sigma.device)
        exceeds = (norms > radii) & norms.isfinite()
        factors = torch.where(exceeds, radii / norms, torch.ones_like(norms))
        # On the CPU a look at the numbers waits for nothing, and spares most weights.
        on_host = factors.tolist() if factors.device.type == "cpu" else factors.unbind()
        for parameter, factor in zip(self.parameters(), on_host, strict=True):
            if parameter.requires_grad and (isinstance(factor, Tensor) or factor != 1.0):
                scale_(parameter, factor)
        return exceeds

    def _iterate(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values after a further iteration, and how far they rose in half an iteration (relative).

        Each of shape (L,); NaN for a weight that is zero or not finite.
        """
        earlier = in_double(self._norms.step().sigma.clone())
        sigma = in_double(self._norms.current().sigma)
        return sigma, (sigma / earlier - 1.0).clamp(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the persistent vectors, as plain tensors by layer name: loadable with ``weights_only=True``."""
        return {"vectors": self._norms.state_dict(), "is_settled": self._is_settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the vectors of :meth:`state_dict`; layers that do not fit start afresh, with a warning.

        Raises:
            TypeError: If it is no mapping.
            ValueError: If it is no such state.
        """
        check_state(state, STATE_KEYS, "SpectralCaps")
        check_vectors("vectors", state["vectors"])
        check_flag("is_settled", state["is_settled"])
        self._norms.load_state_dict(state["vectors"])
        self._is_settled = state["is_settled"]


def radius_of(op: LinearOperator, radius: float | Literal["mup"]) -> float:
    """Return an operator's radius; ``"mup"`` is ``sqrt(out / in)`` of its features or channels.

    An input whose entries are of size 1 then gives outputs of size 1 at most: G. Yang, J. Simon and J. Bernstein, "A
    spectral condition for feature learning" (2023). A convolution is held to the radius of the linear layer that it is
    with a kernel of size 1; all taps of a larger kernel share it.
    """
    if radius != MUP:
        return float(radius)
    return math.sqrt(op.codomain_shape[0] / op.domain_shape[0])


def _place_of_factor(op: LinearOperator) -> int:
    """Return the place, among an operator's parameters, of the one whose factor is the weight's factor.

    Of a parametrised weight it is the first in which that is homogeneous: the magnitude of ``weight_norm``, say.

    Raises:
        UnsupportedLayerError: If there is none.
    """
    if parametrize.is_parametrized(op.module, "weight"):
        place = next((i for i, p in enumerate(op.parameters) if is_homogeneous(op, p)), None)
        if place is None:
            raise UnsupportedLayerError("its parametrised weight scales with none of the parameters that it is made of")
        return place
    found = writable(op)
    if isinstance(found, str):
        raise UnsupportedLayerError(found)
    return next(i for i, p in enumerate(op.parameters) if p is found)


def _held(provider: Provider, module: nn.Module, name: str) -> Sequence[LinearOperator]:
    """Return the operators that a provider knows of a module, if their weights can be scaled.

    Raises:
        UnsupportedLayerError: If the provider knows none, or one cannot be scaled.
    """
    operators = provider(module, name)
    for op in operators:
        if not op.is_matrix and not isinstance(op, KernelOperator):
            raise UnsupportedLayerError("it is neither a matrix nor a convolution")
        _place_of_factor(op)
    return operators


def scale_(parameter: nn.Parameter, factor: float | Tensor) -> None:
    """Multiply a parameter, or this rank's part of it, by a number, which is not rounded to its dtype before."""
    local: Any = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
    if isinstance(factor, float):
        local.mul_(factor)
    else:
        dtype = compute_dtype(local.dtype)
        local.copy_(local.to(dtype) * factor.to(local.device, dtype))
