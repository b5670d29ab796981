import copy
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_lip import cli
from lightning_lip.certificates.interval import certified_matrix_norm
from lightning_lip.errors import UsageError
from lightning_lip.paper import command
from lightning_lip.paper.budgets import (
    experiment as budget,
)
from lightning_lip.paper.budgets import (
    figures as budget_figures,
)
from lightning_lip.paper.budgets import (
    report as budget_report,
)
from lightning_lip.paper.budgets import (
    statistics as budget_statistics,
)
from lightning_lip.paper.budgets import (
    training as budget_training,
)
from lightning_lip.paper.budgets.settings import (
    ALLOCATIONS,
    BUDGETS,
    CASES,
    CONSTRAINTS,
    DATASETS,
    LABELS,
    MARGIN,
    METHODS,
    PENALTY_GRID,
    BudgetPlan,
    BudgetRecord,
    Case,
    Rebalanced,
    SeedTask,
)
from lightning_lip.paper.budgets.tuning import choose_coefficients, tuning_tasks
from lightning_lip.paper.data import DataError, load_boston, load_diabetes, split
from lightning_lip.paper.regimes.settings import METRICS, NOISE_LEVELS, TUNING_SEED, validation_key
from lightning_lip.projection import caps as projection

RELU, TANH = Case("boston", "relu"), Case("boston", "tanh")
SHAPES = ((20, 13), (20, 20), (20, 20), (1, 20))


@pytest.fixture(scope="module")
def datasets():
    return {"boston": load_boston(), "diabetes": load_diabetes()}


def test_diabetes_is_in_its_own_units(datasets):
    inputs, target = datasets["diabetes"]
    assert inputs.shape == (442, 10)
    assert (inputs[:, 0].min(), inputs[:, 0].max()) == (19, 79)  # years of age, not scaled
    assert (target.min(), target.max()) == (25, 346)


def test_other_data_than_diabetes_are_refused(monkeypatch):
    monkeypatch.setattr("sklearn.datasets.load_diabetes", lambda **kwargs: (np.zeros((442, 10)), np.zeros(442)))
    with pytest.raises(DataError, match=r"\(442, 10\).*152\.1335.*got .* 0\.0"):
        load_diabetes()


# ---- Projections of stacked networks


def stack(n, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator, dtype=dtype) / 4 for shape in SHAPES]


def norms_of(weights):
    """(layers, networks), float64."""
    return np.stack([torch.linalg.matrix_norm(weight.double(), 2).numpy() for weight in weights])


@pytest.mark.parametrize("method", CONSTRAINTS)
def test_each_network_is_projected_onto_its_own_budget(method):
    constraints = [(method, m) for m in BUDGETS]
    weights = stack(len(BUDGETS) + 2, 0)
    before = [weight.clone() for weight in weights]
    budget_training.project(weights, constraints)
    norms = norms_of(weights)
    assert (norms_of(before)[:, : len(BUDGETS)].prod(axis=0)[:4] > 4).all()  # there is something to do
    assert (norms.prod(axis=0)[: len(BUDGETS)] <= np.array(BUDGETS) * (1 + 1e-6)).all()
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight[len(BUDGETS) :], old[len(BUDGETS) :])  # those behind have no constraint


def test_a_projection_replaces_singular_values_by_those_of_the_library():
    weights = [weight.double() for weight in stack(1, 1)]
    decompositions = [torch.linalg.svd(weight[0], full_matrices=False) for weight in weights]
    for method, caps_of in {
        "joint": lambda s: projection.joint_caps(s, 0.0, metric="relative"),
        "joint_euclidean": lambda s: projection.joint_caps(s, 0.0, metric="euclidean"),
        "log_clip": lambda s: projection.log_clip_caps(s, 0.0),
        "uniform": lambda s: projection.per_layer_caps(s, log_target=0.0),
        "first_x4": lambda s: projection.per_layer_caps(s, [4, 1, 1, 0.25]),
    }.items():
        projected = [weight.clone() for weight in weights]
        budget_training.project(projected, [(method, 1.0)])
        caps = caps_of([d.S.numpy() for d in decompositions]).caps
        for weight, (U, S, Vh), cap in zip(projected, decompositions, caps, strict=True):
            assert torch.allclose(weight[0], U * S.clamp(max=cap) @ Vh, rtol=0, atol=1e-12), method
    scaled = [weight.clone() for weight in weights]
    budget_training.project(scaled, [("scaling", 1.0)])
    factor = float(norms_of(weights).prod()) ** -0.25
    for weight, old in zip(scaled, weights, strict=True):
        assert torch.allclose(weight, factor * old, rtol=0, atol=1e-12)


