"""Sharded weights: the same numbers as whole ones, one all_reduce a step, and refusals by name.

The file is also the script that its tests run on every rank: ``test_sharded.py <case>``.
"""

import math
import os
import sys
import warnings
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from support import trainers
from support.trainers import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lip import LipschitzMonitor, LipschitzPenalty, LipschitzRegularizer, MaxNorm, project, rebalance
from lightning_lip.certificates.interval import certify
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.norms.frobenius import FrobeniusNorms
from lightning_lip.operators.base import MatrixOperator
from lightning_lip.penalty.scale import gradient_norms

SIZES = [(3, 7), (1, 5), (7, 3), (5, 1), (6, 6), (6, 6), (260, 256)]
"""(m, n): over two ranks and more, shards are uneven and empty; two share a stack; the last is iterated by itself."""


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def matrices(magnitude=1.0, dtype=torch.float64):
    """Return weights of SIZES with singular values 1, 0.8, 0.64, ... times a magnitude, in Linear layers."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    for m, n in SIZES:
        layer = nn.Linear(n, m, bias=False, dtype=torch.float64)
        u, v = (torch.linalg.qr(torch.randn(k, min(m, n), generator=generator, dtype=torch.float64))[0] for k in (m, n))
        layer.weight.data = (magnitude * u * 0.8 ** torch.arange(min(m, n), dtype=torch.float64)) @ v.mT
        model.append(layer.to(dtype))
    return model


def sharded_copy(model, mesh, placements):
    copy = nn.Sequential(*(nn.Linear(n, m, bias=False, device="meta") for m, n in SIZES))
    for ours, theirs in zip(copy, model, strict=True):
        ours.weight = nn.Parameter(distribute_tensor(theirs.weight.detach().clone(), mesh, placements))
    return copy


class Count:
    """Counts the plugin's own calls of all_reduce."""

    def __enter__(self):
        self.calls, self._original = 0, torch.distributed.all_reduce

        def counted(*args, **kwargs):
            self.calls += sys._getframe(1).f_globals["__name__"].startswith("lightning_lip")
            return self._original(*args, **kwargs)

        torch.distributed.all_reduce = counted
        return self

    def __exit__(self, *_):
        torch.distributed.all_reduce = self._original


def assert_same_on_all_ranks(tensors):
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, list(tensors))
    for other in gathered:
        assert all(torch.equal(a, b) for a, b in zip(other, gathered[0], strict=True)), "the ranks differ"


# (dtype, magnitude of the weights, tolerance of a gradient): fp64 and fp32 hold some 20 roundings of vectors; a bf16
# gradient is rounded once, at 2^-9.
CASES = [
    (torch.float64, 1.0, 1e-13),
    (torch.float32, 1e30, 3e-6),
    (torch.float32, 1e-30, 3e-6),
    (torch.bfloat16, 1.0, 2e-3),
]


def check_shards(mesh, placements, n_calls, cases=CASES):
    """Check sigma, its upper bounds and the gradients against the SVD of the whole weights."""
    for dtype, magnitude, tolerance in cases:
        plain = matrices(magnitude, dtype)
        model = sharded_copy(plain, mesh, placements)
        # The 15 iterations at the start and one more leave 1e-24 of the ninth vector, 0.8^(2 * 8 * 16).
        regularizer = LipschitzRegularizer(model, 1.0, penalty="layer_sum")
        regularizer.add_grad_()
        # Of whole gradients, on each rank: the layers' penalties have gradients of norm 1.
        loss, penalty = gradient_norms(list(model.parameters()), regularizer.add_grad_)
        assert loss == pytest.approx(math.sqrt(len(SIZES)), rel=1e-2), (placements, loss)
        assert penalty == pytest.approx(math.sqrt(len(SIZES)), rel=1e-2), (placements, penalty)
        model.zero_grad()
        with Count() as count:
            value = regularizer.add_grad_()
        assert count.calls == n_calls, (placements, count.calls)
        sigma, upper = regularizer.sigma(), regularizer.sigma_upper()
        for index, layer in enumerate(plain):
            u, s, vh = torch.linalg.svd(layer.weight.detach().double())
            torch.testing.assert_close(sigma[index].double(), s[0], rtol=1e-5, atol=0)
            assert upper[index] >= s[0] * (1 - 1e-6)
            # The last of a block have not settled; all lie below the singular values.
            ritz = regularizer.ritz_values()[index].double()
            torch.testing.assert_close(ritz[:1], s[:1], rtol=1e-5, atol=0)
            assert (ritz <= s[: len(ritz)] * (1 + 1e-5) + 1e-6 * s[0]).all()
            grad = whole(model[index].weight.grad).double()
            torch.testing.assert_close(grad, torch.outer(u[:, 0], vh[0]), rtol=0, atol=tolerance)
        # Of the block's rank or less, the upper bounds are the norms.
        torch.testing.assert_close(upper[:6], sigma[:6], rtol=1e-5, atol=0)
        assert_same_on_all_ranks([value, sigma, upper, *regularizer.state_dict()["vectors"].values()])


