"""Python processes of their own for tests of the Hub, without the seconds in which each would import PyTorch.

The Hub's client reads its settings when it is imported, so every such test needs a process. These are forked from one
that has imported the large libraries that know nothing of the Hub, and are otherwise as if they had been started:
environment, folder, output and exit code are their own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

LIBRARIES = ("torch", "torchvision", "pandas", "pyarrow.parquet", "matplotlib.figure")
"""What is imported once. Nothing that imports huggingface_hub: see `_become`."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(LIBRARIES))


def run_python(words: list[str], *, env: dict[str, str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """``python *words``, [-W action:message] and a file, -m or -c -> its exit code and what it printed.

    Raises ``subprocess.TimeoutExpired`` where it takes more than ``timeout`` seconds.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        streams = [multiprocessing.reduction.DupFd(stream.fileno()) for stream in (out, err)]
        process = _context.Process(target=_become, args=(words, env, str(cwd), streams))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        printed = []
        for stream in (out, err):
            stream.seek(0)
            printed.append(stream.read())
        return subprocess.CompletedProcess(words, process.exitcode or 0, *printed)


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
