"""The bound of a selection: parameters that are replaced after the trace keep their part in it."""

import torch
from torch import nn

from lightning_lip import LipschitzRegularizer


class Centred(nn.Module):
    """A linear layer with a batch normalisation, and a weight whose rows are centred in forward."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.raw = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return nn.functional.linear(self.norm(self.layer(x)), self.raw - self.raw.mean(dim=1, keepdim=True))


def test_parameters_replaced_after_the_trace_are_penalised():
    torch.manual_seed(0)
    model = Centred().eval()
    regularizer = LipschitzRegularizer(model, 1.0, example_input=torch.ones(2, 6))
    regularizer.add_grad_()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {"layer.weight", "norm.weight", "raw"} <= set(expected)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert all(p.grad is None for p in model.parameters())
    regularizer.add_grad_(advance=False)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    model.zero_grad()
    regularizer.value().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in expected)
