"""Xet for the tests' Hub: the client's own library, which keeps chunks in folders on this disk."""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hub_files import link_or_copy
from hub_server import Refused


@dataclass(frozen=True)
class XetFile:
    store: Path
    xet_hash: str
    size: int


class XetStore:
    """Where the client's Xet library leaves what it uploads, and finds what it downloads: folders on this disk.

    A process keeps a folder locked for as long as it lives, so that each upload and each download gets its own, and
    what was uploaded is read from a copy; by a process of its own, for the library knows one home per process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.numbers = itertools.count(1)
        self.stores: list[Path] = []
        self.uploaded: dict[str, XetFile] = {}
        self.read: set[Path] = set()

    def new_store(self, kind: str) -> Path:
        store = self.folder / f"{kind}-{next(self.numbers)}"
        store.mkdir()
        return store

    def for_upload(self) -> Path:
        store = self.new_store("write")
        self.stores.append(store)
        return store

    def for_download(self, files: list[Path]) -> Path:
        """A store that holds these files."""
        store = self.new_store("read")
        self._run(
            "with session.new_upload_commit(endpoint=sys.argv[1]) as commit:\n"
            "    for path in sys.argv[2:]: commit.start_upload_file(path, sha256=hf_xet.SKIP_SHA256)",
            f"local://{store}", *map(str, files),
        )  # fmt: skip
        return store

    def look(self) -> None:
        """Find out what was uploaded since the last look."""
        for store in self.stores:
            for shard in store.glob("xet/xorbs/shards/*.mdb"):
                if shard not in self.read:
                    self.read.add(shard)
                    for sha256, xet_hash, size in read_shard(shard.read_bytes()):
                        self.uploaded[sha256] = XetFile(store, xet_hash, size)

    def read_back(self, sha256: str, target: Path) -> str:
        """Put together the uploaded file; its Xet hash."""
        file = self.uploaded[sha256]
        copy = self.new_store("copy")
        shutil.copytree(file.store / "xet" / "xorbs", copy / "xet" / "xorbs", copy_function=link_unless_database)
        self._run(
            "with session.new_file_download_group(endpoint=sys.argv[1]) as group:\n"
            "    group.start_download_file(hf_xet.XetFileInfo(sys.argv[2], int(sys.argv[3])), sys.argv[4])",
            f"local://{copy}", file.xet_hash, str(file.size), str(target),
        )  # fmt: skip
        shutil.rmtree(copy)
        return file.xet_hash

    def _run(self, code: str, *arguments: str) -> None:
        code = "import sys, hf_xet\nsession = hf_xet.XetSession()\n" + code
        environment = os.environ | {"HF_HOME": str(self.folder / "home")}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Refused(500, None, done.stderr.strip().splitlines()[-1])


def read_shard(content: bytes) -> Iterator[tuple[str, str, int]]:
    """(SHA-256, Xet's hash, size) of the files in a shard, the list of contents that an upload leaves.

    After 48 bytes, each file has a head (hash, flags, number of segments), its segments, as many checks if bit 31 is
    set, and its SHA-256 if bit 30 is. All in units of 48 bytes; hashes are written as four little-endian numbers.
    """

    def written(at: int) -> str:
        return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", content, at))

    at = 48
    while content[at : at + 32] != b"\xff" * 32:
        flags, segments = struct.unpack_from("<2I", content, at + 32)
        size = sum(struct.unpack_from("<I", content, at + 48 * number + 36)[0] for number in range(1, segments + 1))
        end = at + 48 * (1 + segments * (2 if flags >> 31 & 1 else 1))
        if flags >> 30 & 1:
            yield written(end), written(at), size
            end += 48
        at = end


def link_unless_database(source: str, target: str) -> None:
    """What is written once may be shared; the database of a Xet store may not."""
    if source.endswith(".redb"):
        shutil.copy2(source, target)
    else:
        link_or_copy(Path(source), Path(target))
