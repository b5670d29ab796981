"""Accuracy under every perturbation of a given size, certified by a Lipschitz constant; and the error of a regression.

A classifier whose logits have Lipschitz constant L (l2 norms) keeps its prediction under every perturbation of norm at
most eps if the margin, the top logit less the second, exceeds ``sqrt(2) L eps``: the difference of two logits has
Lipschitz constant ``sqrt(2) L`` (Tsuzuku et al. 2018). If the last layer is ``W z + b`` and the rest has constant
L_feat, the difference of logits i and j has the constant ``|w_i - w_j| L_feat``, which is tighter (Leino et al. 2021).

The results are *certified* if the Lipschitz constant is a certificate (``certify(...).upper``). They hold for the
network in exact arithmetic: the rounding of its own forward pass is not accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_lip.checks import check_integers, check_levels, check_tensor, is_finite_number, shown
from lightning_lip.metrics.plotting import plot_levels

# More than the relative rounding error of a threshold: a product of four factors, and of a scaled difference's norm.
_SLACK = 16 * 2.0**-53

_SQRT2 = math.sqrt(2)
"""It is rounded up."""


def certified_accuracy(
    logits: Tensor,
    target: Tensor,
    lipschitz: float | Tensor,
    radius: float | Sequence[float],
    last_weight: Tensor | None = None,
    output_lipschitz: float | Tensor | None = None,
) -> Tensor:
    """Return the share of samples that are classified correctly under every perturbation of norm at most `radius`.

    A sample counts if, for each class j other than its target y, ``logit_y - logit_j`` exceeds
    ``sqrt(2) lipschitz radius`` or, with `last_weight`, ``|w_y - w_j| lipschitz radius``. Ties, NaN and infinite
    logits do not count. Thresholds are formed in fp64 and rounded up.

    Args:
        logits: (B, C), floating point, C >= 2.
        target: (B,), integer classes in [0, C).
        lipschitz: The Lipschitz constant (an upper bound) of the map from inputs to logits; with `last_weight`, of
            the map from inputs to the last layer's inputs.
        radius: The norm eps of the perturbation, or R of them; at least 0.
        last_weight: The last layer's weight, (C, d), for the pairwise form.
        output_lipschitz: With `last_weight`, a Lipschitz constant of the map from inputs to logits too, which serves
            the pairs for which it is the smaller one.

    Returns:
        Tensor of shape (), or (R,) for a sequence of radii, float32.

    Raises:
        TypeError: Where logits are not floating point or the target is not integer.
        ValueError: For shapes, classes, radii or a Lipschitz constant other than stated above.
        RuntimeError: For an empty batch.

    Example:
        >>> import torch
        >>> from lightning_lip.metrics.certified_accuracy import certified_accuracy
        >>> logits = torch.tensor([[3.0, 0.0], [1.0, 0.5], [0.0, 2.0]])
        >>> certified_accuracy(logits, torch.tensor([0, 0, 0]), lipschitz=1.0, radius=[0.0, 0.5])
        tensor([0.6667, 0.3333])
    """
    radii = _check_radius(radius)
    certified, total = _update(logits, target, lipschitz, radii, last_weight, output_lipschitz)
    value = _compute(certified, torch.tensor(total, device=certified.device))
    return value if isinstance(radius, Sequence) else value[0]


def certified_radii(
    logits: Tensor,
    target: Tensor,
    lipschitz: float | Tensor,
    last_weight: Tensor | None = None,
    output_lipschitz: float | Tensor | None = None,
) -> Tensor:
    """Return for each sample the norm of perturbations up to which it is certified, in fp32, rounded down.

    Samples that are not classified correctly, or hold NaN or an infinity, have 0. Infinite where no perturbation moves
    the logits against each other.

    Args:
        logits: As in :func:`certified_accuracy`, as are the other arguments.
        target: (B,).
        lipschitz: The Lipschitz constant.
        last_weight: (C, d), for the pairwise form.
        output_lipschitz: With `last_weight`, a constant of the map to the logits too.

    Returns:
        The radii, shape (B,), float32: :func:`certified_accuracy` counts a sample at its radius, unless that is 0.

    Raises:
        TypeError: As :func:`certified_accuracy`.
        ValueError: As :func:`certified_accuracy`.

    Example:
        >>> import torch
        >>> from lightning_lip.metrics.certified_accuracy import certified_radii
        >>> certified_radii(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]), lipschitz=1.0)
        tensor([2.1213, 0.0000])
    """
    pairs = _pairs(logits, target, lipschitz, last_weight, output_lipschitz)
    # The slack once more, for the rounding of the quotient and of the threshold that it is to stay below.
    slopes = [slopes * (constant * slack * (1 + _SLACK)) for slopes, constant, slack in pairs.bounds]
    slope = slopes[0] if len(slopes) == 1 else torch.minimum(*slopes)
    radii = torch.where(pairs.margins > 0, pairs.margins / slope, 0.0)
    radii = torch.where(pairs.is_own, math.inf, radii).amin(1)
    radii = torch.where(pairs.is_finite & ~radii.isnan(), radii, 0.0)  # NaN: of weights that are not finite
    rounded = radii.float()
    return torch.where(rounded > radii, rounded.nextafter(torch.zeros_like(rounded)), rounded).to(logits.device)


@overload
def certified_worst_case_mae(mae: float, lipschitz: float, noise_norm: float, n_outputs: int = 1) -> float: ...


@overload
def certified_worst_case_mae(mae: Tensor, lipschitz: float, noise_norm: float, n_outputs: int = 1) -> Tensor: ...


def certified_worst_case_mae(
    mae: float | Tensor, lipschitz: float, noise_norm: float, n_outputs: int = 1
) -> float | Tensor:
    """Return ``mae + lipschitz noise_norm / sqrt(n_outputs)``: the mean absolute error under the worst perturbation.

    Each sample's input may move by at most `noise_norm` in the l2 norm. With one output the error grows by at most
    ``L noise_norm``; the mean over m outputs by ``|.|_1 / m <= |.|_2 / sqrt(m)``. For the noise of
    :func:`noisy_mean_absolute_error` at level eta, `noise_norm` is at most ``eta |x_max - x_min|``.

    Args:
        mae: The mean absolute error on the clean inputs.
        lipschitz: The Lipschitz constant (an upper bound) of the network, finite, at least 0.
        noise_norm: The largest l2 norm of a perturbation, finite, at least 0.
        n_outputs: The number m of outputs a sample that the mean is taken over.

    Returns:
        An upper bound, a float for a float, rounded up; a tensor for a tensor.

    Raises:
        ValueError: If a number is not finite or negative, or `n_outputs` below 1.

    Example:
        >>> from lightning_lip.metrics.certified_accuracy import certified_worst_case_mae
        >>> round(certified_worst_case_mae(0.5, lipschitz=2.0, noise_norm=0.25), 6)
        1.0
    """
    _check_constant("mae", mae)
    lipschitz, noise_norm = _check_constant("lipschitz", lipschitz), _check_constant("noise_norm", noise_norm)
    check_integers(1, n_outputs=n_outputs)
    growth = lipschitz * noise_norm / math.sqrt(n_outputs) * (1 + _SLACK)
    return mae + growth if isinstance(mae, Tensor) else math.nextafter(mae + growth, math.inf)


class CertifiedAccuracy(Metric):
    """Accuracy under every perturbation of norm at most `radius`, certified by a Lipschitz constant.

    ``update`` and ``forward`` take

    - ``logits`` (:class:`~torch.Tensor`): (B, C), floating point, C >= 2;
    - ``target`` (:class:`~torch.Tensor`): (B,), integer classes;
    - ``lipschitz``: an upper bound of the Lipschitz constant, which training changes from epoch to epoch;
    - ``last_weight`` (optional): the last layer's weight (C, d), for the pairwise form; `lipschitz` is then the
      constant of the map from inputs to the last layer's inputs;
    - ``output_lipschitz`` (optional, with `last_weight`): one of the map from inputs to logits too, which serves the
      pairs for which it is the smaller one.

    ``compute`` returns a tensor of shape (), or (R,) for a sequence of radii: the share of samples that are certified,
    see :func:`certified_accuracy`. At radius 0 that is the accuracy. Raises RuntimeError where no sample was seen. The
    states are counts, summed over ranks.

    Args:
        radius: The norm eps of the perturbation, or R of them; finite, at least 0.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: Where logits are not floating point or the target is not integer.
        ValueError: For shapes, classes, radii or a Lipschitz constant other than stated above.

    Example:
        >>> import torch
        >>> from lightning_lip.metrics.certified_accuracy import CertifiedAccuracy
        >>> metric = CertifiedAccuracy(radius=0.5)
        >>> metric.update(torch.tensor([[3.0, 0.0], [1.0, 0.5]]), torch.tensor([0, 0]), lipschitz=1.0)
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    certified: Tensor
    total: Tensor

    def __init__(self, radius: float | Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.radii = _check_radius(radius)
        self._scalar = not isinstance(radius, Sequence)
        self.add_state("certified", torch.zeros(len(self.radii), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        logits: Tensor,
        target: Tensor,
        lipschitz: float | Tensor,
        last_weight: Tensor | None = None,
        output_lipschitz: float | Tensor | None = None,
    ) -> None:
        """Count the certified samples of one batch."""
        certified, total = _update(logits, target, lipschitz, self.radii, last_weight, output_lipschitz)
        # Out of place: states made in inference mode stay usable after it.
        self.certified = self.certified + certified
        self.total = self.total + total

    def compute(self) -> Tensor:
        """Share of certified samples over all batches and ranks, shape () or (R,)."""
        value = _compute(self.certified, self.total)
        return value[0] if self._scalar else value

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plot one value, over the radii if there are several, or a list of values over steps.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of these; ``compute()`` where it is None.
            ax: matplotlib axes to draw on; new ones where it is None.

        Returns:
            The figure (None where ``ax`` was given) and the axes.

        Raises:
            ModuleNotFoundError: where matplotlib is not installed.

        Example:
            >>> import torch
            >>> from lightning_lip.metrics.certified_accuracy import CertifiedAccuracy
            >>> metric = CertifiedAccuracy(radius=[0.0, 0.1, 0.2])
            >>> metric.update(torch.randn(10, 3), torch.randint(3, (10,)), lipschitz=2.0)
            >>> fig, ax = metric.plot()
        """
        if self._scalar:
            return self._plot(val, ax)
        return plot_levels(self, val, ax, self.radii, "eps", "radius")


_HINT = {
    "mae": "",
    "noise_norm": "",
    "lipschitz": ": pass an upper bound such as certify(...).upper; where nothing is certified there is none",
    "output_lipschitz": "",
}


class _Pairs(NamedTuple):
    """What decides whether samples are certified: their margins, and how fast these fall.

    Attributes:
        margins: ``logit_y - logit_j``, (B, C), fp64.
        is_own: Where j is the sample's class, (B, C).
        is_finite: Whether all of a sample's logits are, (B,).
        bounds: Lipschitz constants of the margins, each as a slope that broadcasts to (B, C), a factor of it, and what
            covers the rounding of their product. Each holds.
    """

    margins: Tensor
    is_own: Tensor
    is_finite: Tensor
    bounds: list[tuple[Tensor, float, float]]


def _pairs(
    logits: Tensor,
    target: Tensor,
    lipschitz: float | Tensor,
    last_weight: Tensor | None,
    output_lipschitz: float | Tensor | None,
) -> _Pairs:
    _check_batch(logits, target)
    constant = _check_constant("lipschitz", lipschitz)
    n_classes = logits.shape[1]
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device
    scores, classes = logits.detach().to(device, torch.float64), target.detach().to(device, torch.int64)
    margins = scores.gather(1, classes[:, None]) - scores
    root = scores.new_full((1, 1), _SQRT2)
    if last_weight is None:
        bounds = [(root, constant, 1 + _SLACK)]
    else:
        check_tensor("last_weight", last_weight)
        if last_weight.dim() != 2 or last_weight.shape[0] != n_classes or not last_weight.numel():
            raise ValueError(
                f"expected last_weight of shape ({n_classes}, d) for logits of shape {tuple(logits.shape)}, got "
                f"{tuple(last_weight.shape)}"
            )
        slopes = _pairwise_norms(last_weight.detach().to(device, torch.float64), classes)
        bounds = [(slopes, constant, 1 + _SLACK + 2.0**-52 * last_weight.shape[1])]
    if output_lipschitz is not None:
        bounds.append((root, _check_constant("output_lipschitz", output_lipschitz), 1 + _SLACK))
    is_own = torch.arange(n_classes, device=device) == classes[:, None]
    return _Pairs(margins, is_own, scores.isfinite().all(dim=1), bounds)


def _update(
    logits: Tensor,
    target: Tensor,
    lipschitz: float | Tensor,
    radii: tuple[float, ...],
    last_weight: Tensor | None,
    output_lipschitz: float | Tensor | None,
) -> tuple[Tensor, int]:
    """Number of certified samples per radius, shape (R,), int64, and the number of samples."""
    pairs = _pairs(logits, target, lipschitz, last_weight, output_lipschitz)
    certified = []
    for eps in radii:
        # Each is a threshold: the least serves.
        thresholds = [slopes * _growth(constant, eps, slack) for slopes, constant, slack in pairs.bounds]
        threshold = thresholds[0] if len(thresholds) == 1 else torch.minimum(*thresholds)
        certified.append((pairs.is_finite & ((pairs.margins > threshold) | pairs.is_own).all(dim=1)).sum())
    return torch.stack(certified).to(logits.device), len(target)


def _growth(constant: float, eps: float, slack: float) -> float:
    """Return ``constant eps`` rounded up, by the slack of what it is multiplied with too.

    Where fp64 underflows, the slack does not cover the rounding, but the next number does. A zero is exact.
    """
    return math.nextafter(constant * eps * slack, math.inf) if constant and eps else 0.0


def _compute(certified: Tensor, total: Tensor) -> Tensor:
    if total == 0:
        raise RuntimeError("no sample was seen, so there is no certified accuracy: call update with a batch first")
    return certified / total


def _pairwise_norms(weight: Tensor, classes: Tensor) -> Tensor:
    """Return ``|w_y - w_j|`` for each sample's class y and all j, shape (B, C)."""
    if not classes.numel():
        return weight.new_zeros(0, weight.shape[0])
    present = sorted(set(classes.tolist()))
    row = torch.searchsorted(torch.tensor(present, device=classes.device), classes)
    # One class at a time: all differences at once would need memory for C^2 d numbers.
    return torch.stack([row_norms(weight - weight[y]) for y in present])[row]


def row_norms(rows: Tensor) -> Tensor:
    """Return the norm of each row, at least the true one less a relative `_SLACK`, also where squares underflow."""
    largest = rows.abs().amax(dim=1)
    norms = largest * torch.linalg.vector_norm(rows / largest[:, None], dim=1)
    # A row of zeros gives 0 / 0. The next number covers the rounding to a subnormal one.
    return torch.where(largest == 0, largest, norms.nextafter(torch.full_like(norms, math.inf)))


def _check_constant(name: str, value: float | Tensor) -> float:
    """Return a number of at least 0, or a tensor of one, as a float."""
    plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
    if not is_finite_number(plain) or plain < 0:
        raise ValueError(f"expected {name} as a finite number of at least 0, got {shown(value)}{_HINT[name]}")
    return float(plain)


def _check_radius(radius: float | Sequence[float]) -> tuple[float, ...]:
    return check_levels("radius", radius if isinstance(radius, Sequence) else (radius,), distinct=False)


def _check_batch(logits: Tensor, target: Tensor) -> None:
    check_tensor("logits", logits)
    check_tensor("target", target)
    if not logits.is_floating_point():
        raise TypeError(f"expected floating-point logits, got {logits.dtype}: pass scores, not predicted classes")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"expected target as integer classes, got {target.dtype}")
    if logits.ndim != 2 or logits.shape[1] < 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            "expected logits of shape (batch, classes) with at least 2 classes and target of shape (batch,), got "
            f"{tuple(logits.shape)} and {tuple(target.shape)}: a single logit z is the pair (0, z)"
        )
    if target.numel() and not (int(target.min()) >= 0 and int(target.max()) < logits.shape[1]):
        raise ValueError(
            f"expected classes from 0 to {logits.shape[1] - 1}, got {int(target.min())} to {int(target.max())}: leave "
            "out samples of other classes"
        )
