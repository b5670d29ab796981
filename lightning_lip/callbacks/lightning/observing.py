"""ObservingCallback: layers that are selected by what the first forward pass of training shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_lip.callbacks.lightning.base import SelectingCallback, skip_hooks
from lightning_lip.penalty.regularizer import LipschitzRegularizer
from lightning_lip.usage import observation

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_HOOKS = ("on_train_batch_start", "on_before_backward")


class ObservingCallback(SelectingCallback[LipschitzRegularizer]):
    """A callback whose regulariser, where it is a product of norms, adopts what the first forward pass shows.

    The layers known by their classes are there when training starts; the others, and the normalisations, from the first
    backward pass on (or the end of the batch, where Lightning sees no backward pass). Later steps cost nothing.
    """

    _is_watching = False
    _is_settled = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._is_settled = False
            for hook in _HOOKS:  # that an earlier fit had Lightning pass over
                vars(self).pop(hook, None)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._is_settled:
            return
        if self._core is None or self._core.bound_kind == "bound":
            self._settle()
        elif not self._is_watching:
            self._is_watching = True
            observation.begin(pl_module)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._is_watching:
            self.adopt(trainer, pl_module)

    def adopt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the layers by what the forward pass showed, if it was watched."""
        seen = observation.seen(pl_module)
        self._stop_watching(pl_module)
        if self._core is None or seen is None:  # a step that computed nothing: the next one is watched
            return
        self._settle()
        # The penalty's gradient is added after the ranks have averaged theirs.
        own = trainer.world_size > 1 and any(_has_own_statistics(module) for module in pl_module.modules())
        self._core.adopt(seen, batch_statistics=not own)

    def _settle(self) -> None:
        """Have Lightning pass over the hooks that have done their work."""
        self._is_settled = True
        skip_hooks(self, ObservingCallback, *_HOOKS)

    def _stop_watching(self, pl_module: LightningModule) -> None:
        if self._is_watching:
            self._is_watching = False
            observation.end(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_watching(pl_module)
        super().teardown(trainer, pl_module, stage)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watching(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_is_watching": False, "_is_settled": False}


def _has_own_statistics(module: object) -> bool:
    """Whether a module keeps statistics of this rank's batches only."""
    return isinstance(module, _BatchNorm) and module.track_running_stats and type(module).__name__ != "SyncBatchNorm"
