"""SpectralCaps: each layer's estimated spectral norm held at or below a radius, whatever the optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lip.callbacks.lightning.base import SelectingCallback
from lightning_lip.callbacks.lightning.ranks import refuse_sizes_of_one_rank
from lightning_lip.callbacks.lightning.trainer import log_metrics
from lightning_lip.checks import check_choice, check_integers, check_state, check_type
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.selection import Unknown
from lightning_lip.projection.spectral_caps import STATE_KEYS, NormCaps, check_radius


class SpectralCaps(SelectingCallback[NormCaps]):
    """Scales layers down after every optimiser step, so that their estimated spectral norms stay within a radius.

    At the end of each step of any optimiser of torch's that holds one of the layers' weights (Muon, Adam, one that is
    stepped past Lightning), a weight whose norm exceeds the radius is multiplied by ``radius / norm``; others stay bit
    for bit. The norms are *estimates*: there is no certificate. They come from one iteration a step, with vectors that
    persist, and a margin for what such an estimate still lacks: see
    :class:`~lightning_lip.projection.spectral_caps.NormCaps`. In trainings with Adam and with Muon whose steps move the
    weights by a few hundredths of the radius, the exact norms stayed at most 1e-3 above it; where Muon moves a wide
    layer by a tenth, a direction outside the block can rise some percent above it for a few steps. In the first step
    the vectors are iterated until they have settled, up to 60 times; nothing is done before it.

    Every rank scales alike. Under ModelParallelStrategy linear layers may be sharded (FSDP2, tensor parallelism): a
    step is two small ``all_reduce`` for all layers then. Weights in fp16 or bf16 are held within their rounding, 2^-8
    for bf16. Layers share nothing: a network's bound is held by :class:`LipschitzConstraint`.

    On logging steps the callback logs ``lipschitz/capped``, how many layers the last step scaled down.

    Args:
        radius: The largest spectral norm, positive, or ``"mup"``: ``sqrt(out / in)`` of each layer, so that an input
            whose entries are of size 1 gives outputs of size 1 at most (the spectral condition of Yang, Simon and
            Bernstein, 2023). For a convolution these are its output and input channels, whatever its kernel, stride
            and groups.
        layers: Names, glob patterns, submodules or types to select; None selects every layer with a weight.
        exclude: Names, glob patterns, submodules or types to leave out.
        block_size: Singular vectors a layer, r.
        n_iterations: Iterations a step.
        every_n_steps: Act after every n-th such step only.
        seed: Seed of the private generator that the singular vectors start from; the same on every rank.
        name: Tells several of these callbacks in one Trainer apart (one for each radius, say); it enters the logged
            name, ``lipschitz/<name>/capped``.
        unknown: ``"skip"`` leaves out layers without a known norm (embeddings, attention, normalisations), and
            parametrised weights that scale with none of their parameters, and tells so at the start, but for one that
            `layers` names; ``"refuse"`` refuses them. ``weight_norm`` is held by its magnitude.
        convolutions: Which norm of convolutions is held: ``"symbol"``, on the infinite grid, or ``"spatial"``, at the
            size of their first input.

    Raises:
        ValueError: If an argument is out of range. At the start of training: if a selection matches nothing.
        UnsupportedLayerError: At the start of training, if a layer is refused, or none can be held.
        RuntimeError: At the start of training, under DeepSpeedStrategy or FSDPStrategy.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lip import SpectralCaps
        >>> trainer = Trainer(callbacks=[SpectralCaps(radius="mup", exclude="head")], logger=False)
    """

    key = "SpectralCaps"

    def __init__(
        self,
        radius: float | Literal["mup"],
        layers: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        exclude: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        block_size: int = 16,
        n_iterations: int = 1,
        every_n_steps: int = 1,
        seed: int = 0,
        name: str | None = None,
        unknown: Unknown = "skip",
        convolutions: Convolutions = "symbol",
    ) -> None:
        super().__init__(name, layers, exclude, block_size, n_iterations, seed, None, 0, convolutions)
        self.radius = check_radius(radius)
        check_integers(1, every_n_steps=every_n_steps)
        check_choice("unknown", unknown, get_args(Unknown))
        self.every_n_steps = every_n_steps
        del self._arguments["example_input"], self._arguments["batch_dim"]  # no graph is traced
        self._arguments |= {"radius": self.radius, "unknown": unknown}
        self._n_steps = 0
        self._capped: Tensor | None = None
        self._sizes_to_share = False
        self._handle: RemovableHandle | None = None

    @property
    def caps(self) -> NormCaps:
        """What holds the norms of the model in training.

        Raises:
            RuntimeError: Before training started.
        """
        return self._started("caps")

    @override
    def takes_batch(self, trainer: Trainer) -> bool:
        return False

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if not self._start(NormCaps(pl_module, **self._arguments), pl_module):
            self._n_steps = 0  # another model
        self._capped = None
        self._sizes_to_share = trainer.world_size > 1
        # In the step itself: what comes next, another callback or a second optimiser, finds the weights within the
        # radius. For all optimisers of the process: one may be stepped past Lightning, or wrapped by another class.
        self._release()
        self._handle = register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._moves_a_layer(optimizer):
            return
        self._n_steps += 1
        if self._n_steps % self.every_n_steps:
            return
        if self._sizes_to_share:
            self._sizes_to_share = False
            refuse_sizes_of_one_rank(self.caps.operators)
        self._capped = self.caps.step()

    def _moves_a_layer(self, optimizer: Optimizer) -> bool:
        """Whether an optimiser holds one of the parameters that the layers' weights are made of."""
        layers = {id(p) for op in self.caps.operators for p in op.parameters}
        return any(id(p) in layers for group in optimizer.param_groups for p in group["params"])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._capped is not None and self._is_read(trainer):
            log_metrics(trainer, pl_module, {f"{self.tag}/capped": float(self._capped.sum())})

    @override
    def _end_fit(self) -> None:
        super()._end_fit()
        self._release()

    def _release(self) -> None:
        """Take the hook off the optimisers."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"n_steps": self._n_steps, "caps": self._vectors()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, ("n_steps", "caps"), self.key)
        check_integers(0, n_steps=state_dict["n_steps"])
        if state_dict["caps"] is not None:
            check_type("caps", state_dict["caps"], Mapping, "a state or None")
            check_state(state_dict["caps"], STATE_KEYS, "The state's `caps`")
        self._n_steps = state_dict["n_steps"]
        self._keep_until_training(state_dict["caps"])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_handle": None, "_capped": None}
