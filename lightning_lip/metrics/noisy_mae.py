"""Mean absolute error under uniform noise on the inputs, at several noise levels at once.

At noise level eta the network sees ``x + eta (x_max - x_min) u``, with ``x_min`` and ``x_max`` the range of each
feature and u uniform on [0, 1]: the one-sided noise of the paper's experiment. ``symmetric=True`` takes u uniform on
[-1, 1]. The value is a Monte Carlo *estimate* (one draw per sample) of the expected error, no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_lip.checks import (
    check_array,
    check_callable,
    check_flag,
    check_integers,
    check_levels,
    check_tensor,
    check_type,
    got,
    shown,
)
from lightning_lip.metrics.plotting import plot_levels

Range = float | Sequence[Any] | np.ndarray | Tensor
"""One bound of the feature range: a scalar, or anything that broadcasts to ``inputs.shape[1:]``."""


def feature_ranges(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Learn the range of every feature from batches of training inputs, in one pass.

    Args:
        batches: input tensors of shape (B, *features), of any real dtype, on any device.

    Returns:
        ``(feature_min, feature_max)``: float64 tensors of shape (*features) on the CPU, *exact* over the batches.

    Raises:
        TypeError: for a batch that is no tensor.
        ValueError: for no data at all, a NaN or an infinity, or feature shapes that differ between batches.

    Example:
        >>> import torch
        >>> from lightning_lip.metrics import feature_ranges
        >>> feature_ranges([torch.tensor([[0.0, 5.0], [1.0, 4.0]]), torch.tensor([[-2.0, 4.5]])])
        (tensor([-2.,  4.], dtype=torch.float64), tensor([1., 5.], dtype=torch.float64))
    """
    low: Tensor | None = None
    high: Tensor | None = None
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"expected batches to be an iterable of tensors, one a batch, got {shown(batches)}")
    for index, inputs in enumerate(batches):
        if not isinstance(inputs, Tensor) or inputs.ndim == 0:
            raise TypeError(
                f"expected training inputs of shape (batch, *features) in batches, got {got(inputs)} as batch {index}"
            )
        if inputs.shape[0] == 0:
            continue
        check_tensor(f"batches, batch {index}", inputs)
        batch_low = inputs.detach().amin(dim=0).to("cpu", torch.float64)
        batch_high = inputs.detach().amax(dim=0).to("cpu", torch.float64)
        # amin and amax propagate NaN, so the ranges tell as much as the whole batch
        if not (batch_low.isfinite().all() and batch_high.isfinite().all()):
            raise ValueError(
                f"the training inputs hold NaN or infinity (batch {index}), so they have no feature range: "
                "clean the data, or pass feature_min and feature_max"
            )
        if low is None or high is None:
            low, high = batch_low, batch_high
        elif low.shape != batch_low.shape:
            raise ValueError(
                f"expected training inputs with features of shape {tuple(low.shape)} as in the first batch, got "
                f"{tuple(batch_low.shape)} in batch {index}: pass feature_min and feature_max as scalars"
            )
        else:
            low, high = torch.minimum(low, batch_low), torch.maximum(high, batch_high)
    if low is None or high is None:
        raise ValueError(
            "no training inputs in batches to learn the feature ranges from: pass feature_min and feature_max"
        )
    return low, high


