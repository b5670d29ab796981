"""One model with all contenders: times in turn, memory, and the error of the norms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import nn

from lightning_lip.bench.contenders.layers import Layer, exact_norm, exact_symbol_norm
from lightning_lip.bench.contenders.models import BenchModel
from lightning_lip.bench.contenders.peers import EVERY, PEERS, PLAIN_PEER, Contender, Peer, task_of
from lightning_lip.bench.contenders.training import Batch, fit, synchronise
from lightning_lip.bench.steps.memory import Memory, memory_of

BLOCK_SECONDS = 0.1
"""A block of steps is about as long: many blocks in turn, and each long enough for the clock."""

MAX_STEPS = 100
MIN_ROUNDS = 3
N_BEFORE = 1
"""Steps of each block before its clock starts: the first one of a fit pays for its start."""

MAP_SHARE = 1.2
"""How much of a plain step the penalty on convolutions may take, as a multiple of its block's maps alone.

Those are 2r maps of one input; a plain step makes about 3B: forward, and backward to the inputs and to the weights.
"""

PARAMETER_SHARE = 0.01
"""How much of the parameters' memory the penalty may add, beside the r vectors of each layer."""

PLAIN = PLAIN_PEER.name


@dataclass
class Times:
    """Seconds a step of one contender, one entry a block; `paired` holds the plain training's of the same round."""

    steps: list[float] = field(default_factory=list)
    paired: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)

    def add(self, step: float, own: float | None, of_plain: float) -> None:
        """Note one block: its step, the part of it in the penalty's hook, and the plain training's step."""
        self.steps.append(step)
        self.paired.append(of_plain)
        self.own += [] if own is None else [own]


@dataclass(frozen=True)
class Row:
    """What was measured of one contender.

    Attributes:
        contender: `"plain"` or the peer's name.
        title: What the tables call it.
        operator: The peer's; `"true"` for all that have norms where there is no convolution.
        vectors: The peer's r; None for one without such vectors.
        n_blocks: Blocks of steps that the medians are taken over.
        step_ms: Milliseconds of a whole training step: p20, p50, p80.
        ratio: The same over the plain training's in the same round: p20, p50, p80.
        added_ms: The difference to the plain training's in the same round: p20, p50, p80.
        own_ms: Milliseconds a step in the penalty's hook, measured inside the training; None for the others.
        share: The share of a plain step that `own_ms` is to stay within; None where nothing is asked.
        held_bytes: Bytes of tensors alive between steps, less the plain training's.
        peak_bytes: The largest number of bytes of tensors alive at a time, less the plain training's.
        allowed_bytes: What `held_bytes` and `peak_bytes` are to stay within: 1% of the parameters' bytes and `vectors`
            fp32 vectors a layer, of a matrix's shorter side or a convolution's domain; None where nothing is asked.
        error_max: Largest relative error of a layer's norm, against the true operator's in fp64; None without norms.
        error_median: The median over the layers.
        guarantee: What is known of the norms that it works with.
    """

    contender: str
    title: str
    operator: str
    vectors: int | None
    n_blocks: int
    step_ms: tuple[float, float, float]
    ratio: tuple[float, float, float]
    added_ms: tuple[float, float, float]
    own_ms: float | None
    share: float | None
    held_bytes: int
    peak_bytes: int
    allowed_bytes: int | None
    error_max: float | None
    error_median: float | None
    guarantee: str


@dataclass(frozen=True)
class Result:
    """What was measured of one model.

    Attributes:
        model: Its name in ``--models``.
        model_title: What the tables call it.
        batch_size: Inputs a step.
        n_layers: Penalised layers.
        n_weights: Elements of their weights.
        n_parameters: Elements of all parameters.
        has_convolutions: Whether some of the layers are convolutions.
        floor_ms: Milliseconds of one read of the penalised weights and a read and a write of their gradients, at the
            measured rate of copies of that size.
        missing: Peers that were left out, and the module that is to be installed.
        rows: One for each contender, the plain training first.
    """

    model: str
    model_title: str
    batch_size: int
    n_layers: int
    n_weights: int
    n_parameters: int
    has_convolutions: bool
    floor_ms: float
    missing: dict[str, str]
    rows: tuple[Row, ...]


