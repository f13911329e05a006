"""Models published and loaded again through the real client, over HTTP, on a Hub on loopback.

The client reads its environment when it is imported, so every command runs in a process of its own: a test starts this
file as `python test_hub_push.py <words of the command>`, which runs it as a user would, without waiting between tries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from forked import run_python
from hub_uploads import WritableHub
from test_hub_loading import environment, stay_on_loopback, write_vit

WITHOUT_XET = {"HF_HUB_DISABLE_XET": "1"}
TRAIN = (
    *("--dataset", "org/data", "--max-steps", "2", "--batch-size", "8", "--attack-steps", "1", "--num-workers", "0"),
    *("--eval-attack-steps", "1", "--validation-size", "6", "--limit-eval", "8", "--eps", "4/255"),
)
LABELS = ['a "quoted": label', "two\nlines | `code` --- <script>alert(1)</script>", "🦜 emoji, 日本語, {{ 7 * 7 }}"]
CARD = """---
license: {license}
library_name: {library}
---
# A model

```bibtex
@misc{{base2024, title = {{The {{Base}} Model}}, year = {{2024}}}}
```
"""
# plain timm and transformers, in a process that has no arrest_hub
PLAIN = """
import json, sys
sys.modules["arrest_hub"] = None
import torch
from PIL import Image
image = Image.open(sys.argv[2]).convert("RGB")
torch.manual_seed(0)
with torch.no_grad():
    if sys.argv[1] == "timm":
        import timm
        model = timm.create_model("hf-hub:" + sys.argv[3], pretrained=True).eval()
        config = timm.data.resolve_model_data_config(model)
        pixels = timm.data.create_transform(**config, is_training=False)(image).unsqueeze(0)
        logits, labels = model(pixels), model.pretrained_cfg["label_names"]
    else:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        processor = AutoImageProcessor.from_pretrained(sys.argv[3])
        model = AutoModelForImageClassification.from_pretrained(sys.argv[3]).eval()
        logits = model(**processor(image, return_tensors="pt")).logits
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
print(json.dumps([logits[0].tolist(), list(labels)]))
"""
OURS = """
import json, sys
import torch
from PIL import Image
import arrest_hub
from test_hub_push import stay_on_loopback
stay_on_loopback()
model = arrest_hub.from_pretrained(sys.argv[1])
pixels = model.preprocess(Image.open(sys.argv[2]))
assert 0 <= pixels.min() and pixels.max() <= 1
with torch.no_grad():
    logits = model(pixels)
best = model.classify(Image.open(sys.argv[2]), top=1)[0]
print(json.dumps({
    "logits": logits[0].tolist(), "labels": model.label_names, "best": best, "revision": model.source.revision,
    "threat": [model.threat_model.norm, model.threat_model.eps], "clean": model.results.get("clean_accuracy").n,
    "base": [model.record.base.id, model.record.base.revision], "text": repr(model).splitlines()[0:2],
}))
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("push")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[WritableHub]:
    from tiny import write_images

    with WritableHub() as hub:
        hub.add_user("hf_me", "me", orgs={"lab": "write", "club": "read"})
        hub.add_user("hf_reader", "me", "read")
        hub.add_user("hf_other", "other")
        hub.add("datasets", "org/data", write_images(folder / "data", names=LABELS))
        for library, source in (("timm", write_timm(folder / "base")), ("transformers", write_vit(folder / "vit"))):
            files: dict[str, Any] = {path.name: path for path in source.iterdir()}
            card = CARD.format(license="apache-2.0", library=library)
            hub.create(f"org/{library}-base", files | {"README.md": card})
        yield hub


@pytest.fixture
def hub(served: WritableHub) -> Iterator[WritableHub]:
    """The Hub, whose storage never sees a token and which nothing but the test made fail."""
    served.requests.clear()
    served.faults.clear()
    served.xet, served.chunk_size = True, None
    yield served
    assert served.errors == []
    for request in served.requests:
        if "/storage/" in request.path:
            assert "authorization" not in request.headers


def write_timm(folder: Path) -> Path:
    """A network of an architecture that plain timm has, in timm's format, with three named classes."""
    import timm
    import torch
    from timm.models._hub import save_for_hf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=3)
    data = {"input_size": (3, 24, 24), "crop_pct": 1.0}
    save_for_hf(model, str(folder), {"label_names": LABELS}, safe_serialization=True, data_config=data)
    return folder


def start(
    hub: WritableHub, home: Path, command: list[str], *, token: str | None = "hf_me", largest_file: int | None = None,
    **variables: str,
) -> Outcome:  # fmt: skip
    """Run a command whose client talks to this Hub. ``largest_file``: no file can grow beyond so many bytes."""
    settings = environment(hub.url, home, **({"HF_TOKEN": token} if token else {}) | variables)
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), settings.get("PYTHONPATH")]))
    limit = None
    if largest_file is not None:
        settings["PYTHONDONTWRITEBYTECODE"] = "1"

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    home.parent.mkdir(parents=True, exist_ok=True)
    if command[1] in ("arrest-push", "arrest-card"):  # they need no PyTorch, which a forked process would hide
        result = subprocess.run(
            [sys.executable, *command], env=settings, cwd=home.parent, capture_output=True, text=True, timeout=150,
            check=False, preexec_fn=limit,
        )  # fmt: skip
    else:
        assert limit is None, "a forked process has none"
        result = run_python(command, env=settings, cwd=home.parent, timeout=150)
    assert "hf_me" not in result.stdout + result.stderr, "a token is printed"
    return Outcome(result.returncode, result.stdout, result.stderr)


def arrest(hub: WritableHub, home: Path, *words: str, **options: Any) -> Outcome:
    """``arrest-finetune``, ``arrest-eval``, ``arrest-push`` or ``arrest-card`` and its flags."""
    return start(hub, home, [__file__, *words], **options)


