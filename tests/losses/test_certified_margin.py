"""CertifiedMarginLoss: its gradient, when its vectors advance, where its state is kept, and what it certifies."""

import copy
import math

import lightning.pytorch as lightning
import pytest
import torch
from support.attacks import broken
from support.networks import Residual, mlp, randomised_batch_norm
from support.symbol_norms import symbol_norm
from torch import nn

from lightning_lip import CertifiedMarginLoss, certified_margin_loss, certify
from lightning_lip.losses.pairwise import pairwise_bounds
from lightning_lip.metrics import certified_accuracy

FORMS = ["margin", "emma", "gloro", "lmt"]


def cnn():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        randomised_batch_norm(nn.BatchNorm2d(3)),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 4),
    )


NETS = {
    "mlp": (lambda: mlp(6, 9, 7, 4), (6,)),
    "cnn": (cnn, (1, 6, 6)),
    "residual": (lambda: Residual(n=8, n_out=4), (8,)),
}


def norm(matrix):
    return torch.linalg.svdvals(matrix)[0]


def exact_features(name, net, convolutions):
    """The bound before the head, by exact SVDs in float64."""
    if name == "mlp":
        return norm(net[0].weight) * norm(net[2].weight)
    if name == "residual":
        return 1 + norm(net.back.weight) * norm(net.inner.weight)
    conv, batch_norm = net[0], net[1]
    scale = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()
    if convolutions == "symbol":
        return symbol_norm(scale[:, None, None, None] * conv.weight, 1, 1) / 2
    basis = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
    images = nn.functional.conv2d(basis, conv.weight, padding=1)
    return norm((scale[None, :, None, None] * images).flatten(1)) / 2  # average pooling over 2 x 2: 1 / 2


def exact_loss(name, net, form, logits, target, eps, convolutions):
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1].weight
    features = exact_features(name, net, convolutions)
    if form == "lmt":
        return certified_margin_loss(logits, target, math.sqrt(2) * eps * features * norm(head))
    differences = torch.stack([torch.stack([(a - b).square().sum() for b in head]) for a in head])
    apart = ~torch.eye(len(head), dtype=torch.bool)
    distances = torch.where(apart, differences, 1.0).sqrt() * apart
    return certified_margin_loss(logits, target, eps * features * distances, form)


def made(name, form, **options):
    net, shape = NETS[name][0]().double(), NETS[name][1]
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(3))
    loss = CertifiedMarginLoss(net, 0.3, form=form, example_input=x[:1], **options)
    return net, loss, x, y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "convolutions"), [*((name, "symbol") for name in NETS), ("cnn", "spatial")], ids=str)
def test_the_gradient_is_autograds_through_exact_svds(name, convolutions, form):
    net, loss, x, y = made(name, form, n_iterations=300, convolutions=convolutions)
    net.eval()  # the batch normalisation's running statistics are those of the bound
    net.training = True
    value = loss(net(x), y)
    parameters = list(net.parameters())
    found = torch.autograd.grad(value, parameters)
    truth = exact_loss(name, net, form, net(x), y, 0.3, convolutions)
    assert value.item() == pytest.approx(truth.item(), rel=1e-6)
    for gradient, exact in zip(found, torch.autograd.grad(truth, parameters), strict=True):
        assert torch.allclose(gradient, exact, rtol=1e-5, atol=1e-7)


def vectors(loss):
    return copy.deepcopy(loss.get_extra_state()["vectors"])


def moved(loss, before):
    return any(not torch.equal(block, before[key]) for key, block in vectors(loss).items())


def test_the_vectors_advance_once_for_each_state_of_the_weights():
    net, loss, x, y = made("mlp", "margin")
    loss(net(x), y)
    before = vectors(loss)
    loss(net(x), y).backward()
    loss(net(x[:8]), y[:8]).backward()
    assert not moved(loss, before)
    torch.optim.SGD(net.parameters(), 0.1).step()
    loss(net(x), y)
    assert moved(loss, before)


@pytest.mark.parametrize("way", ["no_grad", "eval", "inference"])
def test_nothing_advances_where_nothing_is_trained(way):
    net, loss, x, y = made("mlp", "margin", warmup_steps=5)
    loss(net(x), y)
    with torch.no_grad():
        net[0].weight.mul_(0.9)
    before = copy.deepcopy(loss.get_extra_state())
    net.train(way != "eval")
    with {"no_grad": torch.no_grad, "eval": torch.enable_grad, "inference": torch.inference_mode}[way]():
        value = loss(net(x), y)
    assert value.requires_grad == (way == "eval")
    assert not moved(loss, before["vectors"])
    assert loss.get_extra_state()["n_states"] == before["n_states"]


