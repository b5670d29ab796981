"""LipschitzConstraint: a Lipschitz budget that holds in training, and certifiably in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lip.callbacks.lightning.base import SelectingCallback
from lightning_lip.callbacks.lightning.ranks import refuse_sizes_of_one_rank, refuse_statistics_of_one_rank
from lightning_lip.callbacks.lightning.trainer import has_callback, log_metrics
from lightning_lip.checks import check_choice, check_integers, check_number, check_state, check_type
from lightning_lip.models.optimizer_steps import last_step, optimizer_steps
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.projection.allocation import Method
from lightning_lip.projection.projector import STATE_KEYS, LipschitzProjector, Projection
from lightning_lip.projection.spectra import Metric


class LipschitzConstraint(SelectingCallback[LipschitzProjector]):
    """Projects the weights after every optimiser step, so that the network's Lipschitz bound stays within a budget M.

    Two projections do this, both of :class:`~lightning_lip.LipschitzProjector`:

    - after each training batch in which an optimiser of the Trainer stepped (one of ``configure_optimizers``, also past
      Lightning), one by *estimated* norms, which aims at M (1 - 1e-4);
    - at the start of training, before each validation, at the end of each epoch and of training, and whenever the
      module's ``state_dict()`` is asked for, as for every checkpoint of any kind, the exact one: what is saved
      has a *certified upper bound* of at most M. It costs a singular value decomposition of every layer, unless the
      bound is certified as it is; then nothing changes.

    What is bounded is the product of the selected layers' spectral norms or, with an example input, the bound of the
    whole network. The callback's state in a checkpoint has the ``target`` and the ``certified_bound``.

    Validation or testing outside of training changes nothing. After an exception in training, ``state_dict()`` goes on
    projecting until this or another Trainer takes the module. Where it changes weights between a forward and its
    backward pass, autograd raises an error.

    On several ranks every rank projects alike: call ``state_dict()`` on all of them, as Lightning does. An optimiser
    that keeps copies of the weights (fp32 masters) would undo the projection; none of ``torch.optim`` does.

    On logging steps the callback logs ``lipschitz/target``, ``lipschitz/distance`` (how far the last projection moved
    the weights, in the metric) and, unless a LipschitzMonitor or LipschitzPenalty does, ``lipschitz/product`` or
    ``lipschitz/bound``: the *estimate* after the last projection.

    Args:
        target: M, positive.
        method: ``"joint"``, ``"log_clip"``, ``"per_layer"`` or ``"scaling"``.
        metric: ``"relative"`` or ``"euclidean"``, of the method ``"joint"``.
        layers: Names, glob patterns, submodules or types to select; None selects every layer with a weight.
        exclude: Names, glob patterns, submodules or types to leave out.
        every_n_steps: Project after every n-th optimiser step only; the weights are within the budget then, and in
            every checkpoint, not between.
        initial_target: M at the start, from which it goes to `target` geometrically; None starts with `target`.
        tighten_steps: The optimiser steps that this takes; at least 1 with an `initial_target`.
        example_input: An input of the model: its graph is traced, and the bound is that of the whole network.
            ``"batch"`` or ``"batch:<key>"`` takes it from the first training batch, as in :class:`LipschitzPenalty`;
            training then starts at that batch. None takes the module's ``example_input_array``; without any it is the
            product over the selected layers.
        block_size: Singular vectors a layer to start with.
        n_iterations: Iterations a step.
        seed: Seed of the private generator that the singular vectors start from; the same on every rank.
        name: Tells several of these callbacks in one Trainer apart; it enters the logged names,
            ``lipschitz/<name>/target``. Their layers may overlap: a projection only lowers norms, so all budgets hold.
        batch_dim: None says that the whole example input is one sample, as a graph's nodes are, and not a batch.
        convolutions: Which norm convolutions have, estimated and certified: ``"symbol"``, on the infinite grid, or
            ``"spatial"``, at the size of their input.

    Raises:
        ValueError: If an argument is out of range. At the start of training: if a selection matches nothing, or the
            target cannot be reached. In training: if a weight holds NaN or an infinity.
        UnsupportedLayerError: At the start of training, if the operator of a selected layer is not known, or a
            selected trainable weight cannot be written.
        RuntimeError: At the start of training, under DeepSpeedStrategy or FSDPStrategy, beside WeightAveraging, for a
            module with a ``state_dict()`` of its own that does not call super's, or on several ranks with a bound that
            reads unsynchronised batch normalisation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lip import LipschitzConstraint
        >>> trainer = Trainer(callbacks=[LipschitzConstraint(target=10.0)], logger=False)
    """

    key = "LipschitzConstraint"

    def __init__(
        self,
        target: float,
        method: Method = "joint",
        metric: Metric = "relative",
        layers: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        exclude: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        every_n_steps: int = 1,
        initial_target: float | None = None,
        tighten_steps: int = 0,
        example_input: Any = None,
        block_size: int = 16,
        n_iterations: int = 1,
        seed: int = 0,
        name: str | None = None,
        batch_dim: Literal[0] | None = 0,
        convolutions: Convolutions = "symbol",
    ) -> None:
        super().__init__(name, layers, exclude, block_size, n_iterations, seed, example_input, batch_dim, convolutions)
        self.target = self.initial_target = check_number("target", target, positive=True)
        if initial_target is not None:
            self.initial_target = check_number("initial_target", initial_target, positive=True)
        check_choice("method", method, get_args(Method))
        check_choice("metric", metric, get_args(Metric))
        check_integers(1, every_n_steps=every_n_steps)
        check_integers(0 if initial_target is None else 1, tighten_steps=tighten_steps)
        if tighten_steps and initial_target is None:
            raise ValueError("`tighten_steps` asks for the `initial_target` to tighten from.")
        self.every_n_steps = every_n_steps
        self.tighten_steps = tighten_steps
        self._arguments |= {"method": method, "metric": metric}
        self._before_saving: RemovableHandle | None = None
        self._n_steps = 0
        self._last_step = 0
        self._sizes_are_shared = False
        self._last: Projection | None = None
        self._certified: Projection | None = None

    @property
    def projector(self) -> LipschitzProjector:
        """The projector of the model in training.

        Raises:
            RuntimeError: Before training started.
        """
        return self._started("projector")

    @property
    def present_target(self) -> float:
        """M after the optimiser steps so far: ``initial_target^(1 - t) target^t``, t growing from 0 to 1."""
        progress = min(1.0, self._n_steps / self.tighten_steps) if self.tighten_steps else 1.0
        if progress == 1.0:
            return self.target
        return math.exp((1 - progress) * math.log(self.initial_target) + progress * math.log(self.target))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()  # left by a fit that an exception ended
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and has_callback(trainer, "WeightAveraging"):
            raise RuntimeError(
                "LipschitzConstraint cannot serve beside WeightAveraging, which validates and saves an average of the "
                "weights: the budget is no convex set, so the average of weights within it can exceed it. Remove one "
                "of the two, or project the averaged model after training with lightning_lip.project."
            )

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        projector = LipschitzProjector(pl_module, self.target, **self.arguments(batch))
        if trainer.world_size > 1 and projector.bound_kind == "bound":
            refuse_statistics_of_one_rank(pl_module, "the product of the layers, without an example input")
        if not self._start(projector, pl_module):
            self._n_steps = 0  # another model tightens anew
        self._last_step, self._sizes_are_shared = optimizer_steps(), False
        self.project()
        hook = _ExactBeforeSaving(self, pl_module._trainer)
        self._before_saving = pl_module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
        if type(pl_module).state_dict is not nn.Module.state_dict:
            self._certified = None
            pl_module.state_dict()
            if self._certified is None:
                self._release()
                raise RuntimeError(
                    f"The state_dict() of {type(pl_module).__name__} does not call that of LightningModule, so that "
                    "its checkpoints would hold weights above the budget: call super().state_dict() in it."
                )

    def project(self) -> Projection:
        """Project exactly now; every rank must call it."""
        self.projector.target = self.present_target
        self._certified = self.projector.exact()
        return self._certified

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not the Trainer's global step: it does not count optimisers that are stepped past Lightning, and counts steps
        # that a gradient scaler skipped. Nor all optimisers of the process: an attack's moves inputs, not weights.
        if (last := last_step(trainer.optimizers)) > self._last_step:
            self._last_step = last
            self._n_steps += 1
            if self._n_steps % self.every_n_steps == 0:
                if trainer.world_size > 1 and not self._sizes_are_shared:
                    self._sizes_are_shared = True
                    refuse_sizes_of_one_rank(self.projector.operators)
                self.projector.target = self.present_target
                self._last = self.projector.step()
        if self._last is None or not self._is_read(trainer):
            return
        metrics = {f"{self.tag}/target": self.present_target, f"{self.tag}/distance": self._last.distance}
        if not (has_callback(trainer, "LipschitzMonitor") or has_callback(trainer, "LipschitzPenalty")):
            metrics[f"{self.tag}/{self.projector.bound_kind}"] = self._last.bound
        log_metrics(trainer, pl_module, metrics)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What is validated is what a checkpoint of this validation will hold. The sanity check comes before training.
        if self._before_saving is not None and not trainer.sanity_checking:
            self.project()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._awaits_batch:  # an epoch without a batch
            self.project()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After on_train_end, where StochasticWeightAveraging puts its average into the module. Without a hook nothing
        # was trained: no batches, or no epochs left.
        if self._before_saving is not None:
            self.project()
            self._release()

    def _release(self) -> None:
        """Take the hook off the module."""
        if self._before_saving is not None:
            self._before_saving.remove()
        self._before_saving = None

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"n_steps": self._n_steps, "projector": self._vectors()}
        if self._certified is not None:
            # Lightning asks for the module's state first, which projects.
            state["target"] = self.present_target
            state["certified_bound"] = self._certified.bound
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, ("n_steps", "projector"), self.key)
        check_integers(0, n_steps=state_dict["n_steps"])
        if state_dict["projector"] is not None:
            check_type("projector", state_dict["projector"], Mapping, "a state or None")
            check_state(state_dict["projector"], STATE_KEYS, "The state's `projector`")
        self._n_steps = state_dict["n_steps"]
        self._keep_until_training(state_dict["projector"])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_before_saving": None}


class _ExactBeforeSaving:
    """A pre-hook of ``state_dict``, which checkpoints of every kind call, weights-only ones too.

    It does nothing in a copy of the module, or once another Trainer has taken the module over after an exception:
    neither is in training.
    """

    def __init__(self, constraint: LipschitzConstraint | None, trainer: Any) -> None:
        self._constraint, self._trainer = constraint, trainer

    def __call__(self, module: LightningModule, *_: Any) -> None:
        if self._constraint is not None and module._trainer is self._trainer:
            self._constraint.project()

    def __reduce__(self) -> tuple[type, tuple[None, None]]:
        return _ExactBeforeSaving, (None, None)
