"""Where neither Numba nor Triton is made (other processors, other systems): the reference serves, and says so."""

import subprocess
import sys

import pytest
import torch

from lightning_lip import kernels

HIDDEN = """
import importlib.machinery, logging, platform, sys

found = importlib.machinery.PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in ("numba", "llvmlite", "triton") else found(name, path, target)


importlib.machinery.PathFinder.find_spec = find_spec
platform.machine = lambda: "arm64"
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(name)s: %(message)s")

import torch
from torch import nn

model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
before = [p.clone() for p in model.parameters() if p.dim() > 1]
x = torch.randn(4, 1, 4, 4)
"""
REGULARIZER = """
from lightning_lip import LipschitzRegularizer, certify

regularizer = LipschitzRegularizer(model, 1.0, example_input=x[:1], convolutions="spatial")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(50):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    regularizer.add_grad_()
    optimizer.step()
estimate = regularizer.bound().item()
upper = certify(model, x[:1]).upper
assert 0.8 * upper < estimate <= upper * (1 + 1e-5), (estimate, upper)
"""
TRAINER = """
import lightning as L

from lightning_lip import LipschitzMonitor, LipschitzPenalty


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = model

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = torch.utils.data.DataLoader(x, batch_size=2)
callbacks = [LipschitzPenalty(1.0), LipschitzMonitor()]
trainer = L.Trainer(
    max_epochs=1, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1
)
trainer.fit(Module(), data)
assert trainer.callback_metrics["lipschitz/penalty"] > 0
"""
AFTER = """
after = [p for p in model.parameters() if p.dim() > 1]
assert all(not torch.equal(a, b) for a, b in zip(after, before))
assert not {"numba", "llvmlite", "triton"} & set(sys.modules)
"""


@pytest.mark.parametrize("training", [REGULARIZER, TRAINER], ids=["regularizer", "Trainer"])
def test_without_compilers_the_reference_trains(training):
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN + training + AFTER], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "instead of the compiled kernels" in line]
    assert len(told) == 1
    assert "lightning_lip: Some weights are served by the PyTorch reference" in told[0]
    assert "numba cannot be imported" in told[0]


def test_a_backend_asked_for_by_name_says_which_compiler_it_lacks(monkeypatch):
    monkeypatch.setattr(kernels, "_missing", lambda backend: f"{backend} has none")
    with pytest.raises(ValueError, match=r"'cpu' cannot serve a weight of shape \(3, 4\): cpu has none"):
        kernels.choose_backend(torch.ones(3, 4), 8, "cpu")
    assert kernels.compiled_rows(torch.ones(2, 4), 3, 4) is None