def case_shards(pl):
    mesh = init_device_mesh("cpu", (2,))
    for placements, n_calls in (([Shard(0)], 1), ([Shard(1)], 1), ([Replicate()], 0)):
        check_shards(mesh, placements, n_calls)
        check_frobenius(mesh, placements)
    check_bad_layers(mesh)
    check_saved_sides(mesh)


def check_frobenius(mesh, placements):
    """Norms and changes are sums over ranks, in one all_reduce for all layers."""
    plain = matrices()
    model = sharded_copy(plain, mesh, placements)
    norms = FrobeniusNorms([MatrixOperator(str(i), layer) for i, layer in enumerate(model)])
    norms.keep()
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(0.75)
    with Count() as count:
        found, ratios = norms.measure()
    assert count.calls == sum(not p.is_replicate() for p in placements)
    wanted = torch.stack([0.75 * layer.weight.detach().norm() for layer in plain])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.25), rtol=1e-12, atol=0)


def check_bad_layers(mesh):
    """A zero layer gets no gradient; a NaN in one layer does not reach another's vectors."""
    model = sharded_copy(matrices(), mesh, [Shard(0)])
    regularizer = LipschitzRegularizer(model, 1.0, penalty="layer_sum")
    regularizer.add_grad_()
    before = regularizer.sigma()
    model.zero_grad()
    with torch.no_grad():
        model[4].weight.mul_(float("nan"))
        model[6].weight.zero_()
    regularizer.add_grad_()
    after = regularizer.sigma()
    assert after[4].isnan()
    assert after[6] == 0
    torch.testing.assert_close(after[[0, 1, 2, 3, 5]], before[[0, 1, 2, 3, 5]], rtol=1e-6, atol=0)
    grads = [whole(layer.weight.grad) for layer in model]
    assert not grads[4].any()
    assert not grads[6].any()
    torch.testing.assert_close(torch.linalg.matrix_norm(grads[5], 2), torch.tensor(1.0, dtype=torch.float64))
    assert all(block.isfinite().all() for block in regularizer.state_dict()["vectors"].values())


def check_saved_sides(mesh):
    """Vectors of another side start afresh with a warning, also where the shapes agree (6 x 6)."""
    plain = matrices()
    rows, columns = (sharded_copy(plain, mesh, [Shard(side)]) for side in (0, 1))
    regularizers, states = {}, {}
    for name, model in {"whole": plain, "rows": rows, "columns": columns}.items():
        regularizers[name] = LipschitzRegularizer(model, 1.0, penalty="layer_sum")
        regularizers[name].add_grad_()
        states[name] = regularizers[name].state_dict()
    # Rows sharded: wide matrices differ from whole ones. Columns sharded: tall and square ones.
    for saved, loaded, n_afresh in (
        ("rows", "rows", 0),
        ("columns", "columns", 0),
        ("whole", "rows", 2),
        ("rows", "whole", 2),
        ("columns", "whole", 5),
        ("rows", "columns", 7),
    ):
        regularizers[loaded].load_state_dict(states[saved])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            regularizers[loaded].add_grad_()
        afresh = [str(w.message) for w in caught if "are of its other side" in str(w.message)]
        assert len(afresh) == len(caught) == n_afresh, (saved, loaded, [str(w.message) for w in caught])


def case_meshes(pl):
    mesh = init_device_mesh("cpu", (2, 2))
    for placements, n_calls in (
        ([Replicate(), Shard(0)], 1),  # HSDP
        ([Shard(1), Replicate()], 1),
        ([Shard(0), Shard(0)], 2),
        ([Shard(0), Shard(1)], 3),  # FSDP2 over row-wise tensor parallelism
        ([Shard(1), Shard(0)], 3),
    ):
        check_shards(mesh, placements, n_calls, CASES[:2])
    check_training(pl, "fsdp and tensor", data=2, tensor=2, first=3 * 17, later=3 * 2, logged=3)


