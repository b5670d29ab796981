"""Cross-entropy against the worst perturbation that a Lipschitz bound allows, as a function of logits and bounds.

With K_ij a bound of how much the difference of logits i and j can move, the logits z of a sample of class y stay in
their order under every perturbation if ``z_y - z_j > K_yj`` for all j. The forms:

- ``"margin"``: ``CE(z_j + K_yj)``, Lipschitz-margin training (Tsuzuku, Sato & Sugiyama, 2018), with a bound of each
  pair;
- ``"emma"``: ``CE(z_j + e_j K_yj)`` with ``e_j = clip((z_y - z_j) / K_yj, 0.01, 1)``, a constant for the gradient
  (Hu et al., 2023): the perturbation grows with what the sample already withstands;
- ``"gloro"``: cross-entropy over one class more, of the logit ``max_{j != p} (z_j + K_pj)``, p the predicted class
  (Leino, Wang & Fredrikson, 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lip.checks import check_choice, check_integers, check_tensor, is_finite_number, shown
from lightning_lip.kernels.tensors import without_autocast

MarginForm = Literal["margin", "emma", "gloro"]
Reduction = Literal["mean", "sum", "none"]

LEAST_SHARE = 0.01
"""The least share of the bound that ``"emma"`` adds."""


def certified_margin_loss(
    logits: Tensor,
    target: Tensor,
    pairwise_bounds: Tensor,
    form: MarginForm = "margin",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy against the worst perturbation within bounds of the logits' differences.

    It is computed in fp32 (fp64 for fp64 logits), under autocast too, and differentiable in logits and bounds.

    Args:
        logits: z, (B, C), floating point, C >= 2.
        target: y, (B,), integer classes in [0, C), or `ignore_index`.
        pairwise_bounds: K, (C, C), at least 0, 0 on the diagonal: by how much the difference of logits i and j can
            move, ``eps ||w_i - w_j|| L`` say; or of shape (), the same for all pairs.
        form: ``"margin"``, ``"emma"`` or ``"gloro"``: see :mod:`lightning_lip.losses.margin`.
        weight: A factor for each class, (C,), as in ``torch.nn.functional.cross_entropy``.
        ignore_index: Samples with this target do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in ``torch.nn.functional.cross_entropy``.
        label_smoothing: As there: the share of the target that all classes get alike.

    Returns:
        The loss, shape (), or (B,) without a reduction.

    Raises:
        TypeError: For logits that are not floating point, or targets that are (probabilities of classes).
        ValueError: For shapes other than stated above, an unknown form or reduction, or a smoothing out of range.

    Example:
        >>> import torch
        >>> from lightning_lip.losses.margin import certified_margin_loss
        >>> logits, target = torch.tensor([[3.0, 0.0], [1.0, 0.5]]), torch.tensor([0, 0])
        >>> certified_margin_loss(logits, target, torch.tensor(0.5))
        tensor(0.3860)
    """
    check_choice("form", form, get_args(MarginForm))
    check_logits(logits, target)
    check_options(weight, ignore_index, reduction, label_smoothing)
    label_smoothing = float(label_smoothing)  # of a fraction, say
    check_tensor("pairwise_bounds", pairwise_bounds)
    n_classes = logits.shape[1]
    check_weight(weight, n_classes)
    if not pairwise_bounds.is_floating_point():
        raise TypeError(f"Expected `pairwise_bounds` as floating-point numbers, got {shown(pairwise_bounds)}.")
    if pairwise_bounds.shape not in ((), (n_classes, n_classes)):
        raise ValueError(
            f"Expected `pairwise_bounds` of shape () or ({n_classes}, {n_classes}), for each pair of classes, got "
            f"{tuple(pairwise_bounds.shape)}."
        )
    bounds = pairwise_bounds
    if bounds.dim() == 0:
        bounds = bounds * (1 - torch.eye(n_classes, dtype=bounds.dtype, device=bounds.device))
    options = Options(form, weight, ignore_index, reduction, label_smoothing)
    return loss_of(logits, target, lambda classes: bounds[classes], options)


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`certified_margin_loss` that do not change from call to call, checked."""

    form: MarginForm
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float


def loss_of(logits: Tensor, target: Tensor, bounds_of: Callable[[Tensor], Tensor], options: Options) -> Tensor:
    """Return what :func:`certified_margin_loss` does, of checked arguments.

    Args:
        logits: z, (B, C).
        target: y, (B,).
        bounds_of: Maps classes, shape (B,), to the rows of the bounds, shape (B, C).
        options: The other arguments.
    """
    with without_autocast():
        z = logits if logits.dtype == torch.float64 else logits.float()
        if options.form == "gloro":
            return _with_bottom(z, target, bounds_of, options)
        known = _known(target, options.ignore_index)
        moved = bounds_of(known).to(z.dtype)
        if options.form == "emma":
            share = (z.gather(1, known[:, None]) - z) / moved.clamp(min=torch.finfo(z.dtype).tiny)
            moved = moved * share.clamp(LEAST_SHARE, 1.0).detach()
        return _cross_entropy(z + moved, target, options, options.reduction)


def _cross_entropy(z: Tensor, target: Tensor, options: Options, reduction: str) -> Tensor:
    weight = None if options.weight is None else options.weight.to(z)
    return F.cross_entropy(
        z,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction=reduction,
        label_smoothing=options.label_smoothing,
    )


def _known(target: Tensor, ignore_index: int) -> Tensor:
    """Return the target with a class in place of `ignore_index`, which may be any number."""
    return target.clamp(min=0) if ignore_index < 0 else target.masked_fill(target == ignore_index, 0)


def _with_bottom(z: Tensor, target: Tensor, bounds_of: Callable[[Tensor], Tensor], options: Options) -> Tensor:
    """Return the cross-entropy over one class more: the usual ``-log p_c``, plus ``softplus(bottom - logsumexp)``."""
    top = z.argmax(1)
    is_top = F.one_hot(top, z.shape[1]).bool()
    bottom = (z + bounds_of(top).to(z.dtype)).masked_fill(is_top, -torch.inf).amax(1)
    usual = _cross_entropy(z, target, options, "none")
    weight = torch.ones_like(z[0]) if options.weight is None else options.weight.to(z)
    known, is_ignored = _known(target, options.ignore_index), target == options.ignore_index
    own = weight[known].masked_fill(is_ignored, 0.0)
    # The total weight of a smoothed target, which no longer is the class's own.
    smoothing = options.label_smoothing
    total = ((1 - smoothing) * weight[known] + smoothing * weight.mean()).masked_fill(is_ignored, 0.0)
    losses = usual + total * F.softplus(bottom - z.logsumexp(1))
    if options.reduction == "none":
        return losses
    return losses.sum() / own.sum() if options.reduction == "mean" else losses.sum()


def check_options(weight: object, ignore_index: object, reduction: object, label_smoothing: object) -> None:
    """Check the arguments that a cross-entropy has.

    Raises:
        TypeError: If one is of another type.
        ValueError: If one is out of range.
    """
    if weight is not None:
        check_tensor("weight", weight)
        if not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 1 and len(weight)):
            raise ValueError(f"Expected `weight` as floating-point factors, one for each class, got {shown(weight)}.")
    check_integers(-(2**63), ignore_index=ignore_index)
    check_choice("reduction", reduction, get_args(Reduction))
    if not is_finite_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"Expected `label_smoothing` to be a number from 0 to 1, got {shown(label_smoothing)}.")


def check_weight(weight: Tensor | None, n_classes: int) -> None:
    """Check that there is a factor for each class.

    Raises:
        ValueError: If there is not.
    """
    if weight is not None and weight.shape != (n_classes,):
        raise ValueError(f"Expected `weight` of shape ({n_classes},), a factor for each class, got {shown(weight)}.")


def check_logits(logits: Tensor, target: Tensor) -> None:
    """Check logits (B, C) and classes (B,).

    Raises:
        TypeError: For logits that are not floating point, or targets that are.
        ValueError: For other shapes.
    """
    check_tensor("logits", logits)
    check_tensor("target", target)
    if not logits.is_floating_point():
        raise TypeError(f"Expected `logits` as floating-point logits, got {shown(logits)}.")
    if logits.dim() > 2:
        raise ValueError(
            f"Expected logits of shape (B, C), got {tuple(logits.shape)}: dense predictions, a class for each pixel, "
            "have no margin loss here, since each output has a bound of its own."
        )
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"Expected `logits` of shape (B, C) with at least 2 classes, got {tuple(logits.shape)}: a single logit z "
            "is the pair (0, z)."
        )
    if target.is_floating_point() or target.dtype == torch.bool or target.shape == logits.shape:
        raise TypeError(
            f"Expected `target` as integer classes of shape (B,), got {shown(target)}: soft targets (probabilities of "
            "classes) have no margin; use label_smoothing, or the hard classes."
        )
    if target.shape != logits.shape[:1]:
        raise ValueError(
            f"Expected `target` of shape (B,), one class for each sample of `logits` {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}."
        )