def push(hub: WritableHub, run: Path, *words: str, **options: Any) -> Outcome:
    return arrest(hub, run.parent / "home", "arrest-push", str(run), *words, **options)


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below ``folder`` with its hash."""
    return {
        str(path.relative_to(folder)): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------------------------------------------------
# From the base model's id to the published one, and back
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(served: WritableHub, folder: Path) -> dict[str, tuple[Path, Outcome]]:
    """A run for each library, from a base model on the Hub to a commit there, by the command that users type."""
    runs = {}
    for library in ("timm", "transformers"):
        run = folder / library / "run"
        words = ("--model", f"org/{library}-base", "--output-dir", str(run), "--push-to-hub", f"me/{library}-robust")
        runs[library] = run, arrest(served, run.parent / "home", "arrest-finetune", *TRAIN, *words)
        assert runs[library][1].code == 0, runs[library][1]
    return runs


@pytest.fixture
def run(published: dict[str, tuple[Path, Outcome]], tmp_path: Path) -> Path:
    """A copy of a finished run, with a Hub's cache of its own."""
    return shutil.copytree(published["timm"][0], tmp_path / "run")


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_one_command_publishes_and_anybody_loads(hub, published, library, tmp_path):
    from PIL import Image

    run, outcome = published[library]
    repo_id = f"me/{library}-robust"
    commit, _ = hub.commits(repo_id)[0]
    assert len(hub.commits(repo_id)) == 2, "the Hub's own first commit, then one with everything"
    assert f"published {hub.url}/{repo_id}/tree/{commit}" in outcome.out
    pushed, local = hub.files(repo_id), {p.relative_to(run / "export") for p in (run / "export").rglob("*")}
    assert {path for path in pushed if path != ".gitattributes"} == {
        str(path) for path in local if (run / "export" / path).is_file()
    }
    for path, data in pushed.items():
        content = data.read_bytes() if isinstance(data, Path) else data  # a large file, where it lies
        assert path[0] == "." or (run / "export" / path).read_bytes() == content
    assert not any(path.startswith(("checkpoints", "log", "teacher")) for path in pushed)
    assert str(run.parent) not in "".join(
        data.decode() for path, data in pushed.items() if path.endswith((".json", ".yaml", ".md"))
    ), "paths of this machine are nobody's business"

    rng = __import__("numpy").random.default_rng(0)
    image = tmp_path / "image.png"
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype="uint8")).save(image)
    plain = start(hub, tmp_path / "plain", ["-c", PLAIN, library, str(image), repo_id], token=None)
    assert plain.code == 0, plain
    logits, labels = json.loads(plain.out.splitlines()[-1])
    ours = start(hub, tmp_path / "ours", ["-c", OURS, repo_id, str(image)], token=None)
    assert ours.code == 0, ours
    found = json.loads(ours.out.splitlines()[-1])
    assert found["logits"] == pytest.approx(logits, abs=1e-5)
    assert found["labels"] == labels == LABELS
    assert found["best"][0] == labels[max(range(3), key=lambda i: logits[i])]
    assert found["revision"] == commit
    assert found["threat"] == ["linf", "4/255"]
    assert found["clean"] == 8
    base = hub.repos["models", f"org/{library}-base"].refs["main"]
    assert found["base"] == [f"org/{library}-base", base]


def test_the_card_on_the_hub(hub, published, folder):
    from huggingface_hub import ModelCard

    for library in ("timm", "transformers"):
        files = hub.files(f"me/{library}-robust")
        card = ModelCard(files["README.md"].decode())
        data = card.data
        assert (data.library_name, data.license, data.base_model_relation) == (library, "apache-2.0", "finetune")
        assert data.base_model == f"org/{library}-base"
        assert data.base_model_revision == hub.repos["models", data.base_model].refs["main"]
        assert data.datasets == ["org/data"]
        assert {"linf", "linf-4/255", "arrest", "arrest-hub"} <= set(data.tags)
        results = json.loads(files["results.json"])["results"]
        assert [r.metric_value for r in data.eval_results] == [row["value"] for row in results]
        assert [(r.metric_args or {}).get("eps") for r in data.eval_results] == [None, "4/255"]
        shown = re.findall(r"\]\((figures/[^)]+)\)", card.text)
        assert shown
        assert set(shown) <= set(files)
        assert "The {Base} Model" in card.text, "the base model's own citation"
        assert "suzuki2023arrest" in card.text
        assert f'"me/{library}-robust"' in card.text or f"hf-hub:me/{library}-robust" in card.text


