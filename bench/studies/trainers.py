"""The penalty on every Trainer: how far the weights end from one process in fp64 with the penalty in its loss.

``python -m lightning_lip.bench.studies.trainers [--output FOLDER]`` trains one small network under each strategy,
precision and feature of the optimisation, in one to four CPU processes, and writes ``trainers.csv``. The distance is
relative to what the penalty does: 0 is the same weights, 1 is as far off as without a penalty. Every case has a
tolerance of its own, or the error that refuses it; ``tests/bench/studies/test_trainers.py`` holds each to that. An
interrupted run goes on with the cases that are left.

The reference shares no code with the plugin: a plain PyTorch loop in fp64 on whole batches, whose loss holds
``coefficient * prod_l ||W_l||_2`` by ``torch.linalg.matrix_norm``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from lightning_lip import LipschitzPenalty
from lightning_lip.bench.studies.options import run_process, study_parser
from lightning_lip.reporting.documents import versions, write_csv, write_text
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished

COEFFICIENT = 0.3
N_BATCHES = 12
BATCH = 8


class Case(NamedTuple):
    """One row of the table.

    Attributes:
        strategy: A key of :data:`STRATEGIES`.
        precision: A key of :data:`TOLERANCES`, as Trainer names it.
        feature: A key of :data:`FEATURES`.
        tolerance: The largest distance allowed; None where the case is refused.
        refused: What the error must say where the case is refused.
    """

    strategy: str
    precision: str
    feature: str
    tolerance: float | None
    refused: str = ""

    @property
    def name(self) -> str:
        """The case in one line, as it is named in tests."""
        return f"{self.strategy}, {self.precision}, {self.feature}"


class Setup(NamedTuple):
    """A strategy: its processes, how many of them share the data, and how the network is laid out."""

    processes: int
    data_parallel: int
    strategy: Callable[[], Strategy | str]
    layouts: tuple[Callable[[nn.Sequential, DeviceMesh], None], ...] = ()
    spawned: bool = False


def _fsdp2(net: nn.Sequential, mesh: DeviceMesh) -> None:
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])


def _tensor_parallel(net: nn.Sequential, mesh: DeviceMesh) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(net, mesh["tensor_parallel"], plan)


def _model_parallel(data: int, tensor: int) -> Callable[[], Strategy]:
    return lambda: ModelParallelStrategy(
        data_parallel_size=data, tensor_parallel_size=tensor, save_distributed_checkpoint=False
    )


STRATEGIES = {
    "one process": Setup(1, 1, lambda: SingleDeviceStrategy("cpu")),
    "DDP": Setup(2, 2, lambda: "ddp"),
    "DDP, static graph": Setup(2, 2, lambda: DDPStrategy(static_graph=True)),
    "DDP, find_unused_parameters": Setup(2, 2, lambda: "ddp_find_unused_parameters_true"),
    "DDP, spawned": Setup(2, 2, lambda: "ddp_spawn", spawned=True),
    "FSDP2": Setup(2, 2, _model_parallel(2, 1), (_fsdp2,)),
    "tensor parallel": Setup(2, 1, _model_parallel(1, 2), (_tensor_parallel,)),
    "FSDP2 x tensor parallel": Setup(4, 2, _model_parallel(2, 2), (_tensor_parallel, _fsdp2)),
    "FSDP1": Setup(2, 2, FSDPStrategy),
}

OPTIMISERS = ("Adam", "fused Adam", "SGD with momentum", "LBFGS", "LBFGS with a line search", "two optimisers, by hand")
FEATURES: dict[str, dict[str, Any]] = {name: {} for name in OPTIMISERS} | {
    "accumulation over 3": {"accumulate_grad_batches": 3},
    "clipping by norm": {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"},
    "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
}
"""What Trainer is given for a feature; for an optimiser nothing."""

# What rounding may cost at each precision: in fp64 alone, in fp32 over the steps, in a forward pass in bf16 or fp16.
TOLERANCES = {"64-true": 1e-10, "32-true": 1e-4, "bf16-mixed": 0.02, "16-mixed": 5e-3, "bf16-true": 0.15}

# The second optimiser's penalty sees the weights that the first has just moved; in the loss it does not.
_BY_HAND = 2e-3

_LINE_SEARCH = "cannot serve LBFGS with a line search"


def _cases(strategy: str, precisions: Iterable[str], features: Iterable[str] = ("Adam",)) -> list[Case]:
    return [Case(strategy, p, f, TOLERANCES[p]) for p in precisions for f in features]


CASES = [
    *_cases("one process", TOLERANCES),
    *_cases("one process", ["64-true"], ["fused Adam", "SGD with momentum", "LBFGS"]),
    *_cases("one process", ["64-true"], ["accumulation over 3", "clipping by norm", "clipping by value"]),
    Case("one process", "64-true", "two optimisers, by hand", _BY_HAND),
    *_cases("one process", ["16-mixed"], ["fused Adam", "accumulation over 3", "clipping by norm"]),
    Case("one process", "64-true", "LBFGS with a line search", None, _LINE_SEARCH),
    *_cases("DDP", ["64-true", "32-true", "bf16-mixed", "16-mixed"]),
    *_cases("DDP", ["64-true"], ["accumulation over 3", "clipping by norm"]),
    Case("DDP", "64-true", "two optimisers, by hand", _BY_HAND),
    *_cases("DDP, static graph", ["64-true"]),
    *_cases("DDP, find_unused_parameters", ["64-true"]),
    *_cases("DDP, spawned", ["64-true"]),
    *_cases("FSDP2", ["32-true", "bf16-mixed", "bf16-true"]),
    *_cases("FSDP2", ["32-true"], ["SGD with momentum", "accumulation over 3", "clipping by norm"]),
    *_cases("tensor parallel", ["32-true"], ["Adam", "SGD with momentum"]),
    *_cases("FSDP2 x tensor parallel", ["32-true"]),
    Case("FSDP1", "32-true", "Adam", None, "requires a GPU accelerator"),
]


class Row(NamedTuple):
    """What a case gave: the distance, or the error."""

    case: Case
    distance: float | None
    error: str

    @property
    def holds(self) -> bool:
        """Whether the case ended as its row of the table says."""
        if self.case.tolerance is None:
            return self.distance is None and self.case.refused in self.error
        return self.distance is not None and self.distance <= self.case.tolerance


def make_net() -> nn.Sequential:
    """Return the network 6-8-8-1: its last weight, (1, 8), leaves one of two shards empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def make_batches() -> list[tuple[Tensor, Tensor]]:
    """Return the whole batches, inputs (8, 6) and targets (8, 1)."""
    inputs = torch.randn(N_BATCHES, BATCH, 6, generator=torch.Generator().manual_seed(1))
    return [(x, 2 * x.sin().sum(1, keepdim=True)) for x in inputs]


