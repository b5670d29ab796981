"""What tests of callbacks share: quiet trainers, small modules, a penalty in the loss as the truth, and scripts."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from torch import nn

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


def make_trainer(package, callbacks=(), **settings):
    """Return a quiet CPU trainer of a Lightning package, of one epoch."""
    return package.Trainer(callbacks=list(callbacks), **(QUIET | settings))


def make_module(package, loss_term=None, optimizer=None, net=None, loss=nn.functional.mse_loss):
    """Return a small module of a Lightning package: 4 inputs, one output, Adam.

    Args:
        package: The Lightning package.
        loss_term: What joins the loss, of the list of all matrices.
        optimizer: Of the trainable parameters, instead of Adam.
        net: The network, instead of an MLP 4-8-8-1.
        loss: Of predictions and target.
    """

    class Regressor(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = net or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            value = loss(self(batch[0]), batch[1])
            return value if loss_term is None else value + loss_term([p for p in self.parameters() if p.dim() == 2])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", loss(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            parameters = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.Adam(parameters, lr=1e-2) if optimizer is None else optimizer(parameters)

    return Regressor()


class TwoNets(lightning.pytorch.LightningModule):
    """Two networks with an optimiser each in manual optimisation; the second loss sees the first step's weights."""

    def __init__(self, coefficient=0.0, terms=False):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.coefficient, self.terms = coefficient, terms
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def norm(self, *layers):
        return torch.stack([torch.linalg.matrix_norm(layer.weight, 2) for layer in layers]).prod()

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        for optimizer, layers in ((first, [self.a]), (second, [self.b[0], self.b[2]])):
            loss = nn.functional.mse_loss(self.b(self.a(x)), y)
            if self.terms == "each":
                loss = loss + self.coefficient * self.norm(*layers)
            elif self.terms == "joint":
                loss = loss + self.coefficient * self.norm(self.a, self.b[0], self.b[2])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.a.parameters(), 1e-2), torch.optim.Adam(self.b.parameters(), 1e-2)]


def with_backbone(module):
    """Give a module of :func:`make_module` a `head`, its last layer, and a `backbone`, the other ones, for its net."""
    backbone, head = module.net[:-1], module.net[-1]
    del module.net
    module.backbone, module.head = backbone, head
    module.forward = lambda x: head(backbone(x))
    return module


def weights_of(module):
    """Return all parameters as one vector, in fp64."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def svd_norms(module):
    """Return the largest singular value of each matrix of a module, in fp64."""
    return [float(torch.linalg.svdvals(p.detach().double())[0]) for p in module.parameters() if p.dim() == 2]


def error_to_loss(train, loss_term, callbacks, effect=0.0):
    """Return how far training with callbacks ends from training with the penalty in the loss.

    The distance of the weights is relative to the penalty's own effect.

    Args:
        train: Trains with a term in the loss, or None, and with callbacks; returns the module.
        loss_term: The penalty in the loss.
        callbacks: The callbacks that stand for it.
        effect: What the penalty must move the weights by at least, or nothing is tested.
    """
    runs = ((None, []), (loss_term, []), (None, callbacks))
    without, want, got = (weights_of(train(term, used)) for term, used in runs)
    assert (want - without).norm() > effect
    return float((got - want).norm() / (want - without).norm())


def run_script(script, *arguments, **options):
    """Run a script, in the present folder, in a process of its own; return the finished process with its output."""
    path = Path("script.py")
    path.write_text(script)
    command = [sys.executable, path, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **options)


def on_ranks(script, case, n_ranks, package):
    """Run a case of a test file, which is a script too, in that many processes.

    The first that fails ends the others, which would wait for it.
    """
    # This process holds the store, on a port that is its own from the start: one that is only found free may be taken.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"OMP_NUM_THREADS": "1", "NODE_RANK": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", script, case, str(n_ranks), package]
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(n_ranks)]
        processes = [
            subprocess.Popen(command, env=os.environ | common | {"LOCAL_RANK": str(rank)}, stderr=error)
            for rank, error in enumerate(errors)
        ]
        end = time.monotonic() + 200
        try:
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                if time.monotonic() > end:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for error in errors:
            error.seek(0)
        assert codes == [0] * n_ranks, "\n".join(
            f"{code}: {e.read()[-3000:]}" for code, e in zip(codes, errors, strict=True)
        )
