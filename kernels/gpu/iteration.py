"""The GPU backend: persistent blocks of all weights of one device and dtype, iterated by Triton kernels.

The kernels are in :mod:`lightning_lip.kernels.gpu.kernels`, the tables they read in
:mod:`lightning_lip.kernels.gpu.tables`; this module owns the buffers and launches. An iteration is five launches for
all layers together (four at R = 1; one more where some weights can be read 128 bits at a time and others cannot), the
penalty's derivative one, the rank-one update one for each dtype and alignment of gradients.

Nothing waits for the GPU, no sum depends on the order of execution (results repeat bit for bit on one GPU), nothing is
tuned at run time. What has been proven without a GPU, and how, is in tests/kernels/gpu; no speed has been measured.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lightning_lip.kernels.gpu import tables
from lightning_lip.kernels.penalties import PENALTY_CODES
from lightning_lip.kernels.reference import PowerStep

_F = TypeVar("_F", bound=Callable[..., Any])

OLDEST_TRITON = (3, 3)
"""The kernels keep tiles in tuples, which Triton knows since then."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4 if torch.version.hip else 8
"""256 threads, on AMD too, whose warps are twice as wide. In the sweep 128 registers a thread hold the sums and the
tile; more threads with fewer registers each would spill."""


def interpreted() -> bool:
    """Return whether Triton interprets its kernels (TRITON_INTERPRET=1), on the CPU: slow, for tests only."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def columns_at_a_time(block: int) -> int:
    """Return the columns of Z that a program keeps r x r products of: R * R * columns numbers in fp64."""
    return min(256 // block, 2048 // (block * block))


def _uncompiled(method: _F) -> _F:
    """Have torch.compile call a method in Python instead of tracing it: a graph would hold addresses."""
    disable: Any = torch.compiler.disable  # it has no types
    return cast(_F, disable(method))


def capturing(device: torch.device) -> bool:
    """Return whether the current stream of a device records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class GpuIteration:
    """Block iteration of L weights of one CUDA device and one dtype, with everything preallocated.

    Args:
        weights: L matrices of shapes (m_l, n_l), fp32, bf16 or fp16, of any strides. Their addresses may change later.
        vectors: L starting blocks, shapes (r_l, min(m_l, n_l)) with orthonormal rows, r_l <= 16. They are copied.

    Attributes:
        n_refreshes: How often a table of addresses was copied to the device: only where one had changed.

    Raises:
        ValueError: If a weight cannot be served (:meth:`why_not` says why), or the weights differ in dtype or device.
    """

    def __init__(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        for weight, block in zip(weights, vectors, strict=True):
            reason = self.why_not(weight, block.shape[0])
            if reason is not None:
                raise ValueError(f"The GPU kernels cannot serve a weight of shape {tuple(weight.shape)}: {reason}.")
        if len({(w.device, w.dtype) for w in weights}) != 1:
            found = sorted({f"{w.dtype} on {w.device}" for w in weights})
            raise ValueError(f"Expected weights of one dtype on one device, got {found}: make one object for each.")
        self.device = weights[0].device
        self.dtype = weights[0].dtype
        self.n_refreshes = 0
        self._block_sizes = [block.shape[0] for block in vectors]
        self._block = tables.block_class(self._block_sizes)
        self._shapes = [tuple(weight.shape) for weight in weights]
        self._seen: dict[str, list[Any]] = {"weights": [], "grads": []}
        self._addresses = {
            name: torch.zeros(len(weights), dtype=torch.int64, device=self.device) for name in ("weights", "grads")
        }
        self._plan_for([tables.describe(weight, self._block) for weight in weights])
        self._allocate()
        for view, block in zip(self.vectors, vectors, strict=True):
            view.copy_(block)
        self._gradient_plans: dict[Any, tuple[tables.GradientPlan, Tensor, Tensor]] = {}
        self._gradient_key: Any = None
        self._multiplicities: tuple[int, ...] | None = None

    @staticmethod
    def why_not(weight: Tensor, block_size: int) -> str | None:
        """Return why this weight cannot be served with this block size, or None if it can."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (it comes with PyTorch for CUDA, on Linux)"
        found = importlib.metadata.version("triton")
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
            return f"Triton {'.'.join(map(str, OLDEST_TRITON))} is needed (it comes with PyTorch 2.7), found {found}"
        if weight.device.type != "cuda" and not interpreted():
            return f"it lies on {weight.device}, not on a CUDA device"
        if weight.layout != torch.strided or weight.dim() != 2 or weight.numel() == 0:
            return f"a strided matrix with elements is needed, got layout {weight.layout}, shape {tuple(weight.shape)}"
        if weight.dtype not in DTYPES:
            return f"its dtype is {weight.dtype}; served are {', '.join(str(d) for d in DTYPES)}"
        if not 1 <= min(block_size, *weight.shape) <= tables.MAX_BLOCK_SIZE:
            return f"block_size is {block_size}; served are 1 to {tables.MAX_BLOCK_SIZE}"
        return None

    @property
    def vectors(self) -> list[Tensor]:
        """The present blocks: L views of shapes (r_l, min(m_l, n_l)), fp32."""
        plan, block = self._plan, self._block
        found = []
        for offset, layer, size in zip(plan.short_offsets, plan.layers, self._block_sizes, strict=True):
            rows = self._vectors[offset * block :][: block * tables.round_up(layer.p, 16)].view(block, -1)
            found.append(rows[:size, : layer.p])
        return found

    @_uncompiled
    @torch.no_grad()
    def power_step(self, weights: Sequence[Tensor], n_iterations: int) -> PowerStep:
        """Advance the blocks; the same as :func:`lightning_lip.kernels.reference.power_step`.

        The results are views of buffers that the next step overwrites.
        """
        self._iterate(weights, n_iterations)
        return PowerStep(self._sigma, self._sides(left=True), self._sides(left=False), self.vectors)

    @_uncompiled
    @torch.no_grad()
    def rank_one_update_(self, grads: Sequence[Tensor | None], coefficients: Tensor) -> None:
        """Add ``c_l u_l v_l^T`` of the last step to each gradient in place; None is skipped.

        Args:
            grads: L gradients, shapes (m_l, n_l), fp32, bf16 or fp16, of any strides that do not overlap.
            coefficients: ``c``, shape (L,), on the device; zero or not finite: the gradient stays as it is.

        Raises:
            RuntimeError: If addresses changed while a CUDA graph is being captured.
        """
        self._factors.copy_(coefficients)
        self._update(grads)

    @_uncompiled
    @torch.no_grad()
    def penalise_(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        n_iterations: int,
        code: int,
        level: float,
        scale: float,
        multiplicities: Sequence[int],
    ) -> Tensor:
        """Advance the blocks and add the gradient of ``scale * penalty`` for a built-in penalty of the product.

        Args:
            weights: L weights.
            grads: L gradients or None.
            n_iterations: Iterations, each of which reads the weights once.
            code: A value of :data:`lightning_lip.kernels.penalties.PENALTY_CODES`.
            level: M, or the knee: :func:`lightning_lip.kernels.penalties.level_of`.
            scale: The penalty's coefficient.
            multiplicities: How often each layer counts, length L.

        Returns:
            ``scale * penalty``, shape (), fp32, on the device; a view that the next call overwrites.

        Raises:
            ValueError: If `code` is not one of the six.
            RuntimeError: If addresses changed while a CUDA graph is being captured.
        """
        if code not in PENALTY_CODES.values():
            raise ValueError(f"Expected a penalty code from 0 to {len(PENALTY_CODES) - 1}, got {code!r}.")
        kernels = self._kernels()
        if tuple(multiplicities) != self._multiplicities:
            self._refuse_in_capture("multiplicities")
            self._weights_of_layers.copy_(torch.tensor(multiplicities, dtype=torch.float64))
            self._multiplicities = tuple(multiplicities)
        self._iterate(weights, n_iterations)
        level_high, level_low = two_floats(math.log(level))
        scale_high, scale_low = two_floats(scale)
        with self._on_device():
            kernels.coefficients[(1,)](
                self._scalars, self._weights_of_layers, self._factors, self._value, level_high, level_low,
                scale_high, scale_low, len(self._shapes), CODE=code, BL=128, num_warps=WARPS,
            )  # fmt: skip
        self._update(grads)
        return self._value[0]

    def _plan_for(self, layers: list[tables.Layer]) -> None:
        """Make the tables of the weights' layouts and put them on the device."""
        processors = tables.DEFAULT_PROCESSORS
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._plan = plan = tables.Plan(layers, self._block_sizes, self.dtype.itemsize, processors)
        self._table, self._strips, self._tasks = (x.to(self.device) for x in (plan.table, plan.strips, plan.tasks))
        self._partials = torch.empty(plan.n_partial, device=self.device)
        self._scales = torch.empty(plan.n_strips * self._block, device=self.device)

    def _allocate(self) -> None:
        """Allocate what depends on shapes only. Padding is zero and stays so: kernels write inside the shapes."""
        plan, block, n_layers = self._plan, self._block, len(self._shapes)
        self._vectors = torch.zeros(plan.n_short * block, device=self.device)
        self._rows_z, self._rows_y = torch.zeros_like(self._vectors), torch.zeros_like(self._vectors)
        self._images = torch.zeros(plan.n_long * block, device=self.device)
        self._singular = torch.zeros(plan.n_long + plan.n_short, device=self.device)
        self._layer_scales, self._sigma, self._factors = torch.zeros(3, n_layers, device=self.device).unbind()
        self._value = torch.zeros(1, device=self.device)
        self._grams = torch.zeros(len(plan.tasks), block, block, dtype=torch.float64, device=self.device)
        self._rotations = torch.zeros(n_layers, block, block, dtype=torch.float64, device=self.device)
        self._scalars = torch.zeros(n_layers, 8, dtype=torch.float64, device=self.device)
        self._weights_of_layers = torch.ones(n_layers, dtype=torch.float64, device=self.device)

    def _offsets(self, left: bool) -> list[int]:
        """Return where each layer's left (or right) singular vector begins in `_singular`."""
        plan = self._plan
        return [
            plan.long_offsets[index] if (m >= n) == left else plan.n_long + plan.short_offsets[index]
            for index, (m, n) in enumerate(self._shapes)
        ]

    def _sides(self, left: bool) -> list[Tensor]:
        sizes = [shape[0 if left else 1] for shape in self._shapes]
        return [self._singular[offset:][:size] for offset, size in zip(self._offsets(left), sizes, strict=True)]

    def _refresh(self, name: str, seen: list[Any], addresses: list[int]) -> None:
        """Copy addresses to the device without waiting for it."""
        self._refuse_in_capture(name)
        host = torch.tensor(addresses, dtype=torch.int64)
        if self.device.type == "cuda":
            # A fresh pinned tensor: PyTorch reuses its memory only after the copy is done.
            host = host.pin_memory()
        self._addresses[name].copy_(host, non_blocking=True)
        self._seen[name] = seen
        self.n_refreshes += 1

    def _refuse_in_capture(self, name: str) -> None:
        if capturing(self.device):
            raise RuntimeError(
                f"The addresses of the {name} changed while a CUDA graph is being captured. Run one step on the same "
                "tensors before the capture, and keep the gradients' memory (zero_grad(set_to_none=False))."
            )

    def _look_at_weights(self, weights: Sequence[Tensor]) -> None:
        seen = [(weight.data_ptr(), weight.stride()) for weight in weights]
        if seen == self._seen["weights"]:
            return
        self._refuse_in_capture("weights")
        if [tuple(weight.shape) for weight in weights] != self._shapes or weights[0].dtype != self.dtype:
            raise ValueError(
                f"Expected weights of shapes {self._shapes} in {self.dtype}, got {[tuple(w.shape) for w in weights]} "
                f"in {weights[0].dtype}: make a new object for other weights."
            )
        layers = [tables.describe(weight, self._block) for weight in weights]
        if layers != self._plan.layers:
            self._plan_for(layers)
        self._refresh("weights", seen, [weight.data_ptr() for weight in weights])

    def _look_at_gradients(self, grads: Sequence[Tensor | None]) -> tuple[tables.GradientPlan, Tensor, Tensor]:
        seen = [None if grad is None else (grad.data_ptr(), grad.stride(), grad.dtype) for grad in grads]
        if seen != self._seen["grads"]:
            self._refuse_in_capture("gradients")
            key = tuple(
                None if grad is None else (grad.stride(), grad.dtype, grad.data_ptr() % 16 == 0) for grad in grads
            )
            if key not in self._gradient_plans:
                plan = tables.GradientPlan(grads, self._offsets(left=True), self._offsets(left=False))
                self._gradient_plans[key] = (plan, plan.table.to(self.device), plan.tiles.to(self.device))
            self._gradient_key = key
            self._refresh("grads", seen, [0 if grad is None else grad.data_ptr() for grad in grads])
        return self._gradient_plans[self._gradient_key]

    def _kernels(self) -> Any:
        """Return the kernels; Triton is imported only when they are needed."""
        from lightning_lip.kernels.gpu import kernels

        return kernels

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _iterate(self, weights: Sequence[Tensor], n_iterations: int) -> None:
        self._look_at_weights(weights)
        with self._on_device():
            for _ in range(max(1, n_iterations)):
                self._launch_iteration(only_t=n_iterations == 0)

    def _launch_iteration(self, only_t: bool) -> None:
        kernels = self._kernels()
        plan, block = self._plan, self._block
        n_aligned = plan.n_aligned_strips
        for aligned, strips in ((True, self._strips[:n_aligned]), (False, self._strips[n_aligned:])):
            if len(strips):
                kernels.sweep[(len(strips),)](
                    self._addresses["weights"], self._table, strips, self._vectors, self._images, self._partials,
                    self._scales, num_warps=WARPS,
                    **sweep_constants(self.dtype, block, plan.configs[0 if aligned else 1], aligned, only_t),
                )  # fmt: skip
        sizes = {"R": block, "BC": columns_at_a_time(block), "SHORT": tables.SHORT_TASK}
        long_vectors, short_vectors = self._singular[: plan.n_long], self._singular[plan.n_long :]
        tasks = self._tasks[plan.n_short_tasks :] if only_t else self._tasks
        grams = self._grams[plan.n_short_tasks :] if only_t else self._grams
        kernels.reduce[(len(tasks),)](
            self._table, tasks, self._images, self._partials, self._scales, self._rows_z, self._layer_scales, grams,
            LONG=tables.LONG_TASK, num_warps=WARPS, **sizes,
        )  # fmt: skip
        kernels.solve[(len(plan.layers),)](
            self._table, self._grams, self._layer_scales, self._rotations, self._scalars, self._sigma,
            R=block, ONLY_T=only_t, num_warps=WARPS,
        )  # fmt: skip
        kernels.form[(len(self._tasks),)](
            self._table, self._tasks, self._images, self._rows_z, self._rotations, self._scalars, self._vectors,
            self._rows_y, long_vectors, short_vectors, self._grams, LONG=tables.LONG_TASK, ONLY_T=only_t,
            num_warps=WARPS, **sizes,
        )  # fmt: skip
        if block > 1 and not only_t:
            kernels.orthonormalise[(plan.n_short_tasks,)](
                self._table, self._tasks, self._rows_y, self._scalars, self._grams, self._vectors,
                num_warps=WARPS, **sizes,
            )  # fmt: skip

    def _update(self, grads: Sequence[Tensor | None]) -> None:
        kernels = self._kernels()
        plan, table, tiles = self._look_at_gradients(grads)
        height, width = tables.RANK_ONE_TILE
        with self._on_device():
            for (dtype, aligned), (begin, end) in plan.classes.items():
                kernels.rank_one[(end - begin,)](
                    self._addresses["grads"], table, tiles[begin:end], self._singular, self._factors,
                    DTYPE=triton_dtype(dtype), VEC=16 // dtype.itemsize, BM=height, BN=width, ALIGNED=aligned,
                    num_warps=WARPS,
                )  # fmt: skip


def two_floats(number: float) -> tuple[float, float]:
    """Return two fp32 numbers whose sum is `number` to 48 bits: Triton passes Python floats as fp32."""
    high = torch.tensor(number, dtype=torch.float32).item()
    return high, number - high


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def sweep_constants(
    dtype: torch.dtype, block: int, tiles: Sequence[tables.Tile], aligned: bool, only_t: bool
) -> dict[str, Any]:
    """Return the compile-time arguments of the sweep kernel."""
    return {
        "DTYPE": triton_dtype(dtype),
        "VEC": 16 // dtype.itemsize,
        "R": block,
        "CONFIGS": tuple(tuple(int(field) for field in tile) for tile in tiles),
        "ALIGNED": aligned,
        "ONLY_T": only_t,
    }