def test_the_published_model_is_evaluated_and_finetuned_as_any(hub, published, tmp_path):
    home = tmp_path / "home"
    quick = ("--attacks", "pgd-2", "--no-checks", "--no-figures", "--num-workers", "0", "--eps", "4/255")
    evaluated = arrest(hub, home, "arrest-eval", "me/timm-robust", "--dataset", "org/data", *quick)
    assert evaluated.code == 0, evaluated
    commit, base = hub.commits("me/timm-robust")[0][0], hub.repos["models", "org/timm-base"].refs["main"]
    assert f"me/timm-robust @ {commit[:12]}" in evaluated.out
    assert f"teacher     org/timm-base@{base}" in evaluated.out
    report = json.loads((tmp_path / "evals" / "timm_robust-data-linf-4_255" / "results.json").read_text())
    assert (report["model"]["id"], report["model"]["revision"]) == ("me/timm-robust", commit)

    again = arrest(
        hub, home, "arrest-finetune", "--model", "me/timm-robust", *TRAIN, "--method", "at", "--no-figures",
        "--output-dir", "again", "--push-to-hub", "lab/again", "--private",
    )  # fmt: skip
    assert again.code == 0, again
    assert hub.repos["models", "lab/again"].private
    record = json.loads(hub.files("lab/again")["training_record.json"])
    assert (record["base"]["id"], record["base"]["revision"]) == ("me/timm-robust", commit)
    assert record["base"]["license"]["id"] == "apache-2.0"
    assert f"me/timm-robust@{commit}" in hub.files("lab/again")["training_config.yaml"].decode()


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_many_classes_with_odd_names_survive(hub, published, library, tmp_path):
    """21,000 of them: nothing in config, card or header is cut, mixed up or taken for markup."""
    import torch
    import yaml
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(published[library][0], tmp_path / "run")
    labels = [f"{LABELS[i % 3]} {i}" for i in range(20_999)] + [LABELS[0] + " 0"]  # two of one name, as in ImageNet
    config_file, weights_file = run / "export" / "config.json", run / "export" / "model.safetensors"
    config, weights = json.loads(config_file.read_text()), load_file(run / "export" / "model.safetensors")
    for name in [name for name, value in weights.items() if value.shape[:1] == (3,) and name.split(".")[0] != "vit"]:
        weights[name] = torch.zeros(len(labels), *weights[name].shape[1:])
    if library == "timm":
        config |= {"num_classes": len(labels), "label_names": labels}
        config["pretrained_cfg"]["num_classes"] = len(labels)
        config["model_args"]["num_classes"] = len(labels)
    else:
        config |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config_file.write_text(json.dumps(config))
    save_file(weights, weights_file, {"format": "pt"})
    forget_files(run)
    outcome = push(hub, run, "--repo-id", f"me/{library}-many")
    assert outcome.code == 0, outcome
    card = hub.files(f"me/{library}-many")["README.md"].decode()
    assert len(card) < 60_000
    assert "21,000 classes" in card
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))["license"] == "apache-2.0"
    image = tmp_path / "image.png"
    __import__("PIL.Image").Image.new("RGB", (30, 30)).save(image)
    plain = start(hub, tmp_path / "plain", ["-c", PLAIN, library, str(image), f"me/{library}-many"], token=None)
    assert plain.code == 0, plain
    assert json.loads(plain.out.splitlines()[-1])[1] == labels
    ours = start(hub, tmp_path / "ours", ["-W", "error:the results", "-c", OURS, f"me/{library}-many", str(image)])
    assert "is of other weights" in ours.err, "the figures beside these weights are not theirs"
    ours = start(hub, tmp_path / "ours", ["-c", OURS, f"me/{library}-many", str(image)])
    assert json.loads(ours.out.splitlines()[-1])["labels"] == labels


def test_models_are_found_by_what_they_withstand(hub, published, tmp_path):
    code = (
        "import json, arrest_hub; from arrest_hub.errors import ConfigError\n"
        "find = lambda *a, **k: [[m.id, m.norm, m.eps, m.method, m.base_model, m.clean_accuracy, m.robust_accuracy,"
        " m.attack, list(m.datasets)] for m in arrest_hub.list_models(*a, **k)]\n"
        "print(json.dumps([find(), find(norm='l2'), find(norm='linf', eps='8/510'), find(norm='linf', eps='8/255'),"
        " find(dataset='org/data', author='me', limit=1), find('transformers-robust'), find(dataset='cifar10'),"
        " find(method='at')]))\n"
        "for bad in ({'norm': 'l0'}, {'eps': '8/255'}, {'norm': 'linf', 'eps': '8'}, {'norm': 'linf', 'eps': 'x'}):\n"
        "    try: arrest_hub.list_models(**bad)\n"
        "    except ConfigError: continue\n"
        "    raise SystemExit(str(bad))\n"
    )
    outcome = start(hub, tmp_path / "home", ["-c", code], token=None)
    assert outcome.code == 0, outcome
    every, l2, same, other, one, named, cifar, at = json.loads(outcome.out.splitlines()[-1])
    assert {"me/timm-robust", "me/transformers-robust"} <= {row[0] for row in every}
    assert (l2, other, cifar) == ([], [], [])
    assert {row[0] for row in same} == {row[0] for row in every}
    assert len(one) == 1
    assert [row[0] for row in named] == ["me/transformers-robust"]
    results = json.loads(hub.files("me/transformers-robust")["results.json"])["results"]
    assert named[0][1:] == ["linf", "4/255", "arrest", "org/transformers-base", results[0]["value"],
                            results[1]["value"], "pgd-1", ["org/data"]]  # fmt: skip
    assert all(row[3] == "at" for row in at)


# ---------------------------------------------------------------------------------------------------------
# Pushing again
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["xet", "lfs", "multipart"])
def test_only_what_changed_is_pushed(hub, run, path):
    settings = {} if path == "xet" else WITHOUT_XET
    hub.xet, hub.chunk_size = path == "xet", 100_000 if path == "multipart" else None
    (run / "export" / "more.safetensors").write_bytes(os.urandom(250_000))
    repo_id = f"me/again-{path}"
    first = push(hub, run, "--repo-id", repo_id, **settings)
    assert first.code == 0, first
    if path != "xet":
        assert any(r.method == "PUT" and r.status == 200 for r in hub.requests)
    if path == "multipart":
        assert len([r for r in hub.requests if r.method == "PUT" and r.status == 200]) > 2
    assert (path == "xet") == any("xet-write-token" in r.path for r in hub.requests)
    before, hashed = contents(run), len(hub.commits(repo_id))
    hub.requests.clear()
    second = push(hub, run, "--repo-id", repo_id, **settings)
    assert second.code == 0, second
    assert "has all of it already" in second.out
    assert len(hub.commits(repo_id)) == hashed
    assert not [r for r in hub.requests if "/commit/" in r.path or "preupload" in r.path]
    assert contents(run) == before

    (run / "export" / "figures" / "gallery.png").write_bytes(b"another picture")
    (run / "export" / "figures" / "drift.png").unlink()
    third = push(hub, run, "--repo-id", repo_id, "--message", "New pictures", **settings)
    assert "pushing 2 of" in third.out, third  # the card does not show the picture that is gone
    files = hub.files(repo_id)
    assert files["figures/gallery.png"] == b"another picture"
    assert "figures/drift.png" not in files
    assert "drift.png" not in files["README.md"].decode()
    assert hub.commits(repo_id)[0][1] == "New pictures"
    assert len(hub.commits(repo_id)) == hashed + 1


