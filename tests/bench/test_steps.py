import copy
import csv
import json
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_lip import LipschitzRegularizer, cli
from lightning_lip import bench as package
from lightning_lip.bench import command
from lightning_lip.bench.contenders import peers
from lightning_lip.bench.contenders.layers import adjoint, apply, exact_norm, input_shapes
from lightning_lip.bench.contenders.models import MODELS, BenchModel, TransformerBlock, gpt2_blocks, mlp, resnet18
from lightning_lip.bench.steps import figures, measure, report, run
from lightning_lip.bench.steps import training as steps
from lightning_lip.bench.steps.memory import Memory, memory_of
from lightning_lip.errors import UsageError

CPU = torch.device("cpu")


def small_convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def with_leading_directions():
    """One singular value of each layer stands far above the others: one vector finds it in a few iterations."""
    network = mlp(6, 8, 7, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.5 * (parameter.dim() == 2)
    return network


SMALL_MLP = BenchModel("a small MLP", lambda: mlp(6, 8, 7, 3), (6,), 4)
SMALL_CONVOLUTIONS = BenchModel("small convolutions", small_convolutions, (2, 6, 6), 4, n_classes=5)


EXACT = ("exact_svd", "penalty_r8", "autograd_block_loop")
"""Peers whose norms follow the weights of these small layers to fp32 rounding: their blocks span most of each."""


def task_of(model):
    network = model.network()
    names = model.layers(network)
    inputs, _ = model.batch(network)
    shapes = input_shapes(network, names, inputs)
    return peers.Task(model.network, names, shapes, model.n_classes is not None, inputs[:2]), model.batch(network)


def peer_named(name):
    return next(peer for peer in peers.PEERS if peer.name == name)


def dense_norm(layer, shape):
    """The largest singular value of the layer's matrix, column by column from its own forward pass."""
    basis = torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        outputs = layer.double()(basis) - layer(torch.zeros_like(basis))
        layer.float()
    return float(torch.linalg.matrix_norm(outputs.flatten(1), 2))


# The models


def test_resnet18_and_gpt2_have_the_size_of_the_published_ones():
    # ResNet-18 with 10 classes and the 3 x 3 stem, and a block of GPT-2 small.
    assert sum(p.numel() for p in resnet18().parameters()) == 11_173_962
    assert sum(p.numel() for p in gpt2_blocks(1).parameters()) == 7_087_872


def test_a_causal_block_sees_no_later_token():
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, causal=True)
    tokens = torch.randn(1, 5, 8)
    changed = tokens.clone()
    changed[:, 3:] += 1
    assert torch.equal(block(tokens)[:, :3], block(changed)[:, :3])
    assert not torch.allclose(block(tokens)[:, 3:], block(changed)[:, 3:])


@pytest.mark.parametrize(("name", "n_layers"), [("paper", 4), ("mnist", 3), ("resnet18", 21), ("vit", 12), ("gpt2", 8)])
def test_each_model_trains_and_has_its_layers(name, n_layers):
    model = MODELS[name]
    network = model.network()
    inputs, targets = model.batch(network)
    outputs = network(inputs[:2])
    assert len(model.layers(network)) == n_layers
    assert targets.shape == ((model.batch_size,) if model.n_classes else (model.batch_size, *outputs.shape[1:]))
    assert outputs.requires_grad
    again = model.network()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


# The truth


def test_exact_norms_are_those_of_the_dense_operators():
    task, _ = task_of(SMALL_CONVOLUTIONS)
    network = task.network()
    for name in task.names:
        layer, shape = network.get_submodule(name), task.input_shapes[name]
        assert exact_norm(layer, shape) == pytest.approx(dense_norm(layer, shape), rel=1e-4)


def test_exact_norm_of_a_matrix_of_convolution():
    layer = nn.Conv2d(3, 5, 1)
    assert exact_norm(layer, (3, 4, 4)) == pytest.approx(dense_norm(layer, (3, 4, 4)), rel=1e-6)
    strided = nn.Conv2d(3, 5, 1, stride=2)
    assert exact_norm(strided, (3, 4, 4)) == pytest.approx(dense_norm(strided, (3, 4, 4)), rel=1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(2, 3, 3, stride=2, padding=1)])
