import sys

import pytest
import torch
from support.contenders import CPU, SMALL_CONVOLUTIONS, SMALL_MLP, dense_norm, peer_named
from support.symbol_norms import symbol_norm
from torch import nn

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.contenders import peers
from lightning_lip.bench.contenders.layers import exact_symbol_norm
from lightning_lip.bench.contenders.models import BenchModel, mlp
from lightning_lip.bench.contenders.training import fit
from lightning_lip.bench.steps import measure


def with_leading_directions():
    """One singular value of each layer stands far above the others: one vector finds it in a few iterations."""
    network = mlp(6, 8, 7, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.5 * (parameter.dim() == 2)
    return network


EXACT = ("exact_svd", "penalty_r8", "autograd_block_loop")
"""Peers whose norms follow the weights of these small layers to fp32 rounding: their blocks span most of each.

A wave of a symbol has one vector, and follows less closely.
"""


@pytest.mark.parametrize("model", [SMALL_MLP, SMALL_CONVOLUTIONS], ids=["mlp", "convolutions"])
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_a_peer_trains_and_its_norms_are_right(peer, model):
    if peer.missing():
        pytest.skip(f"{peer.missing()} is not installed")
    task, batch = peers.task_of(model, CPU)
    contender = peer.prepare(task)
    before = [p.detach().clone() for p in contender.training.parameters()]
    fit(contender.training, contender.callbacks, batch, 1, 30)
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
        elif peer.operator == "symbol" and isinstance(layer, nn.Conv2d):
            truth = float(symbol_norm(layer.weight.detach(), layer.stride, layer.dilation, layer.groups))
            assert exact_symbol_norm(layer) == pytest.approx(truth, rel=1e-6)
        else:
            truth = dense_norm(layer, shape)
        if peer.name == "torchlip" and isinstance(layer, nn.Conv2d):
            assert truth <= norm  # it divides by a bound of what the convolution adds to the matrix
        else:
            # One vector follows moving weights less closely than an SVD or a block: the estimate lies below.
            follows = 1e-3 if peer.operator == "symbol" and isinstance(layer, nn.Conv2d) else 1e-5
            assert norm == pytest.approx(truth, rel=follows if peer.name in EXACT else 0.05)


@pytest.mark.parametrize("name", ["autograd_block_loop", "autograd_loop", "exact_svd", "penalty_r1"])
def test_peers_add_the_same_gradient(name):
    task, batch = peers.task_of(BenchModel("", with_leading_directions, (6,), 4), CPU)

    def gradients(prepare):
        contender = prepare(task)
        fit(contender.training, contender.callbacks, batch, 0, 1)
        return torch.cat([p.grad.flatten() for p in contender.training.parameters()])

    of_loss = gradients(peers.plain)
    expected = gradients(peer_named("penalty_r8").prepare) - of_loss
    added = gradients(peer_named(name).prepare) - of_loss
    assert expected.norm() > 1e-4
    assert (added - expected).norm() < 1e-3 * expected.norm()


def test_the_gradient_penalty_is_the_mean_squared_slope(monkeypatch):
    monkeypatch.setattr(peers, "COEFFICIENT", 1.0)  # the difference of losses keeps its digits
    task, (inputs, targets) = peers.task_of(SMALL_MLP, CPU)
    with_term, without = peers.gradient_penalty(task).training, peers.plain(task).training
    difference = with_term.training_step((inputs, targets)) - without.training_step((inputs, targets))
    network = task.network()
    slopes = [torch.autograd.functional.jacobian(lambda x: network(x).sum(), x) for x in inputs]
    expected = torch.stack(slopes).square().sum(1).mean()
    assert difference.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_sparing_penalty_acts_on_some_steps_only(monkeypatch):
    task, batch = peers.task_of(SMALL_CONVOLUTIONS, CPU)
    contender = peer_named("penalty_sparing").prepare(task)
    calls = []
    original = LipschitzRegularizer.accumulate_
    monkeypatch.setattr(LipschitzRegularizer, "accumulate_", lambda *a: calls.append(1) or original(*a))
    for _ in range(2):
        fit(contender.training, contender.callbacks, batch, 1, 2 * peers.EVERY - 1)
    assert len(calls) == 4


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deel.torchlip", None)
    assert peer_named("torchlip").missing() == "deel.torchlip"
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    monkeypatch.setattr(measure, "PEERS", (peer_named("penalty_r8"), peer_named("torchlip")))
    result = measure.measure("small", SMALL_MLP, CPU, 0.0, lambda _: None)
    assert [row.contender for row in result.rows] == ["plain", "penalty_r8"]
    assert result.missing == {peer_named("torchlip").title: "deel.torchlip"}
