"""What the processes of a run decide together, so that none waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from arrest_hub.errors import AlreadyReported, ArrestError

T = TypeVar("T")


def main_first(accelerator: Accelerator, load: Callable[[], T]) -> T:
    """``load()`` in the main process, then, from its caches, in the others.

    Raises:
        ArrestError: what the main process found; the others raise AlreadyReported instead of waiting for it.
    """
    result = main_only(accelerator, load)
    if not accelerator.is_main_process:
        result = load()
    accelerator.wait_for_everyone()
    return result  # type: ignore[return-value]


def main_only(accelerator: Accelerator, call: Callable[[], T]) -> T | None:
    """``call()`` in the main process alone; None in the others. Every process must call it.

    Raises:
        ArrestError: what the main process found; the others raise AlreadyReported.
    """
    error: ArrestError | None = None
    result: T | None = None
    if accelerator.is_main_process:
        try:
            result = call()
        except ArrestError as found:
            error = found
    (failed,) = broadcast_object_list([error is not None])
    if failed:
        raise error or AlreadyReported
    return result


def from_main(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """``call()`` in the main process, and its result (picklable) in every one. Raises as `main_only` does."""
    (result,) = broadcast_object_list([main_only(accelerator, call)])
    return result


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process. Every process must call it; costs nothing where there is one."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def raise_together(accelerator: Accelerator, problem: str | None) -> None:
    """Stop every process if any has a problem. Every process must call it.

    Raises:
        ArrestError: the problems found, in the main process; AlreadyReported in the others.
    """
    found = [text for text in gather_object([problem]) if text is not None]
    if found:
        raise ArrestError("\n".join(dict.fromkeys(found))) if accelerator.is_main_process else AlreadyReported
