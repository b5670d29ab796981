"""What competes: losses, penalties and constraints on ordinary layers, and the peers' layers with their losses.

Every method has nine settings, three learning rates times three values of what is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import CertifiedMarginLoss, LipschitzProjector, LipschitzRegularizer
from lightning_lip.bench.scoreboard.networks import EXTRA, Layers, ordinary, orthogonium, torchlip
from lightning_lip.bench.scoreboard.training import Training
from lightning_lip.penalty.penalties import PenaltyName
from lightning_lip.reporting.extras import MissingExtraError, extra

PENALTY: PenaltyName = "softplus_log"
RAMP_START, RAMP_SHARE = 0.1, 0.5
"""eps grows from a tenth to its value over the first half of the training."""


class Setting(NamedTuple):
    """A learning rate, and the values of a method's own options."""

    rate: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """One way to train for certified accuracy.

    Attributes:
        name: Its key in the files.
        title: What tables and figure call it.
        group: ``"plain"``, ``"ours"`` or ``"peer"``.
        options: The names of its own options.
        rates: The learning rates that are tried.
        values: The values of its options that are tried, each with each rate.
        layers: Makes its layers.
        prepare: Makes a training of a network, given an example input (1, ...) and a setting.
        needs: A module that this package does not depend on.
    """

    name: str
    title: str
    group: str
    options: tuple[str, ...]
    rates: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    layers: Callable[[], Layers]
    prepare: Callable[[nn.Module, Tensor, Setting], Training]
    needs: str | None = None

    def settings(self) -> list[Setting]:
        """Return the settings to choose from."""
        return [Setting(rate, values) for rate, values in product(self.rates, self.values)]

    def described(self, setting: Setting) -> str:
        """Return a setting in words."""
        own = (f"{name} {value:g}" for name, value in zip(self.options, setting.values, strict=True))
        return ", ".join([f"rate {setting.rate:g}", *own])

    def missing(self) -> str | None:
        """Return what must be installed first, None if nothing is missing."""
        if self.needs is not None:
            try:
                extra(self.needs, EXTRA)
            except MissingExtraError:
                return self.needs
        return None


def cross_entropy(network: nn.Module, example: Tensor, setting: Setting) -> Training:
    """Train with cross-entropy and decoupled weight decay."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=setting.rate, weight_decay=setting.values[0])
    return Training(network, F.cross_entropy, [optimizer])


def penalty(network: nn.Module, example: Tensor, setting: Setting) -> Training:
    """Penalise the product of the spectral norms, as LipschitzPenalty does."""
    regularizer = LipschitzRegularizer(network, setting.values[0], PENALTY, target=1.0)
    return Training(network, F.cross_entropy, [_adam(network, setting)], after_backward=lambda: regularizer.add_grad_())


def constraint(network: nn.Module, example: Tensor, setting: Setting) -> Training:
    """Project onto a budget of the product of the spectral norms after every step, as LipschitzConstraint does."""
    projector = LipschitzProjector(network, setting.values[0])
    return Training(
        network,
        F.cross_entropy,
        [_adam(network, setting)],
        after_step=lambda: projector.step(),
        at_end=lambda: projector.exact(),
    )


def margin(form: Any, network: nn.Module, example: Tensor, setting: Setting) -> Training:
    """Train with CertifiedMarginLoss of one form; eps grows over the first half."""
    (eps,) = setting.values
    loss = CertifiedMarginLoss(network, eps, form=form, example_input=example)
    return Training(network, loss, [_adam(network, setting)], on_progress=partial(_ramp, loss, eps))


def margin_and_penalty(network: nn.Module, example: Tensor, setting: Setting) -> Training:
    """Train with the margin form and the penalty beside it, which keeps the logits' scale small.

    Cross-entropy of large logits is about the few samples on the wrong side, that of small ones about all margins.
    """
    eps, coefficient = setting.values
    training = margin("margin", network, example, Setting(setting.rate, (eps,)))
    regularizer = LipschitzRegularizer(network, coefficient, PENALTY, target=1.0)
    training.after_backward = lambda: regularizer.add_grad_()
    return training


def tau_cross_entropy(network: nn.Module, example: Tensor, setting: Setting) -> Training:
    """Train with torchlip's cross-entropy of temperature tau."""
    losses: Any = extra("deel.torchlip", EXTRA)
    return Training(network, losses.TauCrossEntropyLoss(tau=setting.values[0]), [_adam(network, setting)])