def test_what_is_within_its_budget_stays_bit_for_bit():
    weights = stack(len(CONSTRAINTS), 2)
    weights[1][0] = 0  # a zero layer
    before = [weight.clone() for weight in weights]
    budget_training.project(weights, [(method, 1e6) for method in CONSTRAINTS])
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


# ---- Training


def plain_training(case, seed, epochs, method, budget_, coefficient, data):
    """One network, one optimiser, SVDs: the specification of what the stack does. Returns the network and its split."""
    from lightning_lip.paper.model import PaperRegressor

    parts = split(data, seed, "standardised")
    mean, unit = parts.train_target.mean(), parts.train_target.std()
    inputs = torch.as_tensor(parts.train_inputs, dtype=torch.float32)
    target = torch.as_tensor((parts.train_target - mean) / unit, dtype=torch.float32)[:, None]
    network = PaperRegressor(inputs.shape[1], seed=seed).net
    if case.activation == "tanh":
        network = nn.Sequential(*(nn.Tanh() if isinstance(module, nn.ReLU) else module for module in network))
    linears = [module for module in network if isinstance(module, nn.Linear)]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-7)

    @torch.no_grad()
    def project(method, log_budget):
        decompositions = [torch.linalg.svd(linear.weight.double(), full_matrices=False) for linear in linears]
        spectra = [d.S.numpy() for d in decompositions]
        if method == "scaling":
            new = [f * s for f, s in zip(projection.scale_factors(spectra, log_budget), spectra, strict=True)]
        elif method == "uniform":
            caps = projection.per_layer_caps(spectra, log_target=log_budget).caps
            new = [np.minimum(s, c) for s, c in zip(spectra, caps, strict=True)]
        else:
            caps = projection.joint_caps(spectra, log_budget).caps
            new = [np.minimum(s, c) for s, c in zip(spectra, caps, strict=True)]
        for linear, d, s in zip(linears, decompositions, new, strict=True):
            linear.weight.copy_(d.U * torch.from_numpy(s) @ d.Vh)

    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(50):
            loss = (network(inputs[rows]) - target[rows]).square().mean()
            if method == "penalty":
                product = torch.stack([torch.linalg.matrix_norm(linear.weight, 2) for linear in linears]).prod()
                loss = loss + coefficient * product
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if method != "penalty":
                project(method, math.log(budget_))
    project("joint" if method == "penalty" else method, math.log(budget_ * (1 - MARGIN)))
    predictions = network(torch.as_tensor(parts.validation_inputs, dtype=torch.float32))[:, 0].detach().numpy()
    return network, unit * np.abs(predictions - (parts.validation_target - mean) / unit).mean()


@pytest.mark.parametrize("case", [RELU, Case("diabetes", "tanh")], ids=lambda case: case.name)
def test_a_network_of_the_stack_is_the_one_trained_alone(datasets, case):
    constrained = (("joint", 0.5), ("uniform", 1.0), ("scaling", 2.0), ("joint", 1e3))
    penalised = ((1.0, 0.1), (0.5, 0.1), (0.5, 0.3))
    records = budget_training.train_seed(SeedTask(case, 7, 3, constrained, penalised), datasets)
    assert [(r.method, r.budget, r.coefficient) for r in records] == [
        *((method, m, 0) for method, m in constrained),
        *(("penalty", m, coefficient) for m, coefficient in penalised),
    ]
    for record in records:
        network, clean = plain_training(
            case, 7, 3, record.method, record.budget, record.coefficient, datasets[case.dataset]
        )
        norms = [torch.linalg.matrix_norm(m.weight.detach(), 2).item() for m in network if isinstance(m, nn.Linear)]
        assert record.sigmas == pytest.approx(norms, rel=1e-4)
        assert record.errors[validation_key(0.0)] == pytest.approx(clean, rel=1e-4)


