"""Checks of what users pass in; each error says what was expected, what was given, and what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

SHOWN_KEYS = 5
"""Keys of a wrong state in the message: a whole model's would fill the screen."""

SHOWN_CHARACTERS = 200
"""Characters of a wrong value in the message."""


def got(value: object) -> str:
    """Return what was given, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def shown(value: object) -> str:
    """Return a value for a message: not a tensor's or an array's numbers."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{got(value)}, {value.dtype}"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def check_model(model: object, what: str) -> None:
    """Check that a model is a module.

    Args:
        model: What was given as the model.
        what: The function or class that it was given to.

    Raises:
        TypeError: If it is no module.
    """
    if isinstance(model, nn.Module):
        return
    raise TypeError(
        f"{what} expected the model to be a torch.nn.Module, got {got(model)}. Give the network itself, a "
        "LightningModule, say; construct it first, and load a checkpoint into it, where all there is yet is a class, a "
        "file or a state_dict."
    )


def check_finite(name: str, values: Tensor) -> None:
    """Check that data holds no NaN and no infinity.

    Raises:
        ValueError: If it does.
    """
    check_tensor(name, values)
    if not values.isfinite().all():
        raise ValueError(f"Expected `{name}` without NaN and infinity: clean or impute the data first.")


def check_state(state: object, keys: Collection[str], owner: str) -> None:
    """Check that a state to load has the keys that it needs.

    Args:
        state: What was given to ``load_state_dict``.
        keys: What it must hold; more may be in it.
        owner: The class that it was given to.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If keys are missing.
    """
    remedy = f"Give what {owner}.state_dict() returned, or load nothing to start afresh."
    if not isinstance(state, Mapping):
        raise TypeError(f"{owner} expected a state with the keys {list(keys)}, got a {type(state).__name__}. {remedy}")
    missing = [key for key in keys if key not in state]
    if missing:
        shown = [*list(state)[:SHOWN_KEYS], *(["..."] if len(state) > SHOWN_KEYS else [])]
        raise ValueError(
            f"{owner} expected a state with the keys {list(keys)}, got one with {shown}: {missing} "
            f"{'is' if len(missing) == 1 else 'are'} missing. {remedy}"
        )


def check_integers(least: int, **values: object) -> None:
    """Check that arguments, given by their names, are integers of at least `least`, and within 64 bits.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            raise ValueError(f"Expected `{name}` to be an integer of at least {least}, got {shown(value)}.")


def check_name(name: object) -> None:
    """Check a callback's `name`.

    Raises:
        TypeError: If it is neither a string nor None.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"Expected `name` to be a string or None, got {shown(name)}.")


def check_type(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Check the type of an argument.

    Args:
        name: The argument.
        value: Its value.
        kind: The type that it must have.
        what: The type in words.

    Raises:
        TypeError: If it has another.
    """
    if not isinstance(value, kind):
        raise TypeError(f"Expected `{name}` to be {what}, got {shown(value)}.")


def check_flag(name: str, value: object) -> None:
    """Check that an argument is True or False.

    Raises:
        TypeError: If it is not.
    """
    check_type(name, value, bool, "True or False")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument is one of a few words.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {tuple(choices)}, got {shown(value)}.")


def check_floating(name: str, value: object) -> None:
    """Check that an argument is a floating-point dtype of torch.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"Expected `{name}` to be a floating-point dtype, torch.float32 say, got {shown(value)}.")


def check_callable(name: str, value: object, what: str, n_arguments: int | None = None) -> None:
    """Check that an argument can be called, or that it is a function or module of so many positional arguments.

    Raises:
        TypeError: If it cannot.
    """
    if not callable(value) or (n_arguments is not None and isinstance(value, type)):
        raise TypeError(f"Expected `{name}` to be a callable {what}, got {shown(value)}.")
    if n_arguments is None:
        return
    try:
        # A module is called through its forward.
        inspect.signature(value.forward if isinstance(value, nn.Module) else value).bind(*range(n_arguments))
    except TypeError as error:
        raise TypeError(f"Expected `{name}` to be a callable {what}, {shown(value)} is none: {error}.") from None
    except ValueError:  # a built-in function without a signature
        pass


def check_items(name: str, values: Any, what: str) -> list[Any]:
    """Return what a sequence, or another iterable, holds.

    Args:
        name: The argument.
        values: Its value.
        what: The right type in words.

    Raises:
        TypeError: If it is text or a mapping, or cannot be iterated over.
    """
    try:
        if isinstance(values, (str, bytes, Mapping)):
            raise TypeError
        if isinstance(values, Tensor):
            check_tensor(name, values)
        return list(values)
    except (TypeError, ValueError):  # of tensors without a dimension, say
        raise TypeError(f"Expected `{name}` to be {what}, got {shown(values)}.") from None


