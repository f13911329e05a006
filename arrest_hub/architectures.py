"""CIFAR-sized networks in timm's registry: importing this module registers them.

    import timm, arrest_hub.architectures
    timm.create_model("wide_resnet28_10_cifar")

They take 3-channel images from 8x8 pixels up (32x32 by default), subsample by 8 (the wide ones by 4) and
follow timm's model interface. No weights are registered: they start from a random initialisation or from a
folder. Sources: ResNet, He et al. 2015 (arXiv 1512.03385); pre-activation ResNet, He et al. 2016 (arXiv
1603.05027); wide ResNet, Zagoruyko & Komodakis 2016 (arXiv 1605.07146).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PreActResNet"]  # register_model adds each entry point

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "min_input_size": (3, 8, 8),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": "conv1",
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": _cfg(),
        "preact_resnet18_cifar": _cfg(),
        "wide_resnet28_10_cifar": _cfg(),
        "wide_resnet34_10_cifar": _cfg(),
    }
)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, **dd: Any) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False, **dd)


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; the projection sees the activated input.

    ``dropout`` (a probability) acts between the convolutions, as in the wide ResNet paper.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.conv1 = _conv3x3(in_channels, out_channels, stride, **dd)
        self.bn2 = nn.BatchNorm2d(out_channels, **dd)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(out_channels, out_channels, **dd)
        self.downsample: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))
        return out + shortcut


class PreActResNet(nn.Module):
    """Pre-activation residual network with a 3x3 stem; the wide ResNets are instances of it.

    ``layers`` and ``channels`` give the blocks and the width of each stage; every stage but the first halves
    the resolution. ``drop_rate`` is the dropout probability before the classifier (timm's meaning),
    ``block_dropout`` the one inside each block (the wide ResNet paper's). A batch norm and a ReLU follow the
    last block, as in both papers; some CIFAR code leaves them out of the ResNet-18.
    """

    def __init__(
        self,
        layers: Sequence[int] = (2, 2, 2, 2),
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_channels: int = 64,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        block_dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(layers) != len(channels):
            raise ValueError(f"layers {layers} and channels {channels} must have one entry a stage each.")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.conv1 = _conv3x3(in_chans, stem_channels, **dd)
        self.feature_info = [{"num_chs": stem_channels, "reduction": 1, "module": "conv1"}]
        width = stem_channels
        for stage, (depth, out) in enumerate(zip(layers, channels, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(PreActBlock(width, out, stride, block_dropout, **dd))
                width = out
            name = f"layer{stage + 1}"
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": out, "reduction": 2**stage, "module": name})
        self.stages = [f"layer{stage + 1}" for stage in range(len(layers))]
        self.bn = nn.BatchNorm2d(width, **dd)
        self.num_features = self.head_hidden_size = width
        self.global_pool, self.fc = create_classifier(width, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = width * self.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier for ``num_classes`` classes (0: none) in place, and change the pooling."""
        weight = self.conv1.weight
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> feature maps [B, num_features, H', W']."""
        x = self.conv1(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return F.relu(self.bn(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps -> logits [B, num_classes], or with ``pre_logits`` the classifier's input."""
        x = self.global_pool(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cifar_resnet(in_chans: int = 3, device: Any = None, dtype: Any = None, **kwargs: Any) -> ResNet:
    """timm's ResNet with a 3x3 stride-1 stem and no max-pool; its state-dict names stay timm's."""
    model: Any = ResNet(in_chans=in_chans, device=device, dtype=dtype, **kwargs)
    model.conv1 = _conv3x3(in_chans, model.conv1.out_channels, device=device, dtype=dtype)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    for stage, info in enumerate(model.feature_info):
        info["reduction"] = 2 ** max(stage - 1, 0)
    return model


def _wide_resnet(variant: str, pretrained: bool, depth: int, width: int, **kwargs: Any) -> PreActResNet:
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"A wide ResNet has 6n + 4 layers (10, 16, 22, 28, 34, 40, ...), not {depth}.")
    args: dict[str, Any] = {
        "layers": ((depth - 4) // 6,) * 3,
        "channels": (16 * width, 32 * width, 64 * width),
        "stem_channels": 16,
    }
    return build_model_with_cfg(PreActResNet, variant, pretrained, **(args | kwargs))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for small images: 11,173,962 parameters with 10 classes.

    ``channels`` and ``layers`` change the widths and depths of the four stages; the stem keeps 64 channels.
    """
    args: dict[str, Any] = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return build_model_with_cfg(_cifar_resnet, "resnet18_cifar", pretrained, **(args | kwargs))


@register_model
def preact_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18 for small images: 11,172,170 parameters with 10 classes."""
    return build_model_with_cfg(PreActResNet, "preact_resnet18_cifar", pretrained, **kwargs)


@register_model
def wide_resnet28_10_cifar(pretrained: bool = False, depth: int = 28, width: int = 10, **kwargs: Any) -> PreActResNet:
    """Wide ResNet-28-10: 36,479,194 parameters with 10 classes. ``depth`` must be 6n + 4."""
    return _wide_resnet("wide_resnet28_10_cifar", pretrained, depth, width, **kwargs)


@register_model
def wide_resnet34_10_cifar(pretrained: bool = False, depth: int = 34, width: int = 10, **kwargs: Any) -> PreActResNet:
    """Wide ResNet-34-10: 46,160,474 parameters with 10 classes. ``depth`` must be 6n + 4."""
    return _wide_resnet("wide_resnet34_10_cifar", pretrained, depth, width, **kwargs)