def test_what_others_added_or_edited_on_the_hub_is_left(hub, run):
    repo_id, card = "me/shared", run / "export" / "README.md"
    assert push(hub, run, "--repo-id", repo_id, **WITHOUT_XET).code == 0
    edited = hub.files(repo_id)["README.md"] + b"\nEdited on the website.\n"
    theirs = {
        name: f"{name} of somebody else".encode()
        for name in ("model.fp16.safetensors", "model-lora.safetensors", "models/other.safetensors",
                     "figures/mine.png", "figures/demo/gallery.png", "more/verdicts.parquet")
    }  # fmt: skip
    ours = {"model-00001-of-00002.safetensors": b"a shard of an earlier push"}
    repo = hub.repos["models", repo_id]
    repo.refs["main"] = hub.new_commit(
        repo, repo.refs["main"], "By others", theirs | ours | {"README.md": edited}
    )  # fmt: skip
    (run / "export" / "figures" / "drift.png").unlink()
    outcome = push(hub, run, "--repo-id", repo_id, **WITHOUT_XET)
    assert outcome.code == 0, outcome
    files = hub.files(repo_id)
    assert {name: files.get(name) for name in theirs} == theirs
    assert (
        "deleting what an earlier push left there: figures/drift.png, model-00001-of-00002.safetensors" in outcome.out
    )
    assert files.keys().isdisjoint({"figures/drift.png", *ours})
    assert files["README.md"] == edited
    assert "was edited, there or before an earlier push, and stays as it is" in outcome.out
    again = push(hub, run, "--repo-id", repo_id, **WITHOUT_XET)
    assert "has all of it already" in again.out, again

    card.write_text(card.read_text() + "\nEdited here.\n")
    outcome = push(hub, run, "--repo-id", repo_id, **WITHOUT_XET)
    assert "yours, edited here, replaces it" in outcome.out, outcome
    assert hub.files(repo_id)["README.md"] == card.read_bytes()


def test_a_header_alone_is_no_card_to_keep(hub, run):
    """But the licence that somebody chose in the Hub's form is not replaced by another one unasked."""
    hub.create("me/fresh", {"README.md": "---\nlicense: mit\n---\n"})
    outcome = push(hub, run, "--repo-id", "me/fresh", **WITHOUT_XET)
    assert outcome.code == 2
    assert "me/fresh states the licence mit and the card here apache-2.0: say which it is" in outcome.err
    assert push(hub, run, "--repo-id", "me/fresh", "--license", "mit", **WITHOUT_XET).code == 0
    assert hub.files("me/fresh")["README.md"] == (run / "export" / "README.md").read_bytes()


@pytest.mark.slow
def test_weights_in_several_files(hub, published, tmp_path):
    """What an earlier push left and this one would not overwrite is removed: one file gives way to shards, and back."""
    from transformers import AutoModelForImageClassification

    run = shutil.copytree(published["transformers"][0], tmp_path / "run")
    whole = (run / "export" / "model.safetensors").read_bytes()
    assert push(hub, run, "--repo-id", "me/shards").code == 0
    model = AutoModelForImageClassification.from_pretrained(run / "export")
    (run / "export" / "model.safetensors").unlink()
    model.save_pretrained(run / "export", max_shard_size="5KB")
    forget_files(run)
    assert push(hub, run, "--repo-id", "me/shards").code == 0
    files = set(hub.files("me/shards"))
    assert {"model.safetensors.index.json", "model-00001-of-00003.safetensors"} <= files
    assert "model.safetensors" not in files
    image = tmp_path / "image.png"
    __import__("PIL.Image").Image.new("RGB", (30, 30)).save(image)
    ours = start(hub, tmp_path / "ours", ["-c", OURS, "me/shards", str(image)], token=None)
    assert "of other weights" not in ours.err
    plain = start(hub, tmp_path / "plain", ["-c", PLAIN, "transformers", str(image), "me/shards"], token=None)
    assert json.loads(ours.out.splitlines()[-1])["logits"] == pytest.approx(
        json.loads(plain.out.splitlines()[-1])[0], abs=1e-5
    )
    for path in (run / "export").glob("model*"):
        path.unlink()
    (run / "export" / "model.safetensors").write_bytes(whole)
    assert push(hub, run, "--repo-id", "me/shards").code == 0
    assert {path for path in hub.files("me/shards") if path.startswith("model")} == {"model.safetensors"}


@pytest.mark.slow
def test_of_two_processes_one_publishes(hub, tmp_path):
    def launch(home: Path, **options: Any) -> Outcome:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, "arrest-finetune"]
        words = ["--model", "org/timm-base", "--output-dir", "run", "--push-to-hub", "me/two", "--no-figures", *TRAIN]
        return start(hub, home, launcher + words, **options)

    refused = launch(tmp_path / "home", token="hf_reader")
    assert refused.code != 0
    assert refused.err.count("may only read") == 1
    assert not (tmp_path / "run").exists()
    outcome = launch(tmp_path / "home")
    assert outcome.code == 0, outcome
    assert outcome.out.count("published ") == 1
    assert len(hub.commits("me/two")) == 2
    assert len([r for r in hub.requests if r.method == "POST" and "/commit/" in r.path]) == 1
    assert "2 x CPU" in hub.files("me/two")["README.md"].decode()


def test_branch_tag_private_and_pull_request(hub, run, tmp_path):
    options = ("--private", "--revision", "dev", "--tag", "v1.0")
    outcome = push(hub, run, "--repo-id", "named", *options)
    assert outcome.code == 0, outcome
    repo = hub.repos["models", "me/named"]
    assert repo.private
    assert set(hub.files("me/named")) == {".gitattributes"}
    assert "model.safetensors" in hub.files("me/named", "dev")
    assert repo.refs["v1.0"] == repo.refs["dev"]
    assert push(hub, run, "--repo-id", "named", *options).code == 0, "nothing to do, and the tag is right"
    (run / "export" / "figures" / "gallery.png").write_bytes(b"x")
    refused = push(hub, run, "--repo-id", "named", *options)
    assert refused.code == 2
    assert "has a tag 'v1.0' already" in refused.err
    assert repo.refs["v1.0"] == repo.refs["dev"], "nothing was committed that the tag could not have"

    hub.create("other/theirs", {"config.json": "{}", "README.md": "theirs"})
    refused = push(hub, run, "--repo-id", "other/theirs")
    assert refused.code == 2
    assert "not your account" in refused.err
    hub.create("me/open", {"README.md": "mine"})
    for words, why in ((("open", "--private"), "is public"), (("other/none", "--create-pr"), "no such repository")):
        refused = push(hub, run, "--repo-id", *words)
        assert refused.code == 2
        assert why in refused.err
        assert "Try again" not in refused.err, "the same would be refused again"
    outcome = push(hub, run, "--repo-id", "other/theirs", "--create-pr")
    assert outcome.code == 0, outcome
    assert hub.files("other/theirs")["README.md"] == b"theirs"
    assert "model.safetensors" in hub.files("other/theirs", "refs/pr/1")
    assert "/discussions/1" in outcome.out


