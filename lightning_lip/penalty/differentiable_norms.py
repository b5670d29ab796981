"""DifferentiableNorms: the selected layers' norms and their bound, with a gradient through every spectral norm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lip import kernels
from lightning_lip.checks import check_state, check_vectors
from lightning_lip.graph.bound import Bound, NetworkBound
from lightning_lip.graph.program import Term
from lightning_lip.kernels.tensors import without_autocast
from lightning_lip.models.optimizer_steps import optimizer_steps
from lightning_lip.models.sharding import refuse_sharded
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.coverage import Coverage
from lightning_lip.penalty import compiled
from lightning_lip.penalty.norm_function import Affine, norm_function
from lightning_lip.penalty.partial_norm import partial_norm
from lightning_lip.penalty.selected_norms import SelectedNorms

OUTPUT = 0
"""What :meth:`DifferentiableNorms.evaluate` returns the log bound of: the output; a larger number, an inner value."""


class _Point(NamedTuple):
    """A place in the network, of which the bound is asked for.

    Attributes:
        module: The module whose input it is; None where it was not named by one.
        term: The bound's term; None for the output.
        affine: The bound's logarithm in closed form, if there is one.
    """

    module: nn.Module | None
    term: Term | None
    affine: Affine | None


class DifferentiableNorms(SelectedNorms):
    """The norms of :class:`~lightning_lip.penalty.selected_norms.SelectedNorms`, differentiable in the weights.

    The vectors advance only with grad enabled and the model in training mode, and at most once for each state of the
    weights: several micro-batches of an accumulated gradient, and several uses in one loss, share one iteration.
    """

    def _take(self, bound: Bound, coverage: Coverage) -> None:
        super()._take(bound, coverage)
        self._is_whole = False
        self._step: kernels.PowerStep | None = None
        self._step_version: tuple[int, ...] | None = None
        self._points = [_Point(None, None, bound.affine())]
        self._handle = compiled.register(self)

    def log_bound(self, until: nn.Module | None = None) -> Tensor:
        """Return S, the logarithm of :meth:`bound`, shape (), fp64 where the device has it; -inf if a layer is zero.

        With gradients enabled it is differentiable in the selected layers' weights, for a loss of one's own, and the
        vectors advance as for :meth:`LipschitzRegularizer.value`; under ``no_grad`` it is detached and they do not.

        Args:
            until: A module of a traced graph: the bound is that of its input, of all that comes before it.

        Raises:
            ValueError: If there is no graph, or the module has not one input in it.
            RuntimeError: If the input size of a ``"spatial"`` convolution is not known yet.
            UnsupportedLayerError: If gradients are enabled and the model is sharded (FSDP2, tensor parallel).
        """
        return self.quantity(OUTPUT if until is None else self.point_of(until))

    def bound(self) -> Tensor:
        """Return the bound with the present estimates, shape (), fp64 where the device has it.

        With a traced graph an *estimate* of a Lipschitz bound of the whole network: the rules are proven, the spectral
        norms in it are estimates from below. Without one, an *estimate from below* of the product of the selected
        layers' spectral norms, which bounds the network only if it is the chain of these layers and activations of
        constant 1. Of ``"symbol"`` convolutions the norms are the symbols', which lie above those at the size of an
        image: the estimate may lie above a certificate at that size. Gradients, and whether the vectors advance, are
        those of :meth:`log_bound`.

        Raises:
            RuntimeError: If the input size of a ``"spatial"`` convolution is not known yet.
        """
        return self.log_bound().exp()

    def point_of(self, until: nn.Module) -> int:
        """Return the number by which :meth:`quantity` knows the input of a module.

        Raises:
            ValueError: If there is no graph, or the module has not one input in it.
        """
        for index, point in enumerate(self._points):
            if point.module is until:
                return index
        return self.add_point(self._network().input_of(until), until)

    def add_point(self, term: Term, module: nn.Module | None = None) -> int:
        """Return the number by which :meth:`quantity` knows an inner value of the graph."""
        self._points.append(_Point(module, term, self._network().affine(term)))
        return len(self._points) - 1

    def _network(self) -> NetworkBound:
        if not isinstance(self._bound, NetworkBound):
            raise ValueError("`until` needs the graph of the network: give an `example_input`.")
        return self._bound

    def quantity(self, number: int) -> Tensor:
        """Return what :meth:`evaluate` returns, as one operator of a compiled graph inside ``torch.compile``."""
        advance = torch.is_grad_enabled() and self._model.training
        if torch.compiler.is_compiling():
            parameters = self.parameters()
            penalised = {id(p) for p in self.penalised_parameters()}
            trainable = [i for i, p in enumerate(parameters) if p.requires_grad and id(p) in penalised]
            return compiled.penalty(parameters, trainable, self._handle, number, advance)
        return self.evaluate(number, advance)

    @without_autocast()
    def evaluate(self, number: int, advance: bool) -> Tensor:
        """Return a log bound, shape (), as Python runs it.

        Args:
            number: :data:`OUTPUT`, or what :meth:`point_of` returned.
            advance: Whether the vectors may advance.
        """
        if not torch.is_grad_enabled():
            return self._quantity_of(number, self.log_sigma())
        step = self._present_step(advance)
        sources = [self._source(op, u, v) for op, u, v in zip(self.operators, step.left, step.right, strict=True)]
        return norm_function(partial(self._quantity_of, number), self._affine(number), step, sources)

    def _quantity_of(self, number: int, log_sigma: Tensor) -> Tensor:
        """Return what :meth:`evaluate` returns for given log spectral norms, shape (L,), differentiable in them."""
        return self.log_bound_of(log_sigma, self._points[number].term)

    def _affine(self, number: int) -> Affine | None:
        """Return its closed form in these logarithms, if there is one."""
        return self._points[number].affine

    def log_bound_of(self, log_sigma: Tensor, result: Term | None = None) -> Tensor:
        """Return S, shape (), differentiable, for given log spectral norms, shape (L,)."""
        return self._bound.log_bound(log_sigma) if result is None else self._network().log_bound(log_sigma, result)

    def _present_step(self, advance: bool) -> kernels.PowerStep:
        """Return the singular triplets of the present weights, advanced once for each state of these.

        Raises:
            UnsupportedLayerError: If the model is sharded (FSDP2, tensor parallel).
        """
        self._bound.follow_replaced()
        if not self._is_whole:
            instead = (
                "Use LipschitzPenalty, or add_grad_() after the backward pass: they work on shards. A bound can be "
                "read under torch.no_grad()."
            )
            refuse_sharded(self._model, "A penalty or bound with a gradient, LipschitzMixin's too,", instead)
            self._is_whole = True
        version = self._version()
        step = self._step if version == self._step_version else None
        if step is None and advance:
            # Copies: autograd keeps the vectors until the backward pass, the kernels overwrite theirs.
            step = self._norms.step().copied()
            self._step, self._step_version = step, version
        elif step is None:
            step = self._norms.current().copied()
        return step

    def _source(self, op: LinearOperator, left: Tensor, right: Tensor) -> Tensor:
        """Return an operator's matrix, or its norm, differentiable in its penalised parameters only."""
        penalised = self.penalised(op)
        if len(penalised) < len(op.parameters):
            return partial_norm(op, penalised, left, right)
        weight = op.direct_parameter
        return op.norm(left, right) if weight is None else weight

    def iterate(self) -> None:
        """Advance the singular vectors on the present weights, and nothing else."""
        with torch.inference_mode(False):
            self._step, self._step_version = self._norms.step().copied(), self._version()

    def state_dict(self) -> dict[str, Any]:
        """Return the persistent vectors, as plain tensors by layer name: loadable with ``weights_only=True``."""
        return {"vectors": self._norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the vectors of :meth:`state_dict`; layers that do not fit start afresh, with a warning.

        Raises:
            TypeError: If it is no mapping.
            ValueError: If it is no such state.
        """
        check_state(state, ("vectors",), type(self).__name__)
        check_vectors("vectors", state["vectors"])
        self._norms.load_state_dict(state["vectors"])
        self._step = self._step_version = None

    def _version(self) -> tuple[int, ...]:
        """Identify the state of the weights: changes with in-place updates, replacements, moves and optimiser steps."""
        versions = (x for op in self.operators for p in op.parameters for x in (p._version, p.data_ptr()))
        # Fused optimisers do not count their updates in `_version`.
        return (optimizer_steps(), *versions)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to copy a traced graph, whose rules read the modules that they were traced from.

        Raises:
            TypeError: If the bound is that of a graph.
        """
        if self._bound.kind == "bound":
            raise TypeError(
                "A LipschitzRegularizer over a traced graph cannot be copied or pickled: construct one for the copied "
                "model, and carry the vectors over with state_dict() and load_state_dict()."
            )
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy a handle of its own."""
        self.__dict__.update(state, _handle=compiled.register(self))
