"""SpectralCaps: norms by SVD within the radius after every step, with any optimiser, whole and sharded.

The file is also the script that its tests run on every rank: ``test_spectral_caps.py <case>``.
"""

import math
import os
import sys
from importlib import import_module
from itertools import pairwise

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import trainers
from support.trainers import TwoNets, linux_only, on_ranks, run_script, svd_norms, weights_of
from support.truth import operator_norms
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lip import SpectralCaps, UnsupportedLayerError
from lightning_lip.projection.spectral_caps import NormCaps

SIZES = [12, 48, 96, 48, 3]
TOLERANCE = 1e-3
"""How far a norm may lie above the radius, relative: what the callback's documentation says was measured."""

OPTIMIZERS = ["Adam", *(["Muon"] if hasattr(torch.optim, "Muon") else [])]


def optimizers(name, module):
    """Return Adam, or Muon for matrices beside Adam for biases; steps move the weights by a few hundredths."""
    if name == "Adam":
        return [torch.optim.Adam(module.parameters(), 1e-2)]
    matrices = [p for p in module.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices, 0.03), torch.optim.Adam([p for p in module.parameters() if p.dim() < 2], 1e-2)]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def make_net(pl, optimizer, radius, is_sharded=False):
    """Return a module in manual optimisation that notes the norms by SVD, in units of the radius, every 10th step."""

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.net = nn.Sequential(*(m for n, k in pairwise(SIZES) for m in (nn.Linear(n, k), nn.ReLU())))[:-1]
            self.norms, self.n_steps, self.first, self.is_sharded = [], 0, None, is_sharded

        def configure_model(self):
            if self.is_sharded:
                from torch.distributed.fsdp import fully_shard

                self.is_sharded = False
                for layer in self.net[::2]:
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def relative_norms(self):
            matrices = [whole(p.detach()).double() for p in self.parameters() if p.dim() == 2]
            radii = [math.sqrt(len(w) / w.shape[1]) if radius == "mup" else radius for w in matrices]
            return [float(torch.linalg.matrix_norm(w, 2)) / r for w, r in zip(matrices, radii, strict=True)]

        def training_step(self, batch, batch_idx):
            both = self.optimizers()
            both = both if isinstance(both, list) else [both]
            for one in both:
                one.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
            for one in both:
                one.step()
            self.n_steps += 1
            if self.n_steps % 10 == 0:  # at once, not at the end of the batch
                self.norms.append(self.relative_norms())

        def configure_optimizers(self):
            return optimizers(optimizer, self)

    return Net()


def loader():
    x, y = torch.randn(256, 15, generator=torch.Generator().manual_seed(1)).split([12, 3], 1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 3 * y), batch_size=16)


def check_200_steps(pl, optimizer, radius, n_ranks=0):
    """Train for 200 steps; the norms at every 10th are at the radius or below, and often at it."""
    strategy = import_module(f"{pl.__name__}.strategies").ModelParallelStrategy(n_ranks, 1) if n_ranks else "auto"
    n_steps = 200 * (2 if optimizer == "Muon" else 1)  # Lightning counts those of each optimiser
    settings = {"strategy": strategy, "devices": n_ranks or 1, "max_epochs": -1, "max_steps": n_steps}
    net = make_net(pl, optimizer, radius, is_sharded=bool(n_ranks))
    callback = SpectralCaps(radius)
    trainers.make_trainer(pl, [callback], use_distributed_sampler=False, **settings).fit(net, loader())
    assert len(net.norms) == 20
    worst, least = (max_or_min(max(norms) for norms in net.norms) for max_or_min in (max, min))
    assert worst <= 1 + TOLERANCE, (optimizer, radius, worst)
    assert least > 0.99, "no layer is at the radius, so nothing is tested"
    return net, callback


