"""Every public argument with every kind of wrong value: taken where that is legitimate, else refused by name.

One pool of values goes through every argument of every public callable. What an argument may take of the pool is its
kind's own short list; for all others there must be a TypeError or ValueError whose message has the argument's name.
"""

import functools
import inspect
import math
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lightning_lip
from lightning_lip import callbacks, metrics, projection
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
    "at least 0": REALS,
    "number": REALS | {"-1"},
    "numbers": FLAT | {"np 1-d", "1-d", "int"},
    "positive numbers": FLAT | {"np 1-d", "1-d", "int"},
    "flag": {"True"},
    "text": {"'3'", "''"},
    "name": {"None", "'3'", "''"},
    "choice": set(),
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
}
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
            **SELECTING,
            **ITERATING,
            "example_input": {"None"},
            "backend": {"None"},
            "unknown": "choice",
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
            "unknown": "choice",
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
        lambda logits, target, lipschitz, last_weight=None: metrics.CertifiedAccuracy(0.1).update(
            logits, target, lipschitz, last_weight
        ),
        lambda: {"logits": LOGITS, "target": TARGET, "lipschitz": 1.0},
        ACCURACY,
    ),
    "certified_accuracy": (
        metrics.certified_accuracy,
        lambda: {"logits": LOGITS, "target": TARGET, "lipschitz": 1.0, "radius": 0.1},
        {**ACCURACY, "radius": REALS | FLAT | {"0-d"}},
    ),
    "certified_worst_case_mae": (
        metrics.certified_worst_case_mae,
        lambda: {"mae": 0.5, "lipschitz": 1.0, "noise_norm": 0.1},
        dict.fromkeys(("mae", "lipschitz", "noise_norm"), REALS | {"0-d"}) | {"n_outputs": "count"},
    ),
    "get_penalty": (get_penalty, lambda: {"penalty": "product"}, {"penalty": set(), "target": "positive"}),
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
            "max_inputs": "count",
            "max_chain_flops": REALS | {"inf"},
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
        {"model": set(), "example_input": {"None"}, "per_unit": "flag"},
    ),
    "register_constant": (
        lightning_lip.register_constant,
        lambda: {"module_type": OfTheTest, "rule": lambda module: 1.0},
        {"module_type": {"a class"}, "rule": CALLABLES},
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
RESULTS = {"Certificate", "Uncertified", "Projection", "Rebalanced", "UnsupportedLayerError", "LipschitzMixin"}


def test_everything_public_is_called():
    assert set(lightning_lip.__all__) - RESULTS <= set(CALLS)
    assert set(metrics.__all__) | set(callbacks.__all__) | set(projection.__all__) - {"Caps"} <= set(CALLS)
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
        # A model of another type is named by its class.
        if re.search(rf"\b{name}\b", str(error)) or (name == "model" and label == "a module"):
            return "refused"
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_refused_by_name(call):
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
