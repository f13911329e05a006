"""The Hub on loopback that other tests upload to, tried with the real client.

The client reads its environment when it is imported, so what it does runs in processes of their own: a test starts
this file as `python test_hub_server.py <name> <JSON>`, which calls ``child_<name>``; that prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_uploads import WritableHub
from test_hub_loading import environment, stay_on_loopback

CARD = "---\nlicense: mit\nlibrary_name: timm\npipeline_tag: image-classification\ntags: [robust]\n---\n"
WITHOUT_XET = {"HF_HUB_DISABLE_XET": "1"}


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    with WritableHub() as server:
        server.add_user("hf_me", "me", orgs={"lab": "write", "club": "read"})
        server.add_user("hf_reader", "me", "read")
        server.add_user("hf_fine", "me", "fineGrained", scopes={"me/fine"})
        server.add_user("hf_other", "other")
        yield server
        assert server.errors == []


def run(hub: WritableHub, home: Path, name: str, *arguments: Any, **variables: str) -> Any:
    """What ``child_<name>(*arguments)`` gives in a process whose client talks to this Hub as "me"."""
    settings = environment(hub.url, home, **{"HF_TOKEN": "hf_me"} | variables)
    command = [sys.executable, __file__, name, json.dumps(arguments)]
    result = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def content(name: str, size: int) -> bytes:
    """Bytes that look random and are the same in every process."""
    return hashlib.shake_128(name.encode()).digest(size)


def asked(hub: WritableHub, fragment: str) -> list[tuple[str, int]]:
    return [(request.method, request.status) for request in hub.requests if fragment in request.path]


# ---------------------------------------------------------------------------------------------------------
# What runs in the other processes
# ---------------------------------------------------------------------------------------------------------


def outcome(call: Callable[[], Any]) -> Any:
    """What a call raised: the status of the answer, or the name of the error. None if it did not."""
    try:
        call()
    except Exception as error:
        response = getattr(error, "response", None)
        return type(error).__name__ if response is None else response.status_code
    return None


def add(**files: Any) -> list[Any]:
    """Operations of a commit; "__" in a name stands for a dot."""
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(name.replace("__", "."), data) for name, data in files.items()]


def child_push(folder: str) -> Any:
    """Push twice, change a file, push from a stale state; fetch it in both ways."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    api = HfApi()
    api.create_repo("me/model")
    large = Path(folder) / "large.txt"
    large.write_bytes(b"text\n" * 2_200_000)
    weights = content("weights", 3_000_000)
    files = {"model__safetensors": weights, "large__txt": str(large), "README__md": CARD.encode(), "empty__txt": b""}
    first = api.create_commit("me/model", add(**files), commit_message="first")
    second = api.create_commit("me/model", add(**files), commit_message="second")
    changed = weights + b"changed"
    files["model__safetensors"] = changed
    third = api.create_commit("me/model", add(**files), commit_message="third", parent_commit=first.oid)
    stale = outcome(
        lambda: api.create_commit("me/model", add(a__txt=b"a"), commit_message="stale", parent_commit=first.oid)
    )
    one = hf_hub_download("me/model", "model.safetensors", revision=first.oid)
    everything = Path(snapshot_download("me/model"))
    assert Path(one).read_bytes() == weights
    assert (everything / "model.safetensors").read_bytes() == changed
    assert (everything / "large.txt").read_bytes() == large.read_bytes()
    assert (everything / "README.md").read_text() == CARD
    assert (everything / "empty.txt").read_bytes() == b""
    return [first.oid, second.oid, third.oid, stale]


def child_upload_folder(folder: str) -> Any:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("me/model")
    return [api.upload_folder(repo_id="me/model", folder_path=folder).oid for _ in range(2)]


