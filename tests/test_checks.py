"""A wrong model or state is refused in words, wherever it is given."""

import math
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
    SpectralCaps,
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


OUT_OF_RANGE = [
    (LipschitzPenalty, {"coefficient": -1.0}, "`coefficient` to be a finite number of at least 0, got -1.0"),
    (LipschitzPenalty, {"coefficient": math.nan}, "`coefficient` to be a finite number of at least 0, got nan"),
    (LipschitzPenalty, {"penalty": "spectral"}, "Unknown penalty 'spectral': expected one of 'product'"),
    (LipschitzPenalty, {"penalty": "hinge_log", "target": 0.0}, "`target` to be a positive finite number"),
    (LipschitzPenalty, {"block_size": 0}, "`block_size` to be an integer of at least 1, got 0"),
    (LipschitzPenalty, {"n_iterations": 1.5}, "`n_iterations` to be an integer of at least 1, got 1.5"),
    (LipschitzPenalty, {"every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1"),
    (LipschitzPenalty, {"warmup_steps": -1}, "`warmup_steps` to be an integer of at least 0"),
    (LipschitzPenalty, {"seed": "a"}, "`seed` to be an integer of at least 0, got 'a'"),
    (LipschitzMonitor, {"seed": "a"}, "`seed` to be an integer of at least 0, got 'a'"),
    (LipschitzMonitor, {"n_iterations": 0}, "`n_iterations` to be an integer of at least 1, got 0"),
    (LipschitzConstraint, {"target": 0}, "`target` to be a positive finite number"),
    (LipschitzConstraint, {"initial_target": -1.0, "tighten_steps": 3}, "`initial_target` to be a positive finite num"),
    (LipschitzConstraint, {"initial_target": 2.0}, "`tighten_steps` to be an integer of at least 1"),
    (LipschitzConstraint, {"tighten_steps": 3}, "asks for the `initial_target`"),
    (LipschitzConstraint, {"method": "clip"}, "`method` to be one of"),
    (LipschitzConstraint, {"metric": "l2"}, "`metric` to be one of"),
    (LipschitzConstraint, {"every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1"),
    (LipschitzConstraint, {"block_size": True}, "`block_size` to be an integer of at least 1"),
    (LipschitzConstraint, {"seed": "a"}, "`seed` to be an integer of at least 0, got 'a'"),
    (LipschitzRegularizer, {"seed": "a"}, "`seed` to be an integer of at least 0, got 'a'"),
    (LipschitzProjector, {"seed": "a"}, "`seed` to be an integer of at least 0, got 'a'"),
    *(
        (MaxNorm, {"max_value": x}, "`max_value` to be a positive finite")
        for x in (0, -1.0, math.nan, math.inf, "1", True)
    ),
    (SpectralCaps, {"radius": 0.0}, "`radius` to be a positive finite number or 'mup', got 0.0"),
    (SpectralCaps, {"radius": "mu"}, "`radius` to be a positive finite number or 'mup', got 'mu'"),
    (SpectralCaps, {"radius": 1.0, "every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1"),
    (SpectralCaps, {"radius": 1.0, "unknown": "ignore"}, "`unknown` to be one of"),
    (CertifiedValidation, {"eps": ()}, "`eps` to be one or more finite numbers of at least 0"),
    (CertifiedValidation, {"eps": (0.1, 0.1)}, "`eps` to be distinct numbers"),
    (CertifiedValidation, {"eps": (-1.0,)}, "`eps` to be one or more finite numbers of at least 0"),
    (CertifiedValidation, {"task": "x"}, "`task` to be one of ('classification', 'regression'), got 'x'"),
    (CertifiedValidation, {"max_inputs": -1}, "`max_inputs` to be an integer of at least 0, got -1"),
    (NoisyValidation, {"noise_levels": ()}, "`noise_levels` to be one or more finite numbers of at least 0"),
    (NoisyValidation, {"noise_levels": (-0.1,)}, "`noise_levels` to be one or more finite numbers of at least 0"),
    (NoisyValidation, {"noise_levels": (0.1, 0.1)}, "`noise_levels` to be distinct numbers"),
    (NoisyValidation, {"noise_levels": (0.1, 0.1 + 1e-9)}, "first six digits"),
    (NoisyValidation, {"feature_min": 0.0}, "no feature_max"),
    (NoisyValidation, {"feature_max": 0.0}, "no feature_min"),
    (NoisyValidation, {"feature_min": 1.0, "feature_max": 0.0}, "feature_max >= feature_min"),
    (NoisyValidation, {"seed": -1}, "`seed` to be an integer of at least 0"),
]
NO_LEVELS = "`eps` to be a sequence of numbers, (0.1, 0.2) say, got"
NO_PAIR = "expected batch_to_xy to be a callable from a batch to (inputs, target), or None, got"
OF_ANOTHER_TYPE = [
    *((owner, {"name": 5}, "`name` to be a string or None") for owner in (LipschitzPenalty, LipschitzMonitor)),
    (LipschitzConstraint, {"name": 5}, "`name` to be a string or None"),
    *((CertifiedValidation, {"eps": eps}, f"{NO_LEVELS} {eps!r}") for eps in (0.1, "0.1", None, ["a"])),
    *((owner, {"batch_to_xy": 5}, NO_PAIR) for owner in (CertifiedValidation, NoisyValidation)),
    (LipschitzMonitor, {"certified": True}, "`certified` to be a CertifiedValidation((0.1,)), say, or None, got True"),
]
NEEDED = {
    LipschitzConstraint: {"target": 1.0},
    LipschitzRegularizer: {"model": network(), "coefficient": 1.0},
    LipschitzProjector: {"model": network(), "target": 1.0},
}


@pytest.mark.parametrize(
    ("error", "owner", "arguments", "said"),
    [*((ValueError, *row) for row in OUT_OF_RANGE), *((TypeError, *row) for row in OF_ANOTHER_TYPE)],
)
def test_wrong_arguments_are_told_at_once(error, owner, arguments, said):
    with pytest.raises(error, match=re.escape(said)):
        owner(**(NEEDED.get(owner, {}) | arguments))


def test_vectors_that_are_no_mapping_are_refused():
    with pytest.raises(TypeError, match="`vectors` to be a mapping from names of layers to singular vectors, got 5"):
        LipschitzRegularizer(network(), 1.0).load_state_dict({"vectors": 5})


@pytest.mark.parametrize("slack", [float("nan"), float("inf"), True, "0.1", None, 10**400])
def test_a_slack_that_is_no_finite_number_is_refused(slack):
    projector = LipschitzProjector(network(), 1.0)
    with pytest.raises(ValueError, match=r"`slack\['0'\]` to be a finite number"):
        projector.load_state_dict(projector.state_dict() | {"slack": {"0": slack}})
