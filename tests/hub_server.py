"""A Hub on loopback for tests: serves folders as model and dataset repositories to the real client.

A call is a row of ``Handler.routes`` and a method. These only read; ``hub_uploads`` adds those that write.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_files import PIECE, FilePart, card_data, card_tags, describe_file, files_in, inside

MAX_BODY = 1 << 20
MAX_THREADS = 32
MAX_REQUESTS = 5000
IDLE_SECONDS = 20


@dataclass
class Repo:
    """Folders as commits. ``readers`` are the users who may read a private repository or a gated one's files.

    ``fault`` makes the files fail: "busy" answers 503, "cut" drops the connection in the middle of a file. The
    files named in ``corrupt`` are sent with other bytes than their hash and size promise. ``refs`` are branches,
    except those that ``tags`` names and those that begin with "refs/".
    """

    kind: str
    repo_id: str
    commits: dict[str, Path]
    refs: dict[str, str]
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    fault: str | None = None
    corrupt: set[str] = field(default_factory=set)
    tags: set[str] = field(default_factory=set)
    last_modified: str = "2024-01-01T00:00:00.000Z"

    def resolve(self, revision: str) -> str | None:
        """A branch, tag or commit -> the commit."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """What was asked, with the headers' names in lower case, and the status of the answer (0: there was none)."""

    method: str
    path: str
    headers: dict[str, str]
    status: int


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests of this method ("*": any) whose path and query match."""

    method: str
    path: re.Pattern[str]
    status: int | None
    times: int
    code: str | None
    message: str
    cut: bool
    after: bool
    delay: float
    headers: dict[str, str]


class HubServer:
    """A context manager: listens on 127.0.0.1 at a free port inside it; everything asked is in ``requests``."""

    handler: ClassVar[type[Handler]]

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.lock = threading.Lock()
        self.http = _Listener(("127.0.0.1", 0), self.handler)
        self.http.hub = self
        self.port: int = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # large files come from another origin, to which no client may send its token
        self.storage_url = f"http://localhost:{self.port}"

    def __enter__(self) -> Self:
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
        repo.tags |= {ref for ref, _ in tagged if not ref.startswith("refs/")}
        return repo

    def fail(
        self, method: str, path: str, *, status: int | None = None, times: int = 1, code: str | None = None,
        message: str = "This was made to fail", cut: bool = False, after: bool = False, delay: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> Fault:  # fmt: skip
        """Make the next ``times`` requests fail whose path and query ``path`` (a pattern) is found in.

        They are answered with ``status``; or the connection is ``cut`` in the middle of the body that is sent, or
        received; with ``after`` once the request was carried out, without a word. ``delay`` seconds pass before.
        """
        fault = Fault(method, re.compile(path), status, times, code, message, cut, after, delay, headers or {})
        self.faults.append(fault)
        return fault

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets; it then has one less to go."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (method, "*") and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def may_read(self, repo: Repo, user: str | None) -> bool:
        """Whether a private repository, or the files of a gated one, are open to this user."""
        return user in repo.readers

    def xet_hash(self, sha256: str) -> str | None:
        """By which name Xet can send this large file."""
        return None

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


class Refused(Exception):
    """Ends a request with an error in the words of the Hub; ``also`` goes into its JSON."""

    def __init__(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None, **also: Any
    ) -> None:
        self.status, self.code, self.message, self.headers, self.also = status, code, message, headers or {}, also


class Route(NamedTuple):
    methods: tuple[str, ...]
    pattern: str
    answer: Callable[..., None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS  # an idle connection gives its thread back
    server: _Listener
    routes: ClassVar[tuple[Route, ...]]
    unread: int
    fault: Fault | None

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
        self.unread = int(self.headers.get("Content-Length") or 0)
        self.fault = fault = self.hub.take_fault(self.command, self.path)
        try:
            if fault is not None:
                time.sleep(fault.delay)
                if fault.cut and not fault.after and self.command != "GET":
                    self.read(self.unread // 2)
                    self._record(0)
                    self._hang_up()
                    return
                if fault.status and not fault.after:
                    raise Refused(fault.status, fault.code, fault.message, fault.headers)
            if len(self.hub.requests) >= MAX_REQUESTS:
                raise Refused(503, None, "Too many requests for a test")
            for route in self.routes:
                match = re.fullmatch(route.pattern, url.path)
                if match and self.command in route.methods:
                    # a revision or path may hold an encoded slash, so they are decoded after the split
                    route.answer(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                    return
            raise Refused(404, None, f"No such call: {self.command} {url.path}")
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message} | refusal.headers
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send_json({"error": refusal.message} | refusal.also, refusal.status, headers)

    def read(self, size: int) -> bytes:
        """At most this much of what remains of the body."""
        content = self.rfile.read(min(size, self.unread))
        if len(content) < min(size, self.unread):
            raise ConnectionError("the client hung up in the middle of its request")
        self.unread -= len(content)
        return content

    def body(self) -> bytes:
        """The body of a call whose body is small."""
        if self.unread > MAX_BODY:
            raise Refused(413, None, "Body too large")
        return self.read(self.unread)

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body())
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refused(400, None, "Invalid JSON")
        return value

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def _record(self, status: int) -> None:
        sent = {name.lower(): value for name, value in self.headers.items()}
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, sent, status))

    def send(
        self, body: bytes | FilePart = b"", status: int = 200, headers: dict[str, str] | None = None, *,
        cut: bool = False,
    ) -> None:  # fmt: skip
        while self.unread:
            self.read(PIECE)
        fault, silent = self.fault, False
        if fault is not None and fault.cut:
            cut, silent = True, fault.after
        elif fault is not None and fault.after and fault.status:
            # what was asked for is done, but the answer denies it
            status, headers, body = fault.status, {"X-Error-Message": fault.message} | fault.headers, b"{}"
        if silent or (cut and len(body) < 2):
            self._record(0)
            self._hang_up()
            return
        self._record(status)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            left = len(body) // 2 if cut else len(body)
            for piece in [body] if isinstance(body, bytes) else body.pieces():
                self.wfile.write(piece[:left])
                left -= len(piece[:left])
                if not left:
                    break
        if cut:
            self._hang_up()

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value, default=str).encode()
        self.send(body, status, {"Content-Type": "application/json; charset=utf-8"} | (headers or {}))

    def user(self) -> str | None:
        """Who asks; None without a token."""
        authorization = self.headers.get("Authorization")
        if not authorization:
            return None
        user = self.hub.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return user

    def repo(self, kind: str, repo_id: str, *, content: bool) -> Repo:
        """The repository, if the sender of this request may see it (``content``: read its files)."""
        user = self.user()
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self.hub.may_read(repo, user)):
            # what is missing and what is private look the same from outside
            if user is None:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        if content and repo.gated and not self.hub.may_read(repo, user):
            raise Refused(401 if user is None else 403, "GatedRepo", f"Access to {kind} {repo_id} is restricted.")
        if content and repo.fault == "busy":
            raise Refused(503, None, "Service unavailable")
        return repo

    def commit(self, repo: Repo, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, kind: str, repo_id: str, revision: str = "") -> None:
        repo = self.repo(kind, repo_id, content=False)
        about = describe(repo, self.commit(repo, revision or "main"), blobs="blobs" in self.query)
        if expand := self.query.get("expand"):
            about = {key: value for key, value in about.items() if key in ("_id", "id", *expand)}
        self.send_json(about)

    def _auth_check(self, kind: str, repo_id: str) -> None:
        self.repo(kind, repo_id, content=True)
        self.send_json({})

    def _tree(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(kind, repo_id, content=False)
        folder = repo.commits[self.commit(repo, revision)]
        top = inside(folder, path)
        if top is None or not top.is_dir():
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = sorted(top.rglob("*") if recursive else top.iterdir())
        self.send_json([self._entry(repo, folder, p) for p in found])

    def _paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo(kind, repo_id, content=False)
        folder = repo.commits[self.commit(repo, revision)]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = self.json()["paths"]
        else:
            paths = parse_qs(self.body().decode()).get("paths", [])
        found = [inside(folder, path) for path in paths]
        self.send_json([self._entry(repo, folder, p) for p in found if p is not None and p.exists() and p != folder])

    def _entry(self, repo: Repo, folder: Path, path: Path) -> dict[str, Any]:
        entry = describe_file(folder, path)
        xet_hash = self.hub.xet_hash(entry["lfs"]["oid"]) if "lfs" in entry else None
        # what is to arrive corrupt must not come by Xet, which would notice it
        if xet_hash is not None and entry["path"] not in repo.corrupt:
            entry["xetHash"] = xet_hash
        return entry

    def _resolve(self, prefix: str, repo_id: str, revision: str, path: str) -> None:
        kind = "datasets" if prefix else "models"
        repo = self.repo(kind, repo_id, content=True)
        commit = self.commit(repo, revision)
        file = inside(repo.commits[commit], path)
        about = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file is None or not file.is_file():
            message = "Entry not found"
            self.send_json(
                {"error": message}, 404, about | {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
            )
            return
        entry = self._entry(repo, repo.commits[commit], file)
        corrupt = entry["path"] in repo.corrupt
        if "lfs" not in entry:
            about["ETag"] = f'"{entry["oid"]}"'
            self._send_file(file, about, cut=repo.fault == "cut", corrupt=corrupt)
            return
        about |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
        about["Location"] = f"{self.hub.storage_url}/storage/{kind}/{repo_id}/resolve/{commit}/{quote(path)}"
        if "xetHash" in entry:
            token_url = f"{self.hub.url}/api/{kind}/{repo_id}/xet-read-token/{commit}"
            about |= {"X-Xet-Hash": entry["xetHash"], "Link": f'<{token_url}>; rel="xet-auth"'}
        self.send(b"", 302, about)

    def _storage(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        """Where large files lie: anonymous, since the address itself is the secret."""
        repo = self.hub.repos.get((kind, repo_id))
        file = inside(repo.commits[revision], path) if repo and revision in repo.commits else None
        if repo is None or file is None or not file.is_file():
            raise Refused(404, None, "Not found")
        entry = describe_file(repo.commits[revision], file)
        corrupt = entry["path"] in repo.corrupt
        self._send_file(file, {"ETag": f'"{entry["oid"]}"'}, cut=repo.fault == "cut", corrupt=corrupt)

    def _send_file(self, file: Path, headers: dict[str, str], *, cut: bool, corrupt: bool) -> None:
        size = file.stat().st_size
        cut = cut and self.command == "GET"
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or wanted[0] == "bytes=-":
            self.send(FilePart(file, 0, size, corrupt), 200, headers, cut=cut)
            return
        if wanted[1]:
            start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        else:
            start, stop = max(0, size - int(wanted[2])), size
        if start >= stop:
            self.send(b"", 416, headers | {"Content-Range": f"bytes */{size}"})
            return
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self.send(FilePart(file, start, stop, corrupt), 206, headers | span, cut=cut)


KIND, REPO_ID, REVISION = r"(?P<kind>models|datasets)", r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
Handler.routes = (
    Route(("GET", "HEAD"), rf"/api/{KIND}/{REPO_ID}(?:/revision/{REVISION})?", Handler._info),
    Route(("GET",), rf"/api/{KIND}/{REPO_ID}/auth-check", Handler._auth_check),
    Route(("GET",), rf"/api/{KIND}/{REPO_ID}/tree/{REVISION}(?:/(?P<path>.*))?", Handler._tree),
    Route(("POST",), rf"/api/{KIND}/{REPO_ID}/paths-info/{REVISION}", Handler._paths_info),
    Route(("GET", "HEAD"), rf"/storage/{KIND}/{REPO_ID}/resolve/{REVISION}/(?P<path>.+)", Handler._storage),
    Route(("GET", "HEAD"), rf"/(?P<prefix>datasets/)?{REPO_ID}/resolve/{REVISION}/(?P<path>.+)", Handler._resolve),
)
HubServer.handler = Handler


def describe(repo: Repo, commit: str, *, blobs: bool = False) -> dict[str, Any]:
    """A repository as the Hub describes it; ``blobs``: with size and hashes of its files."""
    folder = repo.commits[commit]
    card = card_data(folder)
    siblings = []
    for path in files_in(folder):
        sibling: dict[str, Any] = {"rfilename": path.relative_to(folder).as_posix()}
        if blobs:
            entry = describe_file(folder, path)
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if lfs := entry.get("lfs"):
                sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        siblings.append(sibling)
    return {
        "_id": commit[:24], "id": repo.repo_id, "modelId": repo.repo_id, "author": repo.repo_id.split("/")[0],
        "sha": commit, "private": repo.private, "disabled": False, "gated": "manual" if repo.gated else False,
        "downloads": 0, "likes": 0, "tags": card_tags(card), "cardData": card,
        "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"),
        "lastModified": repo.last_modified, "createdAt": "2024-01-01T00:00:00.000Z", "siblings": siblings,
    }  # fmt: skip
