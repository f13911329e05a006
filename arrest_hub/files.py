"""Files that are written whole or not at all (whoever is killed, or finds the disk full, leaves the one before), and
what they may be called."""

from __future__ import annotations

import errno
import os
import re
import secrets
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text (in UTF-8) or bytes under a temporary name, and give it its own once all of it is there.

    Several processes may write the same file at once. Raises OSError where it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # as `is_draft` knows them
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # the rename may otherwise outrun the contents where the power fails
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def end_last_line(path: Path) -> None:
    """Put a line end after a line that was cut short, by a kill or a full disk, so that the next one can be read."""
    with path.open("rb+") as file:
        if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")


def safe_name(text: str) -> str:
    """``text`` as a part of a file's name: letters, digits, dots and underscores, 80 bytes at most."""
    kept = re.sub(r"[^\w.]+", "_", text).strip("_.")
    return kept.encode()[:80].decode(errors="ignore") or "x"


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a file that is full."""


def as_os_error(error: Exception, place: Path) -> Exception:
    """The OSError that ``error`` stands for, with ``place``: safetensors, and copies of whole folders, put the number
    into their text alone. ``error`` itself where there is none."""
    found = re.search(r"(?:os error |Errno )(\d+)", str(error))
    return error if found is None else OSError(int(found[1]), os.strerror(int(found[1])), str(place))


def is_draft(path: Path) -> bool:
    """Whether this is what `write_whole` leaves where it is killed."""
    return re.fullmatch(r".+\.[0-9a-f]{8}\.tmp", path.name) is not None and path.is_file()