def child_access() -> Any:
    """Who may do what."""
    from huggingface_hub import HfApi

    me, anonymous, reader, fine, other = (
        HfApi(token=token) for token in ("hf_me", False, "hf_reader", "hf_fine", "hf_other")
    )
    who = me.whoami()
    found: dict[str, Any] = {
        "who": [who["name"], [[org["name"], org["roleInOrg"]] for org in who["orgs"]]],
        "roles": [api.whoami()["auth"]["accessToken"]["role"] for api in (me, reader, fine)],
        "unknown token": outcome(lambda: HfApi(token="hf_expired").whoami()),
        "no token": outcome(lambda: anonymous.create_repo("me/a")),
    }
    me.create_repo("me/a")
    me.create_repo("me/hidden", private=True)
    me.create_repo("lab/a")
    fine.create_repo("me/fine")

    def commit(api: HfApi, repo_id: str, **options: Any) -> Any:
        return outcome(lambda: api.create_commit(repo_id, add(a__txt=b"a"), commit_message="a", **options))

    found |= {
        "exists": [outcome(lambda: me.create_repo("me/a")), me.create_repo("me/a", exist_ok=True).repo_id],
        "create": [
            outcome(lambda api=api, repo_id=repo_id: api.create_repo(repo_id))
            for api, repo_id in ((me, "other/a"), (me, "club/a"), (reader, "me/b"), (fine, "me/b"))
        ],
        "commit": [commit(api, "me/a") for api in (me, anonymous, reader, fine, other)],
        "fine": commit(fine, "me/fine"),
        "proposed": commit(other, "me/a", create_pr=True),
        "hidden": [outcome(lambda api=api: api.model_info("me/hidden")) for api in (me, anonymous, other)],
        "exist": [api.repo_exists("me/hidden") for api in (me, anonymous, other)],
        "private": [me.model_info(name).private for name in ("me/hidden", "me/a")],
        "reads files": outcome(lambda: other.hf_hub_download("me/hidden", ".gitattributes")),
    }
    me.delete_repo("lab/a")
    return found | {"deleted": me.repo_exists("lab/a")}


def child_refs() -> Any:
    from huggingface_hub import CommitOperationDelete, HfApi

    api = HfApi()
    head = api.model_info("me/model").sha
    api.create_branch("me/model", branch="dev/new")
    again = outcome(lambda: api.create_branch("me/model", branch="dev/new"))
    api.create_branch("me/model", branch="dev/new", exist_ok=True)
    nowhere = outcome(lambda: api.create_branch("me/model", branch="b", revision="missing"))
    on_branch = api.create_commit("me/model", add(b__txt=b"b"), commit_message="b", revision="dev/new")
    api.create_tag("me/model", tag="v1", revision=head)
    tag_again = outcome(lambda: api.create_tag("me/model", tag="v1"))
    deleted = [CommitOperationDelete("sub/", is_folder=True), CommitOperationDelete("top.txt")]
    proposed = api.create_commit("me/model", deleted, commit_message="p", create_pr=True)
    missing = outcome(lambda: api.create_commit("me/model", [CommitOperationDelete("no.txt")], commit_message="no"))
    on_tag = outcome(lambda: api.create_commit("me/model", add(c__txt=b"c"), commit_message="c", revision="v1"))
    refs = api.list_repo_refs("me/model", include_pull_requests=True)
    named = {
        kind: {ref.ref: ref.target_commit for ref in getattr(refs, kind) or []}
        for kind in ("branches", "tags", "pull_requests")
    }
    ignored = api.create_commit("me/ignoring", add(log__log=b"1", kept__txt=b"1"), commit_message="i")
    files = [file.path for file in api.list_repo_tree("me/ignoring", revision=ignored.oid)]
    return {
        "refused": [again, nowhere, tag_again, missing, on_tag], "refs": named, "head": head, "branch": on_branch.oid,
        "proposal": [proposed.oid, proposed.pr_revision, proposed.pr_num], "not ignored": files,
    }  # fmt: skip


