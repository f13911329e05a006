"""The folded network is the network: logits, gradients to the pixels, and after an update of the weights."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import arrest_hub.architectures  # noqa: F401  registers the networks below
from arrest_hub.folding import FoldedNetwork


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
    twin = FoldedNetwork(network, images)
    assert len(twin.pairs) == folded
    for expected, got in zip(pixel_gradient(network, images), pixel_gradient(twin, images), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_refresh_follows_the_weights() -> None:
    torch.manual_seed(0)
    network = randomised(timm.create_model("resnet18_cifar", channels=[8, 8, 16, 16]))
    images = torch.rand(4, 3, 16, 16)
    twin = FoldedNetwork(network, images)
    before = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
        torch.testing.assert_close(twin(images), before(images))
        twin.refresh(network)
        torch.testing.assert_close(twin(images), network(images))
        assert not torch.allclose(twin(images), before(images))


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
    twin = FoldedNetwork(network, images)
    assert twin.pairs == {}
    torch.testing.assert_close(twin(images), network(images))


class TiedWeights(nn.Module):
    """Two convolutions with one weight, each before a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.conv2.weight = self.conv1.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(images)))).mean(dim=(2, 3))


def test_convolutions_with_a_common_weight_are_left_alone() -> None:
    torch.manual_seed(0)
    network = randomised(TiedWeights())
    images = torch.rand(2, 3, 8, 8)
    twin = FoldedNetwork(network, images)
    assert twin.pairs == {}
    torch.testing.assert_close(twin(images), network(images))
