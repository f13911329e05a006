"""`python -m arrest_hub finetune|eval|push|card ...`, for `accelerate launch -m arrest_hub finetune ...`."""

from __future__ import annotations

import sys

from arrest_hub.cli import eval_command, finetune_command
from arrest_hub.command import leave, run_cli
from arrest_hub.errors import did_you_mean
from arrest_hub.push_cli import card_command, push_command

COMMANDS = {"finetune": finetune_command, "eval": eval_command, "push": push_command, "card": card_command}


def main() -> int:
    """Dispatch to a command. Returns the exit code."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        given = sys.argv[1] if len(sys.argv) > 1 else ""
        hint = did_you_mean(given, COMMANDS)
        print(
            f"error: {given!r} is not a command.{hint} Type: python -m arrest_hub {'|'.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    return run_cli(COMMANDS[sys.argv[1]], sys.argv[2:])


if __name__ == "__main__":
    leave(main())
