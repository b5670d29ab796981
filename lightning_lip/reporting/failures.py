"""What a command says, in one line, when something fails that its user can do something about."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, get_args, get_type_hints

import torch

from lightning_lip.checks import shown
from lightning_lip.errors import AuditError, BoundError, DataError, UsageError
from lightning_lip.reporting.extras import MissingExtraError
from lightning_lip.reporting.processes import RunError, excepthook

FAILURES = (
    AuditError,
    DataError,
    MemoryError,
    MissingExtraError,
    OSError,
    RunError,
    UnicodeDecodeError,  # of a configuration that is no text
    UsageError,
    torch.OutOfMemoryError,
)

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")
"""What torch says where it has no class of error: on the CPU."""


@contextmanager
def told_in_one_line(program: str = "lightning-lip") -> Iterator[None]:
    """End the process in one line on standard error, where what runs inside fails for one of :data:`FAILURES`.

    Args:
        program: What the line begins with.

    Raises:
        SystemExit: With status 1 for a bound that is not kept, 2 for another failure, 130 for an interrupt from the
            keyboard.
    """
    hook, threading.excepthook = threading.excepthook, excepthook
    try:
        yield
        sys.stdout.flush()
    except BoundError as error:
        _end(program, error, 1)
    except FAILURES as error:
        _end(program, error, 2)
    except RuntimeError as error:
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        _end(program, error, 2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        threading.excepthook = hook


def check_options(command: Callable[..., Any], options: Mapping[str, object]) -> None:
    """Check the types of a command's options: its parser does so for text, but not where Python or a file gives them.

    Args:
        command: The function, whose annotations are of str, bool, int, float and None.
        options: Its arguments by name.

    Raises:
        UsageError: If one has another type than its annotation says; an integer serves as a float.
    """
    hints = get_type_hints(command)
    for name, value in options.items():
        kinds = get_args(hints[name]) or (hints[name],)
        allowed = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UsageError(f"Expected --{name.replace('_', '-')} to be {words}, got {shown(value)}.")


def in_one_line(text: object) -> str:
    """Return a message without its line breaks."""
    return " ".join(str(text).split())


def _end(program: str, error: BaseException, status: int) -> NoReturn:
    """Say in one line what went wrong, and end the process."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more at the end, and what cannot be written would end it with another status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"{program}: {in_one_line(error) or 'out of memory'}", file=sys.stderr)
    raise SystemExit(status) from error
