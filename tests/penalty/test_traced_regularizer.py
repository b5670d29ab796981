"""The regulariser over a traced graph, and with convolutions whose size is recorded in training."""

import copy
import gc
import math
import pickle

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from support.networks import Lambda, mlp
from support.truth import operator_norms
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_lip import LipschitzMixin, LipschitzMonitor, LipschitzPenalty, LipschitzRegularizer
from lightning_lip.operators.convolutions.recorded import stop_recording


def exact(weight):
    return torch.linalg.matrix_norm(weight, 2)


def residual():
    """Return x -> b gelu(a x) + x, then a head; `spare` is not called."""
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 4), "head": nn.Linear(4, 2), "spare": nn.Linear(3, 3)}
    return Lambda(lambda m, x: m.head(m.b(nn.functional.gelu(m.a(x))) + x), **layers).double()


POINT = torch.zeros(1, 4, dtype=torch.float64)
GELU = 1.1289041452  # its Lipschitz constant, to ten digits


def residual_bound(model):
    return exact(model.head.weight) * (1 + GELU * exact(model.b.weight) * exact(model.a.weight))


class ConvNet(nn.Module):
    """Convolutions with a batch norm each, a residual, pooling and a head, on (2, 6, 6) images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(27, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.tanh(self.second(x))
        return self.head(self.pool(x).flatten(1))


IMAGE = torch.zeros(2, 2, 6, 6)


def gradients_by(model, differentiate):
    """Return the gradients by name, and leave none behind."""
    differentiate()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def both_ways(regularizer):
    return regularizer.add_grad_, lambda: regularizer.value().backward()


def test_bound_of_a_residual_network_is_the_hand_derived_one():
    model = residual()
    regularizer = LipschitzRegularizer(model, 1.0, example_input=POINT)
    assert regularizer.bound_kind == "bound"
    assert [op.name for op in regularizer.operators] == ["a", "b", "head"]
    assert float(regularizer.bound()) == pytest.approx(float(residual_bound(model)), rel=1e-9)


@pytest.mark.parametrize("penalty", ["product", "softplus_log", "log"])
def test_gradient_of_a_residual_network_is_the_formulas(penalty):
    model = residual()
    bound = residual_bound(model)
    value = {"product": bound, "softplus_log": torch.log1p(bound), "log": bound.log()}[penalty]
    expected = gradients_by(model, (0.5 * value).backward)
    for way in both_ways(LipschitzRegularizer(model, 0.5, penalty, example_input=POINT)):
        got = gradients_by(model, way)
        for name in ("a.weight", "b.weight", "head.weight"):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-10)
        assert got["spare.weight"] is None


def test_unselected_layers_count_without_gradient():
    model = residual()
    regularizer = LipschitzRegularizer(model, 1.0, layers="b", example_input=POINT)
    assert float(regularizer.bound()) == pytest.approx(float(residual_bound(model)), rel=1e-9)
    expected = gradients_by(model, residual_bound(model).backward)["b.weight"]
    for way in both_ways(regularizer):
        got = gradients_by(model, way)
        assert got["a.weight"] is None
        assert got["head.weight"] is None
        torch.testing.assert_close(got["b.weight"], expected, rtol=1e-8, atol=1e-10)


def test_gradient_through_convolutions_and_batch_norm_is_exact():
    model = ConvNet().double()
    model.norm.running_var.uniform_(0.5, 2.0)
    model.norm.weight.data.uniform_(0.5, 1.5)
    regularizer = LipschitzRegularizer(model, 1.0, n_iterations=200, example_input=IMAGE.double())
    names = [op.name for op in regularizer.operators]
    assert names == ["first+norm", "second", "head"]
    got = gradients_by(model, regularizer.add_grad_)
    model.eval()
    regularizer.log_bound_of(operator_norms(regularizer.operators).log()).exp().backward()
    for name, p in model.named_parameters():
        if not name.endswith("bias"):
            torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)


def test_eval_semantics_change_no_mode_and_no_buffer():
    model = ConvNet()
    before = copy.deepcopy(model.state_dict())
    regularizer = LipschitzRegularizer(model, 1.0, example_input=IMAGE)
    regularizer.add_grad_()
    bound = float(regularizer.bound())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # The running statistics are read anew at each evaluation.
    model.norm.running_var.mul_(100.0)
    assert float(regularizer.bound()) < bound / 2


def test_a_selected_layer_outside_the_graph_is_an_error():
    with pytest.raises(ValueError, match=r"layers \['spare'\] do not act on the output.*exclude='spare'"):
        LipschitzRegularizer(residual(), 1.0, layers=["a", "spare"], example_input=POINT)
    with pytest.raises(ValueError, match="No selected layer acts"):
        LipschitzRegularizer(residual(), 1.0, exclude=["a", "b", "head"], example_input=POINT)


def test_state_of_convolutions_survives():
    model = ConvNet()
    regularizer = LipschitzRegularizer(model, 1.0, example_input=IMAGE)
    regularizer.add_grad_()
    other = LipschitzRegularizer(model, 1.0, example_input=IMAGE)
    other.load_state_dict(regularizer.state_dict())
    assert torch.equal(other.sigma(), regularizer.sigma())


def test_convolutions_without_a_size_wait_for_the_first_training_batch():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3))
    regularizer = LipschitzRegularizer(model, 1.0, convolutions="spatial")
    with pytest.raises(RuntimeError, match="input size of convolution '0' is not known yet"):
        regularizer.bound()
    with torch.no_grad():
        model(torch.zeros(1, 2, 50))  # a validation batch tells nothing
    with pytest.raises(RuntimeError, match="not known yet"):
        regularizer.add_grad_()
    model(torch.zeros(1, 2, 9))
    regularizer.iterate()
    expected = LipschitzRegularizer(model, 1.0, example_input=torch.zeros(1, 2, 9), convolutions="spatial")
    assert [op.domain_shape for op in regularizer.operators] == [(2, 9), (3, 7)]
    assert float(regularizer.bound()) == pytest.approx(float(expected.bound()), rel=1e-4)
    model(torch.zeros(1, 2, 11))
    with pytest.warns(UserWarning, match=r"'0' now sees inputs of shape \(2, 11\)") as caught:
        [regularizer.iterate() for _ in range(3)]
    assert len([w for w in caught if "now sees" in str(w.message)]) == 2  # one a layer
    assert regularizer.operators[0].domain_shape == (2, 9)


def test_a_kernel_of_size_one_is_one_operator_at_all_sizes_of_its_input():
    model = Lambda(lambda m, x: m.mix(m.pool(m.mix(x))), mix=nn.Conv2d(2, 2, 1), pool=nn.AvgPool2d(2))
    regularizer = LipschitzRegularizer(model, 1.0, example_input=torch.zeros(1, 2, 4, 4))
    (operator,) = regularizer.operators
    assert (operator.name, operator.multiplicity, operator.domain_shape) == ("mix", 2, (2,))
    squared = torch.linalg.matrix_norm(model.mix.weight.detach()[:, :, 0, 0], 2).square()
    # The average of four has norm 1/2.
    assert float(regularizer.bound()) == pytest.approx(0.5 * float(squared), rel=1e-5)


def test_vectors_that_were_saved_on_maps_start_afresh_at_one_place():
    model = nn.Sequential(nn.Conv2d(3, 5, 1, stride=2), nn.ReLU(), nn.Conv2d(5, 2, 3))
    image = torch.zeros(1, 3, 8, 8)
    regularizer = LipschitzRegularizer(model, 1.0, example_input=image)
    expected = regularizer.sigma()
    state = regularizer.state_dict()
    assert state["vectors"]["0"].shape == (3, 3)
    state["vectors"]["0"] = torch.linalg.qr(torch.randn(192, 8)).Q.mT  # as of before kernels of size 1 were matrices
    other = LipschitzRegularizer(model, 1.0, example_input=image)
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"layer '0' have shape \(8, 192\), .* starts afresh"):
        torch.testing.assert_close(other.sigma(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("followed_by", [nn.Identity(), nn.BatchNorm2d(3)], ids=["own", "scaled"])
def test_a_convolution_gone_bad_shows_and_spares_the_gradients(followed_by):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), followed_by, nn.ReLU(), nn.Conv2d(3, 2, 3)).eval()
    regularizer = LipschitzRegularizer(model, 1.0, "layer_sum", example_input=torch.zeros(1, 2, 6, 6))
    regularizer.add_grad_()
    model.zero_grad()
    nn.init.constant_(model[0].weight, math.nan)
    assert regularizer.add_grad_().isnan()
    assert regularizer.sigma()[0].isnan()
    assert model[0].weight.grad.count_nonzero() == 0
    assert model[3].weight.grad.isfinite().all()


class Images(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = ConvNet()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 2, 6, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize("source", ["argument", "example_input_array", "first batch"])
def test_callbacks_on_a_convolutional_network(make_trainer, images, tmp_path, source):
    module = Images()
    arguments = {"exclude": "net.norm"} if source == "first batch" else {}
    if source == "argument":
        arguments["example_input"] = IMAGE
    elif source == "example_input_array":
        module.example_input_array = IMAGE
    penalty = LipschitzPenalty(0.1, **arguments)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = make_trainer(
        lightning, callbacks=[LipschitzMonitor(), penalty], logger=logger, log_every_n_steps=2, max_epochs=3
    )
    trainer.fit(module, images)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    kind = "product" if source == "first batch" else "bound"
    tags = set(events.Tags()["scalars"])
    assert {f"lipschitz/{kind}", "lipschitz/penalty", "lipschitz/spectral_norm/net.second"} <= tags
    assert f"lipschitz/{kind}_upper" not in tags  # no upper bound of a convolution without a certificate
    norms = penalty.regularizer.spectral_norms()
    first = "net.first" if kind == "product" else "net.first+net.norm"
    assert list(norms) == [first, "net.second", "net.head"]
    # The batch norm's running statistics move until the last batch: compare with the present state.
    assert float(penalty.regularizer.bound()) == pytest.approx(events.Scalars(f"lipschitz/{kind}")[-1].value, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [
        ({"example_input": IMAGE}, "32-true"),
        ({}, "32-true"),
        ({"every_n_steps": 2, "warmup_steps": 5}, "bf16-mixed"),
        ({"convolutions": "spatial"}, "32-true"),
    ],
    ids=["traced", "product", "every other step, mixed", "spatial"],
)
def test_resumed_equals_uninterrupted_on_a_convolutional_network(make_trainer, images, tmp_path, arguments, precision):
    def trainer(epochs):
        penalty = LipschitzPenalty(0.1, **arguments)
        return make_trainer(lightning, callbacks=[penalty], max_epochs=epochs, precision=precision)

    whole = Images()
    trainer(4).fit(whole, images)
    first = trainer(2)
    first.fit(Images(), images)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Images()
    trainer(4).fit(resumed, images, ckpt_path=tmp_path / "half.ckpt")
    # Images() draws its own initialisation from a fixed seed, so both start alike.
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_graph_without_a_bound_falls_back_with_a_warning_only_if_the_example_was_implicit():
    attention, layers = nn.MultiheadAttention(4, 2, batch_first=True), mlp(4, 8, 4, activation=nn.GELU)
    model = Lambda(lambda m, x: m.mlp(m.attention(x, x, x)[0]), attention=attention, mlp=layers)
    model.example_input_array = torch.zeros(2, 3, 4)
    with pytest.warns(UserWarning, match=r"(?s)example_input_array cannot serve.*attention"):
        regularizer = LipschitzRegularizer(model, 1.0, layers="mlp")
    assert regularizer.bound_kind == "product"
    assert list(regularizer.spectral_norms()) == ["mlp.0", "mlp.2"]
    with pytest.raises(ValueError, match="attention"):
        LipschitzRegularizer(model, 1.0, layers="mlp", example_input=torch.zeros(2, 3, 4))


def test_the_mixin_takes_the_example_input_array(make_trainer, images):
    class Mixed(LipschitzMixin, Images):
        def __init__(self):
            super().__init__()
            self.example_input_array = IMAGE

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.1 * self.lipschitz_penalty()

    module = Mixed()
    make_trainer(lightning, max_epochs=2).fit(module, images)
    assert module.lipschitz_regularizer().bound_kind == "bound"
    plain = Images()
    make_trainer(lightning, max_epochs=2).fit(plain, images)
    bound_of = LipschitzRegularizer(plain, 1.0, example_input=IMAGE).bound()
    assert float(module.lipschitz_bound()) < float(bound_of)


def test_the_batch_norm_fused_with_a_selected_convolution_gets_no_gradient():
    model = ConvNet().double()
    model.norm.weight.data.uniform_(0.5, 1.5)
    regularizer = LipschitzRegularizer(model, 1.0, layers="first", n_iterations=50, example_input=IMAGE.double())
    wanted = LipschitzRegularizer(model, 1.0, n_iterations=50, example_input=IMAGE.double())
    expected = gradients_by(model, wanted.add_grad_)["first.weight"]
    for way in both_ways(regularizer):
        got = gradients_by(model, way)
        assert {name for name, g in got.items() if g is not None} == {"first.weight"}
        torch.testing.assert_close(got["first.weight"], expected, rtol=1e-6, atol=1e-9)


def test_a_frozen_selected_layer_is_no_trainable_layer(make_trainer, images):
    module = Images()
    module.net.second.requires_grad_(False)
    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty(layers="net.second", example_input=IMAGE)])
    with pytest.raises(ValueError, match="no trainable layer"):
        trainer.fit(module, images)


def test_fused_optimisers_are_seen_by_value():
    # They do not count their updates in `_version`.
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, fused=True)
    regularizer = LipschitzRegularizer(layer, 1.0, block_size=1)
    for _ in range(200):
        optimizer.zero_grad()
        (layer(torch.ones(2, 6)).square().mean() + 1e-3 * regularizer.value()).backward()
        optimizer.step()
    assert float(regularizer.value()) == pytest.approx(float(exact(layer.weight.detach())), rel=1e-3)


@pytest.mark.parametrize("fitted", [False, True])
def test_callbacks_and_modules_can_be_copied_and_pickled(make_trainer, images, fitted):
    class Mixed(LipschitzMixin, Images):
        pass

    penalty, monitor, module = LipschitzPenalty(0.1, example_input=IMAGE), LipschitzMonitor(), Mixed()
    module.example_input_array = IMAGE
    if fitted:
        make_trainer(lightning, callbacks=[penalty, monitor]).fit(module, images)
        module.lipschitz_bound()
    for callback in (penalty, monitor):
        copied = pickle.loads(pickle.dumps(callback))
        assert copied.state_dict().keys() == callback.state_dict().keys()
    other = copy.deepcopy(module)
    other.net.norm.weight.data.mul_(4.0)
    assert float(other.lipschitz_bound()) > 1.5 * float(module.lipschitz_bound())
    other.lipschitz_penalty().backward()
    assert other.net.norm.weight.grad is not None
    regularizer = LipschitzRegularizer(module, 1.0)
    with pytest.raises(TypeError, match="traced graph cannot be copied or pickled"):
        copy.deepcopy(regularizer)


def test_the_mixin_with_convolutions_and_no_example(make_trainer, images):
    class Mixed(LipschitzMixin, Images):
        def configure_lipschitz(self):
            return LipschitzRegularizer(self, 0.1, exclude="net.norm")

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.lipschitz_penalty()

    module = Mixed()
    make_trainer(lightning).fit(module, images)
    assert float(module.lipschitz_bound()) > 0


def test_frozen_convolutions_in_eval_mode_are_recorded():
    model = nn.Sequential(nn.Conv1d(2, 3, 3).eval().requires_grad_(False), nn.Flatten(), nn.Linear(21, 1))
    regularizer = LipschitzRegularizer(model, 1.0)
    model(torch.zeros(1, 2, 9))
    assert float(regularizer.add_grad_()) > 0


def test_every_regulariser_records_the_sizes_of_its_own_time():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3))
    first = LipschitzRegularizer(model, 1.0, convolutions="spatial")
    model(torch.zeros(1, 2, 9))
    second = LipschitzRegularizer(model, 1.0, convolutions="spatial")
    with pytest.raises(RuntimeError, match="not known yet"):
        second.bound()
    model(torch.zeros(1, 2, 12))
    with pytest.warns(UserWarning, match="now sees"):
        assert float(first.bound()) > 0
    assert float(second.bound()) > 0
    assert [first.operators[0].domain_shape, second.operators[0].domain_shape] == [(2, 9), (2, 12)]
    copied = copy.deepcopy(model)
    assert len(copied[0]._forward_pre_hooks) == 2
    # The hooks go with the regularisers; a size that was seen stays.
    stop_recording(first.operators)
    model(torch.zeros(1, 2, 12))
    assert first.operators[0].domain_shape == (2, 9)
    del second
    gc.collect()
    assert not model[0]._forward_pre_hooks
    torch.jit.script(model)


def test_a_copied_regulariser_records_for_the_copied_model():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(21, 1))
    model.regularizer = LipschitzRegularizer(model, 1.0, convolutions="spatial")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(torch.zeros(1, 2, 9))
        assert copied.regularizer.operators[0].domain_shape == (2, 9)
        copied.regularizer = None
        gc.collect()
        assert not copied[0]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="not known yet"):
        model.regularizer.bound()


def test_an_example_of_another_precision():
    model = ConvNet().double()
    assert float(LipschitzRegularizer(model, 1.0, example_input=IMAGE.float()).bound()) > 0


def test_bound_in_inference_mode_first():
    model = ConvNet()
    regularizer = LipschitzRegularizer(model, 1.0, example_input=IMAGE)
    with torch.inference_mode():
        regularizer.bound()
        regularizer.iterate()
    regularizer.value().backward()
    regularizer.add_grad_()
    assert model.first.weight.grad.isfinite().all()


def test_layers_outside_the_implicit_example_fall_back_to_the_product():
    module = Images()
    module.auxiliary = nn.Linear(3, 3)
    module.example_input_array = IMAGE
    with pytest.warns(UserWarning, match=r"example_input_array cannot serve.*'auxiliary'"):
        regularizer = LipschitzRegularizer(module, 1.0, layers="auxiliary")
    assert regularizer.bound_kind == "product"
