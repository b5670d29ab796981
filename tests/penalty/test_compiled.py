"""torch.compile: the penalty inside a compiled graph, and beside one, gives the numbers of the eager run."""

import copy
from functools import partial

import lightning.pytorch as lightning
import pytest
import torch
from support import networks
from support.trainers import make_module as module_of
from torch import nn

from lightning_lip import LipschitzMixin, LipschitzMonitor, LipschitzPenalty, LipschitzRegularizer

# The operators are what is tested, not the machine code: no compiler is needed, and tracing is most of the time.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


mlp = partial(networks.mlp, 4, 8, 8, 1, activation=nn.Tanh)


def repeated():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4)] * 3)


def convolutional():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)]
    return nn.Sequential(*body, nn.ReLU(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 1)))


def own_penalty(log_sigma, log_bound):
    return log_bound.square() + log_sigma.sum()


CASES = {
    "product": (mlp, {}),
    "log with iterations": (mlp, {"penalty": "log", "n_iterations": 2}),
    "own penalty": (mlp, {"penalty": own_penalty}),
    "selection": (mlp, {"layers": ["0", "4"], "penalty": "hinge_log", "target": 0.1}),
    "repeated module": (repeated, {"penalty": "layer_sum"}),
    "double": (partial(mlp, dtype=torch.float64), {}),
    "bfloat16": (partial(mlp, dtype=torch.bfloat16), {}),
    "convolution": (convolutional, {"exclude": "1"}),
    "traced": (convolutional, {"example_input": torch.zeros(2, 1, 6, 6), "layers": "0"}),
}


