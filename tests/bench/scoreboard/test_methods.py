import math
from dataclasses import replace

import pytest
import torch

from lightning_lip import CertifiedMarginLoss
from lightning_lip.bench.scoreboard.data import Part
from lightning_lip.bench.scoreboard.evaluation import norms_of
from lightning_lip.bench.scoreboard.methods import METHODS, Setting
from lightning_lip.bench.scoreboard.networks import exported, mlp, ordinary
from lightning_lip.bench.scoreboard.training import train

SHAPE = (1, 4, 4)


def blobs(n=512):
    """Three classes of Gaussians."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(n) % 3
    centres = 2 * torch.randn(3, *SHAPE, generator=generator)
    return Part(centres[targets] + 0.5 * torch.randn(n, *SHAPE, generator=generator), targets)


def prepared(name, setting=None, seed=0):
    method = METHODS[name]
    torch.manual_seed(seed)
    network = mlp(method.layers(), SHAPE, 3)
    return method.prepare(network, torch.zeros(1, *SHAPE), setting or method.settings()[0])


@pytest.fixture(params=METHODS)
def name(request):
    needs = METHODS[request.param].missing()
    if needs is not None:
        pytest.skip(f"needs {needs}")
    return request.param


def test_all_methods_have_as_many_settings_and_the_same_kind(name):
    settings = METHODS[name].settings()
    assert len(set(settings)) == len(settings) == 9
    assert len({setting.rate for setting in settings}) == 3
    assert all(len(setting.values) == len(METHODS[name].options) for setting in settings)
    assert METHODS[name].described(settings[0]).count(",") == len(METHODS[name].options)


def test_every_method_learns(name):
    part = blobs()
    training = prepared(name)
    train(training, part, 60, seed=0)
    network = exported(training.network)
    assert float((network(part.inputs).argmax(1) == part.targets).float().mean()) > 0.9
    assert 0 < norms_of(network, part.inputs[:1]).features < math.inf


def test_the_constraint_ends_within_its_budget():
    training = prepared("constraint", Setting(5e-3, (0.5,)))
    train(training, blobs(), 20, seed=0)
    network = exported(training.network)
    assert norms_of(network, torch.zeros(1, *SHAPE)).whole <= 0.5


def test_the_penalty_lowers_the_norms():
    def whole(name, value):
        training = prepared(name, Setting(5e-3, (value,)))
        train(training, blobs(), 20, seed=0)
        return norms_of(exported(training.network), torch.zeros(1, *SHAPE)).whole

    assert whole("penalty", 1.0) < 0.8 * whole("cross_entropy", 0.0)


def test_eps_grows_from_a_tenth_over_the_first_half():
    training = prepared("margin", Setting(1e-3, (2.0,)))
    assert isinstance(training.loss, CertifiedMarginLoss)
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        training.on_progress(progress)
        seen.append(training.loss.eps)
    assert seen == pytest.approx([0.2, 1.1, 2.0, 2.0])


def test_a_missing_package_is_named():
    method = METHODS["margin"]
    assert method.missing() is None
    assert replace(method, needs="no_such_module").missing() == "no_such_module"
    assert replace(method, needs="torch").missing() is None


def test_the_layers_of_ours_are_ordinary():
    assert all(method.layers is ordinary for method in METHODS.values() if method.group != "peer")
