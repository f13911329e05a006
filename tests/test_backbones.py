"""Model id -> Backbone: every family of architectures, and every way a model can be unusable."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forked import run_python
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from arrest_hub import backbones, model_source, networks
from arrest_hub.attacks import frozen_eval
from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.errors import BackboneError, HubError
from arrest_hub.export import write_model_folder
from arrest_hub.transforms import Preprocessing

VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32}
TIMM = {
    "resnet18": {"channels": (8, 8, 8, 16)},
    "resnext50_32x4d": {"layers": (1, 1, 1, 1), "cardinality": 2},
    "wide_resnet50_2": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 4
    },
    "maxvit_pico_rw_256": {
        "embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": (4, 8), "img_size": 64
    },
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1, "embed_dim": 32, "num_heads": 2},
    "resnetv2_18": {"channels": (8, 8, 8, 16)},
    "levit_128s": {"img_size": 64, "embed_dim": (16, 16, 16), "depth": (1, 1, 1)},
    "resnet18_cifar": {"channels": (4, 8, 8, 16)},
    "wide_resnet28_10_cifar": {"depth": 10, "width": 1},
}  # fmt: skip
SIZE = {"maxvit_pico_rw_256": 64, "eva02_tiny_patch14_224": 28, "levit_128s": 64}


def timm_backbone(name: str, **kwargs) -> Backbone:
    args = {"num_classes": 5, "image_size": SIZE.get(name, 32), **kwargs}
    return load_backbone(name, model_args=TIMM[name], **args)


def transformers_folder(family: str, folder: Path, **config_kwargs) -> Path:
    """A small random transformers classifier with its image processor, as save_pretrained writes them."""
    import transformers as t

    labels = {"num_labels": 5} if "id2label" not in config_kwargs else {}
    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    size, patch = {"image_size": 32}, {"patch_size": 8}
    stages = {"depths": [1, 1], "hidden_sizes": [8, 16]}
    configs = {
        "vit": lambda **k: t.ViTConfig(**vit, **size, **patch, **k),
        "swin": lambda **k: t.SwinConfig(
            **size, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, **k
        ),
        "convnext": lambda **k: t.ConvNextConfig(**stages, num_stages=2, **k),
        "resnet": lambda **k: t.ResNetConfig(**stages, embedding_size=8, layer_type="basic", **k),
        "beit": lambda **k: t.BeitConfig(**vit, **size, **patch, **k),
        "dinov2": lambda **k: t.Dinov2Config(**(vit | {"mlp_ratio": 1}), **size, **patch, **k),
        "siglip": lambda **k: t.SiglipConfig(vision_config=vit | size | patch, **k),
        "deit_distilled": lambda **k: t.DeiTConfig(**vit, **size, **patch, **k),
    }
    config = configs[family](**(labels | config_kwargs))
    if family == "deit_distilled":
        model = t.DeiTForImageClassificationWithTeacher(config)
    else:
        model = t.AutoModelForImageClassification.from_config(config)
    if family == "convnext":
        processor = t.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)
    else:
        processor = t.ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


TRANSFORMERS = ["vit", "swin", "convnext", "resnet", "beit", "dinov2", "siglip", "deit_distilled"]


@pytest.fixture(params=[f"timm:{n}" for n in TIMM] + [f"transformers:{n}" for n in TRANSFORMERS])
def family(request, tmp_path) -> Backbone:
    library, name = request.param.split(":")
    torch.manual_seed(0)
    if library == "timm":
        return timm_backbone(name)
    return load_backbone(transformers_folder(name, tmp_path / name))


def test_every_family(family):
    pixels = torch.rand(2, 3, *family.preprocessing.size, requires_grad=True)
    passes = []
    family.body.register_forward_hook(lambda *_: passes.append(1))
    family.eval()
    out = family(pixels)
    assert len(passes) == 1
    assert out.logits.shape == (2, 5)
    assert out.representation.shape == (2, family.num_features)
    torch.testing.assert_close(family.head(out.representation), out.logits)
    with family.native() as network:
        own = network((pixels - family.mean) / family.std)
        own = getattr(own, "logits", own)
    torch.testing.assert_close(out.logits, own, rtol=1e-4, atol=1e-5)

    out.logits[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0

    if family.source.architecture == "levit_128s":
        family.train().eval()  # drops the attention biases that timm caches in eval mode
    twin = copy.deepcopy(family)
    torch.testing.assert_close(twin(pixels).logits, out.logits)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(twin(pixels).logits, out.logits)
    torch.testing.assert_close(family(pixels).logits, out.logits)

    family.train()
    family.reset_head(["cat", "dog", "eel"])
    out = family(pixels)
    assert out.logits.shape == (2, 3)
    assert family.num_classes == 3
    assert family.label_names == ["cat", "dog", "eel"]
    assert all(m.training for m in family.head.modules())
    out.logits.sum().backward()
    # what needs a gradient gets one, as DistributedDataParallel demands
    assert all(p.grad is not None for p in family.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in family.head.parameters())
    with family.native() as network:
        state = network.state_dict()
        own = network((pixels - family.mean) / family.std)
    assert getattr(own, "logits", own).shape == (2, 3)
    assert len(state) == len(family.state_dict())
    assert not any(key.startswith(("body.", "head.classifiers")) for key in state)


def test_distilled_heads_use_both_tokens():
    backbone = timm_backbone("deit_tiny_distilled_patch16_224").eval()
    pixels = torch.rand(2, 3, 32, 32)
    out = backbone(pixels)
    tokens = backbone.body.forward_features(backbone.normalize(pixels))
    torch.testing.assert_close(out.representation, torch.cat([tokens[:, 0], tokens[:, 1]], dim=1))
    first, second = backbone.head.classifiers
    torch.testing.assert_close(out.logits, (first(tokens[:, 0]) + second(tokens[:, 1])) / 2)


def test_normalisation_is_inside():
    backbone = timm_backbone("resnet18").eval()
    assert backbone.preprocessing.mean == (0.485, 0.456, 0.406)
    pixels = torch.rand(2, 3, 32, 32)
    with backbone.native() as network:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        expected = network((pixels - mean) / std)
    torch.testing.assert_close(backbone(pixels).logits, expected)
    assert "mean" not in backbone.state_dict()


def test_loading_weights_leaves_the_generator_alone(tmp_path):
    folder = timm_folder(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_backbone(folder)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    first = timm_backbone("resnet18").state_dict()
    torch.manual_seed(3)
    second = timm_backbone("resnet18").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def timm_folder(tmp_path: Path, name: str = "resnet18", **kwargs) -> Path:
    folder = tmp_path / "model"
    model = timm.create_model(name, **{**TIMM[name], "num_classes": 3, **kwargs})
    save_for_hf(model, str(folder), model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
    return folder


def test_a_timm_folder(tmp_path):
    folder = timm_folder(tmp_path)
    backbone = load_backbone(str(folder), image_size=40)
    source = backbone.source
    assert (source.library, source.architecture, source.revision) == ("timm", "resnet18", None)
    assert (source.pretrained, source.hub_id, source.model_id) == (True, None, str(folder))
    assert backbone.label_names == ["a", "b", "c"]
    assert backbone.preprocessing.size == (40, 40)
    weights = load_file(folder / "model.safetensors")
    with backbone.native() as network:
        assert set(weights) == set(network.state_dict())
        assert all(torch.equal(weights[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("image_size", [None, 40])
def test_images_are_prepared_as_a_timm_model_says_and_so_are_its_exports(tmp_path, image_size):
    folder = timm_folder(tmp_path)
    wanted = {"crop_pct": 0.75, "crop_mode": "border", "interpolation": "lanczos", "mean": [0.1, 0.2, 0.3],
              "std": [0.4, 0.5, 0.6], "input_size": [3, 48, 48]}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= wanted
    (folder / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(folder, image_size=image_size)
    size = image_size or 48
    expected = Preprocessing(
        (size, size), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop_pct=0.75, crop_mode="border", interpolation="lanczos"
    )
    assert backbone.preprocessing == expected
    write_model_folder(backbone, tmp_path / "export")
    assert load_backbone(tmp_path / "export").preprocessing == expected
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in theirs.pretrained_cfg.items()
            if name in wanted} == wanted | {"input_size": [3, size, size]}  # fmt: skip


def test_label_names_are_in_the_order_of_their_numbers():
    complete = networks._complete_names
    assert complete({"2": "c", "0": "a", "1": "b"}, 3) == ["a", "b", "c"]
    assert complete({10: "k", **{i: str(i) for i in range(10)}}, 11) == [*map(str, range(10)), "k"]
    assert complete({"0": "a", "2": "c"}, 3) is None
    assert complete(["a", "b"], 3) is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_new_head_is_in_the_networks_mode_and_drawn_from_the_global_generator(tmp_path, library, training):
    folder = timm_folder(tmp_path) if library == "timm" else transformers_folder("vit", tmp_path / "vit")
    backbone = load_backbone(folder).train(training)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        backbone.reset_head(4)
        assert {module.training for module in backbone.head.modules()} == {training}
        heads.append(backbone.head.classifiers[0].weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert backbone.head.classifiers[0].weight.requires_grad
    assert backbone.new_head


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_half_precision_weights_become_single(tmp_path, library):
    folder = timm_folder(tmp_path) if library == "timm" else transformers_folder("vit", tmp_path / "vit")
    single = load_backbone(folder)
    weights = {name: value.half() if value.is_floating_point() else value
               for name, value in load_file(folder / "model.safetensors").items()}  # fmt: skip
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if library == "transformers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    backbone = load_backbone(folder)
    assert {value.dtype for value in backbone.state_dict().values()} <= {torch.float32, torch.int64}
    pixels = torch.rand(2, 3, *backbone.preprocessing.size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(backbone(pixels).logits, single(pixels).logits, rtol=0.02, atol=0.02)


def test_fixed_size_models_are_resized(tmp_path):
    folder = timm_folder(tmp_path, "vit_tiny_patch16_224")
    assert load_backbone(folder).preprocessing.size == (32, 32)
    backbone = load_backbone(folder, image_size=48)
    assert backbone.preprocessing.size == (48, 48)
    assert backbone(torch.rand(1, 3, 48, 48)).logits.shape == (1, 3)


def test_what_is_dropped_may_be_chosen_for_a_network_with_weights(tmp_path):
    folder = timm_folder(tmp_path, "vit_tiny_patch16_224", depth=2)
    plain = load_backbone(folder)
    backbone = load_backbone(folder, model_args={"drop_path_rate": 0.3, "proj_drop_rate": 0.1})
    assert backbone.body.blocks[0].attn.proj_drop.p == 0.1
    assert backbone.body.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(backbone(pixels).logits, plain(pixels).logits)
    write_model_folder(backbone, tmp_path / "export")
    assert torch.equal(load_backbone(tmp_path / "export")(pixels).logits, plain(pixels).logits)
    fails(folder, "drop_path_rate", "may be chosen", model_args={"depth": 2, "drop_path_rate": 0.1})
    cifar = load_backbone("resnet18_cifar", num_classes=3, model_args={"channels": [4, 4, 4, 8]})
    write_model_folder(cifar, tmp_path / "cifar")
    fails(tmp_path / "cifar", "does not take model_args", "patch_drop_rate", model_args={"patch_drop_rate": 0.1})
    vit = transformers_folder("vit", tmp_path / "vit")
    fails(vit, "whose architecture its config.json fixes", model_args={"drop_path_rate": 0.1})


def test_random_weights_and_another_head(tmp_path):
    folder = timm_folder(tmp_path)
    loaded, random = load_backbone(folder), load_backbone(folder, pretrained=False, num_classes=7)
    assert not random.source.pretrained
    assert random.num_classes == 7
    assert random.label_names is None
    assert not torch.equal(loaded.body.layer1[0].conv1.weight, random.body.layer1[0].conv1.weight)
    assert load_backbone(folder, num_classes=3).label_names == ["a", "b", "c"]
    (folder / "model.safetensors").unlink()
    assert load_backbone(folder, pretrained=False).num_classes == 3
    vit = load_backbone(transformers_folder("vit", tmp_path / "vit"), pretrained=False, num_classes=4)
    assert vit.num_classes == 4


def test_a_bare_name_is_a_random_initialisation():
    backbone = load_backbone("resnet18_cifar", model_args={"channels": [4, 4, 4, 8]}, num_classes=10)
    assert backbone.source == backbones.ModelSource("resnet18_cifar", "timm", "resnet18_cifar", None, False, None)
    assert backbone.preprocessing.size == (32, 32)
    assert backbone.num_features == 8


def fails(model_id, *fragments, error=BackboneError, **kwargs):
    with pytest.raises(error) as caught:
        load_backbone(model_id, **kwargs)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    return str(caught.value)


def no_network(*_args, **_kwargs):
    raise AssertionError("the network was asked")


def test_names_are_checked_before_the_network(monkeypatch):
    monkeypatch.setattr(model_source, "hf_hub_download", no_network)
    fails("timm/resnet5O", "resnet50", "unknown to timm")
    fails("timm/resnet50.a1_in2k", "timm/resnet50.a1_in1k")
    fails("timm/resnet18_cifar", "'resnet18_cifar' for a random initialisation")
    fails("resnet50.a1_in1k", "timm/resnet50.a1_in1k", "random initialisation")
    fails("resnet5", "Did you mean 'resnet50")
    fails("./nowhere/model", "no such folder")
    fails("a/b/c", "no such folder")
    fails("resnet18", "revision", revision="main")
    fails("org/name@main", "Give one of them", revision="other")
    fails("", "empty")
    fails("resnet18", "image_size is 0", image_size=0)
    fails("resnet18", "num_classes is -1", num_classes=-1)


def test_unusable_architectures(tmp_path):
    fails("resnet18", "cannot be built", "widths", model_args={"widths": 3})
    fails("resnet18", "4 channels", model_args={"in_chans": 4})
    fails("resnet18", "num_classes is 0", model_args={"num_classes": 0})
    fails("vit_tiny_patch16_224", "no classification head", num_classes=None, model_args={**VIT, "num_classes": 0})
    fails("swin_tiny_patch4_window7_224", "image", image_size=2)
    write_model_folder(timm_backbone("levit_128s"), tmp_path / "levit")
    fails(tmp_path / "levit", "for images of 128x128", "Leave the image size out", image_size=128)
    fails(timm_folder(tmp_path), "model_args", model_args={"channels": [8, 8, 8, 8]})


@pytest.mark.parametrize(("name", "args"), [("test_vit", {"img_size": 32}), ("test_resnet", {})])
def test_a_network_without_a_head_is_given_one(name, args, tmp_path):
    plain = timm.create_model(name, num_classes=0, **args).eval()
    timm.models.save_for_hf(plain, tmp_path / "net", safe_serialization=True)
    fails(tmp_path / "net", "no classification head", "--standard-epochs")
    for flags in ({"num_classes": 5}, {"head_if_none": 5}):
        state = torch.get_rng_state()
        backbone = load_backbone(tmp_path / "net", image_size=32, **flags)
        assert torch.equal(torch.get_rng_state(), state)
        assert (backbone.num_classes, backbone.new_head) == (5, True)
        pixels = torch.rand(2, 3, 32, 32)
        logits, representation = backbone(pixels)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(representation, plain(backbone.normalize(pixels)), rtol=1e-4, atol=1e-5)
    backbone = load_backbone(timm_folder(tmp_path), head_if_none=5)
    assert (backbone.num_classes, backbone.new_head) == (3, False), "it has one"


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet", "beit", "dinov2", "siglip", "deit_distilled"])
def test_a_transformers_network_without_a_head_is_given_one(family, tmp_path, capfd):
    from transformers import AutoModel, AutoModelForImageClassification

    folder = transformers_folder(family, tmp_path / "net")
    base = AutoModel.from_config(AutoModelForImageClassification.from_pretrained(folder).config)
    base.save_pretrained(folder)
    assert base.config.architectures == [type(base).__name__]
    fails(folder, "without a classification head", "--standard-epochs", type(base).__name__)
    for flags in ({"num_classes": 4}, {"head_if_none": 4}):
        state = torch.get_rng_state()
        capfd.readouterr()
        backbone = load_backbone(folder, **flags)
        assert "MISSING" not in capfd.readouterr().err, "the new head is said by who asks for it"
        assert torch.equal(torch.get_rng_state(), state)
        assert (backbone.num_classes, backbone.new_head, backbone.label_names) == (4, True, None)
        assert backbone.source.architecture.endswith("ForImageClassification")
        pixels = torch.rand(2, 3, *backbone.preprocessing.size)
        with torch.no_grad():
            logits = backbone(pixels).logits
            plain = AutoModelForImageClassification.from_pretrained(folder, num_labels=4).eval()
            own = dict(plain.named_parameters())
            with backbone.native() as native:
                for name, parameter in native.named_parameters():
                    if name.startswith("classifier"):
                        own[name].copy_(parameter)
            torch.testing.assert_close(logits, plain(backbone.normalize(pixels)).logits, rtol=1e-4, atol=1e-5)
    backbone.label_names = ["a", "b", "c", "d"]
    write_model_folder(backbone, tmp_path / "export")
    again = load_backbone(tmp_path / "export")
    assert (again.num_classes, again.label_names, again.new_head) == (4, ["a", "b", "c", "d"], False)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, logits)


def test_both_heads_of_a_distilled_network_are_renewed():
    backbone = load_backbone("repvit_m0_9", image_size=64)
    backbone.reset_head(["a", "b"])
    logits, representation = backbone(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 2)
    with backbone.native() as network, torch.no_grad():
        torch.testing.assert_close(network(backbone.normalize(torch.zeros(1, 3, 64, 64))).shape, torch.Size([1, 2]))
    assert representation.shape[1] == backbone.num_features


@pytest.mark.parametrize(
    ("name", "args"), [("levit_128s", {"distilled": False}), ("repvit_m0_9", {"distillation": False})]
)
def test_a_variant_with_one_of_two_heads(name, args):
    """timm's configuration names both of them."""
    backbone = load_backbone(name, num_classes=5, image_size=64, model_args=TIMM.get(name, {}) | args)
    pixels = torch.rand(2, 3, 64, 64)
    for classes in (5, 3):
        with torch.no_grad():
            logits, representation = backbone(pixels)
            with backbone.native() as network:
                torch.testing.assert_close(network(backbone.normalize(pixels)), logits)
        assert (logits.shape[1], representation.shape[1]) == (classes, backbone.num_features)
        backbone.reset_head(3)