def make_net(pl, parallel, penalty=None):
    """Return a LightningModule of four linear layers, dealt out as `parallel` says in configure_model."""
    # Tensor parallelism itself needs sizes that the ranks divide.
    sizes = [7, 4, 3, 8, 5] if "tensor" in parallel else [7, 3, 1, 6, 5]

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layers = [nn.Linear(n, m, dtype=torch.float64) for n, m in pairwise(sizes)]
            self.net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh(), layers[3])
            self.is_parallel = parallel == "one process"

        def configure_model(self):
            if self.is_parallel:
                return
            self.is_parallel = True

            if "tensor" in parallel:
                plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}
                parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
            of_data = self.device_mesh["data_parallel"]
            if "fsdp" in parallel:
                for layer in linears(self.net)[:: 2 if parallel == "fsdp of some" else 1]:
                    fully_shard(layer, mesh=of_data)
            if parallel == "fsdp":
                fully_shard(self.net, mesh=of_data)

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = (self.net(x) - y).square().mean()
            return loss if penalty is None else loss + penalty([layer.weight for layer in linears(self)])

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Net()


def loader():
    x, y = torch.randn(36, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).split([7, 5], 1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=12)


def make_trainer(pl, callbacks, data=0, tensor=1, **settings):
    strategy = "auto"
    if data:
        strategy = import_module(f"{pl.__name__}.strategies").ModelParallelStrategy(data, tensor)
    defaults = {"strategy": strategy, "devices": data * tensor or 1, "max_epochs": 4, "log_every_n_steps": 1}
    return trainers.make_trainer(pl, callbacks, **(defaults | {"use_distributed_sampler": False} | settings))


def product(weights):
    return 0.3 * torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights]).prod()


def check_training(pl, parallel, first=17, later=2, logged=1, data=1, tensor=1, monitor=False, **settings):
    """Train under ModelParallelStrategy, and compare with the penalty in the loss in one process.

    Args:
        pl: The Lightning package.
        parallel: How the layers are dealt out.
        first: all_reduces of the plugin in the first step: 15 to start the vectors, and 2.
        later: In each later step.
        logged: For the norms that were logged after the step before: without a logger at the end of an epoch only.
        data: Size of the mesh dimension.
        tensor: Size of the mesh dimension.
        monitor: Whether to add a LipschitzMonitor and TensorBoard's files, which rank 0 alone writes.
        settings: The Trainer's.
    """
    counted = []

    class Watch(pl.Callback):
        def on_train_start(self, *_):
            self.count = Count()
            self.count.__enter__()

        def on_train_batch_end(self, *_):
            counted.append(self.count.calls)
            self.count.calls = 0

        def on_train_end(self, *_):
            self.count.__exit__()

    # One iteration lags behind the SVD where the vectors are of the longer side; two do not.
    penalty = LipschitzPenalty(0.3, n_iterations=2)
    callbacks = [Watch(), penalty, *([LipschitzMonitor()] if monitor else [])]
    net = make_net(pl, parallel)
    trainer = make_trainer(pl, callbacks, data, tensor, **settings)
    trainer.fit(net, loader(), loader() if monitor else None)
    # At the end of an epoch the monitor takes the spectra: two sums, counted with the step after.
    ends = [step % len(loader()) == 0 for step in range(1, len(counted))]
    reads = [logged * (is_end or bool(settings.get("logger"))) + 2 * (monitor and is_end) for is_end in ends]
    assert counted == [first, *(later + more for more in reads)], (parallel, counted)
    trained = [whole(p).detach() for p in net.parameters()]
    assert_same_on_all_ranks([*trained, trainer.callback_metrics["lipschitz/product"]])
    state = penalty.state_dict()["regularizer"]["vectors"]
    assert_same_on_all_ranks(state.values())
    assert all(type(block) is torch.Tensor for block in state.values())

    distances = []
    for term in (product, None):
        reference = make_net(pl, "tensor" if "tensor" in parallel else "", term)
        optimizer = reference.configure_optimizers()
        for _ in range(trainer.max_epochs):
            for batch in loader():
                optimizer.zero_grad()
                reference.training_step(batch, 0).backward()
                if trainer.gradient_clip_val:
                    nn.utils.clip_grad_norm_(reference.parameters(), trainer.gradient_clip_val)
                optimizer.step()
        pairs = zip(trained, reference.parameters(), strict=True)
        distances.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    # fp64, 12 steps of Adam, which divides by small gradients.
    assert distances[0] < 1e-11, (parallel, distances)
    assert distances[1] > 1e-2, "the penalty has no effect, so nothing is tested"