def test_adjoint_is_the_adjoint(layer):
    shape = (4,) if isinstance(layer, nn.Linear) else (2, 5, 5)
    layer = copy.deepcopy(layer).double()
    inputs = torch.randn(1, *shape, dtype=torch.float64)
    images = apply(layer, layer.weight, inputs)
    outputs = torch.randn_like(images)
    back = adjoint(layer, layer.weight, outputs, shape)
    products = (images * outputs).sum().item(), (inputs * back).sum().item()
    assert products[0] == pytest.approx(products[1], abs=1e-13 * float(images.norm() * outputs.norm()))


def test_recording_the_input_shapes_leaves_the_network_alone():
    network = small_convolutions().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert input_shapes(network, ["0", "5"], torch.randn(4, 2, 6, 6)) == {"0": (2, 6, 6), "5": (16,)}
    assert network.training
    assert not network[0]._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_linear_layer_maps_one_token():
    block = TransformerBlock(8, 2, causal=True)
    assert input_shapes(block, ["mlp.0", "mlp.2"], torch.randn(1, 5, 8)) == {"mlp.0": (8,), "mlp.2": (32,)}


# The peers


@pytest.mark.parametrize("model", [SMALL_MLP, SMALL_CONVOLUTIONS], ids=["mlp", "convolutions"])
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_a_peer_trains_and_its_norms_are_right(peer, model):
    if peer.missing():
        pytest.skip(f"{peer.missing()} is not installed")
    task, batch = task_of(model)
    contender = peer.prepare(task)
    before = [p.detach().clone() for p in contender.training.parameters()]
    steps.fit(contender.training, contender.callbacks, batch, 1, 30)
    after = list(contender.training.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.isfinite().all() for p in after)
    if contender.norms is None:
        assert peer.name in ("gradient_penalty", "penalty_graph")
        return
    network = contender.training.network.eval()
    norms = contender.norms()
    assert len(norms) == len(task.names)
    for norm, name in zip(norms, task.names, strict=True):
        layer, shape = network.get_submodule(name), task.input_shapes[name]
        if peer.operator == "reshaped" and peer.name != "torchlip":
            truth = float(torch.linalg.matrix_norm(layer.weight.detach().double().flatten(1), 2))
        else:
            truth = dense_norm(layer, shape)
        if peer.name == "torchlip" and isinstance(layer, nn.Conv2d):
            assert truth <= norm  # it divides by a bound of what the convolution adds to the matrix
        else:
            # One vector follows moving weights less closely than an SVD or a block: the estimate lies below.
            assert norm == pytest.approx(truth, rel=1e-5 if peer.name in EXACT else 0.05)


@pytest.mark.parametrize("name", ["autograd_block_loop", "autograd_loop", "exact_svd", "penalty_r1"])
def test_peers_add_the_same_gradient(name):
    task, batch = task_of(BenchModel("", with_leading_directions, (6,), 4))

    def gradients(prepare):
        contender = prepare(task)
        steps.fit(contender.training, contender.callbacks, batch, 0, 1)
        return torch.cat([p.grad.flatten() for p in contender.training.parameters()])

    of_loss = gradients(peers.plain)
    expected = gradients(peer_named("penalty_r8").prepare) - of_loss
    added = gradients(peer_named(name).prepare) - of_loss
    assert expected.norm() > 1e-4
    assert (added - expected).norm() < 1e-3 * expected.norm()


