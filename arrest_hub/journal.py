"""What an evaluation has found so far, batch by batch, so that a run killed at any moment loses one batch at most.

`progress/rank-00000.jsonl` holds a line for each batch that a process finished. A batch is a fixed set of images,
whatever the number of processes, so an evaluation may go on with another number of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.utils import gather_object

from arrest_hub.errors import AlreadyReported, ConfigError
from arrest_hub.files import end_last_line

Entry = dict[str, Any]


class Journal:
    """Finished batches by (stage, number). ``folder`` None: kept in memory alone.

    ``identity`` says what the figures depend on (settings, weights, data); a journal of something else is refused.
    Every process must construct one.

    Raises:
        ConfigError: from the constructor, naming what differs; in other processes than the main one AlreadyReported.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any], accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.entries: dict[tuple[str, int], Entry] = {}
        self.folder = folder
        self._file: TextIO | None = None
        if folder is None:
            return
        identity = json.loads(json.dumps(identity))  # as it comes back from a file: tuples are lists there
        path = folder / f"rank-{accelerator.process_index:05d}.jsonl"
        begun, problems = self._read(folder, identity)
        problems = list(dict.fromkeys(gather_object(problems)))
        if problems:
            raise ConfigError(problems) if accelerator.is_main_process else AlreadyReported
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            end_last_line(path)
        self._file = path.open("a", encoding="utf-8")
        if path not in begun:
            self._write({"identity": identity})

    def _read(self, folder: Path, identity: dict[str, Any]) -> tuple[set[Path], list[str]]:
        """Take the entries of all files; which files say whose they are (one may have been cut before it did), and why
        some are of something else."""
        begun: set[Path] = set()
        problems: list[str] = []
        for path in sorted(folder.glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut short by the interruption
                if not isinstance(entry, dict):
                    continue
                if isinstance(old := entry.get("identity"), dict):
                    problems += identity_problems(old, identity)
                    begun.add(path)
                elif path in begun and {"stage", "batch"} <= entry.keys():
                    self.entries[entry.pop("stage"), entry.pop("batch")] = entry
        return begun, problems

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def add(self, stage: str, batch: int, entry: Entry) -> None:
        """Keep what a batch gave; JSON values only."""
        self.entries[stage, batch] = entry
        self._write({"stage": stage, "batch": batch, **entry})

    def gather(self, stage: str, batches: int) -> list[Entry]:
        """The entries of a stage, in order, from all processes. Every process must call it.

        Raises:
            RuntimeError: a batch is missing.
        """
        own = [(number, entry) for (name, number), entry in self.entries.items() if name == stage]
        everyone = dict(gather_object(own))
        missing = [number for number in range(batches) if number not in everyone]
        if missing:
            raise RuntimeError(f"stage {stage}: batches {missing[:5]} of {batches} were not evaluated by any process")
        self.entries |= {(stage, number): entry for number, entry in everyone.items()}
        return [everyone[number] for number in range(batches)]

    def share(self) -> None:
        """Tell every process what the others have read: nodes need not share a disk. Every process must call it."""
        self.entries |= dict(gather_object(list(self.entries.items())))

    def close(self) -> None:
        """Close the file; the folder stays, for a resumption."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Delete the folder: everything is in the results now. For one process of each node."""
        self.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def identity_problems(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What an evaluation began with and no longer has: a line for each."""
    return [
        f"cannot resume: {key} was {old.get(key)} when the evaluation began and is {new.get(key)} now. Start anew with "
        "--overwrite, or with another --output-dir."
        for key in old | new
        if old.get(key) != new.get(key)
    ]