@pytest.mark.parametrize("name", ["levit_128s", "caformer_s18"])  # a BatchNorm, a hidden layer
def test_what_is_before_the_classifier_outlives_a_new_head(name):
    backbone = load_backbone(name, num_classes=5, image_size=64, model_args=TIMM.get(name))
    with torch.no_grad():
        for number, value in enumerate(backbone.state_dict().values()):
            if value.is_floating_point():
                value.add_(0.05 * torch.rand(value.shape, generator=torch.Generator().manual_seed(number)))
    pixels = torch.rand(2, 3, 64, 64)
    with backbone.native() as network:
        before = {key: value.clone() for key, value in network.state_dict().items()}
    expected = backbone(pixels).representation
    backbone.reset_head(7)
    with backbone.native() as network:
        after = network.state_dict()
    new = {key for key in after if after[key].shape != before[key].shape or not torch.equal(after[key], before[key])}
    heads = tuple(f"{head}." for head in backbone._head_names)
    assert new == {key for key in after if key.startswith(heads)} != set()
    assert torch.equal(backbone(pixels).representation, expected)


def test_heads_of_branches_of_different_widths():
    """CrossViT's two branches: the representation is both side by side, and plain timm's logits are the same."""
    backbone = load_backbone("crossvit_tiny_240", num_classes=3)
    pixels = torch.rand(2, 3, 240, 240)
    with torch.no_grad():
        logits, representation = backbone(pixels)
        assert (logits.shape, representation.shape) == ((2, 3), (2, 96 + 192))
        with backbone.native() as network:
            plain = backbone.normalize(pixels)
            torch.testing.assert_close(network(plain), logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(network.forward_head(network.forward_features(plain), pre_logits=True),
                                       representation, rtol=1e-4, atol=1e-5)  # fmt: skip


class Sharpened(torch.nn.Module):
    """A classifier that works on its logits after the head: no linear head gives them."""

    def __init__(self, cfg):
        super().__init__()
        self.head, self.pretrained_cfg = torch.nn.Linear(3, 4), cfg

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(x.mean((2, 3))) * 2 + 1


@pytest.mark.parametrize("cfg", [{"classifier": "head"}, {"classifier": "fc"}, {}])
def test_a_head_that_cannot_be_separated(cfg):
    source = backbones.ModelSource("sharpened", "timm", "sharpened", None, False, None)
    wants = Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(BackboneError, match="cannot be separated"):
        Backbone(Sharpened(cfg), source, wants)


class Scaled(Sharpened):
    """The scale of the logits is trained, and is 1 before."""

    def __init__(self, cfg, scale=1.0):
        super().__init__(cfg)
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.head(x.mean((2, 3))) * self.scale


def test_a_head_that_cannot_be_separated_once_it_is_trained():
    source = backbones.ModelSource("scaled", "timm", "scaled", None, False, None)
    for network in (Scaled({}, scale=2.0), Scaled({})):
        parameters = [*network.parameters()]
        before = [parameter.detach().clone() for parameter in parameters]
        with pytest.raises(BackboneError, match="cannot be separated"):
            Backbone(network, source, Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3))
        assert all(map(torch.equal, parameters, before)), "what was tried is undone"
    fails("efficientvim_m1", "cannot be separated", num_classes=3)