def test_the_gradient_penalty_is_the_mean_squared_slope(monkeypatch):
    monkeypatch.setattr(peers, "COEFFICIENT", 1.0)  # the difference of losses keeps its digits
    task, (inputs, targets) = task_of(SMALL_MLP)
    with_term, without = peers.gradient_penalty(task).training, peers.plain(task).training
    difference = with_term.training_step((inputs, targets)) - without.training_step((inputs, targets))
    network = task.network()
    slopes = [torch.autograd.functional.jacobian(lambda x: network(x).sum(), x) for x in inputs]
    expected = torch.stack(slopes).square().sum(1).mean()
    assert difference.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_sparing_penalty_acts_on_some_steps_only(monkeypatch):
    task, batch = task_of(SMALL_CONVOLUTIONS)
    contender = peer_named("penalty_sparing").prepare(task)
    calls = []
    original = LipschitzRegularizer.accumulate_
    monkeypatch.setattr(LipschitzRegularizer, "accumulate_", lambda *a: calls.append(1) or original(*a))
    for _ in range(2):
        steps.fit(contender.training, contender.callbacks, batch, 1, 2 * peers.EVERY - 1)
    assert len(calls) == 4


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deel.torchlip", None)
    assert peer_named("torchlip").missing() == "deel.torchlip"
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    monkeypatch.setattr(measure, "PEERS", (peer_named("penalty_r8"), peer_named("torchlip")))
    result = measure.measure("small", SMALL_MLP, CPU, 0.0, lambda _: None)
    assert [row.contender for row in result.rows] == ["plain", "penalty_r8"]
    assert result.missing == {peer_named("torchlip").title: "deel.torchlip"}


# Times and memory


class Counter(Callback):
    def __init__(self):
        self.n_steps = 0

    def on_train_batch_end(self, *_):
        self.n_steps += 1


@pytest.mark.parametrize(("n_before", "n_steps"), [(0, 1), (1, 1), (2, 5)])
def test_a_fit_makes_the_steps_asked_for_and_times_them(n_before, n_steps):
    task, batch = task_of(SMALL_MLP)
    contender = peer_named("penalty_r8").prepare(task)
    counter = Counter()
    seconds, own = steps.fit(contender.training, [*contender.callbacks, counter], batch, n_before, n_steps)
    assert counter.n_steps == n_before + n_steps
    assert 0 < own < seconds


def test_fits_of_one_module_are_one_training():
    task, batch = task_of(SMALL_MLP)
    parts, whole = peers.plain(task).training, peers.plain(task).training
    for _ in range(3):
        assert steps.fit(parts, [], batch, 1, 1)[1] is None
    steps.fit(whole, [], batch, 1, 5)
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), whole.parameters(), strict=True))


def test_memory_counts_what_is_held_and_the_peak():
    def work():
        kept = torch.zeros(1000)
        (torch.zeros(500), torch.zeros(250))
        return kept

    assert memory_of(work, CPU) == Memory(peak=4000 + 3000, held=4000)
    assert memory_of(lambda: None, CPU) == Memory(0, 0)


def test_a_slow_contender_keeps_its_one_step():
    task, batch = task_of(SMALL_MLP)
    contenders = {"plain": peers.plain(task), "slow": peers.plain(task)}
    times = measure.in_turn(contenders, {"plain": (1e-3, None), "slow": (50.0, 2.0)}, batch, 0.01)
    assert len(times["plain"].steps) >= 1
    assert (times["slow"].steps, times["slow"].own) == ([50.0], [2.0])
    assert times["slow"].paired == [pytest.approx(statistics.median(times["plain"].steps))]


def test_the_slowest_make_room_for_rounds_of_the_others(monkeypatch):
    task, batch = task_of(SMALL_MLP)
    contenders = {name: peers.plain(task) for name in ("plain", "slow", "slower", "quick")}
    contenders["penalty"] = peer_named("penalty_r8").prepare(task)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 3)
    seconds = {"plain": 1.0, "slow": 6.0, "slower": 10.0, "quick": 2.0, "penalty": 9.0}
    by_id = {id(contender.training): seconds[name] for name, contender in contenders.items()}
    now = [0.0]

    def fit(training, callbacks, batch, n_before, n_steps):
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


# The command


@pytest.fixture
def small_run(monkeypatch):
    """Quick runs of two small models, with as few steps as the tables need."""
    monkeypatch.setattr(run, "QUICK_SECONDS", 0.5)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 2)
    monkeypatch.setattr(measure, "BLOCK_SECONDS", 0.01)
    monkeypatch.setitem(MODELS, "mnist", SMALL_CONVOLUTIONS)


