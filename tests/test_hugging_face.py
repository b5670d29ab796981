"""The callback of the recipe for Hugging Face's Trainer moves the weights as the penalty in the loss does."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lip import LipschitzRegularizer

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra `dev`")
pytest.importorskip("accelerate", reason="needs accelerate, of the extra `dev`")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "hugging-face.md"
N_STEPS, N_ACCUMULATED, BATCH = 3, 2, 4
OPTIONS = {"coefficient": 0.5, "penalty": "log"}


class Regressor(nn.Module):
    """A model as the Trainer wants it: labels in, the loss first in what comes out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


def data():
    x = torch.randn(N_STEPS * N_ACCUMULATED * BATCH, 3, generator=torch.Generator().manual_seed(1)).double()
    return x, x.sum(1, keepdim=True)


def trained_by_hand(max_norm):
    model = Regressor()
    regularizer = LipschitzRegularizer(model, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data()
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    for step in range(N_STEPS):
        for batch in batches[step * N_ACCUMULATED : (step + 1) * N_ACCUMULATED]:
            (model(*batch)["loss"] / N_ACCUMULATED).backward()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        regularizer.value().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained_by_trainer(folder, max_norm, callbacks):
    model = Regressor()
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=N_ACCUMULATED,
        max_steps=N_STEPS,
        max_grad_norm=max_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    samples = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=samples,
        callbacks=callbacks,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(samples, BATCH)  # in order
    trainer.train()
    return model, trainer.state.log_history


@pytest.fixture
def callback():
    first = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    namespace = {}
    exec(compile(first[1], str(PAGE), "exec"), namespace)
    return namespace["LipschitzCallback"](**OPTIONS)


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
def test_the_weights_end_where_the_penalty_in_the_loss_takes_them(callback, tmp_path, max_norm):
    model, history = trained_by_trainer(tmp_path, max_norm, [callback])
    expected = trained_by_hand(max_norm)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    without, _ = trained_by_trainer(tmp_path, max_norm, [])
    assert (model.net[0].weight - without.net[0].weight).abs().max() > 1e-2
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == N_STEPS
    assert all(entry["product"] > 0 and "penalty" in entry for entry in logged)