def test_a_dry_run_opens_no_connection(hub, run):
    outcome = push(hub, run, "--repo-id", "me/dry", "--dry-run", token=None)
    assert outcome.code == 0, outcome
    assert hub.requests == []
    assert "would push model.safetensors" in outcome.out
    assert "hf-hub:me/dry" in (run / "export" / "README.md").read_text()
    before = contents(run)
    outcome = arrest(hub, run.parent / "home", "arrest-card", str(run))
    assert outcome.code == 0, outcome
    assert contents(run) == before, "the card is a function of the files and of what it says itself"


def test_a_card_edited_by_hand_is_pushed_as_it_is(hub, run):
    card = run / "export" / "README.md"
    card.write_text(card.read_text() + "\nMore from me.\n")
    refused = arrest(hub, run.parent / "home", "arrest-card", str(run))
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert push(hub, run, "--repo-id", "me/edited").code == 0
    assert hub.files("me/edited")["README.md"].endswith(b"More from me.\n")
    refused = push(hub, run, "--repo-id", "me/edited", "--license", "mit")
    assert refused.code == 2
    assert "edited by hand" in refused.err
    assert arrest(hub, run.parent / "home", "arrest-card", str(run), "--overwrite").code == 0
    assert "More from me" not in card.read_text()


# ---------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------


def fails_and_recovers(hub, run, repo_id, *fragments, words=(), then=None, **options) -> Outcome:
    """The push fails with one clear error and leaves the run as it was; the command it prints then succeeds."""
    before = contents(run)
    outcome = push(hub, run, "--repo-id", repo_id, *words, **options)
    assert outcome.code == 2, outcome
    assert contents(run) == before
    assert "error: cannot " in outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for fragment in fragments:
        assert fragment in outcome.err, outcome.err
    assert ("models", repo_id) not in hub.repos or "model.safetensors" not in hub.files(repo_id)
    printed = re.search(r"Try again with: (arrest-push .+)", outcome.err)
    assert printed, outcome.err
    hub.faults.clear()
    if then is not None:
        then()
    variables = {key: value for key, value in options.items() if key not in ("token", "largest_file")}
    again = arrest(hub, run.parent / "home", *shlex.split(printed[1]), **variables)
    assert again.code == 0, again
    assert "model.safetensors" in hub.files(repo_id)
    assert (run / "export" / "README.md").read_bytes() == hub.files(repo_id)["README.md"]
    return outcome


@pytest.mark.parametrize(
    ("token", "fragment"),
    [
        (None, "no access token"),
        ("hf_expired", "does not accept your access token"),
        ("hf_reader", "may only read"),
        ("hf_other", "not your account (other)"),
    ],
)
def test_who_may_not_publish(hub, run, token, fragment):
    fails_and_recovers(hub, run, f"me/who-{token}", fragment, token=token)
    sent = [r for r in hub.requests if "preupload" in r.path]
    assert sent, "the second try"


LASTING = {
    "forbidden": (
        ("POST", "/commit/", {"status": 403, "message": "no write access"}),
        ("forbids it", "no write access"),
    ),
    "bad request": (("POST", "/preupload/", {"status": 400}), ("400",)),
    "broken": (("POST", "/commit/", {"status": 500, "times": 99}), ("500", "tried 5 times")),
    "unavailable": (("POST", "/preupload/", {"status": 503, "times": 999}), ("503",)),
    "too many": (("GET", "/api/models/", {"status": 429, "times": 999}), ("429",)),
    "cut": (("POST", "/commit/", {"cut": True, "times": 99}), ("connection to the Hub failed",)),
    "create": (("POST", "/repos/create", {"status": 500, "times": 99}), ("create the repository", "500")),
    "whoami": (("GET", "/whoami", {"status": 502, "times": 99}), ("502",)),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_does_not_pass(hub, run, name):
    (method, path, fault), fragments = LASTING[name]
    hub.fail(method, path, **fault)
    fails_and_recovers(hub, run, f"me/lasting-{name.replace(' ', '-')}", *fragments)


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("PUT", "", {"status": 500, "times": 99}),
        ("PUT", "", {"cut": True, "times": 99}),
        ("POST", "objects/batch", {"status": 403}),
        ("POST", "objects/batch", {"status": 500, "times": 99}),
        ("POST", "/verify", {"status": 403}),
    ],
)
def test_what_does_not_pass_by_lfs(hub, run, method, path, fault):
    (run / "export" / "more.safetensors").write_bytes(os.urandom(3000))  # nothing that this Hub has seen already
    hub.fail(method, path, **fault)
    name = re.sub(r"\W+", "-", f"{method}-{path}-{fault}").strip("-")
    fails_and_recovers(hub, run, f"me/{name}", **WITHOUT_XET)


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/commit/", {"status": 500, "times": 2}),
        ("POST", "/commit/", {"cut": True}),
        ("POST", "/commit/", {"cut": True, "after": True}),
        ("POST", "/repos/create", {"cut": True, "after": True}),
        ("POST", "/preupload/", {"status": 503}),
        ("GET", "/whoami", {"status": 504}),
        ("GET", "/tree/", {"cut": True}),
        ("GET", "xet-write-token", {"status": 503}),
        ("POST", "/commit/", {"delay": 1.0}),
    ],
)
def test_what_passes_is_tried_again(hub, run, method, path, fault):
    repo_id = "me/" + re.sub(r"\W+", "-", f"{method}-{path}-{fault}").strip("-")
    hub.fail(method, path, **fault)
    outcome = push(hub, run, "--repo-id", repo_id)
    assert outcome.code == 0, outcome
    assert len(hub.commits(repo_id)) == 2, "one commit with everything, whatever happened"
    assert hub.files(repo_id)["README.md"] == (run / "export" / "README.md").read_bytes()
    assert not any(fault.times for fault in hub.faults), "the fault was met"