def test_the_command_writes_tables_document_and_plots(small_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "found"
    cli.main(["bench", "--quick", "--out", str(out), "--threads", "1"])
    shown = capsys.readouterr().out
    document = json.loads((out / "bench.json").read_text())
    assert [model["model"] for model in document["models"]] == ["paper", "mnist"]
    assert document["versions"]["torch"] == torch.__version__
    assert (document["machine"]["threads"], document["machine"]["device"]) == (1, "cpu")
    lines = [line for line in (out / "steps.csv").read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    assert set(rows[0]) == {
        *(
            "model",
            "model_title",
            "batch_size",
            "n_layers",
            "n_weights",
            "n_parameters",
            "has_convolutions",
            "floor_ms",
        ),
        *("contender", "title", "operator", "vectors", "n_blocks", "step_ms_p20", "step_ms_p50", "step_ms_p80"),
        *("ratio_p20", "ratio_p50", "ratio_p80", "added_ms_p20", "added_ms_p50", "added_ms_p80", "own_ms", "share"),
        *("held_bytes", "peak_bytes", "allowed_bytes", "error_max", "error_median", "guarantee"),
    }
    found = {(row["model"], row["contender"]): row for row in rows}
    expected = [peer.name for peer in peers.PEERS if not peer.missing()]
    assert [name for model, name in found if model == "mnist"] == ["plain", *expected]
    convolutional = {peer.name for peer in peers.PEERS if peer.for_convolutions}
    assert [name for model, name in found if model == "paper"] == [
        name for name in ["plain", *expected] if name not in convolutional
    ]
    for key, row in found.items():
        assert float(row["step_ms_p20"]) <= float(row["step_ms_p50"]) <= float(row["step_ms_p80"])
        assert float(row["added_ms_p20"]) <= float(row["added_ms_p50"]) <= float(row["added_ms_p80"])
        assert (row["own_ms"] != "") == key[1].startswith("penalty")
        assert (row["allowed_bytes"] != "") == (key[1] in ("penalty_r8", "penalty_r1"))
        assert row["vectors"] == {"_r8": "8", "_r1": "1"}.get(key[1][-3:], row["vectors"])
    assert (found["mnist", "autograd_block_loop"]["vectors"], found["mnist", "autograd_loop"]["vectors"]) == ("8", "1")
    assert found["paper", "penalty_r8"]["share"] == ""
    assert float(found["mnist", "penalty_r8"]["share"]) == pytest.approx(1.2 * 16 / (3 * 4))
    assert found["paper", "exact_svd"]["operator"] == "true"
    assert found["mnist", "exact_svd"]["operator"] == "reshaped"
    assert found["mnist", "autograd_loop"]["operator"] == "true"
    # The kernel as a matrix is not the convolution.
    assert float(found["paper", "exact_svd"]["error_max"]) < 1e-5 < float(found["mnist", "exact_svd"]["error_max"])
    growth = [line for line in (out / "growth.csv").read_text().splitlines() if not line.startswith("#")]
    assert len(list(csv.DictReader(growth))) == 2 * len(run.QUICK_SIZES)
    assert document["figures"] == ["steps.png", "growth_depth.png", "growth_width.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in document["figures"])
    assert "small convolutions; batch 4, 3 layers penalised" in shown
    assert report.SECTIONS["reshaped"].partition(" as ")[0] in shown  # the column may fold the rest
    assert "A quick run" in shown
    assert shown.count("The penalty (r = 8) takes") == shown.count("With r = 8 it adds") == 2
    assert shown.count("The penalty (r = 1) takes") == shown.count("With r = 1 it adds") == 2


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


def a_row(name, added, **changes):
    peer = None if name == "plain" else peer_named(name)
    own = 0.1 if name.startswith("penalty") else None
    facts = {"operator": "none", "vectors": None} if peer is None else {"operator": peer.operator}
    facts = {"vectors": peer.vectors if peer else None, **facts, **changes}
    row = measure.Row(name, name, "", None, 5, (9.0, 10.0, 11.0), (1, 1, 1), added, own, None, 0, 0, None, 0, 0, "")
    return replace(row, **facts)


def findings_of(*rows):
    return report.findings(measure.Result("small", "small", 4, 3, 100, 120, True, 0.01, {}, rows))


def test_findings_state_ratios_at_the_same_r_and_apart_for_reshaped_kernels():
    held = {"share": 0.03, "allowed_bytes": 1000}
    lines = findings_of(
        a_row("plain", (0, 0, 0)),
        a_row("penalty_r8", (1.6, 2.0, 2.5), **held, own_ms=0.2, held_bytes=900, peak_bytes=1000),
        a_row("penalty_r1", (0.8, 1.0, 1.0), **held, own_ms=0.4, held_bytes=900, peak_bytes=2000),
        a_row("penalty_sparing", (0.8, 1.0, 1.0)),
        a_row("autograd_block_loop", (4, 6, 8)),
        a_row("autograd_loop", (-0.8, 0.5, 0.8)),
        a_row("gradient_penalty", (20, 20, 20), n_blocks=1),
        a_row("torch_spectral_norm", (1, 1, 1)),
    )
    assert lines == [
        "The penalty (r = 8) takes 0.2 ms a step, 2.0% of a plain 10 ms: its budget of 3.0% is kept.",
        "  It adds 0.0009 MB, at the peak 0.001 MB: 1% of the parameters and r vectors a layer, 0.001 MB, is kept.",
        "The penalty (r = 1) takes 0.4 ms a step, 4.0% of a plain 10 ms: its budget of 3.0% is exceeded.",
        "  It adds 0.0009 MB, at the peak 0.002 MB: 1% of the parameters and r vectors a layer, 0.001 MB, is exceeded.",
        "One read of the penalised weights with a read and a write of their gradients takes 0.01 ms.",
        "With r = 8 it adds 2 ms (1.6 to 2.5) to a whole step. In that time, peers add:",
        "  without norms: gradient_penalty 10 x (once).",
        "  the true operators: autograd_block_loop (r = 8) 3 x (1.6 to 5), autograd_loop (r = 1) 0.25 x (-0.5 to 0.5).",
        "  kernels as matrices (c_out, -1): torch_spectral_norm (r = 1) 0.5 x (0.4 to 0.625).",
        "With r = 1 it adds 1 ms (0.8 to 1) to a whole step. In that time, peers add:",
        "  the true operators: autograd_loop (r = 1) 0.5 x (-1 to 1).",
        "  kernels as matrices (c_out, -1): torch_spectral_norm (r = 1) 1 x (1 to 1.25).",
    ]


def test_findings_state_no_ratio_where_the_steps_vary_by_more():
    lines = findings_of(a_row("plain", (0, 0, 0)), a_row("penalty_r8", (-1, 2, 4)), a_row("exact_svd", (6, 6, 6)))
    assert lines[-1].startswith("With r = 8 it adds 2 ms (-1 to 4) to a whole step: no more than the steps vary")
    assert not any("exact_svd" in line for line in lines)


def test_threads_are_put_back(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.bench(str(tmp_path), quick=True, threads=2)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "resnet50"], "--models to name some of paper, mnist, resnet18, vit, gpt2"),
        (["--models", ","], "--models to name some of"),
        (["--threads", "0"], "--threads of at least 1, got 0"),
        (["--out", __file__], "--out to be a folder"),
        (["--device", "tpu-ish"], "--device cpu, cuda"),
        (["--device", "meta"], "--device cpu, cuda"),
        (["--device", "cuda:99"], "--device cuda:99 to be there"),
    ],
)
def test_options_that_make_no_sense_are_one_message_and_status_2(capsys, monkeypatch, options, message):
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", *options])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_models_are_chosen_by_name_in_the_usual_order():
    assert command.chosen_models("vit, paper", quick=False) == ("paper", "vit")
    assert command.chosen_models(None, quick=True) == command.QUICK_MODELS
    assert command.chosen_models(None, quick=False) == tuple(MODELS)
    with pytest.raises(UsageError, match="got 'paper,resnet50'"):
        command.chosen_models("paper,resnet50", quick=False)
    assert set(run.SECONDS) == set(MODELS)


@pytest.mark.parametrize("module", ["matplotlib", "scipy"])
def test_a_missing_extra_names_the_remedy(capsys, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", "--quick", "--out", str(tmp_path / "none")])
    assert exit_info.value.code == 2
    assert f"needs {module}" in (error := capsys.readouterr().err)
    assert 'pip install "lightning-lip[bench]"' in error
    assert not (tmp_path / "none").exists()


def test_the_package_is_the_command():
    assert package.bench is command.bench
    assert figures.COLOURS[1] != figures.COLOURS[8]
