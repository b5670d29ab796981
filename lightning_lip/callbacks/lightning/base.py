"""The base class of the callbacks, for either Lightning package.

Hooks work by duck typing, but LightningCLI of `pytorch_lightning` asks for subclasses of its own Callback, and 2.5
refuses others in training: where both packages are installed, the base is a subclass of both.
"""

from __future__ import annotations

import functools
import importlib
from abc import abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args

from torch import nn
from typing_extensions import override

from lightning_lip.callbacks.lightning.batches import check_example_input, input_of_batch
from lightning_lip.callbacks.lightning.ranks import refuse_inputs_of_one_rank
from lightning_lip.callbacks.lightning.trainer import is_read, is_watched_within_epochs, refuse_strategy
from lightning_lip.checks import check_choice, check_integers, check_name
from lightning_lip.models.inputs import BatchDim, check_batch_dim
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.recorded import stop_recording
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.selection import Selection, check_selection, refuse_replaced
from lightning_lip.penalty.regularizer import LipschitzRegularizer
from lightning_lip.projection.projector import LipschitzProjector
from lightning_lip.projection.spectral_caps import NormCaps

if TYPE_CHECKING:
    from lightning.pytorch import Callback as BaseCallback
    from lightning.pytorch import LightningModule, Trainer
else:
    from lightning.pytorch import Callback
    from lightning_utilities.core import rank_zero

    # Each package sends the messages of both to a logger of its own when it is imported: it must not change hands here.
    log = rank_zero.log
    try:
        from pytorch_lightning import Callback as OtherCallback
    except ImportError:
        BaseCallback = Callback
    else:
        rank_zero.log = log

        class BaseCallback(Callback, OtherCallback):
            """A callback of both Lightning packages."""


__all__ = ["BaseCallback", "SelectingCallback", "skip_hooks"]


Core = TypeVar("Core", LipschitzRegularizer, LipschitzProjector, NormCaps)
"""What a selecting callback hands the layers to; it holds the singular vectors."""