def child_list() -> Any:
    from huggingface_hub import HfApi

    api = HfApi(token=False)

    def ids(**query: Any) -> list[str]:
        return [model.id for model in api.list_models(**query)]

    found = {
        "all": ids(), "tag": ids(filter="robust"), "both": ids(filter=["robust", "license:mit"]),
        "base": ids(filter="base_model:timm/x"), "author": ids(author="lab"), "search": ids(search="MODEL-1"),
        "limit": ids(limit=3), "task": ids(pipeline_tag="other"),
        "mine": [model.id for model in HfApi().list_models(search="hidden")],
    }  # fmt: skip
    full = next(iter(api.list_models(author="lab", full=True, cardData=True)))
    plain = next(iter(api.list_models(author="lab")))
    expanded = next(iter(api.list_models(author="lab", expand=["sha"])))
    info = api.model_info("lab/model", files_metadata=True)
    described = {file.rfilename: file for file in info.siblings or []}
    weights = described["model.safetensors"]
    return found | {
        "full": [full.card_data.license, full.sha == info.sha, len(full.siblings)],
        "plain": [plain.card_data, plain.sha, plain.siblings, plain.library_name],
        "expanded": [expanded.sha == info.sha, expanded.tags],
        "info": [sorted(info.tags), info.card_data.license, info.last_modified.year > 2024],
        "files": [described["README.md"].size, described["README.md"].blob_id, weights.size, weights.lfs.sha256],
    }


def child_cards(cards: list[str]) -> Any:
    from huggingface_hub import HfApi

    return [
        outcome(lambda card=card: HfApi().create_commit("me/model", add(README__md=card.encode()), commit_message="c"))
        for card in cards
    ]


def child_calls(calls: int) -> Any:
    """The outcomes of as many calls, and the seconds that each took."""
    from huggingface_hub import HfApi

    results = []
    for _ in range(calls):
        start = time.monotonic()
        results.append([outcome(HfApi().whoami), time.monotonic() - start])
    return results


def child_commits(commits: int) -> Any:
    """The outcomes of as many commits, each of another large file."""
    from huggingface_hub import HfApi

    return [
        outcome(
            lambda number=number: HfApi().create_commit(
                "me/model", add(model__bin=content(str(number), 2_000_000)), commit_message=str(number)
            )
        )
        for number in range(commits)
    ]


def child_download(*files: str) -> Any:
    from huggingface_hub import hf_hub_download

    digests = []
    for file in files:
        data = Path(hf_hub_download("me/model", file)).read_bytes()
        digests.append([hashlib.sha256(data).hexdigest(), len(data)])
    return digests


def child_liar() -> Any:
    """Upload by Xet what is not what its SHA-256 says."""
    from huggingface_hub import HfApi

    operations = add(model__bin=content("truth", 50_000))
    operations[0].upload_info.sha256 = hashlib.sha256(b"lie").digest()
    return outcome(lambda: HfApi().create_commit("me/model", operations, commit_message="lie"))