def case_training(pl):
    check_training(pl, "fsdp", data=2, monitor=True, logged=4, logger=tensorboard(pl))
    check_training(pl, "fsdp of each", data=2, gradient_clip_val=0.3)
    check_training(pl, "fsdp of some", data=2)
    check_training(pl, "tensor", tensor=2, gradient_clip_val=0.3)


def tensorboard(pl):
    return import_module(f"{pl.__name__}.loggers").TensorBoardLogger("logs")


def train(pl, parallel, data=0, max_epochs=4, ckpt_path=None, save_distributed_checkpoint=True, save=None):
    """Return the weights after training, and the penalty."""
    penalty = LipschitzPenalty(0.3, n_iterations=2)
    net = make_net(pl, parallel)
    trainer = make_trainer(pl, [penalty], data, max_epochs=max_epochs)
    if data:
        trainer.strategy._save_distributed_checkpoint = save_distributed_checkpoint
    trainer.fit(net, loader(), ckpt_path=ckpt_path, weights_only=False)
    if save:
        trainer.save_checkpoint(save)
    return [whole(p).detach() for p in net.parameters()], penalty


def case_resume(pl):
    straight, penalty = train(pl, "fsdp of each", data=2)
    for name, is_distributed in (("shards.ckpt", True), ("whole.ckpt", False)):
        train(pl, "fsdp of each", 2, 2, save=name, save_distributed_checkpoint=is_distributed)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The saved singular vectors")
            resumed, again = train(pl, "fsdp of each", data=2, ckpt_path=name)
        blocks, others = (p.state_dict()["regularizer"]["vectors"] for p in (penalty, again))
        for a, b in zip([*straight, *blocks.values()], [*resumed, *others.values()], strict=True):
            assert torch.equal(a, b), name
    if torch.distributed.get_rank() == 0:
        torch.save(straight, "straight.pt")


def case_long(pl):
    """Over 200 steps of FSDP2 the weights and vectors of the ranks stay the same bit for bit."""
    penalty = LipschitzPenalty(0.3)
    net = make_net(pl, "fsdp")
    make_trainer(pl, [penalty], 2, max_epochs=-1, max_steps=200).fit(net, loader())
    assert penalty.state_dict()["n_steps"] == 200
    assert_same_on_all_ranks([whole(p).detach() for p in net.parameters()])
    assert_same_on_all_ranks(penalty.state_dict()["regularizer"]["vectors"].values())


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="gloo between local processes")
needs_fsdp2 = pytest.mark.skipif(torch.__version__ < (2, 7), reason="FSDP2 of torch 2.6 does not run on the CPU")


@linux_only
@needs_fsdp2
@pytest.mark.parametrize(("case", "n_ranks"), [("shards", 2), ("meshes", 4), ("training", 2), ("long", 2)])
def test_on_ranks(case, n_ranks):
    on_ranks(__file__, case, n_ranks, "lightning.pytorch")