def test_the_loss_adds_no_parameter_and_no_module():
    net, loss, _, _ = made("mlp", "margin")
    module = nn.ModuleDict({"net": net, "loss": loss})
    assert list(loss.parameters()) == []
    assert list(module.state_dict()) == [*(f"net.{key}" for key in net.state_dict()), "loss._extra_state"]


def test_older_checkpoints_load_strictly_and_the_state_with_weights_only(tmp_path):
    net, loss, x, y = made("mlp", "margin", warmup_steps=3)
    module = nn.ModuleDict({"net": net, "loss": loss})
    loss(net(x), y)
    torch.save(module.state_dict(), tmp_path / "new.pt")
    torch.save({f"net.{key}": value for key, value in net.state_dict().items()}, tmp_path / "old.pt")
    net2, loss2, _, _ = made("mlp", "margin", warmup_steps=3)
    other = nn.ModuleDict({"net": net2, "loss": loss2})
    other.load_state_dict(torch.load(tmp_path / "old.pt", weights_only=True), strict=True)
    assert loss2.get_extra_state()["n_states"] == 0
    other.load_state_dict(torch.load(tmp_path / "new.pt", weights_only=True), strict=True)
    assert loss2.get_extra_state()["n_states"] == 1
    assert not moved(loss2, vectors(loss))
    with pytest.raises(ValueError, match="n_states"):
        loss2.set_extra_state({"vectors": {}})


def test_eps_grows_with_the_states_of_the_weights_and_is_whole_in_eval_mode():
    net, loss, *_ = made("mlp", "lmt", warmup_steps=4)
    factors, whole = [], []
    for _ in range(6):
        with torch.no_grad():
            net[0].weight.mul_(1.0)  # another state, of the same values
        for _ in range(2):
            bound = loss.pairwise_bounds().item()
        net.eval()
        whole.append(loss.pairwise_bounds().item())
        factors.append(bound / whole[-1])
        net.train()
    assert factors == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0, 1.0], rel=1e-4)
    assert whole[-1] == pytest.approx(
        0.3 * math.sqrt(2) * norm(net[4].weight).item() * exact_features("mlp", net, "symbol").item(), rel=1e-2
    )


def test_a_copy_belongs_to_the_copied_model():
    net, loss, x, y = made("mlp", "margin")
    loss(net(x), y)
    module = copy.deepcopy(nn.ModuleDict({"net": net, "loss": loss}))
    assert not moved(module["loss"], vectors(loss))
    module["loss"](module["net"](x), y).backward()
    assert module["net"][0].weight.grad is not None
    assert net[0].weight.grad is None
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert module["loss"].pairwise_bounds().max() < loss.pairwise_bounds().max()


def test_a_log_softmax_after_the_head_changes_nothing():
    net, loss, x, y = made("mlp", "margin")
    whole = nn.Sequential(net, nn.LogSoftmax(dim=1))
    other = CertifiedMarginLoss(whole, 0.3, example_input=x[:1])
    assert other(whole(x), y).item() == pytest.approx(loss(net(x), y).item(), rel=1e-12)


def test_a_head_that_is_not_last_is_named():
    net, loss, x, y = made("mlp", "margin")
    scaled = nn.Sequential(net, nn.Tanh())
    with pytest.raises(ValueError, match="name the layer"):
        CertifiedMarginLoss(scaled, 0.3, example_input=x[:1])
    named = CertifiedMarginLoss(scaled, 0.3, head=net[4], example_input=x[:1])
    assert named(net(x), y).item() == pytest.approx(loss(net(x), y).item(), rel=1e-12)
    assert CertifiedMarginLoss(scaled, 0.3, form="lmt", example_input=x[:1])(net(x), y).isfinite()


@pytest.mark.parametrize(
    ("head", "message"), [(nn.Linear(7, 4), "a module of the model"), ("relu", "with 0 linear operations")]
)
def test_a_head_that_is_none_is_refused(head, message):
    net, _, x, _ = made("mlp", "margin")
    with pytest.raises(ValueError, match=message):
        CertifiedMarginLoss(net, 0.3, head=net[1] if head == "relu" else head, example_input=x[:1])