# ---------------------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["lfs", "parts", "xet"])
def test_push_and_fetch(hub, tmp_path, by):
    hub.xet, hub.chunk_size = by == "xet", 1_000_000 if by == "parts" else None
    variables = {} if by == "xet" else WITHOUT_XET
    first, second, third, stale = run(hub, tmp_path / "home", "push", str(tmp_path), **variables)
    assert (first, stale) == (second, 412), "the same again makes no commit"
    weights = content("weights", 3_000_000)
    files = hub.files("me/model")
    assert set(files) == {".gitattributes", "README.md", "empty.txt", "large.txt", "model.safetensors"}
    assert files["model.safetensors"].read_bytes() == weights + b"changed"
    assert files["README.md"] == CARD.encode()
    assert hub.files("me/model", first)["model.safetensors"].read_bytes() == weights
    assert [title for _, title in hub.commits("me/model")] == ["third", "first", "initial commit"]
    assert [commit for commit, _ in hub.commits("me/model")][:2] == [third, first]
    expected = [weights, (tmp_path / "large.txt").read_bytes(), weights + b"changed"]
    sent = sorted((hashlib.sha256(data).hexdigest(), len(data)) for data in expected)
    assert sorted(hub.received) == sent, "what is unchanged is not uploaded again"
    assert hub.repos["models", "me/model"].last_modified > "2025"
    assert asked(hub, "/commit/") == [("POST", 200), ("POST", 200), ("POST", 412)]
    puts = asked(hub, "/incoming/")
    assert puts == [("PUT", 200)] * {"lfs": 3, "parts": 3 + 11 + 4, "xet": 0}[by]
    assert bool(asked(hub, "xet-write-token")) == bool(asked(hub, "xet-read-token")) == (by == "xet")
    assert bool(asked(hub, "/storage/")) == (by != "xet")
    for request in hub.requests:
        if "/storage/" in request.path or "/incoming/" in request.path:
            assert request.headers["host"].startswith("localhost")
            assert "authorization" not in request.headers


@pytest.mark.parametrize("xet", [False, True])
def test_upload_folder(hub, tmp_path, xet):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "w.safetensors").write_bytes(content("w", 100_000))
    (folder / "a.txt").write_text("a")
    run(hub, tmp_path / "home", "upload_folder", str(folder), **({} if xet else WITHOUT_XET))
    files = hub.files("me/model")
    assert files.pop(".gitattributes")
    assert files == {"sub/w.safetensors": content("w", 100_000), "a.txt": b"a"}
    assert len(hub.commits("me/model")) == 2
    assert bool(asked(hub, "xet-write-token")) == xet


def test_access(hub, tmp_path):
    assert run(hub, tmp_path / "home", "access") == {
        "who": ["me", [["lab", "write"], ["club", "read"]]], "roles": ["write", "read", "fineGrained"],
        "unknown token": 401, "no token": 401, "exists": [409, "me/a"], "create": [403, 403, 403, 403],
        "commit": [None, 401, 403, 403, 403], "fine": None, "proposed": None, "hidden": [None, 401, 404],
        "exist": [True, False, False], "private": [True, False], "reads files": 404, "deleted": False,
    }  # fmt: skip
    hub.repos["models", "me/hidden"].readers.add("other")
    assert hub.may_read(hub.repos["models", "me/hidden"], "other")


def test_branches_tags_and_proposals(hub, tmp_path):
    hub.create("me/model", {"top.txt": "t", "sub/a.txt": "a", "sub/b.txt": "b"})
    hub.create("me/ignoring", {".gitignore": "*.log\n"})
    found = run(hub, tmp_path / "home", "refs")
    assert found["refused"] == [409, 404, 409, 404, 400]
    assert found["refs"] == {
        "branches": {"refs/heads/main": found["head"], "refs/heads/dev/new": found["branch"]},
        "tags": {"refs/tags/v1": found["head"]},
        "pull_requests": {"refs/pr/1": found["proposal"][0]},
    }
    assert found["proposal"][1:] == ["refs/pr/1", 1]
    assert found["not ignored"] == [".gitattributes", ".gitignore", "kept.txt"]
    assert set(hub.files("me/model")) == {".gitattributes", "top.txt", "sub/a.txt", "sub/b.txt"}
    assert set(hub.files("me/model", "refs/pr/1")) == {".gitattributes"}
    assert "b.txt" in hub.files("me/model", "dev/new")


