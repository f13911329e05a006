"""Options that change how a network is computed and not what: against the same network without them."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from steady_main import steady_ball, steady_pgd
from test_backbones import timm_backbone, transformers_folder
from test_train import log_lines, same_weights, vit_folder
from tiny import tiny_backbone, tiny_config, write_model
from torch import nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters

from arrest_hub import loop, prepare, step, train
from arrest_hub.attacks import frozen_eval, margin, pgd, project, random_in_ball
from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.config_sources import load_config, resume_config
from arrest_hub.errors import BackboneError, ConfigError
from arrest_hub.folding import FoldedNetwork, foldable
from arrest_hub.network_options import (
    InFp32,
    checkpoint_gradients,
    images_for_the_cache,
    keep_first_convolution_in_fp32,
    miscomputed_on_cpus,
    normalise_alone,
    synchronise_batchnorm,
    use_channels_last,
)
from arrest_hub.step import GRADIENT_SCALE
from arrest_hub.train import finetune

NETWORKS = ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "hf-vit", "hf-convnext", "hf-resnet"]


def network(name, folder):
    torch.manual_seed(0)
    return load_backbone(transformers_folder(name[3:], folder)) if name.startswith("hf-") else timm_backbone(name)


def gradients(model, pixels, labels, *, training):
    """Logits, and the gradients with respect to pixels (as in the attack) or parameters (as in training)."""
    torch.manual_seed(1)
    if training:
        model.train().zero_grad()
        output = model(pixels)
        F.cross_entropy(output.logits, labels).backward()
        return [output.logits, *(p.grad for p in model.parameters() if p.grad is not None)]
    pixels = pixels.clone().requires_grad_(True)
    with frozen_eval(model):
        logits = model(pixels).logits
        return [logits, torch.autograd.grad(margin(logits, labels).sum(), pixels)[0]]


@pytest.mark.parametrize("option", [use_channels_last, checkpoint_gradients, keep_first_convolution_in_fp32])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_logits_and_gradients(name, option, tmp_path):
    plain = network(name, tmp_path / "source")
    changed = copy.deepcopy(plain)
    if option is checkpoint_gradients and name in ("hf-convnext", "hf-resnet"):
        with pytest.raises(BackboneError, match="--grad-checkpointing: transformers offers none"):
            option(changed)
        return
    for _ in range(2):  # again has no effect
        option(changed)
    pixels, labels = torch.rand(4, 3, *plain.preprocessing.size), torch.arange(4) % plain.num_classes
    exact = option is checkpoint_gradients
    for training in (False, True):
        pairs = [gradients(model, pixels, labels, training=training) for model in (plain, changed)]
        for expected, found in zip(*pairs, strict=True):
            scale = float(expected.detach().abs().max())
            torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5 * scale)
    names = [name for name, _ in plain.named_parameters()]
    assert names == [name for name, _ in changed.named_parameters()]


def test_a_network_of_another_layout_is_one_clear_error():
    class Flat(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)[:, : len(x)]

    backbone = tiny_backbone()
    backbone.body = Flat()
    with pytest.raises(BackboneError, match=r"--channels-last: resnet18_cifar does not .*--no-channels-last"):
        use_channels_last(backbone)


def test_images_at_a_time_go_by_the_largest_layer():
    model = load_backbone("resnet18", image_size=32)  # its largest is the first: 64 channels of 16x16
    assert images_for_the_cache(model, "no") == 2**24 // (64 * 16 * 16 * 4)
    assert images_for_the_cache(model, "bf16") == 2 * images_for_the_cache(model, "no")
    assert images_for_the_cache(load_backbone("resnet18", image_size=256), "no") == 8
    assert images_for_the_cache(load_backbone("resnet18", image_size=256), "bf16") == 16


def test_fewer_activations_are_kept():
    plain = load_backbone(
        "vit_tiny_patch16_224", num_classes=3, image_size=32, model_args={"depth": 4, "embed_dim": 48}
    )
    changed = copy.deepcopy(plain)
    checkpoint_gradients(changed)
    kept = []
    for model in (plain, changed):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            model.train()(torch.rand(2, 3, 32, 32))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_no_checkpointing_is_one_clear_error(tmp_path):
    class Without(nn.Module):
        def set_grad_checkpointing(self, enable=True):
            assert not enable, "gradient checkpointing not supported"

    backbone = tiny_backbone()
    backbone.body = Without()
    with pytest.raises(BackboneError, match="--grad-checkpointing: timm offers none for resnet18_cifar"):
        checkpoint_gradients(backbone)


def test_synchronised_batchnorm_is_for_gpus_and_keeps_the_weights(tmp_path):
    with pytest.raises(ConfigError, match="--sync-bn needs GPUs"):
        finetune(tiny_config(tmp_path, sync_bn=True))
    plain = tiny_backbone()
    changed = copy.deepcopy(plain)
    synchronise_batchnorm(changed)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in changed.modules())
    assert not any(type(module) is nn.BatchNorm2d for module in changed.modules())
    assert changed.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(changed.eval()(pixels).logits, plain.eval()(pixels).logits)


def test_synchronised_twice_keeps_the_activations_of_timms_layers():
    plain = load_backbone("efficientnet_lite0", image_size=32, num_classes=5)
    changed = copy.deepcopy(plain)
    for _ in range(2):
        synchronise_batchnorm(changed)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(changed.eval()(pixels).logits, plain.eval()(pixels).logits)


@pytest.mark.parametrize("name", ["resnet18", "hf-resnet"])
def test_the_attack_finds_the_same_with_all_exact_options(name, tmp_path):
    """In fp32: the signs of every step but for a pixel in a thousand, and all verdicts."""
    plain = network(name, tmp_path / "source").eval()
    for module in plain.modules():  # a fresh BatchNorm is the identity, which folding would not change
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
    changed = copy.deepcopy(plain)
    use_channels_last(changed)
    fast = step.for_eval_passes(FinetuneConfig(), changed)
    assert isinstance(fast, FoldedNetwork)
    pixels = torch.rand(24, 3, *plain.preprocessing.size)
    labels = plain(pixels).logits.argmax(dim=1)
    eps, step_size = 64 / 255, 16 / 255
    numbers = {"eps": eps, "step_size": step_size, "steps": 10}
    point = random_in_ball(pixels, eps=eps, norm="linf")
    start, ends = point, []
    with frozen_eval(plain):
        for _ in range(10):
            gradients = []
            for model in (plain, fast):
                x = point.clone().requires_grad_(True)
                gradients.append(torch.autograd.grad(margin(model(x).logits, labels).sum(), x)[0].sign())
            assert (gradients[0] == gradients[1]).float().mean() > 0.999
            point = project(point + step_size * gradients[0], pixels, eps=eps, norm="linf")
        for model, at_once in ((plain, None), (fast, 7)):
            attack = partial(pgd, **numbers, start=start, images_at_once=at_once)
            ends.append(attack(lambda x, model=model: model(x).logits, pixels, labels).adversarial)
        stands = [model(end).logits.argmax(dim=1) == labels for model, end in zip((plain, fast), ends, strict=True)]
    assert torch.equal(*stands)
    assert not stands[0].all()
    assert ((ends[0] - ends[1]).abs() < 1e-6).float().mean() > 0.99


# --- half precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ball_holds_exactly_under_autocast(dtype, norm):
    model, pixels = tiny_backbone().eval(), torch.rand(4, 3, 8, 8)
    use_channels_last(model)
    eps = 8 / 255 if norm == "linf" else 0.5
    with torch.autocast("cpu", dtype=dtype), frozen_eval(model):
        found = pgd(
            lambda x: model(x).logits, pixels, torch.arange(4) % 3, norm=norm, eps=eps, step_size=eps / 2, steps=4,
            generator=torch.Generator().manual_seed(0),
        ).adversarial  # fmt: skip
        noisy = random_in_ball(pixels, eps=eps, norm=norm)
    for perturbed in (found, noisy):
        assert perturbed.dtype == torch.float32
        delta = (perturbed - pixels).flatten(1)
        size = delta.abs().amax() if norm == "linf" else delta.norm(dim=1).amax()
        assert eps / 3 < size <= eps * (1 + 1e-6)
        assert perturbed.min() >= 0
        assert perturbed.max() <= 1


def confident_network():
    """Right and sure of it: cross-entropy far below what fp16 can tell from zero."""
    from tiny import pretrained_state

    narrow = (4, 4, 8, 8)
    model = tiny_backbone(3, narrow)
    model.load_state_dict(pretrained_state(3, narrow))
    with torch.no_grad():
        for layer in model.head.classifiers:
            layer.weight.mul_(8)
            layer.bias.mul_(8)
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(60) % 3
    pixels = ((60 + 70 * labels.view(-1, 1, 1, 1) + 25 * torch.randn(60, 3, 8, 8, generator=generator)) / 255).clamp(
        0, 1
    )
    with torch.no_grad():
        entropy = F.cross_entropy(model.eval()(pixels).logits, labels, reduction="none")
    assert entropy.median() < 1e-3
    return model, pixels, labels


def test_signs_in_fp16_are_those_of_fp32():
    model, pixels, labels = confident_network()

    def signs(loss, scale=1.0, dtype=None):
        x = pixels.clone().requires_grad_(True)
        with frozen_eval(model), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            total = loss(model(x).logits).sum() * scale
            return torch.autograd.grad(total, x)[0].sign()

    def ours(logits):
        return margin(logits, labels)

    def entropy(logits):
        return F.cross_entropy(logits.float(), labels, reduction="none")

    true = signs(ours)
    kept = true != 0
    before = (signs(ours, GRADIENT_SCALE, torch.float16) == true)[kept].float().mean()
    keep_first_convolution_in_fp32(model)
    found = (signs(ours, GRADIENT_SCALE, torch.float16) == true)[kept].float().mean()
    assert found >= 0.99
    assert found > before
    assert (signs(entropy, 1.0, torch.float16) == true)[kept].float().mean() < 0.9


def test_a_layer_in_fp32_copies_with_its_network():
    model = tiny_backbone()
    keep_first_convolution_in_fp32(model)
    twin = copy.deepcopy(model)
    assert isinstance(twin.body.conv1, InFp32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.body.conv1(torch.rand(1, 3, 8, 8).bfloat16()).dtype == torch.float32
    with torch.no_grad():
        twin.body.conv1.weight.zero_()
    assert model.body.conv1(torch.rand(1, 3, 8, 8)).abs().max() > 0


# --- whole runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["arrest", "trades"])
def test_checkpointing_changes_nothing_in_a_run(method, tmp_path):
    changes = {"method": method, "max_steps": 3, "model": vit_folder(tmp_path / "vit")}
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "plain"), **changes))
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "changed"), grad_checkpointing=True, **changes))
    assert same_weights(tmp_path / "plain", tmp_path / "changed")


@pytest.mark.parametrize("changes", [{}, {"grad_accum_steps": 2, "awp_gamma": 0.01}], ids=["plain", "accumulated"])
def test_checkpointing_leaves_batchnorms_statistics(changes, tmp_path):
    """The backward pass computes the training pass again, and they are of one pass a batch all the same."""
    changes = {"max_steps": 2, "export_weights": "last", **changes}
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "plain"), **changes))
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "changed"), grad_checkpointing=True, **changes))
    assert any("running_var" in name for name in load_file(tmp_path / "plain" / "export" / "model.safetensors"))
    assert same_weights(tmp_path / "plain", tmp_path / "changed")


@pytest.mark.parametrize("method", ["arrest", "at", "trades"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_options_combine(method, precision, tmp_path):
    """With one another, averaging, accumulation and resumption."""
    changes = {"method": method, "mixed_precision": precision, "channels_last": True, "grad_checkpointing": True,
               "ema_decay": 0.9, "grad_accum_steps": 2, "clip_grad": 1.0, "checkpoint_every": 1}  # fmt: skip
    finetune(tiny_config(tmp_path, max_steps=1, output_dir=str(tmp_path / "half"), **changes))
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), **changes))
    assert len([line for line in log_lines(tmp_path / "whole") if "loss" in line]) == 2
    again = load_backbone(str(tmp_path / "whole" / "export"))
    assert all(value.isfinite().all() for value in again.state_dict().values())


def test_as_much_is_folded_in_lower_precision(tmp_path, monkeypatch):
    """Also where Accelerate has wrapped the network's forward."""
    folded = {}
    for precision in ("no", "bf16"):
        found = folded[precision] = []
        monkeypatch.setattr(step, "foldable", lambda *args, found=found: found.append(foldable(*args)) or found[-1])
        changes = {"mixed_precision": precision, "output_dir": str(tmp_path / precision), "max_steps": 1}
        finetune(tiny_config(tmp_path, ema_decay=0.5, **changes))
    assert len(folded["no"][0]) > 10
    assert folded["no"] == folded["bf16"]
    assert len(folded["no"]) == 1, "looked for once, in the teacher and its copy that is trained"


