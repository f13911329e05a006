"""Files that are written whole or not at all: whoever is killed, or finds the disk full, leaves the one before."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8 under a temporary name, ``<name>.tmp``, and give it its own once all of it is there.

    Raises OSError where that is impossible.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
