"""CertifiedValidation, and training to a certificate on real images."""

import math

import lightning.pytorch as lightning
import pytest
import torch
from sklearn.datasets import load_digits
from support.trainers import linux_only, make_module, make_trainer, run_script
from torch import nn

from lightning_lip import CertifiedValidation, LipschitzMonitor, LipschitzPenalty, certify
from lightning_lip.metrics import certified_accuracy


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


def resnet():
    """Two residual blocks on the 8 x 8 digits."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), Block(8), nn.AvgPool2d(2), Block(8), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(128, 10))
    settings = {"net": net, "loss": nn.functional.cross_entropy}
    return make_module(lightning, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3), **settings)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    parts = torch.utils.data.TensorDataset(x[:1400], y[:1400]), torch.utils.data.TensorDataset(x[1400:], y[1400:])
    generator = torch.Generator().manual_seed(0)
    return (
        torch.utils.data.DataLoader(parts[0], batch_size=64, shuffle=True, generator=generator),
        torch.utils.data.DataLoader(parts[1], batch_size=397),
    )


EPS = 0.1
IMAGE = torch.zeros(1, 1, 8, 8)


def validate(module, data, *arguments, **keywords):
    """Return what a validation with a CertifiedValidation of these arguments logs, as numbers."""
    trainer = make_trainer(lightning, [CertifiedValidation(*arguments, **keywords)])
    trainer.validate(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_penalty_over_the_graph_gives_certified_accuracy_on_real_images(fit, digits):
    # Train without a penalty, then go on with one: the certified bound falls, and certified accuracy appears.
    train, validation = digits
    module = resnet()
    results = []
    for penalties in ([], [LipschitzPenalty(0.4, "softplus_log", example_input=IMAGE)]):
        monitor = LipschitzMonitor(example_input=IMAGE, certified=CertifiedValidation((0.0, EPS)))
        settings = {"max_epochs": 12, "check_val_every_n_epoch": 12, "num_sanity_val_steps": 0}
        _, trainer = fit(*penalties, monitor, module=module, data=train, validation=validation, **settings)
        tags = ("lipschitz/certified", "val/certified_accuracy/eps=0", f"val/certified_accuracy/eps={EPS:g}")
        results.append([float(trainer.callback_metrics[tag]) for tag in tags])
    (plain_bound, plain_accuracy, plain_certified), (bound, accuracy, certified) = results
    assert plain_accuracy > 0.9
    assert plain_certified == 0.0
    assert bound < plain_bound / 20
    assert accuracy > 0.8
    assert certified > 0.4


def test_values_are_those_of_the_certificate(digits):
    module = resnet()
    logged = validate(module, digits[1], (0.0, 1e-3))
    upper = certify(module, torch.zeros(2, 1, 8, 8)).upper
    x, y = digits[1].dataset.tensors
    module.eval()
    expected = certified_accuracy(module(x), y, upper, [0.0, 1e-3])
    assert logged["lipschitz/certified"] == pytest.approx(upper, rel=1e-6)
    assert logged["val/certified_accuracy/eps=0.001"] == pytest.approx(float(expected[1]))


def test_regression(regression_data):
    module = make_module(lightning)
    logged = validate(module, regression_data, (0.0, 0.5), task="regression")
    upper = certify(module, torch.zeros(2, 4)).upper
    x, y = regression_data.dataset.tensors
    mae = float((module(x) - y).abs().mean())
    assert logged["val/certified_worst_case_mae/eps=0"] == pytest.approx(mae, rel=1e-5)
    worst = logged["val/certified_worst_case_mae/eps=0.5"]
    assert worst == pytest.approx(mae + 0.5 * upper, rel=1e-5)
    # No perturbation of that norm does worse.
    shift = torch.randn(200, *x.shape)
    shift = 0.5 * shift / shift.norm(dim=-1, keepdim=True)
    assert max(float((module(x + s) - y).abs().mean()) for s in shift) <= worst


@pytest.mark.parametrize("sizes", [(1, 100), (100, 1), (4, 4)])
def test_samples_of_different_sizes_count_by_their_outputs(sizes):
    module = make_module(lightning)
    module.forward = lambda x: x
    batches = [(x, x) for x in (torch.randn(3, n) for n in sizes)]
    logged = validate(module, torch.utils.data.DataLoader(batches, batch_size=None), (1.0,), task="regression")
    # Each sample of the identity moves by (1, ..., 1) / sqrt(n): the sum of magnitudes is sqrt(n).
    truth = sum(math.sqrt(n) for n in sizes) / sum(sizes)
    assert truth * (1 - 1e-6) <= logged["val/certified_worst_case_mae/eps=1"] <= truth * (1 + 1e-6)


def test_without_a_certificate_nothing_is_logged_and_the_reason_is_told(digits):
    odd = resnet()
    odd.forward = lambda x: odd.net(x) ** 2
    with pytest.warns(UserWarning, match=r"(?s)no certificate:.*pow"):
        logged = validate(odd, digits[1])
    assert "lipschitz/certified" not in logged


def test_outputs_that_would_broadcast_are_an_error(regression_data):
    with pytest.raises(ValueError, match=r"target's shape \(4,\), got \(4, 1\)"):
        validate(make_module(lightning), regression_data, task="regression", batch_to_xy=lambda b: (b[0], b[1][:, 0]))


def test_every_size_of_input_is_certified_for_itself():
    sizes = [torch.randn(8, 1, 32, 32), torch.randn(8, 1, 2, 2)]
    loader = torch.utils.data.DataLoader([(x, torch.zeros(8, 1)) for x in sizes], batch_size=None)
    module = make_module(lightning, net=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1)))
    module.example_input_array = torch.zeros(1, 1, 32, 32)
    # A mean over 4 pixels has norm 1/2, one over 1024 pixels 1/32.
    weight = abs(float(module.net[2].weight.detach()))
    logged = validate(module, loader, (0.5,), task="regression")
    assert logged["lipschitz/certified"] == pytest.approx(weight / 2, rel=1e-5)


def test_lower_bound_over_the_first_inputs(regression_data):
    module = make_module(lightning)
    x = regression_data.dataset.tensors[0]
    for n_inputs, expected in ((6, x[:6]), (1000, x)):  # batches of 4: the second one in part
        logged = validate(module, regression_data, (0.0,), task="regression", max_inputs=n_inputs)
        result = certify(module, torch.zeros(2, 4), data=expected, max_inputs=1000)
        assert logged["lipschitz/lower"] == pytest.approx(result.lower, rel=1e-5)
        assert logged["lipschitz/estimate"] == pytest.approx(result.estimate, rel=1e-5)
        assert logged["lipschitz/lower"] <= logged["lipschitz/certified"]


def test_no_lower_bound(regression_data):
    logged = validate(make_module(lightning), regression_data, task="regression", max_inputs=0)
    assert "lipschitz/lower" not in logged
    assert "lipschitz/certified" in logged


DISAGREEING = """
import lightning as L, torch
from torch import nn
from lightning_lip import CertifiedValidation

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x):
        x = self.net(x)
        return nn.functional.hardshrink(x) if self.is_second else x  # which no certificate allows

    def on_validation_start(self):
        self.is_second = self.global_rank == 1

    def validation_step(self, batch, batch_idx):
        pass