def make_optimizer(feature: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser of a feature, over the parameters given."""
    if feature.startswith("LBFGS"):
        line_search = "strong_wolfe" if "line search" in feature else None
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, line_search_fn=line_search)
    if feature == "SGD with momentum":
        return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    return torch.optim.Adam(parameters, lr=1e-2, eps=1e-3, fused=feature == "fused Adam")


@cache
def reference(feature: str, coefficient: float) -> Tensor:
    """Train one process in fp64 with the penalty in the loss, in plain PyTorch; return the weights, flat."""
    net = make_net().double()
    weights = [p for p in net.parameters() if p.dim() == 2]
    batches = [(x.double(), y.double()) for x, y in make_batches()]
    options = FEATURES[feature]
    n = options.get("accumulate_grad_batches", 1)
    how = options.get("gradient_clip_algorithm")
    optimizer = make_optimizer("Adam" if feature == "fused Adam" else feature, net.parameters())

    for start in range(0, N_BATCHES, n):

        def closure(group: Sequence[tuple[Tensor, Tensor]] = batches[start : start + n]) -> float:
            optimizer.zero_grad()
            norms = torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights])
            task = torch.stack([F.mse_loss(net(x), y) for x, y in group]).mean()
            loss = task + coefficient * norms.prod()
            torch.autograd.backward(loss)
            if how == "norm":
                nn.utils.clip_grad_norm_(net.parameters(), options["gradient_clip_val"])
            elif how == "value":
                nn.utils.clip_grad_value_(net.parameters(), options["gradient_clip_val"])
            return float(loss.detach())

        optimizer.step(closure)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Module(pl.LightningModule):
    """The network as a LightningModule that knows nothing of the penalty."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.net = make_net()
        self.automatic_optimization = case.feature != "two optimisers, by hand"

    def configure_model(self) -> None:
        """Lay the network out over the mesh, where the strategy has one."""
        for layout in STRATEGIES[self.case.strategy].layouts:
            assert self.device_mesh is not None
            layout(self.net, self.device_mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; in manual optimisation step both optimisers."""
        inputs, targets = batch
        loss = F.mse_loss(self.net(inputs), targets)
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            assert isinstance(optimizers, list)
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        """Return one optimiser, or one for the first layer and one for the rest."""
        parameters = list(self.parameters())
        if self.automatic_optimization:
            return make_optimizer(self.case.feature, parameters)
        return [make_optimizer(self.case.feature, group) for group in (parameters[:2], parameters[2:])]

    def on_train_end(self) -> None:
        """Gather the weights while the processes still stand, and write them for whoever started them."""
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.parameters()]
        trained = torch.cat([p.detach().double().flatten() for p in whole])
        if self.trainer.is_global_zero:
            torch.save(trained, os.environ["TRAINED"])


def train(case: Case) -> None:
    """Train one case in this process, one of the `processes` of its setup."""
    setup = STRATEGIES[case.strategy]
    settings = _precision(case.precision) | FEATURES[case.feature]
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    settings |= dict.fromkeys(quiet, False) | {"callbacks": [LipschitzPenalty(COEFFICIENT)]}
    trainer = pl.Trainer(
        accelerator="cpu", devices=setup.processes, strategy=setup.strategy(), max_epochs=1, **settings
    )
    trainer.fit(Module(case), torch.utils.data.DataLoader(Rows(setup), batch_size=None))


def _precision(name: str) -> dict[str, Any]:
    if name != "16-mixed":
        return {"precision": name}
    # From the default scale the first steps overflow and are skipped, as they would be in the reference too.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


class Rows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The batches, of each the rows of the process that asks: spawned processes exist only once training has begun."""

    def __init__(self, setup: Setup) -> None:
        self._batches = make_batches()
        self._share, self._replicas = setup.data_parallel, setup.processes // setup.data_parallel

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        inputs, targets = self._batches[index]
        mine = slice(rank // self._replicas, None, self._share)
        return inputs[mine], targets[mine]


def run(cases: Sequence[Case], folder: Path, finished: Finished[Row]) -> list[Row]:
    """Run the cases that are not finished, those of as many processes in one start of them, and compare their weights.

    The rows are kept in `finished` as they come, also those before an interrupt; `folder` is for what processes leave.
    """
    groups: dict[int, list[Case]] = {}
    for case in cases:
        setup = STRATEGIES[case.strategy]
        if repr(case) not in finished.results:
            groups.setdefault(1 if setup.spawned else setup.processes, []).append(case)
    for processes, group in groups.items():
        try:
            _launch(processes, [CASES.index(case) for case in group], folder)
        finally:
            for case in group:
                row = _row(case, folder / str(CASES.index(case)))
                if row is not None:
                    finished.add(case, row)
    return [finished.results[repr(case)] for case in cases]


def _row(case: Case, stem: Path) -> Row | None:
    """Return the row of a case from the file that its process left; None if it has not ended."""
    error, trained = stem.with_suffix(".err"), stem.with_suffix(".pt")
    if error.exists():
        return Row(case, None, error.read_text())
    if not trained.exists():
        return None
    want, without = (reference(case.feature, c) for c in (COEFFICIENT, 0.0))
    return Row(case, float((torch.load(trained) - want).norm() / (want - without).norm()), "")


def _launch(processes: int, indices: list[int], folder: Path) -> None:
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*start, "lightning_lip.bench.studies.trainers", "--train", json.dumps(indices), "--output", str(folder)]
    run_process(command, timeout=500)


def _train_all(indices: Sequence[int], folder: Path) -> None:
    """Train these cases one after the other; leave weights or the error of each."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for index in indices:
        stem = folder / str(index)
        beside = stem.with_suffix(".trained")
        os.environ["TRAINED"] = str(beside)
        try:
            train(CASES[index])
            if os.environ.get("RANK", "0") == "0":
                beside.replace(stem.with_suffix(".pt"))  # only now: a case that was interrupted has not ended
        except Exception as error:  # the table names it
            write_text(f"{type(error).__name__}: {error}", stem.with_suffix(".err"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        os._exit(0)  # gloo can abort while the interpreter ends


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the table as CSV."""
    lines = []
    for row in rows:
        distance = "" if row.distance is None else f"{row.distance:.1e}"
        tolerance = "" if row.case.tolerance is None else f"{row.case.tolerance:g}"
        processes = STRATEGIES[row.case.strategy].processes
        lines.append([*row.case[:3], processes, distance, tolerance, row.error.split(". ")[0], row.holds])
    columns = ["strategy", "precision", "feature", "processes", "distance", "tolerance", "refused", "holds"]
    write_csv(path, columns, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the table, or some of its cases as one of several processes."""
    parser = study_parser(__doc__)
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train is not None:
        _train_all(options.train, options.output)
        return
    path, settings = options.output / "trainers.partial.jsonl", versions("lightning", "numpy")
    finished = Finished(path, settings, lambda row: Row(Case(*row[0]), *row[1:]))
    with tempfile.TemporaryDirectory() as folder:
        rows = run(CASES, Path(folder), finished)
    write(rows, options.output / "trainers.csv")
    finished.remove()
    for row in rows:
        distance = row.error.split("\n")[0][:90] if row.distance is None else f"{row.distance:.1e}"
        print(f"{'ok ' if row.holds else 'BAD'} {row.case.name:60} {distance}")


if __name__ == "__main__":
    with told_in_one_line("trainers"):
        main()
