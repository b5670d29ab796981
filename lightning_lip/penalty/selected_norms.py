"""SelectedNorms: the norms of a model's selected layers, and what they bound."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor, nn

from lightning_lip.checks import check_choice
from lightning_lip.graph.bound import Bound, bound_of, observed_product
from lightning_lip.kernels.tensors import in_double
from lightning_lip.models.inputs import BatchDim
from lightning_lip.models.sharding import reshard
from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.composed import DiagonalOperator
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.coverage import Coverage
from lightning_lip.operators.selection import Unknown
from lightning_lip.reporting.messages import tell
from lightning_lip.usage.observation import AWAITED, Observation, observe


class SelectedNorms:
    """The spectral norms of a model's selected layers, as estimates that go on from step to step, and their bound.

    Args:
        model: The model.
        example_input: An input to trace its graph with, or None.
        inputs: An input for a forward pass that shows what is multiplied and normalised; ``AWAITED`` where
            :meth:`adopt` is called after one; None goes by the classes of torch.nn alone.
        selection: ``layers``, ``exclude``, ``unknown`` and ``convolutions`` of
            :class:`~lightning_lip.LipschitzRegularizer`.
        iteration: ``block_size``, ``n_iterations``, ``seed`` and ``backend`` of
            :class:`~lightning_lip.norms.spectral_norms.SpectralNorms`.
        batch_dim: As in :class:`~lightning_lip.LipschitzRegularizer`.

    Attributes:
        operators: The L operators, each distinct weight once.
        coverage: Which layers are covered, and which were left out and why; as text, a short table.
    """

    operators: list[LinearOperator]
    coverage: Coverage

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        inputs: Any,
        selection: dict[str, Any],
        iteration: dict[str, Any],
        batch_dim: BatchDim = 0,
    ) -> None:
        check_choice("unknown", selection["unknown"], get_args(Unknown))
        check_choice("convolutions", selection["convolutions"], get_args(Convolutions))
        self._model = model
        self._selection = selection
        self._iteration = iteration
        reshard(model)
        self._take(*bound_of(model, example_input, **selection, batch_dim=batch_dim, is_awaiting=inputs is not None))
        if self._bound.kind == "product" and inputs is not AWAITED:
            if inputs is None:
                self._tell()
            else:
                self.adopt(observe(model, inputs))

    def _take(self, bound: Bound, coverage: Coverage) -> None:
        """Take a bound of the model, and make the vectors for its norms."""
        self._bound, self.coverage = bound, coverage
        self.operators = bound.operators
        self._norms = SpectralNorms(self.operators, **self._iteration)
        self._multiplicities = [op.multiplicity for op in self.operators]

    def adopt(self, observation: Observation, batch_statistics: bool = True) -> None:
        """Select the layers of a product anew, by what a forward pass showed; saved vectors wait for them.

        Args:
            observation: What it showed.
            batch_statistics: Whether running statistics may be read: on several ranks they may differ.

        Raises:
            ValueError: If no layer with a weight is left.
            UnsupportedLayerError: If a layer without a known norm is refused.
        """
        vectors = self._norms.state_dict()
        self._take(
            *observed_product(
                self._model, observation, self.operators, **self._selection, batch_statistics=batch_statistics
            )
        )
        self._norms.load_state_dict(vectors)
        self._tell()

    def _tell(self) -> None:
        """Say once what is covered, where that is not all or not what the classes say."""
        if self.coverage.skipped or self.coverage.normalisations:
            remedy = '\nWith unknown="refuse" these are refused.' if self.coverage.skipped else ""
            tell(f"Product of spectral norms: {self.coverage}{remedy}")

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the operators' weights are computed from, each once."""
        self._bound.follow_replaced()
        return list(dict.fromkeys(p for op in self.operators for p in op.parameters))

    def penalised(self, op: LinearOperator) -> list[nn.Parameter]:
        """Return those of an operator's parameters that belong to the selected layers."""
        return self._bound.selected(op)

    def penalised_parameters(self) -> list[nn.Parameter]:
        """Return the selected layers' parameters, as the model holds them now."""
        self._bound.follow_replaced()
        return [p for op in self.operators for p in self.penalised(op)]

    def sigma(self) -> Tensor:
        """Return the estimates (from below) of the L norms of the present weights, shape (L,), detached.

        They are the Ritz values of the present block; the vectors do not advance.
        """
        return self._norms.current().sigma

    def log_sigma(self) -> Tensor:
        """Return the logarithms of :meth:`sigma`, shape (L,), fp64 where the device has it; -inf for a zero layer."""
        return in_double(self.sigma()).log()

    def sigma_upper(self) -> Tensor:
        """Return upper bounds of the L spectral norms, shape (L,), true in exact arithmetic; no certificate.

        See :meth:`SpectralNorms.upper`; with blocks as wide as the layers they equal the spectral norms.
        """
        return self._norms.upper()

    def spectral_norms(self) -> dict[str, Tensor]:
        """Return :meth:`sigma` by layer name, each of shape (), in the model's order."""
        return dict(zip((op.name for op in self.operators), self.sigma().unbind(), strict=True))

    def ritz_values(self) -> list[Tensor]:
        """Return estimates of the L layers' top singular values, (r_l,) each; see :meth:`SpectralNorms.ritz_values`."""
        return self._norms.ritz_values()

    @property
    def bound_kind(self) -> str:
        """What the norms bound: ``"bound"``, the whole network over its traced graph, or ``"product"`` of layers."""
        return self._bound.kind

    @property
    def has_upper(self) -> bool:
        """Whether :meth:`sigma_upper` is finite: every operator is a matrix, or has its norm in closed form."""
        return all(op.is_matrix or isinstance(op, DiagonalOperator) for op in self.operators)
