"""The Lipschitz constants, in the Euclidean norm, of the activations and normalisations, and the user's own.

Pooling is in ``resampling.py``. Every number is proven: the largest slope of a function of one variable lies at a zero
of its second derivative, whose equation stands beside the value. Closed forms are evaluated in fp64 and rounded up;
literals are rounded up at their last digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_lip.checks import check_type
from lightning_lip.constants.pooling import average_pool_constant, lp_pool_constant, max_pool_constant
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.models.modules import keeps_forward
from lightning_lip.rigorous.evaluation import evaluated
from lightning_lip.rigorous.rounding import divide_up, multiply_up, sqrt_up, sum_up, up

ConstantRule = Callable[[Any], float]
"""Maps a module to a Lipschitz constant of it, a finite number of at least 0."""

GELU = up(sum_up([(1 + math.erf(1)) / 2, math.exp(-1) / math.sqrt(math.pi)]) * (1 + 4e-16))
"""f' = Phi(x) + x phi(x), f'' = phi(x) (2 - x^2) = 0 at x = sqrt 2: f' = (1 + erf 1) / 2 + 1 / (e sqrt pi)."""

GELU_TANH = 1.128993068658772
"""x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2: f'' = 0 at x = 1.41850400879083."""

SILU = 1.099839320128867
"""f' = s + x s (1 - s), s = sigmoid(x); f'' = 0 where x tanh(x/2) = 2, x = 2.39935728051547; so for x sigmoid(c x)."""

MISH = 1.088498161251728
"""x tanh(log(1 + e^x)): f'' = 0 at x = 1.49057117948543."""

SELU = 1.758099340847377
"""alpha * scale, the slope at 0 from the left; alpha = 1.67326324235437728, scale = 1.05070098735548049."""

HARDSWISH = 1.5
"""x (x + 3) / 6 on [-3, 3]: (2 x + 3) / 6 at x = 3."""

SIGMOID = 0.25
HARDSIGMOID = up(1 / 6)

ERF = up(2 / math.sqrt(math.pi) * (1 + 4e-16))
"""2 e^(-x^2) / sqrt(pi) at x = 0."""

SOFTMAX = 0.5
"""||diag(p) - p p^T|| <= 1/2: twice the largest variance of a distribution; attained with two equal probabilities."""

SOFTPLUS_THRESHOLD = 20.0
"""From this threshold on Softplus's jump to the identity, log(1 + e^-t) / beta, is below fp32's resolution."""

_RULES: dict[type[nn.Module], ConstantRule] = {}


def register_constant(module_type: type[nn.Module], rule: ConstantRule) -> None:
    """State the Lipschitz constant of a module type of your own; it then counts wherever a bound is traced.

    The constant must hold for the map from all of a sample's tensor arguments together to its one output, in the
    Euclidean norm, in eval mode, with the batch along the first dimension. It is believed, not checked: every bound
    and certificate rests on it. It is read again at each evaluation, so it may depend on the module's parameters, but
    no gradient flows through it. It also serves subclasses, and takes precedence over the rules of this package.

    Args:
        module_type: A subclass of ``nn.Module``.
        rule: ``rule(module) -> float``, finite and at least 0.

    Raises:
        TypeError: If `module_type` is no module type or `rule` is not callable.

    Example:
        >>> from torch import nn
        >>> from lightning_lip.constants import lipschitz_constant, register_constant
        >>> class Sine(nn.Module):
        ...     def forward(self, x):
        ...         return (30.0 * x).sin()
        >>> register_constant(Sine, lambda module: 30.0)
        >>> lipschitz_constant(Sine())
        30.0
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"Expected `module_type` to be a subclass of torch.nn.Module, got {module_type!r}.")
    if not callable(rule):
        raise TypeError(f"Expected `rule` to be a callable (module) -> float, got {type(rule).__name__}.")
    _RULES[module_type] = rule


def registered_rule(module: nn.Module) -> ConstantRule | None:
    """Return the rule registered for the module's type or its nearest base class, else None."""
    return next((_RULES[cls] for cls in type(module).__mro__ if cls in _RULES), None)


def lipschitz_constant(module: nn.Module) -> float:
    """Return a *certified upper bound* of the Lipschitz constant of a module in eval mode, whatever its input's size.

    It is the Lipschitz constant itself (rounded up), attained or approached at some input, except for poolings on
    inputs too small for their windows to overlap fully, ``LPPool`` and ``LocalResponseNorm``, where it may lie above.

    Args:
        module: An activation, pooling, normalisation or dropout layer of torch.nn, or of a registered type.

    Raises:
        TypeError: If `module` is no module.
        UnsupportedLayerError: If there is no finite constant, or none that is known; the message is the reason.
        ValueError: If a registered rule returns anything but a finite number of at least 0, or a parameter is NaN.
    """
    check_type("module", module, nn.Module, "a torch.nn.Module")
    rule = registered_rule(module)
    if rule is None and _constant_of.dispatch(type(module)) is not _constant_of.dispatch(object):
        kind = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules."))
        if not keeps_forward(module, kind):
            raise UnsupportedLayerError(
                f"{type(module).__name__} has a forward of its own, so it is not known to compute what "
                f"{kind.__name__} does: state its constant with register_constant"
            )
    value: object = _constant_of(module) if rule is None else rule(module)
    if rule is None and any(isinstance(setting, float) and math.isnan(setting) for setting in vars(module).values()):
        value = math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        source = "its parameters" if rule is None else "its registered rule"
        raise ValueError(
            f"Expected the constant of {type(module).__name__} to be a finite float of at least 0, got {value!r} from "
            f"{source}."
        )
    return float(value)


