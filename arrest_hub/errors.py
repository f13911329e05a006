"""Errors a user can act on. The command line prints them without a traceback and exits with code 2.

Every message says three things: the value, why it is wrong, and what to type instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches


class ArrestError(Exception):
    """Base of every error that is the input's fault rather than the program's."""


class ConfigError(ArrestError):
    """One or more things are wrong with the configuration; ``problems`` holds one line for each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class BackboneError(ArrestError):
    """A model id cannot be turned into a classifier (unknown, damaged, unsupported)."""


class DataError(ArrestError):
    """A dataset cannot be used (unknown, unreachable, no images or labels, a corrupt image)."""


class HubError(ArrestError):
    """The Hub cannot be reached or refuses (no network, gated, not found)."""


class HubRefusal(HubError):
    """What the repository is, or what is in it, stands in the way: trying again changes nothing."""


class HashMismatch(HubError):
    """A file from the Hub is not what the Hub says it is."""


class AlreadyReported(ArrestError):
    """Another process of the run found the error and reports it; this one just stops."""


class OtherProcessFailed(RuntimeError):
    """Another process of the run failed, by no fault of the input, and says how; this one just stops."""


class Terminated(ArrestError):
    """SIGTERM or Ctrl-C asked the run to stop, and it did, with everything saved: ``exit_code`` is 143 or 130."""

    def __init__(self, text: str, exit_code: int = 143) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of one that says nothing, its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first: libraries wrap each other's failures."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        yield link
        seen.append(link)
        link = link.__cause__ or link.__context__


def did_you_mean(value: str, known: Iterable[str], n: int = 1) -> str:
    """``" Did you mean 'x'?"`` with the names in ``known`` nearest to ``value``, or ``""``."""
    close = get_close_matches(value, list(known), n=n, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(repr(name) for name in close) + "?"


def hub_failure(error: Exception, kind: str, repo_id: str) -> ArrestError | None:
    """Turn a failure of the Hub's client into one clear error, or None if it is some other failure.

    ``kind`` is ``"model"`` or ``"dataset"``; the caller raises what is returned ``from error``.
    The chain of causes is searched, since ``datasets`` and ``timm`` wrap the client's own errors.
    """
    from huggingface_hub import errors as hub

    chain = list(causes(error))
    for link in chain:
        if isinstance(link, hub.GatedRepoError):
            return HubError(
                f"{kind} {repo_id!r} is gated: its owner must grant access. Ask for it on the {kind}'s "
                "page on the Hub, then log in with `hf auth login` (or set HF_TOKEN) and run this again."
            )
        if isinstance(link, hub.RevisionNotFoundError):
            return HubError(
                f"{kind} {repo_id!r} has no such revision. Give a branch, tag or commit that exists, "
                "as in org/name@main."
            )
        if isinstance(link, hub.RepositoryNotFoundError):
            return HubError(
                f"{kind} {repo_id!r} was not found on the Hub. Check the spelling; if it is private, log in "
                "with `hf auth login` (or set HF_TOKEN)."
            )
    for link in chain:
        if isinstance(link, hub.HfHubHTTPError) and not isinstance(link, hub.EntryNotFoundError):
            status = link.response.status_code
            if status == 401:
                return HubError(
                    f"{kind} {repo_id!r}: the Hub does not accept your access token (it may have expired). Log in "
                    "again with `hf auth login`, or correct or unset HF_TOKEN."
                )
            return HubError(
                f"{kind} {repo_id!r} cannot be fetched: the Hub answered {status} "
                f"({link.server_message or link.response.reason_phrase}). Try again later, or give the path of a local "
                "folder."
            )
    for link in chain:
        # the client's own network errors come from httpx or its successor, depending on the version
        transport = any(base.__name__ == "TransportError" for base in type(link).__mro__)
        if transport or isinstance(link, (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError)):
            return HubError(
                f"{kind} {repo_id!r} is not on this machine and the Hub cannot be reached "
                f"({first_line(link)}). Check the network (or unset "
                f"HF_HUB_OFFLINE), or give the path of a local folder."
            )
    return None
