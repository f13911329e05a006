"""What of an `export/` is pushed: its files with their hashes, and how they differ from a repository's. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from arrest_hub.card_facts import FIGURES
from arrest_hub.errors import ConfigError

CARD = "README.md"
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt")
# what an earlier push may have left in the repository and this one would not overwrite
OWN_FILES = ("model.safetensors", "model.safetensors.index.json", "preprocessor_config.json", "verdicts.parquet",
             *(f"figures/{name}" for name in FIGURES))  # fmt: skip


@dataclass(frozen=True)
class LocalFile:
    """A file to push: where its content is (a path, or the bytes), and its hashes as git and LFS make them."""

    content: Path | bytes
    size: int
    sha256: str
    git_sha1: str


def local_files(export: Path, card: bytes) -> dict[str, LocalFile]:
    """What is pushed, by its path in the repository: every file in ``export``, with ``card`` as its README.md.

    Raises:
        ConfigError: a link leads out of the folder, or there are pickles or no weights.
    """
    problems, files = [], {CARD: local_file(card)}
    for path in sorted(export.rglob("*")):
        name = path.relative_to(export).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(export.resolve()):
            problems.append(f"{path} is a link that leads out of the folder: put the file there instead, or remove it.")
        elif path.is_symlink() and path.is_dir():
            problems.append(f"{path} is a link to a folder: put the files there instead, or remove it.")
        elif path.suffix in PICKLES:
            problems.append(f"{path} is a pickle, which nobody should load: remove it. The weights are safetensors.")
        elif path.is_dir() or name == CARD or _is_left_out(name):
            continue
        elif not path.is_file():
            problems.append(f"{path} is neither a file nor a folder: remove it.")
        else:
            files[name] = local_file(path)
    if not any(name.endswith(".safetensors") for name in files):
        problems.append(f"{export} has no weights (model.safetensors).")
    if problems:
        raise ConfigError(problems)
    return dict(sorted(files.items()))


def local_file(content: Path | bytes) -> LocalFile:
    """A file to push, read once for its hashes."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if isinstance(content, bytes):
        sha256.update(content)
        sha1.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
                sha1.update(block)
    return LocalFile(content, size, sha256.hexdigest(), sha1.hexdigest())


def differing(files: dict[str, LocalFile], remote: dict[str, tuple[str, str | None]]) -> list[str]:
    """The files that the repository lacks or holds with other content."""
    same = [
        path for path, file in files.items()
        if path in remote and (remote[path][1] == file.sha256 if remote[path][1] else remote[path][0] == file.git_sha1)
    ]  # fmt: skip
    return [path for path in files if path not in same]


def architecture_name(config: Path | bytes) -> str:
    """What a config.json calls its network; "unknown" if it cannot be read."""
    try:
        values = json.loads(config if isinstance(config, bytes) else config.read_bytes())
        return str(values.get("architecture") or values["architectures"][0])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "unknown"


def _is_left_out(name: str) -> bool:
    """Hidden files, and what is half of a file since its writer was killed."""
    return any(part.startswith(".") for part in Path(name).parts) or name.endswith(".tmp")


def is_own(path: str) -> bool:
    """Whether a file in a repository is one that an earlier push put there, if this one does not have it."""
    return path in OWN_FILES or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path) is not None