def measure(
    name: str, model: BenchModel, device: torch.device, seconds: float, on_step: Callable[[str], None]
) -> Result:
    """Train a model with every contender in turn.

    Contenders take turns in blocks of a few steps, so that other load on the machine falls on all of them. Each block
    is a fit of its own, which goes on with the weights and the singular vectors of the last. A ratio compares a block
    with the plain training's in the same round. Of a peer whose block would take more than twice its share of the time,
    only the single step is known in which its memory was counted; where three rounds of all would take too long, the
    slowest have one block.

    Args:
        name: The model's name in ``--models``.
        model: The model.
        device: Where it is trained.
        seconds: Time for the rounds, about; up to twice that, until there are three.
        on_step: Called with what is being done, in words.
    """
    task, batch = task_of(model, device)
    names, shapes = task.names, task.input_shapes
    network = model.network()
    layers = [cast(Layer, network.get_submodule(layer)) for layer in names]
    n_weights = sum(layer.weight.numel() for layer in layers)
    n_parameters = sum(p.numel() for p in network.parameters())
    has_convolutions = any(isinstance(layer, nn.Conv2d) for layer in layers)
    # Elements of one singular vector of each layer, on the side where the package keeps its block.
    sides = 0
    for layer, key in zip(layers, names, strict=True):
        sides += min(layer.weight.shape) if isinstance(layer, nn.Linear) else math.prod(shapes[key])
    peers = [PLAIN_PEER, *(peer for peer in PEERS if has_convolutions or not peer.for_convolutions)]
    missing = {peer.title: module for peer in peers if (module := peer.missing()) is not None}
    peers = [peer for peer in peers if peer.title not in missing]

    contenders: dict[str, Contender] = {}
    memory: dict[str, Memory] = {}
    first: dict[str, tuple[float, float | None]] = {}
    for peer in peers:
        on_step(f"{name}: {peer.name}")

        def start(peer: Peer = peer) -> Contender:
            contenders[peer.name] = contender = peer.prepare(task)
            first[peer.name] = fit(contender.training, contender.callbacks, batch, N_BEFORE, 1)
            # Lightning leaves a module on the CPU: what it holds between steps is to be counted where it is trained.
            contender.training.to(device)
            return contender

        memory[peer.name] = memory_of(start, device)
    on_step(f"{name}: steps in turn")
    times = in_turn(contenders, first, batch, seconds)
    rows = []
    for peer in peers:
        key = peer.name
        on_step(f"{name}: errors of {key}")
        added = Memory(memory[key].peak - memory[PLAIN].peak, memory[key].held - memory[PLAIN].held)
        errors = _errors(contenders[key], peer.operator == "symbol", names, shapes, device)
        limits: tuple[float | None, int | None] = None, None
        if peer.has_budget and peer.vectors is not None:
            share = MAP_SHARE * 2 * peer.vectors / (3 * model.batch_size) if has_convolutions else model.share
            limits = share, round(4 * (PARAMETER_SHARE * n_parameters + peer.vectors * sides))
        rows.append(_row(peer, times[key], added, errors, limits, has_convolutions))
    return Result(
        model=name,
        model_title=model.title,
        batch_size=model.batch_size,
        n_layers=len(names),
        n_weights=n_weights,
        n_parameters=n_parameters,
        has_convolutions=has_convolutions,
        floor_ms=1e3 * floor_seconds(n_weights, device),
        missing=missing,
        rows=tuple(rows),
    )


