"""How a command ends: clear lines instead of tracebacks, an exit code, and processes that part in good order."""

from __future__ import annotations

import atexit
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn

from arrest_hub.errors import AlreadyReported, ArrestError, ConfigError, OtherProcessFailed, Terminated
from arrest_hub.files import FULL


class _Outliving:
    """A text stream whose reader may go away (`| head`): from then on what is written goes nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text)) or 0

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Within this context a run whose output nobody reads any more goes on, as one that is not printed would."""
    streams: list[Any] = [None if stream is None else _Outliving(stream) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                if stream is not None:
                    stream.flush()


@outlive_readers()
def run_cli(main: Callable[[Sequence[str]], None], argv: Sequence[str], *, resumes: bool = True) -> int:
    """Run a command; print an ArrestError as clear lines instead of a traceback. Returns the exit code."""
    try:
        main(argv)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
            return 2  # every process of a machine finds the same; one says it
        heading = f"{len(error.problems)} problems:\n  - " if len(error.problems) > 1 else ""
        print("error: " + heading + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    except (AlreadyReported, OtherProcessFailed):
        return 2
    except Terminated as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return error.exit_code
    except ArrestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and error.filename:
            name = str(error.filename)
            print(f"error: a file or folder cannot have this name of {len(name)} characters: {name[:60]}... Give a "
                  "shorter one.", file=sys.stderr)  # fmt: skip
            return 2
        remedies = dict.fromkeys(FULL, "Make room there")
        if error.filename:
            remedies |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Give the permission for that")
        if error.errno not in remedies:
            raise
        full = error.filename2 or error.filename  # of a copy the second
        place = f" at {full}" if full else ""
        again = "go on with the same command and --resume" if resumes else "give the same command again"
        print(f"error: {error.strerror}{place}. {remedies[error.errno]}, then {again}.", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not lost_another_process(error):
            raise
        again = "go on with the same command and --resume" if resumes else "give the same command again"
        print(
            f"error: process {os.environ.get('RANK')}: another process of the run ended, or did not answer in time "
            f"({' '.join(str(error).split())}). What it printed says why; then {again}.", file=sys.stderr,
        )  # fmt: skip
        return 1
    except KeyboardInterrupt:
        print("stopped; continue with the same command" + " and --resume" * resumes, file=sys.stderr)
        return 130
    return 0


def lost_another_process(error: RuntimeError) -> bool:
    """Whether an error of one of several processes says no more than that another one is gone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    from torch import distributed

    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "imed out", "timeout", "has exited")
    library = isinstance(error, distributed.DistError) or "gloo/transport" in str(error)
    return library and any(text in str(error) for text in gone)


LAST_SECONDS = 2.0
"""How much later than it would a process ends, of several that fail together, that does not say what is wrong."""


def leave(code: int) -> NoReturn:
    """End the process with ``code``; one of several without taking the interpreter down, as multiprocessing's do.

    Threads of Gloo outlive `destroy_process_group` after a sharded training, whose mesh PyTorch keeps in caches of its
    own. One that lets go of a tensor while the interpreter is taken down aborts the process, and its launcher then
    kills the others, also one that still writes the results (https://github.com/pytorch/pytorch/pull/179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if code and os.environ.get("RANK", "0") != "0":
            time.sleep(LAST_SECONDS)  # a launcher kills the others as soon as one has failed: the first says why
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody may be there to read it
                stream.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def parting() -> Iterator[None]:
    """At the end of this context the processes of a run that joined within it part; where it fails they do not, since
    the others would fail at once, louder and before it is said what is wrong."""
    from torch import distributed

    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
