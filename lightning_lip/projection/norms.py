"""The norms of a projected network's operators: estimated for a step, certified for the exact projection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.recorded import RecordedConvolution
from lightning_lip.projection.allocation import logarithms
from lightning_lip.projection.clipping import FloatArray
from lightning_lip.projection.layers import ClippedLayer, Triplets
from lightning_lip.rigorous.operators import certified_norm


class OperatorNorms:
    """The norms of the L operators. Clipped layers bring theirs as triplets; the other operators have blocks here.

    Args:
        operators: The L operators.
        clipped: The layers whose triplets the projection computes.
        n_iterations: Iterations of the others' blocks a step.
        seed: Seed of the others' blocks.
    """

    def __init__(
        self, operators: Sequence[LinearOperator], clipped: Sequence[ClippedLayer], n_iterations: int, seed: int
    ) -> None:
        self._operators = operators
        of_layers = {layer.operators[0] for layer in clipped}
        self._others = [i for i in range(len(operators)) if i not in of_layers]
        self._blocks = SpectralNorms([operators[i] for i in self._others], n_iterations=n_iterations, seed=seed)
        # How far the certified norm of each of the others lies above its estimate, in logarithms.
        self._slack = dict.fromkeys(self._others, 0.0)

    def estimated_logs(self, triplets: Mapping[ClippedLayer, Triplets]) -> FloatArray:
        """Advance the others' blocks, and return the logarithms of the *estimated* norms, shape (L,).

        Raises:
            ValueError: If a weight holds NaN or an infinity.
        """
        logs = np.empty(len(self._operators))
        for layer, found in triplets.items():
            logs[layer.operators[0]] = logarithms([float(found.sigma[0])])[0]
        if self._others:
            estimates = logarithms(self._blocks.step().sigma.tolist())
            logs[self._others] = estimates + [self._slack[i] for i in self._others]
        bad = [op.name for op, log in zip(self._operators, logs, strict=True) if not log < math.inf]
        if bad:
            raise ValueError(f"The weights of {bad} hold NaN or an infinity: there is nothing to project.")
        return logs

    def certified(self) -> list[float]:
        """Return *certified upper bounds* of the L norms.

        Raises:
            ValueError: If a weight holds NaN or an infinity.
        """
        return [_certified(op) for op in self._operators]

    def measure_slack(self) -> None:
        """Note how far the others' certified norms lie above their estimates, for the steps to come."""
        others = [self._operators[i] for i in self._others]
        if not others or any(isinstance(op, RecordedConvolution) and op.spatial is None for op in others):
            return
        estimates = logarithms(self._blocks.current().sigma.tolist())
        for index, op, estimate in zip(self._others, others, estimates, strict=True):
            slack = logarithms([_certified(op)])[0] - estimate
            self._slack[index] = float(slack) if math.isfinite(slack) else 0.0

    def state_dict(self) -> dict[str, dict[str, Tensor] | dict[str, float]]:
        """Return the others' blocks and slack by layer name."""
        slack = {self._operators[i].name: slack for i, slack in self._slack.items()}
        return {"others": self._blocks.state_dict(), "slack": slack}

    def load(self, blocks: Mapping[str, Tensor], slack: Mapping[str, float]) -> None:
        """Take over the two parts of :meth:`state_dict`."""
        self._blocks.load_state_dict(blocks)
        self._slack = {i: slack.get(self._operators[i].name, 0.0) for i in self._others}


def _certified(op: LinearOperator) -> float:
    try:
        return certified_norm(op)
    except ValueError as error:
        raise ValueError(f"Layer {op.name!r}: {error}") from None
