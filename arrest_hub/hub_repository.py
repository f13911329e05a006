"""The repository on the Hub while it is pushed to: what is there, what may be replaced, one commit. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from arrest_hub.card_facts import has_body, is_sealed, read_card, read_publication
from arrest_hub.errors import HubError, HubRefusal
from arrest_hub.hub_access import WAITS, explain, with_retries
from arrest_hub.push_config import PushConfig
from arrest_hub.pushed_files import (
    CARD,
    TRAINING_CONFIG,
    LocalFile,
    architecture_name,
    differing,
    is_own,
    is_weights,
    threat_model,
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


class Repository:
    """The repository while it is pushed to."""

    def __init__(self, repo_id: str, config: PushConfig, say: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi

        self.repo_id, self.config, self.say = repo_id, config, say
        self.branch = config.revision or "main"
        self.api = HfApi()

    def push(self, files: dict[str, LocalFile]) -> Pushed:
        trained = files.get(TRAINING_CONFIG)
        threat = None if trained is None else threat_model(trained.content)
        network = architecture_name(files["config.json"].content)
        if not self.config.create_pr:
            self._try("create the repository", lambda: self._create(network, threat))
        pushed: Pushed = self._try(f"push to {self.repo_id}", lambda: self._commit(files, network, threat))
        assert pushed.commit is not None
        if pushed.changed or pushed.deleted:
            self._verify({path: files[path] for path in pushed.changed}, pushed.commit)
        if self.config.tag:
            self._try(f"tag {self.repo_id}", lambda: self._tag(pushed.commit))
        return pushed

    def check(self, threat: str | None = None, network: str | None = None) -> None:
        """Raises HubRefusal if the branch holds a model that `arrest-push` did not put there, one that was trained for
        another threat model than ``threat`` ("linf-8/255"), or another architecture than ``network``."""
        if not self.config.create_pr:
            self._try(f"look at {self.repo_id}", lambda: self._check_names(threat, network))

    def _check_names(self, threat: str | None, network: str | None) -> None:
        if self.api.repo_exists(self.repo_id) and self.api.revision_exists(self.repo_id, self.branch):
            head = self.api.model_info(self.repo_id, revision=self.branch).sha
            assert head is not None
            remote = self._remote(head)
            self._check_ours(remote, head, network, threat)
            there = self._card(head) if CARD in remote else ""
            stated = read_publication(there).license
            if has_body(there) and not is_sealed(there) and _has_weights(remote):
                self.say(
                    f"note        the {CARD} of {self.repo_id} was edited there: unless it is deleted, other weights "
                    "will not be pushed beside it"
                )
            elif not has_body(there) and stated is not None and self.config.license is None:
                self.say(
                    f"note        {self.repo_id} states the licence {stated.id}: the model will be pushed if that is "
                    "its base's too, else --license says which it is"
                )

    def _try(self, doing: str, call: Callable[[], Any]) -> Any:
        # whether a pull request was made before its answer was lost is not known: a second one would be worse
        return with_retries(call, doing, self.say, waits=() if self.config.create_pr else WAITS)

    def _create(self, network: str, threat: str | None) -> None:
        """Make repository and branch if they do not exist. Only what is new is made private."""
        if not self.api.repo_exists(self.repo_id):
            self.api.create_repo(self.repo_id, private=self.config.private or None, exist_ok=True)
        if self.branch != "main" and self.branch not in self._branches():
            head = self.api.model_info(self.repo_id).sha  # what a new branch begins with
            assert head is not None
            self._check_ours(self._remote(head), head, network, threat)
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)

    def _branches(self) -> set[str]:
        return {branch.name for branch in self.api.list_repo_refs(self.repo_id).branches}

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

    def _commit(self, files: dict[str, LocalFile], network: str, threat: str | None) -> Pushed:
        """One commit with what differs from the branch; none if nothing does. Tried again, it sees its own success."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self.api.model_info(self.repo_id, revision=self.branch).sha
        assert head is not None
        remote = self._remote(head)
        if not self.config.create_pr:
            self._check_ours(remote, head, network, threat)
        changed = differing(files, remote)
        if CARD in changed and CARD in remote and not self.config.create_pr and self._keeps_card(files[CARD], head):
            if _has_weights(remote) and _has_weights(changed):
                raise HubRefusal(
                    f"the {CARD} of {self.repo_id} was edited, there or before an earlier push, and what it states is "
                    "of other weights than these: delete it there and push again, or propose the change with "
                    "arrest-push --create-pr."
                )
            self.say(
                f"the {CARD} of {self.repo_id} was edited, there or before an earlier push, and stays as it is, with "
                "the figures that it states. To replace it, delete it there and push again, or propose the change with "
                "arrest-push --create-pr."
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
        self,
        remote: dict[str, tuple[str, str | None]],
        commit: str,
        network: str | None,
        threat: str | None,
    ) -> None:
        """Another model that happens to have this name is not replaced, in whatever format it is. ``network``,
        ``threat``: architecture and threat model of the one to push, if they are known."""
        if not any(path in ("config.json", RECORD) or is_own(path) or is_weights(path) for path in remote):
            return
        instead = "give another id, or propose the change with arrest-push --create-pr."
        with TemporaryDirectory() as folder:

            def fetch(name: str) -> Path:
                return Path(self.api.hf_hub_download(self.repo_id, name, revision=commit, local_dir=folder))

            if RECORD not in remote and not (CARD in remote and is_sealed(read_card(fetch(CARD)))):
                raise HubRefusal(
                    f"{self.repo_id} holds a model that was not pushed by arrest-push (it has no {RECORD}): {instead}"
                )
            there = architecture_name(fetch("config.json")) if "config.json" in remote else None
            if None not in (network, there) and there != network:
                raise HubRefusal(f"{self.repo_id} holds another network, {there}, and this is {network}: {instead}")
            if threat is not None and TRAINING_CONFIG in remote:
                trained_for = threat_model(fetch(TRAINING_CONFIG))
                if trained_for not in (None, threat):
                    raise HubRefusal(
                        f"{self.repo_id} holds a model that was trained for {trained_for}, and this one is for "
                        f"{threat}: {instead}"
                    )

    def _card(self, commit: str) -> str:
        with TemporaryDirectory() as folder:
            return read_card(Path(self.api.hf_hub_download(self.repo_id, CARD, revision=commit, local_dir=folder)))

    def _keeps_card(self, ours: LocalFile, commit: str) -> bool:
        """Whether the card at a commit stays: somebody wrote it there, and the one to push is a generated one."""
        there = self._card(commit)
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


def _has_weights(paths: Iterable[str]) -> bool:
    return any(is_own(path) and path.endswith(".safetensors") for path in paths)


def _payload(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)