def test_a_header_that_the_hub_refuses(hub, run):
    card = run / "export" / "README.md"
    card.write_text(card.read_text().replace("pipeline_tag: image-classification", "pipeline_tag: 5"))
    before = contents(run)
    outcome = push(hub, run, "--repo-id", "me/header")
    assert outcome.code == 2, outcome
    assert "the Hub refuses the header of README.md" in outcome.err
    assert "pipeline_tag" in outcome.err
    assert contents(run) == before
    assert set(hub.files("me/header")) == {".gitattributes"}


def test_somebody_else_commits_meanwhile(hub, run):
    assert push(hub, run, "--repo-id", "me/busy").code == 0
    repo = hub.repos["models", "me/busy"]
    (run / "export" / "figures" / "gallery.png").write_bytes(b"new")
    fault = hub.fail("POST", "/commit/", status=412, message="stale")
    outcome = push(hub, run, "--repo-id", "me/busy")
    assert outcome.code == 0, outcome
    assert fault.times == 0
    assert "changed meanwhile" in outcome.out
    assert hub.files("me/busy")["figures/gallery.png"] == b"new"
    assert repo.refs["main"] == hub.commits("me/busy")[0][0]


def test_a_hub_without_xet(hub, run):
    """The client has no way back from Xet: one clear error, which says what to set."""
    hub.xet = False
    fails_and_recovers(
        hub, run, "me/no-xet", "Xet", "HF_HUB_DISABLE_XET=1", then=lambda: setattr(hub, "xet", True)
    )  # fmt: skip


def test_a_full_disk(hub, run):
    fails_and_recovers(hub, run, "me/full", "no room left", largest_file=1000)


def test_a_full_disk_when_the_card_is_written(hub, run):
    """By then the model is published; the local card is what it was, and the command goes on from there."""
    before = contents(run)
    outcome = push(hub, run, "--repo-id", "me/full-card", largest_file=1000, **WITHOUT_XET)
    assert outcome.code == 2, outcome
    assert "README.md cannot be written" in outcome.err
    assert contents(run) == before
    again = push(hub, run, "--repo-id", "me/full-card", **WITHOUT_XET)
    assert again.code == 0, again
    assert (run / "export" / "README.md").read_bytes() == hub.files("me/full-card")["README.md"]
    assert len(hub.commits("me/full-card")) == 2


def test_what_never_leaves(hub, run, tmp_path):
    export = run / "export"
    (tmp_path / "secret.txt").write_text("secret")

    def refused(*fragments: str, repo_id: str = "me/never") -> None:
        before = contents(run)
        outcome = push(hub, run, "--repo-id", repo_id)
        assert outcome.code == 2, outcome
        for fragment in fragments:
            assert fragment in outcome.err
        assert contents(run) == before
        assert hub.requests == [], "no connection is made for a folder that cannot be published"

    (export / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (export / "more").symlink_to(tmp_path)
    torch_files = [export / "optimizer.bin", export / "Old.PTH", export / "rest.pickle"]
    for file in torch_files:
        file.write_bytes(b"pickle")
    pickles = [f"{file.name} is a pickle" for file in torch_files]
    refused("5 problems", "notes.txt is a link that leads out", "more is a link", *pickles)
    for path in (export / "notes.txt", export / "more", *torch_files):
        path.unlink()
    record = export / "training_record.json"
    text = record.read_text()
    record.write_text(json.dumps(json.loads(text) | {"seconds": "many"}))
    refused("is not whole")
    record.write_text(text)
    (export / "results.json").write_text("{")
    refused("is not whole")
    (export / "results.json").unlink()
    refused("export is not whole")
    shutil.rmtree(export)
    refused("not finished")
    shutil.rmtree(run / "checkpoints")
    refused("neither a run of arrest-finetune nor its export/")
    assert ("models", "me/never") not in hub.repos


def forget_files(run):
    """As an export of an earlier version has it: which files were measured is not said."""
    path = run / "export" / "results.json"
    results = json.loads(path.read_text())
    del results["model"]["weights_files"]
    path.write_text(json.dumps(results))


@pytest.mark.parametrize("told", [True, False], ids=["measured files are known", "are not"])
def test_weights_that_are_not_what_was_measured_are_not_pushed(hub, run, told):
    weights, config = run / "export" / "model.safetensors", run / "export" / "config.json"
    whole, settings = weights.read_bytes(), config.read_text()
    if not told:
        forget_files(run)

    def refused(words):
        outcome = push(hub, run, "--repo-id", "me/swapped")
        assert outcome.code == 2, outcome
        assert words in outcome.err
        assert not hub.requests, "before any connection"

    weights.write_bytes(whole[:-4])
    refused("model.safetensors is damaged")
    weights.write_bytes(b"")
    refused("model.safetensors is damaged")
    if told:
        weights.write_bytes(whole[:-4] + b"\0\0\0\0")
        refused("model.safetensors is not what the figures in results.json are of")
    weights.write_bytes(whole)
    config.write_text("{}")
    refused("config.json names no architecture")
    config.write_text(settings)
    assert push(hub, run, "--repo-id", f"me/swapped-{told}").code == 0


def test_a_card_edited_on_the_hub_does_not_speak_of_other_weights(hub, run):
    assert push(hub, run, "--repo-id", "me/claims").code == 0
    edited = hub.files("me/claims")["README.md"] + b"\nEdited on the website.\n"
    repo = hub.repos["models", "me/claims"]
    files = hub.files("me/claims") | {"README.md": edited}
    repo.refs["main"] = hub.new_commit(repo, repo.refs["main"], "Edited", files)
    before = repo.refs["main"]
    weights = run / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    forget_files(run)
    outcome = push(hub, run, "--repo-id", "me/claims")
    assert outcome.code == 2, outcome
    assert "what it states is of other weights than these: delete it there" in outcome.err
    assert "Try again" not in outcome.err
    assert repo.refs["main"] == before


def test_another_model_is_found_before_the_training(hub, run):
    hub.create("me/taken", {"config.json": "{}", "model.safetensors": b"weights"})
    hub.create("me/form", {"README.md": "---\nlicense: mit\n---\n"})
    ours = {"training_record.json": "{}", "model.safetensors": b"weights"}
    hub.create("me/words", {"README.md": "---\nlicense: mit\n---\n# Mine\n", **ours})
    code = """
        import sys
        from arrest_hub.errors import HubRefusal
        from arrest_hub.hub import check_push
        from arrest_hub.push_config import PushConfig
        for name, options in (
            ("me/taken", {"create_pr": True}), ("me/none-yet", {}), ("me/form", {}), ("me/form", {"license": "mit"}),
            ("me/words", {}),
            ("me/taken", {}),
        ):
            try:
                check_push(PushConfig(folder="run", repo_id=name, **options).validate(), print)
                print(name, "may be pushed to")
            except HubRefusal as error:
                print(error)
    """
    outcome = start(hub, run, ["-c", textwrap.dedent(code)])
    assert outcome.code == 0, outcome
    *may, taken = outcome.out.splitlines()
    assert "me/taken holds a model that was not pushed by arrest-push" in taken
    assert "me/form states the licence mit" in may.pop(2), "whether the base has another is not known yet"
    assert "README.md of me/words was edited there" in may.pop(4)
    assert may == [f"{name} may be pushed to" for name in ("me/taken", "me/none-yet", "me/form", "me/form", "me/words")]


def test_what_no_run_wrote_is_named(hub, run):
    (run / "export" / "notes.txt").write_text("mine")
    outcome = push(hub, run, "--repo-id", "me/notes")
    assert "pushed too, though no run writes it: notes.txt" in outcome.out, outcome


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "{}", "model.safetensors": b"weights"},
        {"model.safetensors": b"weights", "preprocessor_config.json": "{}", "open_clip_config.json": "{}"},
        {"README.md": "---\nlicense: mit\n---\n", "weights/Net.PTH": b"weights"},
        {"model.onnx": b"weights"},
        {"figures/gallery.png": b"theirs"},
    ],
    ids=["transformers", "open_clip", "pickle", "onnx", "figure"],
)
def test_another_model_is_not_overwritten(hub, run, files, request):
    repo_id = f"me/mine-already-{request.node.callspec.id}"
    hub.create(repo_id, files)
    before, there = contents(run), hub.files(repo_id)
    outcome = push(hub, run, "--repo-id", repo_id)
    assert outcome.code == 2
    assert "was not pushed by arrest-push" in outcome.err
    assert "give another id, or propose the change with arrest-push --create-pr." in outcome.err
    assert hub.files(repo_id) == there
    assert contents(run) == before


