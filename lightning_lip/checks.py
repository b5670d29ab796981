"""Checks of what users pass in; each error says what was expected, what was given, and what to do."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import TypeGuard

from torch import Tensor, nn

SHOWN_KEYS = 5
"""Keys of a wrong state in the message: a whole model's would fill the screen."""


def got(value: object) -> str:
    """Return what was given, for a message."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


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
        f"{what} expected the model to be a torch.nn.Module, got {got(model)}. Give the network itself, a LightningModule, "
        "say; construct it first, and load a checkpoint into it, where all there is yet is a class, a file or a "
        "state_dict."
    )


def check_finite(name: str, values: Tensor) -> None:
    """Check that data holds no NaN and no infinity.

    Raises:
        ValueError: If it does.
    """
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


def check_integer(name: str, value: object, least: int) -> None:
    """Check that an argument is an integer of at least so much.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Expected `{name}` to be an integer of at least {least}, got {value!r}.")


def check_name(name: object) -> None:
    """Check a callback's `name`.

    Raises:
        TypeError: If it is neither a string nor None.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"Expected `name` to be a string or None, got {name!r}.")


def check_numbers(name: str, values: object) -> tuple[float, ...]:
    """Return a sequence of numbers as floats.

    Raises:
        TypeError: If it is none.
    """
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError
        return tuple(float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"Expected `{name}` to be a sequence of numbers, (0.1, 0.2) say, got {values!r}.") from None


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, finite, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_coefficient(coefficient: float) -> float:
    """Return `coefficient` as a float.

    Raises:
        ValueError: If it is not a finite number of at least 0.
    """
    if not is_finite_number(coefficient) or coefficient < 0:
        raise ValueError(f"Expected `coefficient` to be a finite number of at least 0, got {coefficient!r}.")
    return float(coefficient)


def check_target(target: float, name: str = "target") -> float:
    """Return a target as a float.

    Raises:
        ValueError: If it is not a positive finite number.
    """
    if not is_finite_number(target) or target <= 0:
        raise ValueError(f"Expected `{name}` to be a positive finite number, got {target!r}.")
    return float(target)
