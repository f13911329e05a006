"""Whether float32 products and convolutions may be rounded to TF32 on a GPU: read, chosen, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def tf32_allowed() -> tuple[bool, bool]:
    """Of convolutions and of matrix products."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    try:
        return cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:  # torch refuses to read them where `fp32_precision` was set
        everything: Any = torch.backends
        overall = everything.fp32_precision
        convolutions = _first_said(cudnn.conv.fp32_precision, cudnn.fp32_precision, overall)
        return convolutions == "tf32", _first_said(matmul.fp32_precision, overall) == "tf32"


def _first_said(*values: str) -> str:
    """What holds: of those that say "none", the more general one."""
    return next((value for value in values if value != "none"), "none")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 or none, until the end of the block."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    try:
        before = cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:
        modules: tuple[Any, ...] = matmul, cudnn.conv, cudnn.rnn
        chosen = [module.fp32_precision for module in modules]
        for module in modules:
            module.fp32_precision = "tf32" if allowed else "ieee"
        try:
            yield
        finally:
            for module, value in zip(modules, chosen, strict=True):
                module.fp32_precision = value
        return
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
