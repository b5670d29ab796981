"""A wrong model or state is refused in words, wherever it is given."""

import re

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn

from lightning_lip import (
    CertifiedValidation,
    LipschitzConstraint,
    LipschitzMonitor,
    LipschitzPenalty,
    LipschitzProjector,
    LipschitzRegularizer,
    MaxNorm,
    NoisyValidation,
    certify,
    project,
    rebalance,
)
from lightning_lip.graph.bound import NetworkBound

EXAMPLE = torch.zeros(1, 4)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


TAKERS = {
    "LipschitzRegularizer": lambda model: LipschitzRegularizer(model, 1.0),
    "LipschitzRegularizer, traced": lambda model: LipschitzRegularizer(model, 1.0, example_input=EXAMPLE),
    "LipschitzProjector": lambda model: LipschitzProjector(model, 1.0),
    "project": lambda model: project(model, 1.0),
    "certify": lambda model: certify(model, EXAMPLE),
    "rebalance": lambda model: rebalance(model, EXAMPLE),
    "A bound over the traced graph": lambda model: NetworkBound.trace(model, EXAMPLE),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    ("model", "got"),
    [("x", "a str"), (None, "a NoneType"), (nn.Linear, "the class Linear"), ({"0.weight": EXAMPLE}, "a dict")],
)
def test_what_is_no_module_is_refused(taker, model, got):
    what = "LipschitzProjector" if taker == "project" else taker.partition(",")[0]
    said = f"{what} expected the model to be a torch.nn.Module, got {got}. Give the network itself"
    with pytest.raises(TypeError, match=re.escape(said)):
        TAKERS[taker](model)


OWNERS = {
    "LipschitzRegularizer": (lambda: LipschitzRegularizer(network(), 1.0), ["vectors"]),
    "LipschitzProjector": (lambda: LipschitzProjector(network(), 1.0), ["n_steps", "blocks", "others", "slack"]),
    "LipschitzConstraint": (lambda: LipschitzConstraint(1.0), ["n_steps", "projector"]),
    "LipschitzPenalty": (lambda: LipschitzPenalty(), ["n_steps", "regularizer"]),
}


@pytest.mark.parametrize("owner", OWNERS)
def test_a_state_without_its_keys_is_refused(owner):
    make, keys = OWNERS[owner]
    loaded = make()
    for state, shown in (
        ({}, []),
        (network().state_dict(), [f"{i}.{key}" for i in (0, 2) for key in ("weight", "bias")]),
    ):
        said = (
            f"{owner} expected a state with the keys {keys}, got one with {shown}: {keys} "
            f"{'is' if len(keys) == 1 else 'are'} missing. Give what {owner}.state_dict() returned, or load nothing"
        )
        with pytest.raises(ValueError, match=re.escape(said)):
            loaded.load_state_dict(state)
    with pytest.raises(ValueError, match=re.escape(f"{['0', '1', '2', '3', '4', '...']}")):
        loaded.load_state_dict({str(i): i for i in range(6)})
    for wrong in (None, [], "state.pt"):
        said = f"{owner} expected a state with the keys {keys}, got a {type(wrong).__name__}. Give what"
        with pytest.raises(TypeError, match=re.escape(said)):
            loaded.load_state_dict(wrong)
    # Its own, and what a later version may add, are taken.
    loaded.load_state_dict(make().state_dict() | {"more": 1})


def test_a_refused_state_changes_nothing():
    projector = LipschitzProjector(network(), 1.0)
    projector.step()
    before = projector.state_dict()
    with pytest.raises(ValueError, match="'blocks', 'others', 'slack'] are missing"):
        projector.load_state_dict({"n_steps": 7})
    after = projector.state_dict()
    assert before["n_steps"] == after["n_steps"] == 1
    assert all(torch.equal(block, after["blocks"][name]) for name, block in before["blocks"].items())


@pytest.mark.parametrize("states", [{}, {"LipschitzConstraint": {}}, None])
def test_checkpoints_without_our_state_go_on(make_module, make_trainer, regression_data, tmp_path, states):
    saved = make_trainer(lightning, max_epochs=1)
    saved.fit(make_module(lightning), regression_data)
    saved.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    checkpoint["callbacks"] = states
    torch.save(checkpoint, tmp_path / "old.ckpt")
    constraint = LipschitzConstraint(0.1)
    resumed = make_trainer(lightning, max_epochs=2, callbacks=[constraint])
    resumed.fit(make_module(lightning), regression_data, ckpt_path=tmp_path / "old.ckpt")
    assert constraint.state_dict()["n_steps"] == 12


@pytest.mark.parametrize("callback", [LipschitzMonitor, NoisyValidation])
def test_a_state_of_something_else_is_refused_where_an_empty_one_is_right(callback):
    callback().load_state_dict({})
    with pytest.raises(ValueError, match=rf"{callback.__name__} expected a state .*, got one with \['foo'\]"):
        callback().load_state_dict({"foo": 1})


WRONG = {
    "seed": (
        ValueError,
        "`seed` to be an integer of at least 0, got 'a'",
        [
            lambda: LipschitzPenalty(seed="a"),
            lambda: LipschitzMonitor(seed="a"),
            lambda: LipschitzConstraint(1.0, seed="a"),
            lambda: LipschitzRegularizer(network(), 1.0, seed="a"),
            lambda: LipschitzProjector(network(), 1.0, seed="a"),
        ],
    ),
    "name": (
        TypeError,
        "`name` to be a string or None, got",
        [
            lambda: LipschitzPenalty(name=5),
            lambda: LipschitzMonitor(name=5),
            lambda: LipschitzConstraint(1.0, name=5),
        ],
    ),
    "eps": (
        TypeError,
        "`eps` to be a sequence of numbers, (0.1, 0.2) say, got 0.1",
        [lambda: CertifiedValidation(0.1)],
    ),
    "eps as text": (
        TypeError,
        "`eps` to be a sequence of numbers",
        [
            lambda: CertifiedValidation("0.1"),
            lambda: CertifiedValidation(None),
            lambda: CertifiedValidation(["a"]),
        ],
    ),
    "batch_to_xy": (
        TypeError,
        "expected batch_to_xy to be a callable from a batch to (inputs, target), or None, got",
        [
            lambda: CertifiedValidation(batch_to_xy=5),
            lambda: NoisyValidation(batch_to_xy=5),
        ],
    ),
    "certified": (
        TypeError,
        "`certified` to be a CertifiedValidation((0.1,)), say, or None, got True",
        [
            lambda: LipschitzMonitor(certified=True),
        ],
    ),
    "max_value": (ValueError, "`max_value` to be a positive finite number, got True", [lambda: MaxNorm(True)]),
    "vectors": (
        TypeError,
        "`vectors` to be a mapping from names of layers to singular vectors, got 5",
        [
            lambda: LipschitzRegularizer(network(), 1.0).load_state_dict({"vectors": 5}),
        ],
    ),
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments_are_told_at_once(argument):
    error, said, calls = WRONG[argument]
    for call in calls:
        with pytest.raises(error, match=re.escape(said)):
            call()