def in_turn(
    contenders: dict[str, Contender],
    first: dict[str, tuple[float, float | None]],
    batch: Batch,
    seconds: float,
    precision: str = "32-true",
) -> dict[str, Times]:
    """Return the times of blocks of steps of all contenders, round by round.

    Args:
        contenders: By name; `"plain"` is one of them.
        first: By name, what :func:`~lightning_lip.bench.contenders.training.fit` returned for a step that has been made
            already, to size the blocks by.
        batch: The batch of every step.
        seconds: Time for all rounds, about.
        precision: The Trainer's.
    """
    times = {name: Times() for name in contenders}
    n_steps = {name: block_steps(name, first[name][0]) for name in contenders}
    cost = {name: first[name][0] * (N_BEFORE + n_steps[name]) for name in contenders}
    share = 2 * seconds / len(contenders)
    peers = {name for name, contender in contenders.items() if name != PLAIN and not contender.callbacks}
    left_out = {name for name in peers if cost[name] > share}
    begin = time.perf_counter()
    n_rounds, spent = 0, 0.0
    # A busy machine may not have the time for every round that a median asks for.
    while n_rounds == 0 or spent < seconds or (n_rounds < MIN_ROUNDS and spent < 2 * seconds):
        others = [name for name in contenders if name != PLAIN and name not in left_out]
        # Each round begins elsewhere, so that nobody is always next to the plain training.
        turn = n_rounds % max(1, len(others))
        of_plain = 0.0
        for name in (PLAIN, *others[turn:], *others[:turn]):
            contender = contenders[name]
            start = time.perf_counter()
            step, own = fit(contender.training, contender.callbacks, batch, N_BEFORE, n_steps[name], precision)
            cost[name] = min(cost[name], time.perf_counter() - start)
            of_plain = step if name == PLAIN else of_plain
            times[name].add(step, own, of_plain)
        n_rounds, spent = n_rounds + 1, time.perf_counter() - begin
        # The slowest peers make room for the rounds of the others.
        rounds_left = MIN_ROUNDS - n_rounds
        while peers - left_out and spent + rounds_left * sum(cost[n] for n in cost.keys() - left_out) > 2 * seconds:
            left_out.add(max(peers - left_out, key=lambda name: cost[name]))
    for name, found in times.items():
        if not found.steps:
            found.add(*first[name], float(np.median(times[PLAIN].steps)))
    return times


def block_steps(name: str, seconds: float) -> int:
    """Return the steps of a block, from the seconds of one; whole periods of a penalty that acts on some steps only."""
    wanted = max(1, min(MAX_STEPS, round(BLOCK_SECONDS / seconds)))
    return -(-wanted // EVERY) * EVERY if name == "penalty_sparing" else wanted


@torch.no_grad()
def floor_seconds(n_weights: int, device: torch.device) -> float:
    """Return the time of one read of fp32 weights and of a read and a write of their gradients, from copies as large.

    A copy moves 8 bytes an element, this floor 12.
    """
    source, target = torch.ones(n_weights, device=device), torch.zeros(n_weights, device=device)
    repeats = max(1, min(100, 10**6 // n_weights))
    samples = []
    for _ in range(9):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        synchronise(device)
        samples.append((time.perf_counter() - start) / repeats)
    return 1.5 * float(np.median(samples[2:]))


def _errors(
    contender: Contender,
    is_symbol: bool,
    names: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    device: torch.device,
) -> list[float] | None:
    """Return the relative error of each layer's norm, of the present weights on their true operators, or symbols."""
    if contender.norms is None:
        return None
    network = contender.training.to(device).network
    # Parametrised weights are computed anew in training mode, by one more iteration.
    network.eval()
    layers = [cast(Layer, network.get_submodule(name)) for name in names]
    exact = [
        exact_symbol_norm(layer) if is_symbol else exact_norm(layer, shapes[name])
        for layer, name in zip(layers, names, strict=True)
    ]
    errors = [abs(norm / truth - 1) for norm, truth in zip(contender.norms(), exact, strict=True)]
    network.train()
    return errors


def _row(
    peer: Peer,
    times: Times,
    added: Memory,
    errors: list[float] | None,
    limits: tuple[float | None, int | None],
    has_convolutions: bool,
) -> Row:
    steps, paired = 1e3 * np.array(times.steps), 1e3 * np.array(times.paired)
    return Row(
        contender=peer.name,
        title=peer.title,
        operator=peer.operator if has_convolutions or peer.operator == "none" else "true",
        vectors=peer.vectors,
        n_blocks=len(steps),
        step_ms=percentiles(steps),
        ratio=percentiles(steps / paired),
        added_ms=percentiles(steps - paired),
        own_ms=1e3 * float(np.median(times.own)) if times.own else None,
        share=limits[0],
        held_bytes=added.held,
        peak_bytes=added.peak,
        allowed_bytes=limits[1],
        error_max=None if errors is None else max(errors),
        error_median=None if errors is None else float(np.median(errors)),
        guarantee=peer.guarantee,
    )


def percentiles(values: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float, float]:
    """Return p20, p50 and p80."""
    p20, p50, p80 = np.percentile(values, [20, 50, 80])
    return float(p20), float(p50), float(p80)
