"""The page at the end of training, of networks with more layers than a page has lines."""

from torch import nn

from lightning_lip import LipschitzRegularizer
from lightning_lip.callbacks.monitoring.source import Source
from lightning_lip.callbacks.monitoring.summary import MAX_ROWS, summary_of


def test_a_layer_that_was_not_measured_has_a_dash():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        nn.init.eye_(layer.weight)
    source = Source("lipschitz", LipschitzRegularizer(model, 1.0, layers="1"), None)
    source.measure()
    source.regularizer = LipschitzRegularizer(model, 1.0)
    rows = summary_of(source, 7).splitlines()[2:4]
    assert [row.split() for row in rows] == [["0", "-"], ["1", "1", "->", "1"]]


def page(n_layers):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(n_layers)))
    for index, layer in enumerate(model):
        nn.init.eye_(layer.weight)
        layer.weight.data *= 1 + index % 2  # the norm of every other layer is 1, its logarithm 0
    source = Source("lipschitz/a", LipschitzRegularizer(model, 1.0), None)
    source.measure()
    return summary_of(source, 7).splitlines()


def test_a_short_network():
    head, titles, *rows = page(3)
    assert "after 7 steps" in head
    assert titles.split() == ["layer", "spectral", "norm"]
    assert [row.split() for row in rows] == [
        ["0", "1", "->", "1"],
        ["1", "2", "->", "2"],
        ["2", "1", "->", "1"],
        ["lipschitz/a/product", "2", "->", "2"],
        ["lipschitz/a/product_upper", "2", "->", "2"],
    ]


def test_a_long_network_shows_the_layers_that_matter():
    lines = page(2 * MAX_ROWS)
    shown = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]
    assert shown == list(range(1, 2 * MAX_ROWS, 2))
    assert f"and {MAX_ROWS} layers with smaller parts of the logarithm" in lines[-3]
