"""A Hub on loopback for tests: serves folders as model and dataset repositories to the real client. Reading only.

A call is a row of ROUTES and a method of _Handler, which is where the calls of an upload would go.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
MAX_BODY = 1 << 20
MAX_THREADS = 32
MAX_REQUESTS = 5000
IDLE_SECONDS = 20


@dataclass
class Repo:
    """Folders as commits. ``readers`` are the users who may read a private repository or a gated one's files.

    ``fault`` makes the files fail: "busy" answers 503, "cut" drops the connection in the middle of a file.
    """

    kind: str
    repo_id: str
    commits: dict[str, Path]
    refs: dict[str, str]
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    fault: str | None = None

    def resolve(self, revision: str) -> str | None:
        """A branch, tag or commit -> the commit."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """What was asked, with the headers' names in lower case, and the status of the answer."""

    method: str
    path: str
    headers: dict[str, str]
    status: int


class HubServer:
    """A context manager: listens on 127.0.0.1 at a free port inside it; everything asked is in ``requests``."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, str] = {}
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.lock = threading.Lock()
        self.http = _Listener(("127.0.0.1", 0), _Handler)
        self.http.hub = self
        self.port: int = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # large files come from another origin, to which no client may send its token
        self.storage_url = f"http://localhost:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add(self, kind: str, repo_id: str, folder: Path, *tagged: tuple[str, Path], **options: Any) -> Repo:
        """Serve ``folder`` as branch main of a repository ("models" or "datasets"), other folders as tags."""
        commits, refs = {}, {}
        for ref, path in (("main", folder), *tagged):
            refs[ref] = hashlib.sha1(f"{kind}/{repo_id}@{ref}".encode()).hexdigest()
            commits[refs[ref]] = path
        self.repos[kind, repo_id] = repo = Repo(kind, repo_id, commits, refs, **options)
        return repo

    def files_sent(self, repo_id: str) -> list[str]:
        """The files of a repository whose content was asked for (GET), in order."""
        pattern = re.compile(rf"/(?:storage/\w+/|datasets/)?{re.escape(repo_id)}/resolve/[^/]+/(.+)")
        with self.lock:
            matches = [pattern.fullmatch(urlsplit(r.path).path) for r in self.requests if r.method == "GET"]
        return [unquote(match[1]) for match in matches if match]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def __init__(self, *args: Any) -> None:
        self.slots = threading.BoundedSemaphore(MAX_THREADS)
        super().__init__(*args)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self.slots:
            super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; anything else is a mistake of this server."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            self.hub.errors.append(repr(error))


class _Refused(Exception):
    """Ends a request with an error in the words of the Hub."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS  # an idle connection gives its thread back
    server: _Listener

    def do_GET(self) -> None:
        self._dispatch()

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    do_PUT = do_DELETE = do_PATCH = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the requests are kept in ``HubServer.requests``."""

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            size = int(self.headers.get("Content-Length") or 0)
            if size > MAX_BODY:
                self.close_connection = True
                raise _Refused(413, None, "Body too large")
            self.body = self.rfile.read(size)
            if len(self.hub.requests) >= MAX_REQUESTS:
                raise _Refused(503, None, "Too many requests for a test")
            for methods, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods:
                    # a revision or path may hold an encoded slash, so they are decoded after the split
                    answer(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                    return
            raise _Refused(404, None, f"No such call: {self.command} {url.path}")
        except _Refused as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send_json({"error": refusal.message}, refusal.status, headers)

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def _send(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        with self.hub.lock:
            sent = {name.lower(): value for name, value in self.headers.items()}
            self.hub.requests.append(Request(self.command, self.path, sent, status))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._send(body, status, {"Content-Type": "application/json; charset=utf-8"} | (headers or {}))

    def _repo(self, kind: str, repo_id: str, *, content: bool) -> Repo:
        """The repository, if the sender of this request may see it (``content``: read its files)."""
        user = None
        if authorization := self.headers.get("Authorization"):
            user = self.hub.tokens.get(authorization.removeprefix("Bearer "))
            if user is None:
                raise _Refused(401, None, "Invalid credentials in Authorization header")
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and user not in repo.readers):
            # what is missing and what is private look the same from outside
            if user is None:
                raise _Refused(401, "RepoNotFound", "Invalid username or password.")
            raise _Refused(404, "RepoNotFound", "Repository not found")
        if content and repo.gated and user not in repo.readers:
            raise _Refused(401 if user is None else 403, "GatedRepo", f"Access to {kind} {repo_id} is restricted.")
        if content and repo.fault == "busy":
            raise _Refused(503, None, "Service unavailable")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, kind: str, repo_id: str, revision: str = "") -> None:
        repo = self._repo(kind, repo_id, content=False)
        commit = self._commit(repo, revision or "main")
        folder = repo.commits[commit]
        self._send_json(
            {
                "_id": commit[:24], "id": repo_id, "sha": commit, "private": repo.private, "disabled": False,
                "gated": "manual" if repo.gated else False, "downloads": 0, "likes": 0, "tags": [],
                "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": p.relative_to(folder).as_posix()} for p in _files(folder)],
            }
        )  # fmt: skip

    def _auth_check(self, kind: str, repo_id: str) -> None:
        self._repo(kind, repo_id, content=True)
        self._send_json({})

    def _tree(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(kind, repo_id, content=False)
        folder = repo.commits[self._commit(repo, revision)]
        top = _inside(folder, path)
        if top is None or not top.is_dir():
            raise _Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = sorted(top.rglob("*") if recursive else top.iterdir())
        self._send_json([_entry(folder, p) for p in found])

    def _paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id, content=False)
        folder = repo.commits[self._commit(repo, revision)]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        found = [_inside(folder, path) for path in paths]
        self._send_json([_entry(folder, p) for p in found if p is not None and p.exists() and p != folder])

    def _resolve(self, prefix: str, repo_id: str, revision: str, path: str) -> None:
        kind = "datasets" if prefix else "models"
        repo = self._repo(kind, repo_id, content=True)
        commit = self._commit(repo, revision)
        file = _inside(repo.commits[commit], path)
        about = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file is None or not file.is_file():
            message = "Entry not found"
            self._send_json(
                {"error": message}, 404, about | {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
            )
            return
        entry = _entry(repo.commits[commit], file)
        if "lfs" not in entry:
            self._send_file(file, about | {"ETag": f'"{entry["oid"]}"'}, cut=repo.fault == "cut")
            return
        about |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
        about["Location"] = f"{self.hub.storage_url}/storage/{kind}/{repo_id}/resolve/{commit}/{path}"
        self._send(b"", 302, about)

    def _storage(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        """Where large files lie: anonymous, since the address itself is the secret."""
        repo = self.hub.repos.get((kind, repo_id))
        file = _inside(repo.commits[revision], path) if repo and revision in repo.commits else None
        if repo is None or file is None or not file.is_file():
            raise _Refused(404, None, "Not found")
        self._send_file(file, {"ETag": f'"{_entry(repo.commits[revision], file)["oid"]}"'}, cut=repo.fault == "cut")

    def _send_file(self, file: Path, headers: dict[str, str], *, cut: bool) -> None:
        content = file.read_bytes()
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or wanted[0] == "bytes=-":
            self._send(content, 200, headers, cut=cut and self.command == "GET")
            return
        if wanted[1]:
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        else:
            start, stop = max(0, len(content) - int(wanted[2])), len(content)
        if start >= stop:
            self._send(b"", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
            return
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        self._send(content[start:stop], 206, headers | span, cut=cut and self.command == "GET")


_KIND, _ID, _REVISION = r"(?P<kind>models|datasets)", r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET", "HEAD"), rf"/api/{_KIND}/{_ID}(?:/revision/{_REVISION})?", _Handler._info),
    (("GET",), rf"/api/{_KIND}/{_ID}/auth-check", _Handler._auth_check),
    (("GET",), rf"/api/{_KIND}/{_ID}/tree/{_REVISION}(?:/(?P<path>.*))?", _Handler._tree),
    (("POST",), rf"/api/{_KIND}/{_ID}/paths-info/{_REVISION}", _Handler._paths_info),
    (("GET", "HEAD"), rf"/storage/{_KIND}/{_ID}/resolve/{_REVISION}/(?P<path>.+)", _Handler._storage),
    (("GET", "HEAD"), rf"/(?P<prefix>datasets/)?{_ID}/resolve/{_REVISION}/(?P<path>.+)", _Handler._resolve),
]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _inside(folder: Path, path: str) -> Path | None:
    """``folder/path``, or None if that leads out of the folder."""
    target = (folder / path).resolve()
    return target if target.is_relative_to(folder.resolve()) else None


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    """A file or folder as the Hub lists it; ``oid`` is git's hash of a file, ``lfs.oid`` the SHA-256."""
    name = path.resolve().relative_to(folder.resolve()).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    content = path.read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if path.suffix in LFS_SUFFIXES:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
