"""What a monitor remembers of its layers, and what a checkpoint holds of that."""

from torch import nn

from lightning_lip import LipschitzRegularizer
from lightning_lip.callbacks.monitoring.source import Source


def test_a_history_of_another_number_of_layers_is_begun_anew():
    source = Source("lipschitz", None, None)
    source.remember(3, [1.0], [0.0])
    source.remember(7, [1.0, 2.0], [0.0, 0.5])
    assert source.history.state() == [[7], [[1.0, 2.0]], [[0.0, 0.5]], 1, 1]


def test_first_and_last_values_go_through_a_checkpoint():
    layer = nn.Linear(3, 2)
    source = Source("lipschitz", LipschitzRegularizer(layer, 1.0), None)
    before = source.measure()[0]
    layer.weight.data.mul_(2)
    source.measure()
    restored = Source("lipschitz", LipschitzRegularizer(layer, 1.0), None)
    restored.restore(source.state())
    assert restored.first == before
    assert restored.last == source.last != before
    layer.weight.data.mul_(2)
    restored.measure()
    assert restored.first == before
    # A checkpoint of an earlier version has no such values.
    restored.restore(source.state()[:5])
    assert restored.first == restored.last == {}