def noisy_mean_absolute_error(
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    target: Tensor,
    noise_levels: Sequence[float],
    feature_min: Range,
    feature_max: Range,
    *,
    symmetric: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean absolute error of ``predict`` at each noise level, from one forward of the stacked noisy batches.

    All levels share one draw of u, so that they differ by eta alone, and eta = 0 gives the clean error. u is drawn on
    the CPU in float32: the noise is the same on every device. Differentiable with respect to the predictions.

    Args:
        predict: any callable from inputs (L * B, *features) to predictions (L * B, *outputs), called once.
        inputs: (B, *features), floating point.
        target: (B, *outputs), the shape that ``predict`` gives for one level.
        noise_levels: the L levels eta, distinct, finite and not negative.
        feature_min: lower end of each feature, broadcastable to (*features), finite.
        feature_max: upper end, at least ``feature_min``.
        symmetric: draw u from U[-1, 1] instead of U[0, 1].
        generator: CPU generator of the noise; the global one where it is None.

    Returns:
        Tensor of shape (L,), in the dtype of the predictions, but float32 at least.

    Raises:
        TypeError: where inputs are not floating point, or predictions are no tensor.
        ValueError: for noise levels, feature ranges, NaN inputs or shapes other than stated above.
        RuntimeError: for an empty batch.

    Example:
        >>> import torch
        >>> from lightning_lip.metrics import noisy_mean_absolute_error
        >>> inputs = torch.tensor([[0.0], [1.0], [2.0]])
        >>> generator = torch.Generator().manual_seed(0)
        >>> noisy_mean_absolute_error(
        ...     lambda x: 3 * x, inputs, 3 * inputs, (0.0, 0.2, 0.4), 0.0, 2.0, generator=generator
        ... )
        tensor([0.0000, 0.5412, 1.0824])
    """
    levels = check_levels("noise_levels", noise_levels)
    low, high = check_feature_range(feature_min, feature_max)
    check_callable("predict", predict, "from inputs to predictions")
    check_flag("symmetric", symmetric)
    if generator is not None:
        check_type("generator", generator, torch.Generator, "a torch.Generator or None")
    sum_abs_error, total = _update(predict, inputs, target, levels, low, high, symmetric, generator)
    return _compute(sum_abs_error, torch.tensor(total, device=sum_abs_error.device))


class NoisyMeanAbsoluteError(Metric):
    """Mean absolute error of a network under uniform noise on its inputs, at several noise levels.

    ``update`` and ``forward`` take

    - ``predict``: any callable from inputs (L * B, *features) to predictions (L * B, *outputs), called once a batch;
    - ``inputs`` (:class:`~torch.Tensor`): (B, *features), floating point;
    - ``target`` (:class:`~torch.Tensor`): (B, *outputs).

    ``compute`` returns a tensor of shape (L,): the mean over samples and outputs of ``|predict(x + noise) - target|``
    for each noise level, see :func:`noisy_mean_absolute_error`. Raises RuntimeError where no sample was seen.

    The noise comes from a private generator, seeded by ``numpy.random.SeedSequence([seed, rank])`` at the first draw
    and after each ``reset()``: the same at every epoch (over the same batches in the same order), different on every
    rank, and neither touched by the global generators nor touching them. The states are sums over ranks. They are
    float32, and turn to float64 with float64 predictions; where a rank may see no batch at all then, call
    ``set_dtype(torch.float64)`` first, so that all ranks hold the same dtype.

    The stacked forward needs L times the memory of one batch.

    Args:
        noise_levels: the L levels eta, distinct, finite and not negative.
        feature_min: lower end of each feature, broadcastable to (*features); required.
            :func:`feature_ranges` learns both ends from the training data.
        feature_max: upper end, at least ``feature_min``; required.
        symmetric: draw u from U[-1, 1] instead of U[0, 1].
        seed: a non-negative int.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: where inputs are not floating point, or predictions are no tensor.
        ValueError: for noise levels, feature ranges, seed, NaN inputs or shapes other than stated above.

    Example:
        >>> import torch
        >>> from lightning_lip.metrics import NoisyMeanAbsoluteError
        >>> metric = NoisyMeanAbsoluteError(noise_levels=(0.0, 0.2), feature_min=[0.0, -1.0], feature_max=[1.0, 1.0])
        >>> inputs = torch.tensor([[0.0, 1.0], [0.5, -1.0], [1.0, 0.0]])
        >>> metric.update(lambda x: x.sum(dim=1), inputs, inputs.sum(dim=1))
        >>> metric.compute()
        tensor([0.0000, 0.2674])
    """

    is_differentiable: bool = True
    higher_is_better: bool = False
    full_state_update: bool = False
    plot_lower_bound: float = 0.0

    sum_abs_error: Tensor
    total: Tensor

    def __init__(
        self,
        noise_levels: Sequence[float],
        feature_min: Range | None = None,
        feature_max: Range | None = None,
        symmetric: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.noise_levels = check_levels("noise_levels", noise_levels)
        # Plain attributes, not buffers: a module's .half() would round the ranges. They stay on the CPU, as the noise.
        self.feature_min, self.feature_max = check_feature_range(feature_min, feature_max)
        check_flag("symmetric", symmetric)
        check_integers(0, seed=seed)
        self.symmetric, self.seed = symmetric, seed
        # Made at the first draw, because the process group may not exist yet.
        self._generator: torch.Generator | None = None
        self._start_of_batch: Tensor | None = None
        self.add_state("sum_abs_error", torch.zeros(len(self.noise_levels)), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predict: Callable[[Tensor], Tensor], inputs: Tensor, target: Tensor) -> None:
        """Add one batch: draw its noise and call ``predict`` once on the stacked batches of all noise levels."""
        ranges = self.feature_min, self.feature_max
        noise = self.symmetric, self._noise_generator()
        sum_abs_error, total = _update(predict, inputs, target, self.noise_levels, *ranges, *noise)
        # Out of place: the dtype may widen, and states made in inference mode stay usable after it.
        self.sum_abs_error = self.sum_abs_error + sum_abs_error
        self.total = self.total + total

    def compute(self) -> Tensor:
        """Mean absolute error per noise level, shape (L,), over all batches and ranks."""
        return _compute(self.sum_abs_error, self.total)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add one batch and return the value on that batch, both from the same draw of the noise."""
        # torchmetrics calls reset() inside forward, and update() twice with dist_sync_on_step: there the noise goes
        # back to the start of this batch, not to the seed.
        self._start_of_batch = self._noise_generator().get_state()
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._start_of_batch = None

    def reset(self) -> None:
        """Forget all batches and start the noise anew."""
        super().reset()
        if self._start_of_batch is None:
            self._generator = None
        else:
            self._noise_generator().set_state(self._start_of_batch)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plot one value over the noise levels, or a list of values over steps with one line per noise level.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of these; ``compute()`` where it is None.
            ax: matplotlib axes to draw on; new ones where it is None.

        Returns:
            The figure (None where ``ax`` was given) and the axes.

        Raises:
            ModuleNotFoundError: where matplotlib is not installed.

        Example:
            >>> import torch
            >>> from lightning_lip.metrics import NoisyMeanAbsoluteError
            >>> metric = NoisyMeanAbsoluteError((0.0, 0.2, 0.4), feature_min=0.0, feature_max=1.0)
            >>> metric.update(lambda x: x.mean(dim=1), torch.rand(10, 3), torch.rand(10))
            >>> fig, ax = metric.plot()
        """
        return plot_levels(self, val, ax, self.noise_levels, "eta", "noise level")

    def _noise_generator(self) -> torch.Generator:
        if self._generator is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            seed = np.random.SeedSequence([self.seed, rank]).generate_state(1)[0]
            self._generator = torch.Generator(device="cpu").manual_seed(int(seed))
        return self._generator


def _update(
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    target: Tensor,
    noise_levels: Sequence[float],
    feature_min: Tensor,
    feature_max: Tensor,
    symmetric: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, int]:
    """Sum of absolute errors per noise level, shape (L,), and the number of target elements."""
    _check_batch(inputs, target)
    n_levels, batch_size = len(noise_levels), inputs.shape[0]
    # Half precision would round the noise itself; it is rounded once, with the input, below.
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    span = _broadcast_span(feature_min, feature_max, inputs).to(dtype)
    noise = torch.rand(inputs.shape, generator=generator, dtype=torch.float32, device="cpu")
    if symmetric:
        noise = 2 * noise - 1
    noise = (noise.to(dtype) * span).to(inputs.device)
    eta = torch.tensor(noise_levels, dtype=dtype, device=inputs.device).view(-1, *(1 for _ in inputs.shape))
    stacked = (inputs.to(dtype) + eta * noise).to(inputs.dtype).flatten(0, 1)

    predictions = predict(stacked)
    expected = (n_levels * batch_size, *target.shape[1:])
    if not isinstance(predictions, Tensor):
        raise TypeError(f"expected predict to return one tensor of shape {expected}, got {got(predictions)}")
    if predictions.shape != expected:
        raise ValueError(
            f"expected predictions of shape {expected} for {n_levels} noise levels and target of shape "
            f"{tuple(target.shape)}, got {tuple(predictions.shape)}: reshape the target or the predictions, they are "
            "never broadcast"
        )
    accumulator = torch.promote_types(predictions.dtype, torch.float32)
    errors = predictions.to(accumulator).reshape(n_levels, *target.shape) - target.to(accumulator)
    return errors.abs().flatten(1).sum(dim=1), target.numel()


def _compute(sum_abs_error: Tensor, total: Tensor) -> Tensor:
    if total == 0:
        raise RuntimeError("no sample was seen, so there is no mean absolute error: call update with a batch first")
    return sum_abs_error / total


def check_feature_range(feature_min: Range | None, feature_max: Range | None) -> tuple[Tensor, Tensor]:
    """Return both ends of the features' ranges, fp64 on the CPU.

    Raises:
        TypeError: If an end holds anything but numbers.
        ValueError: If one is missing, empty or not finite, they do not fit together, or the upper is below the lower.
    """
    if feature_min is None or feature_max is None:
        missing = [name for name, end in (("feature_min", feature_min), ("feature_max", feature_max)) if end is None]
        raise ValueError(
            f"expected both feature_min and feature_max, got no {' and no '.join(missing)}: pass both ends of the "
            "feature ranges; lightning_lip.metrics.feature_ranges learns them from the training inputs"
        )
    low = torch.from_numpy(check_array("feature_min", feature_min))
    high = torch.from_numpy(check_array("feature_max", feature_max))
    if not all(end.numel() and end.isfinite().all() for end in (low, high)):
        raise ValueError("expected finite feature_min and feature_max, got NaN or infinity, or no numbers")
    try:
        negative = int((high < low).sum())
    except RuntimeError as error:
        raise ValueError(
            f"expected feature_min and feature_max of shapes that broadcast, got {tuple(low.shape)} and "
            f"{tuple(high.shape)}"
        ) from error
    if negative:
        raise ValueError(
            f"expected feature_max >= feature_min for every feature, got less for {negative} of them: the two may be "
            "swapped"
        )
    return low, high


def _check_batch(inputs: Tensor, target: Tensor) -> None:
    check_tensor("inputs", inputs)
    check_tensor("target", target)
    if not inputs.is_floating_point():
        raise TypeError(
            f"expected floating-point inputs, got {inputs.dtype}: uniform noise has no meaning on them; convert them"
        )
    if inputs.ndim == 0 or target.ndim == 0 or inputs.shape[0] != target.shape[0]:
        raise ValueError(
            "expected inputs of shape (batch, *features) and target of shape (batch, *outputs), got "
            f"{tuple(inputs.shape)} and {tuple(target.shape)}"
        )
    if inputs.isnan().any():
        raise ValueError("expected inputs without NaN, got NaN: clean or impute the data first")


def _broadcast_span(feature_min: Tensor, feature_max: Tensor, inputs: Tensor) -> Tensor:
    span = feature_max - feature_min
    try:
        return span.broadcast_to(inputs.shape[1:])
    except RuntimeError as error:
        raise ValueError(
            "expected feature_min and feature_max that broadcast to the features' shape "
            f"{tuple(inputs.shape[1:])}, got {tuple(span.shape)}"
        ) from error