def check_placements():
    """Tensor parallelism deals out rows or columns, or nothing; both sides are sharded together with FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(*(nn.Linear(n, k, bias=False) for n, k in pairwise(SIZES)))
    for layer, placement in zip(model, (Shard(0), Shard(1), Replicate(), Shard(0)), strict=True):
        whole_weight = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
        layer.weight = nn.Parameter(distribute_tensor(whole_weight, mesh, [placement]))
    assert NormCaps(model, 0.7).step().all()
    for layer in model:
        assert float(torch.linalg.matrix_norm(whole(layer.weight.detach()), 2)) == pytest.approx(0.7, rel=1e-2)


def case_sharded(pl):
    for optimizer in OPTIMIZERS:
        net, callback = check_200_steps(pl, optimizer, 0.7, 2)
        vectors = callback.state_dict()["caps"]["vectors"].values()
        gathered = [None] * 2
        torch.distributed.all_gather_object(gathered, [*vectors, *(whole(p.detach()) for p in net.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*gathered, strict=True))
    check_placements()


@pytest.mark.parametrize("radius", [0.7, "mup"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_norms_stay_within_the_radius_for_200_steps(optimizer, radius):
    _, callback = check_200_steps(lightning, optimizer, radius)
    assert callback.state_dict()["n_steps"] == 200  # not those of the optimiser that holds the biases


@linux_only
@pytest.mark.skipif(torch.__version__ < (2, 7), reason="FSDP2 of torch 2.6 does not run on the CPU")
def test_norms_stay_within_the_radius_on_two_ranks_with_shards():
    on_ranks(__file__, "sharded", 2, "lightning.pytorch")


class Past(lightning.LightningModule):
    """Steps an optimiser past Lightning, inside an object of another class."""

    class Wrapper:
        def __init__(self, optimizer):
            self.inner = optimizer

        def step(self):
            self.inner.step()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)
        self.own = self.Wrapper(torch.optim.SGD(self.net.parameters(), 1.0))

    def training_step(self, batch, batch_idx):
        self.net.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
        self.own.step()

    def configure_optimizers(self):
        return None


def test_an_optimizer_past_lightning_counts_and_one_of_other_weights_does_not(fit):
    module, _ = fit(caps := SpectralCaps(0.3), module=Past())
    assert svd_norms(module)[0] == pytest.approx(0.3, rel=TOLERANCE)
    assert caps.state_dict()["n_steps"] == 12
    fit(caps := SpectralCaps(0.3, layers="a"), module=TwoNets())
    assert caps.state_dict()["n_steps"] == 12  # of the second optimiser none


def grown_norms(module):
    """Return the norms after a step that makes every weight large, with an optimiser of the test's own."""
    for p in module.parameters():
        p.grad = -torch.ones_like(p)
    torch.optim.SGD(module.parameters(), 1.0).step()
    return svd_norms(module)


def test_after_training_steps_are_no_longer_capped(fit):
    module, _ = fit(SpectralCaps(0.3))
    assert min(grown_norms(module)) > 0.5
    with pytest.raises(ValueError, match="stop here"):
        fit(SpectralCaps(0.3), Stop(), module=module)
    assert min(svd_norms(module)) <= 0.3 * (1 + TOLERANCE)
    assert min(grown_norms(module)) > 0.5


class Stop(lightning.Callback):
    def on_train_batch_end(self, *_):
        raise ValueError("stop here")


def test_layers_within_the_radius_and_frozen_ones_stay_bit_for_bit(fit, make_module):
    plain, _ = fit()
    assert torch.equal(weights_of(plain), weights_of(fit(SpectralCaps(50.0))[0]))
    module = make_module(lightning)
    module.net[2].weight.requires_grad_(False)
    frozen = module.net[2].weight.clone()
    fit(SpectralCaps(0.1, exclude="net.0"), module=module)
    assert torch.equal(module.net[2].weight, frozen)
    norms = svd_norms(module)
    assert norms[0] > 0.2
    assert norms[2] == pytest.approx(0.1, rel=TOLERANCE)


def test_every_nth_step(fit):
    norms = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            norms.append(max(svd_norms(pl_module)))

    fit(SpectralCaps(0.3, every_n_steps=3), Watch())
    capped = [norm <= 0.3 * (1 + TOLERANCE) for norm in norms]
    assert capped == [False, False, True] * 4


