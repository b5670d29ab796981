"""LipschitzRegularizer: the penalty on any PyTorch model, without a framework."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lip import kernels
from lightning_lip.checks import (
    check_flag,
    check_model,
    check_number,
    check_parameters,
    check_scale,
)
from lightning_lip.graph.program import repeated
from lightning_lip.kernels.tensors import in_double, without_autocast
from lightning_lip.models.inputs import BatchDim
from lightning_lip.operators.composed import ScaledOperator
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.selection import Selection, Unknown
from lightning_lip.penalty import compiled
from lightning_lip.penalty.differentiable_norms import DifferentiableNorms
from lightning_lip.penalty.norm_function import Affine
from lightning_lip.penalty.penalties import (
    KNEE,
    Penalty,
    PenaltyName,
    check_knee,
    check_value,
    get_penalty,
    level_of,
    scalar,
)

PENALTY = -1
"""What :meth:`LipschitzRegularizer.evaluate` returns the penalty for; other numbers are of log bounds."""


class LipschitzRegularizer(DifferentiableNorms):
    """A penalty on the layers' spectral norms together, added to a loss or straight to the gradients.

    The default penalises the product of the spectral norms (N. Couellan, "The coupling effect of Lipschitz
    regularization in deep neural networks", 2021). The norms are *estimates from below*, by block iteration with
    vectors that persist from step to step. Without an example input, S is the log of the product over the selected
    layers: a regulariser, and not a bound on the network, whose activations, other layers and branches it does not
    know. With one, S is the log of the bound over the network's traced graph: activations, residuals, pools and
    unselected layers count, and the selected layers get the gradient.

    Linear layers may be sharded (DTensors of FSDP2 and tensor parallelism): then every rank must make each call, those
    that only read included, because spectral norms are sums over ranks.

    Args:
        model: The model. It is not changed, but for a forward pre-hook on each ``"spatial"`` convolution without an
            example input, which goes with the regulariser. After replacing one of its modules, construct a new one.
        coefficient: lambda, the factor of the penalty; at least 0.
        penalty: ``"product"`` (the paper's), ``"softplus_log"``, ``"hinge_log"``, ``"log"``, ``"layer_sum"``,
            ``"layer_sum_squares"``, or a callable ``(log_sigma (L,), log_bound ()) -> ()``, which sees a layer that
            counts k times k times.
        target: M, the budget of ``"softplus_log"`` and ``"hinge_log"``.
        knee: Where ``"product"`` becomes linear in S, its logarithm; None or infinity for the paper's plain product.
        layers: Names, glob patterns, submodules or types to select; None selects every layer with a weight.
        exclude: Names, glob patterns, submodules or types to leave out.
        block_size: Singular vectors a layer, r; 1 is the classical power iteration.
        n_iterations: Iterations a step.
        seed: Seed of the private generator that the vectors start from.
        example_input: A tensor, a tuple of arguments or a dict of keyword arguments of the model, with the batch along
            the first dimension of each tensor: the graph is traced with it, in eval mode. None takes a
            LightningModule's ``example_input_array``. Without either, a layer counts as often as the model holds its
            weight, and the size of a ``"spatial"`` convolution's input is that of the first forward pass with gradients
            enabled.
        batch_dim: None says that the whole example input is one sample, as a graph's nodes are, and not a batch.
        backend: ``"reference"``, ``"cpu"`` or ``"gpu"`` to force an implementation of the kernels; None takes that of
            the environment variable ``LIGHTNING_LIP_BACKEND``, or the one for the weights' device. A
            convolution's symbol that it does not serve goes to the reference.
        unknown: Without a graph, ``"skip"`` leaves out layers without a known norm (embeddings, attention,
            normalisations) and tells so once, but for one that `layers` names; ``"refuse"`` refuses them by name.
        inputs: An input of the model, like `example_input`: its forward pass runs once, in eval mode, and shows which
            parameters multiply activations, in modules of any class, and what normalises their outputs. The product is
            of these (``docs/normalisation.md``). None goes by the classes of torch.nn alone.
        convolutions: ``"symbol"``: a convolution's norm is that of its symbol, on the infinite grid, which no input
            size is needed for and which certificates bound; an estimate from below of it may lie above the norm at the
            size of a small image. ``"spatial"``: the norm of the operator at the size of its input, at up to tenfold
            cost.

    Attributes:
        coverage: Which layers are covered, and which were left out and why; as text, a short table.

    Raises:
        TypeError: If the model is no module.
        ValueError: If an argument is out of range, a selection matches nothing, or no layer with a weight is left.
        UnsupportedLayerError: If a layer without a known norm is refused, or an operation between `example_input` and
            the output has no known finite Lipschitz constant.

    Example:
        >>> import torch
        >>> from lightning_lip import LipschitzRegularizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> regularizer = LipschitzRegularizer(model, coefficient=1e-3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> penalty = regularizer.add_grad_()
        >>> optimizer.step()
        >>> list(regularizer.spectral_norms())
        ['0', '2']
    """

    def __init__(
        self,
        model: nn.Module,
        coefficient: float,
        penalty: PenaltyName | Penalty = "product",
        *,
        target: float = 1.0,
        knee: float | None = KNEE,
        layers: Selection | None = None,
        exclude: Selection | None = None,
        block_size: int = 8,
        n_iterations: int = 1,
        seed: int = 0,
        example_input: Any = None,
        batch_dim: BatchDim = 0,
        backend: kernels.Backend | None = None,
        unknown: Unknown = "skip",
        inputs: Any = None,
        convolutions: Convolutions = "symbol",
    ) -> None:
        check_model(model, "LipschitzRegularizer")
        self.coefficient = check_number("coefficient", coefficient)
        self._penalty = get_penalty(penalty, target, knee)
        self._level = level_of(penalty, target, check_knee(knee)) if isinstance(penalty, str) else 1.0
        self._is_checked = isinstance(penalty, str)
        selection: dict[str, Any] = {
            "layers": layers,
            "exclude": exclude,
            "unknown": unknown,
            "convolutions": convolutions,
        }
        iteration = {"block_size": block_size, "n_iterations": n_iterations, "seed": seed, "backend": backend}
        super().__init__(model, example_input, inputs, selection, iteration, batch_dim)
        # The kernels know the built-in penalties of a product, and their slopes in closed form.
        is_product = self._bound.kind == "product"
        self._code = kernels.PENALTY_CODES[penalty] if is_product and isinstance(penalty, str) else None

    def value(self) -> Tensor:
        """Return coefficient * penalty, shape (), differentiable in the weights: add it to the loss.

        The vectors advance only with grad enabled and the model in training mode, and at most once for each state of
        the weights: several micro-batches of an accumulated gradient share one iteration. The gradient takes the
        singular vectors as constants, which is exact for the exact vectors. What changes weights through ``.data`` is
        not seen; :meth:`iterate` then advances the vectors.

        Inside ``torch.compile`` it is one operator, without a graph break: see :mod:`~lightning_lip.penalty.compiled`.

        Raises:
            UnsupportedLayerError: If the model is sharded (FSDP2, tensor parallel).
        """
        return self.quantity(PENALTY)

    def evaluate(self, number: int, advance: bool) -> Tensor:
        """Return :meth:`value` for :data:`PENALTY`, and otherwise a log bound, as Python runs it.

        Args:
            number: Which of them.
            advance: Whether the vectors may advance.
        """
        value = super().evaluate(number, advance)
        return value.to(compiled.value_dtype(self.parameters())) if number == PENALTY else value

    def _quantity_of(self, number: int, log_sigma: Tensor) -> Tensor:
        if number != PENALTY:
            return super()._quantity_of(number, log_sigma)
        value = self.penalty_of(log_sigma)
        if log_sigma.requires_grad:
            self._check(value, log_sigma)
        return self.coefficient * value

    def _affine(self, number: int) -> Affine | None:
        return None if number == PENALTY else super()._affine(number)

    def add_grad_(
        self, scale: float | Tensor = 1.0, *, advance: bool = True, parameters: Collection[Tensor] | None = None
    ) -> Tensor:
        """Iterate, then add the gradient of scale * coefficient * penalty to the weights' ``.grad``, in place.

        Call it after ``backward()`` and before the optimiser's step. No autograd graph over the weights is built, and
        where the compiled kernels serve nothing waits for the device. A missing ``.grad`` is created; frozen weights
        are left alone; a layer that is exactly zero gets no gradient. Coefficients that are not finite count as zero.

        Args:
            scale: A further factor, a number or a tensor of shape () (a gradient scaler's scale, say).
            advance: Whether to iterate; with False the present vectors serve.
            parameters: Add to these parameters only (those of one optimiser, say); None means all.

        Returns:
            scale * coefficient * penalty, shape (), detached.
        """
        check_scale("scale", scale)
        check_flag("advance", advance)
        if parameters is not None:
            parameters = check_parameters("parameters", parameters)
        return self.accumulate_(scale, advance, parameters).clone()

    def accumulate_(self, scale: float | Tensor, advance: bool, parameters: Collection[Tensor] | None) -> Tensor:
        """Do what :meth:`add_grad_` does; the next call may overwrite the tensor that is returned."""
        self._step_version = None
        self._bound.follow_replaced()
        allowed = None if parameters is None else {id(p) for p in parameters}
        if self._code is not None and not isinstance(scale, Tensor):
            factor = self.coefficient * scale
            value = self._norms.penalise_(self._code, self._level, factor, advance, allowed)
            if value is not None:
                return value
        return self._add_grad_in_parts_(scale, advance, allowed)

    @torch.no_grad()
    @without_autocast()
    def _add_grad_in_parts_(self, scale: float | Tensor, advance: bool, allowed: set[int] | None) -> Tensor:
        """Iterate, take the derivative in the L spectral norms, and add the gradients, one after the other."""
        step = self._norms.step() if advance else self._norms.current()
        sigma = in_double(step.sigma)
        with torch.enable_grad():
            log_sigma = sigma.log().requires_grad_()
            value = self.penalty_of(log_sigma)
            self._check(value, log_sigma)
            slope = torch.autograd.grad(value, log_sigma)[0] if value.requires_grad else torch.zeros_like(sigma)
        coefficients = slope / sigma * (self.coefficient * scale)
        coefficients = torch.where(coefficients.isfinite(), coefficients, torch.zeros_like(coefficients))
        self._add_norm_gradients_(coefficients.to(step.sigma.dtype), step, allowed)
        return (value.detach() * (self.coefficient * scale)).to(step.sigma.dtype)

    def _check(self, value: Tensor, log_sigma: Tensor) -> None:
        """Check a penalty of the user's own at the first step; later ones may return a constant."""
        if not self._is_checked:
            check_value(self._penalty, value, log_sigma)
            self._is_checked = True

    def _add_norm_gradients_(self, coefficients: Tensor, step: kernels.PowerStep, allowed: set[int] | None) -> None:
        """Add ``c_l`` times the gradient of the norm of each trainable layer."""
        grads: list[Tensor | None] = [None] * len(self.operators)
        # On the CPU a look at the numbers waits for nothing.
        on_host = coefficients.device.type == "cpu"
        factors = coefficients.tolist() if on_host else coefficients.unbind()
        products = torch.where(coefficients == 0, 0.0, coefficients * step.sigma)  # no 0 * NaN
        slopes = products.tolist() if on_host else products.unbind()
        for index, op in enumerate(self.operators):
            rest = [p for p in self.penalised(op) if p.requires_grad and (allowed is None or id(p) in allowed)]
            left, right = step.left[index], step.right[index]
            weight = op.written_parameter
            if weight is not None and any(p is weight for p in rest):
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                grads[index] = op.gradient_view(weight.grad)
                if grads[index] is not None:
                    rest = [p for p in rest if p is not weight]
            if isinstance(op, ScaledOperator) and op.gain is not None and any(p is op.gain for p in rest):
                slope = slopes[index]
                op.add_gain_gradient_(slope.to(left) if isinstance(slope, Tensor) else slope, left)
                rest = [p for p in rest if p is not op.gain]
            if rest:
                factor = factors[index].to(left) if isinstance(factors[index], Tensor) else factors[index]
                op.add_norm_gradients_(factor, left, right, rest)
        self._norms.rank_one_update_(grads, coefficients)

    def penalty_of(self, log_sigma: Tensor) -> Tensor:
        """Return the penalty without its coefficient for given log spectral norms.

        Args:
            log_sigma: Shape (L,), one entry an operator.

        Returns:
            The penalty, shape ().

        Raises:
            ValueError: If a penalty of the user's own does not return a floating-point tensor of shape ().
        """
        return scalar(self._penalty(repeated(log_sigma, self._multiplicities), self.log_bound_of(log_sigma)))
