"""Checks of what users pass in; each error says what was expected, what was given, and what to do."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import TypeGuard

from torch import nn

SHOWN_KEYS = 5
"""Keys of a wrong state in the message: a whole model's would fill the screen."""


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
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    raise TypeError(
        f"{what} expected the model to be a torch.nn.Module, got {got}. Give the network itself, a LightningModule, "
        "say; construct it first, and load a checkpoint into it, where all there is yet is a class, a file or a "
        "state_dict."
    )


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
    """Check that arguments, given by their names, are integers of at least `least`.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"Expected `{name}` to be an integer of at least {least}, got {value!r}.")


def check_name(name: object) -> None:
    """Check a callback's `name`.

    Raises:
        TypeError: If it is neither a string nor None.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"Expected `name` to be a string or None, got {name!r}.")


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
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError
        levels = tuple(float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"Expected `{name}` to be a sequence of numbers, (0.1, 0.2) say, got {values!r}.") from None
    if not levels or not all(math.isfinite(level) and level >= 0 for level in levels):
        raise ValueError(f"Expected `{name}` to be one or more finite numbers of at least 0, got {values!r}.")
    if distinct and len(set(levels)) < len(levels):
        raise ValueError(f"Expected `{name}` to be distinct numbers, got {values!r}.")
    return levels


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, finite, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: float, positive: bool = False) -> float:
    """Return an argument as a float.

    Raises:
        ValueError: If it is not a finite number of at least 0 or, where `positive`, above 0.
    """
    if not is_finite_number(value) or value < 0 or (positive and value == 0):
        expected = "a positive finite number" if positive else "a finite number of at least 0"
        raise ValueError(f"Expected `{name}` to be {expected}, got {value!r}.")
    return float(value)
