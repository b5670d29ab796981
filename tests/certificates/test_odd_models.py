"""No raw exception: whatever a forward pass does, certify returns a result or says in words what is wrong."""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lip import LipschitzPenalty, certify

X = torch.linspace(-1, 1, 8).view(2, 4)


class Odd(nn.Module):
    """A layer inside a forward pass that is given."""

    def __init__(self, function: Callable[[nn.Module, Any], Any], **buffers: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


class OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise KeyError("no gradient")


@dataclasses.dataclass
class Output:
    value: Tensor


class KeywordsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, *, x: Tensor, scale: float = 2.0) -> Tensor:
        return scale * self.layer(x)


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self(x)


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    return layer


def raises(error: Exception) -> Callable[[nn.Module, Any], Any]:
    def function(module: nn.Module, x: Any) -> Any:
        raise error

    return function


def deep(module: nn.Module, x: Tensor, depth: int = 300) -> Tensor:
    return x if depth == 0 else deep(module, torch.relu(x), depth - 1)


CERTIFIED = {
    "hooks": hooked,
    "keywords": KeywordsOnly,
    "dict": lambda: Odd(lambda m, x: {"a": m.layer(x), "b": None}),
    "nested": lambda: Odd(lambda m, x: (m.layer(x), (None, [x, {"c": x.relu()}]))),
    "in place": lambda: Odd(lambda m, x: m.layer(x.mul_(2))),
    "attribute": lambda: Odd(lambda m, x: setattr(m, "last", m.layer(x)) or m.last),
    "deep": lambda: Odd(deep),
    "compiled": lambda: nn.Sequential(torch.compile(nn.Linear(4, 4)), nn.ReLU()),
    "mask of a buffer": lambda: Odd(lambda m, x: m.layer(x)[:, m.mask], mask=torch.tensor([True, False, True, True])),
    "nonzero of a buffer": lambda: Odd(
        lambda m, x: F.linear(m.layer(x)[:, m.mask.nonzero()[:, 0]].relu(), m.layer.weight[:, :3]),
        mask=torch.tensor([1, 0, 1, 1]),
    ),
    "no outputs": lambda: Odd(lambda m, x: m.layer(x)[:, :0]),
}  # fmt: skip


@pytest.mark.parametrize("name", CERTIFIED)
def test_an_odd_model_is_certified(name: str) -> None:
    model = CERTIFIED[name]()
    result = certify(model, {"x": X} if name == "keywords" else X)
    assert result.certified, result.refused


REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "control flow": (lambda: Odd(lambda m, x: m.layer(x) if x.sum() > 0 else x), "cannot be traced"),
    "a number": (lambda: Odd(lambda m, x: m.layer(x)[: int(x.max().item()) + 1]), "cannot be traced"),
    "NumPy": (lambda: Odd(lambda m, x: m.layer(torch.from_numpy(np.tanh(x.numpy())))), "cannot be traced"),
    "nonzero": (lambda: Odd(lambda m, x: m.layer(x)[x[:, 0].nonzero()[:, 0]]), r"aten.nonzero.default: an index jumps"),
    "masked_select": (lambda: Odd(lambda m, x: torch.masked_select(m.layer(x), x > 0)), r"\(the model itself\)"),
    "unique": (lambda: Odd(lambda m, x: m.layer(x) + torch.unique(x).sum()), "the size of its result"),
    "repeat": (lambda: Odd(lambda m, x: m.layer(x).repeat_interleave((x[:, 0] > 0) + 1, dim=0)), "aten"),
    "dataclass": (lambda: Odd(lambda m, x: Output(m.layer(x))), "cannot be traced"),
    "generator": (lambda: Odd(lambda m, x: (y for y in (x,))), "cannot be traced"),
    "complex": (lambda: Odd(lambda m, x: torch.view_as_complex(m.layer(x).view(2, 2, 2)).angle()), "angle"),
    "random": (lambda: Odd(lambda m, x: m.layer(x) + torch.rand_like(x)), "rand_like"),
    "own random": (lambda: Odd(lambda m, x: m.layer(x) * random.random()), "other values"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.ReLU()), "^0: compiled by torch.jit"),
    "jit traced": (lambda: nn.Sequential(torch.jit.trace(nn.Linear(4, 4), X), nn.ReLU()), "^0: compiled by torch.jit"),
    "copied": (lambda: Odd(lambda m, x: __import__("copy").deepcopy(m.layer)(x)), "cannot be traced"),
    "gradient": (lambda: Odd(lambda m, x: torch.func.grad(lambda y: m.layer(y).sum())(x)), ""),
    "sparse": (lambda: Odd(lambda m, x: torch.sparse.mm(x.to_sparse(), m.layer.weight)), "to_sparse"),
    "lazy": (lambda: nn.LazyLinear(3), "cannot be traced"),
    "branches": (
        lambda: Odd(lambda m, x: torch.cond(x.sum() > 0, lambda y: y.relu(), lambda y: -y, (m.layer(x),))),
        "control-flow operator",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_an_odd_model_is_refused_in_words(name: str) -> None:
    build, words = REFUSED[name]
    result = certify(build(), X)
    assert not result.certified
    assert re.search(words, result.refused[0]), result.refused


ERRORS = (ZeroDivisionError("x"), KeyError("x"), AssertionError("x"), StopIteration(), NotImplementedError("x"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_forward_pass_raises_is_a_worded_error(error: Exception) -> None:
    model = Odd(raises(error))
    with pytest.raises(ValueError, match=rf"forward pass fails on what was given.*{type(error).__name__}"):
        certify(model, X)
    with pytest.raises(ValueError, match=rf"Jacobian of Odd cannot be measured.*{type(error).__name__}"):
        certify(model, X, data=X)


def test_an_endless_recursion_is_a_worded_error() -> None:
    with pytest.raises(ValueError, match="RecursionError"):
        certify(Endless(), X)


def test_what_a_backward_pass_raises_is_a_worded_error() -> None:
    with pytest.raises(ValueError, match=r"cannot be measured.*KeyError"):
        certify(Odd(lambda m, x: OwnBackward.apply(m.layer(x))), X, data=X)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(X.to_sparse(), ValueError), ([X.to_sparse()], ValueError), ([X.to(torch.complex64)], ValueError)],
)
def test_data_that_cannot_be_measured_on_is_a_worded_error(bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`data`"):
        certify(Odd(lambda m, x: m.layer(x)), X, data=bad)


@pytest.mark.parametrize("name", ["no outputs", "no inputs"])
def test_a_jacobian_without_entries_has_norm_zero(name: str) -> None:
    model, x = (CERTIFIED[name](), X) if name == "no outputs" else (nn.Linear(0, 3), torch.zeros(2, 0))
    assert certify(model, x, data=x).lower == 0


class Spectral(nn.Module):
    """The layer of a Fourier neural operator: complex weights on the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        kept = torch.zeros(len(x), 5, spectrum.shape[-1], dtype=torch.cfloat)
        kept[..., :4] = torch.einsum("bix,iox->box", spectrum[..., :4], self.weight)
        return torch.fft.irfft(kept, n=x.shape[-1])


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Attention(), (1, 6, 8)), (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (6, 8)), (Spectral(), (3, 12))],
)
def test_many_outputs_of_attention_and_fourier_layers_are_measured(model: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    lower = certify(model, x, data=x).lower
    # One Jacobian a sample, in fp32.
    exact = []
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda y: model.eval()(y[None])[0], sample)
        exact.append(float(torch.linalg.matrix_norm(jacobian.reshape(-1, sample.numel()), 2)))
    assert 0.98 * max(exact) <= lower <= max(exact) * (1 + 1e-4)


class Selecting(LightningModule):
    """A network with a size that depends on the data, as layers of graph networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.example_input_array = X

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[(x[:, 0] > -2).nonzero()[:, 0]])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_size_that_depends_on_the_data_does_not_end_a_fit() -> None:
    trainer = Trainer(
        max_steps=2, callbacks=[LipschitzPenalty(1e-3)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="the product of the layers does instead"):
        trainer.fit(Selecting(), DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    assert float(trainer.callback_metrics["lipschitz/product"]) > 0
