"""Python processes of their own for tests, without the seconds in which each would import PyTorch.

The Hub's client reads its settings when it is imported, so what talks to the tests' Hub needs a process, and so do
runs of several processes. These are forked from one that has imported the large libraries that know nothing of the
Hub, and are otherwise as if they had been started: environment, folder, output and exit code are their own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.reduction
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

LIBRARIES = (
    "torch", "torchvision.transforms.v2", "torch.distributed.checkpoint", "pandas", "pyarrow.dataset",
    "pyarrow.parquet", "matplotlib.figure", "pyautoattack", "fsspec", "yaml", "jinja2", "filelock",
)  # fmt: skip
"""What is imported once. Nothing that imports huggingface_hub: see `_become`."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(LIBRARIES))


class _Process:
    """``python *words`` under way, for at most ``timeout`` seconds. `end` closes its files."""

    def __init__(self, words: list[str], env: dict[str, str], cwd: Path, timeout: float) -> None:
        self.words, self.timeout, self.until = words, timeout, time.monotonic() + timeout
        self.printed = [tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")]  # noqa: SIM115
        streams = [multiprocessing.reduction.DupFd(stream.fileno()) for stream in self.printed]
        self.process = _context.Process(target=_become, args=(words, env, str(cwd), streams))
        self.process.start()

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; where that takes too long it is killed, and raises ``subprocess.TimeoutExpired``."""
        self.process.join(max(0.0, self.until - time.monotonic()))
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        texts = []
        for stream in self.printed:
            with stream:
                stream.seek(0)
                texts.append(stream.read())
        if late:
            raise subprocess.TimeoutExpired(self.words, self.timeout, *texts)
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *texts)


def run_python(words: list[str], *, env: dict[str, str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """``python *words``, [-W action:message] and a file, -m or -c -> its exit code and what it printed.

    Raises ``subprocess.TimeoutExpired`` where it takes more than ``timeout`` seconds.
    """
    return _Process(words, env, cwd, timeout).end()


def run_two(words: list[str], *, env: dict[str, str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """``python *words`` in two processes that find each other by the variables that torchrun sets.

    What they printed, one after the other, and the exit code of the first that failed. Raises as `run_python` does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [_Process(words, env | group | {"RANK": rank, "LOCAL_RANK": rank}, cwd, timeout) for rank in ("0", "1")]
    try:
        ends = [one.end() for one in both]
    finally:
        for one in both:
            one.process.kill()  # where the other took too long
    code = next((end.returncode for end in ends if end.returncode), 0)
    return subprocess.CompletedProcess(words, code, *("".join(texts) for texts in zip(
        *((end.stdout, end.stderr) for end in ends), strict=True
    )))  # fmt: skip


def _become(words: list[str], env: dict[str, str], cwd: str, streams: list) -> None:
    """In the forked process: what ``python *words`` would be."""
    assert "huggingface_hub" not in sys.modules, "its settings would be those of the process that was forked"
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if words[0] == "-W":
        action, message = words[1].split(":")
        warnings.filterwarnings(action, message)
        words = words[2:]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without them
