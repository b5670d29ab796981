"""LipschitzMonitor: spectral norms, bound and penalty in every logger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_lip.callbacks._base import BaseCallback
from lightning_lip.callbacks._heat_map import heat_map
from lightning_lip.callbacks._trainer import (
    is_logging_step,
    log_to_loggers,
    logging_step,
    monitors_of,
    own_state,
    refuse_strategy,
    tensorboard_writers,
)
from lightning_lip.callbacks.certified_validation import CertifiedValidation
from lightning_lip.callbacks.penalty import LipschitzPenalty
from lightning_lip.mixin import LipschitzMixin
from lightning_lip.regularizer import LipschitzRegularizer

MAX_HISTORY = 512
"""Columns of the heat map: with more, every other one is dropped and the spacing doubles."""


@dataclass
class _Source:
    """One set of layers to report: a penalty's, a mixin's, or the monitor's own."""

    tag: str
    regularizer: LipschitzRegularizer
    penalty: Callable[[Tensor], Tensor] | None
    steps: list[int] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    spacing: int = 1
    seen: int = 0

    @property
    def names(self) -> list[str]:
        """The layers' names; a model that is itself a layer has none of its own."""
        return [op.name or "model" for op in self.regularizer.operators]

    @property
    def bound_tag(self) -> str:
        """Where the bound goes: the whole network's, if its graph is known, or the product's."""
        return f"{self.tag}/{self.regularizer.bound_kind}"

    def remember(self, step: int, norms: list[float]) -> None:
        if self.seen % self.spacing == 0:
            self.steps.append(step)
            self.norms.append(norms)
        self.seen += 1
        if len(self.steps) > MAX_HISTORY:
            self.steps, self.norms, self.spacing = self.steps[::2], self.norms[::2], 2 * self.spacing


