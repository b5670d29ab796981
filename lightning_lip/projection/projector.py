"""LipschitzProjector: weights kept inside a Lipschitz budget, without a framework."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from lightning_lip.checks import (
    check_choice,
    check_integers,
    check_model,
    check_number,
    check_state,
    check_type,
    check_vectors,
    is_finite_number,
    shown,
)
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import bound_of
from lightning_lip.kernels.tensors import without_modes
from lightning_lip.models.inputs import BatchDim
from lightning_lip.models.sharding import refuse_sharded
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.selection import Selection
from lightning_lip.projection.allocation import Allocation, Method, logarithms
from lightning_lip.projection.caps import Caps
from lightning_lip.projection.clipping import FloatArray
from lightning_lip.projection.layers import ClippedLayer, ProjectedLayer, Triplets, projected_layers
from lightning_lip.projection.norms import OperatorNorms
from lightning_lip.projection.spectra import Metric
from lightning_lip.rigorous.rounding import exp_up

STEP_MARGIN = 1e-4
"""A step aims this far (relative) below the target, for what the estimated norms miss."""

REACHED = 1e-6
"""A step leaves weights alone that lie no further than this (relative) above its aim: their rounding."""

CERTIFICATE_SLACK = 1e-10
"""How far (relative) a matrix's certificate lies above its norm, at most, for matrices of moderate size."""

N_ATTEMPTS = 20
"""Attempts of the exact projection, each with a wider margin for the rounding of weights and certificates."""


STATE_KEYS = ("n_steps", "blocks", "others", "slack")


@dataclass(frozen=True)
class Projection:
    """What a projection did.

    Attributes:
        changed: Whether any weight was changed.
        certified: Whether `log_bound` is a certificate; otherwise it is made of estimates.
        log_bound: The logarithm of the product, or of the network's bound, afterwards: a *certified upper bound* of
            the exact projection, an *estimate* of a step.
        norms: The operators' norms behind it, by layer name; certified or estimated as well.
        distance: How far the weights moved, in the metric: ``sqrt(sum_l w_l |dW_l|_F^2)`` with
            ``w_l = 1 / sigma_l^2`` (relative) or 1 (euclidean).
        nearest: Whether it was the nearest point of the set that clipping, and scaling of the weights that are only
            scaled, can reach, up to what the margins take; False says only that this is not proven.
    """

    changed: bool
    certified: bool
    log_bound: float
    norms: Mapping[str, float]
    distance: float
    nearest: bool

    @property
    def bound(self) -> float:
        """The exponential of `log_bound`, rounded up; inf where it overflows."""
        return exp_up(self.log_bound)


