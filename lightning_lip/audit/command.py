"""`lightning-lip audit`: what is certified about the network of a checkpoint, layer by layer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_lip.audit.checkpoints import load_network, read_tensors
from lightning_lip.audit.report import print_report, rounded_up, write_json
from lightning_lip.certificates.interval import Certificate, Uncertified, certify
from lightning_lip.checks import (
    check_integers,
    check_model,
    check_number,
    check_type,
    is_finite_number,
    shown,
)
from lightning_lip.errors import AuditError, BoundError
from lightning_lip.models.inputs import BatchDim, call_arguments, check_batch_dim
from lightning_lip.models.modules import eval_mode
from lightning_lip.reporting.console import make_console, print_line
from lightning_lip.reporting.documents import versions
from lightning_lip.reporting.failures import check_options
from lightning_lip.reporting.progress import named_progress

SCHEMA = 1
PACKAGES = ("lightning-lip", "lightning")
MAX_INPUTS = 256
"""How many inputs of --data the lower bound is measured on."""


def audit(
    target: str,
    module: str | None = None,
    input_shape: str | None = None,
    data: str | None = None,
    json: str | None = None,
    max_bound: float | None = None,
    unsafe_load_pickle: bool = False,
    no_batch: bool = False,
) -> dict[str, Any]:
    """Certify the Lipschitz constant of a checkpoint's network and show what each layer adds to it.

    Prints a table of the layers (estimated and certified spectral norm, constant, share of the logarithm of the bound),
    the interval from the slope measured on data to the certified upper bound, and what was refused and why. The
    constant is that of the network in eval mode, in Euclidean norms, over all of input space. Status 0; with
    --max-bound 1 if the certified bound is above it or there is none; 2 for options, files and names that make no
    audit.

    Args:
        target: A checkpoint (.ckpt) or state_dict (.pt) file; or package.module:name of a torch.nn.Module, or of a
            class or function that returns one when called without arguments. The name's code is imported and run.
        module: For a file, what it belongs to, as package.module:Class. A LightningModule's class is built with the
            hyper-parameters in its checkpoint; another class or function is called without arguments.
        input_shape: The shape of one input without the batch, for instance 13 or 1,28,28. By default the model's
            example_input_array tells it.
        data: A file of inputs to measure the lower bound on, their first 256: .npy, .npz or .pt, of a tensor (N, ...),
            or of several for a model of several inputs.
        json: A file to write all numbers to, or - for standard output, which then has nothing else.
        max_bound: The largest certified upper bound that passes.
        unsafe_load_pickle: Runs whatever code is in the file. Without it, a file that holds more than tensors and
            plain values is refused.
        no_batch: The whole input is one sample, as the nodes of a graph are: --input-shape is all of its shape, and
            each file of --data holds one input.

    Returns:
        What --json writes, documented at `lightning_lip.audit.document`.

    Raises:
        UsageError: If an option is of another type.
        AuditError: If options, files or names make no audit.
        BoundError: If the certified upper bound is above `max_bound`, or there is none.
    """
    check_options(audit, locals())
    if max_bound is not None and not (is_finite_number(max_bound) and max_bound >= 0):
        raise AuditError(f"Expected --max-bound as a finite number of at least 0, got {shown(max_bound)}.")
    for option, name in {"the target": target, "--module": module, "--data": data, "--json": json}.items():
        if name is not None and (not name or "\0" in name):
            raise AuditError(f"Expected {option} to be a name, got {name!r}.")
    if json is not None and json != "-":
        if Path(json).is_dir():
            raise AuditError(f"Expected --json to be a file or -, {json} is a folder.")
        if not Path(json).absolute().parent.is_dir():
            raise AuditError(f"There is no folder {Path(json).parent} to write --json {json} to.")
    try:
        model = load_network(target, module, unsafe_load_pickle)
        batch_dim: BatchDim = None if no_batch else 0
        example = example_input(model, input_shape, batch_dim)
        inputs = None if data is None else load_inputs(Path(data), example, batch_dim)
        given = None if inputs is None else [inputs.arguments]
        try:
            # On standard error: a program may read what the other one gets.
            with named_progress(Console(stderr=True), "certifying") as show:
                result = certify(model, example, given, batch_dim=batch_dim, max_inputs=MAX_INPUTS, on_layer=show)
        except (TypeError, ValueError, RuntimeError) as error:
            raise AuditError(f"The audit of {target} failed: {error}") from error
    # The user's code may end the process, and with status 0 that would pass for an audit.
    except SystemExit as error:
        raise AuditError(f"The code of {target} calls sys.exit({error.code!r}): nothing was audited.") from error
    n_inputs = inputs and min(inputs.n_inputs, MAX_INPUTS)
    contents = document(target, model, example, result, n_inputs, max_bound, batch_dim)
    if json != "-":
        console = make_console()
        print_report(console, contents)
        if max_bound is None and isinstance(result, Certificate) and math.isfinite(result.upper):
            named = {"--module": module, "--input-shape": input_shape, "--data": data}
            switches = {"--unsafe-load-pickle": unsafe_load_pickle, "--no-batch": no_batch}
            words = ["lightning-lip", "audit", target]
            words += [word for name, value in named.items() if value is not None for word in (name, value)]
            words += [name for name, is_on in switches.items() if is_on]
            check = shlex.join([*words, "--max-bound", rounded_up(result.upper)])
            print_line(console, f"Next, as a check with an exit status: {check}")
    if json is not None:
        write_json(contents, json)
    if contents["passed"] is False:
        found = f"is {rounded_up(result.upper)}" if isinstance(result, Certificate) else "does not exist"
        raise BoundError(f"the certified upper bound of {target} {found}; --max-bound is {max_bound}.")
    return contents


def document(
    target: str,
    model: nn.Module,
    example: object,
    result: Certificate | Uncertified,
    n_inputs: int | None = None,
    max_bound: float | None = None,
    batch_dim: BatchDim = 0,
) -> dict[str, Any]:
    """Return an audit as a JSON document; a number that is infinite or not known is null.

    The document's keys:

    - `schema`: 1.
    - `versions`: of Python and the packages.
    - `target`, `module`: what was audited, and the network's class.
    - `input_shapes`: the shape of one input, without the batch if there is one, for each argument.
    - `certified`: whether there is a certified upper bound.
    - `lower`: the largest Jacobian norm over `n_inputs` inputs, a lower bound up to rounding.
    - `estimate`: the bound at the estimated norms, which come from below.
    - `upper`, `log_upper`: certified upper bounds of the constant and of its logarithm.
    - `method`: what gave `upper`; `bounds`: all certified upper bounds by method; `skipped`: methods left out, and why.
    - `tightness`: `upper / lower`: `upper` is at most so many times the constant.
    - `refused`: what could not be certified, and why.
    - `layers`: the fields of :class:`~lightning_lip.certificates.Part` for each operator.
    - `operations`: the fields of :class:`~lightning_lip.graph.bound.GraphNode` for each operation of the forward pass.
    - `max_bound`, `passed`: the limit given, and whether `upper` keeps it; null without one.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If `n_inputs`, `max_bound` or `batch_dim` is out of range.
    """
    check_type("target", target, str, "a name")
    check_model(model, "document")
    check_type("result", result, (Certificate, Uncertified), "what certify returned")
    check_batch_dim(batch_dim)
    if not _tensors(example):
        raise TypeError(f"Expected `example` to be an input of the model, got {shown(example)}.")
    if n_inputs is not None:
        check_integers(0, n_inputs=n_inputs)
    if max_bound is not None:
        max_bound = check_number("max_bound", max_bound)
    certificate = result if isinstance(result, Certificate) else None
    upper = None if certificate is None else certificate.upper
    contents = {
        "schema": SCHEMA,
        "versions": versions(*PACKAGES),
        "target": target,
        "module": f"{type(model).__module__}:{type(model).__qualname__}",
        "input_shapes": [_sample_shape(tensor, batch_dim) for tensor in _tensors(example)],
        "certified": result.certified,
        "lower": result.lower,
        "n_inputs": n_inputs,
        "estimate": result.estimate,
        "upper": upper,
        "log_upper": certificate and certificate.log_upper,
        "method": certificate and certificate.tighter,
        "bounds": dict(certificate.bounds) if certificate else {},
        "skipped": list(certificate.skipped) if certificate else [],
        # Rounding may put the measured bound above the certified one by a few units in the last place.
        "tightness": max(1.0, upper / result.lower) if upper is not None and result.lower else None,
        "refused": list(result.refused),
        "layers": [asdict(part) for part in result.parts],
        "operations": [asdict(node) for node in result.graph],
        "max_bound": max_bound,
        "passed": None if max_bound is None else upper is not None and upper <= max_bound,
    }
    finite: dict[str, Any] = _without_infinities(contents)
    return finite


def example_input(model: nn.Module, input_shape: str | None = None, batch_dim: BatchDim = 0) -> Any:
    """Return an input of the model, and check that the model takes it.

    Args:
        model: The model.
        input_shape: The shape of one input, without the batch, as in ``"1,28,28"``; zeros of that shape, a batch of
            two, in the dtype and on the device of the model's parameters. By default the model's
            ``example_input_array``.
        batch_dim: None takes `input_shape` as the whole shape: there is no batch.

    Raises:
        AuditError: If `input_shape` is no shape, there is neither, or the model fails on the input.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    example: Any = getattr(model, "example_input_array", None)
    if input_shape is not None:
        batch = () if batch_dim is None else (2,)
        try:
            example = torch.zeros(*batch, *_shape(input_shape), dtype=parameter.dtype, device=parameter.device)
        # Of sizes beyond 64 bits, which torch tells in three ways.
        except (OverflowError, RuntimeError, TypeError) as error:
            raise AuditError(f"--input-shape {input_shape} is too large: {error}") from error
    elif example is None:
        raise AuditError(
            "The shape of an input is not known: give it without the batch as --input-shape 1,28,28, or set the "
            "model's example_input_array."
        )
    elif isinstance(example, Tensor):
        example = example.to(parameter.device)
    arguments, keywords = call_arguments(example)
    try:
        with torch.no_grad(), eval_mode(model):
            model(*arguments, **keywords)
    # The user's forward pass may raise anything.
    except Exception as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(example))
        what = "an input" if batch_dim is None else "a batch"
        raise AuditError(
            f"The forward pass of {type(model).__name__} fails on {what} of shape {shapes}, so that there is no "
            f"network to audit ({type(error).__name__}: {error}). Give the shape of one input as --input-shape, "
            "all of it with --no-batch."
        ) from error
    return example


