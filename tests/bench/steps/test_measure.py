import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.contenders import CPU, SMALL_CONVOLUTIONS, SMALL_MLP, peer_named, small_convolutions

from lightning_lip.bench.contenders import peers
from lightning_lip.bench.contenders.models import MODELS
from lightning_lip.bench.steps import measure


def test_a_slow_contender_keeps_its_one_step():
    task, batch = peers.task_of(SMALL_MLP, CPU)
    contenders = {"plain": peers.plain(task), "slow": peers.plain(task)}
    times = measure.in_turn(contenders, {"plain": (1e-3, None), "slow": (50.0, 2.0)}, batch, 0.01)
    assert len(times["plain"].steps) >= 1
    assert (times["slow"].steps, times["slow"].own) == ([50.0], [2.0])
    assert times["slow"].paired == [pytest.approx(statistics.median(times["plain"].steps))]


def test_the_slowest_make_room_for_rounds_of_the_others(monkeypatch):
    task, batch = peers.task_of(SMALL_MLP, CPU)
    contenders = {name: peers.plain(task) for name in ("plain", "slow", "slower", "quick")}
    contenders["penalty"] = peer_named("penalty_r8").prepare(task)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 3)
    seconds = {"plain": 1.0, "slow": 6.0, "slower": 10.0, "quick": 2.0, "penalty": 9.0}
    by_id = {id(contender.training): seconds[name] for name, contender in contenders.items()}
    now = [0.0]

    def fit(training, *_):
        now[0] += by_id[id(training)]
        return by_id[id(training)], None

    monkeypatch.setattr(measure, "fit", fit)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    # A block is two steps here. A round takes 28 s, and 18 s without the slowest: three then take 64 s.
    first = {name: (s / 2, None) for name, s in seconds.items()}
    times = measure.in_turn(contenders, first, batch, 32.0)
    assert {name: len(found.steps) for name, found in times.items()} == {
        **dict.fromkeys(("plain", "slow", "quick", "penalty"), 3),
        "slower": 1,
    }
    # Whoever is slow from the start has the step that was made before; the penalty never, nor the plain training.
    first = dict.fromkeys(contenders, (20.0, None))
    times = measure.in_turn(contenders, first, batch, 15.0)
    expected = dict.fromkeys(contenders, 1) | {"plain": 3, "penalty": 3}
    assert {name: len(found.steps) for name, found in times.items()} == expected
    assert times["slow"].steps == [20.0]


def test_blocks_hold_whole_periods_of_the_sparing_penalty():
    assert measure.block_steps("plain", 1e-6) == measure.MAX_STEPS
    assert measure.block_steps("plain", 10.0) == 1
    assert all(measure.block_steps("penalty_sparing", s) % peers.EVERY == 0 for s in (1e-6, 0.013, 0.04, 10.0))


def small_measurement(monkeypatch, model, names=("penalty_r8", "penalty_r1")):
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    monkeypatch.setattr(measure, "PEERS", tuple(map(peer_named, names)))
    return measure.measure("small", model, CPU, 0.0, lambda _: None)


def test_the_budgets_of_time_and_memory(monkeypatch):
    (_, eight, one) = small_measurement(monkeypatch, replace(SMALL_MLP, share=0.03)).rows
    assert (eight.share, one.share) == (0.03, 0.03)
    # 6 -> 8 -> 7 -> 3: 56 + 63 + 24 parameters, vectors of 6 + 7 + 3.
    assert (eight.allowed_bytes, one.allowed_bytes) == (round(4 * (1.43 + 8 * 16)), round(4 * (1.43 + 16)))
    (_, eight, one) = small_measurement(monkeypatch, SMALL_CONVOLUTIONS).rows
    assert (eight.share, one.share) == (pytest.approx(1.6), pytest.approx(0.2))
    n_parameters = sum(p.numel() for p in small_convolutions().parameters())
    assert eight.allowed_bytes == round(4 * (0.01 * n_parameters + 8 * (2 * 36 + 3 * 36 + 5)))
    assert MODELS["mnist"].share == 0.03
    assert all(model.share is None for name, model in MODELS.items() if name != "mnist")
