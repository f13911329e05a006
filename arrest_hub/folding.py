"""BatchNorm folded into the convolutions before it: in eval mode the same logits, to rounding, for less work.

In eval mode BatchNorm is a scale and a shift of each channel, which a convolution can have in its weight and bias
(as `torch.nn.utils.fusion.fuse_conv_bn_eval` does). Which convolution a BatchNorm follows is seen in one forward pass.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn

from arrest_hub.attacks import modes_kept

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)
TOLERANCE = 1e-3
"""Largest difference of the logits, relative to the largest of them, that is still rounding; a wrong pair gives 1."""


def foldable(network: nn.Module, images: Tensor) -> dict[str, str]:
    """Convolution -> the BatchNorm that can be folded into it, by name: where that leaves all logits as they are.

    Args:
        network: images -> logits, an object with ``logits``, or a tuple that begins with them. It is not changed.
        images: [B, 3, H, W] in [0, 1] on the CPU, of a size that the network takes; two are enough.

    Raises what the network raises for these images.
    """
    if not any(_folds(module) for module in network.modules()):
        return {}
    _forget(network)
    plain = copy.deepcopy(network)
    plain.__dict__.pop("forward", None)  # Accelerate's, which computes in lower precision
    plain = plain.cpu().eval().requires_grad_(False)  # the CPU rounds least
    pairs = _pairs(plain, images)
    if pairs and not _same_logits(plain, pairs, images):
        pairs = {conv: norm for conv, norm in pairs.items() if _same_logits(plain, {conv: norm}, images)}
    return pairs


class FoldedNetwork(nn.Module):
    """A network as it is in eval mode, without gradients to its parameters, its BatchNorm folded.

    Made where the network is, and not to be moved. Shares the network's tensors, but for what is folded, which
    follows when `refresh` is called.

    Args:
        network: images -> anything. It is not changed.
        pairs: what `foldable` found, at least one.
        dtype: of the folded weights and biases: autocast's own, where passes run under autocast, so that they are
            rounded once and not in every pass. Default: the network's.
    """

    def __init__(self, network: nn.Module, pairs: dict[str, str], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        _forget(network)
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
        shared |= {id(buffer): buffer for buffer in network.buffers()}
        self.network = copy.deepcopy(network, shared)
        self._remembers = any(type(module).train is not nn.Module.train for module in network.modules())
        self._convs: list[Any] = [network.get_submodule(name) for name in pairs]
        self._norms: list[Any] = [network.get_submodule(name) for name in pairs.values()]
        self._own: list[Any] = []
        with torch.no_grad():
            first = self._convs[0].weight
            channels = [conv.out_channels for conv in self._convs]
            self._biases = torch.zeros(sum(channels), device=first.device, dtype=dtype or first.dtype)
            eps = [norm.eps for norm in self._norms]
            self._eps = torch.tensor(eps).repeat_interleave(torch.tensor(channels)).to(first)
            for conv_name, norm_name, bias in zip(pairs, pairs.values(), self._biases.split(channels), strict=True):
                own: Any = self.network.get_submodule(conv_name)
                own.weight = nn.Parameter(torch.empty_like(own.weight, dtype=dtype), requires_grad=False)
                own.bias = nn.Parameter(bias, requires_grad=False)
                self._own.append(own)
                norm: Any = self.network.get_submodule(norm_name)
                left = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
                self.network.set_submodule(norm_name, left)
        self.eval()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights and running statistics that the network has now."""
        weight, bias, mean, variance = (
            torch.cat([getattr(norm, name) for norm in self._norms])
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * torch.rsqrt(variance + self._eps)
        shift = bias - mean * scale
        channels = [conv.out_channels for conv in self._convs]
        for conv, own, factor, offset in zip(
            self._convs, self._own, scale.split(channels), shift.split(channels), strict=True
        ):
            torch.mul(conv.weight, factor.view(-1, 1, 1, 1), out=own.weight)
            if conv.bias is not None:
                offset.add_(conv.bias * factor)
        self._biases.copy_(shift)
        if self._remembers:  # in every step: half a millisecond
            _forget(self.network)

    def forward(self, images: Tensor) -> Any:
        """What the network gives in eval mode."""
        return self.network(images)


def _forget(network: nn.Module) -> None:
    """Some networks (LeViT) keep what they computed from their weights in eval mode until they change their mode."""
    with modes_kept(network):
        network.train(not network.training)


def _folds(module: nn.Module) -> bool:
    return type(module) in NORMS and bool(module.track_running_stats) and bool(module.affine)


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
        elif _folds(module):
            hooks.append(module.register_forward_pre_hook(lambda _m, inputs, name=name: before(name, inputs[0])))
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {conv: norm for conv, norm in found.items() if calls[conv] == 1 and calls[norm] == 1}


def _same_logits(plain: nn.Module, pairs: dict[str, str], images: Tensor) -> bool:
    """Whether folding leaves the logits as they are, whatever the weights: with random statistics, which ``plain``
    keeps, since a BatchNorm that is near the identity would hide a convolution whose output has another reader too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in pairs.values():
            norm: Any = plain.get_submodule(name)
            for tensor, low, high in (
                (norm.running_mean, -0.2, 0.2),
                (norm.running_var, 0.5, 2.0),
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.2, 0.2),
            ):
                tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
        expected, got = _logits(plain(images)), _logits(FoldedNetwork(plain, pairs)(images))
    return bool((expected - got).abs().max() <= TOLERANCE * expected.abs().max())


def _logits(output: Any) -> Tensor:
    if hasattr(output, "logits"):
        output = output.logits
    return output[0] if isinstance(output, tuple) else output
