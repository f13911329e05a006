"""Publishing a run: what is in its `export/`, with its card, as one commit on the Hub. No torch.

The push is a function of the files in `export/` alone: it needs no GPU and no training data, and can be repeated. Only
what differs is sent; nothing on disk changes before the commit is made.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from arrest_hub.card_facts import (
    CardFacts,
    Publication,
    has_body,
    is_sealed,
    read_card,
    read_publication,
)
from arrest_hub.errors import ConfigError, HubError, HubRefusal
from arrest_hub.hub_access import WAITS, check_access, explain, with_retries
from arrest_hub.licenses import License, choose_license
from arrest_hub.model_card import card_is_generated, render_card
from arrest_hub.push_config import CardConfig, PushConfig
from arrest_hub.pushed_files import (
    CARD,
    LocalFile,
    architecture_name,
    differing,
    is_own,
    local_file,
    local_files,
    others,
    weight_problems,
)
from arrest_hub.training_record import FILE_NAME as RECORD


@dataclass(frozen=True)
class Pushed:
    """What a push did. ``commit`` is the commit that holds the files; ``changed`` and ``deleted`` are the paths that
    differ from what was there before (both empty: nothing was committed). A dry run has no commit."""

    repo_id: str
    commit: str | None
    url: str | None
    changed: tuple[str, ...]
    deleted: tuple[str, ...]


def push(folder: str | os.PathLike[str], repo_id: str, *, say: Callable[[str], None] = print, **options: Any) -> Pushed:
    """Publish the model of a run as one commit: weights, config, results, figures and card.

    ``folder`` is a run folder or its `export/`; ``repo_id`` is you/name. ``options`` are the other fields of
    `PushConfig` (the flags of `arrest-push`): private, revision, create_pr, tag, message, license, dry_run.
    ``say`` is given sentences about what happens.

    Raises:
        ConfigError: something is wrong with the options or the folder, or no licence is known: before any connection.
        HubError: the Hub cannot be reached or refuses; the folder is then as it was.
    """
    unknown = [name for name in options if name not in PushConfig.__dataclass_fields__]
    if unknown:
        raise ConfigError([f"push() has no option {name!r}." for name in unknown])
    return run_push(PushConfig(folder=os.fspath(folder), repo_id=repo_id, **options).validate(), say)


def run_push(config: PushConfig, say: Callable[[str], None]) -> Pushed:
    """`push` with its options as one object."""
    assert config.repo_id is not None  # validated
    export = find_export(config.folder)
    given = _given_license(config)
    card = card_for(export, config.repo_id, given)
    files = local_files(export, card)  # every problem of the folder is found before any connection is made
    measured = _facts(export, Publication()).report.model
    if problems := weight_problems(files, measured.get("weights_files", {})):
        raise ConfigError(problems)
    if strange := others(files):
        say(f"pushed too, though no run writes it: {', '.join(strange)}")
    if config.dry_run:
        _write_card(export, card)
        for path, file in files.items():
            say(f"would push {path} ({file.size:,} bytes)")
        say(f"nothing was sent; the card is {export / CARD}")
        return Pushed(config.repo_id, None, None, tuple(files), ())
    try:
        full = check_access(config.repo_id, private=config.private, create_pr=config.create_pr, say=say)
        card = card_for(export, full, given)
        if (named := read_publication(card.decode(errors="replace")).repo_id) not in (None, full):
            say(f"{CARD} was edited by hand and is published as it is: it speaks of {named}, not of {full}")
        pushed = _Repository(full, config, say).push(files | {CARD: local_file(card)})
        _write_card(export, card)
    except HubRefusal:
        raise
    except HubError as error:
        raise HubError(f"{error}\nTry again with: {config.command()}") from error
    done = "proposed" if config.create_pr else "published"
    say(f"{done} {pushed.url}" if pushed.changed or pushed.deleted else f"{full} has all of it already: {pushed.url}")
    return pushed


def check_push(config: PushConfig, say: Callable[[str], None]) -> None:
    """What `run_push` checks before it needs the files: that a token is there and may write to the repository, and that
    no model of others is in it.

    Raises:
        HubError: it may not, there is one, or the Hub cannot be reached.
    """
    assert config.repo_id is not None  # validated
    full = check_access(config.repo_id, private=config.private, create_pr=config.create_pr, say=say)
    _Repository(full, config, say).check()


def write_card(config: CardConfig) -> Path:
    """Make the card of a run anew from the files on disk, keeping the licence and the id that it had.

    Raises:
        ConfigError: there is nothing to make it from, or it was edited and ``overwrite`` was not given.
    """
    export = find_export(config.folder)
    if not config.overwrite and not card_is_generated(export):
        raise ConfigError(f"{export / CARD} was edited by hand: give --overwrite to replace it.")
    before = read_publication(read_card(export / CARD))
    publication = Publication(config.repo_id or before.repo_id, _given_license(config) or before.license)
    _write_card(export, render_card(_facts(export, publication)).encode())
    return export / CARD


def find_export(folder: str) -> Path:
    """The `export/` of a run folder, or the folder itself if it is one.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(folder).expanduser()
    for candidate in (path / "export", path):
        if (candidate / "results.json").is_file() and (candidate / "config.json").is_file():
            return candidate
    if not path.is_dir():
        raise ConfigError(f"{folder!r} is not a folder: give a run of arrest-finetune, as in runs/mine.")
    if (path / "export").is_dir():
        raise ConfigError(
            f"{path / 'export'} is not whole (it has no config.json or no results.json): export the run again with "
            "arrest-finetune --resume."
        )
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{folder!r} is a run that is not finished: it has no export/. Go on with --resume first.")
    raise ConfigError(
        f"{folder!r} is neither a run of arrest-finetune nor its export/ (it has no config.json and results.json)."
    )


