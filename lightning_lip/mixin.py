"""LipschitzMixin: the penalty inside the loss of a LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_lip.penalty.penalties import COEFFICIENT
from lightning_lip.penalty.regularizer import LipschitzRegularizer
from lightning_lip.usage import observation

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    _Base = LightningModule
else:
    _Base = object


class LipschitzMixin(_Base):
    """Gives a LightningModule ``self.lipschitz_penalty()`` to add to its loss.

    Use it where the penalty must be part of the loss (LBFGS with a line search, a loss that is logged with the
    penalty); otherwise :class:`LipschitzPenalty` does the same for less, without touching the module. Put it before
    the LightningModule in the bases. The singular vectors travel in the checkpoint under ``"lipschitz"``.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from lightning_lip import LipschitzMixin
        >>> class Regressor(LipschitzMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        ...     def training_step(self, batch):
        ...         x, y = batch
        ...         return torch.nn.functional.mse_loss(self.net(x), y) + self.lipschitz_penalty()
        >>> list(Regressor().spectral_norms())
        ['net.0', 'net.2']
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which the LightningModule's hooks would hide the mixin's."""
        super().__init_subclass__(**kwargs)
        order = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in order and order.index("LightningModule") < order.index("LipschitzMixin"):
            raise TypeError(
                f"Expected LipschitzMixin before LightningModule in the bases, or checkpoints would lack its singular "
                f"vectors: class {cls.__name__}(LipschitzMixin, LightningModule)."
            )

    def configure_lipschitz(self) -> LipschitzRegularizer:
        """Return the regulariser; override it to choose penalty, layers and coefficient.

        The default is ``LipschitzRegularizer(self, coefficient=1e-3)``: the product over all layers with a weight, with
        the coefficient of :class:`LipschitzPenalty`. It is called once, at first use.
        """
        return LipschitzRegularizer(self, COEFFICIENT)

    def lipschitz_regularizer(self) -> LipschitzRegularizer:
        """Return the regulariser that :meth:`configure_lipschitz` made."""
        regularizer: LipschitzRegularizer | None = self.__dict__.get("_lipschitz_regularizer")
        if regularizer is None:
            regularizer = self.configure_lipschitz()
            state = self.__dict__.pop("_lipschitz_state", None)
            if state is not None:
                regularizer.load_state_dict(state)
            self.__dict__["_lipschitz_regularizer"] = regularizer
        return regularizer

    def lipschitz_penalty(self) -> Tensor:
        """Return coefficient * penalty, shape (), differentiable; see :meth:`LipschitzRegularizer.value`."""
        regularizer = self.lipschitz_regularizer()
        self._adopt()
        return regularizer.value()

    def lipschitz_bound(self) -> Tensor:
        """Return the product of the selected layers' spectral norms; see :meth:`LipschitzRegularizer.bound`."""
        return self.lipschitz_log_bound().exp()

    def lipschitz_log_bound(self, until: nn.Module | None = None) -> Tensor:
        """Return the bound's logarithm, differentiable in a loss; see :meth:`LipschitzRegularizer.log_bound`."""
        regularizer = self.lipschitz_regularizer()
        self._adopt()
        return regularizer.log_bound(until)

    def spectral_norms(self) -> dict[str, Tensor]:
        """Return the estimates (from below) of the spectral norms, shape () each, by layer name."""
        return self.lipschitz_regularizer().spectral_norms()

    def on_fit_start(self) -> None:
        """Select the layers before the first forward pass, which shows ``"spatial"`` convolutions their size.

        An override must call ``super()``.
        """
        super().on_fit_start()
        if self.__dict__.pop("_lipschitz_watching", False):  # in a fit that ended before its first penalty
            observation.end(self)
        self.__dict__["_lipschitz_awaits"] = self.lipschitz_regularizer().bound_kind == "product"

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Watch the first forward pass, by which the layers are then selected; an override must call ``super()``."""
        skips: int | None = super().on_train_batch_start(batch, batch_idx)
        if skips != -1 and self.__dict__.pop("_lipschitz_awaits", False):
            self.__dict__["_lipschitz_watching"] = True
            observation.begin(self)
        return skips

    def _adopt(self) -> None:
        """Select the layers by what the first forward pass showed so far, once it began."""
        seen = observation.seen(self) if self.__dict__.get("_lipschitz_watching") else None
        if seen is not None:
            self.__dict__["_lipschitz_watching"] = False
            observation.end(self)
            self.lipschitz_regularizer().adopt(seen)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the regulariser behind, keep its vectors: a copy of the module makes its own."""
        state: dict[str, Any] = super().__getstate__()
        state.pop("_lipschitz_watching", None)
        regularizer = state.pop("_lipschitz_regularizer", None)
        if regularizer is not None:
            state["_lipschitz_state"] = regularizer.state_dict()
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the singular vectors; an override must call ``super()``."""
        super().on_save_checkpoint(checkpoint)
        if "_lipschitz_regularizer" in self.__dict__:
            checkpoint["lipschitz"] = self.lipschitz_regularizer().state_dict()
        elif "_lipschitz_state" in self.__dict__:
            checkpoint["lipschitz"] = self.__dict__["_lipschitz_state"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the singular vectors over, if the checkpoint has them; an override must call ``super()``."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("lipschitz")
        if state is not None:
            self.__dict__["_lipschitz_state"] = state
            self.__dict__.pop("_lipschitz_regularizer", None)
