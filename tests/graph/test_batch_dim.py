"""Networks without a batch: the whole input is one sample (graph networks, unbatched inputs)."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lip import (
    CertifiedValidation,
    LipschitzMonitor,
    LipschitzPenalty,
    LipschitzRegularizer,
    certify,
    project,
)
from lightning_lip.graph.bound import NetworkBound, bound_of

N = 6
SOURCE = torch.tensor([0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 0, 0, 3])
TARGET = torch.tensor([1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 4, 5, 3, 0])


def adjacency() -> torch.Tensor:
    matrix = torch.zeros(N, N)
    matrix[TARGET, SOURCE] = 1
    return matrix


def normalised_adjacency() -> torch.Tensor:
    """The propagation of Kipf and Welling: D^-1/2 (A + I) D^-1/2."""
    matrix = adjacency() + torch.eye(N)
    degrees = matrix.sum(1)
    return matrix / degrees.sqrt()[:, None] / degrees.sqrt()


class Convolutions(nn.Module):
    """Two layers of a graph network with its propagation held in a buffer."""

    def __init__(self, propagation: torch.Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("propagation", propagation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.propagation @ self.first(x))
        return self.propagation @ self.second(x)


class Pooled(Convolutions):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean(0)


def jacobian_norm(model: nn.Module, x: torch.Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(model.double(), x.double())
    return float(torch.linalg.matrix_norm(jacobian.flatten(-x.dim()).flatten(0, -2), 2))


def test_the_norm_is_over_all_nodes_together() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("propagation", normalised_adjacency())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.propagation @ self.layer(x)

    model, x = Linear(), torch.randn(N, 4)
    result = certify(model, x, data=x, batch_dim=None)
    exact = jacobian_norm(model, x)
    assert result.upper == pytest.approx(exact, rel=1e-6)
    assert result.lower == pytest.approx(exact, rel=1e-6)


def test_a_graph_network_is_refused_with_a_batch_and_bounded_without() -> None:
    model, x = Pooled(normalised_adjacency()), torch.randn(N, 4)
    with pytest.raises(ValueError, match="batch_dim=None"):
        certify(model, x)
    result = certify(model, x, data=[x, 2 * x], batch_dim=None)
    assert result.certified
    assert result.lower is not None
    assert jacobian_norm(model, x) <= result.lower * (1 + 1e-9) <= result.upper


def test_the_mean_over_nodes_counts_as_one_over_the_root_of_their_number() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(0)

    assert certify(Mean(), torch.zeros(16, 3), batch_dim=None).upper == pytest.approx(0.25)
    assert "mixes the samples" in certify(Mean(), torch.zeros(16, 3)).refused[0]


UNBATCHED = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(48, 4)), (2, 6, 6)),
    # Of an unbatched map the normalisation takes the rows for channels: it cannot be fused with the kernel's rows.
    "normalised rows": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(4)), (2, 6)),
    "normalised images": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (3, 2, 5, 5)),
    "vector": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "softmax over nodes": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(0)), (5, 3)),
    "one normalised vector": (lambda: nn.LayerNorm(4, eps=0.1), (4,)),
    "flip of the first axis": (lambda: Flip(), (4, 3)),
    "side by side along the first axis": (lambda: Doubled(), (4, 3)),
    "sorted nodes": (lambda: Of(lambda x: x.sort(0)[0]), (5, 3)),
    "summed nodes": (lambda: Of(lambda x: x.cumsum(0)), (5, 3)),
    "products with nodes": (lambda: Of(lambda x: torch.einsum("nf,nk->fk", x, WEIGHT.to(x))), (5, 3)),
    "distances between nodes": (lambda: Of(lambda x: torch.cdist(x, ANCHORS.to(x))), (5, 3)),
    "transform along the nodes": (lambda: Of(lambda x: torch.view_as_real(torch.fft.rfft(x, dim=0))), (5, 3)),
    "recurrence": (lambda: Of(nn.RNN(3, 2, batch_first=True), lambda y: y[0]), (2, 4, 3)),
}
WEIGHT, ANCHORS = torch.linspace(-1, 1, 20).view(5, 4), torch.linspace(5, 7, 6).view(2, 3)


class Of(nn.Module):
    """A function, or a module and what is taken of its output."""

    def __init__(self, function, taken=lambda y: y) -> None:
        super().__init__()
        self.function, self.taken = function, taken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.taken(self.function(x))


class Flip(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(0)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x[:2], 3 * x])


@pytest.mark.parametrize("name", UNBATCHED)
def test_an_unbatched_input_is_bounded(name: str) -> None:
    torch.manual_seed(0)
    build, shape = UNBATCHED[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_var, 0.1, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
    x = torch.randn(shape)
    result = certify(model, x, batch_dim=None)
    assert result.certified, result.refused
    exact = max(jacobian_norm(model, s * torch.randn(shape)) for s in (0.1, 1.0, 3.0))
    assert exact <= result.upper * (1 + 1e-6)


def test_the_concatenation_of_all_rows_is_exact() -> None:
    exact = jacobian_norm(Doubled(), torch.randn(4, 3))
    assert certify(Doubled(), torch.zeros(4, 3), batch_dim=None).upper == pytest.approx(exact)


def test_a_contradiction_is_found_without_a_batch_too() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x if self.calls % 2 else 2 * x

    result = certify(Halved(), torch.ones(3), batch_dim=None)
    assert not result.certified
    assert "other values than its traced graph" in result.refused[0]


@pytest.mark.parametrize("wrong", [1, -1, True, "0", 0.5])
def test_another_batch_dimension_is_refused(wrong: object) -> None:
    x, model = torch.zeros(2, 3), nn.Linear(3, 2)
    for call in (
        lambda: certify(model, x, batch_dim=wrong),
        lambda: NetworkBound.trace(model, x, wrong),
        lambda: LipschitzRegularizer(model, 1.0, example_input=x, batch_dim=wrong),
        lambda: LipschitzPenalty(batch_dim=wrong),
        lambda: CertifiedValidation(batch_dim=wrong),
    ):
        with pytest.raises(ValueError, match="batch_dim"):
            call()


def test_an_input_without_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="elements"):
        certify(nn.Linear(3, 2), torch.zeros(0, 3), batch_dim=None)


def test_regulariser_and_projector_take_the_whole_input() -> None:
    model, x = Pooled(normalised_adjacency()), torch.randn(N, 4)
    regularizer = LipschitzRegularizer(model, 1.0, penalty="log", example_input=x, batch_dim=None)
    regularizer.add_grad_()
    assert regularizer.bound_kind == "bound"
    assert model.first.weight.grad is not None
    assert project(model, 0.01, example_input=x, batch_dim=None).bound <= 0.01
    assert certify(model, x, batch_dim=None).upper <= 0.01
    assert bound_of(model, x, batch_dim=None)[0].kind == "bound"


class NodeClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Convolutions(normalised_adjacency())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_callbacks_bound_the_network_of_a_graph() -> None:
    torch.manual_seed(0)
    x, classes = torch.randn(N, 4), torch.arange(N) % 3
    data = DataLoader(TensorDataset(x, classes), batch_size=N)
    model = NodeClassifier()
    callbacks = [
        LipschitzPenalty(1e-3, example_input=x, batch_dim=None),
        LipschitzMonitor(certified=CertifiedValidation(batch_dim=None)),
    ]
    trainer = Trainer(
        max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, data, data)
    upper = certify(model, x, batch_dim=None).upper
    assert float(trainer.callback_metrics["lipschitz/certified"]) == pytest.approx(upper, rel=1e-5)
    assert float(trainer.callback_metrics["lipschitz/lower"]) <= upper
    assert float(trainer.callback_metrics["lipschitz/bound"]) == pytest.approx(upper, rel=0.1)


def test_the_worst_error_over_all_nodes_shares_one_perturbation() -> None:
    class Regressor(NodeClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.second = nn.Linear(8, 1)

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

    x, y = torch.randn(N, 4), torch.randn(N, 1)
    data = DataLoader(TensorDataset(x, y), batch_size=N)
    model = Regressor()
    trainer = Trainer(
        callbacks=[CertifiedValidation((0.5,), task="regression", batch_dim=None)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    (metrics,) = trainer.validate(model, data, verbose=False)
    # The outputs of all nodes move by 0.5 L together in norm, so that their mean moves by 0.5 L / sqrt(6) at most.
    mae = (model(x) - y).abs().mean().item()
    expected = mae + 0.5 * certify(model, x, batch_dim=None).upper / N**0.5
    assert metrics["val/certified_worst_case_mae/eps=0.5"] == pytest.approx(expected, rel=1e-4)
