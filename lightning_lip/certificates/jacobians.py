"""The largest Jacobian norm of a network over data: a lower bound of its Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_lip.checks import check_finite, check_tensor, check_type
from lightning_lip.constants.modules import rms_eps
from lightning_lip.kernels.tensors import full_fp32, without_autocast
from lightning_lip.models.inputs import FAILURES, BatchDim
from lightning_lip.models.modules import eval_mode, parametrizations_uncached, state_kept

CHUNK = 64
"""Inputs of one forward pass."""

FEW_OUTPUTS = 32
"""Up to so many outputs a sample the whole Jacobian is formed."""

N_ITERATIONS = 30
"""Power iterations for networks with more outputs."""


def largest_jacobian_norm(
    model: nn.Module,
    data: Tensor | Iterable[Any],
    example_input: object = None,
    *,
    batch_dim: BatchDim = 0,
    max_inputs: int = 256,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Return the largest spectral norm of the Jacobian over inputs: a *lower bound* of the Lipschitz constant.

    It is true up to the rounding of `dtype`, at every input where the network is differentiable; at a kink (a ReLU
    exactly at 0) autograd chooses a derivative. Up to 32 outputs a sample the Jacobian is formed; with more, 30 power
    iterations come close to its norm from below. The network is evaluated with eval semantics on copies of its
    parameters and buffers; samples of a batch must not influence each other.

    Args:
        model: The network; its output is a tensor (B, *outputs). It is left as it was.
        data: A tensor (N, *features), or an iterable of batches such as a DataLoader: each a tensor, an (inputs,
            target) pair, or, for a network of several inputs, of the structure of `example_input`.
        example_input: A tensor, a tuple of arguments or a dict of keyword arguments; tells how to call the network.
        batch_dim: None says that each batch of `data` is one sample as a whole, and a tensor `data` too.
        max_inputs: Only the first so many inputs are used.
        dtype: What the network is evaluated in; fp32 for one that does not run in fp64.

    Returns:
        The largest norm, in the l2 norm over all inputs of a sample together.

    Raises:
        TypeError: If the inputs are not floating point, or the output is not one tensor.
        ValueError: If there is no data, or a Jacobian is not finite.
    """
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type == "mps":
        device = torch.device("cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    largest, seen = -math.inf, 0
    # Compiled code has no second derivative.
    eager = torch.compiler.set_stance("force_eager")
    kept = state_kept(model), parametrizations_uncached()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        without_autocast(),
        full_fp32(),
        eval_mode(model),
        eager,
        kept[0],
        kept[1],
    ):
        state = {name: _cast(tensor, device, dtype) for name, tensor in _named_tensors(model)}
        for names, tensors in _chunks(data, example_input, batch_dim, max_inputs):
            inputs = [_cast(tensor, device, dtype) for tensor in tensors]
            for tensor in inputs:
                if not tensor.is_floating_point():
                    raise TypeError(
                        f"Expected floating-point inputs in `data`, got {tensor.dtype}: a network has no Jacobian with "
                        "respect to integers; start at the embedding's output."
                    )
                check_finite("data", tensor)
                tensor.requires_grad_()
            # Copies, because a network may change its input in place, which a leaf refuses.
            copies = [tensor.clone() for tensor in inputs]
            arguments: tuple[Any, ...] = tuple(copies) if names is None else ()
            keywords = {} if names is None else dict(zip(names, copies, strict=True))
            own_dtype = next((p.dtype for p in parameters if p.is_floating_point()), tensors[0].dtype)
            try:
                # The fused attention kernels have no second derivative.
                with _OwnEps(rms_eps(None, own_dtype)), sdpa_kernel(SDPBackend.MATH):
                    outputs = torch.func.functional_call(model, state, arguments, keywords)
            except FAILURES as error:
                raise _not_measured(model, dtype, error) from error
            if not isinstance(outputs, Tensor):
                raise TypeError(f"Expected the network to return one tensor, got {type(outputs).__name__}.")
            if batch_dim is None:
                outputs = outputs.unsqueeze(0)
            n_samples = 1 if batch_dim is None else inputs[0].shape[0]
            if outputs.dim() == 0 or outputs.shape[0] != n_samples:
                raise TypeError(
                    f"Expected an output of shape (B, *outputs) for a batch of {n_samples}, got "
                    f"{tuple(outputs.shape)}. Where there is no batch, say batch_dim=None."
                )
            try:
                norms = _jacobian_norms(inputs, outputs, generator)
            # The network's backward pass may be its own.
            except FAILURES as error:
                raise _not_measured(model, dtype, error) from error
            if not norms.isfinite().all():
                raise ValueError("A Jacobian of the network is not finite: NaN or infinity in the data or the weights.")
            largest = max(largest, norms.max().item())
            seen += len(norms)
    if seen == 0:
        raise ValueError("No data to measure the lower bound on: expected at least one input.")
    return largest


def _not_measured(model: nn.Module, dtype: torch.dtype, error: Exception) -> ValueError:
    return ValueError(
        f"The Jacobian of {type(model).__name__} cannot be measured on the data in {dtype}: give other data, another "
        f"jacobian_dtype, or none. The reason: {type(error).__name__}: {error}"
    )


