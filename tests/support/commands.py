"""The command `lightning-lip`, run in this process."""

from lightning_lip import cli


def run_cli(*arguments):
    """Return the exit status of the command."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return stopped.code
    return 0