def test_a_refused_push_leaves_no_branch(hub, run):
    repo = hub.create("me/branches", {"config.json": "{}", "model.safetensors": b"weights"})
    before = dict(repo.refs)
    outcome = push(hub, run, "--repo-id", "me/branches", "--revision", "dev")
    assert outcome.code == 2
    assert "was not pushed by arrest-push" in outcome.err
    assert repo.refs == before


def test_nor_is_another_network_of_ours(hub, run, published):
    before = hub.files("me/transformers-robust")
    assert published["transformers"][1].code == 0
    outcome = push(hub, run, "--repo-id", "me/transformers-robust")
    assert outcome.code == 2
    assert "holds another network, ViTForImageClassification, and this is" in outcome.err
    assert hub.files("me/transformers-robust") == before


def test_nor_is_one_for_another_threat_model(hub, run, published):
    assert published["timm"][1].code == 0
    before, config = hub.files("me/timm-robust"), run / "export" / "training_config.yaml"
    text = config.read_text()
    assert "eps: 4/255\n" in text
    config.write_text(text.replace("eps: 4/255\n", "eps: 8/255\n"))
    outcome = push(hub, run, "--repo-id", "me/timm-robust")
    assert outcome.code == 2
    assert "was trained for linf-4/255, and this one is for linf-8/255: give another id" in outcome.err
    assert hub.files("me/timm-robust") == before
    assert push(hub, run, "--repo-id", "me/timm-robust", "--create-pr").code == 0, "it can be proposed"


def test_half_a_file_is_not_pushed(hub, run):
    (run / "export" / "results.json.tmp").write_text("{")
    assert push(hub, run, "--repo-id", "me/no-halves").code == 0
    assert "results.json.tmp" not in hub.files("me/no-halves")


def test_a_model_without_a_record_is_pushed_again(hub, run):
    (run / "export" / "training_record.json").unlink()
    for _ in range(2):
        assert push(hub, run, "--repo-id", "me/no-record", "--license", "mit").code == 0
    assert "training_record.json" not in hub.files("me/no-record")


def test_a_gitignore_on_the_hub_hides_nothing_silently(hub, run):
    hub.create("me/ignoring", {".gitignore": "*.parquet\n"})
    outcome = push(hub, run, "--repo-id", "me/ignoring")
    assert outcome.code == 2
    assert "verdicts.parquet" in outcome.err
    assert ".gitignore" in outcome.err


@pytest.mark.parametrize(("license", "fragment"), [(None, "states none"), ("cc-by-nc-4.0", "sets conditions")])
def test_no_licence_is_made_up(hub, run, license, fragment):
    record = run / "export" / "training_record.json"
    data = json.loads(record.read_text())
    data["base"]["license"] = license and {"id": license, "name": None, "link": None}
    record.write_text(json.dumps(data, indent=2) + "\n")
    card = run / "export" / "README.md"
    card.unlink()
    before = contents(run)
    outcome = push(hub, run, "--repo-id", "me/licence")
    assert outcome.code == 2
    assert fragment in outcome.err
    assert "--license" in outcome.err
    assert contents(run) == before
    assert hub.requests == []
    outcome = push(hub, run, "--repo-id", f"me/licence-{license}", "--license", "cc-by-nc-4.0")
    assert outcome.code == 0, outcome
    assert "license: cc-by-nc-4.0\n" in card.read_text()
    assert push(hub, run, "--repo-id", f"me/licence-{license}").code == 0, "the card remembers it"


