"""The same-budget study: projections of stacked networks, their training, the statistics and the command."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lip import cli, projection
from lightning_lip.certificates import certified_matrix_norm
from lightning_lip.errors import UsageError
from lightning_lip.paper import PaperRegressor, command
from lightning_lip.paper.budgets import study, training
from lightning_lip.paper.budgets.study import LABELS, BudgetPlan, choose_coefficients, tuning_tasks
from lightning_lip.paper.budgets.training import (
    ALLOCATIONS,
    BUDGETS,
    CASES,
    CONSTRAINTS,
    MARGIN,
    BudgetRecord,
    SeedTask,
)
from lightning_lip.paper.data import LOADERS, split
from lightning_lip.paper.settings import METRICS, TUNING_SEED, validation_key

SHAPES = ((20, 13), (20, 20), (20, 20), (1, 20))
PLAN = BudgetPlan(range(10), range(1000, 1002), 1, (1.0, 4.0), (0.01, 0.1, 1.0), ("boston/relu", "boston/tanh"))


@pytest.fixture(scope="module")
def datasets():
    return {name: load() for name, load in LOADERS.items()}


# ---- Projections of stacked networks


def stack(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) / 4 for shape in SHAPES]


def products(weights):
    return torch.stack([torch.linalg.matrix_norm(weight.double(), 2) for weight in weights]).prod(dim=0).numpy()


@pytest.mark.parametrize("method", CONSTRAINTS)
def test_each_network_is_projected_onto_its_own_budget(method):
    weights = stack(len(BUDGETS) + 2, 0)
    before = [weight.clone() for weight in weights]
    training.project(weights, [(method, m) for m in BUDGETS])
    assert (products(before)[:4] > 4).all()  # there is something to do
    assert (products(weights)[: len(BUDGETS)] <= np.array(BUDGETS) * (1 + 1e-6)).all()
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight[len(BUDGETS) :], old[len(BUDGETS) :])  # those behind have no constraint


def test_each_method_takes_the_caps_of_its_name():
    spectra = [torch.linalg.svdvals(weight[0].double()).numpy() for weight in stack(1, 1)]
    caps = {
        "joint": projection.joint_caps(spectra, 0.5, metric="relative").caps,
        "joint_euclidean": projection.joint_caps(spectra, 0.5, metric="euclidean").caps,
        "log_clip": projection.log_clip_caps(spectra, 0.5).caps,
        "uniform": projection.per_layer_caps(spectra, log_target=0.5).caps,
        "scaling": np.exp((0.5 - np.log([s[0] for s in spectra]).sum()) / 4) * np.array([s[0] for s in spectra]),
    }
    for method, wanted in caps.items():
        found = [values.max() for values in training.projected(method, spectra, 0.5)]
        assert found == pytest.approx(wanted, rel=1e-12), method


def test_what_is_within_its_budget_stays_bit_for_bit():
    weights = stack(len(CONSTRAINTS), 2)
    weights[1][0] = 0  # a zero layer
    before = [weight.clone() for weight in weights]
    training.project(weights, [(method, 1e6) for method in CONSTRAINTS])
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


# ---- Training


def trained_alone(case, seed, epochs, method, budget, coefficient, data):
    """Train one network with SVDs: the specification of the stack. Returns its norms and clean validation MAE."""
    parts = split(data, seed, "standardised")
    mean, unit = parts.train_target.mean(), parts.train_target.std()
    inputs = torch.as_tensor(parts.train_inputs, dtype=torch.float32)
    target = torch.as_tensor((parts.train_target - mean) / unit, dtype=torch.float32)[:, None]
    network = PaperRegressor(inputs.shape[1], seed=seed).net
    if case.endswith("tanh"):
        network = nn.Sequential(*(nn.Tanh() if isinstance(module, nn.ReLU) else module for module in network))
    weights = [module.weight for module in network if isinstance(module, nn.Linear)]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-7)

    @torch.no_grad()
    def project(method, budget):
        decompositions = [torch.linalg.svd(weight.double(), full_matrices=False) for weight in weights]
        new = training.projected(method, [d.S.numpy() for d in decompositions], math.log(budget))
        for weight, d, s in zip(weights, decompositions, new, strict=True):
            weight.copy_(d.U * torch.from_numpy(s) @ d.Vh)

    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(50):
            loss = (network(inputs[rows]) - target[rows]).square().mean()
            if method == "penalty":
                loss = loss + coefficient * torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights]).prod()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if method != "penalty":
                project(method, budget)
    project("joint" if method == "penalty" else method, budget * (1 - MARGIN))
    predictions = network(torch.as_tensor(parts.validation_inputs, dtype=torch.float32))[:, 0].detach().numpy()
    errors = np.abs(predictions - (parts.validation_target - mean) / unit)
    return [torch.linalg.matrix_norm(w.detach(), 2).item() for w in weights], unit * errors.mean()


@pytest.mark.parametrize("case", ["boston/relu", "diabetes/tanh"])
def test_a_network_of_the_stack_is_the_one_trained_alone(datasets, case):
    constrained = (("joint", 0.5), ("uniform", 1.0), ("scaling", 2.0), ("joint", 1e3))
    penalised = ((1.0, 0.1), (0.5, 0.3))
    records = training.train_seed(SeedTask(case, 7, 3, constrained, penalised), datasets)
    wanted = [*((method, m, 0) for method, m in constrained), *(("penalty", m, c) for m, c in penalised)]
    assert [(r.method, r.budget, r.coefficient) for r in records] == wanted
    for record, row in zip(records, wanted, strict=True):
        norms, clean = trained_alone(case, 7, 3, *row, datasets[case.split("/")[0]])
        assert record.sigmas == pytest.approx(norms, rel=1e-4)
        assert record.errors[validation_key(0.0)] == pytest.approx(clean, rel=1e-4)


def test_budgets_are_certified_and_relu_networks_obey_the_uniform_caps_after_rebalancing(datasets):
    constrained = tuple((method, m) for method in CONSTRAINTS for m in (0.5, 4.0))
    records = training.train_seed(SeedTask("boston/relu", 0, 3, constrained, ((0.5, 0.03),)), datasets)
    spread = np.abs(datasets["boston"].target - datasets["boston"].target.mean()).mean()
    for record in records:
        assert 0 < record.certified <= record.budget
        assert math.prod(record.sigmas) == pytest.approx(record.certified)
        if record.budget == 0.5 and record.method in ("joint", "uniform", "scaling", "log_clip"):
            assert record.certified > record.budget * (1 - 2 * MARGIN)
        if record.method in ALLOCATIONS:
            k, share = ALLOCATIONS[record.method], record.budget**0.25
            assert (np.array(record.sigmas) <= share * np.array([k, 1, 1, 1 / k])).all()
        assert 0.3 * spread < record.errors[validation_key(0.0)] < 1.2 * spread  # in the target's units
    table = study.table_of([records])
    assert study.rebalanced(table) == {
        "networks": 2,
        "within_uniform_caps": 2,
        "largest_change": pytest.approx(0, abs=1e-12),
    }
    for budget in (0.5, 4.0):
        (joint,) = table["boston/relu", "joint", budget]
        assert max(joint.sigmas) > 1.05 * budget**0.25  # not before
        joint.rebalanced["largest_norm"] = 1.01 * budget**0.25
    assert study.rebalanced(table)["within_uniform_caps"] == 0
    (tanh,) = training.train_seed(SeedTask("boston/tanh", 0, 1, (("joint", 1.0),), ()), datasets)
    assert tanh.rebalanced is None


def test_a_bound_above_its_budget_is_an_error(datasets, monkeypatch):
    monkeypatch.setattr(training, "MARGIN", -1e-3)
    with pytest.raises(ArithmeticError, match=r"bound 0\.500\d+ of method 'joint' exceeds its budget 0\.5"):
        training.train_seed(SeedTask("boston/relu", 0, 1, (("joint", 0.5),), ()), datasets)


@pytest.mark.parametrize(("activation", "keeps"), [(nn.ReLU, True), (nn.Tanh, False)])
def test_rescaling_evens_the_norms_and_keeps_the_function_of_a_relu_network_only(activation, keeps):
    torch.manual_seed(0)
    layers = [m for out, into in SHAPES for m in (nn.Linear(into, out, dtype=torch.float64), activation())]
    network = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        network[0].weight.mul_(50)
    rescaled = copy.deepcopy(network)
    training.rescale(rescaled)
    inputs = torch.randn(1000, 13, dtype=torch.float64)
    assert torch.allclose(rescaled(inputs), network(inputs), rtol=1e-12, atol=1e-12) == keeps
    before, after = (np.array(training.certified_norms(net)) for net in (network, rescaled))
    assert tuple(before) == tuple(certified_matrix_norm(linear.weight) for linear in network[::2])
    assert after == pytest.approx(before.prod() ** 0.25)
    assert before[0] > 5 * after[0]


# ---- The penalty's coefficient


def test_the_coefficient_is_that_of_the_nearest_product():
    plan = PLAN._replace(budgets=(0.5, 4.0, 100.0))
    assert [(t.case, t.seed) for t in tuning_tasks(plan)] == [(c, s) for s in plan.tuning_seeds for c in plan.cases]
    # Geometric means over the seeds: 8, 2, .5 for ReLU and 16, 6, 1 for tanh; 4 is as far from 2 as from 8.
    bounds = [[4, 1, 0.25], [8, 6, 1], [16, 4, 1], [32, 6, 1]]
    tuned = [[BudgetRecord("", 0, "penalty", math.inf, 0, m, (), {}, None) for m in row] for row in bounds]
    coefficients, found = choose_coefficients(plan, tuned)
    assert found["boston/relu"] == pytest.approx([8, 2, 0.5])
    assert coefficients["boston/tanh"] == {0.5: 1.0, 4.0: 0.1, 100.0: 0.01}
    assert {m: coefficients["boston/relu"][m] for m in (0.5, 100.0)} == {0.5: 1.0, 100.0: 0.01}


def test_a_larger_coefficient_leads_to_a_smaller_product(datasets):
    task = SeedTask("boston/relu", 1000, 10, (), ((math.inf, 1e-3), (math.inf, 0.1), (math.inf, 1.0)))
    bounds = [record.certified for record in training.train_seed(task, datasets)]
    assert bounds[0] > 1.1 * bounds[1] > 1.1 * bounds[2] > 0


def test_tuning_and_reported_seeds_are_disjoint_and_every_method_is_reported():
    for options in ({}, {"quick": True}, {"seeds": 1000}):
        plan = command.budget_plan(**options)
        assert not set(plan.seeds) & set(plan.tuning_seeds)
        assert (plan.cases, plan.budgets) == (CASES, BUDGETS)
    tasks = study.reported_tasks(command.budget_plan(seeds=2), {case: dict.fromkeys(BUDGETS, 0.1) for case in CASES})
    assert len(tasks) == 2 * len(CASES)
    assert tasks[0].constrained == tuple((method, m) for method in CONSTRAINTS for m in BUDGETS)
    assert tasks[0].penalised == tuple((m, 0.1) for m in BUDGETS)
    assert {*CONSTRAINTS, "penalty"} == set(LABELS)


# ---- Statistics and words


def synthetic(factor, n_seeds=10):
    """Return a plan and a table of MAEs that vary by seed, with little noise; the joint projection's times `factor`."""
    plan = PLAN._replace(seeds=range(n_seeds))
    rng = np.random.default_rng(0)
    records = []
    for case, method, m, seed in itertools.product(plan.cases, LABELS, plan.budgets, plan.seeds):
        error = (5 + seed / 3) * (factor if method == "joint" else 1.0)
        errors = {metric: error * rng.normal(1, 0.001) for metric in METRICS}
        bound = m / 2 if method == "penalty" else m
        records.append(BudgetRecord(case, seed, method, m, 0.0, bound, (1.0,) * 4, errors, None))
    return plan, study.table_of([records])


