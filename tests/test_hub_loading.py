"""Models and datasets loaded through the real client from a Hub on loopback.

The client reads its environment when it is imported, so what loads runs in processes of their own: a test
starts this file as `python test_hub_loading.py <name> ...`, which calls ``child_<name>``.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from forked import run_python
from hub_server import HubServer

SIZE = 8
RUN = (
    *("--epochs", "1", "--max-steps", "2", "--batch-size", "8", "--attack-steps", "1", "--eval-attack-steps", "1"),
    *("--num-workers", "0", "--validation-size", "6", "--limit-eval", "8"),
)
WEIGHTS = "model.safetensors"


# ---------------------------------------------------------------------------------------------------------
# What is served
# ---------------------------------------------------------------------------------------------------------


def write_vit(folder: Path, **saving: Any) -> Path:
    import torch
    import transformers as t

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_labels": 3,
        }
        model = t.ViTForImageClassification(t.ViTConfig(**shape, image_size=SIZE, patch_size=4))
    model.save_pretrained(folder, **saving)
    t.ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def with_pickle(folder: Path, source: Path) -> Path:
    """A copy of a model folder whose weights are a pickle."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, folder)
    (folder / WEIGHTS).unlink()
    torch.save(load_file(source / WEIGHTS), folder / "pytorch_model.bin")
    return folder