@pytest.mark.parametrize("method", ["arrest", "at", "trades"])
def test_folding_and_layout_change_nothing_in_a_run(method, tmp_path, monkeypatch):
    """Validation of averaged weights included."""
    changes = {"method": method, "ema_decay": 0.5, "log_every": 1, "lr": 0.01}
    made = []

    class Counted(FoldedNetwork):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(step, "FoldedNetwork", Counted)
    slow = {"fold_batchnorm": False, "channels_last": False}
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "slow"), **slow, **changes))
    assert not made
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "fast"), **changes))
    assert len(made) == 2 + (method == "arrest")  # the student, its average and the teacher
    slow, fast = (log_lines(tmp_path / name) for name in ("slow", "fast"))
    assert len(slow) == len(fast) == 10
    for one, other in zip(slow, fast, strict=True):
        assert one.keys() == other.keys()
        same = one.keys() - {"phase"}
        assert {key: one[key] for key in same} == pytest.approx({key: other[key] for key in same}, rel=1e-3, abs=1e-4)
    one, other = (load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("slow", "fast"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("arrest", "resnet"), ("at", "vit"), pytest.param("arrest", "vit", marks=pytest.mark.slow)],
)
def test_compiled_training_gives_the_same_and_settles(method, kind, tmp_path, monkeypatch):
    """What the first epoch compiled serves all later ones, though the number of images that are replayed changes."""
    model = vit_folder(tmp_path / "vit") if kind == "vit" else str(write_model(tmp_path / "resnet"))
    changes = {"model": model, "epochs": 3, "lr": 0.02, "replay_threshold": 0.02, "log_every": 1,
               "validation_size": 4, "limit_eval": 8, "method": method}  # fmt: skip
    monkeypatch.setattr(train, "pgd", steady_pgd)
    monkeypatch.setattr(train, "random_in_ball", steady_ball)
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "plain"), **changes))
    of_any_size = []

    def traced(graph, inputs):
        """Traced and differentiated as by the default backend, without the minute that its C++ takes."""
        sizes = [size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else [x])]
        of_any_size.append(any(isinstance(size, torch.SymInt) for size in sizes))
        return lookup_backend("aot_eager")(graph, inputs)

    for network in (Backbone, FoldedNetwork):
        monkeypatch.setattr(network, "compile", lambda self: nn.Module.compile(self, backend=traced))
    validate, graphs = loop.validate, []

    def counted(*args):
        result = validate(*args)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(loop, "validate", counted)
    torch._dynamo.reset()
    counters.clear()
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "compiled"), compile=True, **changes))
    assert 0 < graphs[0] == graphs[-1]
    assert of_any_size
    assert not any(of_any_size), "which are slower; validation images may be fewer than a batch"
    if method == "arrest":
        rates = [line["replay_rate"] for line in log_lines(tmp_path / "compiled") if "replay_rate" in line]
        assert len(set(rates)) > 1
    plain, compiled = (
        load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("plain", "compiled")
    )
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18_cifar", "mobilenetv3_small_050"])
def test_a_network_that_normalises_alone_is_the_one_before_it_was_synchronised(name):
    """timm's own norm layers, which hold their activation, too."""
    small = {"channels": [16, 16, 16, 16]} if name == "resnet18_cifar" else {}
    plain = load_backbone(name, num_classes=3, image_size=32, model_args=small)
    changed = copy.deepcopy(plain)
    synchronise_batchnorm(changed)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in changed.modules())
    normalise_alone(changed)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in changed.modules())
    pixels = torch.rand(4, 3, 32, 32)
    for network in (plain.train(), changed.train()):
        torch.manual_seed(0)
        network(pixels).logits.sum().backward()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), changed.state_dict().values(), strict=True)
    )
    gradients = [[parameter.grad for parameter in network.parameters()] for network in (plain, changed)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_a_cpu_would_miscompute_keeps_the_usual_layout(tmp_path, capsys):
    changes = {"model_args": {"channels": [8, 16, 16, 16]}, "image_size": 8, "standard_epochs": 1, "epochs": 1}
    finetune(tiny_config(tmp_path, model="resnet18_cifar", **changes))
    assert "--channels-last is off: on a CPU the gradient of body.layer2.0.downsample.0" in capsys.readouterr().out
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert saved.channels_last is False
    assert resume_config(saved, {"channels_last": True}).channels_last is False, "the same flags and --resume"
    assert miscomputed_on_cpus(tiny_backbone()) is None, "wide enough, and what other tests have"
    assert miscomputed_on_cpus(load_backbone("vit_tiny_patch16_224", num_classes=3, pretrained=False)) is None


def test_averaged_weights_are_validated_compiled(tmp_path, monkeypatch):
    """Also where nothing can be folded."""
    validate, seen = loop.validate, []

    def kept(run, phase, model, validated, *rest):
        seen.append(validated)
        return validate(run, phase, model, validated, *rest)

    monkeypatch.setattr(loop, "validate", kept)
    monkeypatch.setattr(Backbone, "compile", lambda self: nn.Module.compile(self, backend="eager"))
    changes = {"model": vit_folder(tmp_path / "vit"), "max_steps": 1, "validation_size": 4, "limit_eval": 8}
    finetune(tiny_config(tmp_path, ema_decay=0.9, compile=True, **changes))
    (network,) = seen
    assert isinstance(network, Backbone)
    assert network._compiled_call_impl is not None


def test_what_is_tried_is_tried_on_the_processs_own_gpu(monkeypatch):
    """On another one it would take memory of another process."""
    assert prepare._own_device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank, device in ((None, "cuda:0"), ("2", "cuda:2"), ("6", "cuda:2")):
        monkeypatch.delenv("LOCAL_RANK", raising=False) if rank is None else monkeypatch.setenv("LOCAL_RANK", rank)
        assert prepare._own_device() == device
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert prepare._own_device() == "cpu"
