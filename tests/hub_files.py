"""Files and model cards as the tests' Hub sees them: their hashes, their places, and what a card's header makes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
MAX_REGULAR = 10 << 20
"""Larger files are LFS files, whatever their name."""
PIECE = 1 << 20
"""How much of a file is in memory at a time."""


@dataclass(frozen=True)
class FilePart:
    """A part of a file, to be sent a piece at a time; ``corrupt``: with every byte changed."""

    path: Path
    start: int
    stop: int
    corrupt: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    def pieces(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = len(self)
            while left and (piece := file.read(min(left, PIECE))):
                left -= len(piece)
                yield piece.translate(bytes(range(255, -1, -1))) if self.corrupt else piece


def files_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def inside(folder: Path, path: str) -> Path | None:
    """``folder/path``, or None if that leads out of the folder."""
    target = (folder / path).resolve()
    return target if target.is_relative_to(folder.resolve()) else None


def is_lfs(name: str, size: int, sample: bytes) -> bool:
    """Whether a file is kept in the storage of large files; ``sample`` is its beginning."""
    return size > 0 and (Path(name).suffix in LFS_SUFFIXES or size > MAX_REGULAR or b"\0" in sample)


_hashes: dict[tuple[int, int, int, int], tuple[str, str]] = {}


def hashes(path: Path) -> tuple[str, str]:
    """Git's hash of a file and its SHA-256, read a piece at a time, and once for as long as it does not change."""
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        git, sha256 = hashlib.sha1(b"blob %d\0" % stat.st_size), hashlib.sha256()
        for piece in FilePart(path, 0, stat.st_size).pieces():
            git.update(piece)
            sha256.update(piece)
        _hashes[key] = (git.hexdigest(), sha256.hexdigest())
    return _hashes[key]


def describe_file(folder: Path, path: Path) -> dict[str, Any]:
    """A file or folder as the Hub lists it; ``oid`` is git's hash of what git keeps: of a large file, a pointer."""
    name = path.resolve().relative_to(folder.resolve()).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    size = path.stat().st_size
    oid, sha256 = hashes(path)
    entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": oid}
    with path.open("rb") as file:
        sample = file.read(512)
    if is_lfs(name, size, sample):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": len(pointer)}
    return entry


def split_card(text: str) -> str | None:
    """The YAML header of a README, if it has one."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    return match[1] if match else None


def card_data(folder: Path) -> dict[str, Any]:
    card = folder / "README.md"
    try:
        data = yaml.safe_load(split_card(card.read_text()) or "") if card.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        data = None
    return data if isinstance(data, dict) else {}


def _as_list(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [] if value is None else [str(value)]


def card_tags(card: dict[str, Any]) -> list[str]:
    """What the Hub makes of a header: the tags by which models are found."""
    tags = [*_as_list(card.get("library_name")), *_as_list(card.get("tags")), *_as_list(card.get("language"))]
    tags += _as_list(card.get("pipeline_tag"))
    tags += [f"dataset:{name}" for name in _as_list(card.get("datasets"))]
    relation = card.get("base_model_relation", "finetune")
    for name in _as_list(card.get("base_model")):
        tags += [f"base_model:{name}", f"base_model:{relation}:{name}"]
    tags += [f"license:{name}" for name in _as_list(card.get("license"))]
    return list(dict.fromkeys(tags))


def card_problems(text: str) -> list[str]:
    """What the Hub refuses about the header of a README."""
    header = split_card(text)
    try:
        data = yaml.safe_load(header or "{}")
    except yaml.YAMLError as error:
        return [f"YAML does not parse: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return ["The header must be a mapping"]
    problems = []
    for name in ("license", "license_name", "license_link", "library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            problems.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "language", "base_model", "metrics"):
        value = data.get(name, [])
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            problems.append(f'"{name}" must be a string or an array of strings')
    if not isinstance(data.get("model-index", []), list):
        problems.append('"model-index" must be an array')
    return problems


def ignored(path: str, patterns: str) -> bool:
    """Whether a .gitignore names this path; only plain patterns."""
    for line in map(str.strip, patterns.splitlines()):
        pattern = line.strip("/")
        if pattern and not line.startswith("#"):
            parts = [path, Path(path).name, *(parent.as_posix() for parent in Path(path).parents)]
            if any(fnmatch(part, pattern) for part in parts):
                return True
    return False


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)
