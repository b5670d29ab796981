"""Certify a network: a rigorous upper bound of its Lipschitz constant, a measured lower bound, and their parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_lip.certificates.chains import chain_of
from lightning_lip.certificates.contradiction import contradiction
from lightning_lip.certificates.jacobians import largest_jacobian_norm
from lightning_lip.checks import check_callable, check_floating, check_integers, check_model, check_number, check_type
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import GraphNode, NetworkBound
from lightning_lip.graph.program import log_up
from lightning_lip.kernels.tensors import without_autocast
from lightning_lip.models.inputs import BatchDim, check_batch_dim
from lightning_lip.models.modules import parametrizations_uncached, state_kept
from lightning_lip.models.sharding import refuse_sharded
from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.composed import ScaledOperator
from lightning_lip.operators.known import operator_of
from lightning_lip.rigorous.chain import chain_cost, combettes_pesquet, eclipse_fast
from lightning_lip.rigorous.matrix import certified_matrix_norm
from lightning_lip.rigorous.operators import certified_norm
from lightning_lip.rigorous.rounding import exp_up, multiply_up

__all__ = ["Certificate", "Method", "Part", "Uncertified", "certified_matrix_norm", "certify"]

Method = Literal["product", "graph", "combettes_pesquet", "eclipse_fast"]
"""How an upper bound was found: the product over a chain, the rules over a graph, or a bound of `chain_bounds`."""

N_ITERATIONS = 14
"""Block iterations for the estimates, after the 15 of every new block."""

AUTOGRAD_ERROR = 1e-6
"""What a measured slope may be wrong by, relative: in fp64 too autograd multiplies by constants rounded to fp32 (1/6 of
hardsigmoid, off by 3e-8), once for each such activation in a chain."""


@dataclass(frozen=True)
class Part:
    """One operator of a network and its part in the bound.

    Attributes:
        name: The layer's name in the model.
        kind: The type of its module.
        operator: The type of the operator.
        sigma: *Estimate (from below)* of its spectral norm; None where it was not computed.
        certified: *Certified upper bound* of its spectral norm; None where there is none.
        multiplicity: How often the network applies it.
        constant: The fixed factor that stands beside the norm wherever it is applied (the largest of them), 1 for a
            plain layer; None without a graph. Activations and poolings have their own entries in the graph.
        slope: d log(bound) / d log(sigma): the multiplicity in a chain, less in a branch; None without a bound.
        share: ``slope log(certified) / log(bound)``, its share of the logarithm of the product or graph bound; None
            where that is 0 or not finite.
    """

    name: str
    kind: str
    operator: str
    sigma: float | None
    certified: float | None
    multiplicity: int
    constant: float | None = None
    slope: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class CertifiedHead:
    """The last linear layer, and what is certified about all before it, for pairwise certificates of a classifier.

    The difference of logits i and j has the constant ``|w_i - w_j| features``: see
    :func:`~lightning_lip.metrics.certified_accuracy`.

    Attributes:
        name: The layer's name in the model.
        weight: Its weight, (C, d), as it was.
        features: The *certified upper bound* of the map from inputs to the layer's inputs, rounded up.
    """

    name: str
    weight: Tensor
    features: float


@dataclass(frozen=True)
class _Result:
    """What both results hold.

    Attributes:
        lower: *Lower bound*, the largest Jacobian norm over the data, true up to rounding in fp64, and in fp32 for what
            autograd multiplies by fp32 constants (hardsigmoid); None without data.
        estimate: The graph bound at the *estimated* norms of the operators at the input's size, convolutions too: an
            estimate of that bound, which the certified `upper` may lie below; None where the network has no bound.
        parts: The operators in forward order.
        graph: Every operation of the traced forward pass, with its rule and constant; empty if it was refused.
    """

    lower: float | None
    estimate: float | None
    parts: tuple[Part, ...]
    graph: tuple[GraphNode, ...]


@dataclass(frozen=True)
class Certificate(_Result):
    """A certified interval of a network's Lipschitz constant.

    It holds for the network in exact arithmetic with the weights as they are stored, in eval mode, at the traced input
    size, over all of input space, in Euclidean norms; for constants of :func:`~lightning_lip.register_constant` as
    stated there. The rounding error of a weight that is computed from stored tensors is proven for weight normalisation
    and elementwise functions, and measured otherwise: see :func:`~lightning_lip.rigorous.evaluation.evaluated`.

    Attributes:
        upper: The *certified upper bound*, rounded up; inf where it exceeds the largest float.
        log_upper: An upper bound of its logarithm, finite then too; -inf for a constant network.
        tighter: The method that gave `upper`.
        bounds: Every certified upper bound that was computed, by method.
        skipped: Methods for chains that were left out although the network is one, and why.
        head: The last linear layer, where the network ends in one on features (B, d), with a weight that is stored as
            it is, but for a log-softmax; or the one that `head` named. Else None.
        refused: Empty.
        certified: True.
    """

    upper: float
    log_upper: float
    tighter: Method
    bounds: Mapping[Method, float]
    skipped: tuple[str, ...] = ()
    head: CertifiedHead | None = field(default=None, compare=False, repr=False)
    refused: tuple[str, ...] = field(default=(), init=False)
    certified: ClassVar[Literal[True]] = True


@dataclass(frozen=True)
class Uncertified(_Result):
    """No upper bound: something in the network has no known or no finite Lipschitz constant.

    Attributes:
        refused: What could not be certified, by name, and why.
        upper: None.
        certified: False.
    """

    refused: tuple[str, ...]
    upper: None = field(default=None, init=False)
    certified: ClassVar[Literal[False]] = False


@torch.inference_mode(False)
@without_autocast()
@parametrizations_uncached()
def certify(
    model: nn.Module,
    example_input: object,
    data: Tensor | Iterable[Any] | None = None,
    *,
    batch_dim: BatchDim = 0,
    head: nn.Module | None = None,
    max_inputs: int = 256,
    jacobian_dtype: torch.dtype = torch.float64,
    max_chain_flops: float = 1e12,
    on_layer: Callable[[str, int], None] | None = None,
) -> Certificate | Uncertified:
    """Return a certified interval of a network's Lipschitz constant, or what cannot be certified.

    The upper bound is the smallest of: the bound over the traced graph with certified spectral norms (Cholesky
    certificates for matrices, frequency grids for convolutions); and for a plain chain of linear layers and
    activations the bounds of Combettes & Pesquet (2020) and, if no slope is negative, ECLipsE-Fast (2024). The model
    is left as it was; the work on the upper bound is done in fp64 on the CPU.

    The graph is that of a batch of two in eval mode: a forward pass that depends on the size of the batch is taken at
    two. Eval mode is set by the modules' flags; a ``train`` method of your own, one that merges weights for evaluation,
    say, is not called, since it would change the weights: call ``model.eval()`` before.

    Args:
        model: The network, a LightningModule as well; eval semantics.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments, with the batch along
            each tensor's first dimension.
        data: Inputs to measure the lower bound on: a tensor (N, *features) or an iterable of batches, each a tensor,
            an (inputs, target) pair, or of the structure of `example_input`.
        batch_dim: None says that there is no batch: the whole input is one sample, as the nodes of a graph are, and so
            is each batch of `data`. The norms are then over all elements of each tensor.
        head: The last linear layer, where the network does not end in it, for :attr:`Certificate.head`.
        max_inputs: Only the first so many inputs of `data` are used.
        jacobian_dtype: What the network is evaluated in for the lower bound; fp32 for one that does not run in fp64.
        max_chain_flops: The bounds for chains are left out where they need more floating-point operations.
        on_layer: Called with a layer's name and the number of all layers before the layer's norm is certified, which
            is where the time goes.

    Returns:
        A :class:`Certificate`, or an :class:`Uncertified` with the reasons; ``.certified`` tells them apart.

    Raises:
        ValueError: If `example_input` has no batch dimension or the forward pass fails on it, `data` is empty or not
            finite, or `head` is no linear layer of the network with a stored weight.
        UnsupportedLayerError: If the model is sharded (FSDP2, tensor parallel).
        TypeError: If the model is no module, or `data` is not of one of these forms.

    Example:
        >>> import torch
        >>> from lightning_lip.certificates import certify
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> result = certify(model, torch.zeros(1, 4), data=torch.randn(16, 4))
        >>> result.certified, result.lower <= result.upper
        (True, True)
    """
    check_model(model, "certify")
    check_integers(1, max_inputs=max_inputs)
    check_batch_dim(batch_dim)
    if on_layer is not None:
        check_callable("on_layer", on_layer, "(name, number of layers) -> None", 2)
    if head is not None:
        check_type("head", head, nn.Module, "a layer of the model")
    if not (isinstance(max_chain_flops, float) and max_chain_flops == math.inf):
        max_chain_flops = check_number("max_chain_flops", max_chain_flops)
    check_floating("jacobian_dtype", jacobian_dtype)
    refuse_sharded(
        model,
        "certify",
        "Certify a checkpoint in one process, saved whole by ModelParallelStrategy(save_distributed_checkpoint=False).",
    )
    lower = None
    if data is not None:
        lower = largest_jacobian_norm(
            model, data, example_input, batch_dim=batch_dim, max_inputs=max_inputs, dtype=jacobian_dtype
        )
    try:
        network = NetworkBound.trace(model, example_input, batch_dim)
    except UnsupportedLayerError as error:
        with state_kept(model):
            parts = _parts_without_graph(model, on_layer)
        return Uncertified(lower, None, parts, (), _reasons(error))
    graph = tuple(network.explain())
    sigmas = _estimates(network.operators)
    certified, refused = _certified_norms(network.operators, on_layer)
    log_estimate = float(network.log_bound(_logs(sigmas)))
    estimate = None if math.isnan(log_estimate) else _exp(log_estimate)
    constants = [max((n.constant for n in graph if n.operator == op.name), default=1.0) for op in network.operators]
    if refused:
        parts = tuple(map(_part, network.operators, sigmas, certified, constants))
        return Uncertified(lower, estimate, parts, graph, refused)
    norms = [norm for norm in certified if norm is not None]
    log_bound = network.log_bound_up(norms)
    _, slopes = network.log_bound_and_slopes(_logs(norms))
    bounds, skipped = _bounds(network, exp_up(log_bound), max_chain_flops)
    tighter = min(bounds, key=lambda method: bounds[method])
    upper = bounds[tighter]
    log_upper = min(log_bound, log_up(upper)) if upper < math.inf else log_bound
    parts = tuple(
        _part(operator, sigma, norm, constant, slope, log_bound)
        for operator, sigma, norm, constant, slope in zip(
            network.operators, sigmas, norms, constants, slopes.tolist(), strict=True
        )
    )
    reason = _contradiction(lower, upper, jacobian_dtype) or contradiction(network, example_input, upper)
    if reason is not None:
        return Uncertified(lower, estimate, parts, graph, (reason,))
    last = _certified_head(network, head, norms)
    return Certificate(lower, estimate, parts, graph, upper, log_upper, tighter, bounds, skipped, last)


def _certified_head(network: NetworkBound, module: nn.Module | None, norms: Sequence[float]) -> CertifiedHead | None:
    head = network.head(module)
    # A computed weight is known up to rounding only.
    if head is None or head.matrix.owner is None:
        if module is not None:
            raise ValueError("Expected `head` to be a linear layer with a stored weight: its weight is computed.")
        return None
    weight: Tensor = head.matrix.compute().detach().clone()
    return CertifiedHead(head.name, weight, exp_up(network.log_bound_up(norms, head.features)))


def _reasons(error: UnsupportedLayerError) -> tuple[str, ...]:
    """Return the lines of a refusal that name one operation each, or the whole message."""
    lines = str(error).splitlines()
    return tuple(line.removeprefix("  - ") for line in lines if line.startswith("  - ")) or (str(error),)


def _parts_without_graph(model: nn.Module, on_layer: Callable[[str, int], None] | None) -> tuple[Part, ...]:
    """Return the layers whose operators are known without a graph, for the audit of a refused network."""
    operators = []
    for name, module in model.named_modules():
        try:
            operators.append(operator_of(module, name))
        except UnsupportedLayerError:
            continue
    norms, _ = _certified_norms(operators, on_layer)
    return tuple(map(_part, operators, _estimates(operators), norms))


def _estimates(operators: Sequence[LinearOperator]) -> list[float]:
    if not operators:
        return []
    norms = SpectralNorms(list(map(_with_fixed_scale, operators)), n_iterations=N_ITERATIONS, backend="reference")
    return [float(sigma) for sigma in norms.step().sigma]


def _with_fixed_scale(operator: LinearOperator) -> LinearOperator:
    """Return the operator with the scale that it has now, which each application would compute anew."""
    if not isinstance(operator, ScaledOperator):
        return operator
    scale = operator.scale().detach()
    return ScaledOperator(operator.base, operator.name, lambda: scale, operator.scale_parameters)


def _certified_norms(
    operators: Sequence[LinearOperator], on_layer: Callable[[str, int], None] | None
) -> tuple[list[float | None], tuple[str, ...]]:
    """Return the certified norms, None where there is none, and the reasons."""
    norms: list[float | None] = []
    refused = []
    for operator in operators:
        if on_layer is not None:
            on_layer(operator.name, len(operators))
        try:
            norms.append(certified_norm(operator))
        except ValueError as error:
            norms.append(None)
            refused.append(f"{operator.name} ({type(operator.module).__name__}): {error}")
    return norms, tuple(refused)


def _bounds(network: NetworkBound, bound: float, max_flops: float) -> tuple[dict[Method, float], tuple[str, ...]]:
    """Return every certified upper bound by method, and what was left out, why."""
    chain = chain_of(network.traced) if all(op.is_matrix for op in network.operators) else None
    if chain is None:
        return {"graph": bound}, ()
    bounds: dict[Method, float] = {"product": bound}
    skipped = []
    cost = chain_cost(chain.weights)
    if cost > max_flops:
        reason = f"it needs about {cost:.1g} floating-point operations, more than max_chain_flops={max_flops:g}"
        return bounds, (f"combettes_pesquet: {reason}", f"eclipse_fast: {reason}")
    bounds["combettes_pesquet"] = multiply_up(combettes_pesquet(chain.weights, chain.slopes), chain.outer)
    if all(low >= 0 for low, _ in chain.slopes):
        bounds["eclipse_fast"] = multiply_up(eclipse_fast(chain.weights, chain.slopes), chain.outer)
    else:
        skipped.append("eclipse_fast: it needs activations without negative slopes")
    return bounds, tuple(skipped)


def _part(
    operator: LinearOperator,
    sigma: float,
    certified: float | None,
    constant: float | None = None,
    slope: float | None = None,
    log_bound: float | None = None,
) -> Part:
    share = None
    if certified and slope is not None and log_bound and math.isfinite(log_bound) and math.isfinite(certified):
        share = slope * math.log(certified) / log_bound
    # The estimate is from below, but for its own rounding in fp32.
    sigma = sigma if certified is None else min(sigma, certified)
    return Part(
        operator.name,
        type(operator.module).__name__,
        type(operator).__name__,
        sigma,
        certified,
        operator.multiplicity,
        constant,
        slope,
        share,
    )


def _contradiction(lower: float | None, upper: float, dtype: torch.dtype) -> str | None:
    """Return why an interval that is empty beyond rounding cannot be true."""
    if lower is None or lower <= upper * (1 + max(AUTOGRAD_ERROR, math.sqrt(torch.finfo(dtype).eps))):
        return None
    return (
        f"the measured Jacobian norm {lower:.6g} exceeds the bound {upper:.6g}: a constant stated with "
        "register_constant is too small, or an input lies exactly at a kink, where autograd's choice is no derivative"
    )


def _logs(norms: Sequence[float]) -> Tensor:
    return torch.tensor(norms, dtype=torch.float64, device="cpu").log()


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