@pytest.mark.parametrize(
    ("token", "words", "fragment"),
    [
        (None, (), "no access token"),
        pytest.param("hf_other", (), "not your account", marks=pytest.mark.slow),
        pytest.param("hf_me", ("--private",), "is public", marks=pytest.mark.slow),
        ("hf_me", ("--model", "org/no-licence"), "--license"),
        pytest.param("hf_me", ("--eps", "8/255"), "trained for linf-4/255", marks=pytest.mark.slow),
        ("hf_me", ("--model", "test_vit", "--standard-epochs", "1", "--license", "mit"), "and this is test_vit"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_the_training(hub, folder, published, tmp_path, token, words, fragment):
    if ("models", "org/no-licence") not in hub.repos:
        files: dict[str, Any] = {path.name: path for path in (folder / "base").iterdir()}
        hub.create("org/no-licence", files)
    base = ("--model", "org/timm-base", "--output-dir", "early", "--push-to-hub", "me/timm-robust")
    outcome = arrest(hub, tmp_path / "home", "arrest-finetune", *TRAIN, *base, *words, token=token)
    assert outcome.code == 2, outcome
    assert fragment in outcome.err
    assert not (tmp_path / "early").exists()


def test_a_push_that_fails_after_the_training_leaves_a_finished_run(hub, tmp_path):
    hub.fail("POST", "/commit/", status=403, message="quota", times=9)
    outcome = arrest(
        hub, tmp_path / "home", "arrest-finetune", *TRAIN, "--model", "org/timm-base", "--output-dir", "late run",
        "--push-to-hub", "me/late", "--no-figures",
    )  # fmt: skip
    assert outcome.code == 2, outcome
    assert "quota" in outcome.err
    printed = re.search(r"Try again with: (arrest-push .+)", outcome.err)
    assert printed
    hub.faults.clear()
    again = arrest(hub, tmp_path / "home", *shlex.split(printed[1]))
    assert again.code == 0, again
    assert hub.files("me/late")["README.md"] == (tmp_path / "late run" / "export" / "README.md").read_bytes()


# ---------------------------------------------------------------------------------------------------------
# Pulling safely
# ---------------------------------------------------------------------------------------------------------

LOAD = """
import sys, arrest_hub
from test_hub_push import stay_on_loopback
from arrest_hub.errors import ArrestError
stay_on_loopback()
try:
    model = arrest_hub.load(sys.argv[1], **({"revision": sys.argv[2]} if len(sys.argv) > 2 else {}))
except ArrestError as error:
    print(type(error).__name__, error)
else:
    print("loaded", model.source.revision, model.threat_model is not None)
"""


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("xet", "model.safetensors"),
        *(
            pytest.param("lfs", name, marks=pytest.mark.slow)
            for name in ("model.safetensors", "config.json", "results.json")
        ),
    ],
)
def test_a_damaged_file_is_refused(hub, published, tmp_path, name, how):
    settings = {} if how == "xet" else WITHOUT_XET
    hub.xet = how == "xet"
    repo = hub.repos["models", "me/timm-robust"]
    home = tmp_path / "home"
    if how == "xet":  # Xet checks what it sends itself, so the copy in the cache is damaged
        assert "loaded" in start(hub, home, ["-c", LOAD, "me/timm-robust"], token=None).out
        (path,) = home.rglob(name)
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.resolve().write_bytes(damaged)
    else:
        repo.corrupt.add(name)
    refused = start(hub, home, ["-c", LOAD, "me/timm-robust"], token=None, **settings)
    repo.corrupt.clear()
    assert "HashMismatch" in refused.out, refused
    assert name in refused.out
    assert "hash" in refused.out
    again = start(hub, home, ["-c", LOAD, "me/timm-robust"], token=None, **settings)
    assert "loaded" in again.out, again


@pytest.mark.slow
def test_offline_and_by_revision(hub, published, tmp_path):
    home, repo = tmp_path / "home", hub.repos["models", "me/timm-robust"]
    commit = repo.refs["main"]
    assert f"loaded {commit} True" in start(hub, home, ["-c", LOAD, "me/timm-robust", commit], token=None).out
    assert f"loaded {commit} True" in start(hub, home, ["-c", LOAD, "me/timm-robust"], token=None).out
    fetched = hub.files_sent("me/timm-robust")
    assert fetched.count("model.safetensors") <= 1
    hub.requests.clear()
    offline = start(hub, home, ["-c", LOAD, "me/timm-robust"], token=None, HF_HUB_OFFLINE="1")
    assert f"loaded {commit} True" in offline.out, offline
    assert hub.requests == []
    assert "loaded" in start(hub, home, ["-c", LOAD, "org/timm-base"], token=None).out
    hub.requests.clear()
    other = start(hub, home, ["-c", LOAD, "org/timm-base"], token=None, HF_HUB_OFFLINE="1")
    assert "False" in other.out, "that somebody else's model has no record is known without the Hub"
    assert other.err == ""
    assert hub.requests == []
    first = hub.commits("me/timm-robust")[-1][0]
    missing = start(hub, home, ["-c", LOAD, "me/timm-robust", first], token=None)
    assert "BackboneError" in missing.out, missing
    assert "config.json" in missing.out


def main(program: str, *words: str) -> int:
    """The command as its entry point runs it, without waiting between tries."""
    from arrest_hub.command import run_cli

    stay_on_loopback()
    if program in ("arrest-push", "arrest-card"):
        from arrest_hub import push_cli

        command = push_cli.push_command if program == "arrest-push" else push_cli.card_command
        code = run_cli(command, words, resumes=False)
        assert "torch" not in sys.modules, "a push needs no torch"
        return code
    from arrest_hub import cli

    return run_cli(cli.finetune_command if program == "arrest-finetune" else cli.eval_command, words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
