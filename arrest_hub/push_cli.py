"""`arrest-push` and `arrest-card`: flags -> configuration -> work. No torch, so that a push needs none."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from arrest_hub.cli import Parser, add_fields, follows_unknown
from arrest_hub.command import run_cli
from arrest_hub.errors import ConfigError
from arrest_hub.push_config import CARD_FIELDS, GROUPS, PUSH_FIELDS, CardConfig, PushConfig, unknown_push_flag

PUSH_EPILOG = """\
examples:
  arrest-push runs/mine --repo-id me/resnet50-arrest-linf4 --private
  arrest-push runs/mine --repo-id me/resnet50-arrest-linf4 --license apache-2.0 --tag v1.0
  arrest-push runs/mine --repo-id someone/theirs --create-pr
  arrest-push runs/mine --repo-id me/resnet50-arrest-linf4 --dry-run

Log in first: hf auth login, or HF_TOKEN."""


CARD_EPILOG = """\
examples:
  arrest-card runs/mine
  arrest-card runs/mine --license apache-2.0"""


def push_parser() -> argparse.ArgumentParser:
    """One flag for each field of PushConfig, and the folder without a flag."""
    return _folder_parser(
        "arrest-push",
        "Publish a finetuned model on the Hub: weights, config, results, figures and card, in one commit.",
        PUSH_EPILOG,
        PushConfig,
    )


def card_parser() -> argparse.ArgumentParser:
    """One flag for each field of CardConfig, and the folder without a flag."""
    return _folder_parser(
        "arrest-card", "Make the model card of a run anew, from the files in its export/.", CARD_EPILOG, CardConfig
    )


def _folder_parser(program: str, description: str, epilog: str, config: type) -> argparse.ArgumentParser:
    parser = Parser(
        prog=program, description=description, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", nargs="*", metavar="FOLDER", help=PUSH_FIELDS["folder"].metadata["help"])
    add_fields(parser, config, GROUPS, leave_out=("folder",))
    return parser


def parse_push(argv: Sequence[str]) -> PushConfig:
    """Flags of `arrest-push` -> configuration.

    Raises:
        ConfigError: every problem found at once.
    """
    return PushConfig(**_folder_flags(push_parser(), argv, PUSH_FIELDS, PushConfig)).validate()


def parse_card(argv: Sequence[str]) -> CardConfig:
    """Flags of `arrest-card` -> configuration.

    Raises:
        ConfigError: every problem found at once.
    """
    return CardConfig(**_folder_flags(card_parser(), argv, CARD_FIELDS, CardConfig)).validate()


def _folder_flags(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    known: dict[str, dataclasses.Field[Any]],
    config: type[PushConfig] | type[CardConfig],
) -> dict[str, Any]:
    namespace, unknown = parser.parse_known_args(list(argv))
    flags: dict[str, Any] = vars(namespace)
    strange = [word for word in unknown if word.startswith("-")]
    # a folder that stands behind a flag is left over too
    words = [*flags.pop("folder"), *(word for word in unknown if word not in strange)]
    sure = [word for word in words if not follows_unknown(argv, word, strange)]
    problems = [unknown_push_flag(word, known) for word in strange]
    if len(sure) > 1:
        problems.append(f"{len(sure)} folders are given ({', '.join(sure)}): give one run.")
    # a word behind an unknown flag is either that flag's value or the folder
    flags["folder"] = (sure or words or [""])[0]
    if problems:
        try:
            config(**flags).validate()
        except ConfigError as error:
            problems += error.problems
        raise ConfigError(list(dict.fromkeys(problems)))
    return flags


def push_command(argv: Sequence[str]) -> None:
    """`arrest-push`: parse, then publish. Raises ArrestError for bad input and for what the Hub refuses."""
    config = parse_push(argv)
    from arrest_hub.hub import run_push

    run_push(config, print)


def card_command(argv: Sequence[str]) -> None:
    """`arrest-card`: parse, then write the card. Raises ArrestError for bad input."""
    config = parse_card(argv)
    from arrest_hub.hub import write_card

    print(f"wrote {write_card(config)}")


def push_main() -> None:
    """Entry point of `arrest-push`."""
    sys.exit(run_cli(push_command, sys.argv[1:], resumes=False))


def card_main() -> None:
    """Entry point of `arrest-card`."""
    sys.exit(run_cli(card_command, sys.argv[1:], resumes=False))
