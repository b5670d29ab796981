"""Optional dependencies, imported only where the experiment needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

REMEDY = 'pip install "lightning-lip[paper]"'
MODULES = ("matplotlib", "mlxtend", "scipy", "sklearn")


class MissingExtraError(ModuleNotFoundError):
    """A module of the `paper` extra is not installed; the message names the remedy."""


def extra(module: str) -> ModuleType:
    """Import a module of the `paper` extra.

    Args:
        module: The dotted name, for instance `"scipy.stats"`.

    Returns:
        The module.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"The paper's experiment needs {module.partition('.')[0]}, which is not installed "
            f"({error}). Install the extra: {REMEDY}"
        ) from error


def require_extras() -> None:
    """Import every module of the extra, so that one that is missing shows before anything is trained.

    Raises:
        MissingExtraError: If one is not installed.
    """
    for module in MODULES:
        extra(module)
