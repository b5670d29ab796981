"""Resuming: in the middle of an epoch, after SIGKILL, under DDP, with other numbers of processes.

Lightning resumes in the middle of an epoch with the batches that are left only if the loader has a ``state_dict``; a
plain DataLoader starts at its first batch again, with or without our callbacks.
"""

import inspect
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.trainers import linux_only, run_script
from torch.utils.data import DataLoader

from lightning_lip import LipschitzMonitor, LipschitzPenalty


class StatefulLoader(DataLoader):
    """A loader that can go on in the middle of an epoch."""

    position = start = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for self.position, batch in enumerate(super().__iter__(), start=1):
            if self.position > start:
                yield batch

    def state_dict(self):
        return {"position": self.position % len(self)}

    def load_state_dict(self, state):
        self.start = state["position"]


# 48 samples in 12 batches of 4, for the steps 0 to 199.
SCRIPT = (
    "from torch.utils.data import DataLoader\n"
    + inspect.getsource(StatefulLoader)
    + """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightning.pytorch as L
folder, kill_at, ckpt_path, devices = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None, int(sys.argv[4])
from lightning_lip import LipschitzMonitor, LipschitzPenalty

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.world_size > 1:
            mine = torch.cat([p.grad.flatten() for p in self.parameters()])
            others = [torch.empty_like(mine) for _ in range(2)]
            torch.distributed.all_gather(others, mine)
            assert torch.equal(*others), "the ranks' gradients differ"

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

if __name__ == "__main__":
    torch.set_num_threads(1)
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sin().sum(1, keepdim=True))
    module = Net()
    sampler = None
    if devices > 1:  # every rank the whole data: the gradients are those of one process
        sampler = torch.utils.data.DistributedSampler(data, num_replicas=1, rank=0, shuffle=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_steps=200,
        max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            LipschitzPenalty(0.05, block_size=2, every_n_steps=3, warmup_steps=150),
            LipschitzMonitor(layers="net.2", block_size=2, name="own"),
            L.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=15, save_top_k=-1),
        ],
    )
    trainer.fit(module, StatefulLoader(data, batch_size=4, sampler=sampler), ckpt_path=ckpt_path)
    if trainer.global_rank == 0:
        torch.save([p.detach() for p in module.parameters()], folder + "/final.pt")
"""
)


@pytest.fixture
def train(tmp_path):
    """Run the script to step 200, or kill it at a step; return its folder."""

    def run(name, kill_at=-1, ckpt_path="", devices=1):
        folder = tmp_path / name
        folder.mkdir()
        done = run_script(SCRIPT, folder, kill_at, ckpt_path, devices)
        assert done.returncode == (0 if kill_at < 0 else -signal.SIGKILL), done.stderr[-3000:]
        return folder

    return run


def final(folder):
    return torch.load(folder / "final.pt", weights_only=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.timeout(700)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(train):
    whole = train("whole")
    killed = train("killed", kill_at=100)
    # Every 15 steps: the last one is of step 90, in the middle of the eighth epoch of 12 steps.
    assert sorted(os.listdir(killed)) == [f"step={s}.ckpt" for s in sorted(range(15, 100, 15), key=str)]
    resumed = train("resumed", ckpt_path=str(killed / "step=90.ckpt"))
    assert same(final(whole), final(resumed))


@pytest.mark.timeout(900)
@linux_only
def test_two_processes_resumed_by_one_or_two(train):
    # All ranks see all batches, so the averaged gradients are those of one process, up to the rounding of (a + a) / 2.
    whole = train("whole", devices=2)
    for devices in (1, 2):
        resumed = train(f"resumed by {devices}", ckpt_path=str(whole / "step=90.ckpt"), devices=devices)
        assert same(final(whole), final(resumed))


def test_mid_epoch_checkpoints_hold_the_state_of_their_step(fit, regression_data, tmp_path):
    def go_on(*more, **settings):
        callbacks = [LipschitzPenalty(0.05, block_size=1), LipschitzMonitor(name="watch"), *more]
        loader = StatefulLoader(regression_data.dataset, batch_size=4)
        return fit(*callbacks, data=loader, max_epochs=2, **settings)[0].parameters()

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trained = list(go_on(keep, enable_checkpointing=True))
    for step in (5, 10, 15, 20):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert checkpoint["callbacks"]["LipschitzPenalty"]["n_steps"] == step
        assert same(trained, go_on(ckpt_path=tmp_path / f"step={step}.ckpt", log_every_n_steps=4))
    # A checkpoint of before our callbacks came still serves; the run is then another one.
    del checkpoint["callbacks"]["LipschitzPenalty"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    assert not same(trained, go_on(ckpt_path=tmp_path / "without.ckpt", log_every_n_steps=4))


def test_checkpoint_of_two_callbacks_resumed_with_one(fit, tmp_path):
    _, trainer = fit(LipschitzPenalty(0.05, name="a"), LipschitzPenalty(0.05, name="b"))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    one = LipschitzPenalty(0.05, name="b")
    with pytest.warns(UserWarning, match=r"LipschitzPenalty\[a\]"):
        fit(one, max_epochs=2, ckpt_path=tmp_path / "two.ckpt")
    assert one.state_dict()["n_steps"] == 24


@pytest.mark.parametrize("block_size", [2, 8])
def test_other_layers_or_block_size_start_afresh_with_a_warning(fit, tmp_path, block_size):
    fit(LipschitzPenalty(block_size=4))[1].save_checkpoint(tmp_path / "old.ckpt")
    penalty = LipschitzPenalty(block_size=block_size, exclude="net.4")
    with pytest.warns(UserWarning, match="starts? afresh") as told:
        fit(penalty, max_epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert any("belong to no selected layer" in str(w.message) and "net.4" in str(w.message) for w in told)
