"""The folded network is the network: logits, gradients to the pixels, and after an update of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from tiny import tiny_backbone
from torch import nn

import arrest_hub.architectures  # noqa: F401  registers the networks below
from arrest_hub.baselines import StandardObjective
from arrest_hub.config import FinetuneConfig
from arrest_hub.folding import FoldedNetwork, foldable
from arrest_hub.step import for_eval_passes, train_step


def randomised(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


def pixel_gradient(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.clone().requires_grad_(True)
    logits = network(images)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), images)[0]


@pytest.mark.parametrize(
    ("name", "args", "size", "folded"),
    [
        ("resnet18_cifar", {"channels": [8, 8, 16, 16]}, 16, 21),
        ("preact_resnet18_cifar", {"channels": [8, 8, 16, 16], "stem_channels": 8}, 16, 8),
        ("efficientnet_lite0", {}, 32, 49),  # activations inside the BatchNorm layers, depthwise convolutions
        ("test_vit", {}, 160, 0),
    ],
)
def test_same_logits_and_gradients(name: str, args: dict, size: int, folded: int) -> None:
    torch.manual_seed(0)
    network = randomised(timm.create_model(name, num_classes=5, **args)).double()
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    pairs = foldable(network, images)
    assert len(pairs) == folded
    twin = FoldedNetwork(network, pairs) if pairs else network
    for expected, got in zip(pixel_gradient(network, images), pixel_gradient(twin, images), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


class WithBias(nn.Module):
    """A convolution with a bias of its own before the BatchNorm, and one that is not followed by any."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-2)
        self.other = nn.Conv2d(4, 5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.other(self.norm(self.conv(images)).relu()).mean(dim=(2, 3))


@pytest.mark.parametrize("build", [partial(timm.create_model, "resnet18_cifar", channels=[8, 8, 16, 16]), WithBias])
def test_refresh_follows_the_weights(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = randomised(build())
    images = torch.rand(4, 3, 16, 16)
    twin = FoldedNetwork(network, foldable(network, images))
    before = network(images)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), before)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
        twin.refresh()
        torch.testing.assert_close(twin(images), network(images))
        assert not torch.allclose(twin(images), before)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_training_the_network_is_not_disturbed_and_costs_no_second_copy_of_what_is_not_folded() -> None:
    torch.manual_seed(0)
    network = randomised(WithBias())
    images = torch.rand(4, 3, 16, 16)
    twin = FoldedNetwork(network, foldable(network, images))
    network.train()
    network(images).sum().backward()
    assert not twin.training
    assert not any(module.training for module in twin.modules())
    assert twin.network.other.weight.data_ptr() == network.other.weight.data_ptr()
    assert twin.network.other.weight.grad is None


def test_in_the_precision_of_autocast_the_passes_are_those_of_weights_rounded_in_every_pass() -> None:
    torch.manual_seed(0)
    network = randomised(timm.create_model("resnet18_cifar", channels=[8, 8, 16, 16]))
    images = torch.rand(4, 3, 16, 16)
    pairs = foldable(network, images)
    once, always = FoldedNetwork(network, pairs, torch.bfloat16), FoldedNetwork(network, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for expected, got in zip(pixel_gradient(always, images), pixel_gradient(once, images), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_what_a_network_keeps_from_its_weights_in_eval_mode_follows_them() -> None:
    torch.manual_seed(0)
    network = randomised(timm.create_model("efficientvit_m0", num_classes=5))
    images = torch.rand(2, 3, 224, 224)
    network(images)
    twin = FoldedNetwork(network, foldable(network, images))
    twin(images)
    biases = [parameter for name, parameter in network.named_parameters() if "attention_biases" in name]
    assert biases
    with torch.no_grad():
        for bias in biases:
            bias.normal_()
    network.train().eval()
    twin.refresh()
    torch.testing.assert_close(twin(images), network(images))


def test_synchronised_batchnorm_is_folded_too() -> None:
    torch.manual_seed(0)
    network = randomised(timm.create_model("efficientnet_lite0", num_classes=5))
    images = torch.rand(2, 3, 32, 32)
    plain = network(images)
    network = convert_sync_batchnorm(network).eval()
    pairs = foldable(network, images)
    assert len(pairs) == 49
    torch.testing.assert_close(FoldedNetwork(network, pairs)(images), plain)


class TwoReaders(nn.Module):
    """The output of the convolution goes around its BatchNorm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.conv(images)
        return (self.norm(out) + out).mean(dim=(2, 3))


def test_a_convolution_with_a_second_reader_is_left_alone() -> None:
    network = TwoReaders().eval()  # its fresh BatchNorm is the identity, nearly
    images = torch.rand(2, 3, 8, 8)
    assert foldable(network, images) == {}


class TiedWeights(nn.Module):
    """Two convolutions with one weight, each before a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.conv2.weight = self.conv1.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(images)))).mean(dim=(2, 3))


def test_a_common_weight_is_folded_for_each_convolution() -> None:
    torch.manual_seed(0)
    network = randomised(TiedWeights())
    images = torch.rand(2, 3, 8, 8)
    pairs = foldable(network, images)
    assert len(pairs) == 2
    twin = FoldedNetwork(network, pairs)
    torch.testing.assert_close(twin(images), network(images))


def test_looking_at_a_network_leaves_each_modules_mode() -> None:
    network = WithBias().train()
    network.norm.eval()
    images = torch.rand(2, 3, 16, 16)
    FoldedNetwork(network, foldable(network, images)).refresh()
    assert [network.training, network.conv.training, network.norm.training] == [True, True, False]


def test_what_is_attacked_has_the_weights_of_the_step() -> None:
    """The attack follows the student as the step before left it, and gradients are clipped once a step."""
    config = FinetuneConfig(model="resnet18_cifar", dataset="digits")
    student = tiny_backbone(3)
    attacked = for_eval_passes(config, student)
    assert isinstance(attacked, FoldedNetwork)
    seen: list[float] = []

    class Watching(StandardObjective):
        def prepare(self, network, pixels, labels, generator):  # type: ignore[no-untyped-def]
            with torch.no_grad():
                plain = copy.deepcopy(student).eval()(pixels).logits
                seen.append(float((network(pixels).logits - plain).abs().max() / plain.abs().max()))
            return super().prepare(network, pixels, labels, generator)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(student.train(), torch.optim.SGD(student.parameters(), lr=0.5))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator)
    batch = {"pixels": pixels, "label": torch.arange(4) % 3}
    parts = [train_step(accelerator, model, attacked, Watching(), optimizer, batch, generator, 1.0) for _ in range(4)]
    assert max(seen) < 1e-4
    assert ["grad_norm" in part for part in parts] == [False, True, False, True]