class Inputs(NamedTuple):
    """Inputs from a file: what `certify` takes as one batch, and how many they are."""

    arguments: Any
    n_inputs: int


def load_inputs(path: Path, example: object, batch_dim: BatchDim = 0) -> Inputs:
    """Read inputs from a file, without running code in it.

    Args:
        path: A .npy file of one array, an .npz file, or another that torch.save wrote, of a tensor, a list or a dict.
            A model of keyword arguments finds them by their names, another one takes the first ones; what else there
            is, a target say, is left.
        example: An input of the model, which tells what it takes.
        batch_dim: None takes the file's tensors for one input as a whole.

    Raises:
        AuditError: If the file cannot be read, or the inputs are not of the example's shape or not floating point.
    """
    found = _arrays(path)
    names = list(example) if isinstance(example, Mapping) else None
    expected = _tensors(example)
    missing = [name for name in names or () if name not in found]
    if missing or len(found) < len(expected):
        raise AuditError(
            f"Expected inputs {', '.join(names) if names else f'({len(expected)} tensors)'} in --data {path}, got "
            f"{', '.join(found) or 'none'}."
        )
    tensors = [found[name] for name in names] if names else list(found.values())[: len(expected)]
    for tensor, model_input in zip(tensors, expected, strict=True):
        shape = _sample_shape(model_input, batch_dim)
        has_rank = tensor.dim() == len(shape) + (batch_dim is not None)
        if not has_rank or _sample_shape(tensor, batch_dim) != shape or not tensor.is_floating_point():
            sizes = ", ".join([*(["N"] if batch_dim is not None else []), *map(str, shape)])
            raise AuditError(
                f"Expected floating-point inputs of shape ({sizes}) in --data {path}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}."
            )
    if batch_dim is None:
        return Inputs(dict(zip(names, tensors, strict=True)) if names else tensors, 1)
    n_inputs = len(tensors[0])
    if any(len(tensor) != n_inputs for tensor in tensors):
        raise AuditError(f"Expected as many of each input in --data {path}, got {[len(tensor) for tensor in tensors]}.")
    return Inputs(dict(zip(names, tensors, strict=True)) if names else tensors, n_inputs)


