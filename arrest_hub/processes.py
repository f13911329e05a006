"""What the processes of a run decide together, so that none waits for one that has stopped."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.distributed_c10d import _get_default_store

from arrest_hub.errors import AlreadyReported, ArrestError, ConfigError, OtherProcessFailed

T = TypeVar("T")
HERE, REPORTED, FAILED = "here", "reported", "failed"
"""How a process has fared: well, with an ArrestError (the main process tells it), or with another (it tells itself)."""
PULSE, SILENCE = 10.0, 900.0
"""How often, in seconds, a process in `all_arrive` gives a sign of life, and after how long without one it is lost."""
_calls = itertools.count()
"""Of `main_only` and `all_arrive`, in this process."""


def processes_here(accelerator: Accelerator) -> int:
    """How many of the run's processes share this machine: launchers say so; without one all do."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


def main_first(accelerator: Accelerator, load: Callable[[], T]) -> T:
    """``load()`` in the main process, then, from its caches, in the others, each of which may take as long as it
    needs: another machine may have to download it too.

    Raises:
        Exception: as `main_only` and `all_arrive` do. Another machine's disk may give less.
    """
    result = main_only(accelerator, load)
    with all_arrive(accelerator):
        if not accelerator.is_main_process:
            result = load()
    return result  # type: ignore[return-value]


def main_only(accelerator: Accelerator, call: Callable[[], T]) -> T | None:
    """``call()`` in the main process alone; None in the others, which wait, however long it takes. Every process must
    call it.

    Raises:
        Exception: what the main process met with; in the others AlreadyReported, or OtherProcessFailed if that is no
            ArrestError, such as a full disk.
    """
    error: Exception | None = None
    result: T | None = None
    if accelerator.is_main_process:
        try:
            result = call()
        except Exception as found:
            error = found
    if accelerator.num_processes > 1 and dist.get_backend() != "mpi":  # which has no store
        # a collective would end the run when a download takes longer than --ddp-timeout; where the main process dies,
        # its launcher ends the others
        store, key = _get_default_store(), f"arrest_hub/main/{next(_calls)}"
        if accelerator.is_main_process:
            store.set(key, HERE)
        else:
            _wait(lambda: store.check([key]))
    (kind,) = broadcast_object_list([_kind(error)])
    _stop(kind, error)
    return result


@contextmanager
def all_arrive(accelerator: Accelerator) -> Iterator[None]:
    """Within it each process does work of its own; at its end they wait for one another, however long it takes, but
    not for one that fails, or of which nothing is heard any more. Every process must enter it; no collective within.

    Raises:
        Exception: an ArrestError that any process met with, in the main process, and AlreadyReported in the others;
            any other error in the process that met with it, and OtherProcessFailed in the others.
    """
    if accelerator.num_processes == 1:
        yield
        return
    error: Exception | None = None
    if dist.get_backend() == "mpi":  # which has no store
        try:
            yield
        except ArrestError as found:
            error = found
        raise_together(accelerator, None if error is None else _whose(accelerator, error))
        return
    store, key = _get_default_store(), f"arrest_hub/all/{next(_calls)}"
    own = f"{key}/{accelerator.process_index}"
    with _signs_of_life(store, own):
        try:
            yield
        except Exception as found:
            error = found
    if accelerator.is_main_process:
        kind, text = _kind(error), ""
        if error is None:
            kind, text = _hear_all(store, key, accelerator.num_processes)
        store.set(key, kind)
        _stop(kind, ArrestError(text) if kind == REPORTED and error is None else error)
        return
    if error is not None:
        store.set(own, f"{_kind(error)} {_whose(accelerator, error)}")
        if isinstance(error, ArrestError):
            raise AlreadyReported from error
        raise error
    store.set(own, HERE)
    _wait(lambda: store.check([key]))  # raises where the main process is gone, and the store with it
    _stop(store.get(key).decode(), None)


def _kind(error: Exception | None) -> str:
    return HERE if error is None else REPORTED if isinstance(error, ArrestError) else FAILED


def _stop(kind: str, error: Exception | None) -> None:
    """Raise what this process met with, or that another one failed."""
    if kind != HERE:
        other = OtherProcessFailed("another process of the run failed: what it printed says why")
        raise error or (AlreadyReported() if kind == REPORTED else other)


def _whose(accelerator: Accelerator, error: Exception) -> str:
    where = f"process {accelerator.process_index} on {socket.gethostname()}: "
    return ("" if accelerator.is_main_process else where) + str(error)


@contextmanager
def _signs_of_life(store: dist.Store, key: str) -> Iterator[None]:
    """Within it ``key`` of the store changes every `PULSE` seconds."""
    ended = threading.Event()

    def beat() -> None:
        with suppress(RuntimeError):  # the store is gone, and with it the run
            for number in itertools.count():
                store.set(key, str(number))
                if ended.wait(PULSE):
                    return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _hear_all(store: dist.Store, key: str, processes: int) -> tuple[str, str]:
    """In the main process: how the others have fared, once they are all here or one has failed, and what it said."""
    waiting = set(range(1, processes))
    heard: dict[int, tuple[str, float]] = {}

    def lost(rank: int) -> tuple[str, str] | None:
        """What to say where this one has failed or is lost."""
        place, now = f"{key}/{rank}", time.monotonic()
        said = store.get(place).decode() if store.check([place]) else ""
        kind, _, text = said.partition(" ")
        if kind in (REPORTED, FAILED):
            return kind, text
        if kind == HERE:
            waiting.remove(rank)
        elif rank not in heard or heard[rank][0] != said:
            heard[rank] = said, now
        elif now - heard[rank][1] > SILENCE:
            return REPORTED, (
                f"nothing was heard of process {rank} for {SILENCE:.0f} s: its machine may be gone. Give the same "
                "command again, with --resume where something was done before."
            )
        return None

    found: list[tuple[str, str]] = []

    def over() -> bool:
        found.extend(filter(None, (lost(rank) for rank in sorted(waiting))))
        return bool(found) or not waiting

    _wait(over)
    return found[0] if found else (HERE, "")


def _wait(over: Callable[[], bool]) -> None:
    """Until it is over; asks the less often the longer it takes."""
    began = time.monotonic()
    while not over():
        time.sleep(min(1.0, max(0.001, (time.monotonic() - began) / 20)))


def from_main(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """``call()`` in the main process, and its result (picklable) in every one. Raises as `main_only` does."""
    (result,) = broadcast_object_list([main_only(accelerator, call)])
    return result


def agree(accelerator: Accelerator, facts: Mapping[str, Any], cure: str) -> None:
    """Stop every process if ``facts`` (by their names, picklable) are not the same in all. Every process must call it.

    Raises:
        ConfigError: what differs, and ``cure``, in the main process; AlreadyReported in the others.
    """
    own = f"process {accelerator.process_index} on {socket.gethostname()}"
    (_, main), *others = gather_object([(own, dict(facts))])
    problems = [
        f"{process} has other {name} than the main process ({theirs[name]!s:.24} and {main[name]!s:.24}): {cure}"
        for process, theirs in others
        for name in main
        if theirs[name] != main[name]
    ]
    if problems:
        raise ConfigError(problems) if accelerator.is_main_process else AlreadyReported


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
