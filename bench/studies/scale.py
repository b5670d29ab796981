"""What a step of the penalty moves and keeps on 1 to 1,024 GPUs, for the layers of a large model on a mesh.

``python -m lightning_lip.bench.studies.scale [--output FOLDER]`` writes ``scale.csv`` for Llama-2 7B and 70B, and
prints it. Nothing is measured: this is arithmetic, of milliseconds, so that an interrupt loses nothing.
``tests/bench/studies/test_scale.py`` compares the bytes over the network and the bytes of the vectors with what the
plugin counts on 2 and 4 processes.

A weight W (m, n) is split over d data-parallel ranks by rows (FSDP2), and over t tensor-parallel ranks by rows
(column-wise parallel) or by columns (row-wise). r is the block size; its p vectors' side is n, or m where only columns
are split; s bytes a weight. Every GPU, at every step, for each layer:

- reads W twice, for ``T = V A^T`` and ``Z = T A``, and its gradient once and writes it once:
  ``(2 + 2) s m n / (d t)`` bytes (weights of 2 bytes are widened first: 10 more for each, an fp32 copy among them);
- adds ``8 r (r + p)`` bytes, G and Z in fp64, to the one flat tensor of all layers that is summed over ranks. Summed in
  a ring over g ranks, a GPU sends ``2 (g - 1) / g`` times that; a layer that is split over d and over t ranks is
  summed over the one, then over the other;
- where rows and columns are split, sums ``T`` over the t ranks before: ``4 r m / d`` bytes;
- keeps the vectors, ``4 r p`` bytes, and until the next step ``4 (m n / (p d t) + p)`` for u and v.

FSDP2 itself gathers every weight twice and scatters the gradients once: ``3 s m n (d - 1) / (d t)`` bytes sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_lip.bench.studies.options import study_parser
from lightning_lip.reporting.documents import write_csv
from lightning_lip.reporting.failures import told_in_one_line

Parallel = Literal["columns", "rows"]
"""How tensor parallelism splits a layer: ``ColwiseParallel`` (by rows of W) or ``RowwiseParallel`` (by columns)."""


class Layer(NamedTuple):
    """So many copies of a layer, with a weight of shape (out, in)."""

    out: int
    into: int
    parallel: Parallel
    copies: int = 1


class Traffic(NamedTuple):
    """Bytes of one GPU in one step.

    Attributes:
        read: Of weights and gradients read, and gradients written, by the penalty.
        summed: Payload of the all_reduce over data-parallel ranks and of that over tensor-parallel ranks.
        sent: Over the network, in a ring.
        kept: Of vectors, from step to step.
        sent_by_fsdp: What FSDP2 sends without the penalty.
        weights: Of this GPU's weights.
    """

    read: float
    summed: tuple[float, float]
    sent: float
    kept: float
    sent_by_fsdp: float
    weights: float


def traffic(
    layers: Sequence[Layer], data_parallel: int, tensor_parallel: int = 1, block_size: int = 8, weight_bytes: int = 4
) -> Traffic:
    """Return what one step with one iteration moves and keeps; see the module's text for the formulas.

    Args:
        layers: The penalised layers.
        data_parallel: d, the ranks over which FSDP2 splits the rows.
        tensor_parallel: t.
        block_size: r.
        weight_bytes: s, 4 for fp32 and 2 for bf16.
    """
    d, t = data_parallel, tensor_parallel
    read = over_data = over_tensor = kept = weights = 0.0
    for layer in layers:
        m, n, k = layer.out, layer.into, layer.copies
        r = min(block_size, m, n)
        only_columns = layer.parallel == "rows" and t > 1 and d == 1
        p = m if only_columns else n
        local = m * n / (d * t)
        weights += k * weight_bytes * local
        read += k * local * (4 * weight_bytes + (10 if weight_bytes == 2 else 0))
        payload = k * 8 * r * (r + p)
        over_data += payload if d > 1 else 0
        over_tensor += payload if t > 1 else 0
        if layer.parallel == "rows" and t > 1 and d > 1:
            over_tensor += k * 4 * r * m / d
        kept += k * 4 * (r * p + local / p + p)
    sent = _ring(d) * over_data + _ring(t) * over_tensor
    return Traffic(read, (over_data, over_tensor), sent, kept, 1.5 * _ring(d) * weights * d, weights)


def _ring(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def llama(hidden: int, intermediate: int, key_value: int, blocks: int, vocabulary: int = 32000) -> list[Layer]:
    """Return the linear layers of a Llama-2 (Touvron et al. 2023, arXiv:2307.09288), the embedding left out."""
    return [
        Layer(hidden, hidden, "columns", blocks),  # queries
        Layer(key_value, hidden, "columns", 2 * blocks),  # keys, values
        Layer(hidden, hidden, "rows", blocks),  # output
        Layer(intermediate, hidden, "columns", 2 * blocks),  # gate, up
        Layer(hidden, intermediate, "rows", blocks),  # down
        Layer(vocabulary, hidden, "columns"),
    ]


MODELS = {"Llama-2 7B": llama(4096, 11008, 4096, 32), "Llama-2 70B": llama(8192, 28672, 1024, 80)}
MESHES = [(d, 1) for d in (1, 2, 4, 8, 16, 64, 256, 1024)] + [(d, 8) for d in (1, 2, 8, 32, 128)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and write the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--block-size", type=int, default=8)
    options = parser.parse_args(arguments)
    columns = ["model", "gpus", "data_parallel", "tensor_parallel", "weights_GB", "read_GB", "sent_MB", "kept_MB"]
    columns += ["sent_by_fsdp_GB", "sent_percent_more"]
    print(" ".join(f"{c:>18}" for c in columns))
    rows = []
    for model, layers in MODELS.items():
        for d, t in MESHES:
            one = traffic(layers, d, t, options.block_size)
            more = f"{100 * one.sent / one.sent_by_fsdp:.3f}" if d > 1 else ""
            numbers = (one.weights / 1e9, one.read / 1e9, one.sent / 1e6, one.kept / 1e6, one.sent_by_fsdp / 1e9)
            rows.append([model, d * t, d, t, *(f"{x:.4g}" for x in numbers), more])
            print(" ".join(f"{x!s:>18}" for x in rows[-1]))
    write_csv(options.output / "scale.csv", columns, rows)


if __name__ == "__main__":
    with told_in_one_line("scale"):
        main()
