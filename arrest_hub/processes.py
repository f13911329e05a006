"""What the processes of a run decide together, so that none waits for one that has stopped."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.distributed_c10d import _get_default_store

from arrest_hub.errors import AlreadyReported, ArrestError

T = TypeVar("T")
_calls = itertools.count()
"""Of `main_only`, in this process."""


def processes_here(accelerator: Accelerator) -> int:
    """How many of the run's processes share this machine: launchers say so; without one all do."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


def main_first(accelerator: Accelerator, load: Callable[[], T]) -> T:
    """``load()`` in the main process, then, from its caches, in the others.

    Raises:
        ArrestError: what any of them found, of which another node's disk may give less; in all of them, so that none
            waits for another (AlreadyReported where it is not the main process).
    """
    result = main_only(accelerator, load)
    problem = None
    if not accelerator.is_main_process:
        try:
            result = load()
        except ArrestError as error:
            problem = f"process {accelerator.process_index} on {socket.gethostname()}: {error}"
    raise_together(accelerator, problem)
    return result  # type: ignore[return-value]


def main_only(accelerator: Accelerator, call: Callable[[], T]) -> T | None:
    """``call()`` in the main process alone; None in the others, which wait, however long it takes. Every process must
    call it.

    Raises:
        Exception: what the main process met with, be it an ArrestError or a full disk; the others AlreadyReported.
    """
    error: Exception | None = None
    result: T | None = None
    if accelerator.is_main_process:
        try:
            result = call()
        except Exception as found:
            error = found
    if accelerator.num_processes > 1:
        _wait_for_main(accelerator)
    (failed,) = broadcast_object_list([error is not None])
    if failed:
        raise error or AlreadyReported
    return result


def _wait_for_main(accelerator: Accelerator) -> None:
    """Until the main process is here too, as often as the others. A collective would end the run when a download takes
    longer than --ddp-timeout; where the main process dies, its launcher ends the others."""
    if dist.get_backend() == "mpi":  # which has no store
        return
    store, key = _get_default_store(), f"arrest_hub/main/{next(_calls)}"
    if accelerator.is_main_process:
        store.set(key, "here")
        return
    pause = 0.001
    while not store.check([key]):
        time.sleep(pause)
        pause = min(1.0, 2 * pause)


def from_main(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """``call()`` in the main process, and its result (picklable) in every one. Raises as `main_only` does."""
    (result,) = broadcast_object_list([main_only(accelerator, call)])
    return result


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process. Every process must call it; costs nothing where there is one."""
    if accelerator.num_processes == 1:
        return flag
    return bool(_how_many(accelerator, flag).item())


def _how_many(accelerator: Accelerator, flag: bool) -> torch.Tensor:
    # full: torch.tensor would wait for what the device is doing
    return accelerator.reduce(torch.full((), float(flag), device=accelerator.device), "sum")


class AnyProcessBefore:
    """As `any_process`, of several processes with the answer to the call before: what is asked in every step must not
    wait for the step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._asked: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, flag: bool) -> bool:
        """Every process must call it."""
        if self.accelerator.num_processes == 1:
            return flag
        before, self._asked = self._asked, self._ask(flag)
        if before is None:
            return False
        answer, there = before
        if there is not None:
            there.synchronize()
        return bool(answer.item())

    def _ask(self, flag: bool) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The answer, and on a GPU when it will have come to the CPU: ``item`` would wait for all given to the GPU
        since."""
        answer = _how_many(self.accelerator, flag)
        if answer.device.type != "cuda":
            return answer, None
        copied, there = answer.to("cpu", non_blocking=True), torch.cuda.Event()
        there.record()
        return copied, there


def raise_together(accelerator: Accelerator, problem: str | None) -> None:
    """Stop every process if any has a problem. Every process must call it.

    Raises:
        ArrestError: the problems found, in the main process; AlreadyReported in the others.
    """
    found = [text for text in gather_object([problem]) if text is not None]
    if found:
        raise ArrestError("\n".join(dict.fromkeys(found))) if accelerator.is_main_process else AlreadyReported
