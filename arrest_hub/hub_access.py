"""Talking to the Hub: who we are there, what its refusals mean in plain words, and trying again what is temporary.

Tokens come from `hf auth login` or HF_TOKEN, and are never printed, stored or taken from the command line. No torch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from arrest_hub.errors import HubError, HubRefusal, causes, did_you_mean, first_line
from arrest_hub.files import FULL

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries of a call that failed for a reason that may pass."""
_TEMPORARY_STATUS = (408, 429, 500, 502, 503, 504)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def without_tokens(text: str) -> str:
    """``text`` with everything that looks like an access token made unreadable."""
    return re.sub(r"\b(hf|api|jwt)_[A-Za-z0-9_.-]{4,}|(?<=Bearer )\S+", "***", text)


def explain(error: BaseException) -> tuple[str, bool] | None:
    """A failed call's reason in one sentence without its full stop, and whether it may pass by itself.

    None for what is no failure of the Hub, the network or the disk, but a mistake of the program.
    """
    from huggingface_hub import errors as hub

    chain = list(causes(error))
    for link in chain:
        if isinstance(link, OSError) and link.errno in FULL:
            return f"there is no room left on this machine's disk ({link.strerror})", False
    said_all = " ".join(str(link) for link in chain)
    if re.search(r"os error (27|28|122)\b", said_all):  # Xet's part of the client, which is not in Python, says it so
        return f"there is no room left on this machine's disk ({without_tokens(first_line(chain[-1]))})", False
    if "xet-write-token" in said_all and re.search(r"\b404\b", said_all):
        return (
            "the Hub has no Xet storage, to which the client uploads by default and from which it has no way back: set "
            "HF_HUB_DISABLE_XET=1 to upload by LFS"
        ), False
    for link in chain:
        if isinstance(link, hub.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so no connection is made: unset it", False
        if isinstance(link, hub.HfHubHTTPError):
            status = link.response.status_code
            said = without_tokens((link.server_message or link.response.reason_phrase).strip().replace("\n", " "))
            if status == 401 and not isinstance(link, hub.RepositoryNotFoundError):
                return f"the Hub does not accept your access token (it may have expired): {_LOG_IN}", False
            if isinstance(link, hub.RepositoryNotFoundError):
                return "the repository does not exist, or your access token may not see it", False
            if status == 400 and "validate-yaml" in str(link.response.url):
                return f"the Hub refuses the header of README.md ({said})", False
            if status == 403:
                return (
                    f"the Hub forbids it ({said}): your access token lacks the permission to write there. Make one "
                    "that may on the Hub's settings page, then " + _LOG_IN
                ), False
            if status == 412:
                return "the repository changed meanwhile", True
            return f"the Hub answered {status} ({said})", status in _TEMPORARY_STATUS
    for link in chain:
        transport = any(base.__name__ in ("TransportError", "TimeoutException") for base in type(link).__mro__)
        if transport or isinstance(link, (ConnectionError, TimeoutError)):
            why = without_tokens(first_line(link))
            return f"the connection to the Hub failed ({why})", _may_pass(why)
    xet = next((link for link in chain if _from_xet(link)), None)
    if xet is not None:
        why = without_tokens(first_line(xet))
        return f"the upload to the Hub's Xet storage failed ({why})", _may_pass(why)
    return None


def _from_xet(error: BaseException) -> bool:
    """Whether hf_xet, which is written in Rust and has no errors of its own in some versions, raised it."""
    return type(error).__module__.startswith("hf_xet") or (
        isinstance(error, RuntimeError) and re.search(r"(?i)xet|CAS|data processing", str(error)) is not None
    )


def _may_pass(why: str) -> bool:
    """Whether a failure of the transport may pass: an answer of the server that says no does not."""
    return re.search(r"\b(400|401|403|404)\b", why) is None


def with_retries(call: Callable[[], T], doing: str, say: Callable[[str], None], waits: Sequence[float] = WAITS) -> T:
    """``call()``, again after a pause while it fails for a reason that may pass; ``doing`` completes "cannot ...".

    Raises:
        HubError: it still fails, or for a reason that will not pass.
    """
    for number, wait in enumerate((*waits, None), start=1):
        try:
            return call()
        except HubError:
            raise
        except Exception as error:
            reason = explain(error)
            if reason is None:
                raise
            why, temporary = reason
            if not temporary or wait is None:
                tries = f" (tried {number} times)" if number > 1 else ""
                raise HubError(f"cannot {doing}: {why}{tries}.") from error
            say(f"{why}; trying again in {wait:g} s")
        time.sleep(wait)
    raise AssertionError  # the last turn returns or raises


def check_access(repo_id: str, *, private: bool, create_pr: bool, say: Callable[[str], None]) -> str:
    """The full id, if the token may write there as far as the Hub tells without writing; changes nothing.

    ``repo_id`` is you/name, or name alone for the token's own account.

    Raises:
        HubError: there is no token, it is not accepted or may only read, the namespace is not its own, or the Hub
            cannot be reached. HubRefusal: the repository exists and is public though ``private``, or a pull request
            is to go to one that does not exist.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise HubError(f"cannot publish {repo_id}: there is no access token on this machine. To publish, {_LOG_IN}.")
    api = HfApi()
    me = with_retries(api.whoami, f"publish {repo_id}", say)
    user = str(me["name"])
    full = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    access = (me.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise HubError(
            f"cannot publish {full}: the access token of {user} may only read. Make one that may write on the Hub's "
            f"settings page, then {_LOG_IN}."
        )
    if not create_pr:
        _check_namespace(full, user, me.get("orgs") or [])
    exists = with_retries(lambda: api.repo_exists(full), f"look at {full}", say)
    if create_pr and not exists:
        raise HubRefusal(f"cannot open a pull request at {full}: there is no such repository, or you may not see it.")
    if exists and private:
        info = with_retries(lambda: api.model_info(full), f"look at {full}", say)
        if not info.private:
            raise HubRefusal(
                f"{full} exists and is public, and --private only says how a new repository is made. Make it private "
                "on its settings page first, give another id, or leave --private out."
            )
    return full


def _check_namespace(repo_id: str, user: str, orgs: list[dict[str, Any]]) -> None:
    namespace = repo_id.split("/")[0]
    writable = [str(org["name"]) for org in orgs if org.get("roleInOrg") != "read"]
    if namespace in (user, *writable):
        return
    if namespace in [org["name"] for org in orgs]:
        raise HubError(f"cannot publish {repo_id}: you ({user}) may only read what {namespace} has. Ask its owners.")
    yours = f" or one of your organisations ({', '.join(writable)})" if writable else ""
    raise HubError(
        f"cannot publish {repo_id}: {namespace!r} is not your account ({user}){yours}."
        f"{did_you_mean(namespace, [user, *writable])} Give an id of your own, propose it with arrest-push "
        "--create-pr, or log in (`hf auth login`) as one who may write there."
    )