def check_numbers(name: str, values: object) -> tuple[float, ...]:
    """Return a sequence of numbers as floats.

    Raises:
        TypeError: If it is none.
    """
    try:
        numbers = [_plain(value) for value in check_items(name, _plain(values), "a sequence of numbers")]
        if not all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers):
            raise TypeError
        return tuple(map(float, numbers))
    except (TypeError, OverflowError, RuntimeError):
        raise TypeError(
            f"Expected `{name}` to be a sequence of numbers, (0.1, 0.2) say, got {shown(values)}."
        ) from None


def check_scale(name: str, value: object) -> None:
    """Check that an argument is a number or a floating-point tensor of shape ().

    Raises:
        TypeError: If it is neither a number nor a tensor.
        ValueError: If it is another tensor.
    """
    if not isinstance(value, Tensor):
        check_numbers(name, [value])
    elif value.shape != () or not value.is_floating_point() or value.is_meta:
        raise ValueError(f"Expected `{name}` to be a number or a tensor of shape (), got {shown(value)}.")


def check_parameters(name: str, values: object) -> list[nn.Parameter]:
    """Return a sequence of parameters as a list.

    Raises:
        TypeError: If it is no sequence, or holds anything else.
    """
    parameters = check_items(name, values, "a sequence of tensors")
    if not all(isinstance(p, nn.Parameter) for p in parameters):
        raise TypeError(f"Expected `{name}` to hold parameters of the model, got {shown(parameters)}.")
    return parameters


def check_levels(name: str, values: object, distinct: bool = True) -> tuple[float, ...]:
    """Return a sequence of noise levels or of sizes of a perturbation as floats.

    Args:
        name: What the argument is called.
        values: The argument.
        distinct: Whether it must not hold a number twice.

    Raises:
        TypeError: If it is no sequence of numbers.
        ValueError: If it is empty, or holds a number below 0 or not finite, or one twice.
    """
    levels = check_numbers(name, values)
    if not levels or not all(math.isfinite(level) and level >= 0 for level in levels):
        raise ValueError(f"Expected `{name}` to be one or more finite numbers of at least 0, got {shown(values)}.")
    if distinct and len(set(levels)) < len(levels):
        raise ValueError(f"Expected `{name}` to be distinct numbers, got {shown(values)}.")
    return levels


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, finite as a float, and not a bool."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def check_number(name: str, value: object, positive: bool = False) -> float:
    """Return an argument as a float.

    Raises:
        ValueError: If it is not a finite number of at least 0 or, where `positive`, above 0.
    """
    if not is_finite_number(value) or value < 0 or (positive and value == 0):
        expected = "a positive finite number" if positive else "a finite number of at least 0"
        raise ValueError(f"Expected `{name}` to be {expected}, got {shown(value)}.")
    return float(value)


def check_tensor(name: str, value: object) -> None:
    """Check that an argument is a tensor that can be computed with: dense, real, and with values.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is sparse, quantised, complex or on the meta device.
    """
    check_type(name, value, Tensor, "a tensor")
    tensor: Any = value
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"Expected `{name}` to be a dense tensor of real numbers, got {shown(value)}.")


def check_array(name: str, values: Any) -> np.ndarray:
    """Return numbers as an array in float64.

    Args:
        name: The argument.
        values: A number, nested sequences of numbers, an array, or a tensor.

    Raises:
        TypeError: If it holds anything but integers and floats.
        ValueError: If it is a tensor that is sparse, quantised, complex or on the meta device.
    """
    if isinstance(values, Tensor):
        check_tensor(name, values)
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged rows, or tensors among them
        array = np.asarray(None)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"Expected `{name}` to hold real numbers, got {shown(values)}.")
    return array.astype(np.float64)


def check_vectors(name: str, value: object) -> None:
    """Check the blocks of singular vectors in a state.

    Raises:
        TypeError: If they are no mapping from names of layers to floating-point matrices.
        ValueError: If one is sparse, quantised, complex or on the meta device.
    """
    check_type(name, value, Mapping, "a mapping from names of layers to singular vectors")
    blocks: Any = value
    for key, block in blocks.items():
        check_tensor(f"{name}[{key!r}]", block)
        if block.dim() != 2 or not block.is_floating_point():
            raise TypeError(f"Expected `{name}[{key!r}]` to be a floating-point matrix, got {shown(block)}.")