class ActsAfterDropout(Sharpened):
    """What is dropped is no more than an input of what comes between it and the head, in the same memory."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.head(torch.nn.functional.hardswish(self.dropout(x.mean((2, 3))), inplace=True))


def test_dropout_that_something_follows_stays_where_it_is():
    source = backbones.ModelSource("acts", "timm", "acts", None, False, None)
    backbone = Backbone(ActsAfterDropout({}), source, Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3))
    assert isinstance(backbone.head.dropout, torch.nn.Identity)
    assert isinstance(backbone.body.dropout, torch.nn.Dropout)


def rewrite(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_damaged_timm_folders(tmp_path):
    good = timm_folder(tmp_path)
    weights = good / "model.safetensors"
    tensors = load_file(weights)

    def broken(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        return folder

    fails(good / "model.safetensors", "is a file")
    folder = broken("no-config")
    (folder / "config.json").unlink()
    fails(folder, "no config.json")
    folder = broken("bad-json")
    (folder / "config.json").write_text('{"architecture": ')
    fails(folder, "config.json", "cannot be read")
    folder = broken("list-json")
    (folder / "config.json").write_text("[]")
    fails(folder, "holds a list")
    folder = broken("empty-json")
    (folder / "config.json").write_text("{}")
    fails(folder, "neither 'architecture'")
    folder = broken("unknown")
    rewrite(folder, architecture="resnet18_mine")
    fails(folder, "resnet18_mine", "Did you mean 'resnet18")
    folder = broken("headless")
    rewrite(folder, num_classes=-1, model_args={})
    fails(folder, "no classification head")
    folder = broken("no-weights")
    (folder / "model.safetensors").unlink()
    fails(folder, "no weights", "pretrained=False")
    folder = broken("truncated")
    (folder / "model.safetensors").write_bytes(weights.read_bytes()[:5000])
    fails(folder, "cannot be loaded", "damaged")
    folder = broken("missing")
    save_file({k: v for k, v in tensors.items() if k != "fc.weight"}, folder / "model.safetensors")
    fails(folder, "fc.weight", "cannot be loaded")
    folder = broken("unexpected")
    save_file(tensors | {"extra.weight": torch.zeros(1)}, folder / "model.safetensors")
    fails(folder, "extra.weight")
    folder = broken("shape")
    save_file(tensors | {"fc.weight": torch.zeros(9, 16)}, folder / "model.safetensors")
    fails(folder, "fc.weight", "[9, 16]")
    folder = broken("nan")
    save_file(tensors | {"fc.bias": torch.full((3,), float("nan"))}, folder / "model.safetensors")
    fails(folder, "not finite")
    folder = broken("two")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert load_backbone(folder).num_classes == 3
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    fails(folder, "several weights files")


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_pickles(library, tmp_path, monkeypatch):
    folder = timm_folder(tmp_path) if library == "timm" else transformers_folder("vit", tmp_path / "vit")
    expected = load_backbone(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    fails(folder, "--allow-pickle", "pytorch_model.bin")
    loaded = load_backbone(folder, allow_pickle=True).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    monkeypatch.chdir(tmp_path)
    torch.save(tensors | {"x": Harmful()}, folder / "pytorch_model.bin")
    fails(folder, "cannot be loaded", allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    fails(folder, "cannot be loaded", allow_pickle=True)
    assert not (tmp_path / "harm").exists()
    # a safetensors file wins over a pickle
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_backbone(folder, allow_pickle=True).num_classes == expected["head.classifiers.0.bias"].numel()


def test_transformers_labels_and_preprocessing(tmp_path):
    names = {0: "cat", 1: "dog", 2: "eel"}
    backbone = load_backbone(transformers_folder("vit", tmp_path / "vit", id2label=names))
    assert backbone.label_names == ["cat", "dog", "eel"]
    assert backbone.source.architecture == "ViTForImageClassification"
    assert backbone.source.library == "transformers"
    wants = backbone.preprocessing
    assert (wants.size, wants.mean, wants.std) == ((32, 32), (0.5,) * 3, (0.5,) * 3)
    assert (wants.crop_mode, wants.crop_pct, wants.interpolation) == ("squash", 1.0, "bilinear")
    convnext = load_backbone(transformers_folder("convnext", tmp_path / "convnext"), image_size=64)
    assert convnext.label_names is None
    assert convnext.preprocessing.size == (64, 64)
    assert convnext.preprocessing.crop_mode == "center"
    assert int(64 / convnext.preprocessing.crop_pct) == int(64 / 0.875)
    fails(tmp_path / "vit", "64", "image size", image_size=64)


def test_classes_without_names(tmp_path):
    folder = transformers_folder("vit", tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    for changes in ({"id2label": None, "num_labels": 5}, {"id2label": None, "label2id": None, "num_labels": 5}):
        (folder / "config.json").write_text(json.dumps(config | changes))
        backbone = load_backbone(folder)
        assert (backbone.num_classes, backbone.label_names) == (5, None)


def test_unusable_transformers_folders(tmp_path):
    from transformers import AutoConfig

    good = transformers_folder("vit", tmp_path / "good")
    tensors = load_file(good / "model.safetensors")

    def broken(name: str, **changes) -> Path:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        rewrite(folder, **changes)
        return folder

    fails(broken("code", auto_map={"AutoConfig": "x.Y"}), "never", "auto_map")
    fails(broken("type", model_type="vitt"), "vitt", "Did you mean 'vit")
    fails(broken("task", architectures=["ViTModel"]), "without a classification head", "ViTForImageClassification")
    fails(broken("lost", architectures=["ViTModel"], num_hidden_layers=2), "lack", "not be trained", num_classes=5)
    fails(broken("text", model_type="bert", architectures=["BertModel"]), "not an image classifier")
    fails(broken("gray", num_channels=1), "1 channels")
    fails(broken("quantized", quantization_config={"load_in_8bit": True}), "quantized weights", "cannot be trained")
    folder = broken("string", architectures="ViTForImageClassification")
    try:
        AutoConfig.from_pretrained(folder)
    except StrictDataclassError:  # transformers 5.17
        fails(folder, "cannot be loaded", "Field 'architectures'")
    else:
        assert load_backbone(folder).num_classes == 5
    folder = broken("images")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    code = {"auto_map": {"AutoImageProcessor": "mine.Mine"}, "image_processor_type": "Mine"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | code))
    fails(folder, "Python code from its repository", "auto_map in preprocessor_config.json")
    fails(broken("wrapped", model_type="timm_wrapper"), "timm_wrapper")
    folder = broken("processor")
    (folder / "preprocessor_config.json").unlink()
    fails(folder, "processor.save_pretrained")
    folder = broken("head")
    save_file(
        {k: v for k, v in tensors.items() if "classifier" not in k},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    fails(folder, "classifier.weight", "would not be trained")
    folder = broken("shape")
    save_file(tensors | {"classifier.bias": torch.zeros(9)}, folder / "model.safetensors", {"format": "pt"})
    fails(folder, "cannot be loaded", "classifier.bias is (9,), not (5,)")
    folder = broken("truncated")
    (folder / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:3000])
    fails(folder, "cannot be loaded")
    folder = broken("pooler")  # weights that no part of the classifier uses
    save_file(tensors | {"vit.pooler.dense.bias": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    assert load_backbone(folder).num_classes == 5


@pytest.mark.parametrize("library", ["timm", "vit", "convnext"])
def test_values_of_another_type_are_one_clear_error(tmp_path, library):
    """What libraries raise over these is anything; a value may be taken for another, which is no error."""
    folder = timm_folder(tmp_path) if library == "timm" else transformers_folder(library, tmp_path / library)
    unlike = {
        "timm": [
            ("label_names", 3), ("pretrained_cfg.crop_pct", "x"), ("pretrained_cfg.mean", []),
            ("pretrained_cfg.std", ["x", 1, 1]), ("pretrained_cfg.input_size", [3, None, 32]),
            ("pretrained_cfg.classifier", 1.5), ("architecture", ["resnet18"]),
        ],
        "vit": [
            ("architectures", 1), ("architectures", {"a": 1}), ("model_type", []), ("id2label", 0), ("dtype", []),
            ("hidden_size", "big"), ("hidden_size", 0), ("patch_size", [1]), ("hidden_dropout_prob", "x"),
        ],
        "convnext": [
            ("depths", 3), ("hidden_sizes", []), ("preprocessor.crop_pct", 0), ("preprocessor.rescale_factor", 0),
            ("preprocessor.image_processor_type", 7), ("preprocessor.size", []),
        ],
    }[library]  # fmt: skip
    for path, value in unlike:
        *within, name = path.split(".")
        preprocessor = within == ["preprocessor"]
        file = folder / ("preprocessor_config.json" if preprocessor else "config.json")
        whole = file.read_text()
        values = json.loads(whole)
        holder = values["pretrained_cfg"] if within == ["pretrained_cfg"] else values
        assert preprocessor or name in holder, path
        holder[name] = value
        file.write_text(json.dumps(values))
        fails(folder, f"odel {str(folder)!r}")
        file.write_text(whole)
    assert load_backbone(folder).num_classes > 1


def test_without_transformers(tmp_path):
    folder = transformers_folder("vit", tmp_path / "vit")
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from arrest_hub.backbones import load_backbone, BackboneError\n"
        "load_backbone('resnet18_cifar', model_args={'channels': [4, 4, 4, 4]})\n"
        f"try: load_backbone({str(folder)!r})\n"
        "except BackboneError as error: print(error)\n"
    )
    run = run_python(["-c", code], cwd=tmp_path, env=dict(os.environ), timeout=120)
    assert 'pip install "arrest-hub[transformers]"' in run.stdout


class FakeHub:
    """Serves one folder as a repository; records what was asked."""

    def __init__(self, repo_id: str, folder: Path, cache: Path):
        self.repo_id, self.folder, self.asked = repo_id, folder, []
        self.snapshot = cache / "snapshots" / ("c" * 40)
        self.snapshot.mkdir(parents=True)
        self.reachable = True

    def hf_hub_download(self, repo_id, filename, revision=None, cache_dir=None):
        self.asked.append((repo_id, filename, revision))
        assert repo_id == self.repo_id
        shutil.copy(self.folder / filename, self.snapshot / filename)
        return str(self.snapshot / filename)

    def snapshot_download(self, repo_id, revision, cache_dir, allow_patterns, local_files_only):
        if not self.reachable and not local_files_only:
            raise ConnectionError("no route")  # huggingface_hub 1 asks the Hub even about a cached commit
        if local_files_only:
            return str(self.snapshot)
        self.asked.append((repo_id, tuple(allow_patterns), revision))
        for file in self.folder.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, self.snapshot / file.name)
        return str(self.snapshot)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def serve(repo_id: str, folder: Path) -> FakeHub:
        fake = FakeHub(repo_id, folder, tmp_path / "cache")
        monkeypatch.setattr(model_source, "hf_hub_download", fake.hf_hub_download)
        monkeypatch.setattr(model_source, "snapshot_download", fake.snapshot_download)
        return fake

    return serve


def test_timm_on_the_hub(hub, tmp_path):
    folder = timm_folder(tmp_path)
    fake = hub("timm/resnet50.a1_in1k", folder)
    backbone = load_backbone("timm/resnet50")  # timm's default tag
    assert backbone.source.hub_id == "timm/resnet50.a1_in1k"
    assert backbone.source.revision == "c" * 40
    assert backbone.source.model_id == "timm/resnet50"
    assert fake.asked[0] == ("timm/resnet50.a1_in1k", "config.json", None)
    assert fake.asked[1][2] == "c" * 40


def test_only_what_is_needed_is_downloaded(hub, tmp_path):
    folder = transformers_folder("vit", tmp_path / "vit")
    for extra in ("model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5", "README.md"):
        (folder / extra).write_text("never")
    fake = hub("org/vit", folder)
    backbone = load_backbone("org/vit@v1.0")
    assert fake.asked[0][2] == "v1.0"
    assert backbone.source.hub_id == "org/vit"
    got = {p.name for p in fake.snapshot.iterdir()}
    assert got == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_a_useless_repository_costs_no_download(hub, tmp_path):
    folder = timm_folder(tmp_path)
    rewrite(folder, architecture="not_in_timm")
    fake = hub("org/model", folder)
    fails("org/model", "not_in_timm")
    assert [asked[1] for asked in fake.asked] == ["config.json"]


def test_pickles_on_the_hub(hub, tmp_path):
    folder = timm_folder(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub("org/model", folder)
    fails("org/model", "--allow-pickle")
    assert load_backbone("org/model", allow_pickle=True).num_classes == 3


def test_a_cached_commit_needs_no_network(hub, tmp_path):
    fake = hub("org/model", timm_folder(tmp_path))
    load_backbone("org/model")
    fake.reachable = False
    assert load_backbone("org/model").source.revision == "c" * 40
    (fake.snapshot / "model.safetensors").unlink()
    fails("org/model", "no model.safetensors on the Hub (or, without a network, in the cache)")


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_args, **_kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(model_source, "hf_hub_download", unreachable)
    fails("org/model", "org/model", "cannot be reached", error=HubError)


def test_a_cached_model_loads_offline(tmp_path):
    """Through the real client, on a cache laid out as it does itself."""
    commit = "0123456789" * 4
    repo = tmp_path / "models--org--vit"
    transformers_folder("vit", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    backbone = load_backbone("org/vit", cache_dir=tmp_path)
    assert backbone.source.revision == commit
    fails("org/other", "cannot be reached", error=HubError, cache_dir=tmp_path)


def test_ids_the_hub_does_not_allow():
    fails("org/na me", "org/name")


def test_the_processor_is_reproduced(tmp_path):
    """Normalisation and geometry against transformers' own output, on processors of different kinds."""
    import numpy as np
    import transformers as t

    from arrest_hub.image_processor import read_preprocessing

    image = np.zeros((80, 120, 3), np.uint8) + np.array([10, 100, 250], np.uint8)
    processors = {
        ("center", 0.875): t.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),
        ("squash", 0.875): t.DeiTImageProcessor(
            size={"height": 64, "width": 64}, crop_size={"height": 56, "width": 56}
        ),
        ("squash", 1.0): t.EfficientNetImageProcessor(size={"height": 56, "width": 56}),
        ("center", 0.9): t.PoolFormerImageProcessor(
            size={"shortest_edge": 54}, crop_size={"height": 54, "width": 54}, crop_pct=0.9
        ),
        ("squash", 0.9999999): t.ConvNextImageProcessor(size={"shortest_edge": 384}),
    }
    for (mode, crop_pct), processor in processors.items():
        wants = read_preprocessing(processor)
        assert wants.crop_mode == mode
        assert wants.crop_pct == pytest.approx(crop_pct)
        got = processor(images=image, return_tensors="np")["pixel_values"][0]
        assert got.shape[1:] == wants.size
        expected = (np.array([10, 100, 250]) / 255 - wants.mean) / wants.std
        np.testing.assert_allclose(got[:, 5, 5], expected, atol=1e-5)
    offset = t.ViTImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, do_normalize=False)
    assert read_preprocessing(offset).std == pytest.approx((0.5,) * 3)
    with pytest.raises(ValueError, match="colour channels"):
        read_preprocessing(t.MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}))
    with pytest.raises(ValueError, match=r"different sizes \(64x64 of a square one, 64x102 of one of 100x160\)"):
        read_preprocessing(t.CLIPImageProcessor(size={"shortest_edge": 64}, do_center_crop=False))
    with pytest.raises(ValueError, match="resizes to 73x71 before it crops 64x64"):
        read_preprocessing(
            t.DeiTImageProcessor(size={"height": 73, "width": 71}, crop_size={"height": 64, "width": 64})
        )
    with pytest.raises(ValueError, match="does not resize"):
        read_preprocessing(t.ViTImageProcessor(do_resize=False))