@pytest.fixture(scope="module")
def short_run(datasets):
    constrained = tuple((method, m) for method in CONSTRAINTS for m in (0.5, 4.0))
    return budget_training.train_seed(SeedTask(RELU, 0, 3, constrained, ((0.5, 0.03), (4.0, 0.03))), datasets)


def test_every_certified_bound_is_within_its_budget(short_run):
    for record in short_run:
        assert 0 < record.certified <= record.budget
        assert math.prod(record.sigmas) == pytest.approx(record.certified)
    tight = [r for r in short_run if r.method in ("joint", "uniform", "scaling", "log_clip") and r.budget == 0.5]
    assert len(tight) == 4
    for record in tight:
        assert record.certified > record.budget * (1 - 2 * MARGIN)


def test_a_bound_above_its_budget_is_an_error(datasets, monkeypatch):
    monkeypatch.setattr(budget_training, "MARGIN", -1e-3)
    with pytest.raises(ArithmeticError, match=r"bound 0\.500\d+ of method 'joint' exceeds its budget 0\.5"):
        budget_training.train_seed(SeedTask(RELU, 0, 1, (("joint", 0.5),), ()), datasets)


def test_allocations_cap_the_first_and_last_layer_inversely(short_run):
    for record in short_run:
        if record.method in ALLOCATIONS:
            k, share = ALLOCATIONS[record.method], record.budget**0.25
            assert (np.array(record.sigmas) <= share * np.array([k, 1, 1, 1 / k])).all()


def test_errors_are_in_the_targets_units(short_run, datasets):
    deviation = np.abs(datasets["boston"].target - datasets["boston"].target.mean()).mean()
    for record in short_run:
        assert set(record.errors) == set(METRICS)
        assert 0.3 * deviation < record.errors[validation_key(0.0)] < 1.2 * deviation


# ---- Rebalancing