def convolutions():
    """Return a network with kinds of convolutions, a normalisation and an embedding-like layer of no known norm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        parametrizations.weight_norm(nn.Conv2d(6, 4, 2, stride=2)),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(4, 8)),
        parametrizations.orthogonal(nn.Linear(8, 8)),
        nn.Linear(8, 1),
    )


@pytest.mark.parametrize(("radius", "kind"), [("mup", "symbol"), (0.5, "symbol"), ("mup", "spatial")])
def test_convolutions_and_magnitudes_of_parametrised_weights(fit, make_module, told, radius, kind):
    module = make_module(lightning, net=convolutions(), optimizer=lambda p: torch.optim.SGD(p, 0.2))
    caps = SpectralCaps(radius, block_size=64, convolutions=kind)
    fit(caps, module=module)
    held = {op.name: op for op in caps.caps.operators}
    assert list(held) == ["net.1", "net.3", "net.5", "net.7"]
    # Output and input channels, whatever the size of the kernel: 6 and 1, 4 and 6.
    radii = [math.sqrt(r) for r in (6, 4 / 6, 2, 1 / 8)] if radius == "mup" else [radius] * 4
    norms = operator_norms(held.values()).tolist()
    assert all(value <= r * (1 + TOLERANCE) for value, r in zip(norms, radii, strict=True)), (norms, radii)
    assert any(value >= r * (1 - TOLERANCE) for value, r in zip(norms, radii, strict=True)), (norms, radii)
    (text,) = (text for text in told if text.startswith("SpectralCaps: 4 layers with "))
    assert "1 BatchNorm2d: " in text
    assert "1 ParametrizedLinear: its parametrised weight scales with none of the parameters" in text


@pytest.mark.parametrize("arguments", [{"unknown": "refuse"}, {"layers": ["net.2", "net.6"]}], ids=str)
def test_what_cannot_be_held_is_refused_by_name_on_demand(fit, make_module, arguments):
    refused = r"(?s)SpectralCaps cannot hold the norms .*net\.2 \(BatchNorm2d\).*net\.6 .*scales with none"
    with pytest.raises(UnsupportedLayerError, match=refused):
        fit(SpectralCaps(1.0, **arguments), module=make_module(lightning, net=convolutions()))


def saving():
    return ModelCheckpoint("saved", filename="a")


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(fit):
    caps, first, again = (SpectralCaps(0.5, block_size=2, every_n_steps=2) for _ in range(3))
    straight, _ = fit(caps, max_epochs=4)
    fit(first, saving(), max_epochs=2, enable_checkpointing=True)
    resumed, _ = fit(again, max_epochs=4, ckpt_path="saved/a.ckpt")
    assert torch.equal(weights_of(straight), weights_of(resumed))
    states = caps.state_dict(), again.state_dict()
    assert [state["n_steps"] for state in states] == [48, 48]
    for a, b in zip(*(state["caps"]["vectors"].values() for state in states), strict=True):
        assert torch.equal(a, b)


def test_without_its_vectors_a_resumed_training_differs(fit):
    """Or the test above would show nothing."""
    fit(
        SpectralCaps(0.5, block_size=2), ModelCheckpoint("saved", filename="a"), max_epochs=2, enable_checkpointing=True
    )
    resumed, _ = fit(SpectralCaps(0.5, block_size=2), max_epochs=4, ckpt_path="saved/a.ckpt")
    checkpoint = torch.load("saved/a.ckpt", weights_only=True)
    checkpoint["callbacks"]["SpectralCaps"]["caps"] = None
    torch.save(checkpoint, "saved/b.ckpt")
    afresh, _ = fit(SpectralCaps(0.5, block_size=2), max_epochs=4, ckpt_path="saved/b.ckpt")
    assert not torch.equal(weights_of(resumed), weights_of(afresh))


def test_logs_how_many_layers_were_capped(fit, pl):
    _, trainer = fit(SpectralCaps(0.3, name="a"), SpectralCaps(100.0, name="b"), package=pl)
    assert float(trainer.callback_metrics["lipschitz/a/capped"]) >= 1
    assert float(trainer.callback_metrics["lipschitz/b/capped"]) == 0


DDP = """
import torch, lightning as L
from torch import nn
from lightning_lip import SpectralCaps

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 20), nn.Linear(20, 1))

    def training_step(self, batch):
        return (self.net(batch) - 3 * batch.mean()).square().mean()

    def on_train_end(self):
        mine = torch.cat([p.detach().flatten() for p in self.parameters()])
        others = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(others, mine)
        assert torch.equal(*others), "the ranks have drifted apart"
        norms = [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in self.net[3:]]
        assert 0.59 < max(norms) <= 0.6006, norms
        if self.global_rank == 0:
            print("SAME")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

if __name__ == "__main__":
    torch.set_num_threads(1)
    images = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=6, logger=False, callbacks=[SpectralCaps(0.6)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Net(), torch.utils.data.DataLoader(images, batch_size=4))
"""


@linux_only
def test_ranks_of_ddp_stay_the_same():
    result = run_script(DDP)
    assert result.returncode == 0, result.stderr
    assert "SAME" in result.stdout


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[f"case_{sys.argv[1]}"](import_module(sys.argv[3]))
    torch.distributed.barrier()
    os._exit(0)  # gloo can abort while the interpreter ends