def _arrays(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file by name, or by number as text."""
    if path.suffix not in (".npy", ".npz"):
        contents = read_tensors(path)
    elif not path.is_file():
        raise AuditError(f"There is no file {path}.")
    else:
        try:
            loaded = np.load(path, allow_pickle=False)
            contents = dict(loaded) if path.suffix == ".npz" else loaded
        # A damaged file makes the readers of zip and NumPy fail in any way.
        except Exception as error:
            raise AuditError(
                f"--data {path} cannot be read as arrays of numbers: it is damaged, or holds other objects "
                f"({type(error).__name__})."
            ) from error
    if isinstance(contents, (Tensor, np.ndarray)):
        contents = [contents]
    if isinstance(contents, Sequence):
        contents = {str(index): value for index, value in enumerate(contents)}
    if not isinstance(contents, Mapping):
        raise AuditError(
            f"Expected a tensor, a list or a dict of them in --data {path}, got {type(contents).__name__}."
        )
    try:
        return {str(name): torch.as_tensor(value) for name, value in contents.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise AuditError(f"Expected tensors in --data {path}: {error}.") from error


def _sample_shape(tensor: Tensor, batch_dim: BatchDim) -> list[int]:
    """Return the shape of one sample."""
    return list(tensor.shape if batch_dim is None else tensor.shape[1:])


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.strip("()[] ").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise AuditError(f"Expected --input-shape as sizes without the batch, for instance 1,28,28, got {text!r}.")
    return tuple(int(size) for size in sizes)


def _tensors(example: object) -> list[Tensor]:
    arguments, keywords = call_arguments(example)
    return [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