def leaky_relu(slope: float | Tensor) -> float:
    """Return max(1, max|a|), *exact*: LeakyReLU, PReLU (any number of slopes) and RReLU in eval (the mean slope)."""
    largest = float(slope.detach().abs().max()) if isinstance(slope, Tensor) else abs(slope)
    # Not max(1, NaN), which is 1: a weight that has become NaN must show.
    return largest if math.isnan(largest) else max(1.0, largest)


def elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> float:
    """Return the largest slope of ``scale * (x if x > 0 else alpha (e^(input_scale x) - 1))``, *exact*, rounded up."""
    if not input_scale > 0:  # NaN too
        raise UnsupportedLayerError(f"with input_scale={input_scale} it grows exponentially")
    left = abs(alpha) if scale == input_scale == 1 else multiply_up(abs(scale), abs(alpha), input_scale)
    # Not the other way round: max(1, NaN) is 1.
    return max(left, abs(scale))


def celu(alpha: float = 1.0) -> float:
    """Return 1 for alpha > 0, *exact*: its slope is e^(x / alpha) below 0."""
    if not alpha > 0:  # NaN too
        raise UnsupportedLayerError(f"with alpha={alpha} it grows exponentially: alpha must be positive")
    return 1.0


def softplus(threshold: float) -> float:
    """Return 1, *exact*: the slope is sigmoid(beta x), whatever beta; but a small threshold makes it jump."""
    if not threshold >= SOFTPLUS_THRESHOLD:  # NaN too
        raise UnsupportedLayerError(
            f"with threshold={threshold} it jumps where it turns linear: at least {SOFTPLUS_THRESHOLD:g} is needed"
        )
    return 1.0


def threshold(limit: float, value: float) -> float:
    """Return 1, *exact*, for ``x if x > t else v`` with v = t; any other v makes it jump."""
    if limit != value:
        raise UnsupportedLayerError(f"it is discontinuous: threshold={limit} differs from value={value}")
    return 1.0


def shrink(lambd: float) -> float:
    """Return 1, *exact*, for the soft shrinkage ``sign(x) max(|x| - lambda, 0)``, lambda >= 0."""
    if not lambd >= 0:  # NaN too
        raise UnsupportedLayerError(f"it is discontinuous: lambd={lambd} is negative or NaN")
    return 1.0


def log_softmax(size: int) -> float:
    """Return sqrt(n), *exact*: ``||I - 1 p^T|| <= ||1|| ||p||`` for an oblique projector, approached as p -> e_1."""
    return sqrt_up(size) if size > 1 else 1.0


def normalisation(eps: float) -> float:
    """Return 1 / sqrt(eps): layer, group, instance and RMS normalisation without their affine part, *exact*.

    The Jacobian's norm is at most ``1 / sqrt(var + eps)``, attained at a constant input (0 for RMS normalisation).
    """
    if not eps > 0:  # NaN too
        raise UnsupportedLayerError(f"with eps={eps} it has no finite Lipschitz constant")
    return divide_up(1.0, math.nextafter(math.sqrt(eps), 0.0))


def local_response_norm(size: int, alpha: float, beta: float, k: float) -> float:
    """Return an *upper bound* of the constant of ``x_i / (k + alpha/n sum_{N(i)} x_j^2)^beta``, not attained.

    With ``q = alpha/n sum x^2`` the Jacobian is ``diag((k + q)^-beta) - M``. By Schur's test with weights |x_j|,
    ``||M|| <= r sqrt(n)``, ``r = sup_q 2 beta q (k + q)^(-beta-1)``, attained at q = k / beta. So the constant is at
    most ``k^-beta + sqrt(n) r``, and at least ``k^-beta``.
    """
    if not (k > 0 and beta >= 0 and alpha >= 0):  # NaN too
        raise UnsupportedLayerError(f"expected k > 0, alpha >= 0 and beta >= 0, got k={k}, alpha={alpha}, beta={beta}")
    if beta == 0:
        return 1.0
    rate = 2 * k * math.pow(k * (1 + 1 / beta), -beta - 1) if alpha > 0 else 0.0
    return (math.pow(k, -beta) + math.sqrt(size) * rate) * (1 + 1e-14)


def affine_scale(module: Any) -> float:
    """Return max|gamma|, *exact*, or rounded up where gamma is parametrised; 1 without a weight."""
    return 1.0 if module.weight is None else float(evaluated(lambda: module.weight).magnitudes().max())