def test_list_of_models(hub, tmp_path):
    hub.page_size = 2
    for number in range(5):
        hub.create(f"me/model-{number}", {"README.md": CARD} if number else None)
    hub.create("me/hidden", {"README.md": CARD}, private=True)
    card = CARD.replace("tags:", "base_model: timm/x\ndatasets: [a/b]\ntags:")
    hub.create("lab/model", {"README.md": card, "model.safetensors": b"w" * 99})
    found = run(hub, tmp_path / "home", "list")
    tagged = ["me/model-1", "me/model-2", "me/model-3", "me/model-4", "lab/model"]
    assert found["all"] == ["me/model-0", *tagged]
    assert found["tag"] == found["both"] == tagged
    assert found["base"] == found["author"] == ["lab/model"]
    assert (found["search"], found["limit"], found["task"]) == (["me/model-1"], found["all"][:3], [])
    assert found["mine"] == ["me/hidden"]
    assert (found["full"], found["expanded"]) == (["mit", True, 3], [True, None])
    assert found["plain"] == [None, None, None, "timm"]
    derived = {"base_model:finetune:timm/x", "base_model:timm/x", "dataset:a/b", "license:mit"}
    assert found["info"] == [sorted({*derived, "image-classification", "robust", "timm"}), "mit", True]
    git = hashlib.sha1(f"blob {len(card)}\0{card}".encode()).hexdigest()
    assert found["files"] == [len(card), git, 99, hashlib.sha256(b"w" * 99).hexdigest()]
    assert len([r for r in hub.requests if "cursor=" in r.path and "filter=robust" in r.path]) == 4, "two pages more"


def test_headers_of_readmes(hub, tmp_path):
    hub.create("me/model")
    bad = ["---\nlicense: [mit\n---\n", "---\nlicense: {a: 1}\n---\n", "---\ntags: 3\n---\n", "---\njust text\n---\n"]
    good = [CARD, "no header\n"]
    assert run(hub, tmp_path / "home", "cards", bad + good) == ["ValueError"] * 4 + [None] * 2
    assert asked(hub, "validate-yaml") == [("POST", 400)] * 4 + [("POST", 200)] * 2
    assert len(hub.commits("me/model")) == 3


def test_faults_of_calls(hub, tmp_path):
    statuses = [401, 403, 404, 409, 412, 429, 500, 503]
    for status in statuses:
        hub.fail("GET", "whoami", status=status)
    hub.fail("GET", "whoami", cut=True)
    hub.fail("*", "whoami", cut=True, after=True)
    hub.fail("GET", "whoami", status=503, after=True)
    hub.fail("GET", "whoami", delay=0.4)
    results = run(hub, tmp_path / "home", "calls", 13)
    assert [result for result, _ in results[:8]] == statuses
    assert [result for result, _ in results[8:]] == ["RemoteProtocolError", "RemoteProtocolError", 503, None, None]
    assert results[11][1] > 0.4 > results[12][1]
    assert [status for _, status in asked(hub, "whoami")] == [*statuses, 200, 0, 503, 200, 200]


def test_faults_of_uploads(hub, tmp_path):
    """The client tries again what it can; what it cannot is its user's to try again."""
    hub.create("me/model")
    hub.fail("PUT", "/incoming/", cut=True)
    hub.fail("PUT", "/incoming/", status=503)
    hub.fail("POST", "/verify", status=500)
    hub.fail("POST", "/commit/", cut=True)
    assert run(hub, tmp_path / "home", "commits", 2, **WITHOUT_XET) == ["RemoteProtocolError", None]
    assert asked(hub, "/incoming/") == [("PUT", 0), ("PUT", 503), ("PUT", 200), ("PUT", 200)]
    assert [title for _, title in hub.commits("me/model")] == ["1", "initial commit"]
    hub.fail("POST", "/commit/", cut=True, after=True)
    hub.fail("POST", "/commit/", status=412, message="A commit has happened since.")
    assert run(hub, tmp_path / "home", "commits", 3, **WITHOUT_XET) == ["RemoteProtocolError", 412, None]
    assert [title for _, title in hub.commits("me/model")] == ["2", "0", "1", "initial commit"], "0 was carried out"


