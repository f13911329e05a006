"""Exported folders: what plain timm and transformers make of them, and how they are written."""

import json
import os
from pathlib import Path

import pytest
import torch
from forked import run_python
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_backbones import TIMM, timm_backbone, transformers_folder

from arrest_hub import export
from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.export import weights_digest, write_model_folder

PLAIN_TIMM = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
"""
PLAIN_TRANSFORMERS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
AutoImageProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
assert model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}, model.config.id2label
assert model.config.label2id == {"cat": 0, "dog": 1, "eel": 2}
"""
RUN = """
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["x"])
save_file({"logits": getattr(logits, "logits", logits)}, sys.argv[3])
assert "arrest_hub" not in sys.modules
"""


def trained(backbone: Backbone) -> Backbone:
    """As after finetuning: a new head, other weights, other running statistics."""
    backbone.reset_head(["cat", "dog", "eel"])
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    backbone.train()(torch.rand(4, 3, *backbone.preprocessing.size))
    return backbone.eval()


def small(library: str, folder: Path) -> Backbone:
    """A network of either library; ``folder`` is for transformers' to be loaded from."""
    return timm_backbone("resnet18") if library == "timm" else load_backbone(transformers_folder("vit", folder))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("resnet18", PLAIN_TIMM),
        pytest.param("vit_tiny_patch16_224", PLAIN_TIMM, marks=pytest.mark.slow),
        ("hf-vit", PLAIN_TRANSFORMERS),
    ],
)
def test_the_plain_library_gives_the_same_logits(name, code, tmp_path):
    if name == "hf-vit":
        backbone = load_backbone(transformers_folder("vit", tmp_path / "source"))
    else:
        backbone = timm_backbone(name)
    trained(backbone)
    write_model_folder(backbone, tmp_path / "export")
    pixels = torch.rand(2, 3, *backbone.preprocessing.size)
    save_file({"x": backbone.normalize(pixels)}, tmp_path / "x.safetensors")
    arguments = [str(tmp_path / file) for file in ("export", "x.safetensors", "logits.safetensors")]
    run_python(["-c", code + RUN, *arguments], cwd=tmp_path, env=dict(os.environ), timeout=120).check_returncode()
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, backbone(pixels).logits.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*TIMM, "hf-vit", "hf-convnext", "hf-resnet", "hf-siglip", "hf-deit_distilled"])
def test_round_trip(name, tmp_path):
    torch.manual_seed(0)
    if name.startswith("hf-"):
        backbone = load_backbone(transformers_folder(name[3:], tmp_path / "source"))
    else:
        backbone = timm_backbone(name)
    trained(backbone)
    write_model_folder(backbone, tmp_path / "export")
    again = load_backbone(tmp_path / "export")
    assert again.label_names == ["cat", "dog", "eel"]
    assert again.preprocessing == backbone.preprocessing
    assert again.source.architecture == backbone.source.architecture
    pixels = torch.rand(2, 3, *backbone.preprocessing.size)
    for mine, theirs in zip(again(pixels), backbone(pixels), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert files == {"config.json", "model.safetensors"} | (
        {"preprocessor_config.json"} if name.startswith("hf-") else set()
    )


def test_image_size_labels_and_arguments_are_recorded(tmp_path):
    write_model_folder(timm_backbone("resnet18", image_size=40), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_args"]["channels"] == [8, 8, 8, 16]
    assert config["pretrained_cfg"]["input_size"] == [3, 40, 40]
    assert config["num_classes"] == 5
    assert "label_names" not in config
    assert not {"file", "source", "state_dict", "hf_hub_id"} & set(config["pretrained_cfg"])
    named = load_backbone(tmp_path / "a")
    assert named.label_names is None
    named.reset_head(["x", "y"])
    write_model_folder(named, tmp_path / "b")
    unnamed = load_backbone(tmp_path / "b")
    assert unnamed.label_names == ["x", "y"]
    unnamed.reset_head(2)  # as many classes, but not the same
    write_model_folder(unnamed, tmp_path / "c")
    assert load_backbone(tmp_path / "c").label_names is None
    convnext = load_backbone(transformers_folder("convnext", tmp_path / "source"), image_size=64)
    write_model_folder(convnext, tmp_path / "d")
    assert load_backbone(tmp_path / "d").preprocessing == convnext.preprocessing


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_same_weights_same_bytes_in_float32(library, tmp_path):
    backbone = small(library, tmp_path / "source")
    write_model_folder(backbone, tmp_path / "a")
    write_model_folder(load_backbone(tmp_path / "a"), tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    backbone.half()
    write_model_folder(backbone, tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    assert load_backbone(tmp_path / "half").num_classes == 5


def test_large_weights_of_transformers_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "10KB")
    backbone = load_backbone(transformers_folder("vit", tmp_path / "source"))
    write_model_folder(backbone, tmp_path / "export")
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    shards = {path.name for path in (tmp_path / "export").glob("*.safetensors")}
    assert len(shards) > 1
    assert shards == set(index["weight_map"].values())
    pixels = torch.rand(1, 3, *backbone.preprocessing.size)
    torch.testing.assert_close(load_backbone(tmp_path / "export")(pixels).logits, backbone(pixels).logits)


def test_shared_and_non_contiguous_tensors(tmp_path):
    backbone = timm_backbone("resnet18_cifar")
    blocks = backbone.body.layer1
    blocks[1].conv2.weight = blocks[1].conv1.weight  # one tensor under two names
    backbone.body.to(memory_format=torch.channels_last)
    write_model_folder(backbone, tmp_path / "export")
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(load_backbone(tmp_path / "export")(pixels).logits, backbone(pixels).logits)


def test_exporting_leaves_the_backbone_usable(tmp_path):
    backbone = timm_backbone("deit_tiny_distilled_patch16_224").train()
    pixels = torch.rand(2, 3, 32, 32)
    parameters = list(backbone.parameters())
    before = backbone(pixels).logits
    write_model_folder(backbone, tmp_path / "export")
    assert backbone.training
    assert all(a is b for a, b in zip(parameters, backbone.parameters(), strict=True))
    torch.testing.assert_close(backbone(pixels).logits, before)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    folder: Path = tmp_path / "export"
    backbone = timm_backbone("resnet18")
    write_model_folder(backbone, folder)
    (folder / "results.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        with pytest.raises(OSError, match="no space"):
            write_model_folder(backbone, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert backbone(torch.rand(1, 3, 32, 32)).logits.shape == (1, 5)
    write_model_folder(backbone, folder)  # results of other weights go with them
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_a_full_disk_is_an_error_of_the_system_and_names_the_folder(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_model_folder(load_backbone("test_resnet"), tmp_path / "model")
    assert caught.value.filename == str(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_classes_of_what_is_trained_exclude_each_other(tmp_path):
    """transformers' pipeline makes probabilities by `problem_type`: sigmoids where it says multi-label."""
    folder = transformers_folder("vit", tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    write_model_folder(trained(load_backbone(folder)), tmp_path / "export")
    assert "problem_type" not in json.loads((tmp_path / "export" / "config.json").read_text())  # softmax


def test_a_model_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A rename may outrun the contents, and a folder's name says that it is whole."""
    flushed = []
    monkeypatch.setattr(
        export, "flush_to_disk", lambda folder: flushed.append(sorted(f.name for f in folder.iterdir()))
    )
    write_model_folder(timm_backbone("resnet18"), tmp_path / "export")
    assert flushed == [["config.json", "model.safetensors"]]


class SaysMore(torch.nn.Linear):
    """A module whose state is not all tensors."""

    scale = 1

    def get_extra_state(self):
        return {"scale": self.scale}


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_whoever_reads_the_configuration_may_read_the_weights(library, tmp_path):
    backbone = small(library, tmp_path / "source")
    write_model_folder(backbone, tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_digest_is_of_state_that_is_no_tensor_too():
    module = SaysMore(2, 2)
    before = weights_digest(module)
    assert weights_digest(module) == before
    module.scale = 2
    assert weights_digest(module) != before