if __name__ == "__main__":
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
        callbacks=[CertifiedValidation((0.1,))], enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.validate(Net(), torch.utils.data.DataLoader(data, batch_size=4), verbose=False)
    print("ENDED", [name for name in trainer.callback_metrics if "certified" in name])
"""


@linux_only
def test_ranks_log_together_or_not_at_all():
    done = run_script(DISAGREEING)
    assert "ENDED []" in done.stdout, done.stderr[-3000:]
    assert "has no certificate" in done.stderr


def classifier(net, **options):
    return make_module(lightning, net=net, loss=nn.functional.cross_entropy, **options)


def with_a_common_direction():
    """A trained-looking net whose head has a large direction in common, which no difference of logits sees."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        net[2].weight += 20
    return net


def points():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    return x, torch.utils.data.DataLoader([(x, torch.zeros(40, dtype=torch.long))], batch_size=None)


def labelled(net):
    x, _ = points()
    y = net(x).argmax(1)
    return x, y, torch.utils.data.DataLoader([(x, y)], batch_size=None)


def test_the_certificates_are_pairwise_where_the_network_ends_in_a_linear_layer():
    net = with_a_common_direction()
    x, y, data = labelled(net)
    logged = validate(classifier(net), data, (0.01, 0.05))
    features = certify(net[:2], x[:1]).upper
    for eps in (0.01, 0.05):
        expected = certified_accuracy(net(x), y, features, eps, last_weight=net[2].weight)
        assert logged[f"val/certified_accuracy/eps={eps:g}"] == pytest.approx(expected.item())
        assert certified_accuracy(net(x), y, certify(net, x[:1]).upper, eps) < expected
    assert logged["val/certified_accuracy/eps=0"] == 1


def test_a_head_that_other_operations_follow_is_named():
    net = with_a_common_direction()
    x, y, data = labelled(net)
    whole = nn.Sequential(net, nn.Softmax(1))
    plain = validate(classifier(whole), data, (0.05,))
    named = validate(classifier(whole), data, (0.05,), head="net.0.2")
    features = certify(net[:2], x[:1]).upper
    expected = certified_accuracy(net(x), y, features, 0.05, last_weight=net[2].weight)
    assert named["val/certified_accuracy/eps=0.05"] == pytest.approx(expected.item())
    assert plain["val/certified_accuracy/eps=0.05"] < expected
    with pytest.raises(ValueError, match="to name a layer"):
        validate(classifier(whole), data, head="net.9")
    with pytest.raises(ValueError, match="one linear layer"):
        validate(classifier(whole), data, head="net.1")


def test_a_computed_head_has_no_pairwise_certificate():
    net = with_a_common_direction()
    torch.nn.utils.parametrizations.weight_norm(net[2])
    x, _, _ = labelled(net)
    assert certify(net, x[:1]).head is None
    with pytest.raises(ValueError, match="stored weight"):
        certify(net, x[:1], head=net[2])


def test_the_smaller_constant_serves_each_pair():
    x, y = torch.tensor([[3.0, 0.0, 2.0]]), torch.tensor([0])
    weight = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [2.9, 0.0]])
    assert certified_accuracy(x, y, 1.0, 0.6, last_weight=weight) == 0  # class 1: .6 x 6 > 3
    assert certified_accuracy(x, y, 1.5, 0.6) == 0  # class 2: .6 x 1.5 sqrt(2) > 1
    assert certified_accuracy(x, y, 1.0, 0.6, last_weight=weight, output_lipschitz=1.5) == 1


def test_a_classifier_of_one_class_is_told():
    net = with_a_common_direction()
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    x, _ = points()
    data = torch.utils.data.DataLoader([(x, torch.arange(40) % 4)], batch_size=None)
    with pytest.warns(UserWarning, match="all predictions are class 1, at an accuracy of 0.25"):
        logged = validate(classifier(net), data, (5.0,))
    assert logged["val/certified_accuracy/eps=5"] == 0.25
    assert logged["val/certified_accuracy/eps=0"] == 0.25
