"""`python -m moe_runtime COMMAND ...`: what launchers start, one process a rank."""

import os
import sys


def take_local_rank(arguments: list[str]) -> tuple[list[str], str | None]:
    """Removes the `--local_rank N` that some launchers put before the command; gives back N."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            used = 1 if equals else 2
            rest = arguments[:index] + arguments[index + used :]
            return rest, value or next(iter(arguments[index + 1 : index + 2]), None)
    return arguments, None


def main() -> None:
    """Runs the command line."""
    arguments, local_rank = take_local_rank(sys.argv[1:])
    sys.argv[1:] = arguments
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", local_rank)
    try:
        from moe_runtime.cli.app import main as run_command

        run_command()
    except KeyboardInterrupt:
        # Ctrl-C before there is anything to save, such as while torch is being imported.
        sys.exit(130)


if __name__ == "__main__":
    main()
