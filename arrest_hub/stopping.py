"""SIGTERM, which schedulers send before they take a machine away, and Ctrl-C: a run writes a checkpoint and ends with
code 143 or 130.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

WORKER_SECONDS = 30
"""How long a data loading process outlives a SIGTERM: as long as schedulers usually wait before they kill."""


SAME_SECONDS = 1.0
"""Signals within this time are one request: a launcher passes on what the terminal sent too."""


class Termination:
    """Whether SIGTERM or SIGINT came, and the exit code that belongs to it."""

    def __init__(self) -> None:
        self.asked = False
        self.exit_code = 143
        self.since = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM's handler: takes note, and may be called again (launchers pass on what a process has got too)."""
        self.asked, self.since = True, time.monotonic()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """SIGINT's handler: the same for the first Ctrl-C; a second one, a while later, does not wait."""
        if self.asked:
            if time.monotonic() - self.since > SAME_SECONDS:
                raise KeyboardInterrupt
            return
        self.asked, self.exit_code, self.since = True, 130, time.monotonic()
        with suppress(OSError):  # nobody may be there to read it
            os.write(2, b"\nstopping after this step, with a checkpoint (Ctrl-C again: at once, without)\n")


@contextmanager
def watch_for_termination() -> Iterator[Termination]:
    """Within this context SIGTERM and a first SIGINT are noted instead of ending the process; the caller looks at
    ``asked``.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    before = signal.signal(signal.SIGTERM, termination.handle), signal.signal(signal.SIGINT, termination.interrupt)
    try:
        yield termination
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def outlive_termination(worker: int) -> None:
    """For a DataLoader's ``worker_init_fn``: SIGTERM ends the process `WORKER_SECONDS` later, unless it comes from the
    process that it works for, and SIGINT does nothing: that is for the one to act on that it works for.

    A scheduler, or a terminal, sends them to every process of a job, and a loader that dies at once takes the training
    with it before its checkpoint is written. SIGTERM ends it at once where the sender of a signal is not told (macOS).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads made from now on inherit it
    threading.Thread(target=_wait_for_signals, args=(os.getppid(),), daemon=True).start()


def _wait_for_signals(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
        timer = threading.Timer(WORKER_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()