class LipschitzProjector:
    """Keeps the product of the layers' spectral norms, or the bound of the whole network, at or below a target M.

    The set of all weights with ``prod_l ||W_l||^k_l <= M`` is the constraint of N. Couellan, "The coupling effect of
    Lipschitz regularization in deep neural networks" (2021), onto which projecting is called difficult there.

    - :meth:`exact` works on full singular value decompositions in fp64 and ends with a *certified upper bound* at or
      below M, for the weights as they are stored.
    - :meth:`step` works on persistent blocks of leading singular vectors and is meant for every optimiser step. Its
      norms are *estimates (from below)*: it aims at M (1 - 1e-4), and no certificate follows.

    A weight that is the operator's matrix (``nn.Linear``) has its largest singular values clipped. Other weights are
    *scaled*, all their singular values alike, since clipping those of a convolution leaves the set of kernels:
    convolutions, learned scales and normalisations, matrices that the forward pass computes from one parameter, and
    for a layer fused with the batch normalisation behind it gamma. Frozen layers and, with a traced bound, unselected
    ones count and stay. Running statistics of batch normalisation move in training, so with them the bound holds at
    an exact projection and until the next batch.

    A frozen layer's weight is never written. Optimisers keep their state: momentum is not projected.

    Args:
        model: The model. Its weights are written in place.
        target: M, positive. May be changed later: :attr:`target`.
        method: ``"joint"`` is the nearest point of the whole set, for a weight that is scaled among its multiples
            (proven where P <= 2M, otherwise the non-collapsing projection: see
            :func:`~lightning_lip.projection.joint_caps`); ``"log_clip"`` clips each layer at the same fraction of its
            norm; ``"per_layer"`` clips each at the same norm; ``"scaling"`` multiplies each by the same factor.
        metric: Of ``"joint"``: ``"relative"`` (``w_l = 1 / sigma_l^2``) or ``"euclidean"``.
        layers: Names, glob patterns or submodules to select; None selects every layer with a weight.
        exclude: Names, glob patterns or submodules to leave out.
        block_size: Singular vectors a layer, r, to start with; a block grows when more than r - 2 are clipped.
        n_iterations: Iterations of the blocks a step.
        example_input: An input of the model, whose graph is traced: the bound is then the whole network's. None takes
            a LightningModule's ``example_input_array``; without either it is the product over the selected layers,
            which bounds the network only if it is the chain of these layers and activations of constant 1.
        batch_dim: None says that the whole example input is one sample, as a graph's nodes are, and not a batch.
        exact_every_n_steps: Make every n-th step an exact one; 0 leaves that to the caller.
        seed: Seed of the private generator of the blocks, the same on every rank.
        convolutions: Which norm of convolutions is estimated and certified: as in :class:`~.LipschitzRegularizer`.

    Raises:
        TypeError: If the model is no module.
        ValueError: If an argument is out of range or a selection matches nothing.
        UnsupportedLayerError: If the operator of a selected layer is not known, or a selected trainable weight cannot
            be written (it is parametrised, say).

    Example:
        >>> import torch
        >>> from lightning_lip import LipschitzProjector
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> projector = LipschitzProjector(model, target=0.1)
        >>> projector.exact().bound <= 0.1
        True
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        *,
        method: Method = "joint",
        metric: Metric = "relative",
        layers: Selection | None = None,
        exclude: Selection | None = None,
        block_size: int = 16,
        n_iterations: int = 1,
        example_input: Any = None,
        batch_dim: BatchDim = 0,
        exact_every_n_steps: int = 0,
        seed: int = 0,
        convolutions: Convolutions = "symbol",
    ) -> None:
        check_model(model, "LipschitzProjector")
        check_choice("method", method, get_args(Method))
        check_choice("metric", metric, get_args(Metric))
        check_integers(1, block_size=block_size, n_iterations=n_iterations)
        check_integers(0, exact_every_n_steps=exact_every_n_steps, seed=seed)
        self._target = check_number("target", target, positive=True)
        self._method, self._metric = method, metric
        self._n_iterations = n_iterations
        self._exact_every_n_steps = exact_every_n_steps
        refuse_sharded(model, "LipschitzProjector", "Use DDP or a single device, or project a whole checkpoint.")
        check_choice("convolutions", convolutions, get_args(Convolutions))
        self._bound, _ = bound_of(model, example_input, layers, exclude, batch_dim=batch_dim, convolutions=convolutions)
        self.operators: list[LinearOperator] = self._bound.operators
        self._layers, self._reasons = projected_layers(
            self._bound, clip=method != "scaling", block_size=block_size, seed=seed
        )
        self._clipped = [layer for layer in self._layers if isinstance(layer, ClippedLayer)]
        self._norms = OperatorNorms(self.operators, self._clipped, n_iterations, seed)
        self._n_steps = 0
        self._movable()

    @property
    def target(self) -> float:
        """M."""
        return self._target

    @target.setter
    def target(self, target: float) -> None:
        self._target = check_number("target", target, positive=True)

    @property
    def bound_kind(self) -> str:
        """What is held: ``"bound"`` of the whole network over its traced graph, or ``"product"`` of layers."""
        return self._bound.kind

    @without_modes()
    def step(self) -> Projection:
        """Project after a step of training, by *estimated* norms; weights within the target stay bit for bit.

        Each call iterates the blocks. Where the estimate exceeds twice the target, the singular values are exact.

        Raises:
            ValueError: If a weight holds NaN or an infinity, or the target cannot be reached.
            UnsupportedLayerError: If a layer that was unfrozen cannot be written.
            RuntimeError: If the input size of a convolution is not known yet, or a weight was replaced by another
                parameter.
        """
        self._n_steps += 1
        if self._exact_every_n_steps and self._n_steps % self._exact_every_n_steps == 0:
            return self.exact()
        triplets = {layer: layer.ritz(self._n_iterations) for layer in self._clipped}
        log_norms = self._norms.estimated_logs(triplets)
        log_bound = self._log_bound(log_norms)
        movable = self._movable()
        # Frozen layers cannot be lowered by the margin.
        aim = math.log(self._target) - (STEP_MARGIN if movable else 0.0)
        if log_bound <= aim + REACHED:
            return self._result(None, log_norms, log_bound, certified=False)
        if log_bound - aim > math.log(2):
            triplets = {layer: layer.svd() for layer in self._clipped if layer in movable}
            for clipped, found in triplets.items():
                clipped.keep(found)
        allocation = self._allocation(movable, triplets, log_norms)
        caps = allocation.caps(aim, self._method, self._metric)
        while small := [
            layer
            for layer, cap in zip(allocation.layers, caps.caps, strict=True)
            if isinstance(layer, ClippedLayer) and layer.needs_more(triplets[layer], cap)
        ]:
            triplets |= {layer: layer.grown() for layer in small}
            allocation = self._allocation(movable, triplets, log_norms)
            caps = allocation.caps(aim, self._method, self._metric)
        originals = {layer: layer.original() for layer in allocation.layers if not isinstance(layer, ClippedLayer)}
        allocation.write_(caps, triplets, originals)
        log_norms = allocation.log_norms(np.log(caps.caps))
        return self._result(caps, log_norms, self._log_bound(log_norms), certified=False)

    @without_modes()
    def exact(self) -> Projection:
        """Project by full singular value decompositions, so that the *certified upper bound* is at most the target.

        The certificates are those of :func:`~lightning_lip.certificates.certify` for the weights as they are stored,
        rounded to their dtype. Weights whose bound is certified already stay bit for bit.

        Raises:
            ValueError: If a weight holds NaN or an infinity, or the target cannot be reached.
            UnsupportedLayerError: If a layer that was unfrozen cannot be written.
            RuntimeError: If the rounding of the weights' dtype keeps them above the target, or a weight was replaced by
                another parameter.
        """
        self._norms.measure_slack()
        norms = self._norms.certified()
        log_bound = self._bound.log_bound_up(norms)
        # Rounded down, for the roundings of this logarithm and of the bound's exponential.
        log_target = math.nextafter(math.nextafter(math.log(self._target), -math.inf), -math.inf) - 2.0**-50
        if log_bound <= log_target:
            return self._result(None, logarithms(norms), log_bound, certified=True)
        movable = self._movable()
        triplets = {layer: layer.svd() for layer in movable if isinstance(layer, ClippedLayer)}
        originals = {layer: layer.original() for layer in movable if not isinstance(layer, ClippedLayer)}
        allocation = self._allocation(movable, triplets, logarithms(norms))
        eps = max((torch.finfo(layer.parameter.dtype).eps for layer in movable), default=0.0)
        margin = CERTIFICATE_SLACK + eps / 8 * sum(op.multiplicity for op in self.operators)
        for _ in range(N_ATTEMPTS):
            caps = allocation.caps(log_target - margin, self._method, self._metric)
            allocation.write_(caps, triplets, originals)
            norms = self._norms.certified()
            log_bound = self._bound.log_bound_up(norms)
            if log_bound <= log_target:
                for layer, found in triplets.items():
                    layer.keep(found)
                return self._result(caps, logarithms(norms), log_bound, certified=True)
            margin += margin + log_bound - log_target
        raise RuntimeError(
            f"The certified {self.bound_kind} stays at {exp_up(log_bound):.6g}, above the target "
            f"{self._target:.6g}, after {N_ATTEMPTS} attempts: the weights' dtype rounds too coarsely."
        )

    def _movable(self) -> list[ProjectedLayer]:
        """Return the layers that may be written now.

        Raises:
            RuntimeError: If a layer has another parameter than when the projector was made.
            UnsupportedLayerError: If a selected layer is trainable but cannot be written.
        """
        replaced = [
            layer.name
            for layer in self._layers
            if all(layer.parameter is not p for p in self.operators[layer.operators[0]].parameters)
        ]
        if replaced:
            raise RuntimeError(
                f"The weights of {replaced} are other parameters than when this projector was made: make a new one."
            )
        refused = {
            op.name: reason
            for op, reason in ((self.operators[i], reason) for i, reason in self._reasons.items())
            if any(p.requires_grad for p in self._bound.selected(op))
        }
        if refused:
            raise UnsupportedLayerError(
                "These selected layers cannot be projected:\n  - "
                + "\n  - ".join(f"{name}: {reason}" for name, reason in refused.items())
                # A layer fused with the normalisation behind it has both names.
                + f"\nLeave them out with exclude={'+'.join(refused).split('+')!r}, or freeze them."
            )
        return [layer for layer in self._layers if layer.parameter.requires_grad]

    def _allocation(
        self, movable: Sequence[ProjectedLayer], triplets: Mapping[ClippedLayer, Triplets], log_norms: FloatArray
    ) -> Allocation:
        """Return how to divide the budget among the layers that may be written, zero layers left out.

        Raises:
            ValueError: If there is no such layer.
        """
        log_norms = log_norms.copy()
        spectra, frobenius = [], []
        layers = []
        for layer in movable:
            first = layer.operators[0]
            if isinstance(layer, ClippedLayer):
                spectrum = triplets[layer].sigma.double().cpu().numpy()
                log_norms[first] = logarithms(spectrum[:1])[0]
                weight_norm = None
            else:
                spectrum = np.exp(log_norms[first : first + 1])
                weight_norm = float(torch.linalg.vector_norm(self.operators[first].weight().detach().double()))
            if spectrum[0] > 0:  # a zero layer stays
                layers.append(layer)
                spectra.append(spectrum)
                frobenius.append(weight_norm)
        if not layers:
            bound = exp_up(self._log_bound(log_norms))
            raise ValueError(
                f"The {self.bound_kind} is {bound:.6g}, above the target {self._target:.6g}, and no selected layer is "
                f"trainable: {bound:.6g} is the smallest that can be reached. Raise the target, or unfreeze layers."
            )
        return Allocation(self._bound, layers, spectra, frobenius, log_norms)

    def _log_bound(self, log_norms: FloatArray) -> float:
        return float(self._bound.log_bound(torch.from_numpy(log_norms)))

    def _result(self, caps: Caps | None, log_norms: FloatArray, log_bound: float, *, certified: bool) -> Projection:
        norms = dict(zip((op.name for op in self.operators), np.exp(log_norms).tolist(), strict=True))
        if caps is None:
            return Projection(False, certified, log_bound, norms, 0.0, True)
        nearest = caps.exact and self._method == "joint"
        return Projection(True, certified, log_bound, norms, math.sqrt(caps.squared_distance), nearest)

    def state_dict(self) -> dict[str, Any]:
        """Return blocks and counters, as plain tensors and numbers: loadable with ``weights_only=True``."""
        blocks = {layer.name: layer.block.clone() for layer in self._clipped if layer.block is not None}
        return {"n_steps": self._n_steps, "blocks": blocks, **self._norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; the block of a layer that does not fit starts afresh.

        Raises:
            TypeError: If it is no mapping.
            ValueError: If it is no such state.
        """
        check_state(state, STATE_KEYS, "LipschitzProjector")
        check_integers(0, n_steps=state["n_steps"])
        check_vectors("blocks", state["blocks"])
        check_vectors("others", state["others"])
        check_type("slack", state["slack"], Mapping, "a mapping from names of layers to numbers")
        for name, slack in state["slack"].items():
            if not is_finite_number(slack):
                raise ValueError(f"Expected `slack[{name!r}]` to be a finite number, got {shown(slack)}.")
        self._n_steps = state["n_steps"]
        for layer in self._clipped:
            layer.load(state["blocks"].get(layer.name))
        self._norms.load(state["others"], state["slack"])

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to copy what belongs to one model.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "A LipschitzProjector cannot be copied or pickled: construct one for the copied model, and carry the "
            "blocks over with state_dict() and load_state_dict()."
        )


def project(model: nn.Module, target: float, **arguments: Any) -> Projection:
    """Project a model's weights once, exactly, onto the budget: its *certified upper bound* is then at most `target`.

    Args:
        model: The model. Its weights are written in place.
        target: M, positive.
        **arguments: Of :class:`LipschitzProjector`.

    Example:
        >>> import torch
        >>> from lightning_lip import project
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> project(model, 0.1, example_input=torch.zeros(1, 4)).bound <= 0.1
        True
    """
    return LipschitzProjector(model, target, **arguments).exact()
