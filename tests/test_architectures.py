"""CIFAR-sized architectures: what timm knows of them, their sizes, and their forward pass."""

import pytest
import timm
import torch

import arrest_hub.architectures  # registers them

NARROW = {
    "resnet18_cifar": {"channels": (4, 8, 8, 16)},
    "preact_resnet18_cifar": {"channels": (4, 8, 8, 16), "stem_channels": 4},
    "wide_resnet28_10_cifar": {"depth": 10, "width": 1},
    "wide_resnet34_10_cifar": {"depth": 16, "width": 1},
}
PARAMETERS = {
    "resnet18_cifar": 11_173_962,
    # 11,171,146 without the final batch norm of He et al. 2016, which has 2 x 512
    "preact_resnet18_cifar": 11_171_146 + 1024,
    "wide_resnet28_10_cifar": 36_479_194,
    "wide_resnet34_10_cifar": 46_160_474,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NARROW)
def test_timm_interface(name):
    model = timm.create_model(name, num_classes=7, drop_rate=0.1, **NARROW[name]).eval()
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["mean"] == (0.4914, 0.4822, 0.4465)
    assert model.pretrained_cfg["std"] == (0.2470, 0.2435, 0.2616)
    assert model.pretrained_cfg["crop_pct"] == 1.0
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).kernel_size == (3, 3)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    for size in (8, 32):
        x = torch.randn(2, 3, size, size)
        features = model.forward_features(x)
        before = model.forward_head(features, pre_logits=True)
        assert before.shape == (2, model.num_features)
        torch.testing.assert_close(model(x), model.get_classifier()(before))
        stride = 8 if "wide" not in name else 4
        assert features.shape[-1] == size // stride
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3


def test_resnet18_keeps_timms_names():
    ours = timm.create_model("resnet18_cifar", num_classes=10).state_dict()
    theirs = timm.create_model("resnet18", num_classes=10).state_dict()
    assert list(ours) == list(theirs)
    assert {k for k in ours if ours[k].shape != theirs[k].shape} == {"conv1.weight"}


@pytest.mark.parametrize("name", NARROW)
def test_features_and_gradients(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 2, 3), **NARROW[name])
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    maps = model(x)
    assert [m.shape[-1] for m in maps] == [16 // r for r in model.feature_info.reduction()]
    maps[-1].square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_preactivation_block_against_the_papers_formula():
    torch.manual_seed(0)
    block = arrest_hub.architectures.PreActBlock(4, 8, stride=2).eval()
    x = torch.randn(2, 4, 8, 8)
    activated = torch.relu(block.bn1(x))
    expected = block.conv2(torch.relu(block.bn2(block.conv1(activated)))) + block.downsample(activated)
    torch.testing.assert_close(block(x), expected)
    same = arrest_hub.architectures.PreActBlock(4, 4).eval()
    assert same.downsample is None
    torch.nn.init.zeros_(same.conv2.weight)
    torch.testing.assert_close(same(x), x)  # the identity path is not activated


def test_dropout_inside_the_blocks():
    model = timm.create_model("wide_resnet28_10_cifar", depth=10, width=1, block_dropout=0.5)
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("depth", [4, 27, 29])
def test_wide_resnet_depth_must_fit(depth):
    with pytest.raises(ValueError, match="6n \\+ 4"):
        timm.create_model("wide_resnet28_10_cifar", depth=depth)