def test_overall_changes_are_in_per_cent_of_the_uniform_caps():
    plan, table = synthetic(1.1)
    found = study.overall(plan, table, "boston/relu")
    assert set(found) == set(LABELS) - {"uniform"}
    assert found["joint"].comparison.difference.mean == pytest.approx(10, abs=0.2)
    assert found["joint"].p_value == pytest.approx(9 * 2 * 0.5**10)  # Holm over nine methods
    assert found["scaling"].comparison.difference.mean == pytest.approx(0, abs=0.2)
    assert study.budget_used(table, "joint") == pytest.approx(1)
    assert study.budget_used(table, "penalty") == pytest.approx(0.5)


TOO_FEW = "3 seeds are too few: no outcome could pass 9 two-sided tests at 0.05 after Holm."


@pytest.mark.parametrize(
    ("factor", "n_seeds", "verdict", "few"),
    [
        (0.9, 10, "lower", []),
        (1.1, 10, "higher", []),
        (1.0, 10, "no difference shown", []),
        (0.9, 3, "no difference shown", [TOO_FEW]),
    ],
)
def test_the_words_follow_the_statistics(factor, n_seeds, verdict, few):
    conclusion, *rest = study.findings(*synthetic(factor, n_seeds))
    assert conclusion.endswith(f"over all budgets and noise levels: {verdict} for boston/relu, boston/tanh.")
    assert rest == few