def hinge_kantorovich(network: nn.Module, example: Tensor, setting: Setting) -> Training:
    """Train with torchlip's hinge-Kantorovich-Rubinstein loss, which takes classes as one-hot rows."""
    losses: Any = extra("deel.torchlip", EXTRA)
    alpha, margin = setting.values
    function = losses.SoftHKRMulticlassLoss(alpha=alpha, min_margin=margin)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = function(logits, F.one_hot(targets, logits.shape[1]))
        return value

    return Training(network, loss, [_adam(network, setting)])


def offset_cross_entropy(network: nn.Module, example: Tensor, setting: Setting) -> Training:
    """Train with orthogonium's cross-entropy of a temperature and an offset of the true class."""
    losses: Any = extra("orthogonium.losses", EXTRA)
    offset, temperature = setting.values
    n_classes = network(example).shape[1]
    return Training(network, losses.LossXent(n_classes, offset, temperature), [_adam(network, setting)])


def _adam(network: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=setting.rate)


def _ramp(loss: CertifiedMarginLoss, eps: float, progress: float) -> None:
    loss.eps = eps * min(1.0, RAMP_START + (1 - RAMP_START) * progress / RAMP_SHARE)


RATES = (2e-3, 5e-3, 1e-2)
RATES_OF_TORCHLIP = (1e-3, 2e-3, 5e-3)
"""Its layers diverge at 1e-2."""

RADII = ((1.0,), (1.58,), (2.0,))
METHODS = {
    method.name: method
    for method in (
        Method(
            "cross_entropy",
            "cross-entropy",
            "plain",
            ("weight decay",),
            RATES,
            ((0.0,), (0.1,), (1.0,)),
            ordinary,
            cross_entropy,
        ),
        Method("penalty", "LipschitzPenalty", "ours", ("lambda",), RATES, ((0.3,), (1.0,), (3.0,)), ordinary, penalty),
        Method(
            "constraint", "LipschitzConstraint", "ours", ("M",), RATES, ((0.3,), (1.0,), (3.0,)), ordinary, constraint
        ),
        Method("margin", "margin loss", "ours", ("eps",), RATES, RADII, ordinary, partial(margin, "margin")),
        Method("emma", "margin loss, EMMA", "ours", ("eps",), RATES, RADII, ordinary, partial(margin, "emma")),
        Method("gloro", "margin loss, GloRo", "ours", ("eps",), RATES, RADII, ordinary, partial(margin, "gloro")),
        Method("lmt", "margin loss, global (LMT)", "ours", ("eps",), RATES, RADII, ordinary, partial(margin, "lmt")),
        Method(
            "margin_penalty",
            "margin loss + LipschitzPenalty",
            "ours",
            ("eps", "lambda"),
            RATES,
            ((1.0, 0.3), (1.0, 1.0), (1.58, 0.3)),
            ordinary,
            margin_and_penalty,
        ),
        Method(
            "torchlip_tau",
            "torchlip, tau cross-entropy",
            "peer",
            ("tau",),
            RATES_OF_TORCHLIP,
            ((0.3,), (1.0,), (2.0,)),
            torchlip,
            tau_cross_entropy,
            needs="deel.torchlip",
        ),
        Method(
            "torchlip_hkr",
            "torchlip, HKR",
            "peer",
            ("alpha", "margin"),
            RATES_OF_TORCHLIP,
            ((0.98, 2.0), (0.9, 5.0), (0.98, 5.0)),
            partial(torchlip, disjoint_head=True),
            hinge_kantorovich,
            needs="deel.torchlip",
        ),
        Method(
            "orthogonium",
            "orthogonium, offset cross-entropy",
            "peer",
            ("offset", "temperature"),
            RATES,
            ((2.12, 0.25), (1.41, 1.0), (2.12, 1.0)),
            orthogonium,
            offset_cross_entropy,
            needs="orthogonium.layers",
        ),
    )
}
"""By name, in the order of the tables."""