def test_a_head_on_a_sequence_of_features_is_not_found():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="features of shape"):
        CertifiedMarginLoss(net, 0.3, example_input=torch.zeros(1, 6, 4))


def test_without_an_example_input_it_says_so():
    with pytest.raises(ValueError, match="example_input"):
        CertifiedMarginLoss(mlp(3, 4, 2), 0.1)


@pytest.mark.parametrize(
    "options",
    [{"eps": -1.0}, {"form": "hinge"}, {"warmup_steps": -1}, {"reduction": "median"}, {"label_smoothing": 1.5}],
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="Expected"):
        CertifiedMarginLoss(mlp(3, 4, 2), **{"eps": 0.1, "example_input": torch.zeros(1, 3), **options})


def test_compiled_it_gives_the_eager_numbers():
    net, loss, x, y = made("mlp", "margin", n_iterations=50)
    eager = loss(net(x), y)
    expected = torch.autograd.grad(eager, list(net.parameters()))
    compiled = torch.compile(lambda a, b: loss(net(a), b), backend="aot_eager", fullgraph=True)
    value = compiled(x, y)
    assert value.item() == pytest.approx(eager.item(), rel=1e-9)
    for a, b in zip(torch.autograd.grad(value, list(net.parameters())), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_distances_of_rows_keep_their_digits_and_have_a_finite_slope_where_rows_are_equal():
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1] = rows[0] + 1e-4
    rows[2] = rows[0]
    rows = rows.float().requires_grad_()
    found = pairwise_bounds(torch.zeros(()), rows, 1.0, torch.arange(4))
    truth = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(found.double(), truth, rtol=1e-6, atol=1e-6)
    assert found.diagonal().eq(0).all()
    found.sum().backward()
    assert rows.grad.isfinite().all()


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = mlp(2, 16, 16, 3)
        self.loss = CertifiedMarginLoss(self.net, 0.2, example_input=torch.zeros(1, 2), warmup_steps=20)

    def training_step(self, batch):
        x, y = batch
        return self.loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def blobs(n=300):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    centres = torch.tensor([[0.0, 1.0], [-0.9, -0.5], [0.9, -0.5]])
    return centres[y] + 0.25 * torch.randn(n, 2, generator=g), y


def test_a_trained_net_is_certified_pairwise_not_broken_by_pgd_and_its_checkpoint_goes_on(tmp_path):
    x, y = blobs()
    module = Classifier()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=50)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=25, enable_checkpointing=False, default_root_dir=tmp_path, **options)
    trainer.fit(module, batches)
    assert module.loss.get_extra_state()["n_states"] == 150  # one for each optimiser step
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert not moved(again.loss, vectors(module.loss))

    net = module.net.eval()
    features = certify(net[:4], x[:1]).upper
    logits = net(x).detach()
    for eps in (0.05, 0.1, 0.2, 0.3):
        share = certified_accuracy(logits, y, features, eps, last_weight=net[4].weight)
        certified = torch.stack(
            [
                certified_accuracy(z[None], c[None], features, eps, last_weight=net[4].weight)
                for z, c in zip(logits, y, strict=True)
            ]
        ).bool()
        assert share == pytest.approx(certified.float().mean().item())
        assert share > 0.5
        is_broken = broken(net, x, y, eps, steps=30)
        assert not (is_broken & certified).any()
        assert is_broken.any() or eps < 0.1  # the attack is not empty


def n_operations(function):
    """PyTorch's operations that a function calls, without those that they call themselves."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    operations = [event for event in profile.events() if event.name.startswith("aten::")]
    return sum(not (event.cpu_parent and event.cpu_parent.name.startswith("aten::")) for event in operations)


def test_a_step_costs_few_operations_a_layer():
    """What the time of a step of small layers consists of: 4 microseconds each, and 0.05 ms for the iteration."""
    counts = []
    for sizes in ([16] * 3, [16] * 9):
        net = mlp(*sizes, 4)
        loss = CertifiedMarginLoss(net, 0.3, example_input=torch.zeros(1, 16))
        logits, target = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 4
        loss(logits, target)
        with torch.no_grad():
            net[0].weight.mul_(0.9)  # another state, to iterate on
        counts.append(n_operations(lambda loss=loss, x=logits, y=target: loss(x, y).backward()))
    assert counts[0] <= 60
    assert counts[1] - counts[0] <= 7 * 6
