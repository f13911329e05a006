"""Training images that cannot be read: an error, or, up to a number, skipped and listed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from arrest_hub.images import ImageError, UnreachableImage, decode_image

ENTRY_BYTES = 512
"""Of shared memory for each image that may be skipped: --skip-corrupt has an upper bound."""
SHOWN = 20


class CorruptImages:
    """What the data loading processes of one process found unreadable: at most ``limit`` images, each once.

    In shared memory, so that processes that outlive an epoch, forked or spawned, know it of each other. ``known``:
    entries of an earlier run.
    """

    def __init__(self, limit: int, known: Iterable[dict[str, Any]] = ()) -> None:
        self.limit = limit
        self._entries = torch.zeros(limit, ENTRY_BYTES, dtype=torch.uint8).share_memory_()
        self._keys = torch.zeros(limit, dtype=torch.int64).share_memory_()
        self._count = torch.zeros((), dtype=torch.int64).share_memory_()
        self._lock = multiprocessing.Lock()
        for entry in known:
            self.skip(entry)

    def skip(self, entry: dict[str, Any]) -> bool:
        """Take note of an image ("key", and what is known of it); False when there are too many."""
        with self._lock:
            count, key = int(self._count), int(entry["key"], 16)
            if key in self._keys[:count]:
                return True
            if count == self.limit:
                return False
            while len(text := json.dumps(entry).encode()) > ENTRY_BYTES:  # an error or a path without end
                longest = max(("path", "error"), key=lambda name: len(str(entry.get(name))))
                entry = entry | {longest: str(entry[longest])[: len(str(entry[longest])) // 2] + "..."}
            self._entries[count, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._keys[count] = key
            self._count += 1
            return True

    def knows(self, value: Any) -> bool:
        """Whether this encoded image, as `read_image` takes it, is among those found; cheap while there are none."""
        count = int(self._count)
        return count > 0 and int(image_key(value), 16) in self._keys[:count]

    def entries(self) -> list[dict[str, Any]]:
        """What was found so far: "key", "index", "path" and "error" of each image."""
        rows = self._entries[: int(self._count)].numpy()
        return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def image_key(value: Any) -> str:
    """15 hexadecimal digits that tell an encoded image of a stream from others, by its path and contents.

    Images that are missing (None, or neither path nor contents) have one key: nothing tells them apart, as the position
    of an image in a stream is another one in every epoch.
    """
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (None, value)
    return _digits(str(path).encode() + b"\0" + (content or b""))


def _digits(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()[:15]


def read_image(
    value: Any,
    split: str,
    index: int,
    corrupt: CorruptImages | None = None,
    *,
    fixed: bool = False,
    row: int | None = None,
) -> Image.Image | None:
    """The image ``value`` (bytes, or a dict of ``bytes`` and ``path``) at position ``index`` of ``split``, RGB; None if
    it is skipped. ``fixed``: the position tells the image from all others. ``row``: where it is in the split that this
    one was drawn from.

    Raises ImageError naming split, position and path if it cannot be read and is not skipped, UnreachableImage, never
    skipped, if its storage does not answer.
    """
    path = value.get("path") if isinstance(value, dict) else None
    where = f" ({path})" if path else "" if row is None else f" (row {row} of the split that it was drawn from)"
    try:
        if value is None:
            raise ImageError("it is missing")
        return decode_image(value)
    except UnreachableImage as error:
        raise UnreachableImage(f"split {split!r}, image {index}{where}: {error}.") from error
    except ImageError as error:
        reason = str(error)
    message = f"split {split!r}, image {index}{where}: {reason}. Repair it, or put another image in its place"
    if corrupt is None:  # an image that is evaluated
        raise ImageError(f"{message}.")
    if not corrupt.limit:
        raise ImageError(f"{message}, or skip up to N such images with --skip-corrupt N.")
    key = _digits(str(index).encode()) if fixed else image_key(value)
    if corrupt.skip({"key": key, "index": index, "path": path, "error": reason}):
        return None
    raise ImageError(f"{message}. {too_many(corrupt.entries(), corrupt.limit)}")


def too_many(entries: list[dict[str, Any]], limit: int) -> str:
    """What to say when there are more unreadable images than may be skipped."""
    found = ", ".join(str(entry["path"] or entry["index"]) for entry in entries[:SHOWN])
    more = ", ..." if len(entries) > SHOWN else ""
    return f"More than --skip-corrupt {limit} images cannot be read: {found}{more}. Repair the dataset, or allow more."


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a corrupt.jsonl, without those that were cut short; none if there is no such file."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            entry = json.loads(line)
            entries += [entry] if "key" in entry else []
        except (json.JSONDecodeError, TypeError):
            continue
    return entries