@pytest.mark.parametrize("kind", ["crop of another shape", "padded", "stretched to a multiple"])
def test_a_processor_that_does_more_than_it_tells_is_refused(kind):
    import transformers as t

    from arrest_hub.image_processor import read_preprocessing

    def square(pixels):
        return {"height": pixels, "width": pixels}

    processor = {
        "crop of another shape": lambda: t.CLIPImageProcessor(
            size={"shortest_edge": 48}, crop_size={"height": 48, "width": 32}
        ),
        "padded": lambda: t.ViTImageProcessor(size=square(32), do_pad=True, pad_size=square(40)),
        "stretched to a multiple": lambda: t.TextNetImageProcessor(
            size={"shortest_edge": 64}, crop_size=square(64), do_center_crop=True
        ),
    }[kind]()
    with pytest.raises(ValueError, match="does more than its settings tell"):
        read_preprocessing(processor)


@pytest.mark.parametrize("family", ["vit", "beit", "convnext", "resnet"])
def test_a_config_that_asks_for_more_than_logits(family, tmp_path):
    folder = transformers_folder(family, tmp_path / family)
    pixels = torch.rand(2, 3, 32, 32)
    expected = load_backbone(folder)(pixels).logits
    config = json.loads((folder / "config.json").read_text())
    asked = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    (folder / "config.json").write_text(json.dumps(config | asked))
    backbone = load_backbone(folder)
    torch.testing.assert_close(backbone(pixels).logits, expected)
    write_model_folder(backbone, tmp_path / "export")
    torch.testing.assert_close(load_backbone(tmp_path / "export")(pixels).logits, expected)