@linux_only
@pytest.mark.filterwarnings("ignore:The saved singular vectors")
def test_resume():
    # The other Lightning: its classes differ, the callbacks must serve either.
    pl = pytest.importorskip("pytorch_lightning", minversion="2.6")
    on_ranks(__file__, "resume", 2, "pytorch_lightning")
    # In one process the wide layers' vectors are of the other side.
    with pytest.warns(UserWarning, match=r"singular vectors of layer 'net.0' are of its other side"):
        resumed, _ = train(pl, "one process", ckpt_path="whole.ckpt")
    for ours, theirs in zip(resumed, torch.load("straight.pt"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.fixture
def mesh():
    """Return the mesh of this process alone: what is refused is so whatever the number of ranks."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def fsdp(mesh, *layers):
    model = nn.Sequential(*layers)
    fully_shard(model, mesh=mesh)
    return model


def placed(mesh, placements):
    layer = nn.Linear(3, 3, bias=False)
    layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, placements))
    return layer


@needs_fsdp2
def test_layers_that_cannot_be_iterated_are_refused(mesh):
    cube = init_device_mesh("cpu", (1, 1, 1))
    convolution = fsdp(mesh, nn.Conv2d(1, 2, 3))
    for layer, reason in (
        (placed(mesh, [Partial()]), r"0 \(Linear\): .* a sum that is still due: redistribute it first"),
        (placed(cube, [Shard(1), Shard(1), Shard(0)]), r"along one mesh dimension only. Shard it along one side"),
        (fsdp(mesh, nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), r"parametrised weight .* ignored_params="),
        (convolution, r"Conv2d\): .* DTensor .*, which is supported for linear layers only: .* ignored_params="),
    ):
        with pytest.raises(UnsupportedLayerError, match=reason):
            LipschitzRegularizer(nn.Sequential(layer), 1.0, unknown="refuse")
    # A validation leaves the outermost module's weights whole.
    with torch.no_grad():
        convolution(torch.zeros(1, 1, 4, 4))
    assert type(convolution[0].weight) is nn.Parameter
    with pytest.raises(UnsupportedLayerError, match="linear layers only"):
        LipschitzRegularizer(convolution, 1.0)


@needs_fsdp2
@pytest.mark.parametrize("is_whole", [False, True])
def test_what_needs_whole_weights_is_refused(mesh, is_whole):
    model = fsdp(mesh, nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    example = torch.zeros(1, 3)
    names = r"\['0', '2'\]"

    def prepare():
        """Leave the weights whole as a validation does, where that is the case."""
        if is_whole:
            with torch.no_grad():
                model(example)
        return names if not is_whole else r"\['\(the model itself\)'\]"

    regularizer = LipschitzRegularizer(model, 1.0)
    where = prepare()
    for refused, what, instead in (
        (lambda: certify(model, example, data=example), "certify", "Certify a checkpoint in one process"),
        (lambda: NetworkBound.trace(model, example), "A bound over the traced graph", "Leave the example input out"),
        (lambda: project(model, 1.0), "LipschitzProjector", "project a whole checkpoint"),
        (lambda: rebalance(model, example), "rebalance", "Rebalance a whole checkpoint"),
        (lambda: MaxNorm(1.0).on_train_start(None, model), "MaxNorm", "remove the callback"),
        (
            regularizer.value,
            r"A penalty or bound with a gradient, LipschitzMixin's too",
            r"Use LipschitzPenalty, or add_grad_",
        ),
    ):
        with pytest.raises(UnsupportedLayerError, match=rf"{what}.* needs whole weights, .* of {where} .*{instead}"):
            refused()


def test_an_example_input_array_gives_way_to_the_product(mesh):
    model = fsdp(mesh, nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.example_input_array = torch.zeros(1, 3)
    with pytest.warns(UserWarning, match="the product of the layers does instead. A bound over the traced graph needs"):
        regularizer = LipschitzRegularizer(model, 1.0)
    assert regularizer.bound_kind == "product"


def test_a_kernel_asked_for_by_name_is_refused(mesh):
    model = fsdp(mesh, nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot serve .* shape \(4, 3\): it is a DTensor"):
        LipschitzRegularizer(model, 1.0, backend="cpu").add_grad_()


def test_a_gradient_of_other_placement_is_refused(mesh):
    layer = placed(mesh, [Replicate()])
    # A whole weight acts on inputs that are dealt out: its gradient is a sum that is still due.
    (DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)]) @ layer.weight.mT).sum().backward()
    with pytest.raises(RuntimeError, match=r"placed as the weight is, .*Replicate.*, got .*Partial.*: redistribute it"):
        LipschitzRegularizer(layer, 1.0).add_grad_()


def test_frozen_and_tied_layers(mesh):
    model = fsdp(mesh, nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    regularizer = LipschitzRegularizer(model, 1.0)
    assert [op.multiplicity for op in regularizer.operators] == [2, 1]
    regularizer.add_grad_()
    first, last = (torch.linalg.matrix_norm(model[i].weight.to_local().detach(), 2) for i in (0, 2))
    norm = torch.linalg.matrix_norm(model[0].weight.grad.to_local())
    torch.testing.assert_close(norm, 2 * first * last)
    assert model[2].weight.grad is None


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] in ("shards", "meshes"):
        torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(sys.argv[2]))
    globals()[f"case_{sys.argv[1]}"](import_module(sys.argv[3]))
    torch.distributed.barrier()
    os._exit(0)  # gloo can abort while the interpreter ends