class SelectingCallback(BaseCallback, Generic[Core]):
    """A callback that selects layers when training starts and hands them to a regulariser, a projector or caps.

    With ``example_input="batch"`` it does so at the first training batch, before the forward pass. A loaded state waits
    until then. The singular vectors go from checkpoints, copies and an earlier fit of
    the same model to the next core.

    Args:
        name: Tells several callbacks of one class in one Trainer apart.
        layers: Names, glob patterns, submodules or types to select; None selects every layer with a weight.
        exclude: Names, glob patterns, submodules or types to leave out.
        block_size: Singular vectors a layer.
        n_iterations: Iterations a step.
        seed: Seed of the private generator that the singular vectors start from.
        example_input: An input of the model, whose graph is then traced, ``"batch"`` or ``"batch:<key>"`` for that of
            the first training batch, or None.
        batch_dim: 0 where the example input is a batch along its first dimension, None where it is one sample.
        convolutions: Which norm convolutions have, ``"symbol"`` or ``"spatial"``.
    """

    key: ClassVar[str]
    """What the callback is called in checkpoints and messages, in users' subclasses too."""

    def __init__(
        self,
        name: str | None,
        layers: Selection | None,
        exclude: Selection | None,
        block_size: int,
        n_iterations: int,
        seed: int,
        example_input: Any,
        batch_dim: BatchDim,
        convolutions: Convolutions,
    ) -> None:
        check_name(name)
        check_selection(layers, exclude)
        check_example_input(example_input)
        check_integers(1, block_size=block_size, n_iterations=n_iterations)
        check_integers(0, seed=seed)
        check_batch_dim(batch_dim)
        check_choice("convolutions", convolutions, get_args(Convolutions))
        self.name = name
        self._arguments: dict[str, Any] = {
            "layers": layers,
            "exclude": exclude,
            "block_size": block_size,
            "n_iterations": n_iterations,
            "seed": seed,
            "example_input": example_input,
            "batch_dim": batch_dim,
            "convolutions": convolutions,
        }
        """What the core is made of; subclasses add arguments of their own core."""
        self._core: Core | None = None
        self._model: nn.Module | None = None
        """The model of the core."""
        self._fitting: nn.Module | None = None
        """The model in training."""
        self._loaded: dict[str, Any] | None = None
        """A state that waits for training to start, and the model that was in training when it was loaded."""
        self._loaded_for: nn.Module | None = None
        self._is_watched = self._awaits_batch = False
        self._read_tags: tuple[str, ...] = ()

    @property
    @override
    def state_key(self) -> str:
        return f"{self.key}[{self.name}]" if self.name else self.key

    @property
    def tag(self) -> str:
        """Prefix of the logged names: ``lipschitz`` or ``lipschitz/<name>``."""
        return f"lipschitz/{self.name}" if self.name else "lipschitz"

    @property
    def watched_tags(self) -> Sequence[str]:
        """Prefixes of all names that this callback logs."""
        return [self.tag]

    @property
    def watched_operators(self) -> Sequence[LinearOperator]:
        """The selected layers, which must stay in the model while it trains."""
        return self._started("core").operators

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_strategy(trainer, self)
        if self._loaded_for is not None and self._loaded_for is not pl_module:
            self._loaded = None  # loaded in a fit that ended before training started
        self._fitting = pl_module

    def takes_batch(self, trainer: Trainer) -> bool:
        """Whether the layers are selected with the first training batch."""
        return isinstance(self._arguments["example_input"], str)

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Make the core when training starts: at its first batch if the example input is taken from it."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: lazy and meta weights exist only from here on, and some strategies load callback states after
        # on_fit_start.
        self._awaits_batch = self.takes_batch(trainer)
        if not self._awaits_batch:
            self.begin(trainer, pl_module, None)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._awaits_batch:
            return
        if trainer.world_size > 1 and isinstance(self._arguments["example_input"], str):
            refuse_inputs_of_one_rank(self.arguments(batch)["example_input"])
        self.begin(trainer, pl_module, batch)
        self._awaits_batch = False
        SelectingCallback.on_train_epoch_start(self, trainer, pl_module)

    def arguments(self, batch: Any) -> dict[str, Any]:
        """Return the arguments of the core, with the example input from a batch where it is to come from there."""
        example_input = self._arguments["example_input"]
        if isinstance(example_input, str):
            return self._arguments | {"example_input": input_of_batch(batch, example_input)}
        return self._arguments

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._awaits_batch:
            return
        self._read_tags = tuple(self.watched_tags)
        self._is_watched = is_watched_within_epochs(trainer, *self._read_tags)
        refuse_replaced(pl_module, self.watched_operators, self.key)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end_fit()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_fit()

    def _end_fit(self) -> None:
        """Let go of the module that was in training."""
        self._fitting = None
        if self._core is not None:
            stop_recording(self._core.operators)

    def _start(self, core: Core, pl_module: LightningModule) -> bool:
        """Take a new core, with the loaded vectors or those of an earlier fit of the same model.

        Returns:
            Whether there are such vectors, so that training goes on instead of beginning.
        """
        vectors = self._loaded
        if vectors is None and self._core is not None and self._model is pl_module:
            vectors = self._core.state_dict()
        if vectors is not None:
            core.load_state_dict(vectors)
        self._core, self._model, self._loaded = core, pl_module, None
        return vectors is not None

    def _started(self, what: str) -> Core:
        """Return the core.

        Raises:
            RuntimeError: Before training started.
        """
        if self._core is None:
            raise RuntimeError(f"The layers are selected when training starts: there is no {what} before that.")
        return self._core

    def _is_read(self, trainer: Trainer) -> bool:
        """Whether anyone reads what this callback would log at the end of this training batch."""
        return is_read(trainer, self._is_watched, *self._read_tags)

    def _vectors(self) -> dict[str, Any] | None:
        """Return the state of the core; what was loaded, until training takes it."""
        return self._loaded if self._loaded is not None or self._core is None else self._core.state_dict()

    def _keep_until_training(self, loaded: dict[str, Any] | None) -> None:
        """Keep a loaded state, for the module in training if there is one."""
        self._loaded, self._loaded_for = loaded, self._fitting

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model behind: a copy selects the layers of its own run, and takes the vectors over."""
        # Lightning sets `log` and `log_dict`, bound to the module.
        kept = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        kept["_awaits_batch"] = False
        return kept | {"_loaded": self._vectors()} | dict.fromkeys(("_core", "_model", "_fitting", "_loaded_for"))


def skip_hooks(callback: BaseCallback, base: type, *hooks: str) -> None:
    """Set to None the hooks that `base` inherits and no subclass of it overrides, if Lightning passes over None.

    Lightning calls every hook of every callback at each step, at 2 microseconds each, also those that do nothing.
    """
    for hook in hooks if _passes_over_none() else ():
        if getattr(type(callback), hook) is getattr(base, hook):
            setattr(callback, hook, None)


@functools.cache
def _passes_over_none() -> bool:
    """Whether the installed Lightning packages pass over a hook that is None, found by trying."""
    trainer = SimpleNamespace(
        lightning_module=None, callbacks=[SimpleNamespace(hook=None, state_key="")], profiler=None
    )
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            call = importlib.import_module(f"{package}.trainer.call")
        except ImportError:
            continue
        try:
            call._call_callback_hooks(trainer, "hook")
        except (AttributeError, TypeError):
            return False
    return True
