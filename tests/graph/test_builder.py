import pytest

from lightning_lip.graph.builder import RULES, rule


def test_an_operation_has_one_rule():
    before = dict(RULES)
    with pytest.raises(ValueError, match=r"one rule for each operation, got a second one for \['linear', 'mul'\]"):
        rule("mul", "an operation without a rule", "linear")(lambda builder, node, arguments: None)
    assert before == RULES