def test_a_type_with_several_classifiers_and_no_architecture(tmp_path):
    folder = transformers_folder("deit_distilled", tmp_path / "deit")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    heads = {name.replace("cls_classifier", "classifier"): value for name, value in tensors.items()}
    save_file(heads, folder / "model.safetensors", {"format": "pt"})
    assert load_backbone(folder).source.architecture == "DeiTForImageClassification"


def mobilenet_folder(folder: Path, **options) -> Path:
    import transformers as t

    config = t.MobileNetV2Config(image_size=32, depth_multiplier=0.1, min_depth=8, num_labels=5, **options)
    t.MobileNetV2ForImageClassification(config).save_pretrained(folder)
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def dropped_by_the_head(backbone, pixels, rate):
    """The logits with dropout on: it is the head's, and nothing of the network itself drops."""
    assert isinstance(backbone.head.dropout, torch.nn.Dropout)
    assert backbone.head.dropout.p == rate
    expected = backbone.eval()(pixels)
    assert torch.equal(backbone(pixels).logits, expected.logits)
    backbone.body.training = True
    backbone.head.dropout.train()
    torch.manual_seed(0)
    dropped = backbone(pixels)
    assert torch.equal(dropped.representation, expected.representation)
    assert not torch.equal(dropped.logits, expected.logits)
    backbone.eval()
    return dropped.logits


