"""The folder of a run: what lies where in it, whether it may be used, and that one run at a time uses it."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from arrest_hub.checkpoint import put_back_replaced, remove_leftovers
from arrest_hub.config import FinetuneConfig
from arrest_hub.config_sources import load_config
from arrest_hub.errors import ArrestError
from arrest_hub.files import is_draft, write_whole
from arrest_hub.processes import main_only, raise_together

LOCK = ".lock"
LOCK_SECONDS = 15
"""How long to wait for another run to end. Data loading processes hold on to a folder for some seconds after their
run was killed."""
SHARED_SECONDS = 30
"""How long a folder that one node made may take to be seen by another."""


@dataclass
class RunPaths:
    """The folders of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def corrupt(self) -> Path:
        """Training images that were skipped; absent if there were none."""
        return self.root / "corrupt.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def teacher(self) -> Path:
        """Where the network that the clean phase trained is kept; absent if there was no such phase."""
        return self.root / "teacher"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def has_work(self) -> bool:
        """Whether training left anything here: a run that failed at its first image did not."""
        return self.teacher.exists() or self.export.exists() or any(self.checkpoints.glob("*"))


def is_unused(folder: Path) -> bool:
    """Whether it is not there, or holds no more than a start leaves that was killed at once."""
    return not folder.is_dir() or all(path.name == LOCK or is_draft(path) for path in folder.iterdir())


def output_dir_problems(config: FinetuneConfig, paths: RunPaths) -> list[str]:
    """Why the output folder cannot be used: it holds something that is neither to be resumed nor overwritten.

    Changes nothing. A folder that is no run is never overwritten, nor one that the run reads from.
    """
    root = paths.root
    if root.exists() and not root.is_dir():
        return [f"--output-dir {root} is a file: give a folder."]
    if is_unused(root):
        return []
    if not paths.config.is_file():
        return [
            f"--output-dir {root} is not empty and is not a run (it has no config.yaml): give another folder. "
            "Nothing in it is touched, not even with --overwrite."
        ]
    if config.overwrite:
        return [
            f"--overwrite would delete {name} {source}, which is inside --output-dir {root}: give another --output-dir."
            for name, source in (("--model", config.model), ("--dataset", config.dataset))
            if (path := Path(source).expanduser()).exists() and path.resolve().is_relative_to(root.resolve())
        ]
    if not config.resume and not config.dry_run and paths.has_work:
        return [
            f"--output-dir {root} already holds a run. Continue it with --resume, replace it with --overwrite, "
            "or give another --output-dir."
        ]
    return []


@contextmanager
def hold_run_folder(config: FinetuneConfig, paths: RunPaths, accelerator: Accelerator) -> Iterator[None]:
    """Create the run folder and write config.yaml, deleting an earlier run if `--overwrite` was given; and keep every
    other run out of it until the end of the context.

    Raises:
        ArrestError: another run is using it, or it is not on storage that all processes share.
    """
    with hold_folder(paths.root, partial(output_dir_problems, config, paths), accelerator):
        main_only(accelerator, lambda: _start(config, paths))
        raise_together(accelerator, _not_shared(paths, accelerator.process_index))
        yield


@contextmanager
def hold_folder(root: Path, problems: Callable[[], list[str]], accelerator: Accelerator) -> Iterator[None]:
    """Make a folder, and keep every other run and evaluation out of it until the end of the context.

    ``problems`` says why what is in it may not be touched. It was asked once before, and then loading took its time.

    Raises:
        ArrestError: there are any, another run is using the folder, or it cannot be made.
    """
    lock = FileLock(root / LOCK)

    def take() -> None:
        if problem := make_folder(root) or _lock(lock, root) or "\n".join(problems()):
            raise ArrestError(problem)

    try:
        main_only(accelerator, take)
        yield
    finally:
        lock.release()


def make_folder(path: Path) -> str | None:
    """Make the output folder; if that is impossible, why."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--output-dir {path} cannot be made: {error.strerror or type(error).__name__}. Give another folder."
    return None


def _lock(lock: FileLock, root: Path) -> str | None:
    """Take the lock; if that is impossible, why."""
    for seconds in (0, LOCK_SECONDS):
        try:
            lock.acquire(timeout=seconds)
            return None
        except Timeout:
            if not seconds:
                print(f"another run is using {root}: waiting {LOCK_SECONDS} s for it to end", flush=True)
    return (
        f"--output-dir {root} is in use by another run that has not ended: wait for it, or give another --output-dir."
    )


def _start(config: FinetuneConfig, paths: RunPaths) -> None:
    if config.overwrite:
        for path in paths.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in (paths.root / LOCK, paths.config):  # without these it would be open to all, or no run
                path.unlink()
    if not (config.resume and paths.config.is_file()):  # first: a folder without it is never touched again
        write_whole(paths.config, config.to_yaml())
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    put_back_replaced(paths.checkpoints)
    put_back_replaced(paths.root)
    remove_leftovers(paths.checkpoints, "*.tmp", ".best-*", ".last-*")
    remove_leftovers(paths.root, "export.*.tmp", ".teacher-*")
    for path in filter(is_draft, paths.root.iterdir()):
        path.unlink()
    if not paths.has_work:
        paths.log.unlink(missing_ok=True)
        paths.corrupt.unlink(missing_ok=True)


def record_batches(config: FinetuneConfig, paths: RunPaths) -> None:
    """Put the batch size of a run that goes on with another one into its config.yaml."""
    saved = load_config(paths.config)
    if (saved.batch_size, saved.grad_accum_steps) == (config.batch_size, config.grad_accum_steps):
        return
    saved.batch_size, saved.grad_accum_steps = config.batch_size, config.grad_accum_steps
    write_whole(paths.config, saved.to_yaml())


def _not_shared(paths: RunPaths, process: int) -> str | None:
    """What to say if the folder that the main process made is not seen here."""
    until = time.monotonic() + SHARED_SECONDS
    while not paths.config.is_file():
        if time.monotonic() > until:
            return (
                f"--output-dir {paths.root} is not the same folder on every node (process {process} on "
                f"{socket.gethostname()} does not see it): give a folder on storage that all nodes share."
            )
        time.sleep(0.5)
    return None