def batch_norm_scale(weight: Tensor | None, running_var: Tensor, eps: float) -> Tensor:
    """Return gamma / sqrt(var + eps), shape (channels,), differentiable in gamma: batch normalisation in eval mode."""
    inverse = torch.rsqrt(running_var.detach() + eps)
    return inverse if weight is None else weight * inverse


@singledispatch
def _constant_of(module: nn.Module) -> float:
    raise UnsupportedLayerError(
        f"the Lipschitz constant of {type(module).__name__} is not known: state it with register_constant"
    )


def _register(types: tuple[type[nn.Module], ...], rule: ConstantRule) -> None:
    for module_type in types:
        _constant_of.register(module_type)(rule)


def refuse_constant(reason: str) -> Callable[..., float]:
    """Return a rule that refuses with a reason."""

    def refuse(*_: object, **__: object) -> float:
        raise UnsupportedLayerError(reason)

    return refuse


def _batch_norm(module: _BatchNorm | _InstanceNorm) -> float:
    if module.running_var is None:
        raise UnsupportedLayerError("without running statistics it mixes the samples of a batch")
    variance = module.running_var

    def scale() -> Tensor:
        weight = None if module.weight is None else module.weight.double()
        return batch_norm_scale(weight, variance.double(), module.eps)

    return float(evaluated(scale).magnitudes().max())


def _instance_norm(module: _InstanceNorm) -> float:
    if module.running_var is not None:
        return _batch_norm(module)
    return multiply_up(affine_scale(module), normalisation(module.eps))


def _rms_norm(module: nn.RMSNorm) -> float:
    eps = rms_eps(module.eps, torch.get_default_dtype() if module.weight is None else module.weight.dtype)
    return multiply_up(affine_scale(module), normalisation(eps))


def rms_eps(eps: float | None, dtype: torch.dtype) -> float:
    """Return RMSNorm's eps; without one it is the smallest increment of 1 in the input's dtype.

    For fp16 and bf16 newer releases of torch take fp32's, older ones the input's: fp32's, the smaller, bounds both.
    """
    return min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) if eps is None else eps


ONE_LIPSCHITZ = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.ReLU6, nn.Tanh, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink,
    nn.Hardtanh, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    _DropoutNd,
)  # fmt: skip
_register(ONE_LIPSCHITZ, lambda module: 1.0)
_register((nn.GELU,), lambda module: GELU if module.approximate == "none" else GELU_TANH)
_register((nn.SiLU,), lambda module: SILU)
_register((nn.Mish,), lambda module: MISH)
_register((nn.SELU,), lambda module: SELU)
_register((nn.Hardswish,), lambda module: HARDSWISH)
_register((nn.Sigmoid,), lambda module: SIGMOID)
_register((nn.Hardsigmoid,), lambda module: HARDSIGMOID)
_register((nn.ELU,), lambda module: elu(module.alpha))
_register((nn.CELU,), lambda module: celu(module.alpha))
_register((nn.LeakyReLU,), lambda module: leaky_relu(module.negative_slope))
_register((nn.RReLU,), lambda module: leaky_relu((module.lower + module.upper) / 2))
_register((nn.PReLU,), lambda module: leaky_relu(evaluated(lambda: module.weight).magnitudes()))
_register((nn.Softplus,), lambda module: softplus(module.threshold))
_register((nn.Softshrink,), lambda module: shrink(module.lambd))
_register((nn.Threshold,), lambda module: threshold(module.threshold, module.value))
_register((nn.Softmax, nn.Softmin, nn.Softmax2d), lambda module: SOFTMAX)
_register((nn.LogSoftmax,), refuse_constant("it is sqrt(n), and the size n of the input is not known here"))
_register((nn.LayerNorm, nn.GroupNorm), lambda m: multiply_up(affine_scale(m), normalisation(m.eps)))
_register((nn.RMSNorm,), _rms_norm)
_register((_BatchNorm,), _batch_norm)
_register((_InstanceNorm,), _instance_norm)
_register((nn.LocalResponseNorm,), lambda m: local_response_norm(m.size, m.alpha, m.beta, m.k))
_register(
    (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    lambda m: max_pool_constant(int(type(m).__name__[-2]), m.kernel_size, m.stride, m.dilation),
)
_register(
    (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    lambda m: average_pool_constant(
        int(type(m).__name__[-2]),
        m.kernel_size,
        m.stride,
        m.padding,
        m.ceil_mode,
        m.count_include_pad,
        getattr(m, "divisor_override", None),
    ),
)
_register(
    (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d),
    lambda m: lp_pool_constant(int(type(m).__name__[-2]), m.norm_type, m.kernel_size, m.stride, m.ceil_mode),
)
for _types, _reason in (
    ((nn.Hardshrink,), "it is discontinuous"),
    ((nn.GLU,), "a product of two activations has no finite Lipschitz constant"),
    ((nn.MultiheadAttention,), "dot-product attention has no finite Lipschitz constant"),
    ((nn.CosineSimilarity,), "it has no finite Lipschitz constant: its slope grows without bound near 0"),
    (
        (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
        "its windows depend on the input or on chance",
    ),
):
    _register(_types, refuse_constant(_reason))
