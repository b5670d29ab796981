"""The command `lightning-lip`: options from the functions' signatures, and no logic of its own."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from jsonargparse import CLI, ArgumentParser  # type: ignore[attr-defined]

from lightning_lip.audit.command import audit
from lightning_lip.bench.command import bench, scoreboard
from lightning_lip.paper.command import reproduce
from lightning_lip.reporting.failures import in_one_line, told_in_one_line

COMMANDS = {"audit": audit, "bench": bench, "reproduce": reproduce, "scoreboard": scoreboard}
DESCRIPTION = "See, penalise, bound and certify the Lipschitz constant of a network while it trains."


class _Parser(ArgumentParser):
    """Spells options as commands do: a switch where the default is False, and dashes.

    `--quick`, not `--quick true`; `--max-bound`, not `--max_bound`. A wrong one is told in one line.
    """

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        # jsonargparse finds its own option, --print_config, by that name.
        if args and args[0].startswith("--") and not args[0].startswith("--print"):
            args = (args[0].replace("_", "-"), *args[1:])
        if kwargs.get("type") is bool and kwargs.get("default") is False:
            del kwargs["type"]
            kwargs["action"] = "store_true"
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"lightning-lip: {in_one_line(message)} (see --help)", file=sys.stderr)
        raise SystemExit(2) from ex


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: The arguments, by default those of the process.

    Raises:
        SystemExit: With a message and status 1 if `audit` finds no certified bound within --max-bound, 2 for
            options that make no sense, files that cannot be audited, read or written, a missing extra, a failed run
            or too little memory, 130 for an interrupt from the keyboard.
    """
    with told_in_one_line():
        CLI(COMMANDS, args=args, parser_class=_Parser, description=DESCRIPTION)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
