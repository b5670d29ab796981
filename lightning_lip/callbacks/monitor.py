"""LipschitzMonitor: spectral norms, bound and penalty in every logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lip.callbacks.certified_validation import CertifiedValidation
from lightning_lip.callbacks.lightning.observing import ObservingCallback
from lightning_lip.callbacks.lightning.trainer import (
    has_tensorboard,
    is_end_or_logging_step,
    is_logging_step,
    log_to_loggers,
    log_to_trainer,
    logging_step,
    monitored_metrics,
    monitors_of,
    refuse_other_kind,
    tensorboard_writers,
)
from lightning_lip.callbacks.monitoring.source import HEALTH, Source, check_sources
from lightning_lip.callbacks.monitoring.summary import summary_of
from lightning_lip.callbacks.penalty import LipschitzPenalty
from lightning_lip.callbacks.tensorboard.figures import heat_map, share_chart
from lightning_lip.callbacks.tensorboard.hparams import end_session, start_session
from lightning_lip.checks import check_choice, check_flag, check_integers, check_state, check_type, check_vectors
from lightning_lip.mixin import LipschitzMixin
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.selection import Unknown
from lightning_lip.penalty.regularizer import LipschitzRegularizer
from lightning_lip.reporting.messages import tell
from lightning_lip.usage.observation import AWAITED


class LipschitzMonitor(ObservingCallback):
    """Logs the layers' spectral norms, their product and the penalty, with or without a penalty in training.

    On the Trainer's logging steps (``log_every_n_steps``), after the optimiser stepped, with one copy from the
    device, to every logger:

    - ``lipschitz/spectral_norm/<layer>``: the spectral norm, an *estimate from below*;
    - ``lipschitz/log_share/<layer>``: the layer's part of the log of the product, ``k log sigma``, which sum to it;
      with a traced graph ``log sigma`` times the bound's elasticity ``d log bound / d log sigma``;
    - with `health` ``lipschitz/weight_norm/<layer>``, the Frobenius norm ``|W|_F`` (of a convolution its kernel's, of a
      layer fused with a normalisation that of both together); ``lipschitz/stable_rank/<layer>``, ``|W|_F^2 / sigma^2``
      (of a convolution per place: below 1 where few frequencies pass); and ``lipschitz/update_ratio/<layer>``,
      ``|W_new - W|_F / |W|_F`` of the batch's steps, for which a copy of the watched weights lives from before the step
      to the end of this batch;
    - ``lipschitz/product``: the product over the selected layers, an *estimate from below* (no bound on the network:
      activations, other layers and branches are not in it). With a traced graph (`example_input`, or the module's
      ``example_input_array``) instead ``lipschitz/bound``: the bound of the whole network, with estimated norms;
    - ``lipschitz/product_upper`` (``lipschitz/bound_upper``): the same with upper bounds of the norms that hold in
      exact arithmetic (no certificate: rounding is not accounted for), from the Frobenius norms less what the blocks of
      singular vectors hold; absent where there are convolutions;
    - ``lipschitz/penalty``: the penalty as a step adds it, coefficient and warm-up included; absent without a penalty.

    ``lipschitz/product`` (or ``bound``) and ``lipschitz/penalty`` are also handed to Lightning: ``EarlyStopping`` and
    ``ModelCheckpoint(monitor="lipschitz/product")``. After training the last values are logged, if the last step was no
    logging step, and a table tells the first and the last values of each layer. TensorBoard also gets

    - a custom-scalars layout: all layers in one chart, the product between its estimate and its upper bound as a margin
      chart, and with a :class:`CertifiedValidation` the interval from ``lipschitz/lower`` to ``lipschitz/certified`` as
      a band, with the line of ``lipschitz/estimate``, which lies above the band where a tighter method certified;
    - at the end of each epoch histograms ``lipschitz/spectrum/<layer>`` of the r leading singular values (Ritz values,
      *estimates from below*), and where matplotlib is installed the figures ``lipschitz/spectral_norms``, a
      layer-by-step heat map, and ``lipschitz/log_shares``, the parts of the logarithm stacked over time (a tenth to
      half a second each);
    - in the HPARAMS tab the penalty's arguments beside the module's own saved hyperparameters, with the last values of
      the product (or bound), the penalty, and what ``EarlyStopping`` and ``ModelCheckpoint`` monitor. The module's
      ``hparams``, checkpoints and ``hparams.yaml`` are not touched.

    Each :class:`LipschitzPenalty` of the Trainer, or else the module's :class:`LipschitzMixin`, lends its layers and
    singular vectors; if there is none, or `layers` or `exclude` is given, the monitor iterates vectors of its own, on
    logging steps only.

    Args:
        layers: Names, glob patterns, submodules or types to watch; None takes the penalty's, or every layer with a
            weight.
        exclude: Names, glob patterns, submodules or types to leave out.
        block_size: Singular vectors a layer, r, of the monitor's own iteration.
        n_iterations: Iterations of its own a logging step.
        seed: Seed of the private generator that its own vectors start from.
        example_input: An input of the model, whose graph is then traced, or ``"batch"`` or ``"batch:<key>"`` for that
            of the first training batch, as in :class:`LipschitzPenalty`; for the monitor's own iteration.
        figures_every_n_epochs: Draw figures and histograms at the end of every n-th epoch only; 0 draws none.
        certified: A :class:`CertifiedValidation` that this monitor runs at every validation: the certified bound, and
            the certified accuracy of a classifier or the certified worst-case MAE of a regression.
        name: Tells several monitors in one Trainer apart; it enters the logged names, ``lipschitz/<name>/product``. A
            named monitor takes the layers of the :class:`LipschitzPenalty` of the same name, if there is one; one
            without a name those of every penalty that no other monitor is named after.
        unknown: What becomes of layers without a known norm in the monitor's own product: ``"skip"`` or ``"refuse"``,
            as in :class:`LipschitzPenalty`.
        health: Whether to log weight norm, stable rank and update ratio.
        summary: Whether to tell the table at the end of training, on the first rank, as Lightning tells its messages.
        batch_dim: None says that the whole example input is one sample, as a graph's nodes are, and not a batch.
        convolutions: Which norm they have in the monitor's own product, as in :class:`LipschitzPenalty`.

    Raises:
        ValueError: If a number is out of range. At the start of training: if a selection matches nothing.
        TypeError: If `certified` or `name` is of another type.
        UnsupportedLayerError: At the start of training, if a layer without a known norm is refused, or the graph of
            `example_input` has no known bound.
        RuntimeError: At the start of training, if something monitors ``lipschitz/bound`` where it is
            ``lipschitz/product``, or the reverse.
    """

    key = "LipschitzMonitor"

    def __init__(
        self,
        layers: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        exclude: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        block_size: int = 8,
        n_iterations: int = 3,
        seed: int = 0,
        example_input: Any = None,
        figures_every_n_epochs: int = 1,
        certified: CertifiedValidation | None = None,
        name: str | None = None,
        unknown: Unknown = "skip",
        health: bool = True,
        summary: bool = True,
        batch_dim: Literal[0] | None = 0,
        convolutions: Convolutions = "symbol",
    ) -> None:
        super().__init__(name, layers, exclude, block_size, n_iterations, seed, example_input, batch_dim, convolutions)
        check_choice("unknown", unknown, get_args(Unknown))
        self._arguments |= {"unknown": unknown}
        check_integers(0, figures_every_n_epochs=figures_every_n_epochs)
        check_flag("health", health)
        check_flag("summary", summary)
        self._health, self._summary = health, summary
        self._figures_every_n_epochs = figures_every_n_epochs
        if certified is not None and not isinstance(certified, CertifiedValidation):
            raise TypeError(
                f"Expected `certified` to be a CertifiedValidation((0.1,)), say, or None, got {certified!r}."
            )
        self._certified = certified
        self._has_own_layers = layers is not None or exclude is not None
        self._sources: list[Source] = []
        self._laid_out: list[list[str]] = []
        """The layers that TensorBoard has charts of."""
        self._last_logged = -1

    @property
    @override
    def watched_tags(self) -> list[str]:
        return [source.tag for source in self._sources]

    @property
    @override
    def watched_operators(self) -> list[LinearOperator]:
        return [operator for source in self._sources for operator in source.regularizer.operators]

    def reports(self, penalty: LipschitzPenalty, trainer: Trainer) -> bool:
        """Whether this monitor takes the layers of a penalty, and logs it."""
        if self._has_own_layers:
            return False
        if self.name:
            return penalty.name == self.name
        return not penalty.name or all(monitor.name != penalty.name for monitor in monitors_of(trainer))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            start_session(trainer, pl_module, _arguments(trainer, pl_module), self._metrics(trainer))

    def _certifies(self, trainer: Any) -> bool:
        """Whether this training logs the certified interval."""
        return self._certified is not None or any(isinstance(c, CertifiedValidation) for c in trainer.callbacks)

    def _metrics(self, trainer: Any) -> list[str]:
        """Return the tags of the scalars by which runs are compared."""
        interval = ["lipschitz/certified", "lipschitz/lower"] if self._certifies(trainer) else []
        tags = [penalty.tag for penalty in _penalties(trainer)] or ["lipschitz"]
        # Both with a graph and without: TensorBoard takes the columns of all runs from one of them.
        bounds = [f"{tag}/{kind}" for tag in tags for kind in ("bound", "product", "penalty")]
        return [*monitored_metrics(trainer), *interval, *bounds]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sources, self._core, self._last_logged, self._laid_out = [], None, -1, []
        super().on_train_start(trainer, pl_module)

    @override
    def takes_batch(self, trainer: Trainer) -> bool:
        return super().takes_batch(trainer) or any(p.takes_batch(trainer) for p in self._lending(trainer))

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if not self._has_own_layers:
            self._sources = self._lent_sources(trainer, pl_module, batch)
        if not self._sources:
            self._core = LipschitzRegularizer(pl_module, 0.0, **self.arguments(batch), inputs=AWAITED)
            self._sources = [Source(self.tag, self._core, None, self._health)]
        for source in self._sources:
            refuse_other_kind(trainer, source.tag, source.regularizer.bound_kind)
        if self._loaded is not None:
            self._restore(self._loaded)
            self._loaded = None
        self._lay_out(trainer)

    def _lay_out(self, trainer: Trainer) -> None:
        """Give TensorBoard the charts of the present layers, if they are others than before."""
        names = [source.names for source in self._sources]
        if names == self._laid_out:
            return
        self._laid_out = names
        # TensorBoard keeps the last layout of a run: it has the charts of every monitor that has started.
        layout = _layout([source for monitor in monitors_of(trainer) for source in monitor._sources])
        if self._certifies(trainer):
            interval = ["lipschitz/estimate", "lipschitz/lower", "lipschitz/certified"]
            layout.setdefault("lipschitz", {})["certified interval (band), plain bound (line)"] = ["Margin", interval]
        for writer in tensorboard_writers(trainer):
            writer.add_custom_scalars(layout)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._is_watching:
            self.adopt(trainer, pl_module)
        # Of several steps in one batch the first: the ratio is that of the batch.
        if self._health and is_end_or_logging_step(trainer):
            for source in self._sources:
                source.before_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_watching:
            self.adopt(trainer, pl_module)
        if not self._is_read(trainer):
            for source in self._sources:
                source.forget()
            return
        self._lay_out(trainer)
        logging = is_logging_step(trainer)
        if self._core is not None and self._core.operators:
            self._core.iterate()
        kept: dict[str, float] = {}
        for source in filter(_has_layers, self._sources):
            metrics, norms, shares = source.measure()
            if logging:
                source.remember(logging_step(trainer), norms, shares)
                log_to_loggers(trainer, metrics)
                self._last_logged = logging_step(trainer)
            kept |= {tag: metrics[tag] for tag in (source.bound_tag, f"{source.tag}/penalty") if tag in metrics}
        log_to_trainer(trainer, pl_module, kept)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = self._figures_every_n_epochs
        if every == 0 or (trainer.current_epoch + 1) % every:
            return
        # The epoch's last step, as Lightning gives it to epoch-end metrics.
        step = logging_step(trainer) - 1
        if not has_tensorboard(trainer):
            return
        for source in filter(_has_layers, self._sources):
            spectra = source.regularizer.ritz_values()  # on every rank: those of sharded weights are sums over ranks
            for writer in tensorboard_writers(trainer):
                _draw(writer, source, spectra, step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The HPARAMS tab compares the last values of runs: they must be those of the last step.
        step = logging_step(trainer) - 1
        is_behind = trainer.log_every_n_steps and self._last_logged != step  # type: ignore[attr-defined]
        for source in self._sources:
            if is_behind:
                log_to_loggers(trainer, source.measure()[0], step)
            if self._summary and source.last:
                tell(summary_of(source, step + 1))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end_session(trainer)

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
        histories = {source.tag: source.state() for source in self._sources}
        return {"histories": histories, "own": None if self._core is None else self._core.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_type("state", state_dict, Mapping, "a mapping")
        if state_dict:  # empty before training
            check_state(state_dict, ("histories", "own"), self.key)
            check_sources(state_dict["histories"])
            if state_dict["own"] is not None:
                check_state(state_dict["own"], ("vectors",), "The state's `own`")
                check_vectors("own['vectors']", state_dict["own"]["vectors"])
        self._keep_until_training(dict(state_dict) or None)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_loaded": self.state_dict() or None, "_sources": []}

    def _lending(self, trainer: Any) -> list[LipschitzPenalty]:
        """Return the trainer's penalties that lend this monitor their layers."""
        return [penalty for penalty in _penalties(trainer) if self.reports(penalty, trainer)]

    def _lent_sources(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> list[Source]:
        """Return the sources that the trainer's penalties lend or, without a penalty, the module's mixin."""
        penalties = self._lending(trainer)
        if penalties:
            return [Source(p.tag, p.select_layers(pl_module, batch), p.penalty_of, self._health) for p in penalties]
        if isinstance(pl_module, LipschitzMixin):
            regularizer = pl_module.lipschitz_regularizer()

            def penalty_of(log_sigma: Tensor) -> Tensor:
                return regularizer.penalty_of(log_sigma) * regularizer.coefficient

            return [Source(self.tag, regularizer, penalty_of, self._health)]
        return []

    def _restore(self, state: dict[str, Any]) -> None:
        if self._core is not None and state["own"] is not None:
            self._core.load_state_dict(state["own"])
        for source in self._sources:
            if source.tag in state["histories"]:
                source.restore(state["histories"][source.tag])


def _has_layers(source: Source) -> bool:
    """Whether layers are known: where only a forward pass shows them, a first step that was skipped showed none."""
    return bool(source.names)


def _penalties(trainer: Any) -> list[LipschitzPenalty]:
    return [callback for callback in trainer.callbacks if isinstance(callback, LipschitzPenalty)]


def _arguments(trainer: Any, pl_module: LightningModule) -> dict[str, Any]:
    """Return the penalties' arguments, by which runs are compared, or that there is no penalty."""
    penalties = _penalties(trainer)
    if not penalties and not isinstance(pl_module, LipschitzMixin):
        none: dict[str, Any] = dict.fromkeys(f"lipschitz/{name}" for name in LipschitzPenalty().hyperparameters)
        return none | {"lipschitz/penalty": "none", "lipschitz/coefficient": 0.0}
    return {f"{p.tag}/{name}": value for p in penalties for name, value in p.hyperparameters.items()}


def _draw(writer: Any, source: Source, spectra: Sequence[Tensor], step: int) -> None:
    """Give a TensorBoard writer the histograms and figures of a source."""
    for name, values in zip(source.names, spectra, strict=True):
        if bool(values.isfinite().all()):  # TensorBoard refuses others
            writer.add_histogram(f"{source.tag}/spectrum/{name}", values, step)
    history = source.history
    if not history.is_of(len(source.names)):  # of a checkpoint, and nothing was measured since
        return
    heat = heat_map(source.names, history.steps, history.norms)
    chart = share_chart(source.names, history.steps, history.shares, source.regularizer.bound_kind)
    for tag, figure in (("spectral_norms", heat), ("log_shares", chart)):
        if figure is not None:
            writer.add_figure(f"{source.tag}/{tag}", figure, step)


def _layout(sources: Sequence[Source]) -> dict[str, dict[str, list[Any]]]:
    """Return TensorBoard's custom-scalars layout: one category a source."""
    layout: dict[str, dict[str, list[Any]]] = {}
    for source in sources:
        names, bound, kind = source.names, source.bound_tag, source.regularizer.bound_kind
        layout[source.tag] = charts = {
            "spectral norms": ["Multiline", [f"{source.tag}/spectral_norm/{name}" for name in names]],
            f"parts of log {kind}": ["Multiline", [f"{source.tag}/log_share/{name}" for name in names]],
        }
        for measure in HEALTH if source.has_health else ():
            tags = [f"{source.tag}/{measure}/{name}" for name in names]
            charts[f"{measure.replace('_', ' ')}s"] = ["Multiline", tags]
        if source.regularizer.has_upper:
            # A margin chart wants value, lower, upper; the estimate is from below, so it is both of the first.
            charts[f"{kind}, with its upper bound"] = ["Margin", [bound, bound, f"{bound}_upper"]]
        else:
            charts[kind] = ["Multiline", [bound]]
    return layout