def with_other_weights(folder: Path, source: Path) -> Path:
    """A copy of a model folder that answers differently."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = {key: value * 2 if key.startswith("fc.") else value for key, value in load_file(source / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return folder


def with_files(folder: Path, source: Path, **files: str) -> Path:
    """A copy of a folder with text files added; ``__`` in a name stands for a dot."""
    shutil.copytree(source, folder)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def serve_models(hub: HubServer, root: Path) -> None:
    import timm
    import torch
    from timm.models._hub import save_for_hf
    from tiny import write_model

    tiny = write_model(root / "tiny")
    strangers = {"modeling__py": "raise SystemExit", "setup__py": "raise SystemExit", "pytorch_model__bin": "never"}
    served = with_files(root / "served", tiny, **strangers)
    hub.add("models", "org/tiny", served, ("v1.0", with_other_weights(root / "tiny-v1", tiny)))
    vit = write_vit(root / "vit")
    hub.add("models", "org/vit", with_files(root / "served-vit", vit, **strangers, tf_model__h5="never"))
    hub.add("models", "org/shards", write_vit(root / "shards", max_shard_size="5KB"))
    hub.add("models", "org/pickle", with_pickle(root / "pickle", tiny))
    hub.add("models", "org/vit-pickle", with_pickle(root / "vit-pickle", vit))
    hub.add("models", "org/gated", tiny, gated=True, readers={"friend"})
    hub.add("models", "org/private", tiny, private=True, readers={"friend"})
    hub.add("models", "org/busy", tiny, fault="busy")
    hub.add("models", "org/cut", tiny, fault="cut")
    (root / "no-config").mkdir()
    shutil.copy(tiny / WEIGHTS, root / "no-config")
    hub.add("models", "org/no-config", root / "no-config")
    auto_map = json.loads((vit / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling.Evil"}}
    hub.add("models", "org/code", with_files(root / "code", vit, config__json=json.dumps(auto_map), **strangers))
    with torch.random.fork_rng():
        registered = timm.create_model("test_resnet")
    save_for_hf(registered, str(root / "registered"), safe_serialization=True)
    hub.add("models", "timm/test_resnet.r160_in1k", root / "registered")


def serve_datasets(hub: HubServer, root: Path) -> None:
    from tiny import write_images

    data = write_images(root / "data")
    older = write_images(root / "older", count=30)
    served = with_files(root / "served-data", data, helpers__py="raise SystemExit", setup__py="raise SystemExit")
    hub.add("datasets", "org/data", served, ("v1.0", older))
    configs = root / "configs"
    for name, source in (("small", older), ("big", data)):
        shutil.copytree(source, configs / name)
    card = "---\nconfigs:\n- config_name: big\n  data_dir: big\n- config_name: small\n  data_dir: small\n---\n"
    (configs / "README.md").write_text(card)
    hub.add("datasets", "org/configs", configs)
    hub.add("datasets", "org/gated", data, gated=True, readers={"friend"})
    hub.add("datasets", "org/private", data, private=True, readers={"friend"})
    hub.add("datasets", "org/busy", data, fault="busy")
    hub.add("datasets", "org/cut", data, fault="cut")
    hub.add(
        "datasets",
        "org/script",
        with_files(root / "script", data, script__py="raise SystemExit"),
        ("refs/convert/parquet", older),
    )
    (root / "no-data").mkdir()
    (root / "no-data" / "README.md").write_text("nothing here\n")
    hub.add("datasets", "org/no-data", root / "no-data")


def serve_evaluations(hub: HubServer, root: Path) -> None:
    """Datasets of three splits whose test split is unlabelled; what is known of them lies where it may lie."""
    import pyarrow.parquet as pq
    from tiny import NAMES, write_images

    source = write_images(root / "three", splits=("train", "validation", "test"))
    test = source / "test-00000-of-00001.parquet"
    table = pq.read_table(test)
    label = table.schema.get_field_index("label")
    hidden = [[-1] * table.num_rows]
    pq.write_table(table.set_column(label, table.schema.field(label), hidden), test)
    hub.add("datasets", "ILSVRC/imagenet-1k", source)
    # the classes are in the card alone
    bare = shutil.copytree(source, root / "bare")
    for file in bare.glob("*.parquet"):
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    names = "".join(f"          '{i}': {name}\n" for i, name in enumerate(NAMES))
    sizes = "".join(f"  - name: {split}\n    num_examples: 48\n" for split in ("train", "validation", "test"))
    card = "---\ndataset_info:\n  features:\n  - name: img\n    dtype: image\n  - name: label\n    dtype:\n"
    card += f"      class_label:\n        names:\n{names}  splits:\n{sizes}---\n"
    card_only = with_files(root / "card", bare, README__md=card)
    hub.add("datasets", "org/card", card_only)
    # of a size that no disk holds
    vast = {
        "features": {"img": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}},
        "splits": {split: {"name": split, "num_examples": 48} for split in ("train", "validation", "test")},
        "size_in_bytes": 1 << 60,
    }
    infos = json.dumps({"default": vast})
    hub.add("datasets", "org/vast", with_files(root / "vast", bare, dataset_infos__json=infos))
    # numbers without class names, whose number only the train split tells
    hub.add("datasets", "org/numbers", bare)
    wrong = with_files(root / "wrong", bare, README__md=card.replace("48", "47"))
    hub.add("datasets", "org/wrong-size", wrong)
    hub.add("datasets", "org/train-only", write_images(root / "train-only", splits=("train",)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.tokens = {"hf_friend": "friend", "hf_stranger": "stranger"}
        serve_models(hub, root)
        serve_datasets(hub, root)
        serve_evaluations(hub, root)
        yield hub


@pytest.fixture
def hub(served: HubServer) -> Iterator[HubServer]:
    """The Hub, on which nothing is ever changed, whose code is never fetched and whose storage never sees a token."""
    served.requests.clear()
    yield served
    assert served.errors == []
    for request in served.requests:
        assert request.method in ("GET", "HEAD") or (request.method == "POST" and "/paths-info/" in request.path)
        assert request.method == "HEAD" or not request.path.endswith(".py")
        if "/storage/" in request.path:
            assert request.headers["host"].startswith("localhost")
            assert "authorization" not in request.headers


def environment(url: str, home: Path, **variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    return kept | {
        "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
    } | variables  # fmt: skip


def run_child(name: str, *arguments: Any, url: str, home: Path, **variables: str) -> str:
    """Run ``child_<name>(*arguments)`` in a process whose client talks to ``url``; its standard output."""
    words = [__file__, name, *map(str, arguments)]
    result = run_python(words, env=environment(url, home, **variables), cwd=home.parent, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# ---------------------------------------------------------------------------------------------------------
# What runs in the other processes
# ---------------------------------------------------------------------------------------------------------


def stay_on_loopback() -> None:
    """No address but this machine's is looked up, and no retry waits."""
    import time

    look_up = socket.getaddrinfo

    def local_only(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", b"127.0.0.1", b"localhost"):
            raise socket.gaierror(socket.EAI_NONAME, f"{host} is not on loopback")
        return look_up(host, *args, **kwargs)

    socket.getaddrinfo = local_only
    time.sleep = lambda _seconds: None


def fails(load: Any, model_or_dataset: str, error: type[Exception], *fragments: str, **options: Any) -> None:
    with pytest.raises(error) as caught:
        load(model_or_dataset, **options)
    message = str(caught.value)
    print(f"{model_or_dataset}: {type(caught.value).__name__}: {message}")
    assert type(caught.value) is error
    assert "\n" not in message
    assert len(message) < 500, message
    for fragment in fragments:
        assert fragment in message, message


def same_logits(one: Any, other: Any) -> None:
    import torch

    pixels = torch.rand(2, 3, *other.preprocessing.size)
    with torch.no_grad():
        assert torch.equal(one(pixels).logits, other(pixels).logits)
    assert one.label_names == other.label_names


def child_models(root: Path, commits: dict[str, str]) -> None:
    from arrest_hub.backbones import load_backbone

    for model_id, folder, library in (
        ("org/tiny", "tiny", "timm"),
        ("org/tiny@v1.0", "tiny-v1", "timm"),
        ("org/tiny@" + commits["org/tiny@v1.0"], "tiny-v1", "timm"),
        ("org/vit", "vit", "transformers"),
        ("org/shards", "shards", "transformers"),
        ("timm/test_resnet.r160_in1k", "registered", "timm"),
        ("timm/test_resnet", "registered", "timm"),
    ):
        backbone = load_backbone(model_id)
        source = backbone.source
        hub_id, _, revision = model_id.partition("@")
        hub_id = "timm/test_resnet.r160_in1k" if hub_id == "timm/test_resnet" else hub_id
        commit = revision if len(revision) == 40 else commits[f"{hub_id}@{revision or 'main'}"]
        assert (source.model_id, source.hub_id, source.revision) == (model_id, hub_id, commit)
        assert (source.library, source.pretrained) == (library, True)
        same_logits(backbone, load_backbone(root / folder))
    same_logits(load_backbone("org/tiny", revision="v1.0"), load_backbone(root / "tiny-v1"))
    assert load_backbone("org/tiny", pretrained=False).source.revision == commits["org/tiny@main"]
    unusable_models(root)


def unusable_models(root: Path) -> None:
    from arrest_hub.backbones import load_backbone
    from arrest_hub.errors import BackboneError, HubError

    for model_id in ("org/pickle", "org/vit-pickle"):
        fails(load_backbone, model_id, BackboneError, "--allow-pickle", model_id)
        assert not list(Path(os.environ["HF_HOME"]).rglob("*.bin"))
    for model_id, folder in (("org/pickle", "pickle"), ("org/vit-pickle", "vit-pickle")):
        same_logits(load_backbone(model_id, allow_pickle=True), load_backbone(root / folder, allow_pickle=True))
    fails(load_backbone, "org/missing", HubError, "'org/missing' was not found", "hf auth login")
    fails(load_backbone, "org/private", HubError, "'org/private' was not found", "hf auth login")
    fails(load_backbone, "org/tiny@v9", HubError, "no such revision", "@main")
    fails(load_backbone, "org/tiny@" + "0" * 40, HubError, "no such revision")
    fails(load_backbone, "org/gated", HubError, "is gated", "hf auth login")
    fails(load_backbone, "org/no-config", BackboneError, "has no config.json")
    fails(load_backbone, "org/code", BackboneError, "auto_map")
    fails(load_backbone, "org/busy", HubError, "org/busy")
    fails(load_backbone, "org/cut", HubError, "org/cut")
    os.environ["HF_TOKEN"] = "hf_stranger"
    fails(load_backbone, "org/gated", HubError, "is gated")
    fails(load_backbone, "org/private", HubError, "was not found")
    fails(load_backbone, "org/missing", HubError, "was not found")
    os.environ["HF_TOKEN"] = "hf_expired"
    fails(load_backbone, "org/gated", HubError, "token", "hf auth login")
    os.environ["HF_TOKEN"] = "hf_friend"
    for model_id in ("org/gated", "org/private"):
        same_logits(load_backbone(model_id), load_backbone(root / "tiny"))


def child_datasets(commits: dict[str, str]) -> None:
    from arrest_hub.errors import DataError, HubError
    from arrest_hub.splits import load_splits

    for dataset_id, images, ref in (
        ("org/data", 48, "org/data@main"),
        ("org/data@v1.0", 30, "org/data@v1.0"),
        ("org/data@" + commits["org/data@v1.0"], 30, "org/data@v1.0"),
        ("org/configs:small", 30, "org/configs@main"),
        ("org/script@refs/convert/parquet", 30, "org/script@refs/convert/parquet"),
        ("org/configs:big@main", 48, "org/configs@main"),
    ):
        splits = load_splits(dataset_id, validation_size=0)
        assert (splits.train.num_examples, splits.test.num_examples) == (images, images)
        assert splits.class_names == ["dark", "middle", "light"]
        hub_id = re.split("[:@]", dataset_id)[0]
        assert (splits.dataset_id, splits.hub_id, splits.revision) == (dataset_id, hub_id, commits[ref]), splits
    for dataset_id, images in (("org/data", 48), ("org/data@v1.0", 30)):
        splits = load_splits(dataset_id, streaming=True, validation_size=0)
        assert splits.train.streaming
        assert splits.revision == commits[dataset_id if "@" in dataset_id else f"{dataset_id}@main"]
        assert sum(1 for _ in splits.train.dataset) == images
    fails(load_splits, "org/configs", DataError, "org/configs", "small", "big")
    fails(load_splits, "org/configs:huge", DataError, "huge", "small")
    fails(load_splits, "org/no-data", DataError, "org/no-data")
    fails(load_splits, "org/script", DataError, "script.py", "refs/convert/parquet")
    for streaming in (False, True):
        fails(load_splits, "org/missing", HubError, "'org/missing' was not found", streaming=streaming)
        fails(load_splits, "org/gated", HubError, "is gated", "hf auth login", streaming=streaming)
        fails(load_splits, "org/data@v9", HubError, "no such revision", streaming=streaming)
    fails(load_splits, "org/private", HubError, "was not found", "hf auth login")
    fails(load_splits, "org/busy", HubError, "org/busy")
    fails(load_splits, "org/cut", HubError, "org/cut")
    os.environ["HF_TOKEN"] = "hf_expired"
    fails(load_splits, "org/no-data", HubError, "token", "hf auth login")
    # `datasets` falls back on its newest copy, which is of another revision than what is asked for
    fails(load_splits, "org/data", HubError, "another", "org/data@" + commits["org/data@v1.0"])
    os.environ["HF_TOKEN"] = "hf_friend"
    for dataset_id in ("org/gated", "org/private"):
        assert load_splits(dataset_id).revision == commits[f"{dataset_id}@main"]


def child_eval_split(commits: dict[str, str]) -> None:
    """First the evaluation, of which the parent looks up what was fetched."""
    from arrest_hub.errors import DataError, HubError
    from arrest_hub.splits import load_eval_split

    for dataset_id, ref, name, images in (
        ("org/data", "org/data@main", "test", 48),
        ("org/data@v1.0", "org/data@v1.0", "test", 30),
        ("org/configs:small", "org/configs@main", "test", 30),
        ("org/card", "org/card@main", "validation", 48),
        ("org/vast", "org/vast@main", "validation", 48),
        ("imagenet", "ILSVRC/imagenet-1k@main", "validation", 48),
    ):
        data = load_eval_split(dataset_id)
        assert (data.split.name, len(data.split), data.class_names) == (name, images, ["dark", "middle", "light"])
        hub_id = ref.partition("@")[0]
        assert (data.dataset_id, data.hub_id, data.revision) == (dataset_id, hub_id, commits[ref])
        assert not any("every split" in note for note in data.notes), data.notes
    for dataset_id, why in (("org/numbers", "'label'"), ("org/train-only", "held out of 'train'")):
        data = load_eval_split(dataset_id)
        assert any("every split" in note and why in note for note in data.notes), data.notes
    fails(load_eval_split, "org/wrong-size", DataError, "org/wrong-size")
    fails(load_eval_split, "org/missing", HubError, "'org/missing' was not found", "hf auth login")
    fails(load_eval_split, "org/gated", HubError, "is gated", "hf auth login")
    fails(load_eval_split, "org/data@v9", HubError, "no such revision")
    fails(load_eval_split, "org/private", HubError, "was not found", "hf auth login")
    fails(load_eval_split, "org/busy", HubError, "org/busy")
    fails(load_eval_split, "org/cut", HubError, "org/cut")
    fails(load_eval_split, "org/configs", DataError, "org/configs", "small", "big")
    fails(load_eval_split, "org/no-data", DataError, "org/no-data")
    fails(load_eval_split, "org/script", DataError, "script.py", "refs/convert/parquet")
    fails(load_eval_split, "org/data", DataError, "no split 'tset'", "train, test", eval_split="tset")


def child_without_the_train_split() -> None:
    """Without the Hub: what was evaluated can be evaluated again; of the rest there is no copy."""
    from arrest_hub.errors import HubError
    from arrest_hub.splits import load_eval_split, load_splits

    for dataset_id, images in (("org/data", 48), ("org/data@v1.0", 30), ("org/configs:small", 30), ("imagenet", 48)):
        data = load_eval_split(dataset_id)
        assert (len(data.split), len(data.revision)) == (images, 40)
    assert load_eval_split("org/numbers").num_classes == 3
    fails(load_splits, "org/data", HubError, "cannot be reached", "HF_HUB_OFFLINE")
    fails(load_eval_split, "org/data", HubError, "cannot be reached", eval_split="train")
    fails(load_eval_split, "org/configs:big", HubError, "cannot be reached")
    fails(load_eval_split, "org/private", HubError, "cannot be reached")


def child_after_eval_split() -> None:
    """Then a run in the same cache has every split, and the evaluation was of its test split."""
    from arrest_hub.splits import load_eval_split, load_splits

    for dataset_id in ("org/data", "org/data@v1.0", "org/configs:small", "org/card", "imagenet", "org/numbers"):
        for limit in (None, 7):
            data = load_eval_split(dataset_id, limit_eval=limit, seed=3)
            splits = load_splits(dataset_id, limit_eval=limit, seed=3, validation_size=0)
            assert data.split.dataset[:] == splits.test.dataset[:]
            assert data.split.labels() == splits.test.labels()
            assert data.split.row_array().tolist() == splits.test.row_array().tolist()
            assert (data.class_names, data.num_classes) == (splits.class_names, splits.num_classes)
            assert (data.split.name, data.revision) == (splits.test.name, splits.revision)
            assert len(splits.train) in (30, 48)


def child_another_copy(commits: dict[str, str]) -> None:
    """Without the Hub, with a whole copy of one revision: it serves for that revision and no other."""
    from arrest_hub.errors import HubError
    from arrest_hub.splits import load_eval_split

    assert len(load_eval_split("org/data").split) == 48
    assert load_eval_split("org/data", eval_split="train").revision == commits["org/data@main"]
    fails(load_eval_split, "org/data@v1.0", HubError, "another", "HF_HUB_OFFLINE")


def command(*words: str) -> tuple[int, str, str]:
    """arrest-finetune in this process -> exit code, standard output, standard error."""
    from arrest_hub.cli import finetune_command
    from arrest_hub.command import run_cli

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run_cli(finetune_command, [*RUN, *words])
    return code, out.getvalue(), err.getvalue()


def command_fails(run: Path, fragment: str, *words: str) -> None:
    code, out, err = command("--output-dir", str(run), *words)
    print(err)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert "Traceback" not in out + err
    assert not run.exists()


def child_command_line(folder: Path, commits: dict[str, str]) -> None:
    run = folder / "failed"
    for model, fragment in (
        ("org/missing", "not found"),
        ("org/private", "not found"),
        ("org/tiny@v9", "no such revision"),
        ("org/gated", "is gated"),
        ("org/no-config", "no config.json"),
        ("org/pickle", "--allow-pickle"),
        ("org/busy", "503"),
        ("timm/test_resnett", "timm/test_resnet"),
    ):
        command_fails(run, fragment, "--model", model, "--dataset", "digits")
    for dataset, fragment in (
        ("org/missing", "not found"),
        ("org/gated", "is gated"),
        ("org/data@v9", "no such revision"),
        ("org/configs", "small"),
        ("org/script", "script.py"),
    ):
        command_fails(run, fragment, "--model", "org/tiny", "--dataset", dataset)
        command_fails(run, fragment, "--model", "org/tiny", "--dataset", dataset, "--streaming")
    code, out, err = command(
        *("--model", "org/tiny@v1.0", "--dataset", "org/data@v1.0", "--streaming"),
        *("--output-dir", str(folder / "stream")),
    )
    assert code == 0, err
    assert commits["org/tiny@v1.0"][:12] in out


def child_without_the_hub(root: Path, folder: Path, models: dict[str, str], datasets: dict[str, str]) -> None:
    from arrest_hub.backbones import load_backbone
    from arrest_hub.errors import HubError
    from arrest_hub.splits import load_splits

    backbone = load_backbone("org/tiny")
    assert backbone.source.revision == models["org/tiny@main"]
    same_logits(backbone, load_backbone(root / "tiny"))
    for streaming in (False, True):
        splits = load_splits("org/data", validation_size=0, streaming=streaming)
        assert splits.revision == datasets["org/data@main"]
    for model_id in ("org/vit", "org/tiny@v1.0", "timm/test_resnet"):
        fails(load_backbone, model_id, HubError, "cannot be reached", "HF_HUB_OFFLINE")
    fails(load_splits, "org/configs:big", HubError, "cannot be reached", "HF_HUB_OFFLINE")
    fails(load_splits, "org/data@v1.0", HubError, "another", "HF_HUB_OFFLINE")
    command_fails(folder / "failed", "cannot be reached", "--model", "org/vit", "--dataset", "org/data")
    command_fails(folder / "failed", "cannot be reached", "--model", "org/tiny", "--dataset", "org/configs:big")


# ---------------------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------------------


def commits(hub: HubServer, kind: str) -> str:
    """Every "repository@branch or tag" with its commit, as an argument of a child."""
    known = [repo for (of_kind, _), repo in hub.repos.items() if of_kind == kind]
    return json.dumps({f"{repo.repo_id}@{ref}": commit for repo in known for ref, commit in repo.refs.items()})


def test_models(hub, root, tmp_path):
    run_child("models", root, commits(hub, "models"), url=hub.url, home=tmp_path / "home")
    assert hub.files_sent("org/tiny").count(WEIGHTS) == 2, "two commits, each fetched once"
    assert set(hub.files_sent("org/tiny")) == {WEIGHTS, "config.json"}
    assert set(hub.files_sent("org/vit")) == {WEIGHTS, "config.json", "preprocessor_config.json"}
    assert len([name for name in hub.files_sent("org/shards") if name.startswith("model-")]) > 1
    for repo_id in ("org/pickle", "org/vit-pickle"):
        assert hub.files_sent(repo_id).count("pytorch_model.bin") == 1, "only when allowed"
    assert hub.files_sent("org/no-config") == []
    assert hub.files_sent("org/code") == ["config.json"]


def test_datasets(hub, tmp_path):
    run_child("datasets", commits(hub, "datasets"), url=hub.url, home=tmp_path / "home")
    ranges = [request for request in hub.requests if request.status == 206 and "/datasets/org/data/" in request.path]
    assert all(request.headers["range"].startswith("bytes=") for request in ranges)
    assert ranges, "a stream reads parts of files"


@pytest.mark.slow
def test_an_evaluation_fetches_one_split(hub, tmp_path):
    known, home = commits(hub, "datasets"), tmp_path / "home"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    def fetched(repo_id: str) -> list[str]:
        return [name for name in hub.files_sent(repo_id) if name.endswith(".parquet")]

    run_child("eval_split", known, url=hub.url, home=home)
    test, validation, train = (f"{split}-00000-of-00001.parquet" for split in ("test", "validation", "train"))
    assert fetched("org/data") == [test, test], "two revisions"
    assert fetched("org/configs") == [f"small/{test}"]
    assert fetched("ILSVRC/imagenet-1k") == [validation], "named as the test split: the other is not tried"
    assert sorted(fetched("org/card")) == sorted(fetched("org/vast")) == [test, validation], "test has no labels"
    assert train in fetched("org/numbers")
    assert fetched("org/train-only") == [train]
    hub.requests.clear()
    run_child("without_the_train_split", url=hub.url, home=home, **offline)
    assert hub.requests == []
    run_child("after_eval_split", url=hub.url, home=home)
    assert fetched("ILSVRC/imagenet-1k").count(validation) == 0, "it was there already"
    assert fetched("org/data") == [train, train]


def test_an_evaluation_with_the_copy_of_a_run(hub, trained, tmp_path):
    home = shutil.copytree(trained[0] / "home", tmp_path / "home", symlinks=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run_child("another_copy", commits(hub, "datasets"), url=hub.url, home=home, **offline)
    assert hub.requests == []


def test_the_command_line(hub, tmp_path):
    run_child("command_line", tmp_path, commits(hub, "models"), url=hub.url, home=tmp_path / "home")


@pytest.fixture(scope="module")
def trained(served, tmp_path_factory) -> tuple[Path, str]:
    """A run from beginning to end, by the command that users type -> its folder, what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    words = ("--model", "org/tiny", "--dataset", "org/data", "--output-dir", str(folder / "run"), *RUN)
    command = ["-m", "arrest_hub", "finetune", *words]
    result = run_python(command, env=environment(served.url, folder / "home"), cwd=folder, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


def test_end_to_end(hub, trained):
    folder, printed = trained
    commit = hub.repos["models", "org/tiny"].refs["main"]
    assert f"org/tiny @ {commit[:12]} (timm resnet18_cifar" in printed
    assert "42 training, 6 validation, 8 test images" in printed
    assert {WEIGHTS, "config.json", "results.json", "README.md"} <= set(os.listdir(folder / "run" / "export"))


def test_arrest_eval_from_the_hub(hub, trained, tmp_path):
    """Model and dataset by id; then the folder a run exported, whose teacher is found at its commit on the Hub."""
    export = shutil.copytree(trained[0] / "run" / "export", tmp_path / "export")
    commit = hub.repos["models", "org/tiny"].refs["main"]
    home = trained[0] / "home"
    quick = ("--attacks", "pgd-2", "--no-checks", "--num-workers", "0")
    for model, dataset, expected in (
        ("org/tiny", "imagenet", f"org/tiny @ {commit[:12]} (resnet18_cifar"),
        (str(export), "org/data", f"teacher     org/tiny@{commit}"),
    ):
        command = ["-m", "arrest_hub", "eval", model, "--dataset", dataset, *quick]
        result = run_python(command, env=environment(hub.url, home), cwd=tmp_path, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        assert expected in result.stdout
    records = {path.name for path in (tmp_path / "evals").iterdir()}
    assert records == {"tiny-imagenet-linf-8_255", f"{tmp_path.name}-data-linf-8_255"}


@pytest.mark.parametrize("how", ["offline", "down"])
def test_without_the_hub(how, hub, root, trained, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(trained[0] / "home", home, symlinks=True)
    url, variables = hub.url, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if how == "down":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url, variables = f"http://127.0.0.1:{free.getsockname()[1]}", {}
    known = (commits(hub, "models"), commits(hub, "datasets"))
    run_child("without_the_hub", root, tmp_path, *known, url=url, home=home, **variables)
    assert hub.requests == []


if __name__ == "__main__":
    stay_on_loopback()
    values = [json.loads(word) if word.startswith("{") else Path(word) for word in sys.argv[2:]]
    globals()[f"child_{sys.argv[1]}"](*values)
