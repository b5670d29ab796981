"""Graph networks of a fixed graph: GCN, SAGE and GIN, by index operations and by matrices."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lip import certify

N = 6
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 0, 0, 3], [1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 4, 5, 3, 0]])


def index_add(messages: Tensor, targets: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add(0, targets, messages)


def scatter_add(messages: Tensor, targets: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_add(0, targets[:, None].expand_as(messages), messages)


class Layer(nn.Module):
    """Sums what the neighbours send, each edge with a weight."""

    def __init__(self, weights: Tensor, add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("edges", EDGES)
        self.register_buffer("weights", weights)
        self.add = add

    def aggregate(self, x: Tensor) -> Tensor:
        messages = x.index_select(0, self.edges[0]) * self.weights[:, None]
        return self.add(messages, self.edges[1], x)


class GCN(Layer):
    """Kipf and Welling: D^-1/2 A D^-1/2 X W."""

    def __init__(self, n_in: int, n_out: int, add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        degrees = torch.bincount(EDGES[1]).float()
        super().__init__((degrees[EDGES[0]] * degrees[EDGES[1]]).rsqrt(), add)
        self.layer = nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.layer(x))


class SAGE(Layer):
    """Hamilton et al.: X W_1 + D^-1 A X W_2."""

    def __init__(self, n_in: int, n_out: int, add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(torch.bincount(EDGES[1]).float().reciprocal()[EDGES[1]], add)
        self.own, self.others = nn.Linear(n_in, n_out), nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x) + self.others(self.aggregate(x))


class GIN(Layer):
    """Xu et al.: MLP((1 + eps) X + A X)."""

    def __init__(self, n_in: int, n_out: int, add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(torch.ones(EDGES.shape[1]), add)
        self.network = nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(n_out, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(1.5 * x + self.aggregate(x))


def measured(model: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(model, x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))


@pytest.mark.parametrize("add", [index_add, scatter_add])
@pytest.mark.parametrize("kind", [GCN, SAGE, GIN])
def test_two_layers_are_bounded(kind: type[nn.Module], add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(4, 8, add), nn.ReLU(), kind(8, 3, add)), torch.randn(N, 4)
    result = certify(model, x, data=x, batch_dim=None)
    assert result.certified, result.refused
    assert measured(model, x) <= result.lower * (1 + 1e-5)
    # Sums over at most three neighbours are bounded as gathering and adding, each by the root of their numbers.
    assert result.lower <= result.upper <= 50 * result.lower


@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
def test_a_propagation_held_as_a_matrix_is_exact(layout: str) -> None:
    matrix = torch.zeros(N, N)
    matrix[EDGES[1], EDGES[0]] = torch.rand(EDGES.shape[1], generator=torch.Generator().manual_seed(0))

    class Propagated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            held = {"dense": matrix, "coo": matrix.to_sparse(), "csr": matrix.to_sparse_csr()}[layout]
            self.register_buffer("propagation", held)
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return self.propagation @ h if layout != "csr" else torch.sparse.mm(self.propagation, h)

    model, x = Propagated(), torch.randn(N, 4)
    result = certify(model, x, batch_dim=None)
    assert result.certified, result.refused
    assert result.upper == pytest.approx(measured(model, x), rel=1e-5)


def layers_of_geometric() -> dict[str, Callable[[int, int], nn.Module]]:
    geometric = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    return {
        "GCNConv": lambda m, n: geometric.GCNConv(m, n),
        "SAGEConv": lambda m, n: geometric.SAGEConv(m, n),
        "GINConv": lambda m, n: geometric.GINConv(nn.Sequential(nn.Linear(m, n), nn.ReLU(), nn.Linear(n, n))),
        "GraphConv": lambda m, n: geometric.GraphConv(m, n),
    }


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GINConv", "GraphConv"])
def test_layers_of_torch_geometric_are_bounded(name: str) -> None:
    make = layers_of_geometric()[name]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = make(4, 8), make(8, 3)
            self.register_buffer("edges", EDGES)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x, self.edges).relu(), self.edges)

    torch.manual_seed(0)
    model, x = Network(), torch.randn(N, 4)
    result = certify(model, x, data=x, batch_dim=None)
    assert result.certified, result.refused
    assert measured(model, x) <= result.lower * (1 + 1e-5) <= result.upper * (1 + 1e-5)
