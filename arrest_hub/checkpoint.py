"""What a checkpoint holds, how it is written (whole or not at all) and how a run goes on from it.

A checkpoint is a folder `checkpoints/<phase>-<step>` (`step-000500` in the robust phase) with Accelerate's state
(weights, optimizer, gradient scaler, random states of every process), the averaged weights if there are any, and
`progress.json`. It is written under a temporary name and renamed once it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

PROGRESS = "progress.json"
EMA = "ema.safetensors"


@dataclass
class Progress:
    """Where a run stands. ``batch`` counts the batches of ``epoch`` that are already trained on; ``seconds`` is the
    time of this phase so far, over every resumption."""

    phase: str
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_score: float | None = None
    best_step: int | None = None
    model_revision: str | None = None
    dataset_revision: str | None = None
    num_processes: int = 1
    seconds: float = 0.0


def checkpoint_name(phase: str, step: int) -> str:
    """``step-000500`` for the robust phase, ``standard-000500`` for the clean one before it."""
    return f"{'step' if phase == 'robust' else phase}-{step:06d}"


def save_checkpoint(
    accelerator: Accelerator, folder: Path, progress: Progress, ema: nn.Module | None, keep: int
) -> Path:
    """Write a checkpoint into ``folder`` (the run's `checkpoints/`) and drop all but the ``keep`` newest of its phase.

    Every process must call it. Raises OSError, leaving earlier checkpoints untouched.
    """
    final = folder / checkpoint_name(progress.phase, progress.step)
    temporary = folder / f"{final.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        if ema is not None:
            save_file({name: value.contiguous() for name, value in ema.state_dict().items()}, temporary / EMA)
        (temporary / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _flush_to_disk(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        for old in list_checkpoints(folder, progress.phase)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(folder: Path, phase: str) -> list[Path]:
    """Whole checkpoints of a phase, oldest first."""
    prefix = checkpoint_name(phase, 0).rsplit("-", 1)[0]
    found = [path for path in folder.glob(f"{prefix}-*") if re.fullmatch(rf"{prefix}-\d+", path.name)]
    return sorted(
        (path for path in found if (path / PROGRESS).is_file()), key=lambda path: int(path.name.split("-")[1])
    )


def read_progress(checkpoint: Path) -> Progress:
    """The `progress.json` of a checkpoint."""
    return Progress(**json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: nn.Module | None) -> Progress:
    """Load a checkpoint into the prepared model, optimizer, scaler, random states and the averaged weights."""
    accelerator.load_state(str(checkpoint))
    if ema is not None:
        ema.load_state_dict(load_file(checkpoint / EMA))
    return read_progress(checkpoint)


def _flush_to_disk(folder: Path) -> None:
    """Make the files durable before the rename publishes them: a rename may otherwise outrun their contents."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from what identifies a draw (seed, phase, epoch, batch, rank, ...): a resumed run draws what the
    uninterrupted one draws, without any random state having been saved."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
