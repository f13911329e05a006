"""A Hub on loopback that also takes uploads of models from the real client: by LFS, in one or many parts, and by Xet.

A commit is a new folder: links to the files of its parent, and what is new. Large files pass through in pieces.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

from hub_files import (
    MAX_REGULAR,
    PIECE,
    card_problems,
    describe_file,
    files_in,
    hashes,
    ignored,
    inside,
    is_lfs,
    link_or_copy,
    split_card,
)
from hub_server import REPO_ID, REVISION, Handler, HubServer, Refused, Repo, Route, describe
from hub_xet import XetStore

MAX_LINE = MAX_REGULAR * 4 // 3 + 4096
"""Of a commit: one line is one file, in base64."""
IN_MEMORY = 1 << 20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in (".safetensors", ".bin"))
LISTED = ("_id", "id", "modelId", "private", "downloads", "likes", "tags", "library_name", "pipeline_tag", "createdAt")
LISTED_IN_FULL = (*LISTED, "author", "sha", "lastModified", "gated", "disabled", "siblings")


@dataclass(frozen=True)
class Account:
    """Who a token belongs to. ``orgs`` maps organisations to the role there ("read" may not write).

    ``role`` is the token's: "read", "write", or "fineGrained", which may write where ``scopes`` says: names of
    accounts or repositories.
    """

    name: str
    role: str = "write"
    orgs: tuple[tuple[str, str], ...] = ()
    scopes: frozenset[str] = frozenset()

    def may_write(self, repo_id: str) -> bool:
        namespace = repo_id.split("/")[0]
        if self.role == "fineGrained" and not self.scopes & {namespace, repo_id}:
            return False
        return self.role != "read" and (namespace == self.name or dict(self.orgs).get(namespace, "read") != "read")


class WritableHub(HubServer):
    """A Hub that takes uploads. Its settings may be changed at any time.

    ``xet``: whether it takes and sends large files by Xet, which the client prefers. ``chunk_size``: larger LFS
    files are taken in parts of this size. ``page_size``: of the list of models.
    """

    def __init__(self, *, xet: bool = True, chunk_size: int | None = None, page_size: int = 100) -> None:
        super().__init__()
        self.xet, self.chunk_size, self.page_size = xet, chunk_size, page_size
        self.accounts: dict[str, Account] = {}
        self.by_lfs: list[tuple[str, int]] = []
        self.xet_hashes: dict[str, str] = {}  # SHA-256 -> Xet's hash, of the files that came by Xet
        self.history: dict[str, tuple[str | None, str]] = {}  # commit -> its parent, its title
        self.writing = threading.RLock()
        self.numbers = itertools.count(1)
        self.secret = os.urandom(16)
        self.temporary = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        self.folder = Path(self.temporary.name)
        for name in ("commits", "objects", "incoming"):
            (self.folder / name).mkdir()
        self.xet_store = XetStore(self.folder / "xet")

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.temporary.cleanup()

    def add_user(
        self, token: str, name: str, role: str = "write", orgs: dict[str, str] | None = None, scopes: Any = ()
    ) -> None:
        self.tokens[token] = name
        self.accounts[token] = Account(name, role, tuple((orgs or {}).items()), frozenset(scopes))

    def account(self, token: str) -> Account:
        return self.accounts.get(token) or Account(self.tokens[token], "read")

    def may_read(self, repo: Repo, user: str | None) -> bool:
        namespace = repo.repo_id.split("/")[0]
        orgs = [org for account in self.accounts.values() if account.name == user for org, _ in account.orgs]
        return super().may_read(repo, user) or (user is not None and namespace in (user, *orgs))

    def xet_hash(self, sha256: str) -> str | None:
        return self.xet_hashes.get(sha256) if self.xet else None

    def create(self, repo_id: str, files: dict[str, str | bytes | Path] | None = None, **options: Any) -> Repo:
        """A repository as the Hub makes it, with ``.gitattributes`` alone; then a commit with ``files``, if any."""
        repo = Repo("models", repo_id, {}, {}, **options)
        first = self.new_commit(repo, None, "initial commit", {".gitattributes": GIT_ATTRIBUTES.encode()})
        repo.refs["main"] = first
        if files:
            contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
            repo.refs["main"] = self.new_commit(repo, first, "Upload files", contents)
        self.repos["models", repo_id] = repo
        return repo

    def new_commit(
        self, repo: Repo, parent: str | None, title: str, changes: dict[str, Path | bytes | None] | dict[str, Any]
    ) -> str:
        """A folder with the parent's files and the changes (None: deleted); no branch is moved to it."""
        commit = hashlib.sha1(f"{repo.repo_id} {next(self.numbers)} {parent} {title}".encode()).hexdigest()
        folder = self.folder / "commits" / commit
        folder.mkdir()
        old = repo.commits[parent] if parent else None
        files: dict[str, Any] = {p.relative_to(old).as_posix(): p for p in files_in(old)} if old else {}
        for path, content in (files | changes).items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True) if content is not None else None
            if isinstance(content, bytes):
                target.write_bytes(content)
            elif content is not None:
                link_or_copy(content, target)
        repo.commits[commit] = folder
        self.history[commit] = (parent, title)
        repo.last_modified = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return commit

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes | Path]:
        """Path -> content; of a file over 1 MB, where it lies."""
        repo = self.repos["models", repo_id]
        folder = repo.commits[repo.resolve(revision) or ""]
        return {
            path.relative_to(folder).as_posix(): path if path.stat().st_size > IN_MEMORY else path.read_bytes()
            for path in files_in(folder)
        }

    def commits(self, repo_id: str, revision: str = "main") -> list[tuple[str, str]]:
        """(commit, title) of a branch, the newest first."""
        found: list[tuple[str, str]] = []
        commit = self.repos["models", repo_id].resolve(revision)
        while commit is not None:
            parent, title = self.history.get(commit, (None, ""))
            found.append((commit, title))
            commit = parent
        return found

    def signed(self, what: str, oid: str, **values: int) -> str:
        """The query of an address in the storage, which needs no token."""
        text = urlencode(values)
        signature = hmac.new(self.secret, f"{what} {oid} {text}".encode(), "sha256").hexdigest()
        return f"{text}&signature={signature}"

    def object(self, oid: str) -> Path:
        return self.folder / "objects" / oid

    @property
    def received(self) -> list[tuple[str, int]]:
        """(SHA-256, size) of each large file that was sent here; by Xet, only of what was new, as Xet sends no more."""
        with self.writing:
            self.xet_store.look()
            known = {oid for oid, _ in self.by_lfs}
            by_xet = [(oid, file.size) for oid, file in self.xet_store.uploaded.items() if oid not in known]
            return [*self.by_lfs, *by_xet]

    def large_file(self, oid: str, size: int | None) -> Path:
        """A large file that was uploaded, its content checked."""
        path = self.object(oid)
        if not path.is_file() and oid in self.xet_store.uploaded:
            incoming = self.folder / "incoming" / f"{oid}.xet"
            self.xet_hashes[oid] = self.xet_store.read_back(oid, incoming)
            if hashes(incoming)[1] != oid:
                raise Refused(400, None, f"The content uploaded as {oid} has another SHA-256")
            incoming.replace(path)
        if oid in self.xet_store.uploaded and path.is_file():
            self.xet_hashes[oid] = self.xet_store.uploaded[oid].xet_hash
        if not path.is_file() or (size is not None and path.stat().st_size != size):
            raise Refused(400, None, f"LFS pointer pointed to a file that does not exist: {oid}")
        return path


