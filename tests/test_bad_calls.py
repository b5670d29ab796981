"""Every public argument with every kind of wrong value: taken where that is legitimate, else refused by name.

One pool of values goes through every argument of every public callable. What an argument may take of the pool is its
kind's own short list; for all others there must be a TypeError or ValueError whose message has the argument's name.
Pools of text and of YAML's values go through the options of the command, in one line and status 2, and through the
arguments of callbacks and of a module with the mixin.
"""

import contextlib
import functools
import importlib
import inspect
import math
import re
import warnings
from argparse import ArgumentError
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from support.commands import run_cli
from torch import nn

import lightning_lip
from lightning_lip import audit, bench, callbacks, certificates, cli, constants, metrics, paper, projection, rebalancing
from lightning_lip.certificates import certified_matrix_norm
from lightning_lip.penalty.penalties import get_penalty

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # quantised tensors are deprecated
    QUANTISED = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    SPARSE = {f"sparse {n}-d": torch.ones([2] * n).to_sparse() for n in (1, 2)}
    CSR = torch.ones(2, 2).to_sparse_csr()


class OfTheTest(nn.Module):
    """A type to register a constant for."""


POOL = {
    "None": None,
    "True": True,
    "'3'": "3",
    "''": "",
    "b'3'": b"3",
    "-1": -1,
    "0": 0,
    "3": 3,
    "0.5": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "10**400": 10**400,
    "Fraction": Fraction(1, 2),
    "1j": 1j,
    "[]": [],
    "['a']": ["a"],
    "['0.1']": ["0.1"],
    "[nan]": [math.nan],
    "[True]": [True],
    "[10**400]": [10**400],
    "[None]": [None],
    "[0.5]": [0.5],
    "[[1.0], [2.0, 3.0]]": [[1.0], [2.0, 3.0]],
    "{}": {},
    "{'a': 1}": {"a": 1},
    "object": object(),
    "a class": OfTheTest,
    "a module": nn.Linear(2, 2),
    "a function of one": lambda one: one,
    "Ellipsis": ...,
    "np.float64": np.float64(0.5),
    "np nan": np.float32("nan"),
    "np.int64": np.int64(3),
    "np.bool": np.bool_(True),
    "np 1-d": np.full(2, 0.5),
    "np 2-d": np.full((2, 2), 0.5),
    "np text": np.array(["a", "b"]),
    "np object": np.array([None, "x"], dtype=object),
    "np complex": np.full(2, 1j),
    "0-d": torch.tensor(0.5),
    "0-d nan": torch.tensor(math.nan),
    "1-d": torch.full((2,), 0.5),
    "2-d": torch.full((2, 2), 0.5),
    "int": torch.ones(2, dtype=torch.int64),
    "bool": torch.ones(2, dtype=torch.bool),
    "bool 0-d": torch.tensor(True),
    "complex": torch.full((2, 2), 1j),
    "empty": torch.empty(0),
    "empty 2-d": torch.empty(0, 2),
    "meta": torch.ones(2, 2, device="meta"),
    "meta 0-d": torch.ones((), device="meta"),
    "quantised": QUANTISED,
    "csr": CSR,
    **SPARSE,
}