# ---- The command


def test_reproduce_budget_leaves_its_file_and_repeats_its_numbers(tmp_path, capsys):
    plan = PLAN._replace(seeds=range(2), tuning_seeds=range(TUNING_SEED, TUNING_SEED + 1), epochs=2)
    first, again = (study.run_budget(plan, tmp_path / name, 1) for name in ("first", "again"))
    written = json.loads((tmp_path / "first" / "budget.json").read_text())
    for document in (first, again, written):
        assert document.pop("timing")["seconds"] > 0
    assert first == again
    assert written == json.loads(json.dumps(first))
    assert len(first["runs"]) == 2 * 2 * 2 * len(LABELS)
    assert all(run["certified"] <= run["budget"] for run in first["runs"])
    assert first["options"]["seeds"] == [0, 1]
    assert first["versions"]["scikit-learn"]
    assert first["rebalanced"]["networks"] == first["rebalanced"]["within_uniform_caps"] == 4
    assert len(first["overall"]) == 2 * (len(LABELS) - 1)
    shown = capsys.readouterr().out
    for part in ("column B", *LABELS.values(), "At equal certified budgets", "Rebalancing: 4 of the 4", "budget.json"):
        assert part in shown
    assert "\x1b" not in shown
    assert "…" not in shown


def test_an_interrupted_study_goes_on_and_ends_the_same(tmp_path, monkeypatch, capsys):
    plan = PLAN._replace(seeds=range(2), tuning_seeds=range(TUNING_SEED, TUNING_SEED + 1), epochs=1)
    whole = study.run_budget(plan, tmp_path / "whole", 1)
    n_calls = 0

    def interrupted(*arguments, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            raise KeyboardInterrupt
        return training.train_seed(*arguments, **options)

    monkeypatch.setattr(study, "train_seed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run_budget(plan, tmp_path / "out", 1)
    found = study.run_budget(plan, tmp_path / "out", 1)
    assert n_calls == 7  # 2 tunings and 4 tasks, one of them twice
    shown = capsys.readouterr().out
    for line in ("continuing: 2 of 2 tuning tasks are done", "continuing: 1 of 4 tasks are done"):
        assert line in shown
    written = json.loads((tmp_path / "out" / "budget.json").read_text())
    for document in (whole, found, written):
        del document["timing"]
    assert found == whole
    assert written == json.loads(json.dumps(whole))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["budget.json"]


@pytest.fixture
def called(monkeypatch):
    calls = []
    monkeypatch.setattr(study, "run_budget", lambda *args: calls.append(args))
    return calls


def test_options_reach_the_study(called):
    cli.main(["reproduce", "--budget", "--out", "elsewhere", "--seeds", "5", "--epochs", "7", "--workers", "3"])
    cli.main(["reproduce", "--budget", "--quick"])
    (plan, folder, workers), (quick, *_) = called
    assert plan == command.budget_plan(seeds=5, epochs=7)
    assert (str(folder), workers) == ("elsewhere", 3)
    assert quick == command.budget_plan(quick=True)
    assert (len(quick.seeds), len(quick.tuning_seeds)) == (3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full": True}, "--budget without --full"),
        ({"tune": True}, "--budget without --tune"),
        ({"seeds": 1}, "--seeds to be 2 to 1000, got 1"),
        ({"epochs": 0}, "--epochs to be at least 1, got 0"),
    ],
)
def test_options_that_make_no_study_are_refused(called, options, message):
    with pytest.raises(UsageError, match=message):
        command.reproduce(budget=True, **options)
    assert not called
