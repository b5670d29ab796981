"""The command `lightning-lip`: options from the functions' signatures, and no logic of its own."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import torch
from jsonargparse import CLI, ArgumentParser  # type: ignore[attr-defined]

from lightning_lip.audit.command import audit
from lightning_lip.bench.command import bench
from lightning_lip.errors import AuditError, BoundError, UsageError
from lightning_lip.paper.command import reproduce
from lightning_lip.paper.data import DataError
from lightning_lip.reporting.extras import MissingExtraError
from lightning_lip.reporting.processes import RunError

COMMANDS = {"audit": audit, "bench": bench, "reproduce": reproduce}
FAILURES = (
    AuditError,
    DataError,
    MemoryError,
    MissingExtraError,
    OSError,
    RunError,
    UsageError,
    torch.OutOfMemoryError,
)
"""What is told in one line: what the user can do something about."""

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")
"""What torch says where it has no class of error: on the CPU."""

DESCRIPTION = "See, penalise, bound and certify the Lipschitz constant of a network while it trains."


class _Parser(ArgumentParser):
    """Spells options as commands do: a switch where the default is False, and dashes.

    `--quick`, not `--quick true`; `--max-bound`, not `--max_bound`.
    """

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        # jsonargparse finds its own option, --print_config, by that name.
        if args and args[0].startswith("--") and not args[0].startswith("--print"):
            args = (args[0].replace("_", "-"), *args[1:])
        if kwargs.get("type") is bool and kwargs.get("default") is False:
            del kwargs["type"]
            kwargs["action"] = "store_true"
        return super().add_argument(*args, **kwargs)


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: The arguments, by default those of the process.

    Raises:
        SystemExit: With a message and status 1 if `audit` finds no certified bound within --max-bound, 2 for
            options that make no sense, files that cannot be audited, read or written, a missing extra, a failed run
            or too little memory, 130 for an interrupt from the keyboard.
    """
    try:
        CLI(COMMANDS, args=args, parser_class=_Parser, description=DESCRIPTION)  # type: ignore[no-untyped-call]
        sys.stdout.flush()
    except BoundError as error:
        _end(error, 1)
    except FAILURES as error:
        _end(error, 2)
    except RuntimeError as error:
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        _end(error, 2)
    except KeyboardInterrupt:
        print("lightning-lip: interrupted.", file=sys.stderr)
        raise SystemExit(130) from None


def _end(error: BaseException, status: int) -> NoReturn:
    """Say in one line what went wrong, and end the process."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more at the end, and what cannot be written would end it with another status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"lightning-lip: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
    raise SystemExit(status) from error


if __name__ == "__main__":
    main()