def test_faults_of_xet(hub, tmp_path):
    hub.create("me/model")
    hub.fail("GET", "xet-write-token", status=403)
    refused, done = run(hub, tmp_path / "home", "commits", 2)
    assert (refused is None, done) == (False, None)
    assert [title for _, title in hub.commits("me/model")] == ["1", "initial commit"]
    assert run(hub, tmp_path / "home", "liar") == 400, "the content is looked at"
    assert len(hub.commits("me/model")) == 2
    hub.xet = False
    assert run(hub, tmp_path / "home", "commits", 1) != [None], "there is no Xet, and the client has no other way"
    assert asked(hub, "xet-write-token")[-1] == ("GET", 404)


def test_faults_of_downloads(hub, tmp_path):
    files = {"model.bin": content("m", 2_000_000), "a.txt": b"a" * 999}
    repo = hub.create("me/model", files)
    wanted = [[hashlib.sha256(data).hexdigest(), len(data)] for data in files.values()]
    hub.fail("GET", "/storage/.*model.bin", cut=True)
    assert run(hub, tmp_path / "home", "download", *files) == wanted
    assert asked(hub, "/storage/") == [("GET", 200)] * 2, "cut, then whole"
    repo.corrupt |= set(files)
    corrupt = run(hub, tmp_path / "other", "download", *files)
    assert [size for _, size in corrupt] == [2_000_000, 999]
    assert all(one[0] != other[0] for one, other in zip(corrupt, wanted, strict=True))


def test_corrupt_in_spite_of_xet(hub, tmp_path):
    """What came by Xet is fetched by Xet; what is to be corrupt is not, for Xet would notice."""
    repo = hub.create("me/model")
    assert run(hub, tmp_path / "home", "commits", 1) == [None]
    wanted = [hashlib.sha256(content("0", 2_000_000)).hexdigest(), 2_000_000]
    assert run(hub, tmp_path / "one", "download", "model.bin") == [wanted]
    assert asked(hub, "/storage/") == []
    hub.xet = False
    assert run(hub, tmp_path / "two", "download", "model.bin") == [wanted]
    assert asked(hub, "/storage/") == [("GET", 200)]
    hub.xet = True
    repo.corrupt.add("model.bin")
    [[digest, size]] = run(hub, tmp_path / "three", "download", "model.bin")
    assert (digest != wanted[0], size) == (True, 2_000_000)


def send(method: str, url: str, body: bytes) -> int:
    request = urllib.request.Request(url, body, {"Authorization": "Bearer hf_me"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_storage_takes_only_what_was_announced(hub):
    hub.create("me/model")
    data = content("d", 1000)
    oid = hashlib.sha256(data).hexdigest()
    url = hub.storage_url + f"/incoming/{oid}?" + hub.signed("part", oid, part=0, size=1000)
    assert send("PUT", url.replace("size=1000", "size=999"), data[:-1]) == 403
    assert send("PUT", url, data[:-1]) == 400
    assert send("PUT", url, b"\0" * 1000) == 400
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "s"}}]
    lines.append({"key": "lfsFile", "value": {"path": "d.bin", "algo": "sha256", "oid": oid, "size": 1000}})
    commit = "\n".join(map(json.dumps, lines)).encode()
    assert send("POST", f"{hub.url}/api/models/me/model/commit/main", commit) == 400
    assert hub.received == []
    assert send("PUT", url, data) == 200
    assert send("POST", f"{hub.url}/api/models/me/model/commit/main", commit) == 200
    assert (hub.received, hub.files("me/model")["d.bin"]) == ([(oid, 1000)], data)
    escape = commit.replace(b'"d.bin"', b'"../d.bin"')
    assert send("POST", f"{hub.url}/api/models/me/model/commit/main", escape) == 400


if __name__ == "__main__":
    stay_on_loopback()
    print(json.dumps(globals()[f"child_{sys.argv[1]}"](*json.loads(sys.argv[2]))))