@pytest.mark.parametrize("library", ["timm", "timm, then flattened", "transformers"])
def test_dropout_before_the_head_is_not_in_the_representation(library, tmp_path):
    """It is noise, which the distance from the teacher would be made of."""
    torch.manual_seed(0)
    if library == "timm, then flattened":
        args = TIMM["resnetv2_18"] | {"drop_rate": 0.5}
        backbone = load_backbone("resnetv2_18", num_classes=5, image_size=32, model_args=args)
    elif library == "timm":
        args = VIT | {"drop_rate": 0.5}
        backbone = load_backbone("vit_tiny_patch16_224", num_classes=5, image_size=32, model_args=args)
    else:
        backbone = load_backbone(mobilenet_folder(tmp_path / "mobilenet", classifier_dropout_prob=0.5))
    pixels = torch.rand(4, 3, 32, 32)
    for _ in range(2):
        dropped_by_the_head(backbone, pixels, 0.5)
        with backbone.native() as network:
            network.train()
            assert sum(isinstance(m, torch.nn.Dropout) and m.p == 0.5 and m.training for m in network.modules()) == 1
        backbone.reset_head(3)
    write_model_folder(backbone, tmp_path / "export")
    torch.testing.assert_close(load_backbone(tmp_path / "export")(pixels).logits, backbone.eval()(pixels).logits)