REALS = {"0", "3", "0.5", "Fraction", "np.float64", "np.int64"}
FLAT = {"[0.5]"}
KINDS = {
    "model": {"a module"},
    "count": {"3"},
    "count from 0": {"0", "3"},
    "positive": REALS - {"0"},
    "knee": REALS - {"0"} | {"None", "inf"},
    "at least 0": REALS,
    "number": REALS | {"-1"},
    "numbers": FLAT | {"np 1-d", "1-d", "int"},
    "positive numbers": FLAT | {"np 1-d", "1-d", "int"},
    "flag": {"True"},
    "text": {"'3'", "''"},
    "name": {"None", "'3'", "''"},
    "choice": set(),
    "batch dimension": {"None", "0"},
    "selection": {"None"},
    "names": {"None", "'3'", "''", "['a']", "['0.1']", "np text", "a module", "a class"},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


EXAMPLE = torch.zeros(1, 3)
ANYTHING = set(POOL)
SELECTING = {"layers": "selection", "exclude": "selection"}
NAMING = {"layers": "names", "exclude": "names"}
ITERATING = {"block_size": "count", "n_iterations": "count", "seed": "count from 0"}
# What only the model can tell right from wrong is refused when training starts, which has the model.
LATER = {"example_input": ANYTHING - {"'3'", "''"}}
CHOSEN = {"method": "choice", "metric": "choice"}
RANGE = REALS - {"Fraction"} | {"-1", "0-d", *FLAT, "np 1-d", "1-d", "np 2-d", "2-d", "int"}
RANGES = {"feature_min": RANGE, "feature_max": RANGE - {"-1"}}  # from 0 to 5
CALLABLES = {"a class", "a module", "a function of one"}
LOGITS, TARGET = torch.tensor([[3.0, 0.0], [1.0, 0.5]]), torch.tensor([0, 1])
ACCURACY = {
    "logits": {"2-d"},
    "target": {"int"},
    "lipschitz": REALS | {"0-d"},
    "last_weight": {"None", "2-d"},
    "output_lipschitz": REALS | {"None", "0-d"},
}
MARGIN = {"reduction": "choice", "label_smoothing": {"0", "0.5", "Fraction", "np.float64"}}
SPECTRA = {
    "spectra": {"np 2-d", "2-d", "[[1.0], [2.0, 3.0]]"},
    "log_target": "number",
    "multiplicities": {"None", "np 1-d", "1-d", "int"},
    "frobenius": {"None", "np 1-d", "1-d", "int"},
}
METRIC = {"metric": {"np 1-d", "1-d", "int"}}
CAPS = {"spectra": [[2.0, 1.0], [3.0]], "log_target": 1.0}


def predict(inputs):
    return inputs.reshape(len(inputs), -1).sum(1)


def log_bound(log_sigma):
    return float(log_sigma.sum()), np.ones(len(log_sigma))


def unless_above_the_bound(
    target, module=None, input_shape=None, data=None, json=None, max_bound=None, unsafe_load_pickle=False
):
    with contextlib.suppress(audit.BoundError):  # which is an answer
        audit.audit(target, module, input_shape, data, json, max_bound, unsafe_load_pickle)


CERTIFIED = functools.cache(lambda: lightning_lip.certify(network(), EXAMPLE))


# The callable, arguments that are right, and what each argument may take: a kind, or labels of the pool.
CALLS = {
    "LipschitzRegularizer": (
        lightning_lip.LipschitzRegularizer,
        lambda: {"model": network(), "coefficient": 1.0},
        {
            "model": "model",
            "coefficient": "at least 0",
            "penalty": set(),
            "target": "positive",
            "knee": "knee",
            **SELECTING,
            **ITERATING,
            "example_input": {"None"},
            "backend": {"None"},
            "unknown": "choice",
            "batch_dim": "batch dimension",
            "convolutions": "choice",
            "inputs": {"None"},
        },
    ),
    "LipschitzRegularizer.add_grad_": (
        lambda scale=1.0, *, advance=True, parameters=None: MODELS["regularizer"]().add_grad_(
            scale, advance=advance, parameters=parameters
        ),
        dict,
        {
            # One that overflowed counts as zero.
            "scale": REALS | {"-1", "0-d", "0-d nan", "nan", "inf", "-inf", "np nan"},
            "advance": "flag",
            "parameters": {"None", "[]", "empty", "empty 2-d"},
        },
    ),
    "LipschitzPenalty": (
        lightning_lip.LipschitzPenalty,
        dict,
        {
            "coefficient": "at least 0",
            "penalty": set(),
            "target": "positive",
            **NAMING,
            **ITERATING,
            **LATER,
            "every_n_steps": "count",
            "warmup_steps": "count from 0",
            "name": "name",
            "knee": "knee",
            "unknown": "choice",
            "batch_dim": "batch dimension",
            "convolutions": "choice",
        },
    ),
    "LipschitzMonitor": (
        lightning_lip.LipschitzMonitor,
        dict,
        {
            **NAMING,
            **ITERATING,
            **LATER,
            "figures_every_n_epochs": "count from 0",
            "certified": {"None"},
            "name": "name",
            "health": "flag",
            "summary": "flag",
            "unknown": "choice",
            "batch_dim": "batch dimension",
            "convolutions": "choice",
        },
    ),
    "LipschitzConstraint": (
        lightning_lip.LipschitzConstraint,
        lambda: {"target": 1.0, "initial_target": 2.0, "tighten_steps": 5},
        {
            "target": "positive",
            **CHOSEN,
            **NAMING,
            "every_n_steps": "count",
            "initial_target": "positive",
            "tighten_steps": "count",
            **LATER,
            **ITERATING,
            "name": "name",
            "batch_dim": "batch dimension",
            "convolutions": "choice",
        },
    ),
    "LipschitzProjector": (
        lightning_lip.LipschitzProjector,
        lambda: {"model": network(), "target": 1e3},
        {
            "model": "model",
            "target": "positive",
            **CHOSEN,
            **SELECTING,
            **ITERATING,
            "example_input": {"None"},
            "exact_every_n_steps": "count from 0",
            "batch_dim": "batch dimension",
            "convolutions": "choice",
        },
    ),
    "LipschitzProjector.target": (
        lambda target: setattr(MODELS["projector"](), "target", target),
        lambda: {"target": 1.0},
        {"target": "positive"},
    ),
    "project": (
        lambda model, target, layers=None, method="joint": lightning_lip.project(
            model, target, layers=layers, method=method
        ),
        lambda: {"model": network(), "target": 1.0},
        {"model": "model", "target": "positive", "layers": "selection", "method": "choice"},
    ),
    "CertifiedMarginLoss": (
        lightning_lip.CertifiedMarginLoss,
        lambda: {"model": network(), "eps": 0.1, "example_input": EXAMPLE},
        {
            "model": set(),
            "eps": "at least 0",
            "head": {"None"},
            "form": "choice",
            "warmup_steps": "count from 0",
            "example_input": set(),
            "weight": {"None", "1-d"},
            "ignore_index": {"-1", "0", "3"},
            **MARGIN,
            **ITERATING,
            "backend": {"None"},
            "convolutions": "choice",
        },
    ),
    "certified_margin_loss": (
        lightning_lip.certified_margin_loss,
        lambda: {"logits": LOGITS, "target": TARGET, "pairwise_bounds": torch.tensor(0.1)},
        {
            "logits": {"2-d"},
            "target": {"int"},
            # NaN shows in the loss, and a look at it would wait for the device.
            "pairwise_bounds": {"0-d", "0-d nan", "2-d"},
            "form": "choice",
            "weight": {"None", "1-d"},
            "ignore_index": {"-1", "0", "3"},
            **MARGIN,
        },
    ),
    "MaxMin": (lightning_lip.MaxMin, dict, {"dim": {"-1", "0", "3", "True", "10**400"}}),
    "MaxNorm": (
        lightning_lip.MaxNorm,
        lambda: {"max_value": 1.0},
        {"max_value": "positive", **NAMING, "unknown": "choice"},
    ),
    "SpectralCaps": (
        lightning_lip.SpectralCaps,
        lambda: {"radius": 1.0},
        {
            "radius": "positive",
            **NAMING,
            **ITERATING,
            "every_n_steps": "count",
            "name": "name",
            "unknown": "choice",
            "convolutions": "choice",
        },
    ),
    "CertifiedValidation": (
        lightning_lip.CertifiedValidation,
        dict,
        {
            "eps": {"[0.5]"},
            "task": "choice",
            "batch_to_xy": {"None", *CALLABLES},
            "prefix": "text",
            "max_inputs": "count from 0",
            "batch_dim": "batch dimension",
            "head": "name",
            "curve": "name",
        },
    ),
    "NoisyValidation": (
        lightning_lip.NoisyValidation,
        lambda: {"feature_min": 0.0, "feature_max": 5.0},
        {
            "noise_levels": {"[0.5]"},
            **RANGES,
            "symmetric": "flag",
            "seed": "count from 0",
            "batch_to_xy": {"None", *CALLABLES},
            "prefix": "text",
        },
    ),
    "NoisyMeanAbsoluteError": (
        lambda noise_levels, feature_min, feature_max, symmetric=False, seed=0: metrics.NoisyMeanAbsoluteError(
            noise_levels, feature_min, feature_max, symmetric, seed
        ),
        lambda: {"noise_levels": (0.0, 0.5), "feature_min": 0.0, "feature_max": 5.0},
        {"noise_levels": {"[0.5]"}, **RANGES, "symmetric": "flag", "seed": "count from 0"},
    ),
    "noisy_mean_absolute_error": (
        metrics.noisy_mean_absolute_error,
        lambda: {
            "predict": predict,
            "inputs": torch.ones(2, 2),
            "target": torch.ones(2),
            "noise_levels": (0.5,),
            "feature_min": 0.0,
            "feature_max": 5.0,
        },
        {
            "predict": CALLABLES,
            "inputs": {"1-d", "2-d"},
            "target": {"1-d", "int", "bool"},
            "noise_levels": {"[0.5]"},
            "feature_min": RANGE - {"np 2-d", "2-d"},
            "feature_max": RANGE - {"np 2-d", "2-d", "-1"},
            "symmetric": "flag",
            "generator": {"None"},
        },
    ),
    "feature_ranges": (
        metrics.feature_ranges,
        lambda: {"batches": [torch.ones(2, 2)]},
        {"batches": set()},
    ),
    "feature_ranges, a batch": (
        lambda batch: metrics.feature_ranges([torch.ones(2, 2), batch]),
        lambda: {"batch": torch.ones(2, 2)},
        {"batch": {"2-d", "empty", "empty 2-d"}},
    ),
    "CertifiedAccuracy": (
        lambda radius: metrics.CertifiedAccuracy(radius),
        lambda: {"radius": 0.1},
        {"radius": REALS | FLAT | {"0-d"}},
    ),
    "CertifiedAccuracy.update": (
        lambda logits, target, lipschitz, last_weight=None, output_lipschitz=None: metrics.CertifiedAccuracy(
            0.1
        ).update(logits, target, lipschitz, last_weight, output_lipschitz),
        lambda: {"logits": LOGITS, "target": TARGET, "lipschitz": 1.0},
        ACCURACY,
    ),
    "certified_accuracy": (
        metrics.certified_accuracy,
        lambda: {"logits": LOGITS, "target": TARGET, "lipschitz": 1.0, "radius": 0.1},
        {**ACCURACY, "radius": REALS | FLAT | {"0-d"}},
    ),
    "certified_radii": (
        metrics.certified_radii,
        lambda: {"logits": LOGITS, "target": TARGET, "lipschitz": 1.0},
        ACCURACY,
    ),
    "certified_worst_case_mae": (
        metrics.certified_worst_case_mae,
        lambda: {"mae": 0.5, "lipschitz": 1.0, "noise_norm": 0.1},
        dict.fromkeys(("mae", "lipschitz", "noise_norm"), REALS | {"0-d"}) | {"n_outputs": "count"},
    ),
    "get_penalty": (
        get_penalty,
        lambda: {"penalty": "product"},
        {"penalty": set(), "target": "positive", "knee": "knee"},
    ),
    "joint_caps": (projection.joint_caps, lambda: CAPS, SPECTRA | METRIC),
    "log_clip_caps": (projection.log_clip_caps, lambda: CAPS, SPECTRA | METRIC),
    "per_layer_caps": (
        projection.per_layer_caps,
        lambda: CAPS,
        SPECTRA | METRIC | {"caps": {"None"}},
    ),
    "per_layer_caps, caps": (
        lambda caps: projection.per_layer_caps(CAPS["spectra"], caps),
        lambda: {"caps": [1.0, 1.0]},
        {"caps": {"np 1-d", "1-d", "int"}},
    ),
    "scale_factors": (
        projection.scale_factors,
        lambda: CAPS,
        {name: kind for name, kind in SPECTRA.items() if name != "frobenius"},
    ),
    "bound_caps": (
        projection.bound_caps,
        lambda: CAPS | {"log_bound": log_bound},
        {name: kind for name, kind in SPECTRA.items() if name != "multiplicities"} | METRIC | {"log_bound": CALLABLES},
    ),
    "certify": (
        lightning_lip.certify,
        lambda: {"model": network(), "example_input": EXAMPLE},
        {
            "model": set(),
            "example_input": set(),
            "jacobian_dtype": set(),
            "data": {"None"},
            "head": {"None"},
            "max_inputs": "count",
            "max_chain_flops": REALS | {"inf"},
            "batch_dim": "batch dimension",
            "on_layer": {"None"},
        },
    ),
    "certified_matrix_norm": (
        certified_matrix_norm,
        lambda: {"weight": torch.ones(2, 2)},
        {
            "weight": {"2-d", "empty 2-d"},
            "estimate": REALS | {"None", "-1", "nan", "inf", "-inf", "np nan", "0-d", "0-d nan"},
        },
    ),
    "rebalance": (
        lightning_lip.rebalance,
        lambda: {"model": network(), "example_input": EXAMPLE},
        {"model": set(), "example_input": {"None"}, "per_unit": "flag", "head": {"None"}},
    ),
    "lipschitz_constant": (constants.lipschitz_constant, lambda: {"module": nn.ReLU()}, {"module": set()}),
    "audit": (
        unless_above_the_bound,
        lambda: {"target": "torch.nn:ReLU", "input_shape": "2"},
        {
            "target": set(),
            "module": {"None"},
            "input_shape": {"'3'"},
            "data": {"None"},
            "json": {"None", "'3'"},
            "max_bound": {"None", "0", "3", "0.5", "np.float64"},
            "unsafe_load_pickle": set(),
        },
    ),
    "document": (
        audit.document,
        lambda: {"target": "a name", "model": network(), "example": EXAMPLE, "result": CERTIFIED()},
        {
            "target": "text",
            "model": "model",
            "example": {label for label, value in POOL.items() if isinstance(value, torch.Tensor)},
            "result": set(),
            "n_inputs": {"None", "0", "3"},
            "max_bound": REALS | {"None"},
            "batch_dim": "batch dimension",
        },
    ),
    "PaperRegressor": (
        paper.PaperRegressor,
        dict,
        {
            "in_features": "count",
            "width": "count",
            "depth": "count from 0",
            "learning_rate": "at least 0",
            "seed": "count from 0",
        },
    ),
    "reproduce": (
        paper.reproduce,
        dict,
        {
            "out": {"'3'"},
            **dict.fromkeys(("quick", "full", "tune", "budget"), "flag"),
            "seeds": {"None", "3"},
            "epochs": {"3", "10**400"},
            "workers": {"None", "3", "10**400"},
        },
    ),
    "bench": (
        bench.bench,
        lambda: {"quick": True},
        {"out": {"'3'"}, "models": {"None"}, "quick": "flag", "device": set(), "threads": {"None", "3"}},
    ),
    "register_constant": (
        lightning_lip.register_constant,
        lambda: {"module_type": OfTheTest, "rule": lambda module: 1.0},
        {"module_type": {"a class"}, "rule": CALLABLES},
    ),
    "register_operator": (
        lightning_lip.register_operator,
        lambda: {"module_type": OfTheTest, "function": lambda module: module.weight},
        {"module_type": {"a class"}, "function": CALLABLES, "norm": CALLABLES | {"None"}},
    ),
}


def core(make, *arguments):
    """Return a regulariser or projector that has its vectors."""
    made = make(network(), *arguments)
    made.sigma() if make is lightning_lip.LipschitzRegularizer else made.step()
    return made


regularizer = functools.partial(core, lightning_lip.LipschitzRegularizer, 1.0)
projector = functools.partial(core, lightning_lip.LipschitzProjector, 1e3)
MODELS = {"regularizer": functools.cache(regularizer), "projector": functools.cache(projector)}
LOADING = {"regularizer": regularizer(), "projector": projector()}
STATES = {name: made.state_dict() for name, made in LOADING.items()}


def with_states(states):
    """Return a call for each part of a state: what it may take."""
    calls = {}
    for name, (make, parts) in states.items():
        right = STATES.get(name.removeprefix("Lipschitz").lower()) or make().state_dict()
        calls[f"{name}.load_state_dict"] = (
            lambda make=make, right=right, **changed: make().load_state_dict(right | changed),
            dict,
            parts,
        )
        calls[f"{name}.load_state_dict, whole"] = (
            lambda state, make=make: make().load_state_dict(state),
            lambda right=right: {"state": right},
            {"state": {"{}"} if name in ("LipschitzMonitor", "NoisyValidation") else set()},
        )
    return calls


def noisy():
    learnt = lightning_lip.NoisyValidation()
    learnt.feature_min, learnt.feature_max = torch.zeros(2).double(), torch.ones(2).double()
    return learnt


CALLS |= with_states(
    {
        "LipschitzRegularizer": (lambda: LOADING["regularizer"], {"vectors": {"{}"}}),
        "LipschitzProjector": (
            lambda: LOADING["projector"],
            {"n_steps": "count from 0", "blocks": {"{}"}, "others": {"{}"}, "slack": {"{}", "{'a': 1}"}},
        ),
        "LipschitzPenalty": (
            lightning_lip.LipschitzPenalty,
            {"n_steps": "count from 0", "optimizer_steps": {"{}"}, "regularizer": {"None"}},
        ),
        "LipschitzConstraint": (
            lambda: lightning_lip.LipschitzConstraint(1.0),
            {"n_steps": "count from 0", "projector": {"None"}},
        ),
        "LipschitzMonitor": (lightning_lip.LipschitzMonitor, {}),
        "NoisyValidation": (noisy, {"feature_min": RANGE - {"3", "np.int64"}, "feature_max": RANGE - {"-1"}}),
    }
)
# What the calls return and raise, and what takes no arguments.
RESULTS = {"Certificate", "Uncertified", "Part", "Projection", "Caps", "Rebalanced", "RebalancedLayer"}
RESULTS |= {"UnsupportedLayerError", "BoundError", "LipschitzMixin", "Method"}
ROOMS = (lightning_lip, audit, bench, callbacks, certificates, constants, metrics, paper, projection, rebalancing)


def test_everything_public_is_called():
    assert {name for room in ROOMS for name in room.__all__} - RESULTS <= set(CALLS)
    n_calls = sum(len(takes) for _, _, takes in CALLS.values()) * len(POOL)
    assert n_calls >= 1000
    for name, (function, _, takes) in CALLS.items():
        taken = {
            key
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD and key not in ("make", "right")
        }
        assert taken <= set(takes), name


def outcome(function, arguments, name, label):
    """Return "taken" or "refused", or the error that does not tell which argument is wrong."""
    try:
        function(**arguments | {name: POOL[label]})
    except (TypeError, ValueError) as error:
        # A module of another type is named by its class, and a file by its name.
        if re.search(rf"\b{name.replace('_', '[_-]')}\b", str(error)) or (name[:3], label) == ("mod", "a module"):
            return "refused"
        if name in ("target", "data") and label == "'3'" and re.search(r"\b3\b", str(error)):
            return "refused"
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_refused_by_name(call, monkeypatch, capsys):
    for run in (
        "bench.command.run",
        "bench.command.run_scoreboard",
        "paper.regimes.experiment.run_experiment",
        "paper.budgets.study.run_budget",
    ):
        monkeypatch.setattr(f"lightning_lip.{run}", lambda *_, **__: None)
    function, right, takes = CALLS[call]
    function(**right())
    wrong = {}
    for name, kind in takes.items():
        taken = KINDS[kind] if isinstance(kind, str) else kind
        for label in POOL:
            if name in ("predict", "log_bound") and label in CALLABLES:
                continue  # what a callable of the user's own raises is its own
            found = outcome(function, right(), name, label)
            if found != ("taken" if label in taken else "refused"):
                wrong[name, label] = found
    assert wrong == {}


# What a shell may give an option, and a YAML file: "a\\0b" only the latter.
LONG = "9" * 400
TEXTS = ["", "0", "-1", "3", "1.5", "true", "null", "nan", "abc", "[1]", "{a: 1}", "1,2", LONG]
PATHS = ["file", "folder", "file/below", "/proc/none", "no/such.pt", "a\0b"]
NAMES = {"0", "-1", "3", "1.5", "true", "nan", "abc", "[1]", "{a: 1}", "1,2"}
OUT = NAMES | {"null", "folder", "no/such.pt"}
OPTIONS = {
    "audit": {
        "target": set(),
        "module": {"null"},
        "input_shape": {"3", "1,2", "[1]"},
        "data": {"null"},
        "json": NAMES | {"null", "file"},
        "max_bound": {"0", "3", "1.5", "null"},
        "unsafe_load_pickle": None,
        "no_batch": None,
    },
    "bench": {"out": OUT, "models": {"null"}, "device": set(), "threads": {"3", "null"}, "quick": None},
    "reproduce": {
        "out": OUT,
        "seeds": {"3", "null"},
        "epochs": {"3", LONG},
        "workers": {"3", "null", LONG},
        **dict.fromkeys(("quick", "full", "tune", "budget")),
    },
    "scoreboard": {
        "out": OUT,
        "methods": {"null"},
        "data": {"null"},
        "seconds": {"3", "1.5"},
        **dict.fromkeys(("full", "quick")),
        "workers": {"3", "null"},
    },
}
RIGHT = {"audit": ["torch.nn:ReLU", "--input-shape=2"], "bench": ["--quick"], "reproduce": [], "scoreboard": []}


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command up to its work; return "taken", "refused", or what is wrong with how it ended."""

    def work(*_, **__):
        raise SystemExit(0)

    for module in ("paper.regimes.experiment", "paper.budgets.study"):
        monkeypatch.setattr(f"lightning_lip.{module}.map_with_progress", work)
    monkeypatch.setattr("lightning_lip.bench.steps.run.measure", work)
    monkeypatch.setattr("lightning_lip.bench.scoreboard.run.map_with_progress", work)
    monkeypatch.setattr("lightning_lip.reporting.finished._sources", str)  # read once more at every call
    monkeypatch.setattr("lightning_lip.audit.command.certify", lambda *_, **__: CERTIFIED())
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("valid")

    def files():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def run(arguments, named=""):
        before = files()
        status = run_cli(*arguments)
        told = capsys.readouterr().err
        if status in (0, 1):
            (tmp_path / "file").write_text("valid")
            return "taken"
        if status == 2 and re.fullmatch("lightning-lip: .+\n", told) and re.search(named, told) and files() == before:
            return "refused"
        return f"{status}: {told}, {files().keys() ^ before.keys()}"

    return run


def named_in(option, text):
    """Return the pattern of a message on an option: it has its name, or the path that was given."""
    name = rf"\b{option.replace('_', '[_-]')}\b"
    return f"{name}|{re.escape(text)}" if len(text) > 2 or option in ("target", "data") else name


def test_every_option_is_given_wrong_values():
    for name, options in OPTIONS.items():
        assert list(cli.COMMANDS) == list(OPTIONS)
        assert set(options) == set(inspect.signature(cli.COMMANDS[name]).parameters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option_is_one_line_and_status_2_and_leaves_nothing(command, name):
    wrong = {}
    for option, taken in OPTIONS[name].items():
        for text in [*TEXTS, *PATHS]:
            if option == "target":
                line = [text, "--input-shape=2"]
            elif taken is None:
                line = [*RIGHT[name], f"--{option.replace('_', '-')}={text}"]
            else:
                line = [*RIGHT[name], f"--{option.replace('_', '-')}={text}"]
            found = command([name, *line], named_in(option, text))
            if found != ("taken" if taken and text in taken else "refused"):
                wrong[option, text] = found
    assert wrong == {}


SPOILT = {"spoilt.yaml": b": : [\n", "bytes.yaml": b"\xff\xfe\0", "list.yaml": b"- 1\n", "other.yaml": b"colour: 3\n"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nothing",
        "--quick",
        "audit",
        "audit torch.nn:ReLU",
        "audit torch.nn:ReLU more",
        "audit torch.nn:ReLU --input-shape",
        "audit torch.nn:ReLU --input-shape 2 --module torch.nn:ReLU",
        "audit torch.nn:ReLU --input-shape 2 --unsafe-load-pickle",
        "audit torch.nn:ReLU --input-shape 4294967296,4294967296",
        "audit torch.nn:ReLU --input-shape 1000000000000",
        "bench more",
        "bench --quick more",
        "bench --models paper,other",
        "bench --device cpu:3",
        "bench --device cuda:99",
        "reproduce --colour x",
        "reproduce --seeds",
        "reproduce --seeds 1",
        "reproduce --quick --full",
        "reproduce --budget --full",
        "reproduce --budget --tune",
        "reproduce --config no.yaml",
        "reproduce --config folder",
        "scoreboard --methods none-such",
        "scoreboard --quick --full",
        *(f"{name} --config {file}" for name in ("bench", "reproduce", "scoreboard") for file in SPOILT),
    ],
)
def test_a_wrong_line_is_one_line_and_status_2_and_leaves_nothing(command, tmp_path, line):
    for file, contents in SPOILT.items():
        (tmp_path / file).write_bytes(contents)
    assert command(line.split()) == "refused"


YAML = [3, -1, 0, 1.5, True, None, "abc", "", "a\0b", [1], ["a"], {"a": 1}, math.nan, math.inf, 10**400, [[1]]]
YAML_TAKES = {
    "target": set(),
    "unsafe_load_pickle": set(),
    "module": {"None"},
    "input_shape": set(),
    "data": {"None"},
    "json": {"None", "'abc'"},
    "max_bound": {"3", "0", "1.5", "None"},
    "out": {"'abc'"},
    "models": {"None"},
    "device": set(),
    "threads": {"3", "None"},
    "seeds": {"3", "None"},
    "workers": {"3", "None", repr(10**400)},
    "epochs": {"3", repr(10**400)},
    "methods": {"None"},
    "seconds": {"3", "1.5"},
    "scoreboard.workers": {"3", "None"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_value_in_a_configuration_is_one_line_and_status_2(command, tmp_path, name):
    wrong = {}
    for option in OPTIONS[name]:
        right = {"target": "torch.nn:ReLU", "input_shape": "2"} if name == "audit" else {}
        for value in YAML:
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(right | {option: value}))
            found = command([name, "--config=config.yaml"], rf"\b{option.replace('_', '[_-]')}\b|abc")
            if found != (
                "taken"
                if repr(value) in YAML_TAKES.get(f"{name}.{option}", YAML_TAKES.get(option, {"True"}))
                else "refused"
            ):
                wrong[option, repr(value)] = found
    assert wrong == {}


# Kinds as above, of the values in YAML: jsonargparse reads text as a number where one is expected, and null in text.
YAML_KINDS = {
    "count": {"3"},
    "count from 0": {"3", "0"},
    "positive": {"3", "1.5"},
    "at least 0": {"3", "0", "1.5"},
    "flag": {"True"},
    "text": {"'abc'", "''", "'a\\x00b'"},
    "name": {"None", "'abc'", "''", "'a\\x00b'"},
    "names": {"None", "'abc'", "''", "'a\\x00b'", "['a']"},
    "choice": set(),
    "batch dimension": {"None", "0"},
    "knee": {"None", "3", "1.5", "inf"},
}
# An argument's own list, where its kind above is one.
YAML_LISTS = {
    "penalty": set(),
    "certified": {"None"},
    "eps": {"[1]"},
    "noise_levels": {"[1]"},
    "batch_to_xy": {"None"},
    "feature_min": {"3", "-1", "0", "1.5", "[1]", "[[1]]"},
    "feature_max": {"3", "0", "1.5", "[1]", "[[1]]"},
    "example_input": set(map(repr, YAML)) - {"'abc'", "''", "'a\\x00b'"},  # refused when training starts
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", callbacks.__all__)
def test_a_wrong_value_of_a_callback_in_yaml_is_refused_by_name(pl, name):
    parser = importlib.import_module(f"{pl.__name__}.cli").LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    _, right, takes = CALLS[name]

    def build(**arguments):
        init_args = yaml.safe_load(yaml.safe_dump(right() | arguments))
        configuration = {"callback": {"class_path": f"lightning_lip.{name}", "init_args": init_args}}
        parser.instantiate_classes(parser.parse_object(configuration))

    assert wrong_in_yaml(build, takes) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("annotated", [False, True])
def test_a_wrong_argument_of_a_module_with_the_mixin_in_yaml_is_refused_by_name(pl, annotated):
    class Module(lightning_lip.LipschitzMixin, pl.LightningModule):
        def __init__(self, coefficient=1.0, penalty="product", target=1.0, layers=None, block_size=8, seed=0):
            super().__init__()
            self.net = network()
            self.options = (coefficient, penalty, layers), {"target": target, "block_size": block_size, "seed": seed}

        def configure_lipschitz(self):
            (coefficient, penalty, layers), options = self.options
            return lightning_lip.LipschitzRegularizer(self, coefficient, penalty, layers=layers, **options)

    if annotated:
        hints = {"coefficient": float, "penalty": str, "target": float, "layers": str | list[str] | None}
        Module.__init__.__annotations__ = hints | {"block_size": int, "seed": int}
    parser = importlib.import_module(f"{pl.__name__}.cli").LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Module, "model")

    def build(**arguments):
        configuration = parser.parse_object({"model": yaml.safe_load(yaml.safe_dump(arguments))})
        parser.instantiate_classes(configuration).model.lipschitz_penalty()

    takes = {"coefficient": "at least 0", "penalty": set(), "target": "positive", "layers": {"None"}}
    assert wrong_in_yaml(build, takes | {"block_size": "count", "seed": "count from 0"}) == {}


def wrong_in_yaml(build, takes):
    """Return what is taken that should not be, refused that is right, or refused without the argument's name."""
    build()
    wrong = {}
    for name, kind in takes.items():
        taken = YAML_LISTS.get(name, set(kind)) if not isinstance(kind, str) else YAML_KINDS[kind]
        for value in YAML:
            try:
                build(**{name: value})
            except OverflowError as error:  # jsonargparse's own, of an integer where a float is expected
                found = "refused" if value == 10**400 else error
            except (TypeError, ValueError, ArgumentError) as error:
                found = "refused" if re.search(rf"\b{name}\b", str(error)) else error
            else:
                found = "taken"
            if found != ("taken" if repr(value) in taken else "refused"):
                wrong[name, repr(value)[:20]] = found
    return wrong
