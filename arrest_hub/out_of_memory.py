"""A device whose memory is full: how to tell, and how many images at once it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory

from arrest_hub.errors import ArrestError, first_line
from arrest_hub.processes import any_process

TEXTS = (
    "out of memory",
    "can't allocate memory",
    "unable to find an engine to execute this computation",  # what is left of it when every plan of cuDNN failed so
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What CUDA's libraries say, in a plain RuntimeError, near a full memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error of torch means."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


@contextmanager
def full_memory_told(cure: str) -> Iterator[None]:
    """A full memory within this context is one clear error, which says what is too much and what to do: ``cure``.

    Raises:
        ArrestError: in place of what torch raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ArrestError(f"the device has too little memory ({first_line(error)[:100]}): {cure}") from error


def fitting_batch(attempt: Callable[[int], object], batch_size: int, accelerator: Accelerator) -> int:
    """``batch_size``, halved until ``attempt`` of so many images runs out of memory in no process.

    Every process must call it. A single image is not attempted: what it needs is needed in any case.
    """
    while batch_size > 1:
        full = False
        try:
            attempt(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            full = True
        if full:  # outside the handler, which holds on to what was allocated
            release_memory()  # compiled networks are cycles
        if not any_process(accelerator, full):
            break
        batch_size //= 2
    return batch_size