def random_network(activation, seed=0):
    torch.manual_seed(seed)
    layers = []
    for out, into in SHAPES:
        layers += [nn.Linear(into, out, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


def test_rescaling_a_relu_network_evens_its_norms_and_keeps_its_function():
    network = random_network(nn.ReLU)
    with torch.no_grad():
        network[0].weight.mul_(50)
    rescaled = copy.deepcopy(network)
    budget_training.rescale(rescaled)
    inputs = torch.randn(1000, 13, dtype=torch.float64)
    assert torch.allclose(rescaled(inputs), network(inputs), rtol=1e-12, atol=1e-12)
    before, after = (np.array(budget_training.certified_norms(net)) for net in (network, rescaled))
    assert after == pytest.approx(before.prod() ** 0.25)
    assert before[0] > 5 * after[0]


def test_rescaling_changes_a_network_that_is_not_homogeneous():
    network = random_network(nn.Tanh)
    rescaled = copy.deepcopy(network)
    with torch.no_grad():
        network[0].weight.mul_(3)
    rescaled = copy.deepcopy(network)
    budget_training.rescale(rescaled)
    inputs = torch.randn(100, 13, dtype=torch.float64)
    assert (rescaled(inputs) - network(inputs)).abs().max() > 0.05


def test_jointly_projected_relu_networks_obey_the_uniform_caps_after_rebalancing(short_run):
    rebalanced = [record for record in short_run if record.rebalanced is not None]
    assert [record.method for record in rebalanced] == ["joint"] * 2
    for record in rebalanced:
        assert max(record.sigmas) > 1.05 * record.budget**0.25  # not before
        assert budget_statistics.within_uniform_caps(record)
        assert record.rebalanced.change < 1e-12
        broken = replace(record, rebalanced=Rebalanced(1.01 * record.budget**0.25, 0.0))
        assert not budget_statistics.within_uniform_caps(broken)
    with pytest.raises(ValueError, match=r"rebalanced network, got one of boston/relu, uniform"):
        budget_statistics.within_uniform_caps(next(r for r in short_run if r.method == "uniform"))


def test_only_relu_networks_are_rebalanced(datasets):
    (record,) = budget_training.train_seed(SeedTask(TANH, 0, 1, (("joint", 1.0),), ()), datasets)
    assert record.rebalanced is None


# ---- The penalty's coefficient


def test_the_coefficient_is_that_of_the_nearest_product():
    plan = BudgetPlan(range(2), range(1000, 1002), 1, (0.5, 4.0, 100.0), (0.01, 0.1, 1.0), (RELU, TANH))
    assert [(t.case, t.seed) for t in tuning_tasks(plan)] == [(c, s) for s in (1000, 1001) for c in (RELU, TANH)]
    # Geometric means over the seeds: 8, 2, .5 for ReLU and 16, 6, 1 for tanh; 4 is as far from 2 as from 8.
    tuning = choose_coefficients(plan, [[4, 1, 0.25], [8, 6, 1], [16, 4, 1], [32, 6, 1]])
    assert tuning.products[RELU] == pytest.approx([8, 2, 0.5])
    assert tuning.coefficients[TANH] == {0.5: 1.0, 4.0: 0.1, 100.0: 0.01}
    assert {m: tuning.coefficients[RELU][m] for m in (0.5, 100.0)} == {0.5: 1.0, 100.0: 0.01}
    assert "boston/tanh, M = 0.5" in tuning.at_the_edge
    assert "boston/tanh, M = 4" not in tuning.at_the_edge
    json.dumps(tuning.to_json(), allow_nan=False)


def test_a_larger_coefficient_leads_to_a_smaller_product(datasets):
    products = budget_training.train_penalties(
        SeedTask(RELU, 1000, 10, (), ((math.inf, 1e-3), (math.inf, 0.1), (math.inf, 1.0))), datasets
    )
    assert products[0] > 1.1 * products[1] > 1.1 * products[2] > 0


def test_tuning_and_reported_seeds_are_disjoint_and_every_method_is_reported():
    for options in ({}, {"quick": True}, {"seeds": 1000}):
        plan = command.budget_plan(**options)
        assert not set(plan.seeds) & set(plan.tuning_seeds)
        assert plan.cases == CASES
    plan = command.budget_plan(seeds=2)
    tuning = choose_coefficients(plan, [[1.0] * len(plan.grid)] * len(tuning_tasks(plan)))
    tasks = budget.reported_tasks(plan, tuning)
    assert len(tasks) == 2 * len(CASES)
    assert {method for method, _ in tasks[0].constrained} | {"penalty"} == set(METHODS)
    assert len(tasks[0].constrained) == len(CONSTRAINTS) * len(BUDGETS)
    assert [m for m, _ in tasks[0].penalised] == list(BUDGETS)


# ---- Statistics and words


def synthetic(factor, n_seeds=10, cases=(RELU, TANH)):
    """A table whose MAE is `factor(case, method, budget, level)` times one that varies by seed, with little noise."""
    rng = np.random.default_rng(0)
    by_seed = 5 + rng.normal(0, 1, n_seeds)
    records = []
    for case in cases:
        for method in METHODS:
            for m in (1.0, 4.0):
                for seed in range(n_seeds):
                    errors = {metric: by_seed[seed] * rng.normal(1, 0.001) for metric in METRICS}
                    for level in NOISE_LEVELS:
                        errors[validation_key(level)] *= factor(case, method, m, level)
                    rebalanced = Rebalanced(m**0.25 * 0.999, 1e-16) if (case, method) == (RELU, "joint") else None
                    bound = m if method != "penalty" else m / 2
                    records.append(BudgetRecord(case, seed, method, m, 0.0, bound, (1.0,) * 4, errors, rebalanced))
    return budget.table_of([records])


def joint_factor(value, only=None):
    def factor(case, method, m, level):
        return value if method == "joint" and (only is None or only == (case, m, level)) else 1.0

    return factor


def test_overall_changes_are_in_per_cent_of_the_uniform_caps():
    found = budget_statistics.overall(synthetic(joint_factor(1.1)), RELU)
    assert set(found) == set(METHODS) - {"uniform"}
    assert found["joint"].comparison.difference.mean == pytest.approx(10, abs=0.2)
    assert found["joint"].p_value == pytest.approx(9 * 2 * 0.5**10)  # Holm over nine methods
    assert found["scaling"].comparison.difference.mean == pytest.approx(0, abs=0.2)


def test_the_budget_used_is_the_mean_share():
    table = synthetic(joint_factor(1.0))
    assert budget_statistics.budget_used(table, RELU, "joint") == pytest.approx(1)
    assert budget_statistics.budget_used(table, RELU, "penalty") == pytest.approx(0.5)


@pytest.mark.parametrize(("value", "word", "other"), [(0.9, "lower", "higher"), (1.1, "higher", "lower")])
def test_the_words_follow_the_statistics(value, word, other):
    table = synthetic(joint_factor(value))
    single, _ = budget_report.findings(table, RELU)
    assert f": {word} MAE at M = 1, eta 0, M = 1, eta 0.2" in single
    assert "no difference shown in 0 of 8 comparisons" in single
    (conclusion,) = budget_report.conclusions(table)
    assert conclusion.endswith(f"over all budgets and noise levels: {word} for boston/relu, boston/tanh.")
    assert other not in single + conclusion


def test_no_word_where_no_test_shows_a_difference():
    for table in (synthetic(joint_factor(1.0)), synthetic(joint_factor(0.9), n_seeds=3)):
        said = " ".join([*budget_report.conclusions(table), *budget_report.findings(table, TANH)])
        assert "no difference shown in 8 of 8 comparisons" in said
        assert "no difference shown for boston/relu, boston/tanh" in said
        assert "lower" not in said
        assert "higher" not in said


def test_a_difference_in_one_place_is_reported_there_only():
    table = synthetic(joint_factor(0.9, only=(TANH, 4.0, 0.6)))
    assert "lower MAE at M = 4, eta 0.6; no difference shown in 7 of 8" in budget_report.findings(table, TANH)[0]
    assert "caps M^(1/4), boston/relu: no difference shown in 8 of 8" in budget_report.findings(table, RELU)[0]


def test_too_few_seeds_are_named():
    (_, few) = budget_report.conclusions(synthetic(joint_factor(0.9), n_seeds=3))
    assert few == "3 seeds are too few: no outcome could pass 8 two-sided tests at 0.05 after Holm."


def test_the_report_counts_the_rebalanced_networks():
    (sentence,) = budget_report.rebalancing(synthetic(joint_factor(1.0)))
    assert sentence.startswith("Rebalancing: 20 of the 20 jointly projected ReLU networks")
    assert budget_report.rebalancing(synthetic(joint_factor(1.0), cases=(TANH,))) == []


def test_the_figures_show_every_method_in_every_panel():
    table = synthetic(joint_factor(0.9))
    drawn = budget_figures.budget_figures(table)
    assert list(drawn) == ["budget_boston_relu", "budget_boston_tanh", "budget_front"]
    for figure in drawn.values():
        for axes in figure.axes:
            labels = [line.get_label() for line in axes.lines]
            assert set(LABELS.values()) <= set(labels)
            assert axes.get_xlabel()
            assert axes.get_ylabel()
    (line,) = (li for li in drawn["budget_boston_relu"].axes[0].lines if li.get_label() == LABELS["penalty"])
    assert line.get_xdata() == pytest.approx([0.5, 2.0])  # at the bound, not at the budget


# ---- The command


def test_reproduce_budget_leaves_its_files_and_repeats_its_numbers(tmp_path, capsys):
    plan = BudgetPlan(range(2), range(TUNING_SEED, TUNING_SEED + 1), 2, (0.5, 4.0), (0.01, 0.1, 1.0), (RELU, TANH))
    first, again = (budget.run_budget(plan, tmp_path / name, 1) for name in ("first", "again"))
    for document in (first, again):
        assert document.pop("timing")["seconds"] > 0
    assert first == again
    written = json.loads((tmp_path / "first" / "budget.json").read_text())
    del written["timing"]
    assert written == json.loads(json.dumps(first))
    assert len(first["runs"]) == 2 * 2 * 2 * len(METHODS)
    assert all(run["certified"] <= run["budget"] for run in first["runs"])
    assert first["options"]["seeds"] == [0, 1]
    assert first["versions"]["scikit-learn"]
    assert first["rebalanced"]["networks"] == first["rebalanced"]["within_uniform_caps"] == 4
    assert len(first["joint_against_uniform"]) == 2 * 2 * len(NOISE_LEVELS)
    for name in first["figures"]:
        assert (tmp_path / "first" / name).stat().st_size > 10_000
    assert len(list((tmp_path / "first" / "tensorboard" / "budget").glob("events.*"))) == 1
    shown = capsys.readouterr().out
    for part in (
        "column B",
        "per-layer caps M^(1/4)",
        "At equal certified budgets",
        "Rebalancing: 4 of the 4",
        "budget.json",
    ):
        assert part in shown


def test_the_tables_fit_plain_output(datasets):
    console = Console(file=io.StringIO(), width=120)
    table = synthetic(joint_factor(0.9))
    plan = BudgetPlan(range(10), range(1000, 1001), 1, (1.0, 4.0), PENALTY_GRID, (RELU, TANH))
    tuning = choose_coefficients(plan, [[1.0] * len(PENALTY_GRID)] * 2)
    budget_report.print_report(console, table, tuning)
    shown = console.file.getvalue()
    assert "\x1b" not in shown
    assert "…" not in shown


@pytest.fixture
def called(monkeypatch):
    calls = []
    monkeypatch.setattr(budget, "run_budget", lambda *args: calls.append(args))
    return calls


def test_options_reach_the_experiment(called):
    cli.main(["reproduce", "--budget", "--out", "elsewhere", "--seeds", "5", "--epochs", "7", "--workers", "3"])
    ((plan, folder, workers),) = called
    assert plan == command.budget_plan(seeds=5, epochs=7)
    assert (str(folder), workers) == ("elsewhere", 3)
    cli.main(["reproduce", "--budget", "--quick"])
    assert called[1][0] == command.budget_plan(quick=True)
    assert (len(called[1][0].seeds), len(called[1][0].tuning_seeds)) == (3, 3)


@pytest.mark.parametrize("option", ["full", "tune"])
def test_options_of_the_other_experiment_are_refused(called, option):
    with pytest.raises(UsageError, match=f"--budget without --{option}"):
        command.reproduce(budget=True, **{option: True})
    assert not called


def test_seeds_and_epochs_are_checked():
    with pytest.raises(UsageError, match="--seeds to be 2 to 1000, got 1"):
        command.budget_plan(seeds=1)
    with pytest.raises(UsageError, match="--epochs to be at least 1, got 0"):
        command.budget_plan(epochs=0)


def test_every_data_set_and_method_is_named():
    assert set(budget.LOADERS) == set(DATASETS) == {case.dataset for case in CASES}
    assert set(LABELS) == set(METHODS) == set(budget_figures.STYLES)


def test_certified_norms_are_those_of_certificates():
    network = random_network(nn.ReLU)
    assert budget_training.certified_norms(network) == tuple(certified_matrix_norm(m.weight) for m in network[::2])