class UploadHandler(Handler):
    """The calls around an upload."""

    @property
    def hub(self) -> WritableHub:
        return cast(WritableHub, self.server.hub)

    def _first(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def _account(self) -> Account:
        if self.user() is None:
            raise Refused(401, None, "Invalid username or password.")
        return self.hub.account(self.headers["Authorization"].removeprefix("Bearer "))

    def _writable(self, repo_id: str, *, propose: bool = False) -> Repo:
        """The repository, if the token may write there, or, to ``propose`` a change, write anywhere."""
        account = self._account()
        repo = self.repo("models", repo_id, content=False)
        if account.role == "read":
            raise Refused(403, None, "Forbidden: you must use a write token to upload to a repository.")
        if not account.may_write(repo_id) and not propose:
            message = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            raise Refused(403, None, f"{message} (authenticated as {account.name})")
        return repo

    def _whoami(self) -> None:
        account = self._account()
        token = {"displayName": "test", "role": account.role, "createdAt": "2024-01-01T00:00:00.000Z"}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.orgs]
        auth = {"type": "access_token", "accessToken": token}
        self.send_json({"type": "user", "name": account.name, "fullname": account.name, "orgs": orgs, "auth": auth})

    def _asked_repo(self) -> tuple[str, str]:
        """The repository that a JSON body names, and whether it is to be private."""
        asked, account = self.json(), self._account()
        repo_id = f"{asked.get('organization') or account.name}/{asked.get('name')}"
        if asked.get("type", "model") != "model" or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
            raise Refused(400, None, f"Invalid name or type of a repository: {repo_id}")
        if not account.may_write(repo_id):
            namespace = repo_id.split("/")[0]
            raise Refused(403, None, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        return repo_id, asked.get("visibility", "public")

    def _create_repo(self) -> None:
        repo_id, visibility = self._asked_repo()
        url = f"{self.hub.url}/{repo_id}"
        with self.hub.writing:
            if ("models", repo_id) in self.hub.repos:
                raise Refused(409, None, "You already created this model repo", url=url)
            self.hub.create(repo_id, private=visibility == "private")
        self.send_json({"url": url, "name": repo_id})

    def _delete_repo(self) -> None:
        repo_id, _ = self._asked_repo()
        if self.hub.repos.pop(("models", repo_id), None) is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        self.send_json({})

    def _validate_yaml(self) -> None:
        text = str(self.json().get("content"))
        errors = [{"message": problem} for problem in card_problems(text)]
        warnings = [] if split_card(text) else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _list(self) -> None:
        user, wanted = self.user(), set(self.query.get("filter", []))
        full, start = self._first("full").lower() in ("true", "1"), int(self._first("cursor", "0"))
        fields = (*self.query["expand"], "_id", "id") if "expand" in self.query else LISTED_IN_FULL if full else LISTED
        if self._first("cardData").lower() in ("true", "1"):
            fields = (*fields, "cardData")
        found = []
        for (kind, repo_id), repo in list(self.hub.repos.items()):
            if kind != "models" or (repo.private and not self.hub.may_read(repo, user)):
                continue
            about = describe(repo, repo.refs["main"])
            if (
                wanted <= {*about["tags"]}
                and self._first("search").lower() in repo_id.lower()
                and self._first("author", about["author"]) == about["author"]
                and self._first("pipeline_tag", about["pipeline_tag"]) == about["pipeline_tag"]
            ):
                found.append({name: value for name, value in about.items() if name in fields})
        stop = start + min(self.hub.page_size, int(self._first("limit", "1000")))
        headers = {}
        if stop < len(found):
            again = urlencode({**self.query, "cursor": stop}, doseq=True)
            headers["Link"] = f'<{self.hub.url}/api/models?{again}>; rel="next"'
        self.send_json(found[start:stop], 200, headers)

    def _refs(self, repo_id: str) -> None:
        repo = self.repo("models", repo_id, content=False)
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, commit in repo.refs.items():
            if name.startswith("refs/"):
                group, ref = "pullRequests" if name.startswith("refs/pr/") else "converts", name
            elif name in repo.tags:
                group, ref = "tags", f"refs/tags/{name}"
            else:
                group, ref = "branches", f"refs/heads/{name}"
            answer[group].append({"name": name, "ref": ref, "targetCommit": commit})
        if "include_prs" not in self.query:
            del answer["pullRequests"]
        self.send_json(answer)

    def _new_ref(self, repo: Repo, name: str, revision: str) -> None:
        commit = self.commit(repo, revision)
        with self.hub.writing:
            if not name or name in repo.refs:
                raise Refused(409, None, f"Reference {name!r} exists already", {"X-Error-Code": "RefAlreadyExists"})
            repo.refs[name] = commit

    def _branch(self, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id)
        asked = self.json() if self.unread else {}
        self._new_ref(repo, revision, asked.get("startingPoint", "main"))
        self.send_json({})

    def _tag(self, repo_id: str, revision: str) -> None:
        repo, name = self._writable(repo_id), str(self.json().get("tag") or "")
        self._new_ref(repo, name, revision)
        repo.tags.add(name)
        self.send_json({})

    def _preupload(self, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id, propose="create_pr" in self.query)
        folder = repo.commits[self.commit(repo, revision)]
        asked = self.json()
        rules = folder / ".gitignore"
        patterns = asked.get("gitIgnore", rules.read_text() if rules.is_file() else "")
        files = []
        for file in asked["files"]:
            path, size = file["path"], file["size"]
            mode = "lfs" if is_lfs(path, size, base64.b64decode(file.get("sample", ""))) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": ignored(path, patterns)}
            present = inside(folder, path)
            if present is not None and present.is_file():
                entry = describe_file(folder, present)
                answer["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            files.append(answer)
        self.send_json({"files": files})

    def _check_signature(self, what: str, oid: str, *names: str) -> dict[str, int]:
        values = {name: int(self._first(name, "0")) for name in names}
        if not self.path.endswith("?" + self.hub.signed(what, oid, **values)):
            raise Refused(403, None, "SignatureDoesNotMatch")
        return values

    def _lfs_batch(self, repo_id: str) -> None:
        self._writable(repo_id, propose=True)  # the client does not say here that it proposes
        hub, objects = self.hub, []
        for asked in self.json()["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not hub.object(oid).is_file():
                chunk = hub.chunk_size
                verify = {"href": f"{hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                if chunk is None or size <= chunk:
                    upload: dict[str, Any] = {"href": self._part_url(oid, 0, size)}
                else:
                    sizes = [min(chunk, size - start) for start in range(0, size, chunk)]
                    parts = {f"{n:05}": self._part_url(oid, n, of) for n, of in enumerate(sizes, start=1)}
                    complete = self.hub.signed("complete", oid, size=size)
                    upload = {"href": f"{hub.url}/api/complete/{oid}?{complete}"}
                    upload["header"] = {"chunk_size": str(chunk)} | parts
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.send_json({"transfer": "basic" if hub.chunk_size is None else "multipart", "objects": objects})

    def _part_url(self, oid: str, part: int, size: int) -> str:
        return f"{self.hub.storage_url}/incoming/{oid}?{self.hub.signed('part', oid, part=part, size=size)}"

    def _put(self, oid: str) -> None:
        values = self._check_signature("part", oid, "part", "size")
        if self.unread != values["size"]:
            raise Refused(400, None, f"EntityTooLarge or IncompleteBody: {self.unread} bytes")
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.hub.folder / "incoming", delete=False) as file:
            while self.unread:
                piece = self.read(PIECE)
                file.write(piece)
                digest.update(piece)
        if values["part"]:
            os.replace(file.name, self.hub.folder / "incoming" / f"{oid}.{values['part']}")
        else:
            self._keep(Path(file.name), oid, digest.hexdigest())
        self.send(b"", 200, {"ETag": f'"{digest.hexdigest()}"'})

    def _keep(self, file: Path, oid: str, sha256: str) -> None:
        size = file.stat().st_size
        if sha256 != oid:
            file.unlink()
            raise Refused(400, None, "BadDigest: the content has another SHA-256")
        os.replace(file, self.hub.object(oid))
        self.hub.by_lfs.append((oid, size))

    def _complete(self, oid: str) -> None:
        self._check_signature("complete", oid, "size")
        incoming = self.hub.folder / "incoming"
        with tempfile.NamedTemporaryFile(dir=incoming, delete=False) as whole:
            for number, part in enumerate(self.json()["parts"], start=1):
                piece = incoming / f"{oid}.{number}"
                if part["partNumber"] != number or not piece.is_file() or part["etag"] != f'"{hashes(piece)[1]}"':
                    raise Refused(400, None, f"InvalidPart: {number}")
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, whole, PIECE)
                piece.unlink()
        self._keep(Path(whole.name), oid, hashes(Path(whole.name))[1])
        self.send_json({})

    def _verify(self, repo_id: str) -> None:
        self._writable(repo_id, propose=True)
        asked = self.json()
        path = self.hub.object(str(asked.get("oid")))
        if not path.is_file() or path.stat().st_size != asked.get("size"):
            raise Refused(404, None, "The object is not there, or of another size")
        self.send_json({})

    def _xet_token(self, repo_id: str, access: str, revision: str) -> None:
        if access == "write":
            self._writable(repo_id, propose="create_pr" in self.query)
        repo = self.repo("models", repo_id, content=True)
        if not self.hub.xet:
            raise Refused(404, None, "This Hub has no Xet")
        if access == "write":
            store = self.hub.xet_store.for_upload()
        else:
            files = files_in(repo.commits[self.commit(repo, revision)])
            store = self.hub.xet_store.for_download([p for p in files if hashes(p)[1] in self.hub.xet_hashes])
        url, until = f"local://{store}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "test", "X-Xet-Token-Expiration": str(until)}
        # the client reads the headers, its Xet library the body
        self.send_json({"casUrl": url, "exp": until, "accessToken": "test"}, 200, headers)

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        while self.unread:
            line = self.rfile.readline(min(self.unread, MAX_LINE))
            self.unread -= len(line)
            if self.unread and not line.endswith(b"\n"):
                raise Refused(413, None, "A regular file over 10 MB: it must be an LFS file")
            entry = json.loads(line)
            yield entry["key"], entry["value"]

    def _commit_files(self, repo_id: str, revision: str) -> None:
        propose = "create_pr" in self.query
        repo = self._writable(repo_id, propose=propose)
        if revision in repo.tags or revision in repo.commits:
            raise Refused(400, None, f"{revision} is no branch")
        lines = list(self._lines())
        with self.hub.writing:
            head = self.commit(repo, revision)
            self.hub.xet_store.look()
            header = next((value for key, value in lines if key == "header"), {})
            if header.get("parentCommit", head) != head:
                raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
            changes = self._changes(repo.commits[head], lines)
            modified = repo.last_modified
            commit = self.hub.new_commit(repo, head, header.get("summary", ""), changes)
            number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
            if propose:
                repo.last_modified = modified
            repo.refs[f"refs/pr/{number}" if propose else revision] = commit
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"}
        if propose:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        self.send_json(answer)

    def _changes(self, folder: Path, lines: list[tuple[str, dict[str, Any]]]) -> dict[str, Path | bytes | None]:
        """Path -> new content; None for what is deleted."""
        changes: dict[str, Path | bytes | None] = {}
        for key, value in lines:
            path = value.get("path", "").rstrip("/")
            target = inside(folder, path)
            if target is None:
                raise Refused(400, None, f"Invalid path: {path}")
            if key == "file":
                changes[path] = content = base64.b64decode(value["content"])
                problems = card_problems(content.decode(errors="replace")) if path == "README.md" else []
                if problems or len(content) > MAX_REGULAR:
                    raise Refused(400, None, "; ".join(problems) or f"{path} must be an LFS file")
            elif key == "lfsFile":
                changes[path] = self.hub.large_file(value["oid"], value.get("size"))
            elif key in ("deletedFile", "deletedFolder"):
                gone = files_in(target) if key == "deletedFolder" else [target] if target.is_file() else []
                if not gone:
                    raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
                changes |= dict.fromkeys((p.relative_to(folder.resolve()).as_posix() for p in gone), None)
        return changes


MODEL, LFS, OID = f"/api/models/{REPO_ID}", rf"/{REPO_ID}\.git/info/lfs/objects", r"(?P<oid>[0-9a-f]{64})"
UploadHandler.routes = (
    Route(("GET",), r"/api/whoami-v2", UploadHandler._whoami),
    Route(("GET",), r"/api/models", UploadHandler._list),
    Route(("POST",), r"/api/repos/create", UploadHandler._create_repo),
    Route(("DELETE",), r"/api/repos/delete", UploadHandler._delete_repo),
    Route(("POST",), r"/api/validate-yaml", UploadHandler._validate_yaml),
    Route(("GET",), rf"{MODEL}/refs", UploadHandler._refs),
    Route(("POST",), rf"{MODEL}/branch/{REVISION}", UploadHandler._branch),
    Route(("POST",), rf"{MODEL}/tag/{REVISION}", UploadHandler._tag),
    Route(("POST",), rf"{MODEL}/preupload/{REVISION}", UploadHandler._preupload),
    Route(("POST",), rf"{LFS}/batch", UploadHandler._lfs_batch),
    Route(("POST",), rf"{LFS}/verify", UploadHandler._verify),
    Route(("PUT",), rf"/incoming/{OID}", UploadHandler._put),
    Route(("POST",), rf"/api/complete/{OID}", UploadHandler._complete),
    Route(("GET",), rf"{MODEL}/xet-(?P<access>read|write)-token/{REVISION}", UploadHandler._xet_token),
    Route(("POST",), rf"{MODEL}/commit/{REVISION}", UploadHandler._commit_files),
    *Handler.routes,
)
WritableHub.handler = UploadHandler
