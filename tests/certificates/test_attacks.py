"""Certified samples against projected gradient descent; ``tests/support/attacks.py`` runs it on more of them."""

from support.attacks import attack


def test_no_certified_sample_is_broken():
    rows = attack(samples=300, steps=200)
    certified = {form: sum(row[3] for row in rows if row[2] == form) for form in ("pairwise", "global")}
    assert certified["pairwise"] > certified["global"] > 300
    assert sum(row[4] for row in rows) == 0
    # The attack is none that finds nothing.
    assert min(row[5] for row in rows if row[1] == 0.5) > 30
