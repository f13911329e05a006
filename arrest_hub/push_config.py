"""The configurations of `arrest-push` and `arrest-card`: what they hold and what is valid. No torch, no network."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from typing import Any

from arrest_hub.config import shared_field as _shared
from arrest_hub.errors import ConfigError, did_you_mean
from arrest_hub.fields import config_field as _field
from arrest_hub.fields import convert_all, flag, flag_with, repo_id_problem
from arrest_hub.licenses import license_problems

GROUPS = ("hub", "card", "run")
# a subset of what git takes for a branch or a tag: what no shell and no address needs to escape
_REF = r"(?!.*(?://|\.\.|\.lock$))[A-Za-z0-9_][A-Za-z0-9._/-]*(?<![./])"


@dataclass
class CardConfig:
    """What `arrest-card` needs to know: whose card it is, and what no file of the run tells.

    Raises:
        ConfigError: from `validate`, listing every problem at once.
    """

    # fmt: off
    folder: str = _field("", "str", "hub", "run folder of arrest-finetune, or its export/")
    repo_id: str | None = _field(None, "str", "hub",
        "the model's id on the Hub, as in me/resnet50-arrest-linf4", optional=True)
    license: str | None = _shared("license")
    license_name: str | None = _shared("license_name")
    license_link: str | None = _shared("license_link")
    overwrite: bool = _field(False, "bool", "card", "replace a README.md that was edited by hand")
    # fmt: on

    def validate(self) -> CardConfig:
        """Check everything that needs no file and no network.

        Raises:
            ConfigError: with a line for each problem.
        """
        problems = _problems(self)
        if problems:
            raise ConfigError(problems)
        return self


@dataclass
class PushConfig:
    """Everything one push needs to know.

    Raises:
        ConfigError: from `validate`, listing every problem at once.
    """

    # fmt: off
    folder: str = _field("", "str", "hub", "run folder of arrest-finetune, or its export/")
    repo_id: str | None = _field(None, "str", "hub",
        "where to: you/name, or name alone for your own account", optional=True)
    private: bool = _field(False, "bool", "hub", "make the repository a private one, if it does not exist yet")
    revision: str | None = _field(None, "str", "hub",
        "branch to commit to, made if it does not exist; default: main", optional=True)
    create_pr: bool = _field(False, "bool", "hub", "propose the commit as a pull request instead of making it")
    tag: str | None = _field(None, "str", "hub", "tag the commit, as in v1.0", optional=True)
    message: str | None = _field(None, "str", "hub", "first line of the commit's message", optional=True)
    license: str | None = _shared("license")
    license_name: str | None = _shared("license_name")
    license_link: str | None = _shared("license_link")
    dry_run: bool = _field(False, "bool", "run", "write the card, say what would be pushed, and open no connection")
    # fmt: on

    def validate(self) -> PushConfig:
        """Check everything that needs no file and no network.

        Raises:
            ConfigError: with a line for each problem.
        """
        problems = _problems(self)
        if not self.repo_id and not any("--repo-id" in problem for problem in problems):
            problems.append("--repo-id is missing: give the id to publish under, as in me/resnet50-arrest-linf4.")
        for name in ("revision", "tag"):
            value = getattr(self, name)
            if isinstance(value, str) and not re.fullmatch(_REF, value):
                problems.append(
                    f"{flag(name)} {value!r} is not a name for a {'branch' if name == 'revision' else 'tag'}: give one "
                    "of letters, digits, '.', '_', '-' and '/', such as v1.0."
                )
        if self.create_pr and self.revision not in (None, "main"):
            problems.append(f"--create-pr proposes a change of main and not of --revision {self.revision}: give one.")
        if self.create_pr and self.tag:
            problems.append(f"--tag {self.tag} names a commit that a pull request has yet to make: tag it when merged.")
        if problems:
            raise ConfigError(problems)
        return self

    def command(self) -> str:
        """The command line that does this push, quoted for a shell."""
        words = ["arrest-push", f"./{self.folder}" if self.folder.startswith("-") else self.folder]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "folder" or value == field.default:
                continue
            words += [flag(field.name)] if value is True else flag_with(field.name, str(value))
        return shlex.join(words)


PUSH_FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(PushConfig)}
CARD_FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(CardConfig)}


def _problems(config: PushConfig | CardConfig) -> list[str]:
    """What both commands check."""
    good, problems = convert_all(config)
    if not config.folder:
        problems.append("no folder is given: name a run of arrest-finetune, as in runs/mine.")
    if isinstance(config.repo_id, str) and (problem := repo_id_problem("--repo-id", config.repo_id)):
        problems.append(problem)
    if {"license", "license_name", "license_link"} <= good:
        problems += license_problems(config.license, config.license_name, config.license_link)
    return problems


def unknown_push_flag(word: str, known: dict[str, dataclasses.Field[Any]]) -> str:
    """One line for a misspelt flag of `arrest-push` or `arrest-card`, as typed, with the nearest real one."""
    word = word.split("=")[0]
    near = did_you_mean(flag(word.lstrip("-")), [flag(key) for key in known])
    return f"unknown flag {word}.{near} See --help."