@pytest.mark.parametrize(
    ("name", "args", "rate"),
    [
        ("resnet18", TIMM["resnet18"] | {"drop_rate": 0.5}, 0.5),
        ("resnet18_cifar", TIMM["resnet18_cifar"] | {"drop_rate": 0.3}, 0.3),
        ("ghostnet_050", {}, 0.2),  # its default
    ],
)
def test_dropout_that_is_no_module_is_not_in_the_representation_either(name, args, rate, tmp_path):
    backbone = load_backbone(name, num_classes=5, image_size=32, model_args=args)
    pixels = torch.rand(4, 3, 32, 32)
    for _ in range(2):
        dropped = dropped_by_the_head(backbone, pixels, rate)
        with backbone.native() as network:
            assert network.drop_rate == rate
            network.training = True
            torch.manual_seed(0)
            assert torch.equal(network(backbone.normalize(pixels)), dropped)
        backbone.reset_head(3)
    write_model_folder(backbone, tmp_path / "export")
    torch.testing.assert_close(load_backbone(tmp_path / "export")(pixels).logits, backbone.eval()(pixels).logits)


def test_loading_draws_nothing_for_a_dropout_that_is_no_module():
    backbone = timm_backbone("resnet18_cifar")
    backbone.body.drop_rate = 0.5
    before = torch.random.get_rng_state()
    assert backbone._last_drop_rate(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))) == 0.5
    assert torch.equal(torch.random.get_rng_state(), before)


class SquashedAfterwards(torch.nn.Module):
    """Drops, and does something to what is left."""

    num_classes, drop_rate = 4, 0.5

    def __init__(self):
        super().__init__()
        self.head, self.pretrained_cfg = torch.nn.Linear(3, 4), {"classifier": "head"}

    def forward(self, x):
        x = torch.nn.functional.dropout(x.mean(dim=(2, 3)) + 1, self.drop_rate, self.training)
        return self.head(torch.tanh(x))


