"""Whether float32 products and convolutions may be rounded to TF32 on a GPU: read, chosen, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


def tf32_allowed() -> tuple[bool, bool]:
    """Of convolutions and of matrix products.

    By torch's newer switches, which hold whichever were used: the older ones (``allow_tf32``) may not be read where
    these were set, and do not say what a "none" of theirs inherits.
    """
    everything: Any = torch.backends
    overall, cudnn = everything.fp32_precision, everything.cudnn
    convolutions = _first_said(cudnn.conv.fp32_precision, cudnn.fp32_precision, overall)
    return convolutions == "tf32", _first_said(everything.cuda.matmul.fp32_precision, overall) == "tf32"


def _first_said(*values: str) -> str:
    """What holds: of those that say "none", the more general one."""
    return next((value for value in values if value != "none"), "none")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 or none, until the end of the block; on a CPU nothing less than float32 either (oneDNN's TF32 and bf16).

    By both of torch's kinds of switches, where the older can be read: whoever reads those within gets an answer too.
    """
    backends: Any = torch.backends
    gpu = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    cpu = backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn
    before = [module.fp32_precision for module in (*gpu, *cpu)]
    older: tuple[bool, str] | None = None
    with suppress(RuntimeError):  # torch refuses where only the newer ones were set
        older = backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    if older is not None:
        backends.cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision("high" if allowed else "highest")
    for module in gpu:
        module.fp32_precision = "tf32" if allowed else "ieee"
    for module in cpu:
        module.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            backends.cudnn.allow_tf32 = older[0]
            torch.set_float32_matmul_precision(older[1])
        for module, value in zip((*gpu, *cpu), before, strict=True):
            module.fp32_precision = value