def card_for(export: Path, repo_id: str, given: License | None) -> bytes:
    """The card to publish: made anew, or as it was edited by hand.

    Raises:
        ConfigError: no licence is known, or an edited card states another one than ``given``.
    """
    before = read_publication(read_card(export / CARD))
    facts = _facts(export, before)
    base = facts.record.base if facts.record else None
    license, problem = choose_license(
        given or before.license, base.license if base else None, base.name if base else None
    )
    if problem:
        raise ConfigError(problem)
    if card_is_generated(export):
        return render_card(_facts(export, Publication(repo_id, license))).encode()
    if before.license != license:
        raise ConfigError(
            f"{export / CARD} was edited by hand and states {before.license.id if before.license else 'no licence'}: "
            f"write the licence into its header, or make the card anew with arrest-card {export} --overwrite."
        )
    return (export / CARD).read_bytes()


def _facts(export: Path, publication: Publication) -> CardFacts:
    """`CardFacts.from_folder`. Raises ConfigError: a file is missing or damaged."""
    try:
        return CardFacts.from_folder(export, publication)
    except (ValueError, KeyError, OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{export} is not whole ({' '.join(str(error).split())}): export the run again with arrest-finetune "
            "--resume."
        ) from error


class _Repository:
    """The repository while it is pushed to."""

    def __init__(self, repo_id: str, config: PushConfig, say: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi

        self.repo_id, self.config, self.say = repo_id, config, say
        self.branch = config.revision or "main"
        self.api = HfApi()

    def push(self, files: dict[str, LocalFile]) -> Pushed:
        if not self.config.create_pr:
            self._try("create the repository", self._create)
        pushed: Pushed = self._try(f"push to {self.repo_id}", lambda: self._commit(files))
        assert pushed.commit is not None
        if pushed.changed or pushed.deleted:
            self._verify({path: files[path] for path in pushed.changed}, pushed.commit)
        if self.config.tag:
            self._try(f"tag {self.repo_id}", lambda: self._tag(pushed.commit))
        return pushed

    def check(self) -> None:
        """Raises HubRefusal if the branch holds a model that `arrest-push` did not put there."""
        if not self.config.create_pr:
            self._try(f"look at {self.repo_id}", self._check_names)

    def _check_names(self) -> None:
        if self.api.repo_exists(self.repo_id) and self.api.revision_exists(self.repo_id, self.branch):
            head = self.api.model_info(self.repo_id, revision=self.branch).sha
            assert head is not None
            self._check_ours(self._remote(head), head)

    def _try(self, doing: str, call: Callable[[], Any]) -> Any:
        # whether a pull request was made before its answer was lost is not known: a second one would be worse
        return with_retries(call, doing, self.say, waits=() if self.config.create_pr else WAITS)

    def _create(self) -> None:
        """Make repository and branch if they do not exist. Only what is new is made private."""
        if not self.api.repo_exists(self.repo_id):
            self.api.create_repo(self.repo_id, private=self.config.private or None, exist_ok=True)
        if self.branch != "main":
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)

    def _tagged(self) -> str | None:
        tags = self.api.list_repo_refs(self.repo_id).tags
        return next((tag.target_commit for tag in tags if tag.name == self.config.tag), None)

    def _tag(self, commit: str | None) -> None:
        if self._tagged() is None:
            self.api.create_tag(self.repo_id, tag=self.config.tag or "", revision=commit)

    def _remote(self, revision: str) -> dict[str, tuple[str, str | None]]:
        """Path -> (git's hash, SHA-256 of a large file) of everything at a commit."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return {
            entry.path: (entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def _commit(self, files: dict[str, LocalFile]) -> Pushed:
        """One commit with what differs from the branch; none if nothing does. Tried again, it sees its own success."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self.api.model_info(self.repo_id, revision=self.branch).sha
        assert head is not None
        remote = self._remote(head)
        if not self.config.create_pr:
            self._check_ours(remote, head, files["config.json"].content)
        changed = differing(files, remote)
        if CARD in changed and CARD in remote and not self.config.create_pr and self._keeps_card(files[CARD], head):
            if any(path.endswith(".safetensors") for path in changed):
                raise HubRefusal(
                    f"the {CARD} of {self.repo_id} was edited, there or before an earlier push, and what it states is "
                    "of other weights than these: delete it there and push again, or propose the change with "
                    "--create-pr."
                )
            self.say(
                f"the {CARD} of {self.repo_id} was edited, there or before an earlier push, and stays as it is, with "
                "the figures that it states. To replace it, delete it there and push again, or propose the change with "
                "--create-pr."
            )
            changed.remove(CARD)
        deleted = sorted(path for path in remote if path not in files and is_own(path))
        tagged = self._tagged() if self.config.tag else None
        if tagged is not None and (changed or deleted or tagged != head):  # found out before the commit, not after
            raise HubRefusal(
                f"{self.repo_id} has a tag {self.config.tag!r} already, at {tagged[:12]}, which is not what is to be "
                "pushed: give another --tag."
            )
        if not changed and not deleted:
            return Pushed(self.repo_id, head, self._url(head), (), ())
        total = sum(files[path].size for path in changed)
        self.say(f"pushing {len(changed)} of {len(files)} files ({total / 1e6:,.1f} MB) to {self.repo_id}")
        if deleted:
            self.say(f"deleting what an earlier push left there: {', '.join(deleted)}")
        operations: list[Any] = [
            CommitOperationAdd(path, _payload(files[path].content)) for path in changed
        ]  # the client changes these objects, so that every try needs new ones
        operations += [CommitOperationDelete(path) for path in deleted]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*data file")  # verdicts.parquet belongs to the model
            try:
                info = self.api.create_commit(
                    self.repo_id, operations, commit_message=self.config.message or "Upload a robust model",
                    revision=self.branch, create_pr=self.config.create_pr, parent_commit=head,
                )  # fmt: skip
            except ValueError as error:
                if "metadata" in str(error) and explain(error) is None:  # what the client makes of a refused header
                    said = " ".join(str(error).split())
                    raise HubError(f"the Hub refuses the header of {CARD} ({said}).") from error
                raise
        url = info.pr_url if self.config.create_pr else self._url(info.oid)
        return Pushed(self.repo_id, info.oid, url, tuple(changed), tuple(deleted))

    def _url(self, commit: str) -> str:
        return f"{self.api.endpoint}/{self.repo_id}/tree/{commit}"

    def _check_ours(
        self, remote: dict[str, tuple[str, str | None]], commit: str, config: Path | bytes | None = None
    ) -> None:
        """Another model that happens to have this name is not replaced. ``config``: the config.json to push, if it is
        known."""
        if "config.json" not in remote:
            return
        instead = "give another --repo-id, or propose the change with --create-pr."
        with TemporaryDirectory() as folder:

            def fetch(name: str) -> Path:
                return Path(self.api.hf_hub_download(self.repo_id, name, revision=commit, local_dir=folder))

            if RECORD not in remote and not (CARD in remote and is_sealed(read_card(fetch(CARD)))):
                raise HubRefusal(
                    f"{self.repo_id} holds a model that was not pushed by arrest-push (it has no {RECORD}): {instead}"
                )
            if config is None:
                return
            there, here = architecture_name(fetch("config.json")), architecture_name(config)
        if there != here:
            raise HubRefusal(f"{self.repo_id} holds another network, {there}, and this is {here}: {instead}")

    def _keeps_card(self, ours: LocalFile, commit: str) -> bool:
        """Whether the card at a commit stays: somebody wrote it there, and the one to push is a generated one."""
        with TemporaryDirectory() as folder:
            there = read_card(Path(self.api.hf_hub_download(self.repo_id, CARD, revision=commit, local_dir=folder)))
        assert isinstance(ours.content, bytes)
        mine = ours.content.decode(errors="replace")
        if is_sealed(there):
            return False
        if not has_body(there):  # what the Hub's form for a new repository writes
            stated, given = read_publication(there).license, read_publication(mine).license
            if self.config.license is None and stated not in (None, given):
                raise HubRefusal(
                    f"{self.repo_id} states the licence {stated.id if stated else None} and the card here "
                    f"{given.id if given else None}: say which it is with --license."
                )
            return False
        if not is_sealed(mine):
            self.say(f"the {CARD} of {self.repo_id} was edited there; yours, edited here, replaces it")
            return False
        return True

    def _verify(self, files: dict[str, LocalFile], commit: str) -> None:
        """The Hub leaves out what a .gitignore in the repository names, without a word."""
        missing = differing(files, self._try(f"look at {self.repo_id}", lambda: self._remote(commit)))
        if missing:
            raise HubError(
                f"{self.repo_id} @ {commit[:12]} lacks {', '.join(missing)}, or holds something else under that name. "
                "Does its .gitignore name it? Remove that line there, then push again."
            )


def _payload(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _given_license(config: PushConfig | CardConfig) -> License | None:
    return None if config.license is None else License(config.license, config.license_name, config.license_link)


def _write_card(export: Path, card: bytes) -> None:
    """Whole or not at all; not touched if it is the same."""
    path = export / CARD
    if path.is_file() and path.read_bytes() == card:
        return
    temporary = path.with_name(f".{CARD}.tmp")
    try:
        temporary.write_bytes(card)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HubError(f"{path} cannot be written ({error.strerror}).") from error
