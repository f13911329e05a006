"""What can be switched on in a network without changing what it computes: layout, memory for time, compilation."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arrest_hub.attacks import frozen_eval
from arrest_hub.backbones import Backbone
from arrest_hub.errors import BackboneError

CACHED = 16 * 2**20
"""Half of the last-level cache of a server's CPU (docs/performance.md has what other sizes give)."""


def compile_problem(device: torch.device | str) -> str | None:
    """Why --compile cannot be used with a device, such as a missing C++ compiler; None if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # it fails in as many ways as there are compilers
        why = " ".join(str(error).split())[:200] or type(error).__name__
        return f"--compile: this machine cannot compile ({why}). Install what is missing, or leave it out."
    return None


def use_channels_last(network: Backbone) -> None:
    """Keep images and convolutions' weights with the channels innermost, as tensor cores and CPUs like them best.

    Raises:
        BackboneError: the network assumes another layout.
    """
    if network.channels_last:
        return
    network.to(memory_format=torch.channels_last)
    network.channels_last = True
    pixels = torch.zeros(2, 3, *network.preprocessing.size, device=network.mean.device, requires_grad=True)
    try:
        with frozen_eval(network), torch.enable_grad():
            torch.autograd.grad(network(pixels).logits.sum(), pixels)
    except RuntimeError as error:
        raise BackboneError(
            f"--channels-last: {network.source.architecture} does not compute with the channels innermost in memory "
            f"({str(error).splitlines()[0]}). Give --no-channels-last."
        ) from error


def miscomputed_on_cpus(network: nn.Module) -> str | None:
    """The name of a convolution whose weights' gradient oneDNN gets wrong where the channels are innermost, at times
    writing beyond it: 1x1 and strided, with fewer channels than a vector has numbers (oneDNN issue 6035)."""
    for name, module in network.named_modules():
        strided = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1
        if strided and module.in_channels < 16:
            return name
    return None


def images_for_the_cache(network: Backbone, mixed_precision: str) -> int:
    """How many images a CPU attacks at a time: as many as keep the largest output of a layer below `CACHED` bytes, so
    that the next layer finds it in the cache, but at least 8, and 16 in half precision, to fill its matrix units."""
    largest = 0

    def look(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel())

    layers = [module for module in network.body.modules() if not list(module.children())]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, *network.preprocessing.size, device=network.mean.device))
    finally:
        for hook in hooks:
            hook.remove()
    bytes_each = 4 if mixed_precision == "no" else 2
    return max(32 // bytes_each, CACHED // (largest * bytes_each))


def checkpoint_gradients(network: Backbone) -> None:
    """Keep no activations within a block and compute them again in the backward pass: less memory, a third more time.

    transformers' networks do so in training mode alone, and so not in the attack.
    Raises BackboneError where the network does not offer it.
    """
    body: Any = network.body
    try:
        if network.source.library == "timm":
            body.set_grad_checkpointing(True)
        else:
            body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (AssertionError, AttributeError, NotImplementedError, ValueError) as error:
        raise BackboneError(
            f"--grad-checkpointing: {network.source.library} offers none for {network.source.architecture}. Leave it "
            "out; a smaller --batch-size with --grad-accum-steps needs less memory too."
        ) from error


def synchronise_batchnorm(network: Backbone) -> None:
    """Have BatchNorm normalise by the whole batch of all processes; names and values of the weights stay."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()):
        return  # converted again, timm's layers would lose their activation
    convert_sync_batchnorm(network)


class OwnBatchNorm(_BatchNorm):
    """What takes the place of a synchronised BatchNorm, timm's with its activation included."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape, as what it replaces takes."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised by the batch of this process."""
        x = super().forward(input)
        for name in ("drop", "act"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


def normalise_alone(network: nn.Module) -> None:
    """Have synchronised BatchNorm normalise by the batch of its own process, waiting for no other."""
    for module in network.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = OwnBatchNorm  # type: ignore[assignment]


class InFp32(nn.Module):
    """Mixed into a layer's class: the layer computes in fp32, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own, with its input as float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())  # type: ignore[misc]


def keep_first_convolution_in_fp32(network: Backbone) -> None:
    """For fp16: the gradient with respect to the pixels is a sum of many small terms, and loses its sign where they
    are rounded to fp16 just before (scripts/benchmarks/gradient_signs.py)."""
    for module in network.body.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            if not isinstance(module, InFp32):
                kind = type(module)
                module.__class__ = type(f"{kind.__name__}InFp32", (InFp32, kind), {})
            return


def freeze_head(network: Backbone) -> None:
    """Train the network below its classification head alone, which stays the pretrained one: where the student's
    representation nears the teacher's, so do its logits (as in SimKD, Chen et al. 2022, arXiv 2203.14001).
    """
    network.head.requires_grad_(False)
