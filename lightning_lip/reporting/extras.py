"""Optional packages, imported only where a command needs them."""

from __future__ import annotations

import importlib
from types import ModuleType


def install_command(name: str) -> str:
    """Return the command that installs an extra, from a checkout: the package is on no index yet."""
    return f'pip install -e ".[{name}]"'


MODULES = ("matplotlib", "mlxtend", "scipy", "sklearn")


class MissingExtraError(ModuleNotFoundError):
    """A module of an extra is not installed; the message names the remedy."""


def extra(module: str, name: str = "paper") -> ModuleType:
    """Import a module of an extra.

    Args:
        module: The dotted name, for instance `"scipy.stats"`.
        name: The name of the extra, `"paper"` or `"bench"`.

    Returns:
        The module.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"This command needs {module.partition('.')[0]}, which is not installed ({error}). "
            f"Install the extra, in a checkout of the repository: {install_command(name)}"
        ) from error


def require_extras() -> None:
    """Import every module of the `paper` extra, so that a missing one is reported before anything is trained.

    Raises:
        MissingExtraError: If one is not installed.
    """
    for module in MODULES:
        extra(module)
