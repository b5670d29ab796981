"""What the scoreboard runs: its boards, their trainings, and the settings that are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_lip.bench.scoreboard.data import DIGITS, MNIST
from lightning_lip.bench.scoreboard.methods import METHODS, Setting
from lightning_lip.bench.scoreboard.training import Budget

CURVE = tuple(step / 10 for step in range(25))
"""Where the figure's curves have points."""

TUNING_SEED = 0
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Board:
    """One comparison: images, a network, and what each training may take.

    Attributes:
        data: ``"mnist"``, ``"digits"`` or a folder.
        network: A name of :data:`~lightning_lip.bench.scoreboard.networks.NETWORKS`.
        budget: Of each training.
        radii: Settings are chosen for each.
    """

    data: str
    network: str
    budget: Budget
    radii: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.data}, {self.network}, {self.budget}"

    def eps(self) -> list[float]:
        """Return where certified accuracies are evaluated: 0, the accuracy, first; the radii among them."""
        return sorted({*CURVE, *self.radii})


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        boards: The comparisons.
        methods: Names of :data:`~lightning_lip.bench.scoreboard.methods.METHODS`.
        n_settings: Settings of each method, the first so many.
        seeds: Of the trainings on which the test images are evaluated.
        step_ms: For each board the CPU milliseconds that a step of each method takes; empty until they are measured.
        steps: For each board the steps of a training of each method.
    """

    boards: tuple[Board, ...]
    methods: tuple[str, ...]
    n_settings: int
    seeds: tuple[int, ...] = SEEDS
    step_ms: tuple[tuple[float, ...], ...] = ()
    steps: tuple[tuple[int, ...], ...] = ()

    def jobs(self) -> list[Job]:
        """Return the trainings that settings are chosen by."""
        return [
            Job(board, name, setting, steps, TUNING_SEED, False)
            for board, counts in zip(self.boards, self.steps, strict=True)
            for name, steps in zip(self.methods, counts, strict=True)
            for setting in METHODS[name].settings()[: self.n_settings]
        ]

    def n_trainings(self, board: Board) -> int:
        """Return the number of trainings of a method, at most."""
        return self.n_settings + len(self.seeds) * min(len(board.radii), self.n_settings)

    def seconds(self) -> float:
        """Return the CPU seconds of all trainings, at most, by the measured time of a step."""
        return sum(
            self.n_trainings(board) * steps * step_ms / 1e3
            for board, counts, times in zip(self.boards, self.steps, self.step_ms, strict=True)
            for steps, step_ms in zip(counts, times, strict=True)
        )


@dataclass(frozen=True)
class Job:
    """One training of so many steps, and whether the test images are evaluated, or those for validation."""

    board: Board
    method: str
    setting: Setting
    steps: int
    seed: int
    is_final: bool

    def __str__(self) -> str:
        part = "test" if self.is_final else "validation"
        return f"{self.board}, {self.method}, {METHODS[self.method].described(self.setting)}, {part} {self.seed}"


RADII = {MNIST: (0.3, 1.0, 1.58), DIGITS: (0.3, 1.0)}
FULL = (
    Board(MNIST, "mlp", Budget(40, "epochs"), RADII[MNIST]),
    Board(DIGITS, "mlp", Budget(10, "seconds"), RADII[DIGITS]),
    Board(DIGITS, "mlp", Budget(64, "epochs"), RADII[DIGITS]),
    Board(MNIST, "cnn", Budget(60, "seconds"), RADII[MNIST]),
    Board(MNIST, "cnn", Budget(20, "epochs"), RADII[MNIST]),
)
"""What `--full` adds."""

QUICK = Board(DIGITS, "mlp", Budget(0.2, "seconds"), RADII[DIGITS])


def planned(methods: tuple[str, ...], data: str | None, seconds: float, *, full: bool, quick: bool) -> Plan:
    """Return what is run.

    Args:
        methods: Names of methods.
        data: A folder of images in place of MNIST, or None.
        seconds: CPU time of each training of the first board.
        full: Whether to add the boards of :data:`FULL`; on a folder those of MNIST.
        quick: Whether to run two settings and one seed on a small board instead.
    """
    if quick:
        return Plan((QUICK,), methods, n_settings=2, seeds=SEEDS[:1])
    boards = [Board(MNIST, "mlp", Budget(seconds, "seconds"), RADII[MNIST]), *(FULL if full else ())]
    if data is not None:
        boards = [replace(board, data=data) for board in boards if board.data == MNIST]
    return Plan(tuple(boards), methods, n_settings=len(next(iter(METHODS.values())).settings()))