class LipschitzMonitor(BaseCallback):
    """Logs the layers' spectral norms, their product and the penalty, with or without a penalty in training.

    On the Trainer's logging steps (``log_every_n_steps``), after the optimiser stepped, with one copy from the
    device, to every logger:

    - ``lipschitz/spectral_norm/<layer>``: the spectral norm, an *estimate from below*;
    - ``lipschitz/log_share/<layer>``: the layer's part of the log of the product, ``k log sigma``, which sum to it;
      with a traced graph ``log sigma`` times the bound's elasticity ``d log bound / d log sigma``;
    - ``lipschitz/product``: the product over the selected layers, an *estimate from below* (no bound on the network:
      activations, other layers and branches are not in it). With a traced graph (`example_input`, or the module's
      ``example_input_array``) instead ``lipschitz/bound``: the bound of the whole network, with estimated norms;
    - ``lipschitz/product_upper`` (``lipschitz/bound_upper``): the same with upper bounds of the norms that hold in
      exact arithmetic (no certificate: rounding is not accounted for), from the Frobenius norms less what the blocks of
      singular vectors hold; absent where there are convolutions;
    - ``lipschitz/penalty``: the penalty as a step adds it, coefficient and warm-up included; absent without a penalty.

    ``lipschitz/product`` (or ``bound``) and ``lipschitz/penalty`` are also handed to Lightning: ``EarlyStopping`` and
    ``ModelCheckpoint(monitor="lipschitz/product")``. TensorBoard gets a custom-scalars layout (all layers in one chart,
    the product between its estimate and its upper bound as a margin chart) and, where matplotlib is installed, a
    layer-by-step heat map ``lipschitz/spectral_norms`` at the end of each epoch (about a tenth of a second each).

    Each :class:`LipschitzPenalty` of the Trainer, or else the module's :class:`LipschitzMixin`, lends its layers and
    singular vectors; if there is none, or `layers` or `exclude` is given, the monitor iterates vectors of its own, on
    logging steps only.

    Args:
        layers: Names, glob patterns or submodules to watch; None takes the penalty's, or every layer with a weight.
        exclude: Names, glob patterns or submodules to leave out.
        block_size: Singular vectors a layer, r, of the monitor's own iteration.
        n_iterations: Iterations of its own a logging step.
        seed: Seed of the private generator that its own vectors start from.
        example_input: An input of the model, whose graph is then traced; for the monitor's own iteration.
        heat_map_every_n_epochs: Draw the heat map at the end of every n-th epoch only; 0 draws none.
        certified: A :class:`CertifiedValidation` that this monitor runs at every validation: the certified bound, and
            the certified accuracy of a classifier or the certified worst-case MAE of a regression.
        name: Tells several monitors in one Trainer apart; it enters the logged names, ``lipschitz/<name>/product``. A
            named monitor takes the layers of the :class:`LipschitzPenalty` of the same name, if there is one; one
            without a name those of every penalty that no other monitor is named after.

    Raises:
        ValueError: If `block_size` or `n_iterations` is below 1, or `heat_map_every_n_epochs` below 0. At the start of
            training: if a selection matches nothing.
        UnsupportedLayerError: At the start of training, if the operator of a selected layer is not known.
    """

    def __init__(
        self,
        layers: str | nn.Module | Sequence[str | nn.Module] | None = None,
        exclude: str | nn.Module | Sequence[str | nn.Module] | None = None,
        block_size: int = 8,
        n_iterations: int = 3,
        seed: int = 0,
        example_input: Any = None,
        heat_map_every_n_epochs: int = 1,
        certified: CertifiedValidation | None = None,
        name: str | None = None,
    ) -> None:
        for argument, value, least in (
            ("block_size", block_size, 1),
            ("n_iterations", n_iterations, 1),
            ("heat_map_every_n_epochs", heat_map_every_n_epochs, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Expected `{argument}` to be an integer of at least {least}, got {value!r}.")
        self._heat_map_every_n_epochs = heat_map_every_n_epochs
        self._certified = certified
        self.name = name
        self._layers, self._exclude = layers, exclude
        self._own_arguments: dict[str, Any] = {
            "block_size": block_size,
            "n_iterations": n_iterations,
            "seed": seed,
            "example_input": example_input,
        }
        self._own: LipschitzRegularizer | None = None
        self._sources: list[_Source] = []
        self._loaded: dict[str, Any] | None = None

    @property
    @override
    def state_key(self) -> str:
        return f"LipschitzMonitor[{self.name}]" if self.name else "LipschitzMonitor"

    @property
    def tag(self) -> str:
        """Prefix of the logged names: ``lipschitz`` or ``lipschitz/<name>``."""
        return f"lipschitz/{self.name}" if self.name else "lipschitz"

    def reports(self, penalty: LipschitzPenalty, trainer: Trainer) -> bool:
        """Whether this monitor takes the layers of a penalty, and logs it."""
        if self._layers is not None or self._exclude is not None:
            return False
        if self.name:
            return penalty.name == self.name
        return not penalty.name or all(monitor.name != penalty.name for monitor in monitors_of(trainer))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_strategy(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sources, self._own = [], None
        if self._layers is None and self._exclude is None:
            self._sources = self._lent_sources(trainer, pl_module)
        if not self._sources:
            self._own = LipschitzRegularizer(
                pl_module, 0.0, layers=self._layers, exclude=self._exclude, **self._own_arguments
            )
            self._sources = [_Source(self.tag, self._own, None)]
        if self._loaded is not None:
            self._restore(self._loaded)
            self._loaded = None
        for writer in tensorboard_writers(trainer):
            writer.add_custom_scalars(_layout(self._sources))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logging = is_logging_step(trainer)
        if not (logging or trainer.is_last_batch):
            return
        if self._own is not None:
            self._own.iterate()
        kept: dict[str, float] = {}
        for source in self._sources:
            metrics, norms = _measure(source)
            if logging:
                source.remember(logging_step(trainer), norms)
                log_to_loggers(trainer, metrics)
            kept |= {tag: metrics[tag] for tag in (source.bound_tag, f"{source.tag}/penalty") if tag in metrics}
        pl_module.log_dict(kept, logger=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = self._heat_map_every_n_epochs
        if every == 0 or (trainer.current_epoch + 1) % every:
            return
        for writer in tensorboard_writers(trainer):
            for source in self._sources:
                names = source.names
                figure = heat_map(names, source.steps, source.norms)
                if figure is not None:
                    # The epoch's last step, as Lightning gives it to epoch-end metrics.
                    writer.add_figure(f"{source.tag}/spectral_norms", figure, logging_step(trainer) - 1)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._certified is not None:
            self._certified.on_validation_epoch_start(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._certified is not None:
            self._certified.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._certified is not None:
            self._certified.on_validation_epoch_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._sources:
            return self._loaded or {}
        histories = {s.tag: [s.steps, s.norms, s.spacing, s.seen] for s in self._sources}
        return {"histories": histories, "own": None if self._own is None else self._own.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Kept until training starts: the layers are not selected yet.
        self._loaded = dict(state_dict) or None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model behind: a copy selects the layers of its own run, and takes vectors and history over."""
        return own_state(self) | {"_loaded": self.state_dict() or None, "_sources": [], "_own": None}

    def _lent_sources(self, trainer: Trainer, pl_module: LightningModule) -> list[_Source]:
        """Return the sources that the trainer's penalties lend, or else the module's mixin."""
        penalties = [c for c in trainer.callbacks if isinstance(c, LipschitzPenalty) and self.reports(c, trainer)]  # type: ignore[attr-defined]
        if penalties:
            return [_Source(p.tag, p.select_layers(pl_module), p.penalty_of) for p in penalties]
        if isinstance(pl_module, LipschitzMixin):
            regularizer = pl_module.lipschitz_regularizer()
            return [_Source(self.tag, regularizer, lambda log: regularizer.penalty_of(log) * regularizer.coefficient)]
        return []

    def _restore(self, state: dict[str, Any]) -> None:
        if self._own is not None and state["own"] is not None:
            self._own.load_state_dict(state["own"])
        for source in self._sources:
            steps, norms, source.spacing, source.seen = state["histories"].get(source.tag, [[], [], 1, 0])
            source.steps, source.norms = list(steps), list(norms)


def _measure(source: _Source) -> tuple[dict[str, float], list[float]]:
    """Return what a source logs, by name, and its spectral norms, with one copy from the device."""
    regularizer = source.regularizer
    with torch.inference_mode(False), torch.enable_grad():
        log_sigma = regularizer.log_sigma().requires_grad_()
        log_bound = regularizer.log_bound_of(log_sigma)
        (elasticity,) = torch.autograd.grad(log_bound, log_sigma)
    with torch.no_grad():
        log_sigma = log_sigma.detach()
        scalars = {source.bound_tag: log_bound.detach().exp()}
        if regularizer.has_upper:
            log_upper = regularizer.sigma_upper().to(log_sigma).log()
            scalars[f"{source.bound_tag}_upper"] = regularizer.log_bound_of(log_upper).exp()
        if source.penalty is not None:
            scalars[f"{source.tag}/penalty"] = source.penalty(log_sigma)
        values = torch.cat([log_sigma.exp(), elasticity * log_sigma, torch.stack(list(scalars.values()))]).tolist()
    tags = [f"{source.tag}/spectral_norm/{name}" for name in source.names]
    tags += [f"{source.tag}/log_share/{name}" for name in source.names]
    return dict(zip([*tags, *scalars], values, strict=True)), values[: len(source.names)]


def _layout(sources: Sequence[_Source]) -> dict[str, dict[str, list[Any]]]:
    """Return TensorBoard's custom-scalars layout: one category a source."""
    layout: dict[str, dict[str, list[Any]]] = {}
    for source in sources:
        names, bound, kind = source.names, source.bound_tag, source.regularizer.bound_kind
        layout[source.tag] = charts = {
            "spectral norms": ["Multiline", [f"{source.tag}/spectral_norm/{name}" for name in names]],
            f"parts of log {kind}": ["Multiline", [f"{source.tag}/log_share/{name}" for name in names]],
        }
        if source.regularizer.has_upper:
            # A margin chart wants value, lower, upper; the estimate is from below, so it is both of the first.
            charts[f"{kind}, with its upper bound"] = ["Margin", [bound, bound, f"{bound}_upper"]]
        else:
            charts[kind] = ["Multiline", [bound]]
    return layout
