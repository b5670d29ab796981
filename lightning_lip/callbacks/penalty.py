"""LipschitzPenalty: the cross-layer penalty on an existing Trainer."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lip.callbacks.lightning.base import skip_hooks
from lightning_lip.callbacks.lightning.observing import ObservingCallback
from lightning_lip.callbacks.lightning.ranks import refuse_sizes_of_one_rank, refuse_statistics_of_one_rank
from lightning_lip.callbacks.lightning.trainer import (
    batches_begun,
    class_names,
    gradient_scale,
    log_metrics,
    monitors_of,
    refuse_other_kind,
    selection_text,
)
from lightning_lip.checks import check_choice, check_integers, check_number, check_state, check_type
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.selection import Unknown
from lightning_lip.penalty.penalties import COEFFICIENT, KNEE, Penalty, PenaltyName, check_knee, get_penalty
from lightning_lip.penalty.regularizer import LipschitzRegularizer
from lightning_lip.penalty.scale import gradient_norms, out_of_scale
from lightning_lip.usage.observation import AWAITED


@dataclass
class _Turn:
    """An optimiser's part in the penalty.

    Attributes:
        optimizer: The optimiser.
        index: Its place among the trainer's; -1 for one that the trainer does not know.
        size: The number of its parameters when it was looked at.
        holds_all: Whether all of the selected layers' parameters were among them.
        batch: The training batch in which it last stepped.
    """

    optimizer: weakref.ref[Optimizer]
    index: int
    size: int
    holds_all: bool
    batch: int | None = None


class LipschitzPenalty(ObservingCallback):
    """Adds ``coefficient * penalty`` on the layers' spectral norms to the training of any LightningModule.

    The penalty's gradient is added right before the optimiser steps, after accumulation and unscaling and before
    clipping: the weights move as if the penalty stood in the loss, which itself is not touched (nor is what
    ``training_step`` logs). Every iteration reads each weight once; no autograd graph over the weights is built. Under
    ModelParallelStrategy linear layers may be sharded (FSDP2, tensor parallelism): an iteration is one all_reduce then.

    The spectral norms are *estimates from below*. Without a :class:`LipschitzMonitor` that reports it the callback logs
    ``lipschitz/penalty`` (as added, with coefficient and warm-up) and ``lipschitz/product`` (the product of the
    selected layers' spectral norms; with a traced graph ``lipschitz/bound``, the whole network's) on logging steps, to
    every logger and for ``ModelCheckpoint(monitor=...)``.

    Args:
        coefficient: lambda, the factor of the penalty; at least 0.
        penalty: ``"product"`` (the paper's), ``"softplus_log"``, ``"hinge_log"``, ``"log"``, ``"layer_sum"``,
            ``"layer_sum_squares"``, or a callable ``(log_sigma (L,), log_bound ()) -> ()``.
        layers: Names, glob patterns, submodules or types to select; None selects every layer with a weight.
        exclude: Names, glob patterns, submodules or types to leave out.
        target: M, the budget of ``"softplus_log"`` and ``"hinge_log"``.
        block_size: Singular vectors a layer, r; 1 is the classical power iteration.
        n_iterations: Iterations a step.
        every_n_steps: Act on every n-th step of each optimiser only (steps of one training batch count as one), with
            n times the coefficient.
        warmup_steps: Raise the coefficient linearly over this many optimiser steps; 0 starts with all of it.
        seed: Seed of the private generator that the singular vectors start from; the same on every rank.
        example_input: An input of the model: its graph is traced, and the bound that is penalised is that of the whole
            network, with activations, residuals and unselected layers. ``"batch"`` takes it from the first training
            batch (the batch, or the first entry of a tuple or list), ``"batch:<key>"`` takes ``batch[key]``. None takes
            the module's ``example_input_array``; without any, the bound is the product over the selected layers.
        name: Tells several of these callbacks in one Trainer apart (one for each network of a GAN, say); it enters
            the logged names, ``lipschitz/<name>/penalty``.
        knee: The product beyond which ``"product"`` is linear in S = log product, so that its gradient stays in scale
            where training begins at a large one; None or infinity for the paper's plain product.
        unknown: Without a graph, ``"skip"`` leaves out layers without a known norm (embeddings, attention,
            normalisations) and tells so at the start, but for one that `layers` names; ``"refuse"`` refuses them.
        batch_dim: None says that the whole example input is one sample, as a graph's nodes are, and not a batch.
        convolutions: Whether their norm is the ``"symbol"``'s, on the infinite grid, which certificates bound, or the
            ``"spatial"`` one, at the size of their input, at up to tenfold cost.

    Raises:
        ValueError: If an argument is out of range. At the start of training: if a selection matches nothing, or no
            selected layer is trainable.
        UnsupportedLayerError: At the start of training, if a layer without a known norm is refused, or the graph of
            `example_input` has no known bound.
        RuntimeError: At the start of training, under DeepSpeedStrategy or FSDPStrategy, with an LBFGS that searches
            along lines, on several ranks with a traced bound that reads unsynchronised batch normalisation, or if
            something monitors ``lipschitz/bound`` where it is ``lipschitz/product``, or the reverse.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lip import LipschitzPenalty
        >>> trainer = Trainer(callbacks=[LipschitzPenalty(coefficient=1e-3)], logger=False)
    """

    key = "LipschitzPenalty"

    def __init__(
        self,
        coefficient: float = COEFFICIENT,
        penalty: PenaltyName | Penalty = "product",
        layers: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        exclude: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        target: float = 1.0,
        block_size: int = 8,
        n_iterations: int = 1,
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        seed: int = 0,
        example_input: Any = None,
        name: str | None = None,
        knee: float | None = KNEE,
        unknown: Unknown = "skip",
        batch_dim: Literal[0] | None = 0,
        convolutions: Convolutions = "symbol",
    ) -> None:
        super().__init__(name, layers, exclude, block_size, n_iterations, seed, example_input, batch_dim, convolutions)
        self.coefficient = check_number("coefficient", coefficient)
        get_penalty(penalty, target, knee)
        check_integers(1, every_n_steps=every_n_steps)
        check_integers(0, warmup_steps=warmup_steps)
        self.every_n_steps = every_n_steps
        self.warmup_steps = warmup_steps
        check_choice("unknown", unknown, get_args(Unknown))
        self._arguments |= {"penalty": penalty, "target": target, "knee": knee, "unknown": unknown}
        self._trainable: set[int] = set()
        self._is_selected = self._sizes_are_shared = self._is_compared = False
        self._n_steps = 0
        self._n_steps_of: dict[int, int] = {}
        self._turns: dict[int, _Turn] = {}
        self._stepped_batch: int | None = None
        self._iterated_by: Optimizer | None = None
        self._backward_ran = False
        self._epoch_had_backward = False
        self._epoch_had_penalty = False
        skip_hooks(self, LipschitzPenalty, "on_before_zero_grad")

    @property
    def hyperparameters(self) -> dict[str, float | str]:
        """The arguments that say what is penalised, as numbers and text; not how closely the norms are followed."""
        penalty = self._arguments["penalty"]
        selections = {name: selection_text(self._arguments[name]) for name in ("layers", "exclude")}
        return {
            "penalty": penalty if isinstance(penalty, str) else getattr(penalty, "__name__", type(penalty).__name__),
            "coefficient": self.coefficient,
            "target": self._arguments["target"],
            "every_n_steps": self.every_n_steps,
            "warmup_steps": self.warmup_steps,
            "knee": check_knee(self._arguments["knee"]),
            "convolutions": self._arguments["convolutions"],
            **{name: text for name, text in selections.items() if text},
        }

    @property
    def regularizer(self) -> LipschitzRegularizer:
        """The regulariser of the model in training.

        Raises:
            RuntimeError: Before training started.
        """
        return self._started("regulariser")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._is_selected = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if "LBFGS" in class_names(optimizer) and any(g["line_search_fn"] for g in optimizer.param_groups):
                raise RuntimeError(
                    "LipschitzPenalty cannot serve LBFGS with a line search, which compares losses that do not hold "
                    "the penalty. Use LipschitzMixin and add self.lipschitz_penalty() to the loss, or "
                    "line_search_fn=None."
                )
        super().on_train_start(trainer, pl_module)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self.select_layers(pl_module, batch)
        if self._logs_bound(trainer):
            refuse_other_kind(trainer, self.tag, self.regularizer.bound_kind)
        if trainer.world_size > 1 and self.regularizer.bound_kind == "bound":
            refuse_statistics_of_one_rank(
                pl_module,
                "LipschitzMixin, whose gradients are averaged over ranks, or the product of the layers, without an "
                "example input",
            )

    def select_layers(self, pl_module: LightningModule, batch: Any = None) -> LipschitzRegularizer:
        """Return the regulariser of this training run, which is made at the first call, with the first batch at hand.

        Raises:
            ValueError: If no selected layer is trainable, or as :class:`LipschitzRegularizer` does.
        """
        if self._is_selected:
            return self.regularizer
        regularizer = LipschitzRegularizer(pl_module, self.coefficient, **self.arguments(batch), inputs=AWAITED)
        # Before an optimiser is toggled: that freezes the parameters of the others.
        self._trainable = {id(p) for p in pl_module.parameters() if p.requires_grad}
        if regularizer.bound_kind == "bound":
            self._check_trainable(regularizer)
        if not self._start(regularizer, pl_module):
            self._n_steps, self._n_steps_of = 0, {}  # another model warms up anew
        self._is_selected, self._turns, self._stepped_batch, self._sizes_are_shared = True, {}, None, False
        self._is_compared = self._n_steps > 0  # a training that goes on was compared when it began
        return regularizer

    @override
    def adopt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().adopt(trainer, pl_module)
        if self._is_settled:
            self._check_trainable(self.regularizer)

    def _check_trainable(self, regularizer: LipschitzRegularizer) -> None:
        if not any(p.requires_grad or id(p) in self._trainable for p in regularizer.penalised_parameters()):
            raise ValueError(
                f"LipschitzPenalty found no trainable layer: {[op.name for op in regularizer.operators]} are all "
                "frozen. Select others with `layers`, or use LipschitzMonitor to watch frozen layers."
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch_had_backward = self._epoch_had_penalty = False

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._backward_ran = self._epoch_had_backward = True

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Tens of microseconds in all: every look-up here shows in the step of a small network.
        if self._is_watching:
            self.adopt(trainer, pl_module)
        turn = self._turn_of(trainer, optimizer)
        parameters = None if turn.holds_all else self._parameters_of(optimizer)
        if (parameters is not None and not parameters) or not self._has_gradient(pl_module, optimizer):
            return
        self._epoch_had_penalty = True
        batch = batches_begun(trainer)
        if self._stepped_batch != batch:
            self._stepped_batch, self._iterated_by = batch, None
            self._n_steps += 1
        # Each optimiser by itself: one that steps every other batch would else always meet those that are left out.
        index = turn.index
        if turn.batch != batch:
            turn.batch = batch
            self._n_steps_of[index] = self._n_steps_of.get(index, 0) + 1
        if (self._n_steps_of[index] - 1) % self.every_n_steps:
            return
        if not self._sizes_are_shared:
            self._sizes_are_shared = True
            if trainer.world_size > 1:
                refuse_sizes_of_one_rank(self.regularizer.operators)
        # One iteration a training batch. A second optimiser of the same batch takes the present vectors; the same
        # optimiser again is LBFGS, whose every closure sees other weights.
        advance = self._iterated_by is None or self._iterated_by is optimizer
        if advance:
            self._iterated_by = optimizer
        scale = self._warmup() * self.every_n_steps * gradient_scale(trainer, optimizer)
        if self._is_compared:
            self.regularizer.accumulate_(scale, advance, parameters)
        else:
            self._compare(scale, advance, parameters, trainer.is_global_zero)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_watching:
            self.adopt(trainer, pl_module)
        if self._n_steps == 0 or not self._is_read(trainer):
            return
        if any(monitor.reports(self, trainer) for monitor in monitors_of(trainer)):
            return
        log_sigma = self.regularizer.log_sigma()
        log_bound = self.regularizer.log_bound_of(log_sigma)
        bound, value = torch.stack([log_bound.exp(), self.penalty_of(log_sigma)]).tolist()
        metrics = {f"{self.tag}/penalty": value}
        if self._logs_bound(trainer):
            metrics[f"{self.tag}/{self.regularizer.bound_kind}"] = bound
        log_metrics(trainer, pl_module, metrics)

    def _logs_bound(self, trainer: Trainer) -> bool:
        """Whether the bound is this callback's to log: a monitor of the same tag logs its own there."""
        monitors = monitors_of(trainer)
        return all(monitor.tag != self.tag and not monitor.reports(self, trainer) for monitor in monitors)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epoch_had_backward and not self._epoch_had_penalty:
            warnings.warn(
                "LipschitzPenalty had no effect in this epoch: no optimiser that holds one of its layers "
                f"{[op.name for op in self.regularizer.operators]} was stepped through Lightning. In manual "
                "optimisation use self.optimizers(), not self.optimizers(use_pl_optimizer=False).",
                stacklevel=2,
            )

    def penalty_of(self, log_sigma: Tensor) -> Tensor:
        """Return the penalty as a step would add it now, coefficient and warm-up included, shape ().

        Args:
            log_sigma: Logarithms of the spectral norms, shape (L,).
        """
        return self.regularizer.penalty_of(log_sigma) * (self.coefficient * self._warmup())

    def _warmup(self) -> float:
        return min(1.0, self._n_steps / self.warmup_steps) if self.warmup_steps else 1.0

    def _compare(self, scale: float | Tensor, advance: bool, parameters: list[Tensor] | None, tells: bool) -> None:
        """Add the penalty as every step does, and warn where its gradient is out of scale with the loss's."""
        regularizer = self.regularizer
        moved = regularizer.penalised_parameters() if parameters is None else parameters
        loss, penalty = gradient_norms(moved, lambda: regularizer.accumulate_(scale, advance, parameters))
        # A first step may be none: a gradient scaler that begins too high, a loss that does not reach these layers, a
        # head that begins at zero, with which the penalty has no gradient until it moves.
        self._is_compared = 0 < loss < math.inf and (penalty > 0 or self._n_steps > 3)
        if self._is_compared and tells:
            # Without warm-up: what is meant is the coefficient.
            warning = out_of_scale(loss, penalty / (self._warmup() * self.every_n_steps), self.coefficient)
            if warning is not None:
                warnings.warn(f"{type(self).__name__}({self.coefficient:g}): {warning}", stacklevel=2)

    def _turn_of(self, trainer: Trainer, optimizer: Optimizer) -> _Turn:
        """Return an optimiser's part, which is found at its first step and when the number of its parameters changes.

        An optimiser that holds all of the layers' parameters is not looked at again: it moves each of them, or what
        replaced it in the model, or nothing.
        """
        groups = optimizer.param_groups
        size = len(groups[0]["params"]) if len(groups) == 1 else sum([len(group["params"]) for group in groups])
        turn = self._turns.get(id(optimizer))
        if turn is None or turn.size != size or turn.optimizer() is not optimizer:
            index = next((i for i, other in enumerate(trainer.optimizers) if other is optimizer), -1)
            batch = turn.batch if turn is not None and turn.optimizer() is optimizer else None
            holds_all = len(self._parameters_of(optimizer)) == len(self.regularizer.penalised_parameters())
            turn = self._turns[id(optimizer)] = _Turn(weakref.ref(optimizer), index, size, holds_all, batch)
        return turn

    def _parameters_of(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the selected layers' parameters that an optimiser moves."""
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in self.regularizer.penalised_parameters() if id(p) in ids]

    def _has_gradient(self, pl_module: LightningModule, optimizer: Optimizer) -> bool:
        """Whether a backward pass ran: after ``training_step`` returned None the penalty alone must not move weights.

        In manual optimisation Lightning does not see every backward pass and never reports ``zero_grad``.
        """
        if pl_module.automatic_optimization:
            ran, self._backward_ran = self._backward_ran, False
            if not ran:
                return False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    return True
        return False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "n_steps": self._n_steps,
            "optimizer_steps": dict(self._n_steps_of),
            "regularizer": self._vectors(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, ("n_steps", "regularizer"), self.key)
        check_integers(0, n_steps=state_dict["n_steps"])
        steps = state_dict.get("optimizer_steps", {0: state_dict["n_steps"]})
        check_type("optimizer_steps", steps, Mapping, "a mapping from indices of optimisers to their steps")
        for index, n_steps in steps.items():
            check_integers(-1, optimizer_steps=index)
            check_integers(0, optimizer_steps=n_steps)
        if state_dict["regularizer"] is not None:
            check_type("regularizer", state_dict["regularizer"], Mapping, "a state or None")
            check_state(state_dict["regularizer"], ("vectors",), "The state's `regularizer`")
        self._n_steps, self._n_steps_of = state_dict["n_steps"], dict(steps)
        self._keep_until_training(state_dict["regularizer"])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_is_selected": False, "_turns": {}, "_iterated_by": None}