class _OwnEps(TorchFunctionMode):
    """Gives RMS normalisations without an eps that of the network's own dtype, not of the one it is evaluated in."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self._eps = eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.nn.functional.rms_norm, torch.rms_norm):
            return func(*args, **(kwargs or {}))
        names = ("input", "normalized_shape", "weight", "eps")
        arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        if arguments.get("eps") is None:
            arguments["eps"] = self._eps
        return func(**arguments)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _cast(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a leaf of its own, floating point in `dtype`, complex in its complex counterpart."""
    own = dtype.to_complex() if tensor.is_complex() else dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device, own, copy=True)


def _chunks(
    data: Tensor | Iterable[Any], example_input: object, batch_dim: BatchDim, max_inputs: int
) -> Iterator[tuple[list[str] | None, list[Tensor]]]:
    """Yield the keyword names (None for positional arguments) and the tensors of at most 64 inputs, or of one whole."""
    check_type("data", data, Iterable, "a tensor (N, *features) or an iterable of batches")
    if isinstance(data, Tensor):
        check_tensor("data", data)
    left = max_inputs
    for batch in [data] if isinstance(data, Tensor) else data:
        names, tensors = _arguments(batch, example_input)
        for tensor in tensors:
            check_tensor("data", tensor)
        if batch_dim is None:
            n_inputs = 1
            yield names, tensors
        else:
            n_inputs = tensors[0].shape[0] if tensors[0].dim() else 0
            for start in range(0, min(n_inputs, left), CHUNK):
                stop = min(start + CHUNK, left)
                yield names, [tensor[start:stop] for tensor in tensors]
        left -= n_inputs
        if left <= 0:
            return


def _arguments(batch: object, example_input: object) -> tuple[list[str] | None, list[Tensor]]:
    names = list(example_input) if isinstance(example_input, Mapping) else None
    n_arguments = len(example_input) if isinstance(example_input, (Mapping, tuple)) else 1
    if names is not None and isinstance(batch, Mapping):
        given: list[Any] = [batch.get(name) for name in names]
    elif n_arguments == 1 and isinstance(batch, Tensor):
        given = [batch]
    elif isinstance(batch, Sequence) and (names is None or n_arguments == 1):
        given = list(batch[:n_arguments])
    else:
        given = []
    tensors = [tensor for tensor in given if isinstance(tensor, Tensor)]
    if len(tensors) == n_arguments:
        return names, tensors
    raise TypeError(
        "Expected `data` as a tensor (N, *features) or an iterable of batches, each a tensor, an (inputs, target) pair "
        f"or of the structure of `example_input` ({type(example_input).__name__}), got a {type(batch).__name__}."
    )


def _jacobian_norms(inputs: Sequence[Tensor], outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return the spectral norm of each sample's Jacobian, shape (B,), for outputs of shape (B, ...)."""
    n_samples = len(outputs)
    if not outputs.requires_grad:
        return outputs.new_zeros(n_samples)
    if outputs.numel() == 0 or all(x.numel() == 0 for x in inputs):
        return outputs.new_zeros(n_samples)
    flat = outputs.reshape(n_samples, -1)

    def pulled_back(cotangents: Tensor, create_graph: bool = False) -> Tensor:
        gradients = torch.autograd.grad(
            flat, inputs, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        parts = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]
        return torch.cat([part.reshape(n_samples, -1) for part in parts], dim=1)

    if flat.shape[1] <= FEW_OUTPUTS:
        rows = []
        for index in range(flat.shape[1]):
            cotangents = torch.zeros_like(flat)
            cotangents[:, index] = 1
            rows.append(pulled_back(cotangents))
        return _norms_of_rows(torch.stack(rows, dim=1))
    # The adjoint is linear in its argument, so that its derivative in any direction is the Jacobian itself.
    seed = torch.zeros_like(flat).requires_grad_()
    adjoint = pulled_back(seed, create_graph=True)
    if not adjoint.requires_grad:
        return outputs.new_zeros(n_samples)
    directions = torch.randn(adjoint.shape, generator=generator, device="cpu").to(adjoint)
    norms = flat.new_zeros(n_samples)
    for _ in range(N_ITERATIONS):
        directions = _unit_rows(directions)[0]
        (images,) = torch.autograd.grad(adjoint, seed, directions, retain_graph=True)
        units, lengths = _unit_rows(images)
        norms = torch.maximum(norms, lengths)
        directions = pulled_back(units)
    return norms


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows divided by their norms, and the norms, without overflow; zeros stay zero, NaN stays NaN."""
    scale = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(scale == 0, torch.ones_like(scale), scale)
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(lengths == 0, torch.ones_like(lengths), lengths), (lengths * scale)[:, 0]


def _norms_of_rows(jacobians: Tensor) -> Tensor:
    """Return the spectral norms of (B, few, many), shape (B,); NaN where one is not finite."""
    scale = jacobians.abs().amax(dim=(1, 2), keepdim=True)
    usable = (scale > 0) & scale.isfinite()
    scaled = torch.where(usable, jacobians / torch.where(usable, scale, torch.ones_like(scale)), 0.0)
    largest = torch.linalg.eigvalsh(scaled @ scaled.mT)[:, -1].clamp(min=0).sqrt()
    return torch.where(scale[:, 0, 0].isfinite(), largest * scale[:, 0, 0], torch.nan)