def test_dropout_that_is_not_the_last_thing_done_stays(tmp_path):
    source = timm_backbone("resnet18").source
    backbone = Backbone(SquashedAfterwards(), source, Preprocessing((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3))
    assert backbone.body.drop_rate == 0.5
    assert isinstance(backbone.head.dropout, torch.nn.Identity)


def test_momentum_of_tensorflow_is_pytorchs(tmp_path):
    backbone = load_backbone(mobilenet_folder(tmp_path / "mobilenet"))
    momenta = [m.momentum for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert momenta == pytest.approx([0.003] * len(momenta))
    assert momenta


def test_loading_under_no_grad_gives_a_trainable_network():
    with torch.no_grad():
        backbone = load_backbone(
            "resnet18_cifar", num_classes=3, image_size=8, model_args={"channels": [16, 16, 16, 16]}
        )
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientvit_m0", "transformers"])
def test_what_a_network_keeps_in_eval_mode_is_trained(name, tmp_path):
    """Attention biases, whose gather these networks keep until they leave eval mode."""
    if name == "transformers":
        import transformers as t

        stages = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
        config = t.LevitConfig(image_size=64, key_dim=[8, 8, 8], patch_size=16, num_labels=5, **stages)
        t.LevitForImageClassification(config).save_pretrained(tmp_path)
        size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
        t.LevitImageProcessor(**size).save_pretrained(tmp_path)
        backbone = load_backbone(tmp_path)
    else:
        tiny_vit = {"embed_dims": (16, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
        args = {
            "levit_128s": TIMM["levit_128s"],
            "tiny_vit_5m_224": tiny_vit,
        }
        backbone = load_backbone(name, num_classes=5, model_args=args.get(name))
    biases = [parameter for name, parameter in backbone.named_parameters() if "attention_biases" in name]
    assert biases
    with torch.no_grad():
        for parameter in backbone.parameters():  # some begin with branches that are 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = torch.rand(4, 3, *backbone.preprocessing.size)
    with frozen_eval(backbone), torch.no_grad():
        backbone(pixels)
    backbone.train()(pixels).logits.square().sum().backward()
    assert all(bias.grad is not None for bias in biases)
    assert biases[0].grad.abs().max() > 0


def test_a_network_whose_configuration_has_no_names_of_its_own(tmp_path):
    import transformers as t

    stages = {"hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 1, 2]}
    t.PvtForImageClassification(t.PvtConfig(image_size=64, num_labels=5, **stages)).save_pretrained(tmp_path / "pvt")
    t.PvtImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "pvt")
    backbone = load_backbone(tmp_path / "pvt")
    assert (backbone.num_classes, backbone.label_names) == (5, None)
    backbone.reset_head(["cat", "dog", "eel"])
    for number, names in enumerate((["cat", "dog", "eel"], None)):
        write_model_folder(backbone, tmp_path / str(number))
        again = load_backbone(tmp_path / str(number))
        assert (again.num_classes, again.label_names) == (3, names)
        backbone.reset_head(3)


def test_a_head_beside_a_module_of_the_usual_name(tmp_path):
    """HGNetV2's `classifier` only pools; its linear layer is `fc`."""
    import transformers as t

    config = t.HGNetV2Config(
        num_labels=5, embedding_size=8, depths=[1], hidden_sizes=[16], stem_channels=[3, 4, 8], stage_in_channels=[8],
        stage_mid_channels=[4], stage_out_channels=[16], stage_num_blocks=[1], stage_downsample=[False],
        stage_light_block=[False], stage_kernel_size=[3], stage_numb_of_layers=[1],
    )  # fmt: skip
    t.HGNetV2ForImageClassification(config).save_pretrained(tmp_path)
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone.num_features == 16
    backbone.reset_head(3)
    assert backbone(torch.rand(2, 3, 32, 32)).logits.shape == (2, 3)


def test_a_processor_that_gives_no_pixels_is_refused(tmp_path):
    import numpy as np
    import transformers as t

    folder = transformers_folder("vit", tmp_path / "vit")
    colours = np.random.default_rng(0).random((8, 3)).tolist()
    t.ImageGPTImageProcessor(size={"height": 8, "width": 8}, clusters=colours).save_pretrained(folder)
    fails(folder, "ImageGPTImageProcessor", "makes input_ids of an image instead of pixel values")
    t.ViTImageProcessor(size={"height": 32, "width": 32}, resample=4).save_pretrained(folder)
    fails(folder, "ViTImageProcessor", "image processor that only resizes, crops and normalises")


@pytest.mark.parametrize("kind", ["CLIP", "Bit", "Deit", "PoolFormer", "ConvNext", "Levit"])
def test_the_centre_is_cropped_where_the_processor_crops_it(kind):
    """Images of every width: where the rest is odd, transformers and torchvision begin a pixel apart."""
    import numpy as np
    import transformers as t
    from PIL import Image

    from arrest_hub.image_processor import read_preprocessing
    from arrest_hub.transforms import eval_transform

    edge, crop = {"size": {"shortest_edge": 73}}, {"crop_size": {"height": 64, "width": 64}}
    processor = {
        "CLIP": lambda: t.CLIPImageProcessor(**edge, **crop),
        "Bit": lambda: t.BitImageProcessor(**edge, **crop),
        "Deit": lambda: t.DeiTImageProcessor(size={"height": 73, "width": 73}, **crop),
        "PoolFormer": lambda: t.PoolFormerImageProcessor(size={"shortest_edge": 64}, **crop),
        "ConvNext": lambda: t.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
        "Levit": lambda: t.LevitImageProcessor(size={"shortest_edge": 64}, **crop),
    }[kind]()
    wants = read_preprocessing(processor)
    transform = eval_transform(wants)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (wants.mean, wants.std))
    noise = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((160, 100), Image.Resampling.BICUBIC)
    for width in range(100, 116):
        image = smooth.resize((width, 100))
        expected = processor(images=image, return_tensors="pt")["pixel_values"][0] * std + mean
        # uint8 in between: half a level of rounding, and what bicubic overshoots
        assert (transform(image) / 255 - expected).abs().mean() < 0.004, width


def test_whole_numbers_are_no_pixels():
    backbone = timm_backbone("resnet18")
    with pytest.raises(BackboneError, match="uint8: give floats in"):
        backbone(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("test_vit", {"img_size": 32}, (32, 32)),
        ("test_vit", {"img_size": (32, 64)}, (32, 64)),
        ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True, "depth": 1}, (64, 64)),
    ],
)
def test_a_size_among_the_models_arguments_is_the_images_too(name, args, size):
    backbone = load_backbone(name, model_args=args)
    assert backbone.preprocessing.size == size
    with pytest.raises(BackboneError, match="give one"):
        load_backbone(name, model_args=args, image_size=96)


@pytest.mark.parametrize("name", ["checkpoint_path", "features_only", "pretrained", "pretrained_cfg", "cache_dir"])
def test_arguments_that_are_not_the_architectures(name):
    with pytest.raises(BackboneError, match=f"model_args {name}: that says where weights come from"):
        load_backbone("test_resnet", model_args={name: "x"})


def test_arguments_of_another_type_are_one_clear_error():
    for changes in ({"num_classes": "3"}, {"image_size": (32, 32)}, {"head_if_none": 2.5}):
        with pytest.raises(BackboneError, match="must be a positive whole number"):
            load_backbone("test_resnet", **changes)
    with pytest.raises(BackboneError, match="model_id is a NoneType"):
        load_backbone(None)
    with pytest.raises(BackboneError, match="1000000x1000000 pixels"):
        load_backbone("test_resnet", image_size=1_000_000)
    assert load_backbone("test_resnet", num_classes=np.int64(3)).num_classes == 3
