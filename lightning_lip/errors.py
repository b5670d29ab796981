"""Everything that the package raises of its own."""

from __future__ import annotations


class UnsupportedLayerError(ValueError):
    """A selected module has weights whose linear operator is not known."""


class UsageError(ValueError):
    """An option of a command has a value that it cannot be."""


class AuditError(ValueError):
    """The audit cannot be made: an option, a file, a name or an input is not what it must be."""


class DataError(ValueError):
    """An installed package holds another version of a data set."""


class BoundError(Exception):
    """The network's certified Lipschitz bound is above --max-bound, or there is none."""