@pytest.mark.parametrize("case", CASES)
def test_value_in_a_whole_graph_equals_eager(case):
    make, arguments = CASES[case]
    found = []
    for compiled in (False, True):
        model = make()
        dtype = next(model.parameters()).dtype
        shape = (4, 1, 6, 6) if isinstance(model[0], nn.Conv2d) else (4, 4)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        regularizer = LipschitzRegularizer(model, 0.1, block_size=2, **arguments)
        model(x)  # shows convolutions their size
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # the compiler delays the update of running statistics to the end of the graph

        def loss(x, model=model, regularizer=regularizer):
            return model(x).float().square().mean() + 3.0 * regularizer.value()

        step = torch.compile(loss, backend=BACKEND, fullgraph=True) if compiled else loss
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        history = []
        for _ in range(4):
            optimizer.zero_grad()
            value = step(x)
            value.backward()
            optimizer.step()
            history.append(float(value.detach()))
        found.append((history, [p.detach().double() for p in model.parameters()], regularizer.state_dict()["vectors"]))
    eager, traced = found
    tolerance = {torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(dtype, 1e-5)
    assert traced[0] == pytest.approx(eager[0], rel=tolerance)
    for a, b in zip(eager[1], traced[1], strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    for name, block in eager[2].items():
        torch.testing.assert_close(traced[2][name].double(), block.double(), rtol=0, atol=100 * tolerance)


def test_value_does_not_advance_without_training():
    model = mlp()
    regularizer = LipschitzRegularizer(model, 1.0, block_size=1)
    value = torch.compile(lambda: regularizer.value(), backend=BACKEND, fullgraph=True)
    first = value().detach()
    before = regularizer.state_dict()["vectors"]
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        assert float(value()) == pytest.approx(2 * float(first), rel=1e-2)
    model.eval()
    value()
    assert all(torch.equal(before[name], block) for name, block in regularizer.state_dict()["vectors"].items())
    model.train()
    value()
    assert not torch.equal(before["2"], regularizer.state_dict()["vectors"]["2"])


def test_frozen_weights_get_no_gradient():
    model = mlp()
    model[2].weight.requires_grad_(False)
    regularizer = LipschitzRegularizer(model, 1.0)
    value = torch.compile(regularizer.value, backend=BACKEND, fullgraph=True)
    value().backward()
    assert model[2].weight.grad is None
    assert float(torch.linalg.matrix_norm(model[0].weight.grad, 2)) > 0
    model.requires_grad_(False)
    assert not value().requires_grad


def test_a_copy_is_a_regulariser_of_its_own():
    model = mlp()
    regularizer = LipschitzRegularizer(model, 1.0)
    other, its = copy.deepcopy((model, regularizer))
    with torch.no_grad():
        other[0].weight.mul_(2.0)
    of = torch.compile(lambda r: r.value(), backend=BACKEND, fullgraph=True)
    assert float(of(its).detach()) == pytest.approx(2 * float(of(regularizer).detach()), rel=1e-4)


def test_weights_changed_inside_the_graph_are_refused():
    model = mlp()
    regularizer = LipschitzRegularizer(model, 1.0)

    @torch.compile(backend=BACKEND, fullgraph=True)
    def change_then_penalise():
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        return regularizer.value()

    with pytest.raises(RuntimeError, match="take the penalty before it does"):
        change_then_penalise()


def test_add_grad_after_a_compiled_backward():
    found = []
    for compiled in (False, True):
        model = mlp()
        forward = torch.compile(model, backend=BACKEND, fullgraph=True) if compiled else model
        regularizer = LipschitzRegularizer(forward, 0.5)
        forward(torch.ones(2, 4)).square().mean().backward()
        regularizer.add_grad_()
        found.append([p.grad for p in model.parameters()])
        assert list(regularizer.state_dict()["vectors"]) == ["0", "2", "4"]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def fit(make_module, make_trainer, regression_data):
    """Train one of the ways to compile; return the weights, the checkpoint's keys and the trainer."""

    def run(way, mixin=False, max_epochs=1, ckpt_path=None):
        base = type(make_module(lightning))

        class Penalised(LipschitzMixin, base):
            def training_step(self, batch, batch_idx):
                x, y = batch
                return nn.functional.mse_loss(self.net(x), y) + 0.05 * self.lipschitz_penalty()

        module = Penalised() if mixin else base()
        compiled, wrap = module, partial(torch.compile, backend=BACKEND, fullgraph=True)
        if way == "before":
            compiled = wrap(module)
        elif way == "inside":
            module.net = wrap(module.net)
        elif way == "configure_model":
            module.configure_model = lambda: setattr(module, "net", wrap(module.net))
        callbacks = [LipschitzMonitor()] if mixin else [LipschitzMonitor(), LipschitzPenalty(0.05)]
        trainer = make_trainer(lightning, callbacks=callbacks, max_epochs=max_epochs, log_every_n_steps=4)
        trainer.fit(compiled, regression_data, ckpt_path=ckpt_path)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert (way == "eager") == (not torch._dynamo.utils.counters["stats"].get("unique_graphs"))
        return torch.cat([p.detach().flatten() for p in module.parameters()]), trainer

    return run


@pytest.mark.parametrize("mixin", [False, True], ids=["callback", "mixin"])
@pytest.mark.parametrize("way", ["before", "inside", "configure_model"])
def test_trainer_without_a_graph_break(fit, way, mixin):
    eager, _ = fit("eager", mixin)
    compiled, _ = fit(way, mixin)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [("before", "eager"), ("eager", "before"), ("inside", "inside")])
def test_resume_across_compilation(fit, tmp_path, first, second):
    _, trainer = fit(first)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    vectors = checkpoint["callbacks"]["LipschitzPenalty"]["regularizer"]["vectors"]
    assert list(vectors) == ["net.0", "net.2", "net.4"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole, _ = fit("eager", max_epochs=2)
    resumed, _ = fit(second, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-6)


def compiled_images(way):
    """Return what a Trainer takes of small images: a compiled module, or one that holds a compiled network."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 1))
    module = module_of(lightning, net=net)
    module.validation_step = module.training_step  # its own one logs, which breaks the graph
    if way == "before":
        return torch.compile(module, backend=BACKEND, fullgraph=True)
    module.net = torch.compile(module.net, backend=BACKEND, fullgraph=True)
    return module


def images(*sizes):
    """Return a loader of one batch of square images a size."""
    batches = [(torch.ones(4, 1, size, size), torch.zeros(4, 1)) for size in sizes]
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("way", ["before", "inside"])
def test_convolutions_record_their_size_in_a_compiled_forward(make_trainer, way):
    data, penalty = images(6, 6), LipschitzPenalty(0.1, convolutions="spatial")
    # The sanity check compiles a forward without gradients first.
    make_trainer(lightning, callbacks=[penalty]).fit(compiled_images(way), data, data)
    assert penalty.regularizer.operators[0].domain_shape == (1, 6, 6)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("way", ["before", "inside"])
def test_convolutions_record_their_size_where_a_forward_was_compiled_before(make_trainer, way):
    # torch.compile would go on with code that it compiled of the same forward without the hooks.
    make_trainer(lightning).fit(compiled_images(way), images(6, 6))
    penalty, network = LipschitzPenalty(0.1, convolutions="spatial"), compiled_images(way)
    make_trainer(lightning, callbacks=[penalty]).fit(network, images(6, 6))
    assert penalty.regularizer.operators[0].domain_shape == (1, 6, 6)
    make_trainer(lightning, callbacks=[penalty]).fit(network, images(8, 8))
    assert penalty.regularizer.operators[0].domain_shape == (1, 8, 8)


@pytest.mark.parametrize("way", ["before", "inside"])
def test_another_size_in_a_whole_graph_is_told_of(make_trainer, way):
    penalty = LipschitzPenalty(0.1, convolutions="spatial")
    with pytest.warns(UserWarning, match=r"'net.0' now sees inputs of shape \(1, 8, 8\).*\(1, 6, 6\)"):
        make_trainer(lightning, callbacks=[penalty]).fit(compiled_images(way), images(6, 8, 6))
    assert penalty.regularizer.operators[0].domain_shape == (1, 6, 6)


def test_symbols_install_nothing_in_a_compiled_model(make_trainer):
    network = compiled_images("before")
    penalty = LipschitzPenalty(0.1)
    make_trainer(lightning, callbacks=[penalty]).fit(network, images(6, 8))  # of any size, without a warning
    assert penalty.regularizer.operators[0].symbol_geometry is not None
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert not torch._dynamo.utils.counters["graph_break"]
