"""Two processes: weights stay the same over ranks, or the reason why not is told."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch, lightning as L
from torch import nn
from lightning_lip import LipschitzPenalty

case = sys.argv[1]

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        norm = [nn.BatchNorm2d(3)] if case == "batch norm" else []
        head = [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 1)]
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), *norm, *head)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if case == "sizes" and self.global_rank == 1:
            batch = batch[..., :5]
        return self.net(batch).square().mean()

    def on_train_end(self):
        mine = torch.cat([p.detach().flatten() for p in self.parameters()])
        others = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(others, mine)
        assert torch.equal(*others), "the ranks have drifted apart"
        if self.global_rank == 0:
            print("SAME")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

if __name__ == "__main__":
    torch.set_num_threads(1)
    example = torch.zeros(1, 1, 6, 6) if case in ("batch norm", "traced") else None
    images = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.DataLoader(images, batch_size=4)
    L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=50, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LipschitzPenalty(0.1, example_input=example)],
    ).fit(Net(), data)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("product", "SAME"),
        ("traced", "SAME"),
        ("sizes", "inputs of different sizes on different ranks"),
        ("batch norm", "running statistics of ['net.1'], which differ between ranks"),
    ],
)
def test_two_ranks(tmp_path, case, said):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, case], capture_output=True, text=True, timeout=200, check=False)
    assert said in done.stdout + done.stderr, done.stderr[-3000:]
    assert (done.returncode == 0) == (said == "SAME")
