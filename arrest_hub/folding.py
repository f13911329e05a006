"""BatchNorm folded into the convolutions before it: in eval mode the same logits, to rounding, for less work.

In eval mode BatchNorm is a scale and a shift of each channel, which a convolution can have in its weight and bias
(as `torch.nn.utils.fusion.fuse_conv_bn_eval` does). Which convolution a BatchNorm follows is seen in one forward pass.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-3
"""Largest difference of the logits, relative to the largest of them, that is still rounding; a wrong pair gives 1."""


class FoldedNetwork(nn.Module):
    """A copy of ``network`` for eval mode, without gradients to its parameters, its BatchNorm folded where it can be.

    Follows the network's weights only when `refresh` is called. ``pairs`` names the convolutions and the BatchNorm
    layers folded into them; a pair whose folding would change what the network computes is left as it is.

    Args:
        network: images -> logits, or a tuple that begins with them. It is not changed.
        images: [B, 3, H, W] in [0, 1], of a size that the network takes, on its device; two are enough.

    Raises what the network raises for these images.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        plain = copy.deepcopy(network).eval().requires_grad_(False)
        self.pairs = _pairs(plain, images)
        if self.pairs and not _same_logits(plain, self.pairs, images):
            self.pairs = {c: n for c, n in self.pairs.items() if _same_logits(plain, {c: n}, images)}
        self.network = _folded(plain, self.pairs)

    @torch.no_grad()
    def refresh(self, network: nn.Module) -> None:
        """Take over the weights and running statistics that ``network`` has now."""
        _copy_weights(network, self.network, self.pairs)

    def forward(self, images: Tensor) -> Any:
        """What the network gives in eval mode."""
        return self.network(images)


def _pairs(network: nn.Module, images: Tensor) -> dict[str, str]:
    """Convolution -> BatchNorm, by name, where the output of the one is the input of the other and each runs once."""
    made_by: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no id is given twice
    found: dict[str, str] = {}
    calls: Counter[str] = Counter()

    def after(name: str, output: Tensor) -> None:
        calls[name] += 1
        kept.append(output)
        made_by[id(output)] = name

    def before(name: str, image: Tensor) -> None:
        calls[name] += 1
        if id(image) in made_by:
            found[made_by[id(image)]] = name

    hooks = []
    for name, module in network.named_modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(lambda _m, _i, output, name=name: after(name, output)))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.track_running_stats and module.affine:
            hooks.append(module.register_forward_pre_hook(lambda _m, inputs, name=name: before(name, inputs[0])))
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {conv: norm for conv, norm in found.items() if calls[conv] == 1 and calls[norm] == 1}


def _same_logits(network: nn.Module, pairs: dict[str, str], images: Tensor) -> bool:
    """Whether folding leaves the logits as they are, whatever the weights: with random statistics, since a BatchNorm
    that is near the identity would hide a convolution whose output has another reader too."""
    plain = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for name in pairs.values():
        norm: Any = plain.get_submodule(name)
        for tensor, low, high in (
            (norm.running_mean, -0.2, 0.2),
            (norm.running_var, 0.5, 2.0),
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.2, 0.2),
        ):
            tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    folded = _folded(plain, pairs)
    with torch.no_grad():
        expected, got = _logits(plain(images)), _logits(folded(images))
    return bool((expected - got).abs().max() <= TOLERANCE * expected.abs().max())


def _folded(network: nn.Module, pairs: dict[str, str]) -> nn.Module:
    folded = copy.deepcopy(network)
    for conv_name, norm_name in pairs.items():
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        left = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, left.eval())
    with torch.no_grad():
        _copy_weights(network, folded, pairs)
    return folded


def _copy_weights(source: nn.Module, folded: nn.Module, pairs: dict[str, str]) -> None:
    # all names of a shared weight: folding it for one convolution then shows in the other, and is refused
    own = dict(folded.named_parameters(remove_duplicate=False)) | dict(folded.named_buffers(remove_duplicate=False))
    for name, tensor in (*source.named_parameters(), *source.named_buffers()):
        if name in own and name.rpartition(".")[0] not in pairs:
            own[name].copy_(tensor)
    for conv_name, norm_name in pairs.items():
        conv: Any = source.get_submodule(conv_name)
        norm: Any = source.get_submodule(norm_name)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        own[f"{conv_name}.weight"].copy_(weight)
        own[f"{conv_name}.bias"].copy_(bias)


def _logits(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
